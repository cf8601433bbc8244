"""The private names of torch and Pyro that this package uses.

Each entry, or group of entries, says the version it was seen in, why no public name serves, and what happens where it
is missing. Not here are names that subclasses are meant to override or call, as ``_validate_sample`` of a distribution,
and the dictionaries of a module, as ``_buffers``; a test lists them.
"""

__all__ = [
    "HANDLER_STACK",
    "PyroContext",
    "call_context",
    "declare_param",
    "forget_on_state_dict",
    "forget_params",
    "forget_place",
    "in_backward_pass",
    "in_function_transform",
    "is_deferred",
    "is_untraced",
    "is_zero_tensor",
    "leave_pyro",
    "mask_of",
    "move",
    "not_compiled",
    "num_dispatch_modes",
    "on_state_dict",
    "path_of",
    "rename",
    "set_place",
    "set_sites",
    "site_name",
    "sites_of",
    "store_param",
    "stored_params",
    "tensor_without_memory",
    "tree_leaves",
    "tree_map_only",
    "validation_deferred",
    "validation_kept",
    "version_of",
    "without_torch_function",
]

import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from functools import wraps
from operator import attrgetter
from typing import Any, ParamSpec, TypeVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.nn.module import _Context
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import Distribution

# torch 2.13. Nested containers; torch has no public twin (optree is another package). Missing: the import fails.
from torch.utils._pytree import tree_leaves, tree_map_only

P = ParamSpec("P")
S = TypeVar("S", bound=Tensor)
T = TypeVar("T")

# torch 2.13. torch's notes on extending it use this name; there is no public one. Missing: the import fails.
without_torch_function = torch._C.DisableTorchFunctionSubclass

# torch 2.13. Whether a transform such as vmap is active, as autograd.Function.apply asks; how many TorchDispatchModes
# are; whether a tensor is the zero without memory that forward-mode autograd makes. No public function tells. Missing:
# the import fails.
in_function_transform: Callable[[], bool] = torch._C._are_functorch_transforms_active
num_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
is_zero_tensor: Callable[[Tensor], bool] = Tensor._is_zerotensor

# torch 2.13. How often a tensor was changed in place; torch's notes on autograd name it. Missing: the call fails.
version_of: Callable[[Tensor], int] = attrgetter("_version")

# Pyro 1.9.2. The mask of a masked distribution, which has no public attribute. Missing: the call fails.
mask_of: Callable[[dist.MaskedDistribution], Tensor | bool] = attrgetter("_mask")

# Pyro 1.9.2. Which handlers are active; the public am_i_wrapped() tells only whether any is. Missing: the import fails.
HANDLER_STACK: list[Any] = _PYRO_STACK


