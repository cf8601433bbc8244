"""Sparsification: masks and tables."""

import json
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd.sparsity.summary import SiteSparsity, SparsitySummary


@pytest.fixture
def fitted(device):
    """A model, and a guide whose log α are spread over both sides of any threshold."""
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).to(device)
    model = svd.Supervised(svd.bayesianize(net), lambda logits: dist.Categorical(logits=logits), num_data=40)
    guide = svd.AutoSparseNormal(model)
    with torch.no_grad():
        for parameter in guide.log_variances.parameters():
            parameter.uniform_(-8, 4)
    return model, guide


@pytest.mark.parametrize("threshold", [-math.inf, -2.0, 0.5, 3.0, math.inf])
def test_masks_keep_what_is_at_most_the_threshold(fitted, threshold):
    _, guide = fitted
    summary = svd.sparsify(guide, threshold)
    for name, q in guide.posteriors.items():
        ratio = q.variance / q.loc**2
        assert torch.equal(summary.masks[name], ratio.log() <= threshold)
    assert summary.kept == sum(int(mask.sum()) for mask in summary.masks.values())
    assert summary.total == 6 * 5 + 5 * 3


def test_a_weight_of_mean_zero_is_dropped_at_any_finite_threshold(device):
    guide = svd.AutoSparseNormal(
        lambda: pyro.sample("w", svd.LogUniform().expand([2]).to_event(1)),
        init_loc_fn=lambda site: torch.tensor([0.0, 1.0], device=device),
    )
    guide()
    assert svd.sparsify(guide, 1e9).masks["w"].tolist() == [False, True]


def test_thresholds_per_site_leave_other_sites_whole(fitted):
    _, guide = fitted
    summary = svd.sparsify(guide, {"3.weight": -100.0})
    assert not summary.masks["3.weight"].any()
    assert summary.masks["0.weight"].all()
    assert [site.threshold for site in summary.sites] == [math.inf, -100.0]


def test_totals_count_sparse_weights_and_all_parameters(fitted):
    _, guide = fitted
    summary = svd.sparsify(guide, {"0.weight": -100.0})
    others = 5 + 3 + 2 * 5  # biases, batch normalisation
    assert (summary.kept, summary.total) == (15, 45)
    assert summary.compression == 3.0
    assert summary.sparsity == pytest.approx(2 / 3)
    assert (summary.kept_parameters, summary.num_parameters) == (15 + others, 45 + others)


def test_only_sites_with_a_log_uniform_prior_count(device):
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(device)
    bnn = svd.bayesianize(net, {"0.*": svd.LogUniform(), "1.*": dist.Normal(0.0, 1.0)})
    summary = svd.sparsify(svd.AutoSparseNormal(bnn))
    assert list(summary.masks) == ["0.weight"]
    assert (summary.total, summary.num_parameters) == (12, 12 + 6 + 5)


def test_the_text_has_a_line_for_each_site_and_both_totals(fitted):
    _, guide = fitted
    lines = str(svd.sparsify(guide)).split("\n")
    assert [line.split("  ")[0] for line in lines] == [
        "site",
        "0.weight",
        "3.weight",
        "sparse weights",
        "all parameters",
    ]
    assert "5 x 6" in lines[1]


def test_the_html_has_the_same_rows_and_escapes_names():
    summary = svd.sparsity.SparsitySummary((SiteSparsity("<w>", (2,), 1, 3.0),), {}, 2)
    table = summary._repr_html_()
    assert table.count("<tr>") == 4
    assert "&lt;w&gt;" in table


def test_the_dictionary_is_plain_data(fitted):
    _, guide = fitted
    summary = svd.sparsify(guide)
    read = json.loads(json.dumps(summary.to_dict()))
    assert read["sparse_weights"]["compression"] == pytest.approx(summary.compression)
    assert read["sites"]["0.weight"]["shape"] == [5, 6]


