"""The sweep of thresholds by hand, and the choice of one by known likelihoods."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoGuideList, init_to_value
from torch import nn

import pyro_sparsevd as svd


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


def test_masks_of_sites_and_of_distributions_count_both(device):
    y, seen = torch.randn(6, 2, device=device), torch.arange(12, device=device).reshape(6, 2) % 3 > 0
    rows = torch.arange(6, device=device) > 1

    def model(y):
        pyro.sample("w", svd.LogUniform(torch.tensor(1e-3, device=device), 1.0))
        with pyro.plate("data", 6), poutine.mask(mask=rows):
            pyro.sample("y", dist.Normal(torch.zeros_like(y), 1.0).mask(seen).to_event(1), obs=y)

    guide = svd.AutoSparseNormal(model)
    guide(y)
    (point,) = svd.threshold_sweep(model, guide, [(y,)], [3.0])
    assert point.error == pytest.approx(y[seen & rows[:, None]].square().mean().item(), rel=1e-6)


def test_the_sweep_wants_data_with_targets(fitted, device):
    model, guide = fitted
    with pytest.raises(ValueError, match="data: expected at least one batch"):
        svd.threshold_sweep(model, guide, [], [3.0])
    with pytest.raises(ValueError, match=r"data: expected pairs \(x, y\)"):
        svd.threshold_sweep(model, guide, [(torch.randn(2, 6, device=device),)], [3.0])
    x = torch.randn(3, 3, device=device)
    guide = svd.AutoSparseNormal(_noiseless)
    guide(x, x[0])
    with pytest.raises(ValueError, match="data: expected at least one datum"):
        svd.threshold_sweep(_noiseless, guide, [], [3.0])
    with pytest.raises(ValueError, match="model: expected an observed site"):
        svd.threshold_sweep(_noiseless, guide, [(x,)], [3.0])


def _noiseless(x, y=None):
    w = pyro.sample("w", svd.LogUniform(torch.tensor(1e-4).to(x), 1e2).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        return pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def test_a_batch_of_any_model_is_its_arguments_in_order_or_by_name(device):
    x, y = torch.randn(5, 3, device=device), torch.randn(5, device=device)
    guide = svd.AutoSparseNormal(_noiseless)
    guide(x, y)
    by_order, by_name = (svd.threshold_sweep(_noiseless, guide, [b], [3.0]) for b in ((x, y), {"y": y, "x": x}))
    assert by_order == by_name


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
    assert point.error == pytest.approx((4 + 1 + 9) / 3)  # of the three values that are seen
    assert point.nll == pytest.approx((14 / 2 + 3 * math.log(math.sqrt(2 * math.pi))) / 2)  # of the two data with any


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
    assert point.error == pytest.approx((0 + 1 + 1 + 0) / 4)


def test_a_sweep_says_what_its_errors_are_and_needs_a_threshold():
    x, y = torch.randn(6, 3), torch.randn(6, 2)
    model = svd.Supervised(svd.bayesianize(nn.Linear(3, 2)), lambda mean: dist.Normal(mean, 1.0).to_event(1), 6)
    guide = svd.AutoSparseNormal(model)
    assert svd.threshold_sweep(model, guide, [(x, y)], [3.0])[0].error_name == "mean squared error"
    with pytest.raises(ValueError, match="thresholds: expected at least one, but got none"):
        svd.threshold_sweep(model, guide, [(x, y)], [])
