"""The training loop: what it calls, and that a run that was killed ends as one that was not."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sparsevd import AutoSparseNormal, SparseVD_ELBO, Supervised, bayesianize
from pyro_sparsevd.datasets import Split
from pyro_sparsevd.training import CrossEntropy, batches, constant_then_linear, error, fit


@pytest.fixture
def split(device):
    torch.manual_seed(0)
    return Split(torch.rand(20, 1, 2, 2, device=device), torch.randint(3, (20,), device=device))


def _dense(device):
    torch.manual_seed(1)
    return CrossEntropy(nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3)).to(device))


def _sparse(device):
    model = Supervised(bayesianize(_dense(device).network), lambda x: dist.Categorical(logits=x), 20)
    return SparseVD_ELBO()(model, AutoSparseNormal(model))


def _run(loss, split, epochs, **kwargs):
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    scheduler = constant_then_linear(optimizer, 6)
    return fit(loss, split, epochs=epochs, batch_size=8, optimizer=optimizer, scheduler=scheduler, **kwargs)


def test_batches_are_all_data_once_with_their_labels(split):
    found = list(batches(split, 8))
    assert [len(y) for _, y in found] == [8, 8, 4]
    pairs = {(tuple(x.flatten().tolist()), int(y)) for xs, ys in found for x, y in zip(xs, ys, strict=True)}
    assert pairs == {(tuple(x.flatten().tolist()), int(y)) for x, y in zip(split.images, split.labels, strict=True)}


def test_batches_need_a_positive_size(split):
    with pytest.raises(ValueError, match="size: expected a positive batch size, but got 0"):
        next(batches(split, 0))


def test_the_learning_rate_is_constant_then_falls_linearly_to_0():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.4)
    scheduler = constant_then_linear(optimizer, 8)
    rates = []
    for _ in range(9):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.4] * 5 + [0.3, 0.2, 0.1, 0.0])


def test_error_is_the_fraction_of_wrong_predictions_in_evaluation_mode(device):
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.Dropout(0.9)).to(device).train()
    images = torch.eye(3, device=device).view(3, 1, 1, 3)
    assert error(network, Split(images, torch.tensor([0, 1, 0], device=device)), batch_size=2) == pytest.approx(1 / 3)
    assert network.training
    assert all(module.training for module in network.modules())
    assert network[1].num_batches_tracked == 0


def test_what_is_called_when(split, device):
    calls = []

    def after(epoch):
        calls.append(("after", epoch))
        return {"twice": 2 * epoch}

    history = _run(
        _dense(device), split, 2, before_epoch=lambda epoch: calls.append(("before", epoch)), after_epoch=after
    )
    assert calls == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]
    assert history == [{"twice": 0}, {"twice": 2}]


def test_training_lowers_the_loss(split, device):
    loss = _dense(device)
    before = loss(split.images, split.labels)
    _run(loss, split, 6)
    assert loss(split.images, split.labels) < before - 0.01


def _sparse_with_dropout(device):
    torch.manual_seed(1)
    shared = nn.Linear(4, 4)
    net = nn.Sequential(nn.Flatten(), shared, nn.Dropout(0.3), nn.Tanh(), shared, nn.Linear(4, 3)).to(device)
    model = Supervised(bayesianize(net), lambda x: dist.Categorical(logits=x), 20)
    return SparseVD_ELBO()(model, AutoSparseNormal(model))


@pytest.mark.parametrize("make", [_dense, _sparse, _sparse_with_dropout])
def test_a_run_that_was_killed_ends_as_one_that_was_not(make, split, device, tmp_path):
    def kill(epoch):
        if epoch == 3:
            raise KeyboardInterrupt

    whole, killed, resumed = make(device), make(device), make(device)
    torch.manual_seed(2)
    _run(whole, split, 6, after_epoch=lambda epoch: {"epoch": epoch})
    torch.manual_seed(2)
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        _run(killed, split, 6, before_epoch=kill, after_epoch=lambda epoch: {"epoch": epoch}, checkpoint=path)
    torch.manual_seed(3)
    history = _run(resumed, split, 6, after_epoch=lambda epoch: {"epoch": epoch}, checkpoint=path)
    assert [h["epoch"] for h in history] == list(range(6))
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_a_longer_training_is_refused_and_changes_nothing(split, device, tmp_path):
    path = tmp_path / "run.pt"
    _run(_dense(device), split, 3, checkpoint=path)
    loss = _dense(device)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with pytest.raises(ValueError, match="expected at most 2 epochs, but it has 3; remove it"):
        _run(loss, split, 2, checkpoint=path)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


def test_numbers_of_numpy_are_kept_in_a_checkpoint(split, device, tmp_path):
    options = {"checkpoint": tmp_path / "run.pt", "after_epoch": lambda epoch: {"error": np.float64(0.5)}}
    _run(_dense(device), split, 1, **options)
    assert _run(_dense(device), split, 2, **options) == [{"error": 0.5}] * 2
