"""The loss with local reparameterisation: where weights are lazy or sampled, and what gradients they have."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from checks import SIGMAS, assert_close, differentiable_loss, gradients_of, seeded
from problems import (
    F64,
    NUM_DATA,
    HandMadeRecurrent,
    model_and_guide,
    model_and_guide_of,
    normal_likelihood,
    regression_data,
)
from pyro_sparsevd import AutoSparseNormal, SparseNormal, SparseVD_ELBO, Supervised, bayesianize
from pyro_sparsevd.infer import local_reparam_gap
from pyro_sparsevd.poutine.local_reparam import local_reparam
from pyro_sparsevd.poutine.unsampled_weight import RepeatedUseError, UnsampledWeight


def _gradient_samples(elbo: SparseVD_ELBO, device: torch.device, samples: int) -> Tensor:
    model, guide = model_and_guide(device, log_variance=-1.0)
    loss = elbo(model, guide)
    data = regression_data(device)
    loss(*data)
    parameters = list(loss.parameters())
    rows = [torch.autograd.grad(loss(*data), parameters) for _ in range(samples)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


class _OfTheOutput(nn.Module):
    """A guide in which a later latent depends on the output of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.full((1, 2), 0.3, dtype=F64))

    def forward(self) -> None:
        w = pyro.sample("w", SparseNormal(self.loc, -1.0).to_event(2))
        u = F.linear(torch.ones(1, 2, dtype=F64), w).sum()
        pyro.sample("u", dist.Normal(u, 0.5))


class TestLocalNoise:
    def test_local_noise_keeps_the_mean_gradient_and_lowers_its_variance(self, device):
        samples = 200
        local = _gradient_samples(SparseVD_ELBO(), device, samples)
        drawn = _gradient_samples(SparseVD_ELBO(local_reparam=False), device, samples)
        error = local.mean(0) - drawn.mean(0)
        sigma = ((local.var(0) + drawn.var(0)) / samples).sqrt()
        assert (error.abs() < SIGMAS * sigma).all()
        assert local.var(0).sum() < drawn.var(0).sum()

    @pytest.mark.parametrize("local_reparam", [True, False])
    def test_weights_are_lazy_only_with_local_reparam(self, local_reparam, device):
        kinds = []

        class Spy(nn.Linear):
            def forward(self, x):
                kinds.append(type(self.weight))
                return super().forward(x)

        torch.manual_seed(1)
        bnn = bayesianize(Spy(4, 1).to(device).double())
        model = Supervised(bnn, normal_likelihood, NUM_DATA)
        guide = AutoSparseNormal(model)
        guide(*regression_data(device))
        kinds.clear()
        SparseVD_ELBO(local_reparam=local_reparam).loss(model, guide, *regression_data(device))
        assert kinds == [UnsampledWeight if local_reparam else Tensor]

    def test_a_weight_against_the_order_is_sampled(self):
        def model():
            u = pyro.sample("u", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("w", dist.Normal(u * torch.ones(1, 2, dtype=F64), 1.0).to_event(2))

        guide, elbo = _OfTheOutput(), SparseVD_ELBO()
        losses, expected = (
            torch.tensor([e.loss(model, guide) for _ in range(4_000)], dtype=F64) for e in (elbo, Trace_ELBO())
        )
        error = (losses.var() / len(losses) + expected.var() / len(expected)).sqrt()
        assert abs(losses.mean() - expected.mean()) < SIGMAS * error

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda elbo: pickle.loads(pickle.dumps(elbo))], ids=["copy", "pickle"]
    )
    def test_a_copy_of_a_used_loss_gives_the_same_loss(self, copied, device):
        elbo = SparseVD_ELBO(kl="exact", kl_weight=0.5)
        elbo.loss(*model_and_guide(device), *regression_data(device))
        model, guide = model_and_guide(device)
        losses = [seeded(e.loss, model, guide, *regression_data(device)) for e in (elbo, copied(elbo))]
        assert losses[0] == losses[1]

    def test_autocast_gives_a_finite_loss_and_finite_gradients(self, device):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding="valid"), nn.ReLU(), nn.Flatten(), nn.Linear(3, 1)
        )
        model = Supervised(bayesianize(net.to(device)), lambda output: normal_likelihood(output.float()), NUM_DATA)
        loss_module = SparseVD_ELBO()(model, AutoSparseNormal(model))
        x, y = (t.float() for t in regression_data(device))
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = loss_module(x, y)
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in loss_module.parameters())

    @pytest.mark.parametrize("kl", ["approximate", "exact"])
    def test_half_precision_gives_a_finite_loss_and_finite_gradients(self, kl, device):
        model, guide = model_and_guide(device)
        loss_module = SparseVD_ELBO(kl)(model, guide).to(torch.bfloat16)
        loss = loss_module(*(t.bfloat16() for t in regression_data(device)))
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in loss_module.parameters())


