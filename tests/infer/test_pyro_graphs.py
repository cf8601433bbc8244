"""Pictures of models, and discrete latents beside sparse ones."""

import math
import sys
import types
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate, infer_discrete
from pyro.infer.autoguide import AutoDiscreteParallel, AutoGuideList, init_to_value
from pyro.infer.discrete import TraceEnumSample_ELBO
from pyro.infer.inspect import get_dependencies, get_model_relations
from torch import Tensor, nn

from checks import state_of, svi_of
from problems import regression_data, small_model
from pyro_models import GUIDES, SMALL_WEIGHTS
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseVD_ELBO

pytestmark = pytest.mark.usefixtures("double", "on_device")


class _Drawing:
    """What ``graphviz.Digraph`` is to Pyro: a record of what was drawn."""

    def __init__(self, name: str = "") -> None:
        self.name, self.nodes, self.edges, self.parts = name, [], [], []

    def node(self, name: str, **style: str) -> None:
        self.nodes.append((name, style.get("fillcolor")))

    def edge(self, source: str, target: str) -> None:
        self.edges.append((source, target))

    def attr(self, **style: str) -> None:
        pass

    def subgraph(self, part: "_Drawing") -> None:
        self.parts.append(part)


class TestPictures:
    def test_relations_of_a_network_are_weights_to_targets_in_the_data_plate(self, improper):
        x, y = regression_data()
        relations = get_model_relations(small_model(), (x, y))
        assert relations["sample_sample"] == {"0.weight": [], "2.weight": [], "y": list(SMALL_WEIGHTS)}
        assert relations["sample_dist"] == {"0.weight": "LogUniform", "2.weight": "LogUniform", "y": "Normal"}
        assert relations["plate_sample"] == {"data": ["y"]}
        assert relations["observed"] == ["y"]

    def test_relations_of_the_guide_are_its_parameters_to_its_sites(self):
        guide = AutoSparseNormal(small_model())
        relations = get_model_relations(guide, regression_data())
        assert relations["sample_dist"] == dict.fromkeys(SMALL_WEIGHTS, "SparseNormal")
        assert relations["sample_sample"] == {name: [] for name in SMALL_WEIGHTS}
        assert relations["sample_param"] == {
            name: [f"AutoSparseNormal.{kind}.{name}" for kind in ("locs", "log_variances")] for name in SMALL_WEIGHTS
        }
        assert relations["observed"] == []

    def test_looking_at_relations_leaves_guide_and_model_usable(self, improper):
        model = small_model()
        guide = AutoSparseNormal(model)
        x, y = regression_data()
        get_model_relations(model, (x, y))
        get_model_relations(guide, (x, y))
        assert {type(p) for p in (*guide.parameters(), *model.parameters())} == {nn.Parameter}
        before = state_of(guide)
        svi_of(model, guide).step(x, y)
        assert all((value != before[name]).all() for name, value in state_of(guide).items())

    def test_every_weight_depends_on_every_other_in_the_posterior(self, improper):
        dependencies = get_dependencies(small_model(), regression_data())
        assert dependencies["prior_dependencies"] == {
            "0.weight": {"0.weight": set()},
            "2.weight": {"2.weight": set()},
            "y": {"y": set(), "0.weight": set(), "2.weight": set()},
        }
        assert dependencies["posterior_dependencies"]["0.weight"].keys() == {"0.weight", "2.weight", "y"}

    @pytest.mark.parametrize("params", [False, True])
    def test_a_network_is_drawn(self, params, improper, monkeypatch):
        monkeypatch.setitem(sys.modules, "graphviz", types.SimpleNamespace(Digraph=_Drawing))
        drawing = pyro.render_model(small_model(), regression_data(), render_distributions=True, render_params=params)
        assert {("0.weight", "white"), ("2.weight", "white")} <= set(drawing.nodes)
        assert [(part.name, part.nodes) for part in drawing.parts] == [("cluster_data", [("y", "gray")])]
        assert {("0.weight", "y"), ("2.weight", "y")} <= set(drawing.edges)

    def test_a_guide_is_drawn_with_its_parameters(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "graphviz", types.SimpleNamespace(Digraph=_Drawing))
        drawing = pyro.render_model(AutoSparseNormal(small_model()), regression_data(), render_params=True)
        assert set(drawing.edges) == {
            (f"AutoSparseNormal.{kind}.{name}", name) for kind in ("locs", "log_variances") for name in SMALL_WEIGHTS
        }


