"""Sparsification: masks, tables, and the sweep of the threshold."""

import json
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, init_to_value
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


def _by_hand(model, guide, x, y, threshold):
    """Error and NLL of the masked-mean network, from the pruned module in evaluation mode."""
    summary = svd.sparsify(guide, threshold)
    logits = svd.prune(model.network, guide, summary).eval()(x)
    nll = nn.functional.cross_entropy(logits, y).item()
    return (logits.argmax(-1) != y).float().mean().item(), nll, summary.compression


def test_the_sweep_equals_pruned_networks_evaluated_by_hand(fitted, device):
    model, guide = fitted
    x, y = torch.randn(40, 6, device=device), torch.randint(3, (40,), device=device)
    guide(x, y)
    thresholds = [-3.0, 0.0, 3.0]
    points = svd.threshold_sweep(model, guide, [(x[:25], y[:25]), (x[25:], y[25:])], thresholds)
    for threshold, point in zip(thresholds, points, strict=True):
        error, nll, compression = _by_hand(model, guide, x, y, threshold)
        assert point.threshold == threshold
        assert point.error == pytest.approx(error, abs=1e-6)
        assert point.nll == pytest.approx(nll, rel=1e-5)
        assert point.compression == compression


def test_the_sweep_takes_a_generator_and_leaves_the_mode_alone(fitted, device):
    model, guide = fitted
    x, y = torch.randn(8, 6, device=device), torch.randint(3, (8,), device=device)
    model.train()
    statistics = model.network[1].running_mean.clone()
    points = svd.threshold_sweep(model, guide, ((x, y) for _ in range(2)), [0.0, 3.0])
    assert len(points) == 2
    assert all(m.training for m in model.modules())
    assert torch.equal(model.network[1].running_mean, statistics)


def test_the_sweep_of_a_regression_gives_the_mean_squared_error(device):
    bnn = svd.bayesianize(nn.Linear(3, 1).to(device))
    model = svd.Supervised(bnn, lambda f: dist.Normal(f, 0.5).to_event(1), num_data=20)
    guide = svd.AutoSparseNormal(model)
    x, y = torch.randn(20, 3, device=device), torch.randn(20, 1, device=device)
    (point,) = svd.threshold_sweep(model, guide, [(x, y)], [math.inf])
    prediction = svd.prune(bnn, guide, svd.sparsify(guide, math.inf))(x)
    assert point.error == pytest.approx(((prediction - y) ** 2).mean().item(), rel=1e-5)
    assert point.nll == pytest.approx(-dist.Normal(prediction, 0.5).log_prob(y).mean().item(), rel=1e-5)


def _swept(likelihood, outputs, y, device):
    """The only point of a sweep at a threshold that keeps all, and the outputs of the network."""
    model = svd.Supervised(svd.bayesianize(nn.Linear(4, outputs).to(device)), likelihood, num_data=len(y))
    guide, x = svd.AutoSparseNormal(model), torch.randn(len(y), 4, device=device)
    (point,) = svd.threshold_sweep(model, guide, [(x, y)], [math.inf])
    return point, svd.prune(model.network, guide, svd.sparsify(guide, math.inf))(x)


def test_a_one_hot_target_is_right_or_wrong_as_a_whole(device):
    labels = torch.randint(3, (40,), device=device)
    y = nn.functional.one_hot(labels, 3).float()
    point, logits = _swept(lambda f: dist.OneHotCategorical(logits=f), 3, y, device)
    assert point.error == pytest.approx((logits.argmax(-1) != labels).double().mean().item())


def test_the_error_of_several_one_hot_targets_is_their_mean(device):
    labels = torch.randint(3, (40, 2), device=device)
    y = nn.functional.one_hot(labels, 3).float()
    point, logits = _swept(lambda f: dist.OneHotCategorical(logits=f.reshape(-1, 2, 3)).to_event(1), 6, y, device)
    assert point.error == pytest.approx((logits.reshape(-1, 2, 3).argmax(-1) != labels).double().mean().item())


def test_the_error_of_a_vector_is_the_mean_of_its_elements(device):
    y = torch.randn(20, 2, device=device)
    eye = torch.eye(2, device=device)
    point, mean = _swept(lambda f: dist.MultivariateNormal(f, eye), 2, y, device)
    assert point.error == pytest.approx((mean - y).square().mean().item(), rel=1e-5)


def test_masked_vectors_are_left_out(device):
    y, seen = torch.randn(20, 3, 2, device=device), torch.arange(60, device=device).reshape(20, 3) % 3 > 0
    eye = torch.eye(2, device=device)

    def likelihood(f):
        return dist.MultivariateNormal(f.reshape(20, 3, 2), eye).mask(seen).to_event(1)

    point, mean = _swept(likelihood, 6, y, device)
    expected = (mean.reshape(20, 3, 2) - y).square().mean(-1)[seen].mean()
    assert point.error == pytest.approx(expected.item(), rel=1e-5)


