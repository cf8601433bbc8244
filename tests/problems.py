"""Models, networks and data with known answers, for all tests."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import init_to_value
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn

import pyro_sparsevd as svd
from pyro_sparsevd import (
    AutoSparseNormal,
    LogUniform,
    SparseVD_ELBO,
    Supervised,
    bayesianize,
)

F64 = torch.float64
NUM_DATA = 20


# A small network as a model of data.


def small_network(device: torch.device | None = None, width: int = 3, layer: Callable = nn.Linear) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(layer(4, width), nn.Tanh(), layer(width, 1)).to(device, F64)


def normal_likelihood(output: Tensor) -> dist.Normal:
    return dist.Normal(output.squeeze(-1), 0.5)


def precise_likelihood(output: Tensor) -> dist.Normal:
    return dist.Normal(output.squeeze(-1), 0.1)


def categorical_likelihood(output: Tensor) -> dist.Categorical:
    return dist.Categorical(logits=torch.cat([output, -output, 2 * output], -1))


def small_model(
    device: torch.device | None = None,
    likelihood: Callable = normal_likelihood,
    width: int = 3,
    layer: Callable = nn.Linear,
    **options: Any,
) -> Supervised:
    return Supervised(bayesianize(small_network(device, width, layer), **options), likelihood, NUM_DATA)


def regression_data(device: torch.device | None = None, size: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs of the small network and targets that have nothing to do with them."""
    generator = torch.Generator().manual_seed(2)
    device = torch.get_default_device() if device is None else device
    x = torch.randn(size, 4, generator=generator, dtype=F64, device="cpu")
    return x.to(device), torch.randn(size, generator=generator, dtype=F64, device="cpu").to(device)


