"""Trainings of the tutorials: quiet, and resumed from whole checkpoints of their own options alone."""

import copy
import logging
import warnings

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from lab import recipes
from lab.datasets import batches
from lab.training import MaximumLikelihood, Run, train
from torch import nn
from torch.utils.data import TensorDataset

from pyro_sparsevd import AutoSparseNormal, GaussianLikelihood, Supervised, bayesianize, prune, sparsify
from pyro_sparsevd.training.lightning import CheckpointError, SparseVDModule


def categorical(logits):
    return dist.Categorical(logits=logits)


@pytest.fixture
def data(device):
    torch.manual_seed(0)
    return TensorDataset(torch.rand(20, 1, 2, 2, device=device), torch.randint(3, (20,), device=device))


def _network(device, outputs=3):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, outputs), nn.BatchNorm1d(outputs)).to(device)


def _dense(device, outputs=3, lr=1e-2):
    return MaximumLikelihood(_network(device, outputs), categorical, lr)


def _sparse_module(network):
    model = Supervised(bayesianize(network), categorical, 20)
    return SparseVDModule(model, AutoSparseNormal(model), lr=1e-2)


def _sparse(device):
    return _sparse_module(_network(device))


def _sparse_with_dropout(device):
    torch.manual_seed(1)
    shared = nn.Linear(4, 4)
    net = nn.Sequential(nn.Flatten(), shared, nn.Dropout(0.3), nn.Tanh(), shared, nn.Linear(4, 3))
    return _sparse_module(net.to(device))


def _train(module, data, epochs, path=None, after_epoch=None, **options):
    run = Run(checkpoint=path, resume=True, options=options)
    return train(module, batches(data, 8), epochs=epochs, run=run, description="", after_epoch=after_epoch)


@pytest.mark.parametrize("make", [_dense, _sparse, _sparse_with_dropout])
def test_a_run_that_was_killed_ends_as_one_that_was_not(make, data, device, tmp_path):
    def kill(epoch):
        if epoch == 3:
            raise RuntimeError("killed")
        return {"epoch": epoch}

    whole, killed, resumed = make(device), make(device), make(device)
    torch.manual_seed(2)
    expected_history = _train(whole, data, 6, after_epoch=lambda epoch: {"epoch": epoch})
    torch.manual_seed(2)
    path = tmp_path / "run.ckpt"
    with pytest.raises(RuntimeError, match="killed"):
        _train(killed, data, 6, path, kill)
    torch.manual_seed(3)
    history = _train(resumed, data, 6, path, lambda epoch: {"epoch": epoch})
    assert history == expected_history
    assert [numbers["epoch"] for numbers in history] == list(range(6))
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, msg=name)
    assert list(tmp_path.iterdir()) == [path]


def _refused(module, data, epochs, path, message, **options):
    """Asserts that a training is refused, and changes nothing."""
    before = copy.deepcopy(module.state_dict())
    content = path.read_bytes()
    with pytest.raises(CheckpointError, match=rf"run\.ckpt: {message}"):
        _train(module, data, epochs, path, **options)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert path.read_bytes() == content


def test_a_checkpoint_of_a_longer_training_is_refused(data, device, tmp_path):
    path = tmp_path / "run.ckpt"
    _train(_dense(device), data, 3, path)
    _refused(
        _dense(device), data, 2, path, "expected the checkpoint of a training with epochs 2, but it is of one with"
    )


def test_a_checkpoint_is_continued_for_more_epochs(data, device, tmp_path):
    path, seen = tmp_path / "run.ckpt", []
    _train(_dense(device), data, 2, path, seed=0)
    assert len(_train(_dense(device), data, 3, path, lambda epoch: seen.append(epoch) or {}, seed=0)) == 3
    assert seen == [2]
    assert len(_train(_dense(device), data, 3, path, seed=0)) == 3  # there is nothing left to do


@pytest.mark.parametrize("options", [{"seed": 1}, {"lr": 0.1}, {"net": "lenet-5"}, {}], ids=str)
def test_a_checkpoint_of_other_options_is_refused(options, data, device, tmp_path):
    path = tmp_path / "run.ckpt"
    _train(_dense(device), data, 2, path, seed=0)
    ((name, value),) = options.items() if options else [("seed", None)]
    message = f"expected the checkpoint of a training with {name} {value}, but it is of one with {name} .*; go on with"
    module = _dense(device, lr=options.pop("lr", 1e-2))
    _refused(module, data, 3, path, message, **({"seed": 0, **options} if value is not None else {}))


