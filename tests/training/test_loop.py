"""The training loop: what it calls, and that a run that was killed ends as one that was not."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_sparsevd import AutoSparseNormal, SparseVD_ELBO, Supervised, bayesianize
from pyro_sparsevd.training import checkpoints
from pyro_sparsevd.training.checkpoints import Checkpoint, CheckpointError
from pyro_sparsevd.training.loop import CrossEntropy, batches, constant_then_linear, error, fit
from pyro_sparsevd.training.split import Split


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


SETTINGS = {"--seed": 0, "--lr": 1e-3, "--kl": "exact", "--pretrained": False}


@pytest.mark.parametrize(("name", "value"), [("--seed", 1), ("--lr", 0.1), ("--kl", "approximate")])
def test_a_checkpoint_of_other_settings_is_refused_and_changes_nothing(name, value, split, device, tmp_path):
    path = tmp_path / "run.pt"
    _run(_dense(device), split, 2, checkpoint=Checkpoint(path, SETTINGS))
    loss = _dense(device)
    before = {key: tensor.clone() for key, tensor in loss.state_dict().items()}
    message = (
        f"run.pt: expected a training with {name} {value}, but it is of one with {name} {SETTINGS[name]}; go on with"
    )
    with pytest.raises(CheckpointError, match=message):
        _run(loss, split, 3, checkpoint=Checkpoint(path, {**SETTINGS, name: value}))
    assert all(torch.equal(tensor, before[key]) for key, tensor in loss.state_dict().items())


def test_a_checkpoint_of_the_same_settings_is_continued_for_more_epochs(split, device, tmp_path):
    options = {"checkpoint": Checkpoint(str(tmp_path / "run.pt"), SETTINGS), "after_epoch": lambda e: {"epoch": e}}
    _run(_dense(device), split, 2, **options)
    seen = []
    assert len(_run(_dense(device), split, 3, before_epoch=seen.append, **options)) == 3
    assert seen == [2]


def test_a_checkpoint_without_settings_is_gone_on_from(split, device, tmp_path):
    path = tmp_path / "run.pt"
    _run(_dense(device), split, 2, checkpoint=path)
    state = torch.load(path, weights_only=True)
    torch.save({name: part for name, part in state.items() if name != "settings"}, path)  # as earlier versions did
    seen = []
    _run(_dense(device), split, 3, before_epoch=seen.append, checkpoint=Checkpoint(path, SETTINGS))
    assert seen == [2]


def test_a_checkpoint_of_another_network_is_refused_and_changes_nothing(split, device, tmp_path):
    path = tmp_path / "run.pt"
    _run(CrossEntropy(nn.Sequential(nn.Flatten(), nn.Linear(4, 3, device=device))), split, 1, checkpoint=path)
    loss = CrossEntropy(nn.Sequential(nn.Flatten(), nn.Linear(4, 5, device=device)))
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"network.1.weight of shape \(5, 4\), but it has \(3, 4\); go on with"):
        _run(loss, split, 2, checkpoint=path)
    assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "flipped"])
def test_a_checkpoint_that_is_damaged_is_refused(content, split, device, tmp_path):
    path = tmp_path / "run.pt"
    _run(_dense(device), split, 1, checkpoint=path)
    whole = path.read_bytes()
    damaged = {"truncated": whole[: len(whole) // 2], "flipped": b"PK" + whole[2:100][::-1] + whole[100:]}
    path.write_bytes(damaged.get(content, content))
    with pytest.raises(CheckpointError, match=r"expected a checkpoint, but it cannot be read \(\w+\); remove it"):
        _run(_dense(device), split, 2, checkpoint=path)


@pytest.mark.parametrize("state", [{"weight": torch.zeros(2)}, [1, 2]], ids=["a state dict", "a list"])
def test_another_file_of_torch_is_refused(state, split, device, tmp_path):
    path = tmp_path / "run.pt"
    torch.save(state, path)
    with pytest.raises(
        CheckpointError, match="expected a checkpoint of generator, history, loss, optimizer, scheduler"
    ):
        _run(_dense(device), split, 2, checkpoint=path)


def test_the_random_numbers_of_a_cuda_device_are_gone_on_with(monkeypatch):
    generators = {torch.device("cuda", 1): torch.tensor([1, 2], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", generators.__getitem__)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: generators.__setitem__(device, state))
    kept = checkpoints._random_states(torch.device("cuda", 1))
    expected = torch.rand(3)
    generators[torch.device("cuda", 1)] = torch.tensor([3, 4], dtype=torch.uint8)
    checkpoints._set_random_states(kept, torch.device("cuda", 1))
    assert generators[torch.device("cuda", 1)].tolist() == [1, 2]
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_a_cpu_is_gone_on_from_on_a_cuda_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "set_rng_state", None)
    kept = checkpoints._random_states(torch.device("cpu"))
    expected = torch.rand(3)
    checkpoints._set_random_states(kept, torch.device("cuda"))
    assert torch.equal(torch.rand(3), expected)
