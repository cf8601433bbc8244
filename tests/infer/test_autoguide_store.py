"""The guide in Pyro's parameter store."""

import gc

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch import nn

from checks import same_values, state_of, stored_tensors, take_steps
from problems import CASES, NUM_DATA, Case, function_case, precise_likelihood, regression_data, small_model
from pyro_sparsevd import AutoSparseNormal, SparseVD_ELBO, Supervised, bayesianize


@pytest.mark.parametrize("make", CASES)
class TestTwoGuides:
    def test_of_one_model_train_apart(self, make, device):
        case = make(device)
        first, second = AutoSparseNormal(case.model), AutoSparseNormal(case.model)
        take_steps(case.model, first, case.data)
        before = state_of(first)
        take_steps(case.model, second, case.data)
        assert same_values(state_of(first), before)
        assert {p.data_ptr() for p in first.parameters()}.isdisjoint(p.data_ptr() for p in second.parameters())

    def test_that_were_called_before_either_is_trained_train_apart(self, make, device):
        case = make(device)
        first, second = AutoSparseNormal(case.model), AutoSparseNormal(case.model)
        first(*case.data)
        second(*case.data)
        take_steps(case.model, first, case.data)
        before = state_of(first)
        take_steps(case.model, second, case.data)
        assert same_values(state_of(first), before)

    def test_train_apart_in_turns(self, make, device):
        case = make(device)
        guides = [AutoSparseNormal(case.model) for _ in range(2)]
        twins = [AutoSparseNormal(case.model) for _ in range(2)]
        for guide, twin in zip(guides, twins, strict=True):
            guide(*case.data)
            twin(*case.data)
            twin.load_state_dict(guide.state_dict())
        svis = [SVI(case.model, g, pyro.optim.SGD({"lr": 1e-4}), SparseVD_ELBO()) for g in guides]
        for _ in range(2):
            for svi in svis:
                before = [state_of(g) for g in guides]
                svi.step(*case.data)
                changed = [not same_values(state_of(g), b) for g, b in zip(guides, before, strict=True)]
                assert changed == [svi is s for s in svis]

    def test_train_apart_after_the_store_was_cleared_between_them(self, make, device):
        case = make(device)
        first, second = AutoSparseNormal(case.model), AutoSparseNormal(case.model)
        take_steps(case.model, first, case.data)
        pyro.clear_param_store()
        take_steps(case.model, second, case.data)
        trained, other = state_of(first), state_of(second)
        take_steps(case.model, first, case.data, steps=1)
        assert same_values(state_of(second), other)
        for name, value in state_of(first).items():
            # One step of Adam moves every number by its learning rate.
            torch.testing.assert_close((value - trained[name]).abs(), torch.full_like(value, 0.05))

    def test_have_names_of_their_own_in_the_store(self, make, device):
        case = make(device)
        guides = [AutoSparseNormal(case.model) for _ in range(3)]
        for guide in guides:
            take_steps(case.model, guide, case.data, steps=1)
        stored = {p.data_ptr(): name for name, p in stored_tensors().items()}
        names = [{stored[p.data_ptr()].split(".")[0] for p in guide.parameters()} for guide in guides]
        assert all(len(name) == 1 for name in names)
        assert len(set.union(*names)) == 3


class TestLoadedStore:
    @pytest.mark.parametrize("make", CASES)
    @pytest.mark.parametrize("called", [False, True])
    def test_a_store_that_was_loaded_is_the_guides(self, make, called, device, tmp_path):
        case = make(device)
        guide = AutoSparseNormal(case.model)
        take_steps(case.model, guide, case.data)
        pyro.get_param_store().save(tmp_path / "store.pt")
        new = AutoSparseNormal(case.model)
        pyro.clear_param_store()
        if called:
            new(*case.data)
        pyro.get_param_store().load(tmp_path / "store.pt")
        if called:
            pyro.poutine.trace(new).get_trace(*case.data)  # sees parameters, as SVI does
        else:
            new(*case.data)
        assert same_values(state_of(new), state_of(guide))
        take_steps(case.model, new, case.data, steps=1)
        assert not same_values(state_of(new), state_of(guide))
        assert {name.split(".")[0] for name in stored_tensors() if name.startswith("Auto")} == {"AutoSparseNormal"}

    def test_what_a_guide_put_into_the_store_is_not_taken_for_loaded(self, device):
        model = small_model(device, precise_likelihood)
        other = AutoSparseNormal(model)
        take_steps(model, other, regression_data(device))
        new = AutoSparseNormal(model)
        before = state_of(new)
        new(*regression_data(device))
        assert same_values(state_of(new), before)

    def test_a_store_that_was_loaded_with_another_shape_is_an_error(self, device, tmp_path):
        model, other = small_model(device, precise_likelihood), small_model(device, precise_likelihood, width=5)
        guide = AutoSparseNormal(model)
        take_steps(model, guide, regression_data(device), steps=1)
        pyro.get_param_store().save(tmp_path / "store.pt")
        pyro.clear_param_store()
        pyro.get_param_store().load(tmp_path / "store.pt")
        message = r"AutoSparseNormal.locs.0.weight: expected a parameter of shape \(5, 4\), but .* of \(3, 4\)"
        with pytest.raises(ValueError, match=message):
            AutoSparseNormal(other)(*regression_data(device))


