"""Quantisation: steps as wide as the posterior, within a tolerance."""

import copy
import itertools
import math

import pyro
import pytest
import torch
from torch import nn

import pyro_sparsevd as svd
from pyro_sparsevd.sparsity.quantization import quantization_steps
from pyro_sparsevd.storage.rounding import from_multiples, quantized, to_multiples


def _posterior(log_variances=(-6.0, -4.0)):
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    bnn = svd.bayesianize(net, include=["0.weight", "3.weight"])
    guide = svd.AutoSparseNormal(bnn, init_log_variance=0.0)
    with torch.no_grad():
        for name, log_variance in zip(("0.weight", "3.weight"), log_variances, strict=True):
            guide.posteriors[name].log_variance.fill_(log_variance)
    return guide, svd.prune(bnn, guide, svd.sparsify(guide, math.inf)).eval()


def _distance(net):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = net(x)
    return lambda other: float((other(x) - y).detach().square().mean())


class _Own(pyro.nn.PyroModule):
    """A model of one's own, which puts its name for a network before the names of the network's sites."""

    def __init__(self, net):
        super().__init__()
        self.slope = pyro.nn.PyroSample(pyro.distributions.Normal(0.0, 1.0))
        self.bnn = svd.bayesianize(net)

    def forward(self, x):
        return self.slope * self.bnn(x)