def test_of_two_equally_probable_values_the_first_is_predicted(device):
    y = torch.tensor([[0.0], [1.0], [1.0], [1.0]], device=device)
    point, _ = _swept(lambda f: dist.Bernoulli(probs=0 * f + 0.5).to_event(1), 1, y, device)
    assert point.error == 0.75


def _scaled_rows(x, y=None, subsample=None):
    """One log-uniform scale for each datum, in a plate that may be subsampled."""
    with pyro.plate("rows", 12, subsample=subsample, device=x.device) as rows:
        scale = pyro.sample("scale", svd.LogUniform())
        return pyro.sample("y", dist.Normal(scale * x[rows], 1.0), obs=None if y is None else y[rows])


def test_a_subsampled_plate_takes_its_part_of_latents_and_masks(device):
    x, y = torch.randn(12, device=device), torch.randn(12, device=device)
    guide = svd.AutoSparseNormal(
        _scaled_rows,
        init_loc_fn=lambda site: torch.arange(1.0, 13, device=device),
        create_plates=lambda x, y=None, subsample=None: pyro.plate("rows", 12, subsample=subsample, device=device),
    )
    guide(x, y)
    with torch.no_grad():
        guide.log_variances.scale.uniform_(-3, 6)
    summary = svd.sparsify(guide, 1.0)
    kept = summary.masks["scale"]
    assert 0 < kept.sum() < 12
    part = torch.tensor([7, 2, 11], device=device)
    (point,) = svd.threshold_sweep(_scaled_rows, guide, [(x, y, part)], [1.0])
    residuals = (guide.median()["scale"] * kept * x - y)[part]
    assert point.error == pytest.approx((residuals**2).mean().item(), rel=1e-5)
    assert torch.equal(guide.sparsified(summary)(x, y, part)["scale"] != 0, kept[part])


def test_the_sweep_leaves_masked_data_out(device):
    x, y = torch.randn(12, device=device), torch.randn(12, device=device)
    seen = torch.arange(12, device=device) % 3 > 0

    def model(x, y):
        w = pyro.sample("w", svd.LogUniform())
        with pyro.plate("rows", 12), poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)

    guide = svd.AutoSparseNormal(model, init_loc_fn=lambda site: torch.tensor(0.7, device=device))
    guide(x, y)
    (point,) = svd.threshold_sweep(model, guide, [(x, y)], [math.inf])
    assert point.error == pytest.approx(((0.7 * x - y)[seen] ** 2).mean().item(), rel=1e-5)
    assert point.nll == pytest.approx(-dist.Normal(0.7 * x, 1.0).log_prob(y)[seen].mean().item(), rel=1e-5)


def test_the_sweep_wants_data_with_targets(fitted, device):
    model, guide = fitted
    with pytest.raises(ValueError, match="data: expected at least one datum"):
        svd.threshold_sweep(model, guide, [], [3.0])
    with pytest.raises(ValueError, match="model: expected an observed site"):
        svd.threshold_sweep(model, guide, [(torch.randn(2, 6, device=device),)], [3.0])


def test_totals_of_a_pickled_guide_are_those_of_the_original():
    model = svd.Supervised(svd.bayesianize(nn.Linear(4, 3)), lambda x: dist.Categorical(logits=x), 10)
    guide = svd.AutoSparseNormal(model)
    assert svd.sparsify(pickle.loads(pickle.dumps(guide))).num_parameters == svd.sparsify(guide).num_parameters == 15


def test_a_prediction_without_a_mode_has_a_likelihood_and_no_error():
    model = svd.Supervised(
        svd.bayesianize(nn.Linear(4, 1)), lambda x: dist.ZeroInflatedPoisson(x[:, 0].exp(), gate=torch.tensor(0.5)), 10
    )
    guide = svd.AutoSparseNormal(model)
    (point,) = svd.threshold_sweep(model, guide, [(torch.randn(5, 4), torch.ones(5))], [3.0])
    assert math.isfinite(point.nll)
    assert math.isnan(point.error)


def _noisy(x, y=None):
    w = pyro.sample("w", svd.LogUniform(1e-4, 1e2).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 2.0))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, sigma), obs=y)


def test_the_sweep_takes_the_medians_of_the_other_guides_of_a_list():
    x, y = torch.randn(10, 3), torch.randn(10)
    guide = AutoGuideList(_noisy)
    guide.append(svd.AutoSparseNormal(poutine.block(_noisy, hide=["sigma"])))
    guide.append(
        AutoDelta(
            poutine.block(_noisy, expose=["sigma"]), init_loc_fn=init_to_value(values={"sigma": torch.tensor(0.5)})
        )
    )
    guide(x, y)
    (point,) = svd.threshold_sweep(_noisy, guide, [(x, y)], [3.0])
    expected = -dist.Normal(x @ guide.median(x, y)["w"], 0.5).log_prob(y).mean()
    assert point.nll == pytest.approx(expected.item())