class TestGuidesThatAreGone:
    @pytest.mark.parametrize("make", CASES)
    def test_guides_and_models_that_are_gone_have_left_the_store(self, make, device):
        case = make(device)
        kept = AutoSparseNormal(case.model)
        take_steps(case.model, kept, case.data, steps=1)
        before = stored_tensors()
        for _ in range(3):
            new = make(device)
            guide = AutoSparseNormal(new.model)
            take_steps(new.model, guide, new.data, steps=1)
            assert len(stored_tensors()) > len(before)
            del new, guide
            gc.collect()
            assert stored_tensors().keys() == before.keys()
            assert all(stored_tensors()[name] is value for name, value in before.items())

    def test_a_guide_that_goes_takes_nothing_that_was_loaded_meanwhile(self, device, tmp_path):
        case = function_case(device)
        guide = AutoSparseNormal(case.model)
        take_steps(case.model, guide, case.data, steps=1)
        pyro.get_param_store().save(tmp_path / "store.pt")
        pyro.get_param_store().load(tmp_path / "store.pt")
        names = stored_tensors().keys()
        del guide
        gc.collect()
        assert stored_tensors().keys() == names != set()

    def test_the_store_may_be_read_while_a_guide_goes(self, device):
        case = function_case(device)
        guide, kept = AutoSparseNormal(case.model), AutoSparseNormal(case.model)
        guide(*case.data)
        kept(*case.data)
        names = []
        for name in pyro.get_param_store():
            guide = None
            names.append(name)
        assert len(names) == 2 * len(stored_tensors()) > 0


class TestOneName:
    def test_guides_with_one_site_name_train_apart_in_a_cleared_store(self):
        def model(name):
            pyro.sample(name, dist.Normal(1.0, 1.0))
            pyro.sample("w", dist.Normal(torch.ones(3), 1.0).to_event(1))

        first, second = AutoSparseNormal(model), AutoSparseNormal(model)
        take_steps(model, first, ("a",), steps=1)
        pyro.clear_param_store()
        take_steps(model, second, ("b",), steps=1)
        before = state_of(second)
        take_steps(model, first, ("a",), steps=1)
        assert same_values(state_of(second), before)

    def test_guides_of_models_of_other_shapes_live_side_by_side(self, device):
        models = [small_model(device, precise_likelihood), small_model(device, precise_likelihood, width=5)]
        guides = [AutoSparseNormal(model) for model in models]
        for model, guide in zip(models, guides, strict=True):
            take_steps(model, guide, regression_data(device), steps=1)
        assert [guide.posteriors["0.weight"].loc.shape[0] for guide in guides] == [3, 5]


def _no_bias(device: torch.device) -> Supervised:
    torch.manual_seed(1)
    bnn = bayesianize(nn.Linear(4, 1, bias=False).to(device).double())
    return Supervised(bnn, precise_likelihood, NUM_DATA)


class TestModuleLocalParams:
    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(
                lambda device: Case(_no_bias(device), regression_data(device), (), ()), id="network-without-bias"
            ),
            *CASES,
        ],
    )
    def test_svi_trains_under_module_local_params(self, make, device):
        with pyro.settings.context(module_local_params=True):
            case = make(device)
            guide = AutoSparseNormal(case.model)
            guide(*case.data)
            before = state_of(guide)
            take_steps(case.model, guide, case.data, steps=1)
            after = state_of(guide)
            assert all((after[name] != before[name]).all() for name in before)
            assert stored_tensors() == {}

    @pytest.mark.parametrize("make", CASES)
    def test_the_loss_module_trains_under_module_local_params(self, make, device):
        with pyro.settings.context(module_local_params=True):
            case = make(device)
            guide = AutoSparseNormal(case.model)
            loss = SparseVD_ELBO()(case.model, guide)
            loss(*case.data)
            before = state_of(guide)
            optimizer = torch.optim.Adam(guide.parameters(), lr=0.1)
            loss(*case.data).backward()
            optimizer.step()
            assert all((value != before[name]).all() for name, value in state_of(guide).items())
            assert stored_tensors() == {}
