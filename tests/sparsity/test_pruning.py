"""Pruning: a plain network with the masked posterior means."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_sparsevd as svd
from checks import conditioned, first_of, torch_saved
from problems import NETWORKS, Tied
from pyro_sparsevd import fixed_sparsity

# cuDNN wants the weights of a recurrent layer in one piece of memory, which weights that are drawn are not.
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def pruned(request, device):
    """A network, its Bayesian version, a guide with spread log α, its summary, the pruned network, inputs."""
    net, inputs = request.param.on(device)
    bnn = svd.bayesianize(net).eval()
    guide = svd.AutoSparseNormal(bnn)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.uniform_(-2, 2)
    summary = svd.sparsify(guide, 0.0)
    assert 0 < summary.kept < summary.total
    return net, bnn, guide, summary, svd.prune(bnn, guide, summary), inputs


class TestEveryNetwork:
    def test_its_output_is_that_of_the_masked_posterior_mean(self, pruned):
        _, bnn, guide, summary, small, inputs = pruned
        means = {name: mean * summary.masks[name] for name, mean in guide.median().items()}
        torch.testing.assert_close(first_of(small(*inputs)), conditioned(bnn, means, *inputs), rtol=0, atol=1e-12)

    def test_its_modules_are_of_the_original_classes_with_nothing_of_pyro(self, pruned):
        net, _, _, _, small, _ = pruned
        assert [type(m) for m in small.modules()] == [type(m) for m in net.modules()]
        assert not any("pyro" in key for m in small.modules() for key in m.__dict__)
        assert [name for name, _ in small.named_parameters()] == [name for name, _ in net.named_parameters()]
        assert [name for name, _ in small.named_buffers()] == [name for name, _ in net.named_buffers()]

    def test_its_weights_are_exact_zeros_where_dropped(self, pruned):
        _, _, guide, summary, small, _ = pruned
        state = small.state_dict()
        for name, mask in summary.masks.items():
            assert not state[name][~mask].any()
            assert torch.equal(state[name][mask], guide.posteriors[name].loc[mask])

    def test_its_state_loads_into_the_original_network(self, pruned):
        net, _, _, _, small, inputs = pruned
        net.eval().load_state_dict(small.state_dict())
        torch.testing.assert_close(net(*inputs), small(*inputs))

    def test_it_is_copied_pickled_and_saved(self, pruned):
        _, _, _, _, small, inputs = pruned
        expected = small(*inputs)
        for other in (copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch_saved(small)):
            torch.testing.assert_close(other(*inputs), expected)

    def test_it_is_independent_of_the_bayesian_network_and_the_guide(self, pruned):
        _, bnn, guide, _, small, inputs = pruned
        expected = first_of(small(*inputs))
        with torch.no_grad():
            for parameter in [*bnn.parameters(), *guide.parameters()]:
                parameter.add_(1)
        assert torch.equal(first_of(small(*inputs)), expected)

    def test_it_trains_as_any_network(self, pruned):
        _, _, _, _, small, inputs = pruned
        first_of(small(*inputs)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        self.hidden = self.layer(x)
        return self.hidden


class Own(pyro.nn.PyroModule):
    """A network that its author wrote for Pyro."""

    def __init__(self):
        super().__init__()
        self.layer, self.w = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return self.layer(x).tanh() @ self.w


class TestWhatIsPruned:
    def test_a_tied_weight_stays_one_tensor(self, device):
        bnn = svd.bayesianize(Tied().to(device))
        guide = svd.AutoSparseNormal(bnn)
        small = svd.prune(bnn, guide, svd.sparsify(guide))
        assert small.output.weight is small.embedding.weight

    def test_it_follows_the_dtype_of_the_guide(self, device):
        bnn = svd.bayesianize(nn.Linear(3, 2).to(device)).double()
        guide = svd.AutoSparseNormal(bnn)
        assert svd.prune(bnn, guide, svd.sparsify(guide)).weight.dtype == torch.float64

    def test_sites_that_the_summary_leaves_out_are_dense(self, device):
        bnn = svd.bayesianize(nn.Linear(3, 2).to(device), dist.Normal(0.0, 1.0))
        guide = svd.AutoSparseNormal(bnn)
        small = svd.prune(bnn, guide, svd.sparsify(guide))
        assert torch.equal(small.weight, guide.posteriors["weight"].loc)

    def test_what_was_trained_through_svi_is_what_is_pruned(self, device):
        bnn = svd.bayesianize(nn.Linear(3, 2).to(device))
        model = svd.Supervised(bnn, lambda f: dist.Normal(f, 1.0).to_event(1), num_data=8)
        guide = svd.AutoSparseNormal(model)
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), svd.SparseVD_ELBO())
        x, y = torch.randn(8, 3, device=device), torch.randn(8, 2, device=device)
        before = svd.prune(bnn, guide, svd.sparsify(guide, float("inf")))
        for _ in range(3):
            svi.step(x, y)
        after = svd.prune(bnn, guide, svd.sparsify(guide, float("inf")))
        assert not torch.allclose(before.bias, after.bias)
        assert not torch.allclose(before.weight, after.weight)

    def test_a_network_that_keeps_what_it_computed_is_pruned(self, device):
        model = svd.Supervised(svd.bayesianize(Remembering().to(device)), lambda o: dist.Categorical(logits=o), 10)
        guide = svd.AutoSparseNormal(model)
        x = torch.randn(4, 3, device=device)
        svd.SparseVD_ELBO()(model, guide)(x, torch.zeros(4, device=device)).backward()
        pruned = svd.prune(model.network, guide, svd.sparsify(guide))
        torch.testing.assert_close(pruned.layer.weight, guide.median()["layer.weight"])

    @pytest.mark.parametrize("prior", [dist.Uniform(-1.0, 1.0), dist.HalfNormal(1.0)], ids=["interval", "positive"])
    def test_weights_of_constrained_support_are_pruned_to_their_medians(self, prior, device):
        net = nn.Linear(3, 2).to(device)
        net.weight.data.abs_()
        bnn = svd.bayesianize(net, prior)
        guide = svd.AutoSparseNormal(bnn)
        torch.testing.assert_close(svd.prune(bnn, guide, svd.sparsify(guide)).weight, net.weight)

    def test_a_network_whose_class_is_pyros_is_pruned_to_one_of_its_class(self, device):
        net = Own().to(device)
        bnn = svd.bayesianize(net)
        guide, x = svd.AutoSparseNormal(bnn), torch.randn(5, 4, device=device)
        assert set(guide.posteriors) == {"layer.weight", "w"}
        small = svd.prune(bnn, guide, svd.sparsify(guide, float("inf")))
        assert (type(small), type(small.layer)) == (Own, nn.Linear)
        assert list(small.state_dict()) == list(net.state_dict())
        torch.testing.assert_close(small(x), net(x))
        assert not pyro.poutine.trace(small).get_trace(x).stochastic_nodes


class TestRefusals:
    def test_a_guide_of_another_network_is_refused(self, device):
        bnn, other = svd.bayesianize(nn.Linear(3, 2)), svd.bayesianize(nn.Sequential(nn.Linear(3, 2)))
        guide = svd.AutoSparseNormal(other)
        with pytest.raises(
            ValueError, match=r"weight: expected this site of the network in the guide, .* has 0\.weight"
        ):
            svd.prune(bnn, guide, svd.sparsify(guide))

    def test_a_summary_of_another_model_is_refused(self, device):
        bnn = svd.bayesianize(nn.Linear(3, 2))
        guide = svd.AutoSparseNormal(bnn)
        for other, message in [
            (nn.Sequential(nn.Linear(3, 2)), "0.weight: the summary has this site"),
            (nn.Linear(5, 2), r"weight: expected a mask of shape \(2, 3\)"),
        ]:
            summary = svd.sparsify(svd.AutoSparseNormal(svd.bayesianize(other)))
            with pytest.raises(ValueError, match=message):
                svd.prune(bnn, guide, summary)

    def test_a_plain_network_is_refused(self, device):
        bnn = svd.bayesianize(nn.Linear(3, 2))
        guide = svd.AutoSparseNormal(bnn)
        with pytest.raises(TypeError, match="bnn: expected the result of bayesianize, but got Linear"):
            svd.prune(nn.Linear(3, 2), guide, svd.sparsify(guide))

    def test_the_guide_of_a_network_of_other_shapes_is_refused(self):
        bnn, other = (svd.bayesianize(nn.Sequential(nn.Linear(4, n), nn.Linear(n, 3))) for n in (8, 6))
        guide = svd.AutoSparseNormal(other)
        with pytest.raises(
            ValueError, match=r"0.weight: expected a posterior of shape \(8, 4\), but the guide has \(6, 4\)"
        ):
            svd.prune(bnn, guide, svd.sparsify(guide))


class TiedLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class TestFixedSparsity:
    @pytest.mark.parametrize(
        "make", [lambda: nn.Linear(4, 3), TiedLinear, lambda: nn.Sequential(nn.Conv1d(2, 3, 2), nn.ReLU())]
    )
    def test_held_weights_stay_zero_and_others_learn(self, make, device):
        torch.manual_seed(0)
        net = make().to(device)
        weights = [p for p in net.parameters() if p.dim() > 1]
        with torch.no_grad():
            for weight in weights:
                weight.mul_(torch.rand_like(weight) < 0.5)
        names, before = list(net.state_dict()), [w.detach().clone() for w in weights]
        x = (
            torch.randn(5, 2, 4, device=device)
            if isinstance(net, nn.Sequential)
            else torch.randn(5, weights[0].shape[1])
        )
        with fixed_sparsity(net) as held:
            assert held is net
            optimizer = torch.optim.Adam(net.parameters(), 0.1, weight_decay=0.1)
            for _ in range(3):
                optimizer.zero_grad()
                net(x.to(device)).square().sum().backward()
                optimizer.step()
        assert sorted(net.state_dict()) == sorted(names)
        for weight, old in zip((p for p in net.parameters() if p.dim() > 1), before, strict=True):
            assert torch.equal(weight == 0, old == 0)
            assert (weight != old)[old != 0].any()

    def test_masks_are_let_go_when_training_fails(self, device):
        net = nn.Linear(2, 2).to(device)
        with pytest.raises(RuntimeError, match="diverged"), fixed_sparsity(net):
            raise RuntimeError("diverged")
        assert sorted(net.state_dict()) == ["bias", "weight"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_held_weights_are_zero_even_where_training_left_no_number(self, value, device):
        net = nn.Linear(2, 2).to(device)
        net.weight.data[0, 0] = 0
        before = net.weight.detach().clone()
        with fixed_sparsity(net):
            net.weight.data[0, 0] = value
        assert torch.equal(net.weight, before)

    def test_masks_are_held_whoever_reads_the_weights(self, device):
        net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).to(device)
        for weight in net.parameters():
            if weight.dim() > 1:
                weight.data[::2] = 0
        before = {name: p.clone() for name, p in net.named_parameters() if p.dim() > 1}
        with fixed_sparsity(net):
            optimizer = torch.optim.Adam(net.parameters(), 0.1)
            for _ in range(3):
                optimizer.zero_grad()
                net(torch.randn(2, 3, 8, device=device)).square().sum().backward()
                optimizer.step()
        for name, weight in before.items():
            now = net.get_parameter(name)
            assert torch.equal(now == 0, weight == 0)
            assert not torch.equal(now, weight)

    def test_masks_are_held_against_the_momentum_of_an_earlier_optimizer(self, device):
        net = nn.Linear(4, 1).to(device)
        optimizer = torch.optim.Adam(net.parameters(), 0.1)
        x = torch.randn(5, 4, device=device)
        net(x).sum().backward()
        optimizer.step()
        net.weight.data[0, :2] = 0
        with fixed_sparsity(net):
            optimizer.zero_grad()
            net(x).sum().backward()
            optimizer.step()
            assert (net.weight == 0).tolist() == [[True, True, False, False]]  # where the next pass would use it
        assert not net.weight._backward_hooks
        optimizer.step()
        assert (net.weight != 0).all()

    def test_masks_are_held_of_weights_only_and_class_tokens_of_zeros_learn(self):
        net = nn.Module()
        net.token, net.norm, net.layer = nn.Parameter(torch.zeros(1, 1, 4)), nn.LayerNorm((2, 4)), nn.Linear(4, 2)
        net.dropped, net.position = nn.Linear(4, 2), nn.Parameter(torch.ones(1, 2, 4))
        with torch.no_grad():
            net.layer.weight[0] = net.dropped.weight[:] = net.position[:, 0] = 0
        with fixed_sparsity(net):
            optimizer = torch.optim.SGD(net.parameters(), 0.1)
            sum((p - 1).square().sum() for p in net.parameters()).backward()
            optimizer.step()
        held = {name: int((p == 0).sum()) for name, p in net.named_parameters() if (p == 0).any()}
        assert held == {"position": 4, "layer.weight": 4, "dropped.weight": 8}

    def test_a_step_of_another_optimiser_leaves_held_weights_to_backward(self, device):
        net, other = nn.Linear(3, 2).to(device), nn.Linear(3, 2).to(device)
        net.weight.data[0] = 0
        steps = torch.optim.SGD(other.parameters(), 0.1)
        x = torch.ones(1, 3, device=device, requires_grad=True)
        with fixed_sparsity(net):
            loss = net(x).square().sum()
            other(x).sum().backward()
            steps.step()
            x.grad = None
            loss.backward()
        (expected,) = torch.autograd.grad(net(x).square().sum(), x)
        torch.testing.assert_close(x.grad, expected)
        assert not net.weight.grad[0].any()
        assert net.weight.grad[1].all()
