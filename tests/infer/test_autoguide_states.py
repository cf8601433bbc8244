"""The guide: when its parameters exist, and how they are saved and loaded."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from torch import nn

from checks import same_values, seeded, state_of, take_steps
from problems import (
    CASES,
    F64,
    NUM_DATA,
    POSTERIORS,
    Case,
    function_case,
    module_case,
    module_with_function_case,
    precise_likelihood,
    regression_data,
    small_model,
    small_network,
)
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseNormal, Supervised, bayesianize


def _classification_case(device: torch.device) -> Case:
    torch.manual_seed(1)
    bnn = bayesianize(nn.Linear(4, 3).to(device).double())
    model = Supervised(bnn, lambda output: dist.Categorical(logits=output), NUM_DATA)
    x, y = regression_data(device)
    return Case(model, (x, (y > 0).double()), ("weight",), ("weight",))


class TestParameters:
    @pytest.mark.parametrize(
        "make",
        [lambda device: small_model(device, precise_likelihood), lambda device: bayesianize(small_network(device))],
        ids=["model", "network"],
    )
    def test_parameters_of_a_network_exist_right_after_construction(self, make, device):
        guide = AutoSparseNormal(make(device))
        assert {name: p.shape for name, p in guide.named_parameters()} == {
            f"{kind}.{name}_unconstrained": shape
            for kind in ("locs", "log_variances")
            for name, shape in (("0.weight", (3, 4)), ("2.weight", (1, 3)))
        }
        assert guide.sparse_sites == ("0.weight", "2.weight")

    def test_parameters_of_a_function_exist_after_the_first_call(self, device):
        case = function_case(device)
        guide = AutoSparseNormal(case.model)
        assert list(guide.parameters()) == []
        assert guide.posteriors == {}
        guide(*case.data)
        assert len(list(guide.parameters())) == 2 * len(case.sites)
        assert set(guide.posteriors) == set(case.sites)

    def test_parameters_made_early_and_late_live_side_by_side(self, device):
        case = module_with_function_case(device)
        guide = AutoSparseNormal(case.model)
        assert set(guide.posteriors) == {"w"}
        early = guide.posteriors["w"].loc
        guide(*case.data)
        assert set(guide.posteriors) == set(case.sites)
        assert guide.posteriors["w"].loc is early

    def test_num_parameters_counts_latents_and_the_parameters_of_the_model(self, device):
        assert AutoSparseNormal(small_model(device, precise_likelihood)).num_parameters == 3 * 4 + 3 + 3 + 1


class TestPosteriors:
    @pytest.mark.parametrize("make", CASES)
    def test_sparse_sites_are_those_with_a_log_uniform_prior(self, make, device):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        guide(*case.data)
        assert guide.sparse_sites == case.sparse

    def test_sparse_sites_of_a_function_are_unknown_before_the_first_call(self, device):
        with pytest.raises(RuntimeError, match="not known yet; call the guide once"):
            _ = AutoSparseNormal(function_case(device).model).sparse_sites

    def test_sites_with_another_prior_are_not_sparse(self, device):
        model = small_model(
            device, precise_likelihood, prior={"0.*": dist.Normal(0.0, 1.0), "*": LogUniform(1e-4, 1.0)}
        )
        assert AutoSparseNormal(model).sparse_sites == ("2.weight",)

    @pytest.mark.parametrize("make", CASES)
    def test_posteriors_are_the_normals_that_the_guide_samples(self, make, device):
        case = make(device)
        guide = AutoSparseNormal(case.model, init_log_variance=-1.0)
        guide(*case.data)
        values = seeded(guide, *case.data)
        torch.manual_seed(5)
        for name in case.sites:
            q = guide.posteriors[name]
            assert isinstance(q, SparseNormal)
            z = q.rsample()
            is_positive = name in ("net.scale", "scale")
            torch.testing.assert_close(values[name], z.exp() if is_positive else z)


CLASSIFICATION = pytest.param(_classification_case, id="classification")


def _trained(case: Case) -> AutoSparseNormal:
    guide = case.guide()
    guide(*case.data)
    with torch.no_grad():
        for p in guide.parameters():
            p.copy_(0.5 * torch.randn_like(p))
    return guide


@pytest.mark.parametrize("make", [*POSTERIORS, CLASSIFICATION])
class TestLoading:
    def test_a_fresh_guide_takes_a_state_without_data(self, make, device):
        guide, fresh = _trained(make(device)), make(device).guide()
        assert str(fresh.load_state_dict(guide.state_dict())) == "<All keys matched successfully>"
        assert same_values(fresh.state_dict(), guide.state_dict())
        assert fresh.posteriors.keys() == guide.posteriors.keys()
        for name, q in guide.posteriors.items():
            assert torch.equal(fresh.posteriors[name].loc, q.loc)
            assert torch.equal(fresh.posteriors[name].log_variance, q.log_variance)
        addresses = {p.data_ptr() for p in [*fresh.parameters(), *guide.parameters()]}
        assert len(addresses) == 2 * len(list(guide.parameters()))

    def test_samples_are_equal(self, make, device):
        case, other = make(device), make(device)
        guide, fresh = _trained(case), other.guide()
        fresh.load_state_dict(guide.state_dict())
        fresh(*other.data)
        assert same_values(seeded(fresh, *case.data), seeded(guide, *case.data))

    def test_the_state_of_a_module_around_it_and_a_guide_in_use_load_too(self, make, device):
        case = make(device)
        guide, fresh, used = _trained(case), make(device).guide(), _trained(make(device))
        nn.ModuleDict({"guide": fresh}).load_state_dict(nn.ModuleDict({"guide": guide}).state_dict())
        used.load_state_dict(guide.state_dict())
        for other in (fresh, used):
            assert same_values(other.state_dict(), guide.state_dict())
        assert same_values(seeded(used, *case.data), seeded(guide, *case.data))


@pytest.mark.parametrize("make", [*CASES, CLASSIFICATION])
class TestAfterLoading:
    def test_predictions_with_targets_seen_before_are_equal(self, make, device, improper):
        case, other = make(device), make(device)
        guide, fresh = _trained(case), other.guide()
        fresh.load_state_dict(guide.state_dict())
        fresh(*case.data)
        x, _ = case.data
        predictions = [
            seeded(Predictive(m, guide=g, num_samples=3), x) for m, g in ((case.model, guide), (other.model, fresh))
        ]
        assert same_values(*predictions)

    def test_predictions_without_targets_come_first_and_are_equal(self, make, device, improper):
        case, other = make(device), make(device)
        guide, fresh = _trained(case), other.guide()
        fresh.load_state_dict(guide.state_dict())
        x, _ = case.data
        predictions = [
            seeded(Predictive(m, guide=g, num_samples=3), x) for m, g in ((other.model, fresh), (case.model, guide))
        ]
        assert predictions[0].keys() == predictions[1].keys()
        assert {name: v.shape for name, v in predictions[0].items()} == {
            name: v.shape for name, v in predictions[1].items()
        }
        assert same_values(seeded(fresh, x), seeded(guide, x))

    def test_training_goes_on_from_the_state(self, make, device):
        case = make(device)
        guide, fresh = _trained(case), AutoSparseNormal(case.model)
        fresh.load_state_dict(guide.state_dict())
        before = state_of(fresh)
        take_steps(case.model, fresh, case.data, steps=1)
        after = state_of(fresh)
        assert before.keys() == after.keys()
        for name in before:
            # One step of Adam moves every number by its learning rate.
            torch.testing.assert_close((after[name] - before[name]).abs(), torch.full_like(before[name], 0.05))


def test_loading_follows_the_dtype_and_device_of_the_guide(device):
    guide = AutoSparseNormal(small_model(device, precise_likelihood))
    state = {name: value.float() for name, value in guide.state_dict().items()}
    fresh = AutoSparseNormal(small_model(device, precise_likelihood))
    fresh.load_state_dict(state)
    assert {p.dtype for p in fresh.parameters()} == {F64}


class TestWrongStates:
    def test_a_state_of_another_shape_is_an_error_that_names_the_site(self, device):
        state = AutoSparseNormal(small_model(device, precise_likelihood)).state_dict()
        other = AutoSparseNormal(small_model(device, precise_likelihood, width=5))

        def load_and_use():
            other.load_state_dict(state)
            other(*regression_data(device))

        with pytest.raises((RuntimeError, ValueError), match=r"0\.weight.*\(?\[?3, 4.*\(?\[?5, 4"):
            load_and_use()

    @pytest.mark.parametrize("make", [function_case, module_case], ids=["function", "module"])
    def test_a_state_of_another_model_is_an_error_that_names_its_sites(self, make, device):
        donor = AutoSparseNormal(lambda: pyro.sample("stranger", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
        donor()
        case = make(device)
        guide = AutoSparseNormal(case.model)

        def load_and_use():
            guide.load_state_dict(donor.state_dict())
            guide(*case.data)

        with pytest.raises((RuntimeError, ValueError), match=r"stranger|0\.weight"):
            load_and_use()

    def test_a_state_that_is_refused_leaves_the_guide_usable(self, device):
        donor = AutoSparseNormal(lambda: pyro.sample("stranger", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
        donor()
        case = module_case(device)
        guide = AutoSparseNormal(case.model)
        before = state_of(guide)
        with pytest.raises(RuntimeError, match=r"0\.weight"):
            guide.load_state_dict(donor.state_dict())
        assert same_values(guide.state_dict(), before)
        assert set(guide(*case.data)) == set(case.sites)

    def test_a_guide_with_a_wrong_state_fails_at_every_call(self, device):
        wrong = AutoSparseNormal(small_model(device, precise_likelihood, width=5)).state_dict()
        guide = AutoSparseNormal(small_model(device, precise_likelihood))

        def load_and_use():
            guide.load_state_dict(wrong)
            guide(*regression_data(device))

        for _ in range(2):
            with pytest.raises((RuntimeError, ValueError), match=r"0\.weight"):
                load_and_use()

    def test_a_function_guide_with_a_wrong_state_fails_at_every_call(self):
        def model(size):
            pyro.sample("other", dist.Normal(0.0, 1.0))
            pyro.sample("w", dist.Normal(torch.zeros(size), 1.0).to_event(1))

        donor, guide = AutoSparseNormal(model), AutoSparseNormal(model)
        donor(3)
        guide.load_state_dict(donor.state_dict())
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"^w: the state loaded is of shape \(3,\), but the model's site needs \(4,\)"
            ):
                guide(4)

    def test_the_right_state_loads_after_a_wrong_one(self, device):
        right = AutoSparseNormal(small_model(device, precise_likelihood)).state_dict()
        wrong = AutoSparseNormal(small_model(device, precise_likelihood, width=5)).state_dict()
        guide = AutoSparseNormal(small_model(device, precise_likelihood))
        with pytest.raises((RuntimeError, ValueError), match=r"0\.weight"):
            guide.load_state_dict(wrong) and guide(*regression_data(device))
        guide.load_state_dict(right)
        guide(*regression_data(device))
        assert same_values(guide.state_dict(), right)

    def test_a_state_that_does_not_fit_leaves_the_one_that_was_loaded(self, device):
        case = function_case(device)
        trained = AutoSparseNormal(case.model)
        trained(*case.data)
        good = trained.state_dict()
        guide = AutoSparseNormal(case.model)
        guide.load_state_dict(good)
        bad = {
            name: value if name.startswith("locs") else value[..., None].expand(*value.shape, 2)
            for name, value in good.items()
        }
        with pytest.raises(RuntimeError):
            guide.load_state_dict(bad)
        assert guide.posteriors.keys() == trained.posteriors.keys()
