"""Losses, models and guides in torch's own tools: each does to them what it does to any module."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import pyro_sparsevd as svd
from checks import assert_close, seeded, state_of
from problems import F64, loss_of, normal_likelihood, smooth_data

NUM_DATA = 24
WORLD = 2
NO_NOISE = -60.0  # a log variance whose noise is lost in the rounding of float64
NOISE = -4.0
WIDTH = 128  # of weights large enough that their memory is used again from step to step


def _normal(output: Tensor) -> dist.Normal:
    return normal_likelihood(output.float() if output.dtype == torch.bfloat16 else output)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


def _convolutional() -> nn.Module:
    layers = nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 6, 2, padding=1), nn.Tanh(), nn.Conv2d(6, 5, 2), nn.Flatten()
    return nn.Sequential(*layers, nn.Tanh(), nn.Linear(20, 1))


def _loss(
    device: torch.device,
    make: Callable[[], nn.Module] = _mlp,
    log_variance: float = NOISE,
    dtype: torch.dtype = F64,
    **options: Any,
) -> Any:
    return loss_of(make, device, _normal, NUM_DATA, log_variance, dtype, **options)


def _gradients(loss: nn.Module, value: Tensor) -> dict[str, Tensor]:
    named = dict(loss.named_parameters())
    return dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True))


def _accumulated(loss: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in loss.named_parameters()}


def _spreads(loss: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in loss.named_parameters() if ".log_variances." in name]


def _others(loss: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in loss.named_parameters() if ".log_variances." not in name]


class TestFiles:
    def test_training_goes_on_exactly_from_a_file_without_code(self, device, tmp_path):
        def train(loss: Any, optimizer: torch.optim.Optimizer, seeds: range) -> None:
            for seed in seeds:
                optimizer.zero_grad()
                seeded(loss, *smooth_data(device, NUM_DATA), seed=seed).backward()
                optimizer.step()

        whole, killed, resumed = (_loss(device) for _ in range(3))
        optimizers = [torch.optim.Adam(loss.parameters(), 0.01) for loss in (whole, killed, resumed)]
        train(whole, optimizers[0], range(6))
        train(killed, optimizers[1], range(3))
        path = tmp_path / "checkpoint.pt"
        torch.save({"loss": killed.state_dict(), "optimizer": optimizers[1].state_dict()}, path)
        state = torch.load(path, weights_only=True, map_location=device)
        resumed.load_state_dict(state["loss"])
        optimizers[2].load_state_dict(state["optimizer"])
        train(resumed, optimizers[2], range(3, 6))
        assert_close(state_of(resumed), state_of(whole), tolerance=0)


class TestOptimisers:
    @pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
    def test_decay_in_a_parameter_group_leaves_log_variances_alone(self, make, device):
        losses = [_loss(device) for _ in range(2)]
        decays = 0.5, 0.0
        for loss, decay in zip(losses, decays, strict=True):
            groups = [{"params": _others(loss), "weight_decay": decay}, {"params": _spreads(loss), "weight_decay": 0.0}]
            optimizer = make(groups, lr=0.1)
            seeded(loss, *smooth_data(device, NUM_DATA)).backward()
            before = [[p.detach().clone() for p in of(loss)] for of in (_others, _spreads)]
            optimizer.step()
        decayed, plain = losses
        for one, other in zip(_spreads(decayed), _spreads(plain), strict=True):
            assert torch.equal(one, other)
        for one, other, start in zip(_others(decayed), _others(plain), before[0], strict=True):
            assert_close(one, other - 0.1 * 0.5 * start)
        assert len(_spreads(plain)) == len(before[1]) == 3

    def test_lbfgs_with_noise_that_is_fixed_lowers_the_loss_at_every_step(self, device):
        loss = _loss(device, log_variance=-8.0)
        optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=5, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = seeded(loss, *smooth_data(device, NUM_DATA))
            value.backward()
            return value

        values = [optimizer.step(closure).item() for _ in range(5)]
        assert values == sorted(values, reverse=True)
        assert values[-1] < 0.5 * values[0]

    @pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
    def test_a_scheduler_sets_the_size_of_the_step(self, make, device):
        loss = _loss(device)
        optimizer = make(loss.parameters(), 0.02)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [1.0, 0.0, 0.0].__getitem__)
        states = [state_of(loss)]
        for _ in range(2):
            optimizer.zero_grad()
            loss(*smooth_data(device, NUM_DATA)).backward()
            optimizer.step()
            scheduler.step()
            states.append(state_of(loss))
        assert all(not torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert_close(states[2], states[1], tolerance=0)

    def test_accumulated_micro_batches_are_the_joint_batch(self, device):
        loss, joint = _loss(device, log_variance=NO_NOISE), _loss(device, log_variance=NO_NOISE)
        x, y = smooth_data(device, NUM_DATA)
        joint(x, y).backward()
        for part in range(4):
            (loss(x[6 * part : 6 * (part + 1)], y[6 * part : 6 * (part + 1)]) / 4).backward()
        assert_close(_accumulated(loss), _accumulated(joint))

    @pytest.mark.parametrize("at_once", [False, True], ids=["one-by-one", "in-one-backward-pass"])
    @pytest.mark.parametrize("make", [_mlp, _convolutional])
    def test_accumulated_gradients_are_the_sum_of_single_ones(self, make, at_once, device):
        loss, single = _loss(device, make), _loss(device, make)
        x, y = smooth_data(device, NUM_DATA)
        parts = [(x[:8], y[:8]), (x[8:], y[8:]), (x[:8], y[:8])]
        expected = [_gradients(single, seeded(single, *part, seed=seed)) for seed, part in enumerate(parts)]
        values = []
        for seed, part in enumerate(parts):
            values.append(seeded(loss, *part, seed=seed))
            if not at_once:
                values.pop().backward()
        if at_once:
            sum(values).backward()
        assert_close(_accumulated(loss), {name: sum(g[name] for g in expected) for name in expected[0]})

    def test_clipped_gradients_are_scaled_to_the_norm_that_was_asked_for(self, device):
        loss, free = _loss(device), _loss(device)
        x, y = smooth_data(device, NUM_DATA)
        seeded(loss, x, y).backward()
        gradients = _gradients(free, seeded(free, x, y))
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert norm > 1
        assert_close(nn.utils.clip_grad_norm_(loss.parameters(), 1.0, error_if_nonfinite=True), norm)
        assert_close(_accumulated(loss), {name: g / norm for name, g in gradients.items()}, 1e-6)
        seeded(loss, x, y).backward()  # clipping in place has harmed nothing that is used again
        assert_close(_accumulated(loss), {name: g / norm + g for name, g in gradients.items()}, 1e-6)

    def test_averaged_weights_are_the_mean_of_the_states(self, device):
        loss = _loss(device)
        averaged = torch.optim.swa_utils.AveragedModel(loss)
        optimizer = torch.optim.SGD(loss.parameters(), 0.01)
        states = []
        for _ in range(3):
            optimizer.zero_grad()
            loss(*smooth_data(device, NUM_DATA)).backward()
            optimizer.step()
            averaged.update_parameters(loss)
            states.append(state_of(loss))
        mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
        assert_close(state_of(averaged.module), mean)
        expected = copy.deepcopy(loss)
        expected.load_state_dict(mean)
        assert_close(seeded(averaged, *smooth_data(device, NUM_DATA)), seeded(expected, *smooth_data(device, NUM_DATA)))


class TestData:
    def test_a_data_loader_gives_the_loss_its_batches(self, device):
        x, y = smooth_data(device, NUM_DATA)
        loss = _loss(device)
        loader = DataLoader(
            TensorDataset(x, y), 10, shuffle=True, num_workers=0, generator=torch.Generator().manual_seed(3)
        )
        order = torch.randperm(NUM_DATA, generator=_as_the_loader(3))
        batches = list(loader)
        assert [len(batch) for batch, _ in batches] == [10, 10, 4]
        for indices, batch in zip(order.split(10), batches, strict=True):
            assert_close(seeded(loss, *batch), seeded(loss, x[indices], y[indices]), tolerance=0)


def _as_the_loader(seed: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # the seed of workers, drawn first
    return generator


class TestFunctionsOfModules:
    @pytest.mark.parametrize("make", [_mlp, _convolutional])
    def test_functional_call_evaluates_the_loss_at_the_parameters_given(self, make, device):
        loss, elsewhere = _loss(device, make), _loss(device, make)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in elsewhere.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=F64).to(device))
        given = {name: p.detach().clone().requires_grad_() for name, p in elsewhere.named_parameters()}
        before = state_of(loss)
        value = seeded(functional_call, loss, given, smooth_data(device, NUM_DATA))
        expected = seeded(elsewhere, *smooth_data(device, NUM_DATA))
        assert_close(value, expected, tolerance=0)
        gradients = torch.autograd.grad(value, list(given.values()))
        assert_close(dict(zip(given, gradients, strict=True)), _gradients(elsewhere, expected))
        assert_close(state_of(loss), before, tolerance=0)


class TestMixedPrecision:
    @pytest.mark.parametrize("local_reparam", [True, False])
    @pytest.mark.parametrize("make", [_mlp, _convolutional])
    def test_autocast_gives_the_loss_and_gradients_of_single_precision(self, make, local_reparam, device):
        values, gradients = [], []
        for enabled in (True, False):
            loss = _loss(device, make, -6.0, torch.float32, local_reparam=local_reparam)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                value = seeded(loss, *smooth_data(device, NUM_DATA, torch.float32))
            assert value.dtype == torch.float32
            values.append(value.item())
            gradients.append(_gradients(loss, value))
        assert values[0] == pytest.approx(values[1], rel=0.03)
        for name, gradient in gradients[0].items():
            expected = gradients[1][name]
            assert gradient.dtype == torch.float32
            assert (gradient - expected).norm() < 0.1 * expected.norm(), name

    @pytest.mark.parametrize("make", [_mlp, _convolutional])
    def test_a_layer_under_autocast_samples_in_float32_and_is_rounded_once(self, make, device):
        outputs = []
        for enabled in (True, False):
            loss = _loss(device, make, -14.0, torch.float32)
            first = next(m for m in loss.model.network.modules() if isinstance(m, nn.Linear | nn.Conv2d))
            loss(*smooth_data(device, NUM_DATA, torch.float32))  # the guide's set-up runs the layer, too
            first.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
                seeded(loss, *smooth_data(device, NUM_DATA, torch.float32))
        assert torch.equal(outputs[0], outputs[1].bfloat16())

    def test_mixed_precision_trains_without_a_scaler(self, device):
        loss = _loss(device, log_variance=-8.0, dtype=torch.float32, kl_weight=0.01)
        x, y = smooth_data(device, NUM_DATA, torch.float32)
        optimizer = torch.optim.Adam(loss.parameters(), 0.01)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            with torch.autocast(device.type, dtype=torch.bfloat16):
                value = loss(x, y)
            value.backward()
            optimizer.step()
            losses.append(loss.elbo.terms["nll"].item())
        assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in loss.parameters())


class _Checkpointed(nn.Module):
    """A network with what has no prior in a checkpoint, or not."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.second, self.use_reentrant = nn.Linear(4, 50), nn.Linear(50, 1), use_reentrant
        self.between = nn.Sequential(nn.Tanh(), nn.Dropout(0.5), nn.LayerNorm(50))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.use_reentrant is None:
            return self.second(self.between(x))
        return self.second(checkpoint(self.between, x, use_reentrant=self.use_reentrant))


