"""SparseVDModule: what a Lightning trainer does with it."""

import math
import sys
from types import SimpleNamespace

import lightning
import pyro
import pyro.distributions as dist
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sparsevd as svd
from pyro_sparsevd.training.lightning import CheckpointError, RandomState, SparseVDModule

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # the same, where pytest.warns gives it on
]


def _data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 10, generator=generator)
    return TensorDataset(x, x[:, :1] + 0.1 * torch.randn(200, 1, generator=generator))


def _module(log_variance=-10.0, net=None, num_data=200, **options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    bnn = svd.bayesianize(net or nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)))
    model = svd.Supervised(bnn, lambda mean: dist.Normal(mean, 0.1).to_event(1), num_data)
    return SparseVDModule(model, svd.AutoSparseNormal(model, init_log_variance=log_variance), **options)


def _values(module):
    return [p.detach().clone() for p in module.parameters()]


def _trainer(folder, epochs=4, callbacks=(), **options):
    return lightning.Trainer(
        **{
            "max_epochs": epochs,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": folder,
            "callbacks": list(callbacks),
            **options,
        }
    )


def _batches(shuffle=True, size=50):
    return DataLoader(_data(), batch_size=size, shuffle=shuffle)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_trains_and_logs(tmp_path, precision):
    module = _module(lr=1e-2)
    trainer = _trainer(tmp_path, epochs=60, precision=precision)
    trainer.fit(module, _batches(), _batches(shuffle=False))
    logged = trainer.logged_metrics
    assert set(logged) == {"nll", "kl", "sparsity", "compression", "validation_nll"}
    assert logged["validation_nll"] < 200
    assert module.elbo.kl_weight == 1.0
    samples = torch.cat(trainer.predict(module, _batches(shuffle=False)), 1)
    assert samples.shape == (20, 200, 1)
    _, y = _data().tensors
    assert (samples.mean(0) - y).square().mean() < 0.1
    assert list(tmp_path.iterdir()) == []


class _Interruption(lightning.Callback):
    def __init__(self, epoch, path):
        self.epoch, self.path = epoch, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def test_a_resumed_training_is_one_that_was_never_interrupted(tmp_path):
    results = []
    path = tmp_path / "checkpoint.ckpt"
    for callbacks, resumed in (((), None), ((_Interruption(1, path),), None), ((), path)):
        module = _module()
        lightning.seed_everything(3, verbose=False)
        _trainer(tmp_path, callbacks=[RandomState(), *callbacks]).fit(module, _batches(), ckpt_path=resumed)
        results.append(_values(module))
    whole, half, resumed = results
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))


def test_a_finished_training_that_is_resumed_leaves_the_random_numbers_as_it_did(tmp_path):
    path, numbers = tmp_path / "checkpoint.ckpt", []
    for resumed in (None, path):
        trainer = _trainer(tmp_path, callbacks=[RandomState()])
        lightning.seed_everything(3, verbose=False)
        trainer.fit(_module(), _batches(), ckpt_path=resumed)
        if resumed is None:
            trainer.save_checkpoint(path)
        numbers.append(torch.rand(5))
    assert torch.equal(*numbers)


def test_a_guide_in_the_place_of_the_model_is_refused():
    module = _module()
    with pytest.raises(TypeError, match="model: expected a torch module or a function, but got AutoSparseNormal"):
        SparseVDModule(module.guide, module.model)


