"""Every kind of network in the guide and the bound."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_sparsevd as svd
from checks import assert_close, first_of, same_values, seeded, state_of, with_values
from problems import NETWORKS, NUM_DATA, Network

# cuDNN wants the weights of a recurrent layer in one piece of memory, which weights that are drawn are not.
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")


def rows(output):
    output = first_of(output)
    return dist.Normal(output, 0.5).to_event(output.dim() - 1)


def loss_and_data(network: Network, device, **options):
    """A loss module, and a batch: the inputs, as the model takes them, and zeros."""
    torch.manual_seed(2)
    net, inputs = network.on(device)
    model = svd.Supervised(svd.bayesianize(net), rows, NUM_DATA)
    loss = svd.SparseVD_ELBO(kl="exact", **options)(model, svd.AutoSparseNormal(model, init_log_variance=-3.0))
    x = inputs[0] if len(inputs) == 1 else tuple(inputs)
    return loss, (x, torch.zeros_like(first_of(net(*inputs))))


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
class TestEveryNetwork:
    def test_the_loss_is_that_of_the_network_with_drawn_weights(self, network, device):
        loss, (x, y) = loss_and_data(network, device, local_reparam=False)
        torch.manual_seed(2)
        net, inputs = network.on(device)
        value = seeded(loss, x, y)
        weights = seeded(loss.guide, x, y)
        likelihood = rows(with_values(net, weights)(*inputs))
        nll = -NUM_DATA / len(y) * likelihood.log_prob(y).sum()
        kl = sum(kl_divergence(q, svd.LogUniform()).sum() for q in loss.guide.posteriors.values())
        assert_close(value, nll + kl)

    def test_every_parameter_has_a_gradient_with_local_reparameterisation(self, network, device):
        loss, data = loss_and_data(network, device)
        for _ in range(2):  # the second pass knows which weights are used twice
            loss.zero_grad()
            loss(*data).backward()
            assert all(p.grad.isfinite().all() and p.grad.any() for p in loss.guide.parameters())

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_original_and_copy_of_model_and_guide_work_alike(self, network, copied, device):
        loss, data = loss_and_data(network, device)
        seeded(loss, *data)  # which finds what is used twice, and starts batch statistics
        loss.eval()
        expected = seeded(loss, *data).item()
        other = copied(loss)
        assert seeded(other, *data).item() == expected
        with torch.no_grad():
            for tensor in [*other.parameters(), *other.buffers()]:
                tensor.add_(1)
        assert seeded(loss, *data).item() == expected

    def test_a_fresh_model_and_guide_take_the_state(self, network, device):
        (loss, data), (fresh, _) = loss_and_data(network, device), loss_and_data(network, device)
        loss(*data)
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.add_(0.1)
        fresh.load_state_dict(loss.state_dict())
        assert same_values(state_of(fresh), state_of(loss))
        fresh(*data)
        loss.load_state_dict(fresh.state_dict())
        assert seeded(fresh, *data).item() == seeded(loss, *data).item()
