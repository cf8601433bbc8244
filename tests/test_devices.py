"""A selection of every room for another device, ``pytest -m device --device cuda -n 0``; by default it is the CPU.

Random numbers differ between devices, so what is compared to the CPU has posteriors without any width to speak of.
"""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_sparsevd as svd
from checks import seeded
from pyro_sparsevd.poutine.unsampled_weight import UnsampledWeight

pytestmark = pytest.mark.device

NUM_DATA = 40
NARROW = -36.0  # log variance


class _Tokens(nn.Module):
    def forward(self, x):
        return (3 * x).long().abs() % 7


class _LastState(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0][:, -1]


class _Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0].flatten(1)


def _repeated():
    layer = nn.Linear(6, 6)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), layer, nn.Tanh(), layer, nn.Linear(6, 3))


def _images(*layers, features):
    return nn.Sequential(nn.Unflatten(1, (1, 3)), *layers, nn.Flatten(), nn.Linear(features, 3))


# All take a batch of three rows of four numbers, and give three logits.
NETS = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)),
    "positions": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)),
    "convolution": lambda: _images(nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 2), features=24),
    "groups": lambda: _images(nn.Conv2d(1, 4, 3, padding="same"), nn.Conv2d(4, 4, 2, groups=2), features=24),
    "transposed": lambda: _images(nn.ConvTranspose2d(1, 2, 3, stride=2, output_padding=1), features=160),
    "one dimension": lambda: nn.Sequential(nn.Conv1d(3, 4, 2, dilation=2), nn.Flatten(), nn.Linear(8, 3)),
    "normalisation": lambda: _images(nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), features=24),
    "recurrent": lambda: nn.Sequential(_LastState(nn.LSTM(4, 5, batch_first=True)), nn.Linear(5, 3)),
    "gated": lambda: nn.Sequential(_LastState(nn.GRU(4, 5, batch_first=True)), nn.Linear(5, 3)),
    "embedding": lambda: nn.Sequential(
        nn.Flatten(), _Tokens(), nn.Embedding(7, 2, padding_idx=0), nn.Flatten(), nn.Linear(24, 3)
    ),
    "attention": lambda: nn.Sequential(_Attention(), nn.Linear(12, 3)),
    "repeated": _repeated,
}
PRIORS = {
    "log-uniform": lambda: None,
    "bounded": lambda: svd.LogUniform(1e-4, 1.0),
    "normal": lambda: dist.Normal(0.0, 1.0),
    "empirical": svd.EmpiricalBayesNormal,
    "horseshoe": svd.horseshoe,
    "groups": svd.group_normal_jeffreys,
    "fan in": svd.fan_in_normal,
    "mixture": svd.scale_mixture,
}
nets = pytest.mark.parametrize("net", NETS)
priors = pytest.mark.parametrize("prior", PRIORS)


def _classes(output):
    return dist.Categorical(logits=output)


def _data(device, size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(size, 3, 4, generator=generator, dtype=torch.float64)
    return x.to(device, dtype), (x.sum((1, 2)) > 0).long().to(device)


def _model(device, net="mlp", prior="log-uniform", dtype=torch.float32, **options):
    torch.manual_seed(1)
    network = NETS[net]().to(device, dtype)
    model = svd.Supervised(svd.bayesianize(network, PRIORS[prior]()), _classes, NUM_DATA)
    return model, svd.AutoSparseNormal(model, **options)


def _is_on(device, *tensors):
    return {tensor.device.type for tensor in tensors} <= {device.type}


def _close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found.cpu(), expected.cpu(), rtol=tolerance, atol=tolerance)


# The bound.


def _loss_and_gradients(device, net, prior, **options):
    model, guide = _model("cpu", net, prior, torch.float64, init_log_variance=NARROW, init_scale=math.exp(NARROW / 2))
    model, guide = model.to(device), guide.to(device)
    loss = svd.SparseVD_ELBO(**options)(model, guide)
    value = loss(*_data(device, dtype=torch.float64))
    value.backward()
    assert _is_on(device, value, *(p.grad for p in loss.parameters()))
    return value.detach(), {name: p.grad for name, p in loss.named_parameters()}


@nets
@pytest.mark.parametrize("local_reparam", [True, False])
def test_the_loss_and_its_gradients_are_those_of_the_cpu(net, local_reparam, device):
    value, gradients = _loss_and_gradients(device, net, "log-uniform", local_reparam=local_reparam)
    expected, of_cpu = _loss_and_gradients(torch.device("cpu"), net, "log-uniform", local_reparam=local_reparam)
    _close(value / expected, torch.ones_like(expected))
    for name, gradient in gradients.items():
        scale = of_cpu[name].abs().max().clamp_min(1.0)
        _close(gradient.cpu() / scale, of_cpu[name] / scale)


