"""svd.fit: any model, any likelihood, any iterable of batches."""

import math
import sys
import warnings
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyro_sparsevd as svd
from pyro_sparsevd import plots
from pyro_sparsevd.training import schedule


def _regression(n=200):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 10, generator=generator)
    return x, x[:, :1] - 2 * x[:, 1:2] + 0.1 * torch.randn(n, 1, generator=generator)


def _split(start, end):
    return tuple(values[start:end] for values in _regression())


def _model(num_data=200, net=None, likelihood=None):
    torch.manual_seed(0)
    net = net or nn.Linear(10, 1)
    likelihood = likelihood or (lambda mean: dist.Normal(mean, 0.1).to_event(1))
    model = svd.Supervised(svd.bayesianize(net), likelihood, num_data)
    return model, svd.AutoSparseNormal(model)


class _TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.b(self.a(x["left"]).tanh() + x["right"])


def test_a_sparse_regression_keeps_the_relevant_weights():
    model, guide = _model()
    loader = DataLoader(TensorDataset(*_regression()), batch_size=50, shuffle=True)
    history = svd.fit(model, guide, loader, epochs=200, lr=3e-2, validation=[_regression()])
    assert len(history) == 200
    assert history[-1]["nll"] < history[0]["nll"] / 10
    assert history[-1]["validation_nll"] == pytest.approx(history[-1]["nll"], rel=0.2)
    kept = svd.sparsify(guide, -2.0).masks["weight"][0]
    assert kept[:2].all()
    assert kept[2:].sum() <= 1  # by chance, as none of these matters
    assert history[-1]["compression"] == svd.sparsify(guide, 3.0).compression
    assert plots.training_curves(history, [("nll", "kl"), "compression"]).axes


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


LOADERS = {
    "list of tuples": lambda x, y: [(x[:100], y[:100]), (x[100:], y[100:])],
    "named tuples": lambda x, y: [Pair(x, y)],
    "list of lists": lambda x, y: [[x, y]],
    "dictionaries": lambda x, y: [{"x": x, "y": y}],
    "function that makes a generator": lambda x, y: (
        lambda: ((a, b) for a, b in zip(x.split(50), y.split(50), strict=True))
    ),
    "data loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=64),
    "last batch dropped": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=64, drop_last=True),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_batches_of_any_kind(make):
    model, guide = _model()
    history = svd.fit(model, guide, make(*_regression()), epochs=3)
    assert len(history) == 3
    assert all(math.isfinite(value) for numbers in history for value in numbers.values())


def test_inputs_in_dictionaries_and_targets_of_counts():
    torch.manual_seed(0)
    model, guide = _model(30, _TwoInputs(), lambda out: dist.Poisson(out.exp()).to_event(1))
    x = {"left": torch.randn(30, 10), "right": torch.randn(30, 4)}
    assert len(svd.fit(model, guide, [(x, torch.ones(30, 1))], epochs=2)) == 2


def test_a_model_of_ones_own_with_a_guide_of_pyros():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.w = PyroSample(dist.Normal(0.0, 1.0).expand([10]).to_event(1))

        def forward(self, x, y=None):
            mean = x @ self.w
            with pyro.plate("data", 200, subsample=x):
                return pyro.sample("y", dist.Normal(mean, 0.1), obs=y)

    x, y = _regression()
    model = Model()
    guide = AutoNormal(model)
    history = svd.fit(model, guide, [(x[:100], y[:100, 0]), (x[100:], y[100:, 0])], epochs=200, lr=2e-2)
    assert sorted(history[-1]) == ["kl", "nll"]
    assert guide.median()["w"][:2].tolist() == pytest.approx([1.0, -2.0], abs=0.05)


def test_the_default_schedule_rises_and_falls_within_epochs(monkeypatch):
    weights = []

    class Recorded(svd.SparseVD_ELBO):
        def differentiable_loss(self, *args, **kwargs):
            weights.append(self.kl_weight)
            return super().differentiable_loss(*args, **kwargs)

    monkeypatch.setattr(sys.modules["pyro_sparsevd.training.fit"], "SparseVD_ELBO", Recorded)
    model, guide = _model()
    batches = list(zip(*(t.split(50) for t in _regression()), strict=True))
    svd.fit(model, guide, batches, epochs=4, warm_up=0.5)
    assert weights == pytest.approx([svd.LinearWarmup(0.1, 2.0)(step / 4) for step in range(16)])
    weights.clear()
    svd.fit(model, guide, batches, epochs=1, warm_up=0)
    assert set(weights) == {1.0}


