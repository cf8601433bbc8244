"""The guide: moved, copied and pickled."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from checks import (
    COPIES,
    deep_copy,
    deep_copy_with_model,
    pickled,
    same_values,
    seeded,
    state_of,
    take_steps,
    torch_saved,
)
from problems import (
    CASES,
    F64,
    NUM_DATA,
    POSTERIORS,
    function_case,
    module_case,
    precise_likelihood,
    regression_data,
    small_model,
)
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseVD_ELBO, Supervised, bayesianize


class TestMoves:
    @pytest.mark.parametrize("first_call", ["before", "after"])
    @pytest.mark.parametrize("make", CASES)
    def test_a_guide_moves_to_another_dtype(self, make, first_call, device):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        if first_call == "before":
            guide(*case.data)
        guide.to(torch.float32).to(F64)
        guide.to(torch.float32)
        if isinstance(case.model, nn.Module):
            case.model.to(torch.float32)
        if first_call == "after" and make is module_case:
            values = guide(*(t.float() for t in case.data))
            assert {value.dtype for value in values.values()} == {torch.float32}
        assert {p.dtype for p in guide.parameters()} <= {torch.float32}
        assert {q.loc.dtype for q in guide.posteriors.values()} <= {torch.float32}

    def test_model_and_guide_train_in_float64_after_to(self, device):
        net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).to(device)
        model = Supervised(bayesianize(net), precise_likelihood, NUM_DATA)
        loss = SparseVD_ELBO()(model, AutoSparseNormal(model)).to(F64)
        value = loss(*regression_data(device))
        value.backward()
        assert value.dtype == F64
        assert {p.grad.dtype for p in loss.parameters()} == {F64}


@pytest.mark.parametrize("make_copy", COPIES)
class TestCopies:
    @pytest.mark.parametrize("make", POSTERIORS)
    def test_original_and_copy_work_alike(self, make, make_copy, device):
        case = make(device)
        guide = case.guide()
        make_copy(guide)  # before the first call, which leaves the original its model
        assert guide._model == (case.model,)
        assert callable(guide.model)
        assert set(guide(*case.data)) == set(case.sites)
        new = make_copy(guide)
        assert same_values(seeded(new, *case.data), seeded(guide, *case.data))
        assert same_values(new.state_dict(), guide.state_dict())
        assert new.sparse_sites == guide.sparse_sites
        assert same_values(new.median(), guide.median())

    @pytest.mark.parametrize("make", CASES)
    def test_training_either_leaves_the_other_as_it_was(self, make, make_copy, device):
        case = make(device)
        guide = case.guide()
        take_steps(case.model, guide, case.data, steps=1)
        new, start = make_copy(guide), state_of(guide)
        for trained, other in ((new, guide), (guide, new)):
            before = state_of(other)
            take_steps(case.model, trained, case.data, steps=1)
            other(*case.data)
            assert same_values(state_of(other), before)
            assert not same_values(state_of(trained), start)


class TestEarlyCopies:
    @pytest.mark.parametrize("make_copy", [deep_copy, deep_copy_with_model])
    @pytest.mark.parametrize("make", CASES)
    def test_a_deep_copy_before_the_first_call_works_alike(self, make, make_copy, device):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        new = make_copy(guide)
        assert set(seeded(new, *case.data)) == set(case.sites)
        assert set(guide(*case.data)) == set(case.sites)
        assert {p.data_ptr() for p in guide.parameters()}.isdisjoint(p.data_ptr() for p in new.parameters())

    def test_a_deep_copy_has_its_own_model_unless_told_otherwise(self, device):
        guide = AutoSparseNormal(small_model(device, precise_likelihood))
        assert copy.deepcopy(guide)._model[0] is not guide._model[0]
        assert guide.copy_with_same_model()._model[0] is guide._model[0]

    @pytest.mark.parametrize("make_copy", [pickled, torch_saved])
    @pytest.mark.parametrize("make", [module_case, function_case], ids=["module", "function"])
    def test_a_guide_pickled_before_its_first_call_says_that_it_has_no_model(self, make, make_copy, device):
        case = make(device)
        new = make_copy(AutoSparseNormal(case.model))
        with pytest.raises(RuntimeError, match="unpickled without its model; call a guide once before it is pickled"):
            new(*case.data)


class TestInferenceMode:
    def test_what_was_first_called_in_inference_mode_trains(self, device):
        def model(x, y=None):
            w = pyro.sample("w", LogUniform().expand([1, 4]).to_event(2))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal((x @ w.mT)[:, 0], 1.0), obs=y)

        x = torch.randn(5, 4)
        guide = AutoSparseNormal(model)
        with torch.inference_mode():
            guide(x, x[:, 0])
        loss = SparseVD_ELBO()(model, guide)
        before = guide.median()["w"]
        optimizer = torch.optim.Adam(loss.parameters())
        loss(x, x[:, 0]).backward()
        optimizer.step()
        assert not torch.equal(guide.median()["w"], before)

    def test_a_prior_that_moved_in_inference_mode_trains(self, device):
        model = Supervised(bayesianize(nn.Linear(4, 1)).double(), lambda mean: dist.Normal(mean[:, 0], 1.0), 10)
        guide = AutoSparseNormal(model)
        x = torch.randn(5, 4, dtype=torch.float64)
        elbo = SparseVD_ELBO(local_reparam=False, kl="monte_carlo")
        with torch.inference_mode():
            elbo.loss(model, guide, x, x[:, 0])
        elbo(model, guide)(x, x[:, 0]).backward()
        assert all(p.grad is not None for p in guide.parameters())