class _Twice(nn.Module):
    """Its first layer is used twice, the others once."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.once(torch.tanh(self.twice(torch.tanh(self.twice(x)))))


class _Tied(nn.Module):
    """The output layer is the embedding, transposed."""

    def __init__(self, linear_first: bool = False) -> None:
        super().__init__()
        self.embedding, self.linear_first = nn.Embedding(4, 4), linear_first

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x > 0).long().sum(-1).clamp_max(3)
        if self.linear_first:
            return (F.linear(x, self.embedding.weight) * self.embedding(tokens)).sum(-1, keepdim=True)
        return F.linear(self.embedding(tokens) * x, self.embedding.weight).sum(-1, keepdim=True)


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[..., None])[0][:, -1].sum(-1, keepdim=True)


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(1, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 3)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t, None], h)
        return h.sum(-1, keepdim=True)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, None], x[:, None], x[:, None])[0].sum((1, 2))[:, None]


REPEATED = [
    pytest.param(_Twice, {"twice.weight"}, id="twice"),
    pytest.param(_Tied, {"embedding.weight"}, id="tied"),
    pytest.param(lambda: _Tied(linear_first=True), {"embedding.weight"}, id="tied-linear-first"),
    pytest.param(HandMadeRecurrent, {"inner.weight", "outer.weight"}, id="recurrent"),
    pytest.param(_Lstm, {"lstm.weight_ih_l0", "lstm.weight_hh_l0"}, id="lstm"),
    pytest.param(_Cell, {"cell.weight_ih", "cell.weight_hh"}, id="gru-cell"),
    pytest.param(_Attention, {"attention.in_proj_weight", "attention.out_proj.weight"}, id="attention"),
]


class _Siamese(nn.Module):
    """Every layer is used twice, and random numbers come from torch's generator and from one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        self.dropout, self.generator, self.passes = nn.Dropout(), torch.Generator().manual_seed(0), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        noise = torch.randn(x.shape, generator=self.generator, dtype=F64).to(x)
        return self.net(self.dropout(x)) - self.net(x + noise)


