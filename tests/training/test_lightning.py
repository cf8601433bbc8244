"""SparseVDModule: what a Lightning trainer does with it."""

import lightning
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_sparsevd as svd
from pyro_sparsevd.training.lightning import RandomState, SparseVDModule

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:lightning"),
]


def _data():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 10, generator=generator)
    return TensorDataset(x, x[:, :1] + 0.1 * torch.randn(200, 1, generator=generator))


def _module(log_variance=-10.0, net=None, **options):
    pyro.clear_param_store()
    torch.manual_seed(0)
    bnn = svd.bayesianize(net or nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)))
    model = svd.Supervised(bnn, lambda mean: dist.Normal(mean, 0.1).to_event(1), 200)
    return SparseVDModule(model, svd.AutoSparseNormal(model, init_log_variance=log_variance), **options)


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
        results.append([p.detach().clone() for p in module.parameters()])
    whole, half, resumed = results
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole, half, strict=True))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_have_the_gradients_of_the_joint_batch(tmp_path):
    results = []
    for devices, size in ((1, 200), (2, 100)):  # whatever the order of the data
        module = _module(log_variance=-60.0)
        options = {"devices": devices, "strategy": "ddp_fork" if devices > 1 else "auto"}
        _trainer(tmp_path, epochs=6, **options).fit(module, _batches(size=size))
        results.append([p.detach().clone() for p in module.parameters()])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)


def test_accumulated_gradients_make_larger_batches(tmp_path):
    results = []
    for size, accumulated in ((100, 1), (50, 2)):
        module = _module(log_variance=-60.0, lr=1e-2)
        trainer = _trainer(tmp_path, epochs=2, accumulate_grad_batches=accumulated)
        trainer.fit(module, _batches(shuffle=False, size=size))
        results.append([p.detach().clone() for p in module.parameters()])
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
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"^gradient: expected finite numbers"):
        _trainer(tmp_path).fit(module, _batches())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
