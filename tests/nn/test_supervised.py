"""A network as a model of data sets of any size."""

import copy
import pickle
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule
from torch import nn

import pyro_sparsevd as svd
from checks import stored_tensors
from problems import normal_rows, regression_model


def categorical(output):
    return dist.Categorical(logits=output)


@pytest.mark.parametrize("size", [1, 7, 100])
@pytest.mark.parametrize(
    ("likelihood", "make_target"),
    [(normal_rows, lambda n: torch.randn(n, 3)), (categorical, lambda n: torch.arange(n) % 3)],
    ids=["normal", "categorical"],
)
def test_log_likelihood_of_a_batch_is_scaled_to_the_data_set(size, likelihood, make_target, device):
    model = regression_model(device, 100, likelihood)
    x, y = torch.randn(size, 4, device=device), make_target(size).to(device)
    trace = poutine.trace(model).get_trace(x, y)
    trace.compute_log_prob()
    site = trace.nodes["y"]
    assert site["is_observed"]
    assert site["scale"] == pytest.approx(100 / size)
    assert [frame.name for frame in site["cond_indep_stack"]] == ["data"]
    weight = trace.nodes["weight"]
    output = x @ weight["value"].T + model.network.bias
    expected = 100 / size * likelihood(output).log_prob(y).sum()
    torch.testing.assert_close(site["log_prob_sum"], expected)
    assert weight["scale"] == 1.0


def test_weights_keep_the_names_of_the_network_and_parameters_too(device):
    model = regression_model(device, net=nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)))
    trace = poutine.trace(model, param_only=False).get_trace(torch.randn(2, 4, device=device))
    assert [n for n in trace.stochastic_nodes if n.endswith("weight")] == ["0.weight", "1.weight"]
    assert trace.param_nodes == ["0.bias", "1.bias"]
    assert [name for name, _ in model.named_parameters()] == ["network.0.bias", "network.1.bias"]


def test_model_returns_the_output_of_the_network(device):
    model = regression_model(device)
    x = torch.randn(6, 4, device=device)
    weight = torch.randn(3, 4, device=device)
    for y in (None, torch.zeros(6, 3, device=device)):
        output = poutine.condition(model, data={"weight": weight})(x, y)
        torch.testing.assert_close(output, x @ weight.T + model.network.bias)


@pytest.mark.parametrize("size", [1, 10, 11, 250])
def test_prediction_takes_any_number_of_inputs(size, device):
    model = regression_model(device, num_data=10)
    trace = poutine.trace(model).get_trace(torch.randn(size, 4, device=device))
    assert trace.nodes["y"]["value"].shape == (size, 3)
    assert not trace.nodes["y"]["is_observed"]
    assert trace.nodes["_RETURN"]["value"].shape == (size, 3)


def test_likelihood_may_have_sample_dimensions_left_of_the_data(device):
    model = regression_model(device, likelihood=lambda output: normal_rows(output.expand(5, *output.shape)))
    trace = poutine.trace(model).get_trace(torch.randn(6, 4, device=device), torch.randn(6, 3, device=device))
    trace.compute_log_prob()
    assert trace.nodes["y"]["log_prob"].shape == (5, 6)


@pytest.mark.parametrize("num_data", [0, -5, 2.5, 100.0, None, "100", torch.tensor(3)], ids=repr)
def test_bad_size_of_the_data_set_is_refused(num_data, device):
    with pytest.raises(ValueError, match=re.escape(f"num_data, a positive integer, but got {num_data!r}")):
        regression_model(device, num_data)


@pytest.mark.parametrize("network", [nn.Linear(4, 3), lambda x: x, None], ids=["module", "function", "none"])
def test_network_that_is_not_bayesian_is_refused(network):
    with pytest.raises(TypeError, match=rf"network = bayesianize\(net\), but got {type(network).__name__}"):
        svd.Supervised(network, normal_rows, 10)


@pytest.mark.parametrize("likelihood", [None, "normal", 1.0], ids=["none", "str", "float"])
def test_likelihood_that_is_no_function_is_refused(likelihood, device):
    with pytest.raises(TypeError, match=f"expected a callable likelihood, but got {type(likelihood).__name__}"):
        svd.Supervised(svd.bayesianize(nn.Linear(4, 3).to(device)), likelihood, 10)


@pytest.mark.parametrize(
    ("inputs", "targets", "text"),
    [
        (0, 0, "x: expected at least one datum, but got an empty batch"),
        (0, None, "x: expected at least one datum, but got an empty batch"),
        (5, 4, "x and y: expected as many targets as inputs, but got 5 and 4"),
        (1, 5, "x and y: expected as many targets as inputs, but got 1 and 5"),
        (101, 101, "num_data: expected the size of the whole data set, but got 100 and a batch of 101"),
    ],
)
def test_bad_batches_are_refused(inputs, targets, text, device):
    x = torch.zeros(inputs, 4, device=device)
    y = None if targets is None else torch.zeros(targets, 3, device=device)
    with pytest.raises(ValueError, match=re.escape(text)):
        regression_model(device)(x, y)


