"""What is used of torch and Pyro that they call private, all in one place.

Each says in which version it was seen, why no public name serves, and what happens where it is missing.
"""

__all__ = ["not_compiled"]

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Hides a function from ``torch.compile``, without loading the compiler.

    ``torch.compiler.disable`` loads it when it is applied, ``torch._disable_dynamo`` (torch 2.6 to 2.15) with the first
    call: 0.9 s, an environment variable and a filter of warnings. Nothing is compiled before somebody loads it. Without
    that name, the import of this package fails.
    """
    hidden = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return (hidden if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return call
