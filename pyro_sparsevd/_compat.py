"""What is used of torch and Pyro that they call private, all in one place.

Each says why no public name serves. All were seen in torch 2.13.0 and Pyro 1.9.2; without one, the import or the call
fails.
"""

__all__ = [
    "PyroContext",
    "call_context",
    "forget_on_state_dict",
    "in_backward_pass",
    "in_function_transform",
    "not_compiled",
    "on_state_dict",
    "site_name",
    "sites_of",
    "tensor_without_memory",
    "validation_kept",
    "without_torch_function",
]

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from pyro.nn.module import _Context
from torch import Tensor, nn
from torch.distributions import Distribution

P = ParamSpec("P")
S = TypeVar("S", bound=Tensor)
T = TypeVar("T")


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Hides a function from ``torch.compile``, without loading the compiler.

    ``torch.compiler.disable`` loads it when it is applied, ``torch._disable_dynamo`` (torch 2.9 to 2.15) with the first
    call: 0.9 s, an environment variable and a filter of warnings. Nothing is compiled before somebody loads it. Without
    that name, the import of this package fails.
    """
    hidden = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return (hidden if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return call


# torch's notes on extending it use this name; there is no public one.
without_torch_function = torch._C.DisableTorchFunctionSubclass


def tensor_without_memory(cls: type[S], like: Tensor) -> S:
    """Returns a tensor of a subclass that has a shape and no memory, whose address nobody gets.

    torch's notes on extending it use the first name, its FakeTensor the second; there are no public ones.
    """
    tensor = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    return tensor


def in_backward_pass() -> bool:
    """Tells whether autograd is computing gradients, and what runs is a checkpoint's forward pass once more.

    torch.utils.checkpoint asks in the same way; there is no public function.
    """
    return torch._C._current_graph_task_id() != -1


def in_function_transform() -> bool:
    """Tells whether a transform of torch.func, such as vmap, is at work.

    ``torch.autograd.Function.apply`` asks in the same way; there is no public function.
    """
    return torch._C._are_functorch_transforms_active()


@contextmanager
def validation_kept() -> Iterator[None]:
    """Undoes that torch's compiler (2.9 to 2.15) switches the validation of distributions off where it is first used.

    torch has a public name to set that default, none to read it. Where it is missing, an export to ONNX fails.
    """
    validates = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validates)


# What the modules of a PyroModule share during a call; nothing public is told of its beginning and end.
PyroContext = _Context


def on_state_dict(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Has a function of module, state and prefix change each state of a module.

    The public ``register_state_dict_post_hook`` is this one; not every torch that is supported has it.
    """
    module._register_state_dict_hook(hook)


def forget_on_state_dict(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Undoes :func:`on_state_dict`, in a copy of the module, too, of which nobody has torch's handle."""
    module._state_dict_hooks = OrderedDict((k, h) for k, h in module._state_dict_hooks.items() if h is not hook)


def site_name(module: nn.Module, attribute: str) -> str:
    """Returns the name of the sample site that an attribute of a ``PyroModule`` is.

    Pyro 1.9.2. The path of a module has no public reader. Missing: the call fails.
    """
    path = module.__dict__["_pyro_name"]
    return f"{path}.{attribute}" if path else attribute


def sites_of(module: nn.Module) -> MutableMapping[str, Any]:
    """Returns what Pyro samples where an attribute of a module is read, by attribute; of other modules, nothing.

    Pyro 1.9.2. Public access to the attribute would sample it. Missing: no module seems to have sites.
    """
    return module.__dict__.get("_pyro_samples", {})


def call_context(module: nn.Module) -> Any:
    """Returns the context of a call of a ``PyroModule``; ``active`` says whether the call is under way.

    Pyro 1.9.2. It has no public reader. Missing: the call fails.
    """
    return module.__dict__["_pyro_context"]