@pytest.mark.parametrize(
    ("likelihood", "shape"),
    [
        (lambda output: dist.Normal(output, 1.0), (6, 3)),
        (lambda output: dist.Normal(output, 1.0).to_event(2), ()),
        (lambda output: dist.Normal(output.T, 1.0).to_event(1), (3,)),
        (lambda output: dist.Normal(output[:1], 1.0).to_event(1), (1,)),
        (lambda output: dist.Normal(0.0, 1.0), ()),
    ],
    ids=["forgotten event", "too many event dimensions", "transposed", "one for all", "constant"],
)
@pytest.mark.parametrize("observed", [True, False], ids=["observed", "predicted"])
def test_likelihood_of_another_batch_shape_is_refused(likelihood, shape, observed, device):
    x, y = torch.zeros(6, 4, device=device), torch.zeros(6, 3, device=device)
    text = f"likelihood: expected one distribution per datum, batch_shape (..., 6), but got {shape}; .to_event(n)"
    with pytest.raises(ValueError, match=re.escape(text)):
        regression_model(device, likelihood=likelihood)(x, y if observed else None)


ONE = torch.zeros(5, 4)


LOSSES = [nn.MSELoss(), torch.nn.functional.mse_loss, dist.Normal, dist.Bernoulli, nn.MSELoss, lambda out, y: None]


@pytest.mark.parametrize("likelihood", LOSSES)
def test_a_loss_or_a_class_is_no_likelihood(likelihood):
    with pytest.raises(
        TypeError, match=r"^Supervised: expected a likelihood, .*; write a function such as lambda out:"
    ):
        svd.Supervised(svd.bayesianize(nn.Linear(4, 3)), likelihood, 10)


def test_a_likelihood_that_returns_no_distribution_is_refused():
    with pytest.raises(TypeError, match="expected a function that returns a distribution, but it gave Tensor"):
        regression_model("cpu", likelihood=lambda output: output)(ONE)


class Application(PyroModule):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, *args):
        return self.part(*args)


@pytest.mark.parametrize("part", ["network", "layer"])
def test_a_used_network_that_another_module_takes_in_is_refused_by_name(part):
    model = regression_model("cpu", net=nn.Linear(4, 3) if part == "network" else nn.Sequential(nn.Linear(4, 3)))
    model(ONE)
    Application(model.network if part == "network" else model.network[0])
    with pytest.raises(ValueError, match=r"^(0\.)?weight: expected this site to keep its name, .* it part\.weight"):
        model(ONE)


def test_a_model_may_be_taken_in_before_it_is_used():
    application = Application(regression_model("cpu"))
    guide = svd.AutoSparseNormal(application)
    assert list(guide.posteriors) == ["part.network.weight"]
    assert svd.SparseVD_ELBO()(application, guide)(ONE, torch.zeros(5, 3)).isfinite()


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.layer(x.to(next(self.parameters()).device))


def test_a_network_that_asks_for_its_first_parameter_learns_it_has_none():
    with pytest.raises(
        RuntimeError, match=r"^network: expected parameters where it calls next\(self\.parameters\(\)\)"
    ):
        regression_model("cpu", net=Asking())(ONE)


class SavesItself(nn.Linear):
    """A layer that writes its state itself, as torch_geometric's does."""

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}weight"] = self.weight.detach()
        destination[f"{prefix}bias"] = self.bias.detach()


def test_the_state_of_layers_that_write_it_themselves_loads_back():
    model = regression_model("cpu", net=nn.Sequential(SavesItself(4, 3)))
    for module in (model, copy.deepcopy(model), model.network):
        assert not any(name.endswith("weight") for name in module.state_dict())
        assert str(module.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    guide = svd.AutoSparseNormal(model)
    pruned = svd.prune(model.network, guide, svd.sparsify(guide))
    assert list(pruned.state_dict()) == ["0.weight", "0.bias"]
    assert not pruned._state_dict_hooks


def test_frozen_parameters_stay_frozen_outside_of_a_supervised_too():
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    net[0].bias.requires_grad_(False)
    bnn = svd.bayesianize(net, svd.LogUniform(1e-3, 1.0))

    def model(x):
        mean = bnn(x)
        with pyro.plate("data", 5):
            return pyro.sample("y", normal_rows(mean), obs=torch.zeros(5, 3))

    SVI(model, svd.AutoSparseNormal(bnn), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(ONE)
    for network in (bnn, copy.deepcopy(bnn), pickle.loads(pickle.dumps(bnn))):
        network(ONE)
        assert [name for name, p in network.named_parameters() if not p.requires_grad] == ["0.bias"]
    assert "0.bias" not in stored_tensors()
    assert torch.equal(bnn[0].bias, net[0].bias)
    assert not torch.equal(bnn[1].bias, net[1].bias)
