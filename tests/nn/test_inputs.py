"""Inputs, targets and outputs of a Supervised that are not one tensor."""

import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_sparsevd as svd
from inputs import KINDS, TextClassifier, moved
from problems import regression_model

EXAMPLE = torch.zeros(5, 4)


@pytest.mark.parametrize("observed", [True, False], ids=["observed", "predicted"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_inputs_of_any_kind_reach_the_network_and_give_the_batch_size(kind, observed, device):
    x, y = moved(kind.make(), device), torch.arange(kind.size, device=device) % 3
    net = kind.network().to(device)
    model = svd.Supervised(svd.bayesianize(net), lambda out: dist.Categorical(logits=kind.logits(out)), num_data=100)
    guide = svd.AutoSparseNormal(model)
    with torch.no_grad():
        weights = {name: posterior.loc for name, posterior in guide.posteriors.items()}  # those of the network
        conditioned = poutine.condition(model, data=weights)
        trace = poutine.trace(conditioned).get_trace(x, y if observed else None)
        trace.compute_log_prob()
        expected = kind.logits(kind.by_hand(net, x))
    site = trace.nodes["y"]
    torch.testing.assert_close(site["fn"].logits, dist.Categorical(logits=expected).logits)
    assert site["scale"] == 100 / kind.size
    assert [(frame.name, frame.size) for frame in site["cond_indep_stack"]] == [("data", kind.size)]
    if observed:
        log_prob = dist.Categorical(logits=expected).log_prob(y).sum()
        torch.testing.assert_close(site["log_prob_sum"], 100 / kind.size * log_prob)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_inputs_of_any_kind_train_predict_and_prune(kind, device):
    x, y = moved(kind.make(), device), torch.arange(kind.size, device=device) % 3
    bnn = svd.bayesianize(kind.network().to(device))
    model = svd.Supervised(bnn, lambda out: dist.Categorical(logits=kind.logits(out)), num_data=kind.size)
    guide = svd.AutoSparseNormal(model)
    loss = svd.SparseVD_ELBO()(model, guide)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    before = loss(x, y).item()
    for _ in range(3):
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()
    assert loss(x, y).item() < before
    assert pyro.infer.Predictive(model, guide=guide, num_samples=2)(x)["y"].shape == (2, kind.size)
    (point,) = svd.threshold_sweep(model, guide, [(x, y)], [3.0])
    assert 0 < point.nll < float("inf")
    pruned = svd.prune(bnn, guide, svd.sparsify(guide, -50.0))
    logits = kind.logits(kind.by_hand(pruned, x))
    assert logits.shape == (kind.size, 3)
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))  # no weight is left


INPUTS = {  # inputs, and what is said
    "array": (
        EXAMPLE.numpy(),
        TypeError,
        "x: expected a tensor, or a tuple or dictionary of tensors, but got ndarray; make numbers a",
    ),
    "object": (nn.ReLU(), TypeError, "x: expected a tensor, or a tuple or dictionary of tensors, but got ReLU; make"),
    "array in a tuple": ((EXAMPLE, EXAMPLE.numpy()), TypeError, "x[1]: expected a tensor, or a tuple or dictionary of"),
    "array in a dictionary": ({"a": {"b": EXAMPLE.numpy()}}, TypeError, "x['a']['b']: expected a tensor, or a tuple"),
    "numbers": ({"a": [1.0]}, ValueError, "x: expected at least one tensor, but got {'a': [1.0]}"),
    "empty tuple": ((), ValueError, "x: expected at least one tensor, but got ()"),
    "scalar": (torch.tensor(1.0), ValueError, "x: expected a tensor of shape (M, ...), but got a scalar"),
    "scalars": ((torch.tensor(1.0), 3), ValueError, "x: expected a tensor of shape (M, ...), but got a scalar"),
    "empty": ((EXAMPLE[:0], 3), ValueError, "x: expected at least one datum, but got an empty batch"),
    "some names": ({"input": EXAMPLE, "labels": EXAMPLE}, TypeError, "x: expected keys that are the parameters of the"),
}


