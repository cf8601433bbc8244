"""Parameters of a network that are not sites: trained, frozen and named."""

import abc
import copy
import pickle
import re
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.nn.utils import prune

import pyro_sparsevd as svd
from checks import sites_of, stored_tensors
from problems import normal_rows, regression_model

# cuDNN wants the weights of a recurrent layer in one piece of memory, which weights that are drawn are not.
pytestmark = pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")


def trained(model, x, y, steps=3):
    guide = svd.AutoSparseNormal(model)
    inference = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), svd.SparseVD_ELBO())
    return [inference.step(x, y) for _ in range(steps)], guide


class TestSeveralModels:
    def test_models_in_one_process_train_biases_of_their_own(self, device):
        models = [regression_model(device) for _ in range(3)]
        biases = [model.network.bias for model in models]
        x = torch.randn(8, 4, device=device)
        for number, model in enumerate(models):
            before = [bias.detach().clone() for bias in biases]
            trained(model, x, torch.randn(8, 3, device=device))
            for other, bias in enumerate(biases):
                assert torch.equal(bias, before[other]) == (other != number)
        stored = stored_tensors()
        names = [name for bias in biases for name, value in stored.items() if value is bias]
        assert names == ["bias", "bias_2", "bias_3"]
        assert [model.network.bias is bias for model, bias in zip(models, biases, strict=True)] == [True] * 3

    def test_models_trained_in_turns_do_what_they_do_alone(self, device):
        x, y = torch.randn(8, 4, device=device), torch.randn(8, 3, device=device)
        first_net, second_net = nn.Linear(4, 3), nn.Linear(4, 3)

        def run(nets, turns):
            pyro.clear_param_store()
            models = [regression_model(device, net=net) for net in nets]
            guides = [svd.AutoSparseNormal(model) for model in models]
            steps = [
                SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), svd.SparseVD_ELBO()).step
                for model, guide in zip(models, guides, strict=True)
            ]
            for number in turns:
                pyro.set_rng_seed(number)
                steps[number](x, y)
            return [model.network.bias.detach() for model in models]

        together = run([first_net, second_net], [0, 1, 0, 1, 1, 0])
        torch.testing.assert_close(together[0], run([first_net], [0, 0, 0])[0])
        pyro.clear_param_store()
        alone = run([first_net, second_net], [1, 1, 1])
        torch.testing.assert_close(together[1], alone[1])
        torch.testing.assert_close(alone[0], first_net.bias.detach().to(device))

    def test_one_model_keeps_its_names_over_many_passes(self, device):
        model = regression_model(device)
        x, y = torch.randn(8, 4, device=device), torch.randn(8, 3, device=device)
        for _ in range(3):
            model(x, y)
            model(x)
        assert list(stored_tensors()) == ["bias"]

    def test_copy_of_a_trained_model_trains_parameters_of_its_own(self, device):
        model = regression_model(device)
        x, y = torch.randn(8, 4, device=device), torch.randn(8, 3, device=device)
        trained(model, x, y)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            before = model.network.bias.detach().clone()
            assert torch.equal(other.network.bias, before)
            trained(other, x, y)
            assert torch.equal(model.network.bias, before)
            assert not torch.equal(other.network.bias, before)

    def test_parameters_of_two_likelihoods_are_trained_apart(self, device):
        class Likelihood(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.log_scale = nn.Parameter(torch.zeros(()))

            def forward(self, output):
                return dist.Normal(output.squeeze(-1), self.log_scale.exp())

        x, y = torch.randn(20, 4, device=device), 5 * torch.randn(20, device=device)
        models = [svd.Supervised(svd.bayesianize(nn.Linear(4, 1)), Likelihood(), 20).to(device) for _ in range(2)]
        for model in models:
            svi = SVI(model, svd.AutoSparseNormal(model), pyro.optim.Adam({"lr": 0.1}), svd.SparseVD_ELBO())
            for _ in range(3):
                svi.step(x, y)
        assert all(model.likelihood.log_scale > 0.1 for model in models)


class _Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.heads = nn.ModuleDict()

    def forward(self, x):
        return {name: head(self.body(x)) for name, head in self.heads.items()}


class TestWhatANetworkHolds:
    def test_what_a_network_gets_later_takes_part(self):
        bnn = svd.bayesianize(_Heads())
        for name in "ab":
            bnn.heads[name] = svd.bayesianize(nn.Linear(6, 3))
        assert sites_of(bnn, torch.randn(2, 4)) == ["body.weight", "heads.a.weight", "heads.b.weight"]
        bnn = svd.bayesianize(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.LeakyReLU()))
        bnn[2].negative_slope = PyroSample(dist.Beta(1.0, 1.0))
        assert sites_of(bnn, torch.randn(2, 4)) == ["0.weight", "2.negative_slope"]
        assert [isinstance(module, PyroModule) for module in bnn] == [True, False, True]

    def test_a_module_type_takes_what_its_modules_hold(self):
        net = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 3))
        assert set(svd.choose(net, exclude=nn.MultiheadAttention)) == {"1.weight"}
        assert set(svd.choose(net, include=nn.MultiheadAttention)) == {"0.in_proj_weight", "0.out_proj.weight"}

    def test_any_name_of_a_tied_weight_chooses_its_prior(self):
        net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
        net[1].weight = net[0].weight
        bnn = svd.bayesianize(net, {"1.*": svd.LogUniform(), "*": dist.Normal(0.0, 1.0)})
        assert isinstance(bnn[0]._pyro_samples["weight"].prior, svd.LogUniform)

    def test_a_padding_row_that_another_guide_samples_counts_as_any_other(self, device):
        bnn = svd.bayesianize(nn.Embedding(3, 2, padding_idx=0).to(device), dist.Normal(0.0, 1.0))
        prior = bnn._pyro_samples["weight"].of(bnn)
        value = torch.ones(3, 2, device=device)
        torch.testing.assert_close(prior.log_prob(value), dist.Normal(0.0, 1.0).log_prob(value).sum())
        value[0] = 0
        torch.testing.assert_close(prior.log_prob(value), dist.Normal(0.0, 1.0).log_prob(value[1:]).sum())


