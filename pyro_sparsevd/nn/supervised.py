"""A Bayesian network and a likelihood as a Pyro model of a data set."""

__all__ = ["Supervised", "fitted_targets"]

from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

from .._compat import call_context
from .._modules import batch_tensor, named_leaves, run_network, takes
from ..distributions.util import unmasked, unwrap_independent
from ..poutine.param_store import IsolateParamsMessenger
from ..poutine.trace import active_trace
from .sites import sample_unused_sites, site_paths


class Supervised(PyroModule):
    r"""A network, a likelihood and the size of a data set, as a Pyro model.

    .. math:: y_n \mid x_n, w \sim \mathrm{likelihood}(\mathrm{network}(x_n; w)), \quad n = 1 \ldots N

    The observations are the site ``y`` in the plate ``data``, which scales the log likelihood of a mini-batch of M
    by N/M. The sites of the network keep their own names, and all are sampled in every pass, those of layers that
    it skips too. The parameters of two models live side by side in Pyro's parameter store, whatever their names: the
    second to come is numbered. A store that was saved does not bring the network's own parameters, such as biases, back
    into another model: save ``state_dict()`` of model and guide.

    How the network is called with ``x``, and what M is:

    ==================================== ============================== ===============================================
    ``x``                                the call                       M
    ==================================== ============================== ===============================================
    a tensor                             ``network(x)``                 ``len(x)``
    a tuple or list ``(a, b)``           ``network(a, b)``              ``len(y)``; without ``y``, the last size of the
                                                                        likelihood's batch shape
    a mapping of names of parameters of  ``network(**x)``               likewise
    ``forward``, such as a ``dict`` or
    a ``BatchEncoding``
    any other mapping, a dataclass or    ``network(x)``                 likewise
    a named tuple
    ``(x,)``, with any such ``x``        ``network(x)``                 likewise
    ==================================== ============================== ===============================================

    So the nodes of a graph and its edges, ``(x[N, F], edge_index[2, E])``, go with N targets, and the nodes of several
    graphs with one for each graph. At least one part is a tensor; numbers, strings, ``None`` and objects of other
    libraries are passed as they are. The likelihood gets the output as it is: for a network that returns a
    ``ModelOutput`` it is ``lambda out: dist.Categorical(logits=out.logits)``.

    Args:
        network: A Bayesian network, as :func:`~.bayesianize.bayesianize` returns it.
        likelihood: A function from the network's output to the distribution of the targets, one per example:
            its batch shape ends in the batch size.
        num_data: N, the size of the data set.

    Raises:
        TypeError: If ``network`` is not a ``PyroModule``, or ``likelihood`` no function of one argument, such as a
            loss or a class.
        ValueError: If ``num_data`` is not a positive integer, or if a weight is called ``data`` or ``y``.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 3))
        >>> model = Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=60_000)
        >>> guide = sparsevd.AutoSparseNormal(model)
        >>> loss = sparsevd.SparseVD_ELBO()(model, guide)(torch.randn(8, 4), torch.zeros(8))
    """

    def __init__(self, network: PyroModule, likelihood: Callable[[Any], Distribution], num_data: int) -> None:
        super().__init__()
        if not isinstance(network, PyroModule):
            raise TypeError(f"Supervised: expected network = bayesianize(net), but got {type(network).__name__}")
        _check_likelihood(likelihood)
        if isinstance(num_data, bool) or not isinstance(num_data, Integral) or num_data <= 0:
            raise ValueError(f"Supervised: expected num_data, a positive integer, but got {num_data!r}")
        # Past PyroModule.__setattr__, which would prefix the names of the network's sites.
        self._modules["network"] = network
        self.likelihood: Callable[[Any], Distribution] = likelihood
        self.num_data: int = num_data
        self._site_names: dict[tuple[str, ...], str | None] = dict.fromkeys(site_paths(network))
        for name in ("data", "y"):
            if (name,) in self._site_names:
                raise ValueError(
                    f"Supervised: a parameter of the network is called {name!r}, as a site of the model is"
                )

    @property
    def network(self) -> PyroModule:
        """The Bayesian network."""
        return self._modules["network"]

    def forward(self, x: Any, y: Any = None) -> Any:
        """Runs the model on a batch.

        Args:
            x: Inputs, of M data; the table above says of which kinds.
            y: Targets, of shape ``(M, ...)``: a tensor, a NumPy array or a list of numbers; to predict, None. Arrays
                and lists get the device and the precision of the likelihood, and integers and truth values, which are
                no labels of a categorical likelihood, its floating-point type; tensors are not moved.

        Returns:
            The output of the network.

        Raises:
            TypeError: If ``x`` or ``y`` is of another kind, the network's ``forward`` knows some keys of a mapping and
                not others, the likelihood expected a tensor and the output is none, or it returns no distribution.
            ValueError: If the batch is empty or larger than ``num_data``, the sizes of ``x``, ``y`` and the
                likelihood differ, or another PyroModule has renamed the network's sites.
        """
        batch = batch_tensor("x", x)
        targets = None if y is None else _as_tensor(y)
        size = self._size(x, batch, targets)
        with IsolateParamsMessenger(self):
            with call_context(self.network):
                output = self._run(x)
                sample_unused_sites(self.network, self._site_names)
            likelihood = self._distribution(output, size)
        if targets is not None:
            targets = fitted_targets(targets, likelihood, None if targets is y else batch.device)
        self._observe(likelihood, targets, batch)
        return output

    def _observe(self, likelihood: Any, targets: Tensor | None, batch: Tensor) -> None:
        """Samples or observes ``y`` in its plate, or records it where that is all that would happen."""
        size = likelihood.batch_shape[-1]
        trace = active_trace()
        if trace is not None and targets is not None:
            plate = CondIndepStackFrame("data", -1, size, 0, self.num_data)
            trace.sample("y", likelihood, targets, self.num_data / size, (plate,))
            return
        subsample = batch if len(batch) == size else torch.arange(size, device=batch.device)
        with pyro.plate("data", self.num_data, subsample=subsample):
            pyro.sample("y", likelihood, obs=targets, infer={"is_target": True})

    def _size(self, x: Any, batch: Tensor, y: Tensor | None) -> int | None:
        """Returns the batch size as far as inputs and targets say: several inputs may be of one size each."""
        if y is None:
            return len(batch) if x is batch else None
        if y.dim() == 0 or (x is batch and len(y) != len(batch)):
            found = len(y) if y.dim() else "a scalar"
            raise ValueError(f"x and y: expected as many targets as inputs, but got {len(batch)} and {found}")
        if len(y) > self.num_data and self.training:  # held-out data may be more
            raise ValueError(
                f"num_data: expected the size of the whole data set, but got {self.num_data} and a batch of {len(y)}"
            )
        return len(y)

    def _run(self, x: Any) -> Any:
        try:
            return run_network(self.network, x)
        except StopIteration as error:
            raise RuntimeError(
                "network: expected parameters where it calls next(self.parameters()), but weights with a prior are "
                "none; take device and dtype from an input or a weight, as in self.layer.weight.device"
            ) from error

    def _distribution(self, output: Any, size: int | None) -> Any:
        """Returns the distribution of the targets, one for each of ``size`` data, if the size is known."""
        try:
            likelihood = self.likelihood(output)
        except (AttributeError, TypeError, ValueError) as error:
            if isinstance(output, Tensor):
                raise
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(
                f"likelihood: it fails on the network's output, which is no tensor but {type(output).__name__}: {error}"
                "; to use a tensor of it, write a function such as lambda out: dist.Categorical(logits=out.logits)"
            ) from error
        if not isinstance(likelihood, Distribution):
            raise TypeError(
                f"likelihood: expected a function that returns a distribution, but it gave {type(likelihood).__name__}"
            )
        shape = tuple(likelihood.batch_shape)
        if not (shape and shape[-1]) or size not in (None, shape[-1]):
            expected = "M" if size is None else size
            raise ValueError(
                f"likelihood: expected one distribution per datum, batch_shape (..., {expected}), but got {shape}; "
                ".to_event(n) declares trailing dimensions as parts of a datum"
            )
        return likelihood


