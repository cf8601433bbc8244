"""The guide under plates."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.infer.autoguide import AutoGuideList
from pyro.nn import PyroModule, PyroSample
from torch.distributions import biject_to

from checks import COPIES, same_values, seeded, spread_means
from problems import F64, local_model
from pyro_sparsevd import AutoSparseNormal, LogUniform, SparseVD_ELBO

LOCAL_SHAPES = {"z": (20,), "v": (20, 2), "share": (20, 2)}


class TestLocalLatents:
    def test_sites_in_plates_have_a_posterior_for_each_element(self, device):
        zero = torch.zeros((), dtype=F64, device=device)

        def model():
            pyro.sample("outside", dist.Normal(zero, 1.0))
            rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
            with columns:
                pyro.sample("column", dist.Normal(zero, 1.0))
                pyro.sample("share", dist.Dirichlet(torch.ones(5, dtype=F64, device=device)))
            with rows, columns:
                pyro.sample("cell", dist.LogNormal(zero, 1.0))
            with rows:
                pyro.sample("row", LogUniform(1e-3 + zero, 1 + zero).expand([2]).to_event(1))

        guide = AutoSparseNormal(model)
        trace = poutine.trace(guide).get_trace()
        shapes = {"outside": (), "column": (4,), "share": (4, 5), "cell": (3, 4), "row": (3, 1, 2)}
        unconstrained = {**shapes, "share": (4, 4)}
        assert {name: trace.nodes[name]["value"].shape for name in shapes} == shapes
        assert {name: guide.posteriors[name].loc.shape for name in shapes} == unconstrained
        trace.compute_log_prob()
        assert {n: tuple(trace.nodes[n]["log_prob"].shape) for n in shapes} == {
            "outside": (), "column": (4,), "share": (4,), "cell": (3, 4), "row": (3, 1)
        }  # fmt: skip
        frames = {name: {frame.name for frame in trace.nodes[name]["cond_indep_stack"]} for name in shapes}
        assert frames == {
            "outside": set(), "column": {"columns"}, "share": {"columns"}, "cell": {"rows", "columns"}, "row": {"rows"}
        }  # fmt: skip

    def test_local_latents_have_all_parameters_and_values_of_the_subsample(self, device):
        guide = AutoSparseNormal(lambda: local_model(device=device))
        guide()
        assert {name: tuple(q.loc.shape) for name, q in guide.posteriors.items()} == LOCAL_SHAPES
        spread_means(guide)
        trace = poutine.trace(guide).get_trace()
        indices = trace.nodes["data"]["value"]
        assert len(indices) == 4
        for name in ("z", "v"):
            torch.testing.assert_close(trace.nodes[name]["value"], guide.posteriors[name].loc[indices])
        expected = biject_to(constraints.simplex)(guide.posteriors["share"].loc[indices])
        torch.testing.assert_close(trace.nodes["share"]["value"], expected)

    def test_only_the_subsample_of_local_parameters_is_trained(self, device):
        def model():
            local_model(device=device)

        guide = AutoSparseNormal(model)
        guide()
        seen = torch.zeros(20, dtype=torch.bool, device=device)
        svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.01}), SparseVD_ELBO())
        for _ in range(3):
            before = guide.posteriors["z"].loc.clone()
            svi.step()
            changed = guide.posteriors["z"].loc != before
            assert changed.sum() == 4
            seen |= changed
        assert seen.sum() > 4

    def test_medians_of_local_latents_are_of_the_whole_plate(self, device):
        guide = AutoSparseNormal(lambda: local_model(device=device))
        guide()
        spread_means(guide)
        medians = guide.median()
        assert torch.equal(medians["z"], guide.posteriors["z"].loc)
        assert medians["share"].shape == (20, 3)
        assert guide.quantiles([0.1, 0.9])["share"].shape == (2, 20, 3)

    def test_an_optimizer_of_the_early_parameters_trains_them_in_a_plate(self, device):
        class Groups(PyroModule):
            def __init__(self):
                super().__init__()
                self.z = PyroSample(dist.Normal(torch.tensor(0.0, device=device), 1.0))

            def forward(self, y):
                with pyro.plate("groups", 3):
                    pyro.sample("y", dist.Normal(self.z, 0.1), obs=y)

        model = Groups()
        guide = AutoSparseNormal(model)
        loss = SparseVD_ELBO()(model, guide)
        optimizer = torch.optim.Adam(loss.parameters(), 0.1)
        y = torch.tensor([1.0, 2.0, 3.0], device=device)
        for _ in range(200):
            optimizer.zero_grad()
            loss(y).backward()
            optimizer.step()
        torch.testing.assert_close(guide.median()["z"], y / 1.01, rtol=0, atol=0.2)


class TestIndices:
    def test_plates_of_a_guide_without_local_latents_choose_the_models_data(self, device):
        def model(index):
            w = pyro.sample("w", dist.Normal(torch.zeros(3, device=device), 1.0).to_event(1))
            with pyro.plate("data", 10, subsample_size=3, device=device) as chosen:
                seen.append(chosen.tolist())
                pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=torch.arange(10.0, device=device)[chosen])

        guide = AutoSparseNormal(model, create_plates=lambda index: pyro.plate("data", 10, subsample=index))
        seen = []
        index = torch.tensor([7, 1, 4], device=device)
        guide(index)
        seen.clear()
        SparseVD_ELBO()(model, guide)(index)  # runs the model again where it samples a weight for the first time
        assert seen
        assert all(chosen == [7, 1, 4] for chosen in seen)

    def test_create_plates_gives_the_subsample_of_the_data(self, device):
        indices = torch.tensor([3, 17, 5], device=device)
        guide = AutoSparseNormal(
            lambda i: local_model(i, device=device), create_plates=lambda i: pyro.plate("data", 20, subsample=i)
        )
        guide(indices)
        spread_means(guide)
        values = guide(indices)
        torch.testing.assert_close(values["z"], guide.posteriors["z"].loc[indices])
        shorter = guide(indices[:2])
        torch.testing.assert_close(shorter["v"], guide.posteriors["v"].loc[indices[:2]])

    def test_indices_of_the_model_are_its_own_without_a_latent_in_the_plate(self, device):
        def model(indices):
            _plates_of_the_model_alone(indices, device=device)

        guide = AutoSparseNormal(model)
        indices = torch.tensor([3, 17, 5], device=device)
        guide(indices)
        trace = poutine.trace(poutine.replay(model, poutine.trace(guide).get_trace(indices))).get_trace(indices)
        assert torch.equal(trace.nodes["data"]["value"], indices)

    @pytest.mark.parametrize("make_copy", [lambda guide: guide, copy.deepcopy], ids=["itself", "deepcopy"])
    def test_a_plate_without_a_size_is_one_of_the_guides(self, make_copy, device):
        zeros = torch.zeros(5, dtype=F64, device=device)

        def model():
            with pyro.plate("rows", dim=-1):
                z = pyro.sample("z", dist.Normal(zeros, 1.0))
                scale = pyro.sample("scale", dist.LogNormal(zeros, 1.0))
                pyro.sample("y", dist.Normal(z, scale), obs=zeros)

        guide = AutoSparseNormal(model)
        guide()
        trace = poutine.trace(make_copy(guide)).get_trace()
        assert trace.nodes["z"]["value"].shape == trace.nodes["scale"]["value"].shape == (5,)
        assert [frame.name for frame in trace.nodes["z"]["cond_indep_stack"]] == ["rows"]
        assert SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO()).step() > 0

    @pytest.mark.parametrize("make_copy", COPIES)
    def test_a_copy_keeps_its_plates(self, make_copy, device):
        guide = AutoSparseNormal(lambda: local_model(device=device))
        guide()
        spread_means(guide)
        assert same_values(seeded(make_copy(guide)), seeded(guide))


def _plates_of_the_model_alone(indices, *, device):
    zero = torch.zeros((), dtype=F64, device=device)
    w = pyro.sample("w", dist.Normal(zero, 1.0))
    with pyro.plate("data", 20, subsample=indices) as seen:
        pyro.sample("y", dist.Normal(w, 1.0), obs=seen.double())


class TestRefusals:
    @pytest.mark.parametrize("size", [3, 20])
    def test_indices_of_the_model_are_refused_with_latents_in_the_plate(self, size, device):
        def model(indices):
            local_model(indices, device=device)

        guide = AutoSparseNormal(model)
        indices = torch.randperm(20, device=device)[:size]
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"^data: .* create_plates.* pyro\.plate\('data', 20, dim=-1, subsample="
            ):
                SparseVD_ELBO()(model, guide)(indices)
        assert guide.median()["z"].shape == (20,)

    def test_a_plate_that_create_plates_leaves_out_is_refused(self, device):
        guide = AutoSparseNormal(lambda i: local_model(i, device=device), create_plates=lambda i: [])
        with pytest.raises(ValueError, match=r"^data: the model gives the subsample of this plate"):
            guide(torch.tensor([3, 17, 5], device=device))

    @pytest.mark.parametrize("has_plates", [False, True])
    def test_a_list_is_asked_for_the_plates_whose_indices_the_model_gives(self, has_plates, device):
        def model(indices):
            local_model(indices, device=device)

        make = {"create_plates": lambda i: pyro.plate("data", 20, subsample=i)} if has_plates else {}
        guide = AutoGuideList(model, **make)
        guide.append(AutoSparseNormal(poutine.block(model, hide=["v", "share"])))
        guide.append(AutoSparseNormal(poutine.block(model, expose=["v", "share"])))
        indices = torch.tensor([3, 17, 5], device=device)
        if not has_plates:
            with pytest.raises(ValueError, match=r"^data: .* create_plates"):
                guide(indices)
            return
        guide(indices)
        for part in guide:
            spread_means(part)
        torch.testing.assert_close(guide(indices)["z"], guide[0].posteriors["z"].loc[indices])

    def test_a_sequential_plate_is_refused(self):
        def model():
            for i in pyro.plate("plate", 2):
                pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))

        with pytest.raises(NotImplementedError, match=r"sequential pyro\.plate"):
            AutoSparseNormal(model)()
