"""The sparsified posterior."""

from types import SimpleNamespace

import pytest
import torch
from pyro.infer import Predictive
from torch import Tensor, nn

import pyro_sparsevd as svd
from checks import same_values, seeded, state_of, take_steps
from problems import function_case, precise_likelihood, regression_data, small_model
from pyro_sparsevd import AutoSparseNormal, bayesianize


def _masks(device: torch.device) -> dict[str, Tensor]:
    first = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4], device=device)
    return {"0.weight": first, "2.weight": torch.tensor([[True, False, True]], device=device)}


class TestSparsified:
    def _guide(self, device: torch.device) -> AutoSparseNormal:
        guide = AutoSparseNormal(small_model(device, precise_likelihood), init_log_variance=-1.0)
        guide(*regression_data(device))
        return guide

    def test_predictive_draws_zeros_exactly_where_weights_were_dropped(self, device, improper):
        guide, masks = self._guide(device), _masks(device)
        sparse = guide.sparsified(SimpleNamespace(masks=masks))
        samples = Predictive(guide._model[0], guide=sparse, num_samples=5)(regression_data(device)[0])
        for name, mask in masks.items():
            drawn = samples[name].reshape(5, *mask.shape)
            assert torch.equal(drawn != 0, mask.expand_as(drawn))
        assert samples["y"].shape == (5, 8)

    def test_kept_weights_are_drawn_as_before(self, device):
        guide, masks = self._guide(device), _masks(device)
        sparse = guide.sparsified(SimpleNamespace(masks=masks))
        dense, masked = seeded(guide, *regression_data(device)), seeded(sparse, *regression_data(device))
        for name, mask in masks.items():
            assert torch.equal(masked[name], torch.where(mask, dense[name], 0))

    def test_sites_without_a_mask_are_drawn_as_before(self, device):
        guide, masks = self._guide(device), _masks(device)
        sparse = guide.sparsified(SimpleNamespace(masks={"2.weight": masks["2.weight"]}))
        dense, masked = seeded(guide, *regression_data(device)), seeded(sparse, *regression_data(device))
        assert torch.equal(masked["0.weight"], dense["0.weight"])
        assert not masked["2.weight"][0, 1]

    def test_a_function_model_has_zeros_too(self, device):
        case = function_case(device)
        guide = AutoSparseNormal(case.model, init_log_variance=-1.0)
        guide(*case.data)
        mask = torch.tensor([True, False, False, True], device=device)
        sparse = guide.sparsified(SimpleNamespace(masks={"w": mask}))
        samples = Predictive(case.model, guide=sparse, num_samples=4)(case.data[0])
        assert torch.equal(samples["w"].reshape(4, 4) != 0, mask.expand(4, 4))
        assert samples["net.scale"].all()

    def test_training_goes_on_with_the_original_alone(self, device):
        guide = self._guide(device)
        sparse = guide.sparsified(SimpleNamespace(masks=_masks(device)))
        before = seeded(sparse, *regression_data(device))
        take_steps(guide._model[0], guide, regression_data(device))
        assert same_values(seeded(sparse, *regression_data(device)), before)

    @pytest.mark.parametrize("local_reparam", [True, False])
    @pytest.mark.parametrize("kl", ["approximate", "exact", "monte_carlo"])
    def test_training_goes_on_with_the_dropped_weights_out(self, kl, local_reparam, device, improper):
        guide, masks = self._guide(device), _masks(device)
        model = guide._model[0]
        sparse = guide.sparsified(SimpleNamespace(masks=masks))
        before = {name: q.loc.detach().clone() for name, q in sparse.guide.posteriors.items()}
        loss = svd.SparseVD_ELBO(kl=kl, local_reparam=local_reparam)(model, sparse)
        optimizer = torch.optim.Adam(loss.parameters(), 0.01)
        for _ in range(5):
            optimizer.zero_grad()
            loss(*regression_data(device)).backward()
            optimizer.step()
        for name, mask in masks.items():
            q = sparse.guide.posteriors[name]
            assert not q.loc[~mask].any()
            assert (q.loc != before[name])[mask].all()
        summary = svd.sparsify(sparse, 1e6)
        assert all(torch.equal(summary.masks[name], mask) for name, mask in masks.items())
        pruned = svd.prune(model.network, sparse, summary)
        assert all(torch.equal(pruned.get_parameter(name) != 0, mask) for name, mask in masks.items())

    def test_the_divergence_is_that_of_the_kept_weights(self, device):
        guide, masks = self._guide(device), _masks(device)
        elbo = svd.SparseVD_ELBO(kl="exact")
        elbo(guide._model[0], guide.sparsified(SimpleNamespace(masks=masks)))(*regression_data(device))
        expected = sum(
            svd.divergence.kl_log_uniform(q.loc, q.log_variance, "exact")[masks.get(name, ...)].sum()
            for name, q in guide.posteriors.items()
        )
        torch.testing.assert_close(elbo.terms["kl"], expected.detach())

    def test_it_moves_with_its_masks(self, device):
        sparse = self._guide(device).sparsified(SimpleNamespace(masks=_masks(device)))
        sparse.to(torch.float32)
        values = sparse(*(t.float() for t in regression_data(device)))
        assert {v.dtype for v in values.values()} == {torch.float32}
        assert {b.dtype for b in sparse.buffers()} == {torch.bool}

    def test_two_guides_of_one_model_do_not_meet_in_the_store(self, device, improper):
        guide = self._guide(device)
        model = guide._model[0]
        take_steps(model, guide, regression_data(device), steps=1)
        sparse = guide.sparsified(SimpleNamespace(masks=_masks(device)))
        Predictive(model, guide=sparse, num_samples=2)(regression_data(device)[0])
        before = state_of(sparse)
        take_steps(model, guide, regression_data(device), steps=1)
        Predictive(model, guide=sparse, num_samples=2)(regression_data(device)[0])
        assert same_values(state_of(sparse), before)

    @pytest.mark.parametrize(
        ("masks", "message"),
        [
            (
                {"9.weight": torch.ones(3, 4).bool()},
                r"^9\.weight: the summary has this site, but the guide has 0\.weight",
            ),
            ({"0.weight": torch.ones(4, 3).bool()}, r"^0\.weight: expected a mask of shape \(3, 4\).*has \(4, 3\)"),
            ({"0.weight": torch.ones(()).bool()}, r"^0\.weight: expected a mask of shape \(3, 4\).*has \(\)"),
        ],
        ids=["site", "shape", "scalar"],
    )
    def test_masks_of_another_model_are_an_error_that_names_the_site(self, masks, message, device):
        guide = self._guide(device)
        with pytest.raises(ValueError, match=message):
            guide.sparsified(SimpleNamespace(masks=masks))

    def test_masks_of_a_guide_without_parameters_are_an_error(self, device):
        guide = AutoSparseNormal(function_case(device).model)
        with pytest.raises(ValueError, match=r"^w: the summary has this site, but the guide has none"):
            guide.sparsified(SimpleNamespace(masks={"w": torch.ones(4).bool()}))


def test_the_masks_of_a_summary_are_not_those_of_a_sparsified_guide():
    guide = AutoSparseNormal(bayesianize(nn.Linear(4, 3)))
    masks = {"weight": torch.ones(3, 4, dtype=torch.bool)}
    sparse = guide.sparsified(SimpleNamespace(masks=masks))
    state = {name: torch.zeros_like(value) for name, value in sparse.state_dict().items()}
    sparse.load_state_dict(state)
    assert masks["weight"].all()
