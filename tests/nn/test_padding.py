"""The padding row of an embedding."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import nn

import pyro_sparsevd as svd
from problems import PRIORS, Tied, some_tokens

PADDED = {
    "embedding": lambda: nn.Embedding(6, 6, padding_idx=0),
    "last row": lambda: nn.Embedding(6, 6, padding_idx=-1),
    "bag": lambda: nn.EmbeddingBag(6, 6, padding_idx=2),
}


@pytest.mark.filterwarnings("ignore::pyro_sparsevd.distributions.ImproperPriorWarning")
@pytest.mark.parametrize("make", PADDED.values(), ids=PADDED)
@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_the_padding_row_is_zero_in_every_sample_and_costs_no_divergence(make, prior):
    torch.manual_seed(0)
    net = nn.Sequential(make(), nn.Linear(6, 2))
    bnn = svd.bayesianize(net, prior.make(), include="0.*")
    model = svd.Supervised(bnn, lambda out: dist.Normal(out, 1.0).to_event(out.dim() - 1), 10)
    guide, x = svd.AutoSparseNormal(model, init_log_variance=-2.0), torch.tensor([[1, 2, 5], [0, 0, 3]])
    others = torch.arange(6) != net[0].padding_idx
    for weight in (guide(x)["0.weight"], poutine.trace(model).get_trace(x).nodes["0.weight"]["value"]):
        assert torch.equal((weight != 0).all(1), others)
        assert torch.equal((weight != 0).any(1), others)
    y = torch.zeros(model(x).shape)
    loss = svd.SparseVD_ELBO(kl="exact")(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), 0.1)
    loss(x, y).backward()
    optimizer.step()
    assert not guide.median()["0.weight"][~others].any()
    summary = svd.sparsify(guide, {"0.weight": 50.0})
    assert not summary.masks["0.weight"][~others].any()
    assert not svd.prune(bnn, guide, summary)[0].weight[~others].any()
    assert not guide.sparsified(svd.sparsify(guide, float("inf")))(x)["0.weight"][~others].any()


@pytest.mark.parametrize("prior", [svd.LogUniform(1e-8, 99.0), dist.Normal(0.5, 1.0)], ids=["log-uniform", "normal"])
@pytest.mark.parametrize("elbo", [svd.SparseVD_ELBO(kl="exact"), svd.SparseVD_ELBO(kl="monte_carlo"), Trace_ELBO()])
def test_the_divergence_of_a_padded_embedding_is_that_of_its_other_rows(prior, elbo):
    torch.manual_seed(0)
    padded, plain = nn.Embedding(6, 3, padding_idx=0).double(), nn.Embedding(5, 3).double()
    plain.weight.data = padded.weight.data[1:].clone()
    losses = []
    for net, tokens in ((padded, torch.tensor([1, 2, 5])), (plain, torch.tensor([0, 1, 4]))):
        model = svd.Supervised(svd.bayesianize(net, prior), lambda out: dist.Normal(out, 1.0).to_event(1), 3)
        guide = svd.AutoSparseNormal(model, init_log_variance=-20.0, init_scale=math.exp(-10))
        torch.manual_seed(1)
        losses.append(elbo.differentiable_loss(model, guide, tokens, torch.zeros(3, 3).double()))
        losses[-1].backward()
        assert all(p.grad.isfinite().all() for p in guide.parameters())
    # Sampled bounds differ by their noise, of variance 1/2 for each of the 15 weights.
    sigma = 0 if elbo.__dict__.get("kl") == "exact" else (2 * 15 / 2) ** 0.5
    assert abs(losses[0] - losses[1]) < 5 * sigma + 1e-3


def test_a_padding_row_of_numbers_or_of_a_tied_weight_is_like_others():
    net = nn.Embedding(6, 3, padding_idx=0)
    net.weight.data[0] = 1.0
    tied = Tied()
    tied.embedding.padding_idx = 0
    tied.embedding.weight.data[0] = 0.0
    for network, name in ((net, "weight"), (tied, "embedding.weight")):
        guide = svd.AutoSparseNormal(svd.bayesianize(network))
        assert guide(some_tokens())[name][0].all()