def _check_likelihood(likelihood: Any) -> None:
    if isinstance(likelihood, Distribution) or not callable(likelihood):
        raise TypeError(f"Supervised: expected a callable likelihood, but got {type(likelihood).__name__}")
    is_class = isinstance(likelihood, type)
    if is_class or not takes(likelihood.forward if isinstance(likelihood, nn.Module) else likelihood, None):
        name = getattr(likelihood, "__name__", type(likelihood).__name__)
        raise TypeError(
            "Supervised: expected a likelihood, a function from the network's output alone to a distribution, but got "
            f"{name}; write a function such as lambda out: dist.Normal(out, 1.0)"
        )


def _as_tensor(y: Any) -> Tensor:
    """Returns targets as a tensor, which is on the CPU and in double precision if they were none."""
    if isinstance(y, Tensor):
        if y.is_complex():
            raise TypeError(f"y: expected real targets, but got {y.dtype}")
        return y
    kind = type(y).__name__
    if any(isinstance(leaf, Tensor) for _, leaf in named_leaves("y", y)):
        raise TypeError(
            f"y: expected one tensor, but got a {kind} of tensors; give torch.stack(y), or write a Pyro model with a "
            "site for each"
        )
    try:
        array = np.asarray(y)
    except ValueError as error:
        raise ValueError(f"y: expected targets of one shape, but got a {kind} of several: {error}") from error
    if array.dtype.kind not in _NUMBERS:
        raise TypeError(f"y: expected a tensor, a NumPy array or a list of numbers, but got {kind} of {array.dtype}")
    return torch.tensor(array.astype(_NUMBERS[array.dtype.kind]))


_NUMBERS = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}


def fitted_targets(y: Tensor, likelihood: Any, device: torch.device | None = None) -> Tensor:
    """Returns targets as the likelihood takes them; those to be moved to a device are of no precision of their own."""
    expected = likelihood.batch_shape + likelihood.event_shape
    if y.shape != expected[-y.dim() :]:  # samples of the output may share their targets
        raise ValueError(f"y: expected targets of shape {tuple(expected)}, but got {tuple(y.shape)}")
    base = unwrap_independent(unmasked(likelihood)[0])
    is_label = isinstance(base, Categorical)
    keeps_type = is_label or (y.is_floating_point() and device is None)
    return y.to(device or y.device, y.dtype if keeps_type else _precision(base))


def _precision(likelihood: Any) -> torch.dtype:
    # In half precision, integers above 256 or 2048 would be rounded.
    try:
        return torch.promote_types(likelihood.mean.dtype, torch.float32)
    except NotImplementedError:  # as of transformed distributions
        base = getattr(likelihood, "base_dist", None)
        return torch.get_default_dtype() if base is None else _precision(base)