@config_enumerate
def _mixture(y: Tensor) -> None:
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", LogUniform(1e-3, 10.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("y", dist.Normal(loc[..., k], 0.5), obs=y)


MIXTURE_Y = [-2.0, 2.0, 2.1, -1.9, 2.2]


class TestDiscreteLatents:
    @pytest.mark.parametrize("make", GUIDES)
    def test_enumerated_latents_beside_the_guide_are_inferred(self, make):
        y = torch.tensor(MIXTURE_Y)
        start = init_to_value(values={"loc": torch.tensor([-1.0, 1.0])})
        guide = make(poutine.block(_mixture, hide=["k"]), init_loc_fn=start)
        svi = svi_of(_mixture, guide, TraceEnum_ELBO(max_plate_nesting=1), rate=0.1)
        for _ in range(60):
            svi.step(y)
        assert set(guide(y)) == {"loc"}
        torch.testing.assert_close(guide.median()["loc"], torch.tensor([-1.95, 2.1]), rtol=0, atol=0.4)
        expected = [0, 1, 1, 0, 1]
        for temperature in (0, 1):
            for known in (
                poutine.condition(_mixture, data=guide.median()),
                poutine.replay(_mixture, trace=poutine.trace(guide).get_trace(y)),
            ):
                inferred = infer_discrete(known, first_available_dim=-2, temperature=temperature)
                assert poutine.trace(inferred).get_trace(y).nodes["k"]["value"].tolist() == expected

    @pytest.mark.parametrize("make", GUIDES)
    def test_discrete_latents_are_sampled_with_the_enumerating_bound(self, make):
        y = torch.tensor(MIXTURE_Y)
        start = init_to_value(values={"loc": torch.tensor([-2.0, 2.0])})
        guide = make(poutine.block(_mixture, hide=["k"]), init_loc_fn=start)
        elbo = TraceEnumSample_ELBO(max_plate_nesting=1)
        assert math.isfinite(elbo.loss(_mixture, guide, y))
        elbo.sample_saved()

    @pytest.mark.parametrize("hidden", [True, False], ids=["no part of the guide", "a part of the guide"])
    def test_the_sparse_bound_refuses_enumerated_latents_by_name(self, hidden):
        y = torch.tensor(MIXTURE_Y)
        guide: Any = AutoSparseNormal(poutine.block(_mixture, hide=["k"]))
        if not hidden:
            part, guide = guide, AutoGuideList(_mixture)
            guide.append(part)
            guide.append(AutoDiscreteParallel(poutine.block(_mixture, expose=["k"])))
        guide(y)
        assert math.isfinite(TraceEnum_ELBO(max_plate_nesting=1).loss(_mixture, guide, y))
        with pytest.raises(ValueError, match=r"^k: expected"):
            SparseVD_ELBO().loss(_mixture, guide, y)

    def test_the_sparse_bound_takes_a_model_whose_discrete_latents_are_known(self):
        y = torch.tensor(MIXTURE_Y)
        known = poutine.condition(_mixture, data={"k": torch.tensor([0, 1, 1, 0, 1])})
        guide = AutoSparseNormal(known, init_loc_fn=init_to_value(values={"loc": torch.tensor([-1.0, 1.0])}))
        svi = svi_of(known, guide, rate=0.1)
        for _ in range(60):
            svi.step(y)
        torch.testing.assert_close(guide.median()["loc"], torch.tensor([-1.95, 2.1]), rtol=0, atol=0.4)