def test_callbacks_see_and_add_numbers():
    model, guide = _model()
    history = svd.fit(
        model, guide, [_regression()], epochs=2, callbacks=[lambda epoch, numbers: numbers.update(epoch=epoch)]
    )
    assert [numbers["epoch"] for numbers in history] == [0, 1]


def test_a_gradient_that_is_not_finite_stops_before_the_parameters():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 1)

        def forward(self, x):
            return self.layer(x) + 0 * (0 * self.layer.bias).sqrt()

    model, guide = _model(net=Root())
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"^gradient: expected finite numbers, but those of .*layer\.bias are not"):
        svd.fit(model, guide, [_regression()], epochs=1)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


BAD = {
    "no batches": (lambda: [], {}, ValueError, "loader: expected at least one batch"),
    "used up": (
        lambda: iter([_regression()]),
        {},
        ValueError,
        "loader: expected batches that can be gone",
    ),
    "no loader": (lambda: 3, {}, TypeError, "loader: expected batches, or a function"),
    "no epochs": (lambda: [_regression()], {"epochs": 0}, ValueError, "epochs: expected a positive integer"),
    "rate": (lambda: [_regression()], {"lr": math.nan}, ValueError, "lr: expected a positive"),
    "warm-up": (lambda: [_regression()], {"warm_up": 2}, ValueError, "warm_up: expected 0 or a part"),
    "too many data": (lambda: [_regression(300)], {}, ValueError, "num_data: "),
    "too many in all": (
        lambda: [_regression(150)] * 2,
        {},
        ValueError,
        "num_data: expected as many data",
    ),
    "validation": (lambda: [_regression()], {"validation": []}, ValueError, "validation: expected at least one batch"),
    "validation without numbers": (
        lambda: [_regression()],
        {"validation": [(torch.full((5, 10), math.nan), torch.zeros(5, 1))]},
        ValueError,
        "x: expected finite numbers",
    ),
    "other structure": (
        lambda: [_split(0, 50), _split(50, 100)[:1]],
        {},
        ValueError,
        r"loader: expected batches like the first, \(Tensor, Tensor\), but batch 1 is \(Tensor\)",
    ),
    "other names": (
        lambda: [{"x": _split(0, 50)[0], "targets": _split(0, 50)[1]}],
        {},
        TypeError,
        r"loader: expected batches of the model's arguments, .*x.*y.*but got \{'targets': Tensor, 'x': Tensor\}",
    ),
    "three parts": (lambda: [(*_split(0, 50), 1)], {}, TypeError, r"but got \(Tensor, Tensor, int\): too many"),
    "validation of other structure": (
        lambda: [_regression()],
        {"validation": [(*_regression(), 1)]},
        TypeError,
        "validation: expected batches of the model's arguments",
    ),
}
LATE = {"other structure"}  # found where it comes