def smooth_data(device: torch.device, size: int = 8, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Inputs of the small network and targets that are a smooth function of them."""
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(2), dtype=F64)
    return x.to(device, dtype), x.sum(1).tanh().to(device, dtype)


def loss_of(
    make: Callable[[], nn.Module],
    device: torch.device,
    likelihood: Callable = normal_likelihood,
    num_data: int = NUM_DATA,
    log_variance: float = -4.0,
    dtype: torch.dtype = F64,
    **options: Any,
) -> Any:
    """The loss, as a module, of a network that is the same at every call, with the default prior and a guide of it."""
    torch.manual_seed(1)
    model = Supervised(bayesianize(make().to(device, dtype)), likelihood, num_data)
    return SparseVD_ELBO(**options)(model, AutoSparseNormal(model, init_log_variance=log_variance))


def model_and_guide(
    device: torch.device, log_variance: float = -2.0, **options: Any
) -> tuple[Supervised, AutoSparseNormal]:
    model = small_model(device, **options)
    return model, AutoSparseNormal(model, init_log_variance=log_variance)


# Models and guides whose loss Pyro's own losses know.


class Twin(NamedTuple):
    """A model, a guide of it, and the arguments of both."""

    model: Callable
    guide: Callable
    args: tuple


def network_twin(device: torch.device) -> Twin:
    model, guide = model_and_guide(device, prior=dist.Normal(0.0, 1.0))
    return Twin(model, guide, regression_data(device))


def bounded_twin(device: torch.device) -> Twin:
    model, guide = model_and_guide(device, prior=LogUniform(1e-30, 1e30))
    return Twin(model, guide, regression_data(device))


def function_twin(device: torch.device, subsample: bool = False) -> Twin:
    zero = torch.zeros((), dtype=F64, device=device)
    data = torch.linspace(-1, 2, NUM_DATA, dtype=F64, device=device)

    def model():
        w = pyro.sample("w", dist.Normal(zero.expand(3), 1.0).to_event(1))
        with pyro.plate("data", NUM_DATA, subsample_size=4 if subsample else None) as indices:
            z = pyro.sample("z", dist.Normal(w.sum(), 2.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=data[indices])

    return Twin(model, AutoSparseNormal(model, init_log_variance=-1.0), ())


def student_twin(device: torch.device) -> Twin:
    zero = torch.zeros((), dtype=F64, device=device)

    def model():
        w = pyro.sample("w", dist.StudentT(3 + zero, zero.expand(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=zero)

    return Twin(model, AutoSparseNormal(model, init_log_variance=-1.0), ())


class HandMadeRecurrent(nn.Module):
    """A recurrent network by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(1, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = torch.tanh(self.inner(x[:, t, None]) + self.outer(h))
        return h.sum(-1, keepdim=True)


def model_and_guide_of(make: Callable, device: torch.device) -> tuple[Supervised, AutoSparseNormal]:
    torch.manual_seed(1)
    model = Supervised(bayesianize(make().to(device).double()), normal_likelihood, NUM_DATA)
    guide = AutoSparseNormal(model, init_log_variance=-2.0)
    guide(*regression_data(device))
    return model, guide


class Trained(NamedTuple):
    model: Supervised
    guide: AutoSparseNormal
    svi: SVI
    loss: nn.Module
    data: tuple[Tensor, Tensor]


def trained_once(device: torch.device, task: str, **options: Any) -> Trained:
    likelihood = normal_likelihood if task == "regression" else categorical_likelihood
    model, guide = model_and_guide(device, likelihood=likelihood)
    elbo = SparseVD_ELBO(**options)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    x, y = regression_data(device)
    y = y if task == "regression" else (y > 0).double()
    svi.step(x, y)
    return Trained(model, guide, svi, elbo(model, guide), (x.clone(), y.clone()))


# A network, a function and both in one.


class Case(NamedTuple):
    """A model, the arguments of its training, and the sites that have a log-uniform prior, of all its sites."""

    model: Callable
    data: tuple[Tensor, ...]
    sparse: tuple[str, ...]
    sites: tuple[str, ...]
    options: Mapping[str, Any] = MappingProxyType({})  # of its guide

    def guide(self) -> AutoSparseNormal:
        return AutoSparseNormal(self.model, **self.options)


def module_case(device: torch.device) -> Case:
    sites = ("0.weight", "2.weight")
    return Case(small_model(device, precise_likelihood), regression_data(device), sites, sites)


def multiplicative_case(device: torch.device) -> Case:
    return module_case(device)._replace(options={"parameterization": "multiplicative"})


def function_case(device: torch.device) -> Case:
    zeros, ones = torch.zeros(4, dtype=F64, device=device), torch.ones((), dtype=F64, device=device)

    def model(x, y=None):
        w = pyro.sample("w", LogUniform(1e-6 * ones, ones).expand([4]).to_event(1))
        b = pyro.sample("b", dist.Normal(0 * ones, 1.0))
        scale = pyro.sample("net.scale", dist.LogNormal(zeros[0], 1.0))
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Normal(x @ w + b, scale), obs=y)

    return Case(model, regression_data(device), ("w",), ("w", "b", "net.scale"))


def module_with_function_case(device: torch.device) -> Case:
    """A module whose sites are its attributes in part."""

    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            ones = torch.ones(4, dtype=F64, device=device)
            self.w = PyroSample(LogUniform(1e-6 * ones, ones).to_event(1))
            self.scaled = PyroSample(lambda self: dist.Normal(ones[:2], 1.0).to_event(1))

        def forward(self, x, y=None):
            mean = x @ self.w + self.scaled.sum()
            scale = pyro.sample("scale", dist.Gamma(torch.tensor(2.0, dtype=F64, device=device), 1.0))
            with pyro.plate("data", NUM_DATA, subsample=x):
                pyro.sample("y", dist.Normal(mean, scale), obs=y)

    return Case(Model(), regression_data(device), ("w",), ("w", "scaled", "scale"))


CASES = [
    pytest.param(module_case, id="module"),
    pytest.param(function_case, id="function"),
    pytest.param(module_with_function_case, id="both"),
]


# Every support: a row here is under the laws of the guide, of its copies and of its states.


def full(*shape: int, value: float = 1.0) -> Tensor:
    return torch.full(shape, value, dtype=F64)


def lower_triangle(value: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(*value.shape, offset=-1).unbind()
    return value[rows, columns]


class Support(NamedTuple):
    """A prior, and as many elements of its values as it has dimensions."""

    prior: dist.TorchDistribution
    coordinates: Callable[[Tensor], Tensor] = lambda value: value.reshape(-1)
    real: bool = False
    sparse: bool = False
    options: Mapping[str, Any] = MappingProxyType({})  # of its guide

    def case(self, device: torch.device | None = None) -> Case:
        """The prior as a model, on the CPU."""
        return Case(lambda: pyro.sample("x", self.prior), (), ("x",) * self.sparse, ("x",), self.options)


SUPPORTS = {
    "real-scalar": Support(dist.Normal(full(), 1.0), real=True),
    "real": Support(dist.Normal(full(3), 1.0).to_event(1), real=True),
    "log-uniform": Support(LogUniform(full(2, 3, value=0.1), 1.0).to_event(2), real=True, sparse=True),
    "positive-scalar": Support(dist.LogNormal(full(), 1.0)),
    "positive": Support(dist.Gamma(full(3), 1.0).to_event(1)),
    "nonnegative": Support(dist.HalfCauchy(full(2))),
    "unit-interval": Support(dist.Beta(full(2, 2), 1.0).to_event(2)),
    "interval": Support(dist.Uniform(full(2, value=-1.0), 2.0).to_event(1)),
    "greater-than": Support(dist.Pareto(full(value=2.0), 1.0)),
    "simplex": Support(dist.Dirichlet(full(4)), lambda value: value[:-1]),
    "corr-cholesky": Support(dist.LKJCholesky(3, full()), lower_triangle),
    "ordered-vector": Support(
        dist.ImproperUniform(dist.constraints.ordered_vector, (), (3,)),
        options={"init_loc_fn": init_to_value(values={"x": torch.arange(3, dtype=F64)})},
    ),
    "multivariate": Support(dist.MultivariateNormal(full(3), torch.eye(3, dtype=F64)), real=True),
}


POSTERIORS = [
    *CASES,
    pytest.param(multiplicative_case, id="multiplicative"),
    *(pytest.param(support.case, id=name) for name, support in SUPPORTS.items()),
]


def local_model(indices=None, *, device):
    """A latent of one dimension, one of two and a constrained one for each of 20 data."""
    zero = torch.zeros((), dtype=F64, device=device)
    plate = pyro.plate("data", 20, subsample_size=4) if indices is None else pyro.plate("data", 20, subsample=indices)
    with plate as indices:
        z = pyro.sample("z", dist.Normal(zero, 1.0))
        pyro.sample("v", dist.Normal(zero.expand(2), 1.0).to_event(1))
        pyro.sample("share", dist.Dirichlet(torch.ones(3, dtype=F64, device=device)))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.arange(20, dtype=F64, device=device)[indices])


def model_with_batch_norm(device: torch.device) -> Supervised:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1)).to(device).double()
    return Supervised(bayesianize(net), precise_likelihood, NUM_DATA)