def _backward(loss: nn.Module, value: Tensor) -> dict[str, Tensor]:
    value.backward()  # the older kind of checkpoint knows no torch.autograd.grad
    return _accumulated(loss)


class _GivenWeights(_Checkpointed):
    """A network that reads its weights outside of the checkpoint."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.first(x))
        if self.use_reentrant is None:
            return self.second(x)
        weight, bias = self.second.weight, self.second.bias
        return checkpoint(F.linear, x, weight, bias, use_reentrant=self.use_reentrant)


class TestCheckpointsOfActivations:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_checkpoint_of_layers_without_a_prior_changes_nothing(self, use_reentrant, device):
        results = []
        for option in (use_reentrant, None):
            loss = _loss(device, lambda option=option: _Checkpointed(option))
            value = seeded(loss, *smooth_data(device, NUM_DATA))
            results.append((value, _gradients(loss, value)) if option is False else (value, _backward(loss, value)))
        assert_close(results[0], results[1])

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_a_checkpoint_may_be_given_weights_that_are_drawn(self, use_reentrant, device):
        results = []
        for option in (use_reentrant, None):
            loss = _loss(device, lambda option=option: _GivenWeights(option), local_reparam=False)
            value = seeded(loss, *smooth_data(device, NUM_DATA))
            results.append((value, _backward(loss, value)))
        assert_close(results[0], results[1])

    @pytest.mark.parametrize("make", [_mlp, _convolutional])
    def test_the_whole_loss_may_be_computed_again_in_the_backward_pass(self, make, device):
        results = []
        for again in (True, False):
            loss = _loss(device, make)
            loss(*smooth_data(device, NUM_DATA))
            torch.manual_seed(5)
            value = (
                checkpoint(loss, *smooth_data(device, NUM_DATA), use_reentrant=False)
                if again
                else loss(*smooth_data(device, NUM_DATA))
            )
            results.append((value, _gradients(loss, value)))
        assert_close(results[0], results[1])


class TestCompilation:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    def test_a_pruned_network_compiles_to_the_same_outputs(self, backend, compiled, device):
        loss = _loss(device)
        pruned = svd.prune(loss.model.network, loss.guide, svd.sparsify(loss.guide))
        x, _ = smooth_data(device, NUM_DATA)
        assert_close(compiled(copy.deepcopy(pruned), backend=backend)(x), pruned(x))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What each process has after a step, by log variance; the second is a fresh interpreter that runs this file."""
    folder = tmp_path_factory.mktemp("processes")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", __file__, str(folder)]
    other = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2], env=environment)
    threads = torch.get_num_threads()
    try:
        _work(folder, rank=0)
        _, errors = other.communicate(timeout=60)
    finally:
        other.kill()
        torch.set_num_threads(threads)
    assert other.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