class _Abstract(nn.Module, abc.ABC):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    @abc.abstractmethod
    def forward(self, x): ...


class _Concrete(_Abstract):
    def forward(self, x):
        return self.linear(x)


UNFIT = {  # a network, and what is said
    "metaclass": (
        lambda: nn.Sequential(_Concrete()),
        r"^0: expected a module that Pyro can make a PyroModule, but _Conc",
    ),
    "compiled": (lambda: torch.compile(nn.Linear(3, 2)), r"^net: expected a module in Python, but it is compiled"),
    "compiled part": (lambda: nn.Sequential(torch.compile(nn.Linear(3, 2))), r"^0: expected a module in Python"),
    "traced": (lambda: nn.Sequential(torch.fx.symbolic_trace(nn.Linear(3, 2))), r"^0: expected a module in Python"),
    "scripted": (lambda: nn.Sequential(torch.jit.script(nn.Linear(3, 2))), r"^0: expected a module in Python"),
}


class TestRefusals:
    @pytest.mark.parametrize("name", ["data", "y"])
    def test_a_weight_called_as_a_site_of_the_model_is_refused(self, name):
        net = nn.Sequential()
        net.register_parameter(name, nn.Parameter(torch.ones(2, 2)))
        with pytest.raises(
            ValueError, match=f"a parameter of the network is called '{name}', as a site of the model is"
        ):
            svd.Supervised(svd.bayesianize(net), lambda x: dist.Normal(x, 1.0), num_data=3)

    def test_a_pruned_weight_is_refused(self):
        net = nn.Linear(4, 3)
        prune.l1_unstructured(net, "weight", amount=2)
        with pytest.raises(ValueError, match="weight_orig: expected a plain parameter"):
            svd.bayesianize(net)

    def test_a_prior_by_type_of_module_is_refused(self):
        with pytest.raises(
            TypeError, match=r"^prior: expected globs on the names of parameters as keys, but got <class"
        ):
            svd.bayesianize(nn.Linear(2, 2), {nn.Linear: svd.LogUniform()})

    @pytest.mark.filterwarnings("ignore:`torch.jit")
    @pytest.mark.parametrize(("make", "message"), UNFIT.values(), ids=UNFIT)
    @pytest.mark.usefixtures("compiled")  # what one of them changes globally is put back
    def test_modules_that_pyro_cannot_make_its_own_are_refused_by_name(self, make, message):
        with pytest.raises(TypeError, match=message):
            svd.bayesianize(make())


