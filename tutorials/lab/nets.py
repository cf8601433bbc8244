"""The networks of the Sparse Variational Dropout paper, as ``nn.Sequential``.

Each returns class logits and has torch's default initialisation. Counts of weights are without biases and without
the parameters of normalisation layers, as in the literature on compression.
"""

__all__ = ["lenet_5_caffe", "lenet_300_100", "vgg_like"]

import math

from torch import nn


def lenet_300_100() -> nn.Sequential:
    """Returns LeNet-300-100, a fully-connected network of 266,200 weights for MNIST.

    References:
        | Gradient-Based Learning Applied to Document Recognition (LeCun, Bottou, Bengio, Haffner, 1998)
        | https://doi.org/10.1109/5.726791
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
        | https://arxiv.org/abs/1701.05369

    Returns:
        A network from images ``(N, 1, 28, 28)`` to logits ``(N, 10)``.

    Example:
        >>> net = lenet_300_100()
        >>> net(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in net.parameters() if p.dim() > 1)
        266200
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(784, 300),
        nn.ReLU(),
        nn.Linear(300, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )


def lenet_5_caffe() -> nn.Sequential:
    """Returns LeNet-5-Caffe, a convolutional network of 430,500 weights for MNIST.

    It is LeCun's LeNet-5 as Caffe's example and, since, the literature on compression have it: wider, with
    max-pooling and ReLU, here after each hidden layer.

    References:
        | Gradient-Based Learning Applied to Document Recognition (LeCun, Bottou, Bengio, Haffner, 1998)
        | https://doi.org/10.1109/5.726791
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
        | https://arxiv.org/abs/1701.05369

    Returns:
        A network from images ``(N, 1, 28, 28)`` to logits ``(N, 10)``.

    Example:
        >>> net = lenet_5_caffe()
        >>> net(torch.rand(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in net.parameters() if p.dim() > 1)
        430500
    """
    return nn.Sequential(
        nn.Conv2d(1, 20, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(20, 50, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(800, 500),
        nn.ReLU(),
        nn.Linear(500, 10),
    )


def vgg_like(width: float = 1.0, num_classes: int = 10) -> nn.Sequential:
    """Returns the VGG-like network for CIFAR-10: 13 convolutions and 2 dense layers, with batch normalisation.

    At width 1 and 10 classes it has 14,977,728 weights. It is VGG-16 for images of 32x32, with the dense layers cut
    down; the binary dropout of the original is left out, since variational dropout takes its place.

    References:
        | Very Deep Convolutional Networks for Large-Scale Image Recognition (Simonyan, Zisserman, 2014)
        | https://arxiv.org/abs/1409.1556
        | 92.45% on CIFAR-10 in Torch (Zagoruyko, 2015)
        | http://torch.ch/blog/2015/07/30/cifar.html
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
        | https://arxiv.org/abs/1701.05369

    Args:
        width: What the 64 to 512 channels of every hidden layer are multiplied by; the product is rounded, and at
            least 1. The paper's k is 0.25, 0.5, 1 or 1.5.
        num_classes: The number of logits.

    Returns:
        A network from images ``(N, 3, 32, 32)`` to logits ``(N, num_classes)``. In training mode, N is at least 2.

    Raises:
        ValueError: If ``width`` is not positive and finite, or ``num_classes`` not a positive integer.

    Example:
        >>> net = vgg_like(width=0.25)
        >>> net(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in net.parameters() if p.dim() > 1)
        937392
    """
    if not 0 < width < math.inf:
        raise ValueError(f"vgg_like: expected a width with 0 < width < inf, such as 0.5, but got {width!r}")
    if not (isinstance(num_classes, int) and num_classes > 0):
        raise ValueError(f"vgg_like: expected num_classes, a positive integer, but got {num_classes!r}")
    layers: list[nn.Module] = []
    channels = 3
    for repeats, base in ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512)):
        for _ in range(repeats):
            previous, channels = channels, max(1, round(base * width))
            layers += [nn.Conv2d(previous, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    # Five poolings leave one pixel of 32x32, so the dense layers see the channels alone.
    layers += [nn.Flatten(), nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(channels, num_classes))
