"""What is used of torch and Pyro that they call private, all in one place.

Each says in which version it was seen, why no public name serves, and what happens where it is missing.
"""

__all__ = ["not_compiled", "validation_kept"]

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.distributions import Distribution

P = ParamSpec("P")
T = TypeVar("T")


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Hides a function from ``torch.compile``, without loading the compiler.

    ``torch.compiler.disable`` loads it when it is applied, ``torch._disable_dynamo`` (torch 2.7 to 2.15) with the first
    call: 0.9 s, an environment variable and a filter of warnings. Nothing is compiled before somebody loads it. Without
    that name, the import of this package fails.
    """
    hidden = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return (hidden if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return call


@contextmanager
def validation_kept() -> Iterator[None]:
    """Undoes that torch's compiler (2.7 to 2.15) switches the validation of distributions off where it is first used.

    torch has a public name to set that default, none to read it. Where it is missing, an export to ONNX fails.
    """
    validates = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validates)
