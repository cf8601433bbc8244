"""What the recipes refuse or warn of."""

import warnings

import pyro.distributions as dist
import pytest
import torch
from lab import recipes
from torch import nn

from pyro_sparsevd import AutoSparseNormal, SparseVD_ELBO, Supervised, bayesianize
from pyro_sparsevd.training.loop import error, fit_posterior, negative_log_likelihood
from pyro_sparsevd.training.split import Split


def _split(size, device, seed=0):
    """Returns points in a plane, with the classes of "exclusive or"."""
    x = torch.randn(size, 2, generator=torch.Generator().manual_seed(seed))
    return Split(x.to(device), (x.prod(1) > 0).long().to(device))


def _model(device, num_data, hidden=30):
    net = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 2))
    model = Supervised(bayesianize(net.to(device)), lambda x: dist.Categorical(logits=x), num_data)
    return model, AutoSparseNormal(model, init_log_variance=-8.0)


def test_targets_of_a_regression_are_refused():
    split = Split(torch.randn(8, 3), torch.randn(8, 1))
    network = nn.Linear(3, 1)
    before = network.weight.clone()
    for train in (recipes.fine_tune, recipes.train_dense):
        with pytest.raises(TypeError, match=r"labels: expected the classes .* but got torch.float32; for a regression"):
            train(network, split, epochs=1, batch_size=4)
    for measure in (error, negative_log_likelihood):
        with pytest.raises(TypeError, match="labels: expected the classes of a classifier as integers"):
            measure(network, split)
    assert torch.equal(network.weight, before)


def test_a_data_set_of_another_size_than_the_model_was_given_is_refused(device):
    model, guide = _model(device, 16)
    with pytest.raises(ValueError, match="split: expected the num_data = 16 data of the model, but got 8"):
        fit_posterior(SparseVD_ELBO(), model, guide, _split(8, device), epochs=1, batch_size=4)


def _train(split, validation, device):
    torch.manual_seed(0)
    model, guide = _model(device, len(split))
    options = {"epochs": 60, "batch_size": 8, "lr": 3e-2, "warm_up": 0.03}
    return recipes.train_sparse(model, guide, split, validation=validation, **options)


def test_a_posterior_that_collapsed_though_there_was_something_to_learn_warns(device):
    with pytest.warns(UserWarning, match=r"the posterior collapsed: every weight is dropped, and the held-out error"):
        history = _train(_split(80, device), _split(1000, device, seed=1), device)
    assert history[-1]["sparsity"] == 1


def test_random_labels_lose_every_weight_without_a_warning(device):
    split, validation = _split(80, device), _split(1000, device, seed=1)
    shuffled = Split(split.images, split.labels[torch.randperm(80, generator=torch.Generator().manual_seed(2))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _train(shuffled, validation, device)[-1]["sparsity"] == 1
