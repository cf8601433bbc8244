"""The loss: models, guides and options that are refused."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_sparsevd import SparseNormal, SparseVD_ELBO
from pyro_sparsevd.distributions.util import map_tensors


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"kl": "eq14"}, r"kl: expected one of 'approximate', 'exact', 'monte_carlo', but got 'eq14'"),
            ({"kl": None}, r"kl: expected one of"),
            ({"kl_weight": -0.1}, r"kl_weight: expected a finite number, at least 0, but got -0\.1"),
            ({"kl_weight": math.inf}, r"kl_weight: expected a finite number"),
            ({"kl_weight": math.nan}, r"kl_weight: expected a finite number"),
            ({"num_particles": 0}, r"num_particles: expected a positive integer, but got 0"),
            ({"num_particles": 1.5}, r"num_particles: expected a positive integer, but got 1\.5"),
            ({"num_particles": -2}, r"num_particles: expected a positive integer"),
        ],
    )
    def test_options_out_of_range_are_an_error_that_names_them(self, options, message):
        with pytest.raises(ValueError, match=f"^{message}"):
            SparseVD_ELBO(**options)

    @pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
    def test_a_weight_out_of_range_set_later_is_an_error_and_not_taken(self, weight):
        elbo = SparseVD_ELBO(kl_weight=0.5)
        with pytest.raises(ValueError, match=r"^kl_weight: expected a finite number, at least 0, but got"):
            elbo.kl_weight = weight
        assert elbo.kl_weight == 0.5


def _sample(name: str, fn: Any = None, **options: Any) -> Tensor:
    return pyro.sample(name, dist.Normal(0.0, 1.0) if fn is None else fn, **options)


def _both(*functions: Callable) -> Callable:
    def run() -> None:
        for function in functions:
            function()

    return run


def _w() -> None:
    _sample("w")


COIN = dist.Bernoulli(0.5)
ENUMERATED = {"infer": {"enumerate": "parallel"}}


def _normal_model(batch_shape, event_dim, plate=None):
    def model(x):
        with pyro.plate("rows", plate) if plate else nullcontext():
            w = pyro.sample("w", dist.Normal(torch.zeros(batch_shape, device=x.device), 1.0).to_event(event_dim))
        pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=x.sum())

    return model


DISAGREEING = {  # the model, what the guide draws
    "shape": (_normal_model((3, 4), 2), SparseNormal(torch.zeros(1, 4), -2.0).to_event(2)),
    "event": (_normal_model((3, 4), 2), SparseNormal(torch.zeros(3, 4), -2.0).to_event(1)),
    "plate": (_normal_model((), 0, plate=3), SparseNormal(0.0, -2.0)),
}


class TestSites:
    @pytest.mark.parametrize("local_reparam", [True, False])
    @pytest.mark.parametrize(
        ("model", "guide", "message"),
        [
            pytest.param(_both(_w, lambda: _sample("v")), _w, r"^v: expected this latent of the model", id="missing"),
            pytest.param(
                _w, _both(_w, lambda: _sample("v")), r"^v: the guide has this site, but the model", id="extra"
            ),
            pytest.param(
                lambda: _sample("coin", COIN), lambda: _sample("coin", COIN), r"^coin: .*no rsample", id="discrete"
            ),
            pytest.param(
                lambda: _sample("w"),
                lambda: _sample("w", dist.VonMises(0.0, 1.0)),
                r"^w: .*no rsample",
                id="no-rsample",
            ),
            pytest.param(
                lambda: _sample("coin", COIN, **ENUMERATED), lambda: None, r"^coin: ", id="enumerated-in-model-only"
            ),
            pytest.param(
                lambda: _sample("coin", COIN),
                lambda: _sample("coin", COIN, **ENUMERATED),
                r"^coin: .*enumerated; use TraceEnum_ELBO",
                id="enumerated-in-guide",
            ),
            pytest.param(
                lambda: _sample("coin", COIN, **ENUMERATED),
                lambda: _sample("coin", COIN, **ENUMERATED),
                r"^coin: .*enumerated; use TraceEnum_ELBO",
                id="enumerated-in-both",
            ),
            pytest.param(
                lambda: _sample("w", **ENUMERATED),
                lambda: _sample("w", **ENUMERATED),
                r"^w: .*enumerated; use TraceEnum_ELBO",
                id="continuous-enumerated",
            ),
            pytest.param(_both(_w, _w), _w, r"^w: expected a name for every sample site, but two", id="twice-in-model"),
            pytest.param(_w, _both(_w, _w), r"^w: expected a name for every sample site, but two", id="twice-in-guide"),
        ],
    )
    def test_sites_that_do_not_fit_are_an_error_that_names_the_site(self, model, guide, message, local_reparam):
        with pytest.raises(ValueError, match=message):
            SparseVD_ELBO(local_reparam=local_reparam).loss(model, guide)

    def test_a_discrete_site_that_is_observed_is_no_error(self):
        def model():
            logit = _sample("w")
            _sample("coin", dist.Bernoulli(logits=logit), obs=torch.tensor(1.0))

        assert math.isfinite(SparseVD_ELBO().loss(model, _w))

    def test_deterministic_sites_do_not_count(self):
        def model():
            pyro.deterministic("square", _sample("w") ** 2)

        assert SparseVD_ELBO().loss(model, _w) == 0.0

    @pytest.mark.parametrize(("model", "q"), DISAGREEING.values(), ids=DISAGREEING)
    def test_a_guide_of_other_shapes_than_the_model_is_refused(self, model, q, device):
        q = map_tensors(q, lambda t: t.to(device))
        with pytest.raises(
            ValueError, match=r"^w: expected batch shape .* and event shape .* in the guide, as in the model"
        ):
            SparseVD_ELBO().loss(model, lambda x: pyro.sample("w", q), torch.ones(2, device=device))

    def test_an_auxiliary_site_that_is_not_reparameterised_is_refused(self):
        def guide():
            pyro.sample("a", dist.Bernoulli(0.5), infer={"is_auxiliary": True})

        with pytest.raises(
            ValueError, match=r"^a: expected a reparameterised auxiliary site, but Bernoulli has no rsample"
        ):
            SparseVD_ELBO().loss(lambda: None, guide)