class TestRepeatedUse:
    @pytest.mark.parametrize(("make", "sites"), REPEATED)
    def test_a_weight_used_beyond_one_linear_operation_is_sampled_at_its_site(self, make, sites, device):
        model, guide = model_and_guide_of(make, device)
        elbo = SparseVD_ELBO()
        for _ in range(2):
            loss = elbo(model, guide)(*regression_data(device))
            assert elbo._sampled_sites == sites
            assert loss.isfinite()

    def test_weights_used_twice_are_found_in_one_pass_and_generators_put_back(self, device):
        model, guide = model_and_guide_of(_Siamese, device)
        net = model.network
        losses = []
        for _ in range(2):
            elbo = SparseVD_ELBO()
            net.generator.manual_seed(0)
            torch.manual_seed(0)
            for passes in (2, 1, 1):
                net.passes = 0
                losses.append(elbo.loss(model, guide, *regression_data(device)))
                assert net.passes == passes
        assert losses[:3] == losses[3:]
        known = SparseVD_ELBO()
        known.loss(model, guide, *regression_data(device))
        net.generator.manual_seed(0)
        torch.manual_seed(0)
        assert [known.loss(model, guide, *regression_data(device)) for _ in range(3)] == losses[:3]

    @pytest.mark.parametrize(("make", "sites"), [p for p in REPEATED if p.id != "twice"])
    def test_with_every_weight_drawn_loss_and_gradients_are_of_drawn_weights(self, make, sites, device):
        model, guide = model_and_guide_of(make, device)
        local, drawn = SparseVD_ELBO(), SparseVD_ELBO(local_reparam=False)
        local.loss(model, guide, *regression_data(device))
        for seed in range(2):
            loss = seeded(differentiable_loss, local, model, guide, *regression_data(device), seed=seed)
            expected = seeded(differentiable_loss, drawn, model, guide, *regression_data(device), seed=seed)
            assert_close(loss, expected)
            assert_close(gradients_of(loss, guide), gradients_of(expected, guide))

    def test_a_weight_used_twice_and_made_lazy_by_another_handler_is_an_error(self, device):
        net = _Twice().to(device)
        model = Supervised(bayesianize(net), lambda f: dist.Normal(f[:, 0], 1.0), 20)
        guide = local_reparam(AutoSparseNormal(model))
        x, y = torch.randn(5, 4, device=device), torch.randn(5, device=device)
        for elbo in (SparseVD_ELBO(local_reparam=False), SparseVD_ELBO()):
            with pytest.raises(RepeatedUseError, match=r"twice\.weight: used more than once .* exclude the site"):
                elbo.differentiable_loss(model, guide, x, y)

    def test_a_weight_used_twice_beside_a_local_one_has_the_mean_gradient(self, device):
        samples = 150
        model, guide = model_and_guide_of(_Twice, device)
        means, variances = [], []
        for elbo in (SparseVD_ELBO(), SparseVD_ELBO(local_reparam=False)):
            elbo.loss(model, guide, *regression_data(device))
            rows = []
            for _ in range(samples):
                loss = differentiable_loss(elbo, model, guide, *regression_data(device))
                rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(guide.parameters()))]))
            rows = torch.stack(rows)
            means.append(rows.mean(0))
            variances.append(rows.var(0) / samples)
        assert ((means[0] - means[1]).abs() < SIGMAS * (variances[0] + variances[1]).sqrt()).all()

    @pytest.mark.parametrize("used_before", [False, True], ids=["fresh-loss", "loss-of-another-model"])
    def test_falling_back_updates_running_statistics_once(self, used_before, device):
        class Normalised(_Twice):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(4)

            def forward(self, x: Tensor) -> Tensor:
                return super().forward(self.norm(x))

        elbo = SparseVD_ELBO()
        if used_before:
            elbo.loss(*model_and_guide(device), *regression_data(device))
        model, guide = model_and_guide_of(Normalised, device)
        elbo.loss(model, guide, *regression_data(device))
        assert elbo._sampled_sites == {"twice.weight"}
        assert model.network.norm.num_batches_tracked == 1


class TestExclude:
    @pytest.mark.parametrize("exclude", ["0.*", ["0.weight"], ("2.nothing*", "0.weight")])
    def test_excluded_sites_are_sampled_and_all_others_local(self, exclude, device):
        model, guide = model_and_guide(device)
        elbo = SparseVD_ELBO(exclude=exclude)
        if "2.nothing*" in exclude:
            with pytest.raises(ValueError, match=r"^exclude: .* of 0\.weight, 2\.weight, but got '2\.nothing\*'"):
                elbo.loss(model, guide, *regression_data(device))
            return
        for own in (elbo, copy.deepcopy(elbo), pickle.loads(pickle.dumps(elbo))):
            found = seeded(own.loss, model, guide, *regression_data(device))
            by_handler = local_reparam(guide, exclude={"0.weight"})
            assert found == seeded(SparseVD_ELBO(local_reparam=False).loss, model, by_handler, *regression_data(device))

    def test_an_exclude_of_other_things_than_names_is_refused(self):
        with pytest.raises(TypeError, match=r"^exclude: expected names or globs of sites, but got <class"):
            SparseVD_ELBO(exclude=[nn.Linear])

    def test_a_layer_whose_rows_mix_has_a_gap_and_others_none(self, device):
        mixing = torch.full((NUM_DATA, NUM_DATA), 1 / NUM_DATA, dtype=F64, device=device)
        for is_graph in (True, False):
            net = nn.Linear(4, 1, bias=False).to(device).double()
            nn.init.zeros_(net.weight)
            model = Supervised(
                bayesianize(net), lambda out, mixed=is_graph: normal_likelihood(mixing @ out if mixed else out), 20
            )
            guide, data = AutoSparseNormal(model, init_log_variance=0.0), regression_data(device, NUM_DATA)
            data = (data[0].abs(), data[1])
            guide(*data)
            gap = local_reparam_gap(SparseVD_ELBO(), model, guide, *data, num_passes=200)
            assert (gap.sigmas < -SIGMAS) == is_graph
            assert is_graph or abs(gap.sigmas) < SIGMAS
        with pytest.raises(ValueError, match=r"^num_passes: expected at least 2"):
            local_reparam_gap(SparseVD_ELBO(), model, guide, *data, num_passes=1)