REFUSED = {
    "lr": ({"lr": 0.1}, "lr 0.1, but it is of one with lr 0.003; go on with lr 0.003"),
    "kl": ({"kl": "approximate"}, "kl approximate, but it is of one with kl exact"),
    "warm_up": ({"warm_up": 0}, "warm_up 0, but it is of one with warm_up 0.5"),
    "weight_decay": ({"weight_decay": 0.1}, "weight_decay 0.1, but"),
    "num_data": ({"num_data": 300}, "num_data 300, but it is of one with num_data 200"),
    "epochs": ({"epochs": 2}, "epochs 2, but it is of one with epochs 4"),
    "seed": ({"seed": 1}, "seed 1, but it is of one with seed None"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_of_other_options_is_refused_by_name(options, message, tmp_path, checkpoint):
    options = dict(options)
    epochs, noted = options.pop("epochs", 4), {"seed": options.pop("seed")} if "seed" in options else {}
    module = _module(**options)
    module.save_hyperparameters(noted)
    before = _values(module)
    with pytest.raises(CheckpointError, match=f"expected the checkpoint of a training with {message}"):
        _trainer(tmp_path, epochs=epochs).fit(module, _batches(), ckpt_path=checkpoint)
    assert all(map(torch.equal, before, module.parameters()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "checkpoint.ckpt"
    trainer = _trainer(path.parent, callbacks=[RandomState(), _Interruption(1, path)])
    trainer.fit(_module(), _batches())
    return path


def test_a_checkpoint_of_another_network_is_refused_by_name(tmp_path, checkpoint):
    message = r"expected a checkpoint with \S+ of shape \(.*\), but got .*; go on with the network"
    with pytest.raises(CheckpointError, match=message):
        _trainer(tmp_path).fit(_module(net=nn.Linear(10, 1)), _batches(), ckpt_path=checkpoint)


def test_a_checkpoint_is_read_without_a_trainer(checkpoint):
    module, other = _module(), _module()
    loaded = SparseVDModule.load_from_checkpoint(checkpoint, model=other.model, guide=other.guide, weights_only=True)
    assert not all(map(torch.equal, _values(module), _values(loaded)))


def test_random_numbers_go_on_on_as_many_devices_as_there_are(monkeypatch):
    generators = {0: torch.tensor([1, 2], dtype=torch.uint8), 1: torch.tensor([3], dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(generators))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(generators.values()))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: generators.__setitem__(device, state))
    kept = RandomState().state_dict()
    expected = torch.rand(3)
    generators = {0: torch.tensor([9], dtype=torch.uint8)}  # on a machine with one
    RandomState().load_state_dict(kept)
    assert [state.tolist() for state in generators.values()] == [[1, 2]]
    assert torch.equal(torch.rand(3), expected)
    monkeypatch.setattr(torch.cuda, "set_rng_state", None)
    RandomState().load_state_dict({**kept, "cuda": []})  # of a machine with none
    assert torch.equal(torch.rand(3), expected)


class _Losses(lightning.Callback):
    """Writes the losses of each process into a file."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with (self.folder / f"{trainer.global_rank}").open("a") as file:
            file.write(f"{outputs['loss'].item()}\n")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("own", [True, False], ids=["with RandomState", "without"])
def test_two_processes_have_noise_of_their_own(own, tmp_path):
    torch.manual_seed(0)
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    callbacks = [_Losses(tmp_path), *([RandomState()] if own else [])]
    _trainer(tmp_path, epochs=1, callbacks=callbacks, **options).fit(_module(-4.0), _batches(shuffle=False))
    losses = [[float(line) for line in (tmp_path / rank).read_text().splitlines()] for rank in "01"]
    assert all((a != b) == own for a, b in zip(*losses, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_checkpoint_of_two_processes_goes_on_in_one(tmp_path):
    path = tmp_path / "checkpoint.ckpt"
    two = {"devices": 2, "strategy": "ddp_fork"}
    trainer = _trainer(tmp_path, callbacks=[RandomState(), _Interruption(1, path)], **two)
    trainer.fit(_module(), _batches(size=25))
    trainer = _trainer(tmp_path, callbacks=[RandomState()])
    trainer.fit(_module(), _batches(), ckpt_path=path)
    assert trainer.current_epoch == 4
    assert trainer.global_step == 16


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_have_the_gradients_of_the_joint_batch(tmp_path):
    results = []
    for devices, size in ((1, 200), (2, 100)):  # whatever the order of the data
        module = _module(log_variance=-60.0)
        options = {"devices": devices, "strategy": "ddp_fork" if devices > 1 else "auto"}
        _trainer(tmp_path, epochs=6, **options).fit(module, _batches(size=size))
        results.append(_values(module))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_make_larger_batches(tmp_path):
    results = []
    for size, accumulated in ((100, 1), (50, 2)):
        module = _module(log_variance=-60.0, lr=1e-2)
        trainer = _trainer(tmp_path, epochs=2, accumulate_grad_batches=accumulated)
        trainer.fit(module, _batches(shuffle=False, size=size))
        results.append(_values(module))
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)


def test_log_variances_have_no_weight_decay(tmp_path):
    module = _module(weight_decay=0.1)
    module._trainer = _trainer(tmp_path)
    module.trainer.fit_loop.setup_data = lambda: None
    module.trainer.fit_loop.max_batches = 1
    optimizer = module.configure_optimizers()["optimizer"]
    decayed, free = optimizer.param_groups
    assert [decayed["weight_decay"], free["weight_decay"]] == [0.1, 0.0]
    assert {id(p) for p in free["params"]} == {id(p) for p in module.guide.log_variances.parameters()}
    assert len(decayed["params"]) + len(free["params"]) == len(list(module.loss.parameters()))


def test_a_gradient_that_is_not_finite_stops_before_the_parameters(tmp_path):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 1)

        def forward(self, x):
            return self.layer(x) + 0 * (0 * self.layer.bias).sqrt()

    module = _module(net=Root())
    before = _values(module)
    with pytest.raises(ValueError, match=r"^gradient: expected finite numbers"):
        _trainer(tmp_path).fit(module, _batches())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "^lr: expected a positive"),
        ({"warm_up": 2}, "^warm_up: expected 0"),
        ({"kl": 3}, "^kl: "),
    ],
    ids=["lr", "warm-up", "kl"],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        _module(**options)


def test_data_of_another_number_than_the_model_was_told_of(tmp_path):
    module = _module(num_data=100)
    before = _values(module)
    with pytest.raises(ValueError, match="num_data: expected as many data as an epoch has, 200 or more, but got 100"):
        _trainer(tmp_path).fit(module, _batches())
    assert all(map(torch.equal, before, module.parameters()))
    with pytest.warns(UserWarning, match="num_data: the likelihood is scaled to 1000 data, but an epoch has 200"):
        _trainer(tmp_path, epochs=1).fit(_module(num_data=1_000), _batches())


def test_a_validation_that_is_not_finite_is_refused(tmp_path):
    class Fails(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 if self.training else math.inf)

    with pytest.raises(ValueError, match="finite"):
        _trainer(tmp_path).fit(_module(net=Fails(10, 1)), _batches(), _batches(shuffle=False))


def test_a_training_without_an_end_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trainer: expected max_epochs, or max_steps where batches have no length"):
        _trainer(tmp_path, epochs=-1).fit(_module(), _batches())


def test_a_model_that_is_a_function_needs_a_guide_that_was_called(tmp_path):
    def model(x, y=None):
        w = pyro.sample("w", svd.LogUniform().expand([10]).to_event(1))
        with pyro.plate("data", 200, subsample=x):
            pyro.sample("y", dist.Normal(x @ w, 0.1), obs=None if y is None else y[:, 0])

    guide = svd.AutoSparseNormal(model)
    with pytest.raises(ValueError, match="guide: expected parameters, but it has none yet; call it with a batch"):
        _trainer(tmp_path).fit(SparseVDModule(model, guide), _batches())
    guide(*_data()[:])
    _trainer(tmp_path, epochs=60).fit(SparseVDModule(model, guide, lr=1e-2), _batches())
    assert guide.median()["w"][0].item() == pytest.approx(1.0, abs=0.1)


def test_predictions_for_batches_that_are_dictionaries(tmp_path):
    x, y = _data()[:]
    batches = [{"x": x[:150], "y": y[:150]}, {"x": x[150:], "y": y[150:]}]
    samples = _trainer(tmp_path).predict(_module(), DataLoader(batches, batch_size=None))
    assert [tuple(of_batch.shape) for of_batch in samples] == [(20, 150, 1), (20, 50, 1)]


def test_the_room_has_what_needs_lightning_by_name(monkeypatch):
    assert svd.training.SparseVDModule is SparseVDModule
    assert svd.training.RandomState is RandomState
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        svd.training.Nothing  # noqa: B018
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ImportError, match=r'SparseVDModule: expected lightning; pip install "pyro-sparsevd\[light'):
        svd.training.SparseVDModule  # noqa: B018


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # which is meant
def test_a_training_resumes_from_a_checkpoint_within_an_epoch(tmp_path):
    path = None
    for folder in (tmp_path / "first", tmp_path / "resumed"):
        save = ModelCheckpoint(folder, every_n_train_steps=6, save_top_k=-1)
        resumed, trainer = _module(), _trainer(tmp_path, enable_checkpointing=True, callbacks=[save, RandomState()])
        trainer.fit(resumed, _batches(), ckpt_path=path)
        path = next(folder.glob("*step=6.ckpt"), None)
    assert trainer.global_step == 16
    assert all(value.isfinite().all() for value in _values(resumed))


def test_neither_parameterisation_decays_the_parameters_of_its_noise():
    model = _module().model
    guide = svd.AutoSparseNormal(model, parameterization="multiplicative")
    module = SparseVDModule(model, guide, weight_decay=0.1)
    _trainer(None).strategy.connect(module)
    module.trainer = SimpleNamespace(estimated_stepping_batches=10)
    groups = module.configure_optimizers()["optimizer"].param_groups
    noise = {id(p) for name, p in guide.named_parameters() if "log_alphas" in name}
    assert {id(p) for p in groups[1]["params"]} == noise != set()
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
