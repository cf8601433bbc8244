"""How often a step of fit makes the host wait for an accelerator, and what it says of numbers that are not finite."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_sparsevd as svd
from far_device import FAR, HostWaits


def _model(device, likelihood=lambda out: dist.Categorical(logits=out), num_data=25):
    with torch.device(device):
        net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model = svd.Supervised(svd.bayesianize(net), likelihood, num_data)
    return model, svd.AutoSparseNormal(model)


def _batches(device, count):
    return [(torch.randn(5, 4, device=device), torch.zeros(5, dtype=torch.long, device=device)) for _ in range(count)]


def _waits(count):
    with HostWaits() as waits:
        svd.fit(*_model(FAR, num_data=5 * count), _batches(FAR, count), epochs=1)
    return waits.total


def test_a_step_waits_once(monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which refuses this device
    assert _waits(20) - _waits(12) == 8


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("bad", ["x", "y"])
def test_bad_data_are_named_and_do_no_harm(bad, epoch, device):
    model, guide = _model(device)
    good, (x, y) = _batches(device, 4), _batches(device, 1)[0]
    x[0, 0] = math.nan if bad == "x" else 0.0
    y[0] = 9 if bad == "y" else 0
    states = []

    def epochs():
        yield from good if len(states) < epoch else []
        states.append([value.clone() for value in (*model.state_dict().values(), *guide.state_dict().values())])
        yield (x, y) if len(states) > epoch else good[0]

    with pytest.raises(ValueError, match=r"^x: expected finite" if bad == "x" else r"^y: Expected value argument"):
        svd.fit(model, guide, epochs, epochs=5)
    found = [*model.state_dict().values(), *guide.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(found, states[-1], strict=True))
    assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])


def test_a_gradient_that_is_not_finite_is_named_and_no_step_taken(device):
    model, guide = _model(device, lambda out: dist.Normal(((out * 0).sum(-1) ** 2).sqrt(), 1.0))
    before = [p.clone() for p in (*model.parameters(), *guide.parameters())]
    batches = [(x, y.float()) for x, y in _batches(device, 5)]
    with pytest.raises(ValueError, match=r"^gradient: expected finite numbers"):
        svd.fit(model, guide, batches, epochs=1)
    assert all(map(torch.equal, (*model.parameters(), *guide.parameters()), before))
