import math
from functools import partial

import pytest
import torch
from lab.nets import lenet_5_caffe, lenet_300_100, vgg_like
from torch import nn


def weights(net):
    return sum(p.numel() for p in net.parameters() if p.dim() > 1)


def hidden_shapes(net, x):
    shapes = []
    for layer in net.eval():
        x = layer(x)
        shapes.append((type(layer).__name__, tuple(x.shape[1:])))
    return shapes


@pytest.mark.parametrize(
    ("net", "count", "biases"),
    [
        (lenet_300_100, 266_200, 410),
        (lenet_5_caffe, 430_500, 580),
        (vgg_like, 14_977_728, 3 * (4224 + 512) + 10),
    ],
)
def test_weights_are_as_many_as_in_the_paper(net, count, biases):
    net = net()
    assert weights(net) == count
    assert sum(p.numel() for p in net.parameters()) == count + biases


@pytest.mark.parametrize(
    ("net", "shape", "out"),
    [
        (lenet_300_100, (1, 28, 28), 10),
        (lenet_5_caffe, (1, 28, 28), 10),
        (partial(vgg_like, 0.25), (3, 32, 32), 10),
        (partial(vgg_like, 0.1, num_classes=7), (3, 32, 32), 7),
    ],
)
def test_images_become_logits_and_every_parameter_learns(net, shape, out, device):
    net = net().to(device)
    logits = net(torch.rand(4, *shape, device=device))
    assert type(net) is nn.Sequential
    assert logits.shape == (4, out)
    assert logits.min() < 0  # neither a softmax nor a ReLU at the end
    logits.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_lenet_300_100_has_its_layers_in_order():
    assert hidden_shapes(lenet_300_100(), torch.rand(1, 1, 28, 28)) == [
        ("Flatten", (784,)),
        ("Linear", (300,)),
        ("ReLU", (300,)),
        ("Linear", (100,)),
        ("ReLU", (100,)),
        ("Linear", (10,)),
    ]


def test_lenet_5_caffe_has_its_layers_in_order():
    assert hidden_shapes(lenet_5_caffe(), torch.rand(1, 1, 28, 28)) == [
        ("Conv2d", (20, 24, 24)),
        ("ReLU", (20, 24, 24)),
        ("MaxPool2d", (20, 12, 12)),
        ("Conv2d", (50, 8, 8)),
        ("ReLU", (50, 8, 8)),
        ("MaxPool2d", (50, 4, 4)),
        ("Flatten", (800,)),
        ("Linear", (500,)),
        ("ReLU", (500,)),
        ("Linear", (10,)),
    ]


def test_vgg_like_halves_the_image_five_times_and_normalises_each_layer():
    shapes = hidden_shapes(vgg_like(0.125), torch.rand(1, 3, 32, 32))
    expected = []
    for repeats, channels, size in ((2, 8, 32), (2, 16, 16), (3, 32, 8), (3, 64, 4), (3, 64, 2)):
        expected += [(name, (channels, size, size)) for name in ("Conv2d", "BatchNorm2d", "ReLU")] * repeats
        expected.append(("MaxPool2d", (channels, size // 2, size // 2)))
    expected += [(name, (64,)) for name in ("Flatten", "Linear", "BatchNorm1d", "ReLU")]
    assert shapes == [*expected, ("Linear", (10,))]


@pytest.mark.parametrize(
    ("width", "channels"),
    [(0.25, [16, 32, 64, 128]), (0.5, [32, 64, 128, 256]), (1.5, [96, 192, 384, 768]), (1e-9, [1]), (0.011, [1, 3, 6])],
)
def test_width_multiplies_the_channels(width, channels):
    with torch.device("meta"):
        net = vgg_like(width)
    hidden = [layer.out_channels for layer in net if isinstance(layer, nn.Conv2d)]
    assert list(dict.fromkeys(hidden)) == channels
    assert len(hidden) == 13


@pytest.mark.parametrize("width", [0, -0.5, math.inf, math.nan])
def test_vgg_like_refuses_a_width(width):
    with pytest.raises(ValueError, match=r"expected a width with 0 < width < inf, .* but got (0|-0\.5|inf|nan)$"):
        vgg_like(width)


@pytest.mark.parametrize("num_classes", [0, -1, 2.0])
def test_vgg_like_refuses_a_number_of_classes(num_classes):
    with pytest.raises(ValueError, match=r"vgg_like: expected num_classes, a positive integer, but got (0|-1|2\.0)$"):
        vgg_like(0.1, num_classes)