class TestTwoProcesses:
    def test_two_processes_have_the_gradients_of_one_on_the_joint_batch(self, two_processes):
        loss = _loss(torch.device("cpu"), log_variance=NO_NOISE)
        expected = _gradients(loss, loss(*smooth_data(torch.device("cpu"), NUM_DATA)))
        for found in two_processes:
            assert_close(found[NO_NOISE]["gradients"], expected)

    def test_two_processes_have_their_own_noise_and_the_mean_gradient(self, two_processes):
        loss = _loss(torch.device("cpu"), log_variance=NOISE)
        single = [_gradients(loss, seeded(loss, *_part(rank), seed=rank)) for rank in range(WORLD)]
        expected = {name: (gradient + single[1][name]) / WORLD for name, gradient in single[0].items()}
        for found in two_processes:
            assert_close(found[NOISE]["gradients"], expected)

    @pytest.mark.parametrize("log_variance", [NO_NOISE, NOISE])
    def test_two_processes_stay_equal(self, log_variance, two_processes):
        first, second = (found[log_variance]["state"] for found in two_processes)
        assert_close(first, second, tolerance=0)
        start = state_of(_loss(torch.device("cpu"), log_variance=log_variance))
        assert all(not torch.equal(first[name], value) for name, value in start.items())


def _part(rank: int) -> tuple[Tensor, Tensor]:
    size = NUM_DATA // WORLD
    x, y = smooth_data(torch.device("cpu"), NUM_DATA)
    return x[rank * size : (rank + 1) * size], y[rank * size : (rank + 1) * size]


def _work(folder: Path, rank: int) -> None:
    """What one process does: two steps of gradient descent with the gradients of both."""
    torch.set_num_threads(1)
    rendezvous, wait = f"file://{folder}/rendezvous", timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=rendezvous, timeout=wait, rank=rank, world_size=WORLD)
    try:
        found = {log_variance: _two_steps(rank, log_variance) for log_variance in (NO_NOISE, NOISE)}
    finally:
        distributed.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")


def _two_steps(rank: int, log_variance: float) -> dict[str, Any]:
    loss = _loss(torch.device("cpu"), log_variance=log_variance)
    parallel = nn.parallel.DistributedDataParallel(loss)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.001)
    seeded(parallel, *_part(rank), seed=rank).backward()
    gradients = _accumulated(loss)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        parallel(*_part(rank)).backward()
    return {"gradients": gradients, "state": state_of(loss)}


if __name__ == "__main__":
    _work(Path(sys.argv[1]), rank=1)