@pytest.mark.parametrize(("loader", "options", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(loader, options, error, message, request):
    model, guide = _model()
    before = [p.clone() for p in guide.parameters()]
    with pytest.raises(error, match=message):
        svd.fit(model, guide, loader(), **{"epochs": 1, **options})
    if request.node.callspec.id not in LATE:
        assert all(map(torch.equal, before, guide.parameters()))


def test_what_is_no_model_or_guide_is_refused():
    model, guide = _model()
    with pytest.raises(TypeError, match=r"^model: expected a torch module or a function, but got int"):
        svd.fit(3, guide, [_regression()], epochs=1)
    with pytest.raises(TypeError, match=r"^guide: expected a torch module, .* but got function; use SVI"):
        svd.fit(model, lambda x, y: None, [_regression()], epochs=1)
    with pytest.raises(ValueError, match=r"^model and guide: expected parameters to train"):
        svd.fit(model.requires_grad_(False), guide.requires_grad_(False), [_regression()], epochs=1)


def _function(x, y=None):
    w = pyro.sample("w", svd.LogUniform().expand([10]).to_event(1))
    with pyro.plate("data", 200, subsample=x):
        pyro.sample("y", dist.Normal(x @ w, 0.1), obs=y)


def _function_with_parameter(x, y=None):
    mean = x @ pyro.sample("w", dist.Normal(torch.zeros(10), 1.0).to_event(1))
    pyro.param("scale", torch.tensor(1.0))
    with pyro.plate("data", 200, subsample=x):
        pyro.sample("y", dist.Normal(mean, pyro.param("scale")), obs=y)


def test_a_model_that_is_a_function():
    x, y = _regression()
    guide = svd.AutoSparseNormal(_function)
    history = svd.fit(_function, guide, [(x, y[:, 0])], epochs=300, lr=3e-2)
    assert history[-1]["sparsity"] > 0
    assert guide.median()["w"][:2].tolist() == pytest.approx([1.0, -2.0], abs=0.05)


def test_parameters_that_the_optimiser_does_not_see_are_named():
    x, y = _regression()
    with pytest.warns(UserWarning, match="^scale: the loss depends on these, but no optimiser would change them"):
        svd.fit(_function_with_parameter, svd.AutoSparseNormal(_function_with_parameter), [(x, y[:, 0])], epochs=1)


def test_a_validation_that_is_not_finite_is_refused():
    class Fails(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 if self.training else math.inf)

    model, guide = _model(net=Fails(10, 1))
    with pytest.raises(ValueError, match="finite"):
        svd.fit(model, guide, [_regression()], epochs=1, validation=[_regression()])


def test_fewer_data_than_the_model_was_told_of():
    model, guide = _model(num_data=1_000)
    with pytest.warns(UserWarning, match=r"^num_data: the likelihood is scaled to 1000 data, but an epoch has 200"):
        svd.fit(model, guide, [_regression()], epochs=1)


def test_the_data_of_graphs_are_their_targets():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, nodes, graph):
            return torch.zeros(2, 1).index_add(0, graph, self.layer(nodes))

    model, guide = _model(4, Pool(), lambda mean: dist.Normal(mean, 1.0).to_event(1))
    batch = (torch.randn(9, 4), torch.tensor([0] * 4 + [1] * 5)), torch.zeros(2, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of data that are missing
        assert len(svd.fit(model, guide, [batch] * 2, epochs=1)) == 1


A_BATCH = {
    "pair": _regression(),
    "tensor": _regression()[0],
    "arrays": tuple(part.numpy() for part in _regression()),
    "dictionary": dict(zip("xy", _regression(), strict=True)),
}


@pytest.mark.parametrize("loader", A_BATCH.values(), ids=A_BATCH)
def test_a_batch_in_the_place_of_batches_is_refused(loader):
    model, guide = _model()
    with pytest.raises(TypeError, match=r"loader: expected batches, but got the tensors of one; give .* \[\(x, y\)\]"):
        svd.fit(model, guide, loader, epochs=1)


class _Stream(IterableDataset):
    def __iter__(self):
        return zip(*_regression(), strict=True)


SCHEDULED = {
    "list": (lambda batches: batches, True),
    "function that returns a list": (lambda batches: lambda: batches, True),
    "iterable data set": (lambda batches: DataLoader(_Stream(), batch_size=100), False),
}


@pytest.mark.parametrize(("make", "known"), SCHEDULED.values(), ids=SCHEDULED)
def test_the_weight_of_the_kl_rises_by_step_where_the_steps_are_known(make, known, monkeypatch):
    model, guide = _model()
    x, y = _regression()
    parts = []
    loader = make([(x[:100], y[:100]), (x[100:], y[100:])])
    original = schedule.kl_weight
    monkeypatch.setattr(
        sys.modules["pyro_sparsevd.training.fit"], "kl_weight", lambda p, w: parts.append(p) or original(p, w)
    )
    svd.fit(model, guide, loader, epochs=2)
    assert parts == ([0, 0.25, 0.5, 0.75] if known else [0, 0, 0.5, 0.75])


def test_one_epoch_of_an_unknown_length_is_refused():
    model, guide = _model()
    x, y = _regression()
    with pytest.raises(ValueError, match="epochs: expected 2 or more for batches whose number is not known before"):
        svd.fit(model, guide, lambda: iter([(x, y)]), epochs=1)
    assert len(svd.fit(model, guide, lambda: iter([(x, y)]), epochs=1, warm_up=0)) == 1


def test_the_data_that_a_loader_drops_do_not_count():
    model, guide = _model(num_data=180)
    loader = DataLoader(TensorDataset(*_regression()), batch_size=60, drop_last=True)
    assert len(svd.fit(model, guide, loader, epochs=np.int64(1))) == 1


def test_lists_of_targets_may_be_of_other_lengths_and_names_in_another_order():
    model, guide = _model()
    x, y = _regression()
    batches = [{"x": x[:150], "y": y[:150].tolist()}, {"y": y[150:].tolist(), "x": x[150:]}]
    assert len(svd.fit(model, guide, batches, epochs=1)) == 1


def test_the_first_pass_of_a_guide_that_makes_its_parameters_leaves_batch_statistics_alone():
    model, _ = _model(net=nn.Sequential(nn.BatchNorm1d(10), nn.Linear(10, 1)))
    svd.fit(model, AutoNormal(model), [_regression()], epochs=1)
    assert model.network[0].num_batches_tracked == 1
