"""Pyro's parameter store, settings and optimisers with a sparse model."""

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import Tensor

from checks import same_values, seeded, state_of, stored_names, svi_of
from problems import regression_data, small_model
from pyro_models import GUIDES, SMALL_WEIGHTS, TWO_WEIGHTS_Y, auto_sparse_normal, mixed_model, two_weights
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseVD_ELBO, Supervised

pytestmark = pytest.mark.usefixtures("double", "on_device")


def _trained_in_turns(models: list[Supervised], makes: list[Callable], turns: list[int]) -> list[dict[str, Tensor]]:
    guides = [make(model) for make, model in zip(makes, models, strict=True)]
    for guide in guides:
        seeded(guide, *regression_data())
    svis = [svi_of(model, guide, Trace_ELBO()) for model, guide in zip(models, guides, strict=True)]
    for number, turn in enumerate(turns):
        seeded(svis[turn].step, *regression_data(), seed=turns[:number].count(turn))
    assert bool(stored_names()) != pyro.settings.get("module_local_params")
    return [state_of(guide) for guide in guides]


@pytest.mark.parametrize("local", [False, True], ids=["one store", "module_local_params"])
class TestTurns:
    @pytest.mark.parametrize("second", GUIDES)
    def test_two_models_trained_in_turns_do_what_they_do_alone(self, second, local):
        def models() -> list[Supervised]:
            return [small_model(prior=LogUniform(1e-4, 10.0)), small_model(prior=dist.Normal(0.0, 1.0))]

        makes = [auto_sparse_normal, second]
        with pyro.settings.context(module_local_params=local):
            together = _trained_in_turns(models(), makes, [0, 1, 1, 0, 1, 0])
            for number in (0, 1):
                pyro.clear_param_store()
                alone = _trained_in_turns([models()[number]], [makes[number]], [0, 0, 0])[0]
                for name, value in alone.items():
                    torch.testing.assert_close(together[number][name], value)

    def test_lists_predictions_and_importance_work_with_either_setting(self, local):
        y = torch.tensor(TWO_WEIGHTS_Y)
        with pyro.settings.context(module_local_params=local):
            guide = AutoGuideList(mixed_model)
            guide.append(auto_sparse_normal(poutine.block(mixed_model, expose=["w"])))
            guide.append(AutoNormal(poutine.block(mixed_model, hide=["w"])))
            guide(y)
            before = state_of(guide)
            svi = svi_of(mixed_model, guide, rate=0.01)
            for _ in range(2):
                svi.step(y)
            assert all((value != before[name]).all() for name, value in state_of(guide).items())
            draws = Predictive(mixed_model, guide=guide, num_samples=3)(y)
            assert draws["w"].reshape(3, 3).std(0).all()
            assert all(map(math.isfinite, Importance(mixed_model, guide, num_samples=3).run(y).log_weights))
            assert (stored_names() == []) == local


