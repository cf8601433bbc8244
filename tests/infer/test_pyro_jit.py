"""Guides and losses traced by torch.jit, into a file that needs no Pyro."""

import io
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO, Predictive, Trace_ELBO
from torch import nn

from checks import mean_of, same_values, seeded, set_posterior, state_of
from problems import regression_data, small_model
from pyro_models import GUIDES, SMALL_WEIGHTS, ZOO
from pyro_sparsevd import LogUniform

pytestmark = pytest.mark.usefixtures("double", "on_device")


traces_with_jit = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit", "ignore:The .grad attribute:UserWarning"
)


def _traced(module: nn.Module, *args: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace_module(module, {"call": args}, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


def _traceable_supports() -> None:
    pyro.sample("positive", dist.LogNormal(0.0, 1.0))
    with pyro.plate("plate", 2):
        pyro.sample("unit", dist.Beta(2.0, 2.0))
        pyro.sample("shares", dist.Dirichlet(torch.ones(3)))


TRACEABLE = [param for param in ZOO if param.id not in ("supports", "subsampled", "subsampled_twice")]


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("make_model", [*TRACEABLE, pytest.param(lambda: _traceable_supports, id="supports")])
@traces_with_jit
def test_a_traced_guide_is_saved_with_its_parameters_and_samples_alike(make, make_model):
    guide = make(make_model())
    guide()
    loaded = _traced(guide)
    assert same_values(state_of(loaded), state_of(guide))
    for value, expected in zip(seeded(loaded.call), seeded(guide.call), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("make", GUIDES)
@traces_with_jit
def test_traced_predictions_are_those_of_the_posterior(make):
    model, (x, y) = small_model(prior=LogUniform(1e-4, 10.0)), regression_data()
    guide = make(model)
    guide(x, y)
    for name in SMALL_WEIGHTS:  # Predictive draws more numbers than its trace does, so that seeds do not compare
        set_posterior(guide, name, mean_of(guide, name), 1e-9)
    predictive = Predictive(model, guide=guide, num_samples=5, return_sites=["_RETURN"])
    torch.testing.assert_close(seeded(_traced(predictive, x).call, x), seeded(predictive.call, x))


@pytest.mark.parametrize("make", GUIDES)
@traces_with_jit
def test_a_traced_bound_takes_the_guide(make):
    model, data = small_model(prior=LogUniform(1e-4, 10.0)), regression_data()
    guide = make(model)
    guide(*data)
    bound = JitTrace_ELBO()
    bound.loss_and_grads(model, guide, *data)  # which traces it, with samples of its own
    expected = seeded(Trace_ELBO().loss_and_grads, model, guide, *data)
    assert seeded(bound.loss_and_grads, model, guide, *data) == pytest.approx(expected)
