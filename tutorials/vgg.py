"""Sparse Variational Dropout on CIFAR-10 with the VGG-like network.

Trains a dense network and its sparse Bayesian version for as long, both with images flipped at random, prunes, and
fine-tunes the weights that are left. Without --data-dir it only tries itself out, on the bundled digits padded to
32x32 in three channels.
"""

import torch
from classification import add_options, run
from common import CIFAR10_FOLDER, load_cifar10, parser, positive_number, start
from jsonargparse import Namespace
from lab.nets import vgg_like
from torch import Tensor, nn


class RandomFlip(nn.Module):
    """Mirrors each image or not, by a toss of a coin, in training."""

    def forward(self, images: Tensor) -> Tensor:
        """Returns the images."""
        if not self.training:
            return images
        flipped = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        return torch.where(flipped, images.flip(-1), images)


def parse_args() -> Namespace:
    """Reads the options."""
    options = parser(str(__doc__), epochs=60, out="vgg.png", batch_size=128, data_dir=CIFAR10_FOLDER)
    options.add_argument("--width", type=positive_number, default=1.0, help="the paper's k (%(default)s)")
    options.add_argument("--channels-last", action="store_true", help="the order of images and kernels in memory")
    add_options(options, lr=1e-3, init_log_variance=-10.0, dense_epochs="as --epochs")
    args = options.parse_args()
    args.dense_epochs = args.dense_epochs or args.epochs
    return args


def main() -> None:
    """Runs the tutorial."""
    args = parse_args()
    torch.manual_seed(args.seed)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format

    def network() -> nn.Module:
        net = nn.Sequential(RandomFlip(), vgg_like(args.width))
        return net.to(args.device, memory_format=layout)  # type: ignore[call-overload]

    run(args, network, load_cifar10(args), {"width": args.width, "channels_last": args.channels_last})


if __name__ == "__main__":
    start(main)