def test_the_sweep_names_a_latent_that_the_guide_has_not():
    x, y = torch.randn(10, 3), torch.randn(10)
    guide = svd.AutoSparseNormal(poutine.block(_noisy, hide=["sigma"]))
    guide(x, y)
    with pytest.raises(ValueError, match=r"^sigma: expected this latent of the model in the guide"):
        svd.threshold_sweep(_noisy, guide, [(x, y)], [3.0])


def test_the_sweep_scores_data_only_and_those_that_are_not_masked():
    def model(x, y=None):
        w = pyro.sample("w", svd.LogUniform().expand([3]).to_event(1))
        pyro.factor("penalty", -w.square().sum())
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0).mask(torch.tensor([True, False, True])), obs=y)

    x, y = torch.randn(3, 3), torch.randn(3)
    guide = svd.AutoSparseNormal(model)
    guide(x, y)
    (point,) = svd.threshold_sweep(model, guide, [(x, y)], [3.0])
    mean = x @ guide.median()["w"]
    assert point.nll == pytest.approx(-dist.Normal(mean, 1.0).log_prob(y)[[0, 2]].mean().item())
    assert point.error == pytest.approx((mean - y)[[0, 2]].square().mean().item())


def test_the_sweep_refuses_targets_that_broadcast():
    def model(x, y=None):
        w = pyro.sample("w", svd.LogUniform().expand([3]).to_event(1))
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = torch.randn(4, 3), torch.randn(4, 1)
    guide = svd.AutoSparseNormal(model)
    guide(x, y[:, 0])
    with pytest.raises(ValueError, match=r"^y: expected a value of shape \(4,\), but got \(4, 1\)"):
        svd.threshold_sweep(model, guide, [(x, y)], [3.0])
    with pytest.raises(ValueError, match=r"^y: expected a value of shape \(4,\), but got \(4, 1\)"):
        svd.SparseVD_ELBO()(model, guide)(x, y)


def test_the_sweep_leaves_masked_parts_of_data_out(device):
    torch.manual_seed(0)
    mask = torch.tensor([[True, False], [True, True], [False, False]], device=device)
    y = torch.tensor([[2.0, 1000.0], [1.0, 3.0], [5.0, 5.0]], device=device)

    def model(y):
        w = pyro.sample("w", svd.LogUniform().expand([1]).to_event(1).expand(()))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal((0 * w).expand(3, 2), 1.0).mask(mask).to_event(1), obs=y)

    guide = svd.AutoSparseNormal(model)
    guide(y)
    (point,) = svd.threshold_sweep(model, guide, [(y,)], [3.0])
    assert point.error == pytest.approx((4 + 5 + 0) / 3)
    assert point.nll == pytest.approx((14 / 2 + 3 * math.log(math.sqrt(2 * math.pi))) / 3)


@pytest.mark.parametrize("kind", ["labels", "vectors"])
def test_the_sweep_leaves_masked_discrete_parts_of_data_out(kind, device):
    y = torch.tensor([[0, 1], [1, 1], [2, 0]], device=device)
    seen = torch.tensor([[True, False], [True, True], [False, True]], device=device)
    probs = torch.tensor([0.6, 0.3, 0.1], device=device).expand(3, 2, 3)  # the mode is 0

    def model(y):
        pyro.sample("w", svd.LogUniform(torch.tensor(1e-3, device=device), 1.0))
        likelihood = dist.Categorical(probs) if kind == "labels" else dist.OneHotCategorical(probs)
        with pyro.plate("data", 3):
            pyro.sample("y", likelihood.mask(seen).to_event(1), obs=y)

    y = y if kind == "labels" else torch.nn.functional.one_hot(y).to(probs)
    guide = svd.AutoSparseNormal(model)
    guide(y)
    (point,) = svd.threshold_sweep(model, guide, [(y,)], [3.0])
    assert point.error == pytest.approx((0 + 1 + 0) / 3)


@pytest.mark.parametrize("text", [str, SparsitySummary._repr_html_])
def test_a_table_says_what_to_do_where_no_weight_is_kept(text):
    def table(kept):
        return text(SparsitySummary((SiteSparsity("w", (2, 3), kept, 3.0),), {}, 6))

    assert "No weight is kept. Unless the targets do not depend on the inputs" in table(0)
    assert "(LinearWarmup)" in table(0)
    assert "No weight" not in table(1) + text(SparsitySummary((), {}, 6))