def not_compiled(function: Callable[P, T]) -> Callable[P, T]:
    """Hides a function from ``torch.compile``, without loading the compiler.

    torch 2.9 to 2.15. The public ``torch.compiler.disable`` loads the compiler when it is applied, this one with the
    first call: 0.9 s, an environment variable and a filter of warnings. Missing: the import fails.
    """
    hidden = torch._disable_dynamo(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        return (hidden if "torch._dynamo" in sys.modules else function)(*args, **kwargs)

    return call


def tensor_without_memory(cls: type[S], like: Tensor) -> S:
    """Returns a tensor of a subclass that has a shape and no memory, and refuses to give an address.

    torch 2.13. torch's notes on extending it use the first name, its FakeTensor the second. Missing: the call fails.
    """
    tensor = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    return tensor


def in_backward_pass() -> bool:
    """Tells whether autograd is computing gradients, so that what runs is a checkpoint's forward pass once more.

    torch 2.13. torch.utils.checkpoint asks in the same way; there is no public function. Missing: the call fails.
    """
    return torch._C._current_graph_task_id() != -1


@contextmanager
def validation_kept() -> Iterator[None]:
    """Undoes that torch's compiler switches the validation of distributions off where it is first used.

    torch 2.9 to 2.15. torch has a public name to set that default, none to read it. Missing: an export to ONNX fails.
    """
    validates = Distribution._validate_args
    try:
        yield
    finally:
        Distribution.set_default_validate_args(validates)


@contextmanager
def validation_deferred() -> Iterator[None]:
    """Has distributions that are made meanwhile, and would be validated, note this instead, see :func:`is_deferred`.

    torch 2.9 to 2.15. As for :func:`validation_kept`; 0 is as good a default as False, and no ``validate_args=False``.
    """
    with validation_kept():
        if Distribution._validate_args:
            Distribution.set_default_validate_args(0)  # type: ignore[arg-type]
        yield


def is_deferred(distribution: Distribution | type[Distribution]) -> bool:
    """Tells whether the validation of a distribution was deferred where it was made; of the class, whether it is now.

    torch 2.9 to 2.15. There is no public name for whether a distribution validates. Missing: the call fails.
    """
    validates = distribution._validate_args
    return not validates and validates is not False


def on_state_dict(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Has a function of module, state and prefix change each state of a module.

    torch 2.13. The public ``register_state_dict_post_hook`` is not in every torch that is supported, and its handle
    does not remove the hook of a copy of the module. Missing: the call fails.
    """
    module._register_state_dict_hook(hook)


def forget_on_state_dict(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Undoes :func:`on_state_dict`, also of a copy of the module."""
    module._state_dict_hooks = OrderedDict((k, h) for k, h in module._state_dict_hooks.items() if h is not hook)


def is_untraced(site: dict[str, Any]) -> bool:
    """Tells whether Pyro's own trace would not record a site, such as a deterministic one.

    Pyro 1.9.2. Pyro marks such sites by these keys, which nothing public reads. Missing: the sites are recorded.
    """
    return bool(site["infer"].get("_do_not_trace") or site["infer"].get("_deterministic"))


# Pyro's parameter store, seen in Pyro 1.9.2. The public named_parameters() is a view without look-up; setdefault copies
# a tensor that is not contiguous; del changes dictionaries that a loop over the store may be going through when a
# garbage collection removes parameters. Missing: the calls fail.


def stored_params() -> dict[str, Tensor]:
    """Returns the parameters by name, without constraints."""
    return pyro.get_param_store()._params


def store_param(name: str, parameter: Tensor) -> None:
    """Puts a parameter into the store as it is."""
    store = pyro.get_param_store()
    store._params[name] = parameter
    store._param_to_name[parameter] = name
    store._constraints[name] = constraints.real


def forget_params(names: Collection[str]) -> None:
    """Removes parameters from the store."""
    store = pyro.get_param_store()
    store._params = {key: value for key, value in store._params.items() if key not in names}
    store._param_to_name = {value: key for value, key in store._param_to_name.items() if key not in names}
    store._constraints = {key: value for key, value in store._constraints.items() if key not in names}


# The path, context and sites of a PyroModule, seen in Pyro 1.9.2. Reading a site by its public attribute samples it;
# the others have no public reader, and are publicly set only by assigning the module to another one. Missing: the
# calls fail, but no module seems to have sites, and names change in a call where set_place has no effect.

# What modules share in a call of a PyroModule, whose beginning nothing public tells. Missing: the import fails.
PyroContext = _Context


def path_of(module: nn.Module) -> str:
    """Returns the path of a module below the outermost one, which the names of its sites begin with."""
    return module.__dict__["_pyro_name"]


def rename(module: Any, path: str) -> None:
    """Gives a module another path."""
    module._pyro_name = path


def call_context(module: nn.Module) -> Any:
    """Returns the context of a call of a module; ``active`` says whether the call is under way."""
    return module.__dict__["_pyro_context"]


def set_place(module: Any, path: str, context: Any, on_move: Callable[[str, Any], None]) -> None:
    """Gives a module a path and a context, and what to call when another module takes it in."""
    module._pyro_name, module._pyro_context = path, context
    module.__dict__["_pyro_set_supermodule"] = on_move


def forget_place(module: nn.Module) -> None:
    """Undoes what :func:`set_place` says of being taken in."""
    module.__dict__.pop("_pyro_set_supermodule", None)


def move(module: Any, path: str, context: Any) -> None:
    """Gives a module and those in it the paths and the context that another module's has for them."""
    type(module)._pyro_set_supermodule(module, path, context)


def sites_of(module: nn.Module) -> MutableMapping[str, Any]:
    """Returns what Pyro samples where an attribute of a module is read, by attribute; of other modules, nothing."""
    return module.__dict__.get("_pyro_samples", {})


def set_sites(module: Any, sites: MutableMapping[str, Any]) -> None:
    """Sets what Pyro samples where an attribute of a module is read, by attribute."""
    module._pyro_samples = sites


def site_name(module: nn.Module, attribute: str) -> str:
    """Returns the name of the sample site that an attribute of a module is."""
    path = path_of(module)
    return f"{path}.{attribute}" if path else attribute


def declare_param(module: Any, attribute: str, event_dim: int) -> None:
    """Declares an unconstrained parameter of a module, whose value is there already, as a ``PyroParam``.

    The public assignment of a ``PyroParam`` sets the value, too.
    """
    module._pyro_params[attribute] = constraints.real, event_dim


def leave_pyro(module: Any, original: type[nn.Module]) -> None:
    """Makes a module without sites one of its original class again.

    The public ``to_pyro_module_`` has no inverse; layers of torch 2.13 that keep a list of their weights renew it by a
    private method. Missing: Pyro's attributes stay, or the call fails.
    """
    module.__class__ = original
    for name in ("_pyro_name", "_pyro_context", "_pyro_params", "_pyro_samples", "_pyro_set_supermodule"):
        module.__dict__.pop(name, None)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()
