"""Which operation a node of a traced network is."""

__all__ = ["InputTracer", "Recorder", "WeightUses", "operation_of", "reads_batch_size", "sources"]

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from .._compat import version_of
from .._modules import call_arguments, named_leaves, tensors_of, with_tensors
from .flow import Channelwise, Concatenation, Flattening, Layer, Operation, Pooling, WeightedSum


class InputTracer(fx.Tracer):
    """Traces a network that is run on inputs of any kind: a function from the list of their tensors to that of its own.

    What else is among the inputs, such as None, has the value that it has.
    """

    def __init__(self, x: Any) -> None:
        super().__init__()
        self._x = x

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Returns what is traced, and its arguments, of which it needs none."""
        count = len(tensors_of(self._x))
        proxies = [self.create_proxy("placeholder", f"input_{i}", (), {}) for i in range(count)]
        args, kwargs = call_arguments(self.root, with_tensors(self._x, proxies))

        def outputs() -> list[Any]:
            leaves = named_leaves("", root_fn(self.root, *args, **kwargs))
            return [leaf for _, leaf in leaves if isinstance(leaf, Tensor | fx.Proxy)]

        return outputs, []


class Recorder(fx.Interpreter):
    """Runs a traced network and keeps the shapes and dtypes of its tensors."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.dtypes: dict[fx.Node, torch.dtype] = {}
        self.stale: list[str] = []
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node; its name goes to ``stale`` if it reads a tensor that was changed in place before."""
        if any(version_of(self.env[i]) != self._versions[i] for i in n.all_input_nodes if i in self._versions):
            self.stale.append(n.name)
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
            self.dtypes[n] = result.dtype
            self._versions[n] = version_of(result)
        return result


class WeightUses:
    """Which modules of a traced network are used, or share parameters, in more than one place."""

    def __init__(self, graph: fx.GraphModule) -> None:
        called = [graph.get_submodule(n.target) for n in graph.graph.nodes if n.op == "call_module"]
        self._calls = Counter(map(id, called))
        self._owners = Counter(id(p) for module in graph.modules() for p in module._parameters.values())
        self._owners.update(id(operator.attrgetter(n.target)(graph)) for n in graph.graph.nodes if n.op == "get_attr")

    def reason_against(self, module: nn.Module) -> str:
        """Returns why a module must be left as it is; an empty string if there is no reason."""
        if isinstance(module, Layer) and not module.weight.numel():
            return "has no weights"
        if module._forward_hooks or module._forward_pre_hooks:
            return "has hooks"
        if module.state_dict() and self._calls[id(module)] > 1:
            return "called more than once"
        if any(self._owners[id(p)] > 1 for p in module.parameters()):
            return "shares its weights"
        return ""


def operation_of(node: fx.Node, module: nn.Module | None, shapes: Mapping[fx.Node, Sequence[int]]) -> Operation | None:
    """Returns the operation of a node, which calls ``module`` or a function; ``None`` if units cannot be followed."""
    if not node.op.startswith("call_"):
        return None
    # The exact type, since a subclass may compute anything.
    what: Any = node.target if module is None else type(module)
    if isinstance(module, Layer) and what in _LAYERS:
        return WeightedSum(module)
    if what in _CONCATENATIONS:
        return Concatenation(_argument(node, 1, "dim", 0)) if node.args else None
    if what in _FLATTENINGS or (what in _RESHAPINGS and _last_size(node) == -1):
        return Flattening()
    inputs = sources(node)
    if not inputs or not all(i in shapes for i in inputs):
        return None
    ndim = len(shapes[inputs[0]])
    if what in _ELEMENTWISE or _is_number_division(node) or _is_idle_dropout(node):
        return Channelwise(_Run(node, module), None)
    if what in _POOLINGS:
        return Pooling(_Run(node, module), _POOLINGS[what], adaptive="adaptive" in what.__name__.lower())
    if what in _NORMS and ndim in _NORMS[what] and getattr(module, "running_mean", None) is not None:
        return Channelwise(_Run(node, module), ndim)
    if what in _MEANS and _is_spatial(_argument(node, 1, "dim", None), ndim):
        return Pooling(_Run(node, module), ndim, adaptive=True)
    return None


def sources(node: fx.Node) -> list[fx.Node]:
    """Returns the nodes whose units a node gets, in order: with repetitions, but without sizes of a reshape."""
    if node.op == "call_module":
        return node.all_input_nodes
    if node.target in _CONCATENATIONS and node.args and isinstance(node.args[0], list | tuple):
        return [i for i in node.args[0] if isinstance(i, fx.Node)]
    return node.all_input_nodes[:1] if node.target in _RESHAPINGS else node.all_input_nodes


def reads_batch_size(node: fx.Node) -> bool:
    """Returns whether a node only computes the batch size: ``x.size(0)``, ``x.shape[0]``, ``x.size()[0]``."""
    if node.target is operator.getitem:
        return bool(node.args[1] == 0) and isinstance(node.args[0], fx.Node) and _is_size(node.args[0])
    if _is_size(node):
        return all(user.target is operator.getitem and user.args[1] == 0 for user in node.users)
    return node.op == "call_method" and node.target == "size" and _argument(node, 1, "dim", None) == 0


class _Run:
    """Does what a node does, with other inputs and in double precision."""

    def __init__(self, node: fx.Node, module: nn.Module | None) -> None:
        self._node = node
        self._module = module

    def __call__(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self._node.all_input_nodes, inputs, strict=True))
        args, kwargs = fx.node.map_arg((self._node.args, self._node.kwargs), given.__getitem__)
        if self._module is not None:
            state = {name: value.double() for name, value in self._module.state_dict().items()}
            return functional_call(self._module, state, args, kwargs)
        if self._node.op == "call_method":
            return getattr(args[0], str(self._node.target))(*args[1:], **kwargs)
        function: Any = self._node.target
        return function(*args, **kwargs)


_NORMS: dict[type[nn.Module], tuple[int, ...]] = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_ELEMENTWISE = {
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Sigmoid, nn.Tanh),
    *(nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.Threshold),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish),
    *(operator.add, operator.sub, operator.mul, operator.neg, operator.iadd),
    *(torch.add, torch.sub, torch.mul, torch.relu, torch.relu_, torch.sigmoid, torch.tanh),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.sigmoid, F.tanh),
    *(F.logsigmoid, F.softplus, F.softsign, F.tanhshrink, F.softshrink, F.hardshrink, F.threshold),
    *(F.hardtanh, F.hardsigmoid, F.hardswish),
    *("relu", "relu_", "sigmoid", "tanh", "add", "add_", "sub", "mul", "neg", "clone", "contiguous"),
}
_POOLINGS = {
    getattr(owner, name.format(d)): d + 2
    for owner, names in (
        (nn, ("MaxPool{}d", "AvgPool{}d", "AdaptiveMaxPool{}d", "AdaptiveAvgPool{}d")),
        (F, ("max_pool{}d", "avg_pool{}d", "adaptive_max_pool{}d", "adaptive_avg_pool{}d")),
    )
    for name in names
    for d in (1, 2, 3)
}
_MEANS = {torch.mean, "mean"}
_CONCATENATIONS = {torch.cat, torch.concat, torch.concatenate}
_FLATTENINGS = {nn.Flatten, torch.flatten, "flatten"}
_RESHAPINGS = {torch.reshape, "view", "reshape"}


def _is_number_division(node: fx.Node) -> bool:
    # Division by a number only: a divisor that is a unit might be removed, and so become zero.
    divides = node.op != "call_module" and node.target in (operator.truediv, torch.div, "div")
    return divides and len(node.args) == 2 and isinstance(node.args[1], int | float) and not node.kwargs


def _is_idle_dropout(node: fx.Node) -> bool:
    return node.target is F.dropout and _argument(node, 2, "training", True) is False


def _argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _last_size(node: fx.Node) -> Any:
    last = node.args[-1] if len(node.args) > 1 else None
    return last[-1] if isinstance(last, list | tuple) and last else last


def _is_spatial(dims: Any, ndim: int) -> bool:
    dims = [dims] if isinstance(dims, int) else dims
    return isinstance(dims, list | tuple) and all(isinstance(d, int) and d % ndim > 1 for d in dims) and len(dims) > 0


def _is_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.target is getattr and bool(node.args[1] == "shape")
