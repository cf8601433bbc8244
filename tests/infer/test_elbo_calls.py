"""The loss: its terms, weights and particles, the ways to call it, and the parameters that it trains."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.poutine.messenger import Messenger

from checks import assert_close, differentiable_loss, seeded, stored_values, values_of
from problems import (
    F64,
    NUM_DATA,
    HandMadeRecurrent,
    function_twin,
    model_and_guide,
    model_and_guide_of,
    normal_likelihood,
    regression_data,
    small_network,
)
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseVD_ELBO, bayesianize


class TestTermsWeightsParticles:
    @pytest.mark.parametrize("kl_weight", [0.0, 0.3, 1.0, 7.0])
    @pytest.mark.parametrize("kl", ["approximate", "exact", "monte_carlo"])
    def test_the_loss_is_the_sum_of_its_detached_terms(self, kl, kl_weight, device):
        model, guide = model_and_guide(device)
        elbo = SparseVD_ELBO(kl, kl_weight)
        loss = elbo(model, guide)(*regression_data(device))
        assert elbo.terms.keys() == {"nll", "kl"}
        assert not any(term.requires_grad for term in elbo.terms.values())
        assert all(term.shape == () for term in elbo.terms.values())
        assert_close(loss.detach(), elbo.terms["nll"] + kl_weight * elbo.terms["kl"], 0.0)

    def test_the_weight_of_the_divergence_may_change_at_every_step(self, device):
        model, guide = model_and_guide(device)
        elbo = SparseVD_ELBO()
        for weight in (0, 0.25, 1):
            elbo.kl_weight = weight
            loss = seeded(differentiable_loss, elbo, model, guide, *regression_data(device))
            assert_close(loss.detach(), elbo.terms["nll"] + weight * elbo.terms["kl"], 0.0)
        assert elbo.kl_weight == 1

    def test_the_weight_of_the_divergence_scales_its_gradient(self, device):
        model, guide = model_and_guide(device)
        parameters = list(guide.parameters())
        gradients = []
        for weight in (0.0, 1.0, 3.0):
            loss = seeded(differentiable_loss, SparseVD_ELBO(kl_weight=weight), model, guide, *regression_data(device))
            gradients.append(torch.autograd.grad(loss, parameters))
        none, one, three = gradients
        assert_close([n + 3 * (o - n) for n, o in zip(none, one, strict=True)], list(three))

    def test_all_latents_share_the_weight_of_the_divergence(self, device):
        twin = function_twin(device)
        elbo = SparseVD_ELBO(kl_weight=0.0)
        loss = elbo.loss(twin.model, twin.guide)
        assert loss == elbo.terms["nll"]
        assert elbo.terms["kl"] > 0

    @pytest.mark.parametrize("num_particles", [2, 5])
    @pytest.mark.parametrize("local_reparam", [True, False])
    def test_particles_are_averaged(self, num_particles, local_reparam, device):
        model, guide = model_and_guide(device)
        one = SparseVD_ELBO(local_reparam=local_reparam)
        many = SparseVD_ELBO(local_reparam=local_reparam, num_particles=num_particles)
        parameters = list(guide.parameters())
        guide(*regression_data(device))
        pyro.set_rng_seed(5)
        losses, terms = [], []
        for _ in range(num_particles):
            losses.append(differentiable_loss(one, model, guide, *regression_data(device)))
            terms.append(one.terms)
        gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters)
        loss = seeded(differentiable_loss, many, model, guide, *regression_data(device))
        assert_close(loss, torch.stack(losses).mean())
        assert_close(torch.autograd.grad(loss, parameters), gradients)
        for name in ("nll", "kl"):
            assert_close(many.terms[name], torch.stack([t[name] for t in terms]).mean())


class _Names(Messenger):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _pyro_sample(self, msg: Any) -> None:
        self.names.append(msg["name"])


class TestEntryPoints:
    def test_every_entry_point_gives_the_same_number_from_the_same_seed(self, device):
        model, guide = model_and_guide(device)
        elbo = SparseVD_ELBO()
        data = regression_data(device)
        guide(*data)
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo)
        losses = [
            seeded(elbo.loss, model, guide, *data),
            seeded(elbo.differentiable_loss, model, guide, *data).item(),
            seeded(elbo.loss_and_grads, model, guide, *data),
            seeded(elbo(model, guide), *data).item(),
            seeded(svi.evaluate_loss, *data),
            seeded(svi.step, *data),
        ]
        assert all(isinstance(loss, float) for loss in losses)
        assert losses == [losses[0]] * len(losses)

    @pytest.mark.parametrize("kl", ["approximate", "exact", "monte_carlo"])
    @pytest.mark.parametrize("local_reparam", [True, False])
    @pytest.mark.parametrize("prior", [LogUniform(), LogUniform(1e-9, 99.0), dist.Normal(0.0, 1.0)], ids=str)
    def test_handlers_that_look_on_change_neither_loss_nor_gradients(self, prior, local_reparam, kl, device):
        model, guide = model_and_guide(device, prior=prior)
        loss = SparseVD_ELBO(kl=kl, local_reparam=local_reparam)(model, guide)
        x, y = regression_data(device)
        alone = seeded(loss, x, y)
        gradients = torch.autograd.grad(alone, list(loss.parameters()))
        with _Names() as seen:
            watched = seeded(loss, x, y)
        assert seen.names == ["0.weight", "2.weight", "0.weight", "2.weight", "data", "y"]
        assert_close(watched, alone)
        assert_close(torch.autograd.grad(watched, list(loss.parameters())), gradients)

    def test_loss_builds_no_graph_and_leaves_gradients_alone(self, device):
        model, guide = model_and_guide(device)
        elbo = SparseVD_ELBO()
        elbo.loss(model, guide, *regression_data(device))
        assert all(p.grad is None for p in [*model.parameters(), *guide.parameters()])
        assert torch.is_grad_enabled()

    def test_loss_and_grads_adds_the_gradients_of_the_differentiable_loss(self, device):
        model, guide = model_and_guide(device)
        elbo = SparseVD_ELBO()
        guide(*regression_data(device))
        parameters = [*model.parameters(), *guide.parameters()]
        expected = torch.autograd.grad(
            seeded(differentiable_loss, elbo, model, guide, *regression_data(device)), parameters
        )
        for times in (1, 2):
            seeded(elbo.loss_and_grads, model, guide, *regression_data(device))
            assert_close([p.grad for p in parameters], [times * g for g in expected])

    def test_svi_and_a_torch_optimizer_take_the_same_step(self, device):
        states = []
        for way in ("svi", "torch"):
            pyro.clear_param_store()
            model, guide = model_and_guide(device)
            guide(*regression_data(device))
            pyro.set_rng_seed(5)
            if way == "svi":
                svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), SparseVD_ELBO())
                for _ in range(3):
                    svi.step(*regression_data(device))
            else:
                loss = SparseVD_ELBO()(model, guide)
                optimizer = torch.optim.Adam(loss.parameters(), lr=0.01)
                for _ in range(3):
                    optimizer.zero_grad()
                    loss(*regression_data(device)).backward()
                    optimizer.step()
            states.append(values_of(model, guide))
        assert_close(*states)

    def test_a_torch_optimizer_lowers_the_loss(self, device):
        model, guide = model_and_guide(device, log_variance=-6.0)
        loss = SparseVD_ELBO(kl_weight=0.01)(model, guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            value = loss(*regression_data(device))
            value.backward()
            optimizer.step()
            losses.append(value.item())
        assert sum(losses[-10:]) < 0.5 * sum(losses[:10])

    def test_one_loss_serves_two_models_in_turn(self, device):
        elbo = SparseVD_ELBO()
        pairs = [model_and_guide(device), model_and_guide_of(HandMadeRecurrent, device)]
        for model, guide in pairs:
            elbo.loss(model, guide, *regression_data(device))
        for model, guide in pairs:
            own = SparseVD_ELBO()
            own.loss(model, guide, *regression_data(device))
            value = seeded(differentiable_loss, elbo, model, guide, *regression_data(device))
            assert_close(value, seeded(differentiable_loss, own, model, guide, *regression_data(device)))

    def test_a_short_last_batch_is_scaled_to_the_whole_data_set(self, device):
        model, guide = model_and_guide(device, log_variance=-70.0)
        x, y = regression_data(device, NUM_DATA)
        elbo = SparseVD_ELBO()
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), elbo)
        net = small_network(device)
        for batch in (slice(0, 8), slice(8, 16), slice(16, 20), slice(0, 1)):
            svi.step(x[batch], y[batch])
            log_likelihood = normal_likelihood(net(x[batch])).log_prob(y[batch]).mean()
            assert_close(elbo.terms["nll"], -NUM_DATA * log_likelihood.detach(), 1e-9)


class TestParameters:
    def test_parameters_of_a_loss_module_are_those_of_model_and_guide(self, device):
        model, guide = model_and_guide(device)
        loss = SparseVD_ELBO()(model, guide)
        assert {id(p) for p in loss.parameters()} == {id(p) for p in [*model.parameters(), *guide.parameters()]}

    def test_a_copied_loss_module_trains_apart(self, device):
        model, guide = model_and_guide(device)
        loss = SparseVD_ELBO()(model, guide)
        loss(*regression_data(device))
        new = copy.deepcopy(loss)
        assert new.guide._model[0] is new.model
        before = values_of(loss)
        optimizer = torch.optim.SGD(new.parameters(), lr=1e-3)
        new(*regression_data(device)).backward()
        optimizer.step()
        assert_close(values_of(loss), before, 0.0)
        assert_close(seeded(loss, *regression_data(device)), seeded(loss, *regression_data(device)), 0.0)

    def test_frozen_guide_parameters_are_left_out(self, device):
        model, guide = model_and_guide(device)
        for p in guide.log_variances.parameters():
            p.requires_grad_(False)
        loss = SparseVD_ELBO()(model, guide)
        loss(*regression_data(device)).backward()
        assert all(p.grad is None for p in guide.log_variances.parameters())
        assert all(p.grad.any() for p in guide.locs.parameters())

    def test_a_loss_without_trainable_parameters_is_only_a_number(self, device):
        model, guide = model_and_guide(device)
        for p in [*model.parameters(), *guide.parameters()]:
            p.requires_grad_(False)
        assert math.isfinite(SparseVD_ELBO().loss_and_grads(model, guide, *regression_data(device)))

    def test_a_parameter_of_a_prior_receives_the_gradient_of_the_divergence(self, device):
        zeros = torch.zeros(3, dtype=F64, device=device)
        scale = torch.tensor(2.0, dtype=F64, device=device, requires_grad=True)

        def model():
            pyro.sample("w", dist.Normal(zeros, scale).to_event(1))

        guide = AutoSparseNormal(model, init_log_variance=-1.0)
        gradient = torch.autograd.grad(differentiable_loss(SparseVD_ELBO(), model, guide), scale)[0]
        q = guide.posteriors["w"]
        expected = (1 / scale - (q.variance + q.loc**2) / scale**3).sum()
        assert_close(gradient, expected.detach())


def _function_of_a_network(device: torch.device) -> tuple[Callable, AutoSparseNormal]:
    network = bayesianize(small_network(device))

    def model(x, y):
        scale = pyro.param("scale", torch.ones((), dtype=F64, device=device), dist.constraints.positive)
        output = network(x).squeeze(-1)
        with pyro.plate("data", NUM_DATA, subsample=x):
            pyro.sample("y", dist.Normal(output, scale), obs=y)

    return model, AutoSparseNormal(model)


class TestParametersThatNobodyTrains:
    def test_parameters_that_a_loss_module_lacks_are_named_in_one_warning(self, device):
        model, guide = _function_of_a_network(device)
        loss = SparseVD_ELBO()(model, guide)
        with pytest.warns(UserWarning, match=r"the loss depends on these") as found:
            loss(*regression_data(device))
        loss(*regression_data(device))  # a warning would be an error
        message = str(found[0].message)
        assert set(message.split(":")[0].split(", ")) == {"0.bias", "2.bias", "scale"}
        assert "torch module" in message

    def test_svi_trains_them_without_a_warning(self, device):
        model, guide = _function_of_a_network(device)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), SparseVD_ELBO())
        svi.step(*regression_data(device))
        before = stored_values()
        svi.step(*regression_data(device))
        assert all(not torch.equal(value, before[name]) for name, value in stored_values().items())

    def test_a_plain_network_that_svi_does_not_see_is_one_warning(self, device):
        plain = small_network(device)

        def model(x, y):
            w = pyro.sample("w", dist.Normal(torch.zeros((), dtype=F64, device=device), 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(w * plain(x).squeeze(-1), 1.0), obs=y)

        svi = SVI(model, AutoSparseNormal(model), pyro.optim.Adam({"lr": 0.1}), SparseVD_ELBO())
        with pytest.warns(UserWarning, match=r"^one of shape .* one of shape \(3, 4\): the loss .*pyro\.module"):
            svi.step(*regression_data(device))
        svi.step(*regression_data(device))  # a warning would be an error