def _with_odd_parameters(device):
    """One frozen bias, and a kernel left out of the prior whose memory is not contiguous."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)).to(device)
    net = net.to(memory_format=torch.channels_last)
    net[0].bias.requires_grad_(False)
    model = svd.Supervised(svd.bayesianize(net, exclude="0.*"), lambda out: dist.Categorical(logits=out), 60)
    return model, svd.AutoSparseNormal(model)


class TestFrozen:
    def test_frozen_weights_get_a_prior_only_where_they_are_asked_for(self):
        net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
        net[0].requires_grad_(False)
        x = torch.randn(2, 4)
        assert sites_of(svd.bayesianize(net), x) == ["1.weight"]
        assert sites_of(svd.bayesianize(net, include=nn.Linear), x) == ["0.weight", "1.weight"]
        with pytest.raises(
            ValueError, match=r"no parameter is left .*frozen ones \(requires_grad=False\) get one only"
        ):
            svd.bayesianize(net.requires_grad_(False))
        with pytest.raises(ValueError, match=r"no parameter is left to give a prior, of [^;]*$"):
            svd.bayesianize(net, include="*", exclude="*")

    @pytest.mark.parametrize("route", ["pass", "svi", "torch"])
    def test_frozen_parameters_stay_frozen_and_others_train(self, route, device):
        net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        net[0].bias.requires_grad_(False)
        net[1].weight.requires_grad_(False)
        model = regression_model(device, net=net)
        parameters = dict(model.network.named_parameters())
        before = {name: p.detach().clone() for name, p in parameters.items()}
        x, y = torch.randn(8, 4, device=device), torch.randn(8, 3, device=device)
        if route == "pass":
            model(x, y)
            model(x)
        elif route == "svi":
            trained(model, x, y)
        else:
            loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
            optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=0.1)
            loss(x, y).backward()
            optimizer.step()
        after = dict(model.network.named_parameters())
        frozen = {"0.bias", "1.weight"}
        assert {name for name, p in after.items() if not p.requires_grad} == frozen
        assert frozen.isdisjoint(stored_tensors())
        moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
        assert moved == (set() if route == "pass" else {"1.bias", "2.bias"})
        assert all(after[name] is p for name, p in parameters.items())

    def test_frozen_and_strided_parameters_have_names_and_keep_their_state(self, device, tmp_path):
        x, y = torch.randn(6, 3, 6, 6, device=device), torch.zeros(6, device=device)
        rates = lambda name: {"lr": 1e-3 if "log_variances" in name else 1e-2}  # noqa: E731

        def steps(svi, number):
            torch.manual_seed(number)
            return [svi.step(x, y) for _ in range(number)]

        model, guide = _with_odd_parameters(device)
        optimizer = pyro.optim.Adam(rates)
        svi = SVI(model, guide, optimizer, svd.SparseVD_ELBO())
        frozen, kernel = model.network[0].bias.clone(), model.network[0].weight.detach().clone()
        steps(svi, 3)
        assert torch.equal(model.network[0].bias, frozen)
        assert not model.network[0].bias.requires_grad
        assert not torch.equal(model.network[0].weight, kernel)
        assert not model.network[0].weight.is_contiguous()
        assert "0.weight" in optimizer.get_state()
        assert None not in optimizer.get_state()
        optimizer.save(tmp_path / "optimizer.pt")
        states = copy.deepcopy((model.state_dict(), guide.state_dict()))
        expected = steps(svi, 4)

        pyro.clear_param_store()
        model, guide = _with_odd_parameters(device)
        model.load_state_dict(states[0])
        guide.load_state_dict(states[1])
        optimizer = pyro.optim.Adam(rates)
        optimizer.load(tmp_path / "optimizer.pt")
        assert steps(SVI(model, guide, optimizer, svd.SparseVD_ELBO()), 4) == expected


class TestTraining:
    @pytest.mark.parametrize("route", ["svi", "torch"])
    def test_parameter_that_is_not_contiguous_is_trained_in_place(self, route, device):
        class Shift(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 3)
                self.shift = nn.Parameter(torch.zeros(3, 6).t())

            def forward(self, x):
                return self.layer(x) + self.shift

        net = Shift().to(device)
        model = svd.Supervised(svd.bayesianize(net, svd.LogUniform(1e-3, 1.0), exclude="shift"), normal_rows, 100)
        shift = model.network.shift
        assert not shift.is_contiguous()
        x, y = torch.randn(6, 4, device=device), torch.randn(6, 3, device=device)
        if route == "svi":
            trained(model, x, y, steps=1)
        else:
            loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
            loss(x, y).backward()
            torch.optim.Adam(loss.parameters(), lr=0.1).step()
        assert model.network.shift is shift
        torch.testing.assert_close(shift.detach().abs(), torch.full((6, 3), 0.1, device=device))  # Adam's first step

    def test_both_routes_of_training_fit_a_line(self, device):
        x = torch.randn(200, 4, device=device)
        y = x @ torch.randn(4, 3, device=device) + torch.tensor([1.0, -2.0, 3.0], device=device)
        model = regression_model(device, num_data=200)
        guide = svd.AutoSparseNormal(model)
        loss = svd.SparseVD_ELBO()(model, guide)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
        start = loss(x, y).item()
        for _ in range(200):
            optimizer.zero_grad()
            loss(x, y).backward()
            optimizer.step()
        assert loss(x, y).item() < 0.2 * start
        torch.testing.assert_close(
            model.network.bias.detach(), torch.tensor([1.0, -2.0, 3.0], device=device), rtol=0, atol=0.2
        )


class _OnlyDensity(dist.TorchDistribution):
    arg_constraints: ClassVar = {}

    def __init__(self, mean):
        self.mean_ = mean
        super().__init__(mean.shape, validate_args=False)

    def log_prob(self, value):
        return -((value - self.mean_) ** 2)

    def sample(self, sample_shape=()):
        return self.mean_


class TestLikelihoods:
    @pytest.mark.parametrize("event_dim", [0, 1])
    def test_targets_of_another_shape_than_their_distribution_are_refused(self, event_dim):
        bnn = svd.bayesianize(nn.Sequential(nn.Linear(3, 2)), svd.LogUniform(1e-4, 1.0))
        model = svd.Supervised(
            bnn, lambda out: dist.Normal(out[:, : event_dim + 1].squeeze(1), 1.0).to_event(event_dim), 8
        )
        x, y = torch.randn(8, 3), torch.randn(8, 2)[:, : event_dim + 1].squeeze(1)
        model(x, y)
        with pytest.raises(ValueError, match=r"^y: expected targets of shape \(8,(?: 2)?\), but got \(8, 1, 1\)"):
            model(x, y.reshape(8, -1)[:, :1, None])

    def test_targets_that_would_broadcast_over_a_datum_are_refused(self, device):
        bnn = svd.bayesianize(nn.Linear(4, 3), svd.LogUniform(1e-4, 1.0)).to(device)
        model = svd.Supervised(bnn, lambda out: dist.Normal(out, 1.0).to_event(1), 9)
        x = torch.ones(5, 4, device=device)
        with pytest.raises(ValueError, match=re.escape("y: expected targets of shape (5, 3), but got (5, 1)")):
            model(x, torch.ones(5, 1, device=device))

    def test_a_likelihood_without_a_support_is_taken(self, device):
        model = svd.Supervised(svd.bayesianize(nn.Linear(4, 1).to(device)), lambda f: _OnlyDensity(f[:, 0]), 5)
        loss = svd.SparseVD_ELBO()(model, svd.AutoSparseNormal(model))
        assert loss(torch.ones(5, 4, device=device), torch.zeros(5, device=device)).isfinite()

    def test_a_constrained_parameter_of_a_likelihood_is_one_parameter(self, device):
        scale = nn.Parameter(torch.tensor(2.0, device=device))

        def likelihood(f):
            return dist.Normal(f[:, 0], pyro.param("sigma", scale, constraint=dist.constraints.positive))

        model = svd.Supervised(svd.bayesianize(nn.Linear(4, 1).to(device)), likelihood, 5)
        svi = pyro.infer.SVI(model, svd.AutoSparseNormal(model), pyro.optim.Adam({"lr": 0.1}), svd.SparseVD_ELBO())
        for _ in range(3):
            svi.step(torch.ones(5, 4, device=device), torch.zeros(5, device=device))
        assert [name for name in pyro.get_param_store() if name.startswith("sigma")] == ["sigma"]