class TestStore:
    @pytest.mark.parametrize("local", [False, True], ids=["one store", "module_local_params"])
    @pytest.mark.parametrize("make", GUIDES)
    def test_the_store_may_be_cleared_in_the_middle_of_training(self, make, local):
        with pyro.settings.context(module_local_params=local):
            model = small_model(prior=LogUniform(1e-4, 10.0))
            guide = make(model)
            svi_of(model, guide, Trace_ELBO()).step(*regression_data())
            parameters = [*guide.parameters(), *model.parameters()]
            before = [p.detach().clone() for p in parameters]
            pyro.clear_param_store()
            guide(*regression_data())
            svi_of(model, guide, Trace_ELBO()).step(*regression_data())
            now = [*guide.parameters(), *model.parameters()]
            assert all(new is old for new, old in zip(now, parameters, strict=True))
            for old, new in zip(before, now, strict=True):
                torch.testing.assert_close((new - old).abs(), torch.full_like(old, 0.05))  # Adam's first step

    def test_a_name_is_free_again_after_the_store_was_cleared(self):
        for _ in range(2):
            model = small_model(prior=LogUniform(1e-4, 10.0))
            guide = AutoSparseNormal(model)
            svi_of(model, guide).step(*regression_data())
            expected = [
                f"AutoSparseNormal.{kind}.{name}" for kind in ("locs", "log_variances") for name in SMALL_WEIGHTS
            ]
            assert stored_names() == sorted([*expected, "0.bias", "2.bias"])
            pyro.clear_param_store()

    @pytest.mark.parametrize("make", GUIDES)
    def test_a_scope_of_the_store_keeps_two_trainings_apart(self, make):
        store = pyro.get_param_store()
        model = small_model(prior=LogUniform(1e-4, 10.0))
        guide = make(model)
        svi = svi_of(model, guide, Trace_ELBO())
        svi.step(*regression_data())
        names, before = stored_names(), state_of(guide)
        with store.scope() as scope:
            other = small_model(prior=LogUniform(1e-4, 10.0))
            inner = make(other)
            svi_of(other, inner, Trace_ELBO()).step(*regression_data())
            assert stored_names() == names
        assert sorted(scope["params"]) == names
        assert same_values(state_of(guide), before)
        trained = state_of(inner)
        svi.step(*regression_data())
        assert stored_names() == names
        assert not same_values(state_of(guide), before)
        with store.scope(scope):
            inner(*regression_data())
            assert same_values(state_of(inner), trained)
            assert stored_names() == names

    @pytest.mark.parametrize("make", GUIDES)
    def test_a_value_written_to_the_store_is_the_guides(self, make):
        y = torch.tensor(TWO_WEIGHTS_Y)
        guide = make(two_weights)
        poutine.trace(guide).get_trace(y)
        name = f"{type(guide).__name__}.locs.a"
        pyro.get_param_store()[name] = torch.full((3,), 5.0)
        assert ((poutine.trace(guide).get_trace(y).nodes["a"]["value"] - 5).abs() < 1).all()
        assert torch.equal(guide.median()["a"], torch.full((3,), 5.0))
        assert torch.equal(pyro.param(name), torch.full((3,), 5.0))

    @pytest.mark.parametrize("make", GUIDES)
    def test_an_earlier_state_of_the_store_brings_an_earlier_guide_back(self, make):
        y = torch.tensor(TWO_WEIGHTS_Y)
        store = pyro.get_param_store()
        guide = make(two_weights)
        svi = svi_of(two_weights, guide, Trace_ELBO())
        svi.step(y)
        state = {name: value.detach().clone().requires_grad_() for name, value in store.get_state()["params"].items()}
        kept = {"params": state, "constraints": store.get_state()["constraints"]}
        before = state_of(guide)
        svi.step(y)
        assert not same_values(state_of(guide), before)
        store.set_state(kept)
        poutine.trace(guide).get_trace(y)
        assert same_values(state_of(guide), before)
        svi.step(y)
        assert not same_values(state_of(guide), before)


class TestOptimizers:
    def test_store_and_optimizer_saved_together_go_on_as_if_never_stopped(self, tmp_path):
        y = torch.tensor(TWO_WEIGHTS_Y)

        def run(stop: bool) -> dict[str, Tensor]:
            pyro.clear_param_store()
            guide, optimizer = auto_sparse_normal(two_weights), pyro.optim.Adam({"lr": 0.05})
            svi = SVI(two_weights, guide, optimizer, SparseVD_ELBO())
            for step in range(6):
                if stop and step == 3:
                    pyro.get_param_store().save(tmp_path / "store.pt")
                    optimizer.save(tmp_path / "optimizer.pt")
                    pyro.clear_param_store()
                    guide, optimizer = auto_sparse_normal(two_weights), pyro.optim.Adam({"lr": 0.05})
                    pyro.get_param_store().load(tmp_path / "store.pt")
                    optimizer.load(tmp_path / "optimizer.pt")
                    guide(y)
                    svi = SVI(two_weights, guide, optimizer, SparseVD_ELBO())
                seeded(svi.step, y, seed=step)
            return {**state_of(guide), "scale": pyro.param("scale").detach().clone()}

        whole, resumed = run(stop=False), run(stop=True)
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value)

    @pytest.mark.parametrize("make", GUIDES)
    def test_an_optimizer_may_treat_parameters_by_name(self, make):
        y = torch.tensor(TWO_WEIGHTS_Y)
        guide = make(two_weights)
        guide(y)
        before = state_of(guide)

        def options(name: str) -> dict[str, float]:
            return {"lr": 0.05 if ".locs." in name else 0.0}

        SVI(two_weights, guide, pyro.optim.Adam(options), Trace_ELBO()).step(y)
        for name, value in state_of(guide).items():
            assert (value != before[name]).all() == name.startswith("locs.")

    @pytest.mark.parametrize("make", GUIDES)
    def test_clipping_and_schedules_of_pyros_optimizers_work(self, make):
        y = torch.tensor(TWO_WEIGHTS_Y)
        guide = make(two_weights)
        guide(y)
        schedule = pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 1.0}, "gamma": 0.0})
        svi = SVI(two_weights, guide, schedule, Trace_ELBO())
        svi.step(y)
        schedule.step()
        before = state_of(guide)
        svi.step(y)  # at a rate of 0
        assert same_values(state_of(guide), before)
        SVI(two_weights, guide, pyro.optim.ClippedAdam({"lr": 0.05, "clip_norm": 1e-3}), Trace_ELBO()).step(y)
        assert all((value != before[name]).any() for name, value in state_of(guide).items())
