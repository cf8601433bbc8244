"""The guide with Predictive, and how it leaves the model alone."""

import warnings

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import nn

from checks import same_values, state_of
from problems import CASES, model_with_batch_norm, module_case, regression_data, small_network
from pyro_sparsevd import AutoSparseNormal, ImproperPriorWarning, LogUniform, SparseVD_ELBO, Supervised, bayesianize


class TestModelIsLeftAlone:
    def test_setting_up_leaves_running_statistics_alone(self, device):
        model = model_with_batch_norm(device)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        guide = AutoSparseNormal(model)
        guide(*regression_data(device))
        assert same_values(dict(model.named_buffers()), before)
        assert model.network[1].training

    def test_the_first_evaluation_updates_running_statistics_once(self, device):
        model = model_with_batch_norm(device)
        SparseVD_ELBO()(model, AutoSparseNormal(model))(*regression_data(device))
        assert model.network[1].num_batches_tracked == 1

    def test_setting_up_leaves_the_parameters_of_the_model_alone(self, device):
        model = model_with_batch_norm(device)
        before = state_of(model)
        AutoSparseNormal(model)(*regression_data(device))
        assert same_values(state_of(model), before)
        assert all(p.grad is None for p in model.parameters())


class TestPredictive:
    @pytest.mark.parametrize("make", CASES)
    def test_predictive_samples_weights_of_the_guide_and_targets_of_the_model(self, make, device, improper):
        case = make(device)
        guide = AutoSparseNormal(case.model, init_log_variance=-2.0)
        guide(*case.data)
        x, _ = case.data
        samples = Predictive(case.model, guide=guide, num_samples=5, parallel=False)(x)
        assert samples.keys() == {*case.sites, "y"}
        assert samples["y"].shape == (5, 8)
        assert samples["y"].isfinite().all()
        assert samples["y"].std(0).all()
        for name in case.sites:
            q = guide.posteriors[name]
            assert samples[name].shape[0] == 5
            assert samples[name].numel() == 5 * q.loc.numel()
            assert samples[name].reshape(5, -1).std(0).all()

    def test_predictive_warns_of_the_improper_prior_once_at_most(self, device):
        case = module_case(device)
        guide = AutoSparseNormal(case.model)
        guide(*case.data)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                Predictive(case.model, guide=guide, num_samples=2)(case.data[0])
        assert {w.category for w in caught} <= {ImproperPriorWarning}
        assert len(caught) <= 1

    def test_predictions_with_posterior_samples_are_those_of_the_guide(self, device, improper):
        case = module_case(device)
        guide = AutoSparseNormal(case.model, init_log_variance=-2.0)
        guide(*case.data)
        samples = Predictive(case.model, guide=guide, num_samples=4, return_sites=["0.weight", "2.weight", "_RETURN"])(
            case.data[0]
        )
        net = small_network(device)
        for i in range(4):
            weights = {n: samples[n][i].reshape(net.get_parameter(n).shape) for n in ("0.weight", "2.weight")}
            expected = torch.func.functional_call(net, weights, case.data[0])
            torch.testing.assert_close(samples["_RETURN"][i], expected, check_device=False)

    @pytest.mark.parametrize(
        "likelihood",
        [lambda out: dist.Categorical(logits=out), lambda out: dist.Normal(out, 1.0).to_event(1)],
        ids=["classes", "numbers"],
    )
    def test_a_prediction_before_training_leaves_the_targets_open(self, likelihood, device):
        model = Supervised(bayesianize(nn.Linear(4, 3).to(device), LogUniform(1e-4, 1e2)), likelihood, 10)
        guide = AutoSparseNormal(model)
        x = torch.randn(5, 4, device=device)
        samples = Predictive(model, guide=guide, num_samples=2)(x)
        assert set(samples) == {"weight", "y"}
        assert list(guide.posteriors) == ["weight"]
        y = samples["y"][0]
        SparseVD_ELBO()(model, guide)(x, y).backward()
        with pytest.raises(ValueError, match=r"^y: expected this latent of the model in the guide"):
            SparseVD_ELBO()(model, guide)(x)
