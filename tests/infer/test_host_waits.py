"""How often a training step makes the host wait for an accelerator, counted on a device without numbers."""

import gc

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_sparsevd as svd
from far_device import FAR, HostWaits


class _Tokens(nn.Module):
    def forward(self, x):
        return (x > 0).long().flatten(1)


class _LastState(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(12, 6, batch_first=True)

    def forward(self, x):
        return self.recurrent(x.flatten(1, 2))[0][:, -1]


def _tied():
    shared = nn.Linear(8, 8)
    return nn.Sequential(nn.Flatten(), nn.Linear(144, 8), shared, nn.ReLU(), shared, nn.Linear(8, 3))


NETS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 20), nn.ReLU(), nn.Linear(20, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(256, 3)
    ),
    "repeated": _tied,
    "embedding": lambda: nn.Sequential(_Tokens(), nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(576, 3)),
    "recurrent": lambda: nn.Sequential(_LastState(), nn.Linear(6, 3)),
}
PRIORS = {
    "log-uniform": lambda: None,
    "bounded": lambda: svd.LogUniform(1e-4, 1.0),
    "normal": lambda: dist.Normal(0.0, 1.0),
    "empirical": svd.EmpiricalBayesNormal,
    "horseshoe": svd.horseshoe,
    "groups": svd.group_normal_jeffreys,
    "fan in": svd.fan_in_normal,
    "mixture": svd.scale_mixture,
}


@pytest.fixture(autouse=True)
def _far(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which refuses this device
    yield
    gc.collect()


def _classes(output):
    return dist.Categorical(logits=output)


def _problem(net="mlp", prior="log-uniform", likelihood=_classes, targets=torch.long, **options):
    with torch.device(FAR):
        network = NETS[net]()
        data = torch.randn(16, 1, 12, 12), torch.zeros(16, dtype=targets)
        likelihood = likelihood.to(FAR) if isinstance(likelihood, nn.Module) else likelihood
    model = svd.Supervised(svd.bayesianize(network, PRIORS[prior]()), likelihood, 640)
    guide = svd.AutoSparseNormal(model)
    return model, guide, svd.SparseVD_ELBO(**options), data


def _waits_of_module(model, guide, elbo, data):
    loss = elbo(model, guide)
    loss(*data)
    optimizer = torch.optim.Adam(loss.parameters())

    def step():
        optimizer.zero_grad()
        loss(*data).backward()
        optimizer.step()

    return _counted(step)


def _waits_of_svi(model, guide, elbo, data):
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
    return _counted(lambda: svi.step(*data))


def _counted(step):
    step()
    with HostWaits() as waits:
        step()
    return waits.places


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("net", NETS)
def test_a_step_waits_once_and_without_the_check_never(net, prior):
    with HostWaits():
        for check_finite in (True, False):
            waits = _waits_of_module(*_problem(net, prior, check_finite=check_finite))
            assert waits.total() == check_finite, waits


@pytest.mark.parametrize(
    "options",
    [{"local_reparam": False}, {"num_particles": 3}, {"kl": "monte_carlo"}, {"kl": "exact", "kl_weight": 0.5}],
)
def test_so_it_is_with_every_option(options):
    with HostWaits():
        assert _waits_of_module(*_problem(**options)).total() == 1
        assert _waits_of_module(*_problem(check_finite=False, **options)).total() == 0


def test_a_step_of_svi_waits_once_for_the_number_that_it_returns():
    with HostWaits():
        for check_finite in (True, False):
            waits = _waits_of_svi(*_problem("convolution", check_finite=check_finite))
            assert waits.total() == 1, waits


def test_a_likelihood_with_a_parameter_of_its_own_adds_none():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.likelihood = svd.GaussianLikelihood()

        def forward(self, output):
            return self.likelihood(output[:, 0])

    with HostWaits():
        waits = _waits_of_module(*_problem(likelihood=Flat(), targets=torch.float))
    assert waits.total() == 1, waits


def test_training_on_with_dropped_weights_waits_no_more_often():
    with HostWaits():
        model, guide, elbo, data = _problem("embedding")
        masks = {name: torch.ones_like(q.loc, dtype=torch.bool) for name, q in guide.posteriors.items()}
        waits = _waits_of_module(model, svd.infer.masked.SparsifiedGuide(guide, masks), elbo, data)
    assert waits.total() == 1, waits


def test_what_is_counted_is_what_makes_the_host_wait():
    x = torch.zeros(3, device=FAR)
    with HostWaits() as waits:
        assert bool((x > 0).all())
        assert x.sum().item() == 1
        assert torch.equal(x, x + 1)
        torch.tensor(1.0, device=FAR)
        x.new_tensor([1.0])
        torch.ones(3).to(FAR)
        dist.Normal(x, 0.5, validate_args=False)  # makes a tensor of the number
        assert waits.total == 7
        (x + 1 + torch.where(x > 0, x, 0.0)) * torch.tensor(2.0)
        torch.full((), 2.0, device=FAR).exp()
    assert waits.total == 7


def test_no_step_but_the_first_reads_a_generator(device, monkeypatch):
    net = nn.Linear(4, 3).to(device)
    model = svd.Supervised(svd.bayesianize(net), _classes, 20)
    loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
    data = torch.randn(5, 4, device=device), torch.zeros(5, device=device)
    loss(*data)
    reads = []
    for module in (torch, torch.cuda):
        monkeypatch.setattr(module, "get_rng_state", lambda *_: reads.append(1) or torch.zeros(0, dtype=torch.uint8))
    loss(*data).backward()
    assert reads == []