@priors
def test_the_divergence_of_every_prior_is_that_of_the_cpu(prior, device):
    value, _ = _loss_and_gradients(device, "convolution", prior, kl="exact")
    expected, _ = _loss_and_gradients(torch.device("cpu"), "convolution", prior, kl="exact")
    _close(value / expected, torch.ones_like(expected), 1e-3)  # scales of a hierarchy are sampled with their width


@nets
@priors
def test_a_step_of_training_changes_every_parameter(net, prior, device):
    model, guide = _model(device, net, prior)
    loss = svd.SparseVD_ELBO()(model, guide)
    loss(*_data(device))
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        loss(*_data(device)).backward()
        optimizer.step()
    for name, p in loss.named_parameters():
        assert _is_on(device, p)
        assert p.isfinite().all()
        assert not torch.equal(p, before[name]), name


@nets
def test_a_step_of_svi_trains(net, device):
    model, guide = _model(device, net)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), svd.SparseVD_ELBO(kl="exact"))
    losses = [svi.step(*_data(device)) for _ in range(20)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_weight_found_to_be_repeated_leaves_the_random_numbers_alone(device):
    model, guide = _model(device, "repeated", init_log_variance=-2.0)
    known = svd.SparseVD_ELBO()(model, guide)
    known(*_data(device))
    expected = seeded(known, *_data(device))
    after = torch.randn(3, device=device)
    found = seeded(svd.SparseVD_ELBO()(model, guide), *_data(device))  # which starts again
    assert torch.equal(found, expected)
    assert torch.equal(torch.randn(3, device=device), after)


@nets
def test_autocast_to_half_the_bits_changes_little(net, device):
    model, guide = _model(device, net, init_log_variance=-20.0)
    loss = svd.SparseVD_ELBO()(model, guide)
    loss(*_data(device))
    exact = loss(*_data(device))
    with torch.autocast(device.type, torch.bfloat16):
        rough = loss(*_data(device))
    rough.backward()
    assert rough.dtype is torch.float32
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    _close(rough.detach() / exact.detach(), torch.ones_like(exact), 0.02)


def test_channels_last_images_give_the_same_loss(device):
    model, guide = _model(device, "normalisation", init_log_variance=NARROW)
    loss = svd.SparseVD_ELBO()(model, guide)
    expected = loss(*_data(device))
    model.network.to(memory_format=torch.channels_last)
    guide.to(memory_format=torch.channels_last)
    _close(loss(*_data(device)).detach(), expected.detach(), 1e-3)


@pytest.mark.parametrize("argument", ["x", "y"])
def test_an_argument_on_another_device_is_named(argument, device):
    other = "meta" if device.type == "cpu" else "cpu"
    model, guide = _model(device)
    data = dict(zip("xy", _data(device), strict=True))
    data[argument] = data[argument].to(other)
    with pytest.raises(ValueError, match=f"^{argument}: expected a tensor on {device.type}"):
        svd.SparseVD_ELBO().loss(model, guide, *data.values())


@pytest.mark.parametrize("bad", ["x", "class"])
def test_bad_data_are_named_and_do_no_harm(bad, device):
    model, guide = _model(device)
    loss = svd.SparseVD_ELBO()(model, guide)
    x, y = _data(device)
    good = loss(x, y)
    if bad == "x":
        x[0, 0, 0] = math.nan
    else:
        y[0] = 99
    with pytest.raises(ValueError, match=r"^x: expected finite" if bad == "x" else r"^y: Expected value argument"):
        loss(x, y)
    assert good.isfinite()
    assert loss(*_data(device)).isfinite()  # an index out of range would have ended the work with the device


# From the posterior to a small network.


def _trained(device, net="mlp", prior="log-uniform"):
    model, guide = _model(device, net, prior, init_log_variance=-4.0)
    svd.fit(model, guide, [_data(device, NUM_DATA)], epochs=10) if net == "mlp" else guide(*_data(device))
    with torch.no_grad():
        for name in guide.sparse_sites:
            loc = guide.posteriors[name].loc
            loc.view(-1)[::2] = 1e-6
    return model, guide


def test_fit_lowers_the_loss_of_batches_on_the_host(device):
    model, guide = _model(device)
    batches = [_data("cpu", NUM_DATA)]
    history = svd.fit(model, guide, batches, epochs=30, lr=1e-2, validation=[_data("cpu")])
    assert history[-1]["nll"] < history[0]["nll"]
    assert _is_on(device, *guide.parameters(), *model.parameters())


@nets
def test_a_pruned_network_is_that_of_the_cpu(net, device, tmp_path):
    model, guide = _trained(device, net)
    summary = svd.sparsify(guide)
    small = svd.prune(model.network, guide, summary)
    assert 0 < summary.sparsity < 1
    assert _is_on(device, *summary.masks.values(), *small.parameters())
    model_cpu, guide_cpu = copy.deepcopy(model).to("cpu"), copy.deepcopy(guide).to("cpu")
    of_cpu = svd.prune(model_cpu.network, guide_cpu, svd.sparsify(guide_cpu))
    assert str(summary) == str(svd.sparsify(guide_cpu))
    x, _ = _data(device)
    with torch.no_grad():
        expected = of_cpu.eval()(x.cpu())
        _close(small.eval()(x), expected)
        svd.save_sparse(small, tmp_path / "net.svd")
        loaded = svd.load_sparse(tmp_path / "net.svd", NETS[net]().to(device))
        assert _is_on(device, *loaded.parameters())
        _close(loaded.eval()(x), expected, 1e-2)


@pytest.mark.parametrize("net", ["mlp", "convolution", "normalisation"])
def test_a_shrunk_network_is_that_of_the_device(net, device):
    model, guide = _trained(device, net)
    with torch.no_grad():
        guide.posteriors[guide.sparse_sites[0]].loc[0] = 0.0
    small = svd.prune(model.network, guide, svd.sparsify(guide)).eval()
    x, _ = _data(device)
    tiny = svd.shrink(small, x)
    assert _is_on(device, *tiny.parameters())
    assert sum(p.numel() for p in tiny.parameters()) < sum(p.numel() for p in small.parameters())
    with torch.no_grad():
        _close(tiny(x), small(x))


@priors
def test_predictive_samples_are_on_the_device(prior, device):
    model, guide = _model(device, "convolution", prior)
    x, _ = _data(device)
    guide(x)
    samples = pyro.infer.Predictive(model, guide=guide, num_samples=4)(x)
    assert samples["y"].shape == (4, len(x))
    assert _is_on(device, *samples.values())


def test_training_goes_on_with_dropped_weights(device):
    model, guide = _trained(device)
    summary = svd.sparsify(guide)
    sparse = guide.sparsified(summary)
    loss = svd.SparseVD_ELBO()(model, sparse)
    loss(*_data(device)).backward()
    assert all((sample[~summary.masks[name]] == 0).all() for name, sample in sparse().items() if name in summary.masks)


def test_a_state_moves_between_devices(device):
    _, guide = _trained(device)
    state = {name: value.cpu() for name, value in guide.state_dict().items()}
    _, other = _model(device)
    other.load_state_dict(state)
    assert _is_on(device, *other.parameters())
    assert all(torch.equal(value.cpu(), state[name]) for name, value in other.state_dict().items())
    _close(other.to("cpu").posteriors["1.weight"].loc, guide.posteriors["1.weight"].loc, 0)


def test_the_local_handler_takes_weights_on_the_device(device):
    guide = svd.local_reparam(lambda: pyro.sample("w", dist.Normal(torch.zeros(3, 4, device=device), 1.0).to_event(2)))
    w = guide()
    assert isinstance(w, UnsampledWeight)
    assert _is_on(device, nn.functional.linear(torch.ones(2, 4, device=device), w))


# What only CUDA has.


@pytest.fixture
def cuda(device):
    if device.type != "cuda":
        pytest.skip("no CUDA device: run with --device cuda")
    return device


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("net", ["mlp", "convolution", "embedding", "recurrent"])
def test_a_step_waits_for_the_device_once_at_most(net, check_finite, cuda, recwarn):
    model, guide = _model(cuda, net)
    loss, data = svd.SparseVD_ELBO(check_finite=check_finite)(model, guide), _data(cuda)
    loss(*data)
    optimizer = torch.optim.Adam(loss.parameters())

    def step():
        optimizer.zero_grad()
        loss(*data).backward()
        optimizer.step()

    step()
    recwarn.clear()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in recwarn if "synchroniz" in str(w.message)]) == check_finite


@pytest.mark.parametrize("net", ["mlp", "convolution", "normalisation", "embedding"])
def test_a_step_in_a_cuda_graph_trains_as_one_outside_of_it(net, cuda):
    model, guide = _model(cuda, net)
    loss, data = svd.SparseVD_ELBO(check_finite=False)(model, guide), _data(cuda)
    loss(*data)
    optimizer = torch.optim.Adam(loss.parameters(), 1e-2, capturable=True)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad()
            loss(*data).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        value = loss(*data)
        value.backward()
        optimizer.step()
    values = []
    for _ in range(50):
        graph.replay()
        values.append(value.item())
    assert all(map(math.isfinite, values))
    assert len(set(values)) > 40  # the noise is new each time
    assert sum(values[-10:]) < sum(values[:10])
