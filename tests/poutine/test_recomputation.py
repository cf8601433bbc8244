"""Checkpoints of activations: layers computed again in the backward pass have the weights that they had, or say so."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyro_sparsevd as svd
from problems import loss_of, smooth_data

again = partial(checkpoint, use_reentrant=False)
with_contexts = partial(checkpoint, use_reentrant=False, context_fn=svd.recompute_contexts)


def plainly(function: Callable, *args: Any) -> Any:
    return function(*args)


class _Network(nn.Module):
    """Its second layer, and a dropout after it, are computed again."""

    def __init__(self, run: Callable) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 130), nn.Linear(130, 130), nn.Linear(130, 1)
        self.dropout, self.run = nn.Dropout(0.3), run

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.run(self.block, torch.tanh(self.first(x))))

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dropout(self.second(x)))


class _Given(_Network):
    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.third(self.run(self.block_of, x, self.second.weight, self.second.bias))

    def block_of(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(self.dropout(F.linear(x, weight, bias)))


class _Convolutions(_Given):
    def __init__(self, run: Callable) -> None:
        super().__init__(run)
        self.first, self.second = nn.Conv2d(1, 6, 2, padding=1), nn.Conv2d(6, 6, 2)
        self.third = nn.Sequential(nn.Flatten(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, 1, 2, 2))

    def block_of(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(self.dropout(F.conv2d(x, weight, bias)))


class _Inside(_Network):
    """Its weights are read within the block, past the call of their layer."""

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.second.weight, self.second.bias))


class _Bilinear(_Network):
    """A weight that is drawn within the block where it is not excluded."""

    def __init__(self, run: Callable) -> None:
        super().__init__(run)
        self.second, self.third = nn.Bilinear(130, 130, 3), nn.Linear(3, 1)

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dropout(self.second(x, x)))


class _GivenToBilinear(_Given):
    def __init__(self, run: Callable) -> None:
        super().__init__(run)
        self.second, self.third = nn.Bilinear(130, 130, 3), nn.Linear(3, 1)

    def block_of(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.bilinear(x, x, weight, bias)


def _loss(device: torch.device, make: Callable[[Callable], nn.Module], run: Callable, **options: Any) -> Any:
    return loss_of(lambda: make(run), device, **options)


def _gradients(loss: Any, device: torch.device, times: int = 1) -> list[Tensor]:
    torch.manual_seed(5)
    value = loss(*smooth_data(device, 9))
    for _ in range(times):
        value.backward(retain_graph=True)
    return [value.detach(), *(p.grad for p in loss.parameters())]


class _GivenToMatmul(_Given):
    """A weight that no linear operation meets, in a block that consumes random numbers after it."""

    def block_of(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(self.dropout(x @ weight.T + bias))


class TestWeights:
    @pytest.mark.parametrize("options", [{}, {"local_reparam": False}, {"num_particles": 3}, {"kl": "exact"}], ids=str)
    @pytest.mark.parametrize(
        ("make", "run"),
        [(_Given, again), (_Convolutions, again), (_Network, with_contexts), (_Given, with_contexts)],
        ids=["given", "convolution", "contexts", "both"],
    )
    def test_gradients_are_those_of_one_forward_pass(self, make, run, options, device):
        for times in (1, 2):
            loss, expected = (_loss(device, make, r, **options) for r in (run, plainly))
            torch.testing.assert_close(
                _gradients(loss, device, times), _gradients(expected, device, times), rtol=1e-12, atol=1e-12
            )

    @pytest.mark.parametrize("local_reparam", [True, False])
    def test_drawn_weights_may_be_in_a_checkpoint_with_contexts(self, local_reparam, device):
        losses = [_loss(device, _Bilinear, run, local_reparam=local_reparam) for run in (with_contexts, plainly)]
        torch.testing.assert_close(*(_gradients(loss, device) for loss in losses), rtol=1e-12, atol=1e-12)

    def test_two_losses_before_their_backward_pass_keep_their_own_weights(self, device):
        results = []
        for run in (with_contexts, plainly):
            loss = _loss(device, _Network, run)
            torch.manual_seed(5)
            (loss(*smooth_data(device, 9)) + loss(*smooth_data(device, 9))).backward()
            results.append([p.grad for p in loss.parameters()])
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("make", [_Given, _GivenToBilinear, _GivenToMatmul])
    def test_a_block_may_be_given_a_weight_that_it_has_sampled(self, make, use_reentrant, device):
        loss = _loss(device, make, partial(checkpoint, use_reentrant=use_reentrant))
        loss(*smooth_data(device, 9))
        results = []
        for run in (loss.model.network.run, plainly):
            loss.model.network.run = run
            loss.zero_grad()
            loss.elbo._sampled_sites.add("second.weight")  # the older kind of checkpoint records no graph of a block
            results.append(_gradients(loss, device))
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)

    def test_the_whole_loss_may_be_computed_again(self, device):
        loss, expected = (_loss(device, _Network, plainly) for _ in range(2))
        for module in (loss, expected):
            module(*smooth_data(device, 9))
        torch.manual_seed(5)
        again(loss, *smooth_data(device, 9)).backward()
        torch.testing.assert_close([p.grad for p in loss.parameters()], _gradients(expected, device)[1:])


class TestErrors:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("local_reparam", [True, False])
    @pytest.mark.parametrize("make", [_Network, _Inside])
    @pytest.mark.parametrize("way", ["loss_and_grads", "svi", "torch"])
    def test_a_weight_that_is_read_again_is_an_error_that_names_it(
        self, way, make, local_reparam, use_reentrant, device
    ):
        loss = _loss(device, make, partial(checkpoint, use_reentrant=use_reentrant), local_reparam=local_reparam)
        step = {
            "loss_and_grads": partial(loss.elbo.loss_and_grads, loss.model, loss.guide),
            "svi": SVI(loss.model, loss.guide, pyro.optim.Adam({"lr": 0.01}), loss.elbo).step,
            "torch": lambda *data: loss(*data).backward(),
        }[way]
        with pytest.raises(RuntimeError, match=r"^second\.weight: read in a backward pass.* outside of the checkpoint"):
            step(*smooth_data(device, 9))

    def test_with_contexts_a_weight_read_past_its_layer_is_an_error_by_name(self, device):
        loss = _loss(device, _Inside, with_contexts)
        with pytest.raises(RuntimeError, match=r"^second\.weight: read in a backward pass"):
            loss(*smooth_data(device, 9)).backward()