@pytest.mark.parametrize(("x", "error", "message"), INPUTS.values(), ids=INPUTS)
def test_inputs_of_another_kind_are_refused_by_name(x, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        regression_model("cpu")(x)


def test_an_input_on_another_device_is_named(device):
    x = moved(KINDS["encoding"].make(), device)
    net = svd.bayesianize(TextClassifier().to(device))
    model = svd.Supervised(net, lambda out: dist.Categorical(logits=out.logits), num_data=6)
    x["attention_mask"] = x["attention_mask"].to("meta")
    with pytest.raises(ValueError, match=rf"^x\['attention_mask'\]: expected a tensor on {device}.* is on meta"):
        svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))(x, torch.zeros(6, device=device))


@pytest.mark.parametrize("targets", [4, 0])
def test_targets_of_several_inputs_are_as_many_as_distributions(targets):
    kind = KINDS["tuple"]
    model = regression_model("cpu", net=kind.network())
    with pytest.raises(ValueError, match=re.escape(f"(..., {targets}), but got (6,)")):
        model(kind.make(), torch.zeros(targets, 3))


def test_a_likelihood_of_no_data_is_refused():
    model = regression_model("cpu", net=KINDS["tuple"].network(), likelihood=lambda out: dist.Normal(out[:0, 0], 1.0))
    with pytest.raises(ValueError, match=re.escape("(..., M), but got (0,)")):
        model(KINDS["tuple"].make())


def test_a_forgotten_event_dimension_is_found_with_several_inputs():
    kind = KINDS["tuple"]
    model = regression_model("cpu", net=kind.network(), likelihood=lambda out: dist.Normal(out, 1.0))
    with pytest.raises(ValueError, match=re.escape("batch_shape (..., 6), but got (6, 3); .to_event(n)")):
        model(kind.make(), torch.zeros(6, 3))


@pytest.mark.parametrize(
    "likelihood",
    [lambda out: dist.Categorical(logits=out), svd.GaussianLikelihood(), lambda out: dist.Normal(2 * out, 1.0)],
    ids=["categorical", "Gaussian", "arithmetic"],
)
def test_a_likelihood_that_expects_a_tensor_learns_what_the_output_is(likelihood):
    model = svd.Supervised(svd.bayesianize(TextClassifier(), svd.LogUniform(1e-3, 1.0)), likelihood, num_data=10)
    with pytest.raises((TypeError, ValueError), match=r"^likelihood: .* no tensor but Output: .*logits=out\.logits\)"):
        model(KINDS["encoding"].make())


def test_an_error_of_a_likelihood_that_gets_a_tensor_stays_as_it_is():
    with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'logits'"):
        regression_model("cpu", likelihood=lambda out: dist.Categorical(logits=out.logits))(EXAMPLE)


def _log_prob(likelihood, y, dtype=torch.float32):
    """Returns the value of the site, and the log probability of targets for given weights."""
    model = regression_model("cpu", likelihood=likelihood, net=nn.Linear(4, 3, bias=False)).to(dtype)
    weight = {"weight": torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4)}
    trace = poutine.trace(poutine.condition(model, data=weight)).get_trace(torch.ones(5, 4, dtype=dtype), y)
    trace.compute_log_prob()
    return trace.nodes["y"]["value"], trace.nodes["y"]["log_prob_sum"]


