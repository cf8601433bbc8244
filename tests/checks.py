"""What many tests do with a model, a guide or a tensor: seeds, states, copies and comparisons."""

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import biject_to

import pyro_sparsevd as svd
from pyro_sparsevd import AutoSparseNormal, SparseVD_ELBO

SIGMAS = 5


def values_of(*modules: nn.Module) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def seeded(function: Callable, *args: Any, seed: int = 5, **kwargs: Any) -> Any:
    pyro.set_rng_seed(seed)
    return function(*args, **kwargs)


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def differentiable_loss(elbo: SparseVD_ELBO, model: Callable, guide: Callable, *args: Any) -> Tensor:
    return elbo.differentiable_loss(model, guide, *args)


def gradients_of(loss: Tensor, guide: Callable) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(guide.parameters()))) if isinstance(guide, nn.Module) else []


def stored_values() -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in pyro.get_param_store().named_parameters()}


def take_steps(model: Callable, guide: Callable, data: tuple, steps: int = 3) -> None:
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), SparseVD_ELBO())
    for _ in range(steps):
        svi.step(*data)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_values(first: Any, second: Any) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def deep_copy(guide: Any) -> Any:
    return copy.deepcopy(guide)


def deep_copy_with_model(guide: Any) -> Any:
    return guide.copy_with_same_model()


def pickled(guide: Any) -> Any:
    return pickle.loads(pickle.dumps(guide))


def torch_saved(guide: Any) -> Any:
    file = io.BytesIO()
    torch.save(guide, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [deep_copy, deep_copy_with_model, pickled, torch_saved]


def spread_means(guide: AutoSparseNormal) -> None:
    """Gives every element a mean of its own, and no variance to speak of."""
    with torch.no_grad():
        for q in guide.posteriors.values():
            q.loc.copy_(torch.arange(q.loc.numel(), dtype=q.loc.dtype).reshape(q.loc.shape) / 100)
            q.log_variance.fill_(-80)


def named(*values: Any) -> list[Any]:
    return [pytest.param(value, id=type(value).__name__) for value in values]


def spread_of(guide: AutoGuide, name: str) -> Tensor:
    """Returns the standard deviation of a site in unconstrained space, as its parameter holds it."""
    if isinstance(guide, AutoSparseNormal):
        return guide.posteriors[name].scale
    return guide._get_loc_and_scale(name)[1]


def mean_of(guide: AutoGuide, name: str) -> Tensor:
    if isinstance(guide, AutoSparseNormal):
        return guide.posteriors[name].loc
    return guide._get_loc_and_scale(name)[0]


def set_posterior(guide: AutoGuide, name: str, loc: Any, scale: Any) -> None:
    """Writes mean and standard deviation of a site in unconstrained space into the parameters of a guide."""
    parameters = dict(guide.named_parameters())
    scale = torch.as_tensor(scale).expand(parameters[f"locs.{name}_unconstrained"].shape)
    with torch.no_grad():
        parameters[f"locs.{name}_unconstrained"].copy_(torch.as_tensor(loc))
        if isinstance(guide, AutoSparseNormal):
            parameters[f"log_variances.{name}_unconstrained"].copy_(2 * scale.log())
        else:
            unconstrained = biject_to(guide.scale_constraint).inv(scale)
            parameters[f"scales.{name}_unconstrained"].copy_(unconstrained)


def svi_of(model: Callable, guide: Callable, elbo: Any = None, rate: float = 0.05) -> SVI:
    return SVI(model, guide, pyro.optim.Adam({"lr": rate}), SparseVD_ELBO() if elbo is None else elbo)


def stored_names() -> list[str]:
    return sorted(pyro.get_param_store().keys())


def matrices_of(net):
    return [name for name, p in net.named_parameters() if p.dim() > 1]


def sites_of(bnn, *inputs):
    """Returns the latents in the order of their use, from a pass with values for none but shapes for all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", svd.ImproperPriorWarning)
        return poutine.trace(bnn).get_trace(*inputs).stochastic_nodes


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def conditioned(bnn, values, *inputs):
    return first_of(poutine.condition(bnn, data=values)(*inputs))


def with_values(net, values):
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, value in values.items():
            net.get_parameter(name).copy_(value)
    return net


def random_values(net, names=None):
    names = matrices_of(net) if names is None else names
    return {name: torch.randn_like(net.get_parameter(name)) for name in names}


def assert_same_function(bnn, net, inputs, names=None, rtol=1e-9):
    """Checks that the Bayesian network with weights given is the network with these weights: its own and others."""
    names = matrices_of(net) if names is None else names
    own = {name: net.get_parameter(name).detach() for name in names}
    for values in (own, random_values(net, names)):
        expected = first_of(with_values(net, values)(*inputs))
        torch.testing.assert_close(conditioned(copy.deepcopy(bnn), values, *inputs), expected, rtol=rtol, atol=rtol)


def stored_tensors():
    return dict(pyro.get_param_store().named_parameters())


SAMPLES = 100_000


def assert_mean(samples, expected, name=""):
    """Checks a mean to 5 standard errors, along the first dimension."""
    error = samples.std(0) / math.sqrt(len(samples))
    distance = ((samples.mean(0) - expected).abs() / error.clamp_min(1e-300)).max()
    assert distance < SIGMAS, f"{name}: {distance:.2f} standard errors"


def value_and_gradients(function, *inputs, grad=None):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    value = function(*inputs)
    value.backward(torch.ones_like(value) if grad is None else grad)
    return value.detach(), *(t.grad for t in inputs)