# Every kind of network: a row here is under the laws of bayesianize, of the bound, of copies and states, and of prune.


class Network(NamedTuple):
    """A network, and what makes its inputs, whose first dimensions are equal."""

    make: Callable[[], nn.Module]
    inputs: list[Callable[[], Tensor]]

    def on(self, device: torch.device) -> tuple[nn.Module, list[Tensor]]:
        """The network in float64 and inputs of it."""
        return self.make().to(device, F64), [make_input().to(device) for make_input in self.inputs]


class Block(nn.Module):
    """Modules in modules, a parameter of its own and a buffer."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Tanh(), nn.Linear(5, 4, bias=False)))
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.gain = nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.randn(4, 4))

    def forward(self, x):
        return self.inner(x) + self.gain * (x @ (self.mix + self.shift))


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.many = nn.ParameterList([torch.randn(4, 4), torch.randn(4, 4), torch.randn(4)])
        self.named = nn.ParameterDict({"a": torch.randn(4, 2)})
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x):
        for layer, weight in zip(self.layers, self.many, strict=False):
            x = torch.tanh(layer(x) @ weight)
        return (x + self.many[2]) @ self.named["a"]


class Attention(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **sizes)

    def forward(self, query, key, value):
        return self.attention(query, key, value)[0]


class FirstOutput(nn.Module):
    """A recurrent layer without the state that it returns, too."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Tied(nn.Module):
    """An embedding whose weight is the output layer's, as in language models."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.output = nn.Linear(3, 6)
        self.output.weight = self.embedding.weight

    def forward(self, tokens):
        return self.output(self.embedding(tokens))


def shared():
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer)


def convolutional():
    layers = nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(16)
    return nn.Sequential(*layers, nn.Linear(16, 2))


def transformer():
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0)


def floats(*shape):
    return lambda: torch.randn(*shape, dtype=F64)


def some_tokens():
    return torch.tensor([[1, 2, 5], [0, 0, 3]])


NETWORKS = {
    "linear": Network(lambda: nn.Linear(4, 3), [floats(5, 4)]),
    "mlp": Network(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2)), [floats(5, 4)]
    ),
    "conv": Network(convolutional, [floats(3, 2, 4, 4)]),
    "transposed conv": Network(lambda: nn.ConvTranspose1d(2, 3, 3, groups=1), [floats(3, 2, 5)]),
    "nested": Network(Block, [floats(5, 4)]),
    "lists": Network(Lists, [floats(5, 4)]),
    "shared": Network(shared, [floats(5, 4)]),
    "tied": Network(Tied, [some_tokens]),
    "embedding": Network(lambda: nn.Embedding(6, 3, padding_idx=0), [some_tokens]),
    "bag": Network(lambda: nn.EmbeddingBag(6, 3), [some_tokens]),
    "bilinear": Network(lambda: nn.Bilinear(3, 4, 2), [floats(5, 3), floats(5, 4)]),
    "lstm": Network(lambda: FirstOutput(nn.LSTM(3, 4, 2, bidirectional=True)), [floats(5, 2, 3)]),
    "bare lstm": Network(lambda: nn.LSTM(3, 4), [floats(5, 2, 3)]),
    "gru": Network(lambda: FirstOutput(nn.GRU(3, 4, batch_first=True)), [floats(5, 2, 3)]),
    "rnn": Network(lambda: FirstOutput(nn.RNN(3, 4)), [floats(5, 2, 3)]),
    "lstm cell": Network(lambda: nn.LSTMCell(3, 4), [floats(5, 3)]),
    "loop over time": Network(HandMadeRecurrent, [floats(5, 4)]),
    "attention": Network(Attention, [floats(5, 2, 4)] * 3),
    "cross attention": Network(lambda: Attention(kdim=3, vdim=5), [floats(2, 5, 4), floats(2, 6, 3), floats(2, 6, 5)]),
    "transformer": Network(transformer, [floats(5, 2, 4)]),
    "evaluated transformer": Network(lambda: transformer().eval(), [floats(5, 2, 4)]),
}


# Every prior: a row here is under the laws of tests/sparsity/test_every_prior.py and tests/nn/test_padding.py.


class Prior(NamedTuple):
    """What makes a prior of a network of linear layers with six inputs each, and what it is."""

    make: Callable[[], Any]
    sparse: bool = False  # whether log α of its sites says which weights to drop
    density: bool = True  # without one, it is fitted to the posterior
    proper: bool = True
    by_weight: bool = False  # whether its divergence is in closed form, and a sum over weights
    of_network: bool = False  # whether it needs a parameter to be the prior of


PRIORS = {
    "improper": Prior(lambda: LogUniform(), sparse=True, proper=False, by_weight=True),
    "log-uniform": Prior(lambda: LogUniform(1e-6, 1e3), sparse=True, by_weight=True),
    "normal": Prior(lambda: dist.Normal(0.0, 0.7), by_weight=True),
    "rows": Prior(lambda: dist.MultivariateNormal(torch.zeros(6), 0.5 * torch.eye(6))),
    "laplace": Prior(lambda: dist.Laplace(0.1, 0.6), by_weight=True),
    "student": Prior(lambda: dist.StudentT(3.0, 0.0, 0.5)),
    "mixture": Prior(lambda: svd.nn.scale_mixture(0.3, 1.0, 0.1)),
    "fan-in": Prior(lambda: svd.nn.fan_in_normal(1.5), by_weight=True, of_network=True),
    "layer": Prior(lambda: svd.EmpiricalBayesNormal(()), density=False),
    "relevance": Prior(lambda: svd.EmpiricalBayesNormal(), sparse=True, density=False),
    "units": Prior(lambda: svd.EmpiricalBayesNormal((0,)), sparse=True, density=False),
    "horseshoe": Prior(lambda: svd.horseshoe(0.5), sparse=True, of_network=True),
    "jeffreys": Prior(lambda: svd.group_normal_jeffreys((1,)), sparse=True, of_network=True),
}


def priors(choose: Callable[[Prior], bool] = lambda prior: True) -> pytest.MarkDecorator:
    """Runs a test for each prior that is chosen."""
    return pytest.mark.parametrize("prior", [pytest.param(p, id=name) for name, p in PRIORS.items() if choose(p)])


# Networks with priors.


MLP_NAMES = ["body.0.weight", "body.0.bias", "body.1.weight", "body.1.bias", "head.weight", "head.bias"]


def normal_rows(output):
    return dist.Normal(output, 0.5).to_event(1)


def regression_model(device, num_data=100, likelihood=normal_rows, net=None):
    net = nn.Linear(4, 3) if net is None else net
    return svd.Supervised(svd.bayesianize(net.to(device), svd.LogUniform(1e-3, 1.0)), likelihood, num_data)
