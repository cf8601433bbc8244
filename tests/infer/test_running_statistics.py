"""Running statistics: a step that fails leaves them as they were, and a pass that starts again counts once."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import Tensor, nn

import pyro_sparsevd as svd
from problems import loss_of, smooth_data
from pyro_sparsevd.infer.buffers import _running_buffers, unchanged_buffers_on_error


class _Overflowing(nn.Module):
    """Its second layer computes infinities from finite numbers that are large enough."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 1)
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(3)])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norms[1](self.first(self.norms[0](x)) * x.abs().max().exp()))


class _SometimesTwice(nn.Module):
    """It calls its layer twice where its inputs are positive."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.last = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(self.norm(x))
        return self.last(self.layer(hidden) if x.min() > 0 else hidden)


def _unchecked(output: Tensor) -> dist.Normal:
    return dist.Normal(output.squeeze(-1), 0.5, validate_args=False)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


class TestFailedSteps:
    @pytest.mark.parametrize("trained_before", [True, False])
    @pytest.mark.parametrize("num_particles", [1, 3])
    @pytest.mark.parametrize("way", ["svi", "loss"])
    def test_a_loss_that_is_not_finite_leaves_running_statistics_alone(
        self, way, num_particles, trained_before, device
    ):
        loss = loss_of(_Overflowing, device, _unchecked, num_particles=num_particles)
        x, y = smooth_data(device)
        step = loss
        if way == "svi":
            step = SVI(loss.model, loss.guide, pyro.optim.Adam({"lr": 0.01}), loss.elbo).step
        if trained_before:
            step(x, y)
        before = _buffers(loss.model)
        with pytest.raises(ValueError, match=r"^loss: expected a finite number, but got nll (nan|inf)"):
            step(1e3 * x, y)
        torch.testing.assert_close(_buffers(loss.model), before, rtol=0, atol=0)
        step(x, y)
        assert loss.model.network.norms[0].num_batches_tracked == num_particles * (1 + trained_before)
        assert all(buffer.isfinite().all() for buffer in loss.model.buffers())

    def test_an_error_of_the_model_leaves_running_statistics_alone(self, device):
        class Failing(nn.Sequential):
            fails = False

            def forward(self, x: Tensor) -> Tensor:
                output = super().forward(x)
                if self.fails:
                    raise KeyError("mine")
                return output

        loss = loss_of(lambda: Failing(nn.BatchNorm1d(4), nn.Linear(4, 1)), device, _unchecked)
        loss(*smooth_data(device))
        before = _buffers(loss.model)
        loss.model.network.fails = True
        with pytest.raises(KeyError, match="mine"):
            loss(*smooth_data(device))
        torch.testing.assert_close(_buffers(loss.model), before, rtol=0, atol=0)

    def test_without_the_check_statistics_are_those_of_the_pass(self, device):
        loss = loss_of(_Overflowing, device, _unchecked, check_finite=False)
        x, y = smooth_data(device)
        assert not math.isfinite(loss(1e3 * x, y).item())
        assert loss.model.network.norms[0].num_batches_tracked == 1

    @pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
    def test_what_weights_were_is_not_kept_a_second_time(self, error, device):
        net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).to(device)
        net[2].register_buffer("weight_initial", torch.zeros(2, device=device))
        bnn = svd.bayesianize(net)
        initial, buffers = bnn[0].weight, list(bnn[1].buffers())

        @unchanged_buffers_on_error(bnn, with_frozen=False)
        def fail() -> None:
            for changed in (initial, bnn[2].weight_initial, *buffers):
                changed.fill_(7)
            raise error

        with pytest.raises(error):
            fail()
        assert (initial == 7).all()
        assert all((buffer != 7).all() for buffer in (bnn[2].weight_initial, *buffers))


class _Reassigning(nn.Module):
    """Puts new tensors in the place of its buffers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        output = self.linear(x)
        self.mean = 0.9 * self.mean + 0.1 * output.detach().mean(0)
        return output


class _Momentum(nn.Module):
    """A frozen copy of its layer follows that by momentum, whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.follower = nn.Linear(4, 4, bias=False).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.follower.weight.lerp_(torch.ones_like(self.follower.weight), 0.25)
        return (self.layer(x).tanh() + self.layer(self.follower(x))).sum(-1)


class TestPassesThatStartAgain:
    @pytest.mark.parametrize("once_before", [0, 1, 4])
    def test_a_layer_first_called_twice_in_a_later_step_counts_once(self, once_before, device):
        loss, expected = (loss_of(_SometimesTwice, device, _unchecked, local_reparam=local) for local in (True, False))
        x, y = smooth_data(device)
        for each in (loss, expected):
            for _ in range(once_before):
                each(x, y)
            each(x.abs() + 0.1, y)
        assert loss.elbo._sampled_sites == {"layer.weight"}
        assert loss.model.network.norm.num_batches_tracked == once_before + 1
        torch.testing.assert_close(*(_buffers(each.model.network.norm) for each in (loss, expected)))

    def test_buffers_of_modules_that_are_met_again_are_kept_once(self, device):
        shared = nn.BatchNorm1d(3)
        net = nn.Sequential(*[nn.Sequential(shared, shared)] * 5).to(device)
        shared.add_module("owner", net)  # a circle
        assert len(_running_buffers(net, with_frozen=False)) == 3

    @pytest.mark.parametrize("bad", [False, True])
    def test_reassigned_buffers_are_left_alone_by_set_up_and_by_errors(self, bad, device):
        torch.manual_seed(0)
        bnn = svd.bayesianize(_Reassigning().to(device))
        model = svd.Supervised(bnn, lambda out: dist.Normal(out.squeeze(-1), 1.0), 20)
        guide, x, y = svd.AutoSparseNormal(model), torch.ones(4, 3, device=device), torch.ones(4, device=device)
        if bad:
            with torch.no_grad():
                bnn.linear.bias.fill_(torch.nan)
            with pytest.raises(ValueError, match=r"linear\.bias: expected finite numbers"):
                svd.SparseVD_ELBO()(model, guide)(x, y)
        else:
            guide(x, y)
        assert bnn.mean.item() == 0
        bnn.double()
        assert bnn.mean.dtype == torch.float64

    @pytest.mark.parametrize("local_reparam", [True, False])
    def test_frozen_parameters_change_once_in_a_step(self, device, local_reparam):
        net = _Momentum()
        before = net.follower.weight.double().to(device)
        loss = loss_of(lambda: net, device, _unchecked, local_reparam=local_reparam)
        loss(*smooth_data(device)).backward()
        torch.testing.assert_close(_follower(loss), before.lerp(torch.ones_like(before), 0.25))


def _follower(loss: Any) -> Tensor:
    return next(p for name, p in loss.named_parameters() if name.endswith("follower.weight"))