LIKELIHOODS = {
    "normal": lambda out: dist.Normal(out[:, 0], 1.0),
    "Student t": lambda out: dist.StudentT(3.0, out[:, 0], 1.0),
    "Bernoulli": lambda out: dist.Bernoulli(logits=out[:, 0]),
    "masked Bernoulli": lambda out: dist.Bernoulli(logits=out[:, 0]).mask(torch.arange(5) > 0),
    "Poisson": lambda out: dist.Poisson(out[:, 0].exp()),
    "without a mean": lambda out: dist.TransformedDistribution(
        dist.Normal(out[:, 0], 1.0), [dist.transforms.AffineTransform(0.0, 2.0)]
    ),
    "categorical": lambda out: dist.Categorical(logits=out),
    "masked categorical": lambda out: dist.Categorical(logits=out).mask(torch.arange(5) > 0),
    "rows": lambda out: dist.Bernoulli(logits=out).to_event(1),
}
CLASSES = [0, 1, 1, 0, 1]
TARGETS = {
    "truth values": torch.tensor(CLASSES).bool(),
    "integers": torch.tensor(CLASSES),
    "bytes": torch.tensor(CLASSES).byte(),
    "list": CLASSES,
    "list of truth values": [bool(y) for y in CLASSES],
    "tuple of numbers": tuple(map(float, CLASSES)),
    "array": np.array(CLASSES),
    "array of doubles": np.array(CLASSES, float),
    "array of half precision": np.array(CLASSES, np.float16),
    "array of the other byte order": np.array(CLASSES, ">f4"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_targets_of_any_kind_count_as_floating_point_ones(name, dtype):
    expected = torch.tensor(CLASSES, dtype=dtype)
    expected = expected[:, None].expand(5, 3) if name == "rows" else expected
    for y in TARGETS.values():
        if name == "rows":
            y = y[:, None].expand(5, 3) if isinstance(y, torch.Tensor) else np.array(y)[:, None].repeat(3, 1).tolist()
        value, found = _log_prob(LIKELIHOODS[name], y, dtype)
        torch.testing.assert_close(found, _log_prob(LIKELIHOODS[name], expected, dtype)[1])
        assert found.dtype == dtype
        assert value.dtype == dtype or "categorical" in name


@pytest.mark.parametrize("name", ["categorical", "masked categorical"])
def test_labels_keep_their_type(name):
    assert _log_prob(LIKELIHOODS[name], torch.tensor(CLASSES))[0].dtype == torch.long


def test_precise_targets_of_a_list_stay_precise():
    value, _ = _log_prob(LIKELIHOODS["normal"], [0.1] * 5, torch.float64)
    assert value.tolist() == [0.1] * 5


def test_counts_in_half_precision_are_not_rounded():
    value, _ = _log_prob(LIKELIHOODS["Poisson"], torch.tensor([257] * 5), torch.bfloat16)
    assert value.tolist() == [257.0] * 5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_tensors_of_another_floating_point_type_are_left_as_they_are(dtype):
    y = torch.ones(5, dtype=dtype)
    assert _log_prob(LIKELIHOODS["normal"], y)[0] is y


def test_bytes_at_the_largest_count_do_not_overflow():
    byte, count = (_log_prob(LIKELIHOODS["Poisson"], y)[1] for y in (torch.tensor([255] * 5).byte(), [255.0] * 5))
    torch.testing.assert_close(byte, count)


BAD_TARGETS = {  # targets, and what is said
    "number": (1.0, ValueError, "x and y: expected as many targets as inputs, but got 5 and a scalar"),
    "tuple of tensors": (
        (EXAMPLE[0], EXAMPLE[0]),
        TypeError,
        "y: expected one tensor, but got a tuple of tensors;",
    ),
    "dictionary of tensors": (
        {"a": EXAMPLE},
        TypeError,
        "y: expected one tensor, but got a dict of tensors;",
    ),
    "strings": (["a"] * 5, TypeError, "y: expected a tensor, a NumPy array or a list of numbers, but got list of <U1"),
    "None in a list": (
        [None] * 5,
        TypeError,
        "y: expected a tensor, a NumPy array or a list of numbers, but got list",
    ),
    "complex": (
        [1j] * 5,
        TypeError,
        "y: expected a tensor, a NumPy array or a list of numbers, but got list of comp",
    ),
    "object": (
        nn.ReLU(),
        TypeError,
        "y: expected a tensor, a NumPy array or a list of numbers, but got ReLU of obj",
    ),
    "rows of other lengths": ([[1.0], [1.0, 2.0]], ValueError, "y: expected targets of one shape, but got a list of"),
    "list of another length": ([1.0] * 4, ValueError, "x and y: expected as many targets as inputs, but got 5 and 4"),
    "list of another shape": ([1.0] * 5, ValueError, "y: expected targets of shape (5, 3), but got (5,)"),
}


@pytest.mark.parametrize(("y", "error", "message"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_targets_of_another_kind_are_refused_by_name(y, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        regression_model("cpu")(EXAMPLE, y)