def test_a_checkpoint_of_another_network_is_refused(data, device, tmp_path):
    path = tmp_path / "run.ckpt"
    _train(_dense(device), data, 1, path)
    message = r"expected a checkpoint with network.1.weight of shape \(5, 4\), but got \(3, 4\); go on with"
    _refused(_dense(device, outputs=5), data, 2, path, message)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "truncated", "flipped"])
def test_a_checkpoint_that_is_damaged_is_refused(content, data, device, tmp_path):
    path = tmp_path / "run.ckpt"
    _train(_dense(device), data, 1, path)
    whole = path.read_bytes()
    damaged = {"truncated": whole[: len(whole) // 2], "flipped": b"PK" + whole[2:100][::-1] + whole[100:]}
    path.write_bytes(damaged.get(content, content))
    _refused(_dense(device), data, 2, path, r"expected a checkpoint, but it cannot be read \(\w+\); remove it")


@pytest.mark.parametrize("state", [{"weight": torch.zeros(2)}, [1, 2]], ids=["a state dict", "a list"])
def test_another_file_of_torch_is_refused(state, data, device, tmp_path):
    path = tmp_path / "run.ckpt"
    torch.save(state, path)
    _refused(_dense(device), data, 2, path, "expected a checkpoint of callbacks, hyper_parameters, loops")


def test_a_checkpoint_is_whole_at_any_moment(data, device, tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    _train(_dense(device), data, 1, path)
    whole = path.read_bytes()

    def half_a_file(state, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half_a_file)
    with pytest.raises(SystemExit):  # Lightning's, for an interrupted training
        _train(_dense(device), data, 2, path)
    assert path.read_bytes() == whole


def test_numbers_of_numpy_are_kept_in_a_checkpoint(data, device, tmp_path):
    path = tmp_path / "run.ckpt"
    _train(_dense(device), data, 1, path, lambda epoch: {"error": np.float64(0.5)})
    history = _train(_dense(device), data, 2, path, lambda epoch: {"error": np.float64(0.5)})
    assert [numbers["error"] for numbers in history] == [0.5, 0.5]


def test_checkpoints_of_many_epochs_are_a_hundred_or_fewer(data, device, tmp_path, monkeypatch):
    saved, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda state, path: saved.append(state["epoch"]) or save(state, path))
    _train(_dense(device), TensorDataset(*data[:8]), 205, tmp_path / "run.ckpt")
    assert saved == [*range(2, 204, 3), 204]


def test_a_training_is_quiet_but_for_its_progress(data, device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        monkeypatch.setattr(logger, "handlers", [Handler()])
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _train(_sparse(device), data, 2)
    out, err = capsys.readouterr()
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert (records, [str(warning.message) for warning in warned], out) == ([], [], "")
    assert all("epoch" in line for line in lines)
    assert all(f"{name}=" in lines[-1] for name in ("nll", "kl", "sparsity"))
    assert list(tmp_path.iterdir()) == []
    assert [logger.level for logger in loggers] == levels


def test_warnings_of_a_model_are_heard(data, device):
    class Warns(nn.Module):
        def forward(self, x):
            warnings.warn("of the model", stacklevel=2)
            return x

    network = nn.Sequential(_network(device), Warns())
    with pytest.warns(UserWarning, match="of the model"):
        _train(MaximumLikelihood(network, categorical, 1e-2), data, 1)


def test_no_epochs_leave_a_module_as_it_is(data, device):
    module = _dense(device)
    before = copy.deepcopy(module.state_dict())
    assert _train(module, data, 0) == []
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_training_lowers_the_loss(data, device):
    network = _network(device)
    held_out = batches(data, 20, shuffle=False)
    before = recipes.score(network, categorical, held_out, "nll")
    assert recipes.train_dense(network, categorical, batches(data, 8), epochs=6, lr=1e-2) is network
    assert recipes.score(network, categorical, held_out, "nll") < before - 0.01


def test_error_is_the_fraction_of_wrong_predictions_in_evaluation_mode(device):
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.Dropout(0.9)).to(device).train()
    images = torch.eye(3, device=device).view(3, 1, 1, 3)
    data = batches(TensorDataset(images, torch.tensor([0, 1, 0], device=device)), 2, shuffle=False)
    assert recipes.score(network, categorical, data) == pytest.approx(1 / 3)
    assert all(module.training for module in network.modules())
    assert network[1].num_batches_tracked == 0


def _regression(device):
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).to(device)
    return TensorDataset(x, x[:, :1] - x[:, 1:2])


LIKELIHOODS = {
    "noise is known": lambda mean: dist.Normal(mean, 0.1).to_event(1),
    "noise is learnt": GaussianLikelihood(),
}


@pytest.mark.parametrize("likelihood", LIKELIHOODS.values(), ids=LIKELIHOODS)
def test_fine_tuning_of_a_regression_lowers_its_error(likelihood, device):
    torch.manual_seed(0)
    data = _regression(device)
    model = Supervised(bayesianize(nn.Linear(5, 1)), likelihood, 200).to(device)
    guide = AutoSparseNormal(model)
    held_out = batches(data, 200, shuffle=False)
    history = recipes.train_sparse(model, guide, batches(data, 50), validation=held_out, epochs=3, lr=3e-2)
    assert sorted(history[-1]) == ["compression", "kl", "nll", "rmse", "sparsity"]
    pruned = prune(model.network, guide, sparsify(guide))
    pruned.weight.data[:, 2:] = 0
    before = copy.deepcopy(model.state_dict())
    tuned = recipes.fine_tune(pruned, model.likelihood, batches(data, 50), epochs=30, lr=3e-2)
    errors = [recipes.score(network, model.likelihood, held_out, "rmse") for network in (pruned, tuned)]
    assert errors[1] < 0.1 * errors[0]
    assert (tuned.weight[:, 2:] == 0).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_the_scale_of_a_likelihood_is_fitted_with_a_dense_network(device):
    likelihood = GaussianLikelihood(init_scale=3.0).to(device)
    recipes.train_dense(nn.Linear(5, 1).to(device), likelihood, batches(_regression(device), 50), epochs=40, lr=3e-2)
    assert likelihood.scale < 1.0


def test_targets_that_do_not_fit_the_likelihood_are_refused(device):
    x, y = _regression(device).tensors
    network = nn.Linear(5, 1).to(device)
    before = network.weight.clone()
    for train_network in (recipes.fine_tune, recipes.train_dense):
        with pytest.raises(ValueError, match=r"y: expected targets of shape \(50, 1\), but got \(50,\)"):
            train_network(network, GaussianLikelihood(), batches(TensorDataset(x, y[:, 0]), 50), epochs=1)
    with pytest.raises(ValueError, match="value"):
        recipes.train_dense(network, categorical, batches(TensorDataset(x, y[:, 0]), 50), epochs=1)
    assert torch.equal(network.weight, before)


def _exclusive_or(size, device, seed=0):
    """Returns points in a plane, with the classes of "exclusive or"."""
    x = torch.randn(size, 2, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x.to(device), (x.prod(1) > 0).long().to(device))


def _fit_exclusive_or(data, device, num_data=80, epochs=60):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 2))
    model = Supervised(bayesianize(net.to(device)), categorical, num_data)
    guide = AutoSparseNormal(model, init_log_variance=-8.0)
    held_out = batches(_exclusive_or(1_000, device, seed=1), 1_000, shuffle=False)
    options = {"epochs": epochs, "lr": 3e-2, "warm_up": 0.03}
    return recipes.train_sparse(model, guide, batches(data, 8), validation=held_out, **options)


def test_a_data_set_of_another_size_than_the_model_was_given(device):
    with pytest.raises(ValueError, match="num_data: expected as many data as an epoch has, 80 or more, but got 40"):
        _fit_exclusive_or(_exclusive_or(80, device), device, num_data=40, epochs=1)
    with pytest.warns(UserWarning, match="num_data: the likelihood is scaled to 100 data, but an epoch has 80"):
        _fit_exclusive_or(_exclusive_or(80, device), device, num_data=100, epochs=1)


def test_a_posterior_that_collapsed_though_there_was_something_to_learn_warns(device):
    with pytest.warns(UserWarning, match=r"the posterior collapsed: every weight is dropped, and the held-out error"):
        history = _fit_exclusive_or(_exclusive_or(80, device), device)
    assert history[-1]["sparsity"] == 1


def test_random_labels_lose_every_weight_without_a_warning(device):
    x, y = _exclusive_or(80, device).tensors
    shuffled = TensorDataset(x, y[torch.randperm(80, generator=torch.Generator().manual_seed(2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _fit_exclusive_or(shuffled, device)[-1]["sparsity"] == 1