class TestSteps:
    def test_steps_are_in_proportion_to_sigma(self):
        guide, net = _posterior()
        steps = quantization_steps(guide, net, _distance(net), 1e-2)
        assert list(steps) == ["0.weight", "0.bias", "3.weight", "3.bias"]
        assert steps["3.weight"] / steps["0.weight"] == pytest.approx(math.e, rel=1e-5)
        assert steps["0.bias"] == pytest.approx(2 * steps["0.weight"])
        assert steps["3.bias"] == pytest.approx(2 * steps["3.weight"])

    @pytest.mark.parametrize("tolerance", [1e-5, 1e-3, 1e-1])
    def test_the_steps_are_the_widest_of_the_grid_within_the_tolerance(self, tolerance):
        guide, net = _posterior()
        nll = _distance(net)
        steps = quantization_steps(guide, net, nll, tolerance)
        power = 4 * math.log2(4 * math.exp(-3) / steps["0.weight"])
        assert power == pytest.approx(round(power), abs=1e-4)
        unit = {name: step / steps["0.weight"] * 4 * math.exp(-3) for name, step in steps.items()}
        tried = [nll(quantized(net, {n: s * 2 ** (-p / 4) for n, s in unit.items()})) for p in range(round(power) + 2)]
        assert max(tried[-2:]) <= tolerance
        assert all(max(pair) > tolerance for pair in itertools.pairwise(tried[:-1]))

    def test_one_lucky_rounding_is_not_enough(self):
        guide, net = _posterior()
        values = iter([0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
        steps = quantization_steps(guide, net, lambda net: next(values), 0.5)
        assert steps["0.weight"] == pytest.approx(4 * 2 ** (-3 / 4) * math.exp(-3), rel=1e-5)

    def test_only_the_weights_that_are_kept_count(self):
        guide, net = _posterior()
        with torch.no_grad():
            guide.posteriors["0.weight"].log_variance[:, 3:] = 5.0
            net[0].weight[:, 3:] = 0
        steps = quantization_steps(guide, net, lambda net: 0.0, 1.0)
        assert steps["0.weight"] == pytest.approx(4 * math.exp(-3), rel=1e-5)

    def test_a_tensor_without_weights_has_no_step(self):
        guide, net = _posterior()
        net[0].weight.data.zero_()
        assert list(quantization_steps(guide, net, lambda net: 0.0, 1.0)) == ["3.weight", "3.bias"]

    def test_weights_far_wider_than_sigma_can_be_stored(self):
        guide, net = _posterior((-70.0, -70.0))
        values = iter([0.0] + [1.0] * 40 + [0.0, 0.0])  # only the last and narrowest will do
        steps = quantization_steps(guide, net, lambda net: next(values), 0.5)
        assert all(to_multiples(n, net.get_parameter(n), s).abs().max() < 2**24 for n, s in steps.items())

    def test_nothing_given_is_changed(self):
        guide, net = _posterior()
        before = copy.deepcopy((guide.state_dict(), net.state_dict()))
        net.train()
        quantization_steps(guide, net, lambda net: 0.0, 1.0)
        assert net.training
        for old, new in zip(before, (guide.state_dict(), net.state_dict()), strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old)

    def test_sites_of_a_network_in_a_model_of_ones_own_have_its_steps(self):
        net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
        model = _Own(net)
        guide = svd.AutoSparseNormal(model)
        guide(torch.zeros(1, 6))
        assert set(guide.posteriors) == {"slope", "bnn.0.weight", "bnn.1.weight"}
        small = svd.prune(model.bnn, guide, svd.sparsify(guide, math.inf))
        steps = quantization_steps(guide, small, _distance(small), 1e-2)
        assert list(steps) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def _constant(value, other=None):
    values = iter([value, *([value if other is None else other] * 100)])
    return lambda net: next(values)


BAD = {
    "zero": (_constant(1.0), 0.0, "tolerance: expected a positive and finite number of nats, but got 0.0"),
    "negative": (_constant(1.0), -1.0, "tolerance: expected a positive .* got -1.0"),
    "nan": (_constant(1.0), math.nan, "tolerance: expected a positive .* got nan"),
    "infinite": (_constant(1.0), math.inf, "tolerance: expected a positive .* got inf"),
    "nll": (_constant(math.nan), 1.0, "nll: expected a finite number for the network, but got nan"),
    "too strict": (_constant(1.0, 2.0), 0.5, "tolerance: expected steps that raise .* even those of 0.00390625 σ"),
    "nan after": (_constant(1.0, math.nan), 0.5, "even those of"),
}

BAD_STEPS = {
    "name": ({"wait": 0.1}, "steps: expected parameters of the network, of weight, bias, but got 'wait'"),
    "zero": ({"weight": 0.0}, "weight: expected a positive and finite step, but got 0.0"),
    "negative": ({"weight": -1.0}, "weight: expected a positive and finite step, but got -1.0"),
    "nan": ({"weight": math.nan}, "weight: expected a positive and finite step, but got nan"),
    "infinite": ({"weight": 1e39}, "weight: expected a positive and finite step, but got inf"),
    "underflow": ({"weight": 1e-60}, "weight: expected a positive and finite step, but got 0.0"),
    "narrow": ({"bias": 1e-9}, "bias: expected values below 0.0167772, 2.24 times the step, but got 1; use a larger"),
}


class TestRefusals:
    @pytest.mark.parametrize(("nll", "tolerance", "message"), BAD.values(), ids=BAD)
    def test_bad_tolerances_are_refused(self, nll, tolerance, message):
        with pytest.raises(ValueError, match=message):
            quantization_steps(*_posterior(), nll, tolerance)

    def test_a_guide_of_another_network_is_refused(self):
        guide, _ = _posterior()
        with pytest.raises(
            ValueError, match=r"guide: expected the sites of the network, of weight, bias, but it has 0"
        ):
            quantization_steps(guide, nn.Linear(2, 2), lambda net: 0.0, 1.0)
        shrunk = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))
        with pytest.raises(ValueError, match=r"0\.weight: expected a weight of the posterior's shape \(5, 6\).*shrunk"):
            quantization_steps(guide, shrunk, lambda net: 0.0, 1.0)

    @pytest.mark.parametrize(("steps", "message"), BAD_STEPS.values(), ids=BAD_STEPS)
    def test_bad_steps_are_refused(self, steps, message):
        net = nn.Linear(3, 2)
        net.bias.data.fill_(1.0)
        with pytest.raises(ValueError, match=message):
            quantized(net, steps)

    def test_a_bayesian_network_is_refused(self, device):
        bnn = svd.bayesianize(nn.Linear(3, 2).to(device))
        with pytest.raises(
            TypeError, match="net: expected a deterministic network, but it is Bayesian; prune it first"
        ):
            quantized(bnn, {})

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_weights_that_are_not_finite_are_refused(self, value):
        net = nn.Linear(3, 2)
        net.weight.data[0, 0] = value
        with pytest.raises(ValueError, match="weight: expected"):
            quantized(net, {"weight": 0.1})


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
    def test_rounding_is_to_the_nearest_multiple(self, dtype):
        net = nn.Linear(9, 7).to(dtype)
        rounded = quantized(net, {"weight": 0.0625})
        assert torch.equal(rounded.bias, net.bias)
        twin = torch.tensor([[round(w / 0.0625) * 0.0625 for w in row] for row in net.weight.tolist()], dtype=dtype)
        assert torch.equal(rounded.weight, twin)
        assert from_multiples(torch.tensor([3]), 0.1, dtype).dtype == dtype

    def test_a_network_that_keeps_what_it_computed_is_rounded(self, device):
        net = nn.Linear(3, 2).to(device)
        net.last = net(torch.ones(1, 3, device=device))
        assert torch.equal(quantized(net, {}).last, net.last)