def test_the_dictionary_is_json_where_numbers_are_infinite(fitted):
    _, guide = fitted
    read = json.loads(json.dumps(svd.sparsify(guide, {"0.weight": -math.inf}).to_dict(), allow_nan=False))
    assert read["sites"]["0.weight"]["compression"] is None
    assert read["sites"]["3.weight"]["threshold"] is None


def test_summaries_of_one_guide_can_be_compared(fitted):
    _, guide = fitted
    summary = svd.sparsify(guide)
    assert summary == summary
    assert summary != svd.sparsify(guide)


def test_a_name_with_brackets_can_be_given(device):
    guide = svd.AutoSparseNormal(lambda: [pyro.sample(f"w[{i}]", svd.LogUniform(1e-4, 1e2)) for i in range(2)])
    guide.to(device)()
    summary = svd.sparsify(guide, {"w[1]": -100.0})
    assert [site.threshold for site in summary.sites] == [math.inf, -100.0]


def test_everything_dropped_is_infinite_compression(fitted):
    _, guide = fitted
    summary = svd.sparsify(guide, -math.inf)
    assert summary.compression == math.inf
    assert summary.sparsity == 1.0
    assert "inf" in str(summary)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (math.nan, "threshold: expected a number for 0.weight, but got NaN"),
        ({"3.weight": math.nan}, "threshold: expected a number for 3.weight"),
        ({"4.weight": 3.0}, "threshold: expected sites .* of 0.weight, 3.weight, but got '4.weight'"),
    ],
    ids=str,
)
def test_bad_thresholds_are_refused(fitted, threshold, message):
    with pytest.raises(ValueError, match=message):
        svd.sparsify(fitted[1], threshold)


@pytest.mark.parametrize(
    ("threshold", "message"),
    [
        (None, "threshold: expected a number or a mapping, but got None"),
        ("3", "threshold: expected a number or a mapping, but got '3'"),
        ([3.0], r"threshold: expected a number or a mapping, but got \[3.0\]"),
        ({"3.*": None}, r"threshold: expected a number for 3\.weight, but got None"),
    ],
    ids=str,
)
def test_thresholds_that_are_no_numbers_are_refused(fitted, threshold, message):
    with pytest.raises(TypeError, match=message):
        svd.sparsify(fitted[1], threshold)


def test_a_guide_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="guide: expected an AutoSparseNormal"):
        svd.sparsify(nn.Linear(2, 2))


def test_priors_must_be_known():
    with pytest.raises(RuntimeError, match="call the guide once"):
        svd.sparsify(svd.AutoSparseNormal(lambda: pyro.sample("w", svd.LogUniform())))


def test_the_parts_of_a_guide_list_are_summed(device):
    def model():
        pyro.sample("a", svd.LogUniform().expand([3]).to_event(1))
        pyro.sample("b", svd.LogUniform().expand([4]).to_event(1))

    guide = pyro.infer.autoguide.AutoGuideList(model)
    guide.append(svd.AutoSparseNormal(pyro.poutine.block(model, hide=["b"])))
    guide.append(svd.AutoSparseNormal(pyro.poutine.block(model, hide=["a"])))
    guide()
    assert svd.sparsify(guide).total == 7


def test_totals_of_a_pickled_guide_are_those_of_the_original():
    model = svd.Supervised(svd.bayesianize(nn.Linear(4, 3)), lambda x: dist.Categorical(logits=x), 10)
    guide = svd.AutoSparseNormal(model)
    assert svd.sparsify(pickle.loads(pickle.dumps(guide))).num_parameters == svd.sparsify(guide).num_parameters == 15


@pytest.mark.parametrize("text", [str, SparsitySummary._repr_html_])
def test_a_table_says_what_to_do_where_no_weight_is_kept(text):
    def table(kept):
        return text(SparsitySummary((SiteSparsity("w", (2, 3), kept, 3.0),), {}, 6))

    assert "No weight is kept. Unless the targets do not depend on the inputs" in table(0)
    assert "(LinearWarmup)" in table(0)
    assert "No weight" not in table(1) + text(SparsitySummary((), {}, 6))
