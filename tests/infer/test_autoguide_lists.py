"""The guide as part of a list."""

import copy

import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList, AutoNormal

import pyro_sparsevd as svd
from checks import same_values, seeded, spread_means, state_of, take_steps
from problems import function_case, local_model, model_with_batch_norm, precise_likelihood, regression_data, small_model
from pyro_sparsevd import AutoSparseNormal
from pyro_sparsevd.sparsity.summary import sparse_normal_parts


def test_two_parts_of_a_guide_list_train_together(device):
    case = function_case(device)
    guide = AutoGuideList(case.model)
    guide.append(AutoSparseNormal(poutine.block(case.model, hide=["b", "net.scale"])))
    guide.append(AutoSparseNormal(poutine.block(case.model, expose=["net.scale"])))
    guide.append(AutoNormal(poutine.block(case.model, expose=["b"])))
    guide(*case.data)
    before = state_of(guide)
    take_steps(case.model, guide, case.data, steps=1)
    after = state_of(guide)
    assert all((after[name] != before[name]).all() for name in before)
    assert set(guide(*case.data)) == set(case.sites)
    assert set(guide.median(*case.data)) == set(case.sites)
    assert guide[0].sparse_sites == ("w",)
    assert sparse_normal_parts(guide) == [guide[0], guide[1]]


def test_parts_of_a_guide_list_share_its_plates(device):
    def model():
        local_model(device=device)

    guide = AutoGuideList(model)
    guide.append(AutoSparseNormal(poutine.block(model, hide=["v", "share"])))
    guide.append(AutoSparseNormal(poutine.block(model, expose=["v", "share"])))
    guide()
    for part in guide:
        spread_means(part)
    trace = poutine.trace(guide).get_trace()
    indices = trace.nodes["data"]["value"]
    torch.testing.assert_close(trace.nodes["z"]["value"], guide[0].posteriors["z"].loc[indices])
    torch.testing.assert_close(trace.nodes["v"]["value"], guide[1].posteriors["v"].loc[indices])


def test_parts_of_a_guide_list_count_the_parameters_of_their_model_once(device, improper):
    model = small_model(device, precise_likelihood)
    guide = AutoGuideList(model)
    guide.append(AutoSparseNormal(poutine.block(model, hide=["2.weight"])))
    guide.append(AutoSparseNormal(poutine.block(model, expose=["2.weight"])))
    guide(*regression_data(device))
    assert svd.sparsify(guide).num_parameters == svd.sparsify(AutoSparseNormal(model)).num_parameters == 19


def test_setting_up_behind_a_handler_leaves_running_statistics_alone(device, improper):
    model = model_with_batch_norm(device)
    before = state_of(model)
    AutoSparseNormal(poutine.block(model, expose=["weight"]))(*regression_data(device))
    assert same_values(state_of(model), before)


def test_two_guide_lists_train_apart(device):
    case = function_case(device)
    lists = []
    for _ in range(2):
        guide = AutoGuideList(case.model)
        guide.append(AutoSparseNormal(poutine.block(case.model, hide=["b"])))
        guide.append(AutoSparseNormal(poutine.block(case.model, expose=["b"])))
        lists.append(guide)
    first, second = lists
    take_steps(case.model, first, case.data, steps=1)
    before = state_of(first)
    take_steps(case.model, second, case.data, steps=1)
    assert same_values(state_of(first), before)


def test_a_copied_guide_list_works_alike(device):
    case = function_case(device)
    guide = AutoGuideList(case.model)
    guide.append(AutoSparseNormal(poutine.block(case.model, hide=["b"])))
    guide.append(AutoSparseNormal(poutine.block(case.model, expose=["b"])))
    guide(*case.data)
    new = copy.deepcopy(guide)
    assert same_values(seeded(new, *case.data), seeded(guide, *case.data))


@pytest.mark.parametrize("guide", [AutoNormal(lambda: None), lambda: None], ids=["AutoNormal", "function"])
def test_the_parts_of_another_guide_are_an_error(guide):
    with pytest.raises(TypeError, match="guide: expected an AutoSparseNormal or a list with one, but got"):
        sparse_normal_parts(guide)
