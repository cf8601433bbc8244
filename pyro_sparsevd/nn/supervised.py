"""A Bayesian network and a likelihood as a Pyro model of a data set."""

__all__ = ["Supervised"]

from collections.abc import Callable, Iterator, Mapping
from numbers import Integral
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution

from .._compat import call_context
from .._modules import takes
from ..distributions.util import unwrap_independent
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

    def forward(self, x: Any, y: Tensor | None = None) -> Any:
        """Runs the model on a batch.

        Args:
            x: Inputs, a tensor of shape ``(M, ...)``, or a tuple or dictionary of such tensors. A tuple holds the
                network's positional arguments; a dictionary is its one argument.
            y: Targets, of shape ``(M, ...)``; to predict, None.

        Returns:
            The output of the network.

        Raises:
            TypeError: If ``x`` or ``y`` holds something else, or the likelihood returns no distribution.
            ValueError: If the batch is empty or larger than ``num_data``, the sizes of ``x``, ``y`` and the
                likelihood differ, or another PyroModule has renamed the network's sites.
        """
        index, size = self._batch(x, y)
        with IsolateParamsMessenger(self):
            with call_context(self.network):
                output = self._run(x)
                sample_unused_sites(self.network, self._site_names)
            likelihood = self.likelihood(output)
        if not isinstance(likelihood, Distribution):
            raise TypeError(
                f"likelihood: expected a function that returns a distribution, but it gave {type(likelihood).__name__}"
            )
        if not likelihood.batch_shape or likelihood.batch_shape[-1] != size:
            raise ValueError(
                f"likelihood: expected one distribution per datum, batch_shape (..., {size}), but got "
                f"{tuple(likelihood.batch_shape)}; .to_event(n) declares trailing dimensions as parts of a datum"
            )
        if y is not None:
            y = _fitted_targets(y, likelihood)
        recorder = active_trace()
        if recorder is not None and y is not None:
            plate = CondIndepStackFrame("data", -1, size, 0, self.num_data)
            recorder.sample("y", likelihood, y, self.num_data / size, (plate,))
            return output
        with pyro.plate("data", self.num_data, subsample=index):
            pyro.sample("y", likelihood, obs=y, infer={"is_target": True})
        return output

    def _run(self, x: Any) -> Any:
        try:
            return self.network(*x) if type(x) is tuple else self.network(x)
        except StopIteration as error:
            raise RuntimeError(
                "network: expected parameters where it calls next(self.parameters()), but weights with a prior are "
                "none; take device and dtype from an input or a weight, as in self.layer.weight.device"
            ) from error

    def _batch(self, x: Any, y: Any) -> tuple[Tensor, int]:
        """Checks the sizes of a batch; returns a tensor of it and its size."""
        leaves = list(_leaves("x", x))
        if not leaves:
            raise ValueError(f"x: expected at least one tensor, but got {x!r}")
        first, index = leaves[0]
        size = len(index)
        if size == 0:
            raise ValueError("x: expected at least one datum, but got an empty batch")
        for name, leaf in leaves[1:]:
            if len(leaf) != size:
                raise ValueError(f"{name}: expected {size} data, as in {first}, but got {len(leaf)}")
        if y is None:
            return index, size
        if not isinstance(y, Tensor):
            raise TypeError(f"y: expected a tensor, but got {type(y).__name__}; give torch.as_tensor(y)")
        if y.dim() == 0 or len(y) != size:
            found = len(y) if y.dim() else "a scalar"
            raise ValueError(f"x and y: expected as many targets as inputs, but got {size} and {found}")
        if size > self.num_data and self.training:  # held-out data may be more
            raise ValueError(
                f"num_data: expected the size of the whole data set, but got {self.num_data} and a batch of {size}"
            )
        return index, size


def _leaves(name: str, x: Any) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a batch with their names."""
    if isinstance(x, Tensor):
        if x.dim() == 0:
            raise ValueError(f"{name}: expected a tensor of shape (M, ...), but got a scalar")
        yield name, x
    elif type(x) is tuple or isinstance(x, Mapping):
        for key, part in x.items() if isinstance(x, Mapping) else enumerate(x):
            yield from _leaves(f"{name}[{key!r}]", part)
    else:
        raise TypeError(
            f"{name}: expected a tensor, or a tuple or dictionary of tensors, but got {type(x).__name__}; make "
            "numbers a tensor by torch.as_tensor, and take anything else apart in a module around the network"
        )


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


def _fitted_targets(y: Tensor, likelihood: Any) -> Tensor:
    expected = likelihood.batch_shape + likelihood.event_shape
    if y.shape != expected[-y.dim() :]:  # samples of the output may share their targets
        raise ValueError(f"y: expected targets of shape {tuple(expected)}, but got {tuple(y.shape)}")
    base = unwrap_independent(likelihood)
    is_bernoulli = isinstance(base, Bernoulli)  # its log_prob needs floating-point targets
    return y.to(base.mean.dtype) if is_bernoulli and not y.is_floating_point() else y
