"""Animations of what training does: to the weights of a dense and of a convolutional layer, and to their posterior.

LeNet-300-100 and LeNet-5-Caffe are trained by Sparse VD on 3,500 of the bundled digits. Three files are written below
--out: weights.gif has the weights of their first layers, without those that are dropped; scales.gif the means and
standard deviations of 2,000 weights, which move to where the prior has its ridge; marginals.gif the posterior densities
of ten weights.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from common import positive, seed
from jsonargparse import ArgumentParser, Namespace
from lab.datasets import batches, digits
from lab.nets import lenet_5_caffe, lenet_300_100
from torch import Tensor, nn

import pyro_sparsevd as sparsevd
from pyro_sparsevd import plots
from pyro_sparsevd.plots.style import BLUE, ORANGE

THRESHOLD = 3.0
EVERY = 2  # epochs from frame to frame


def train(network: nn.Module, layer: str, args: Namespace) -> list[sparsevd.SparseNormal]:
    """Returns the posterior of a layer before training and, each two epochs, after them."""
    train, _ = digits()
    bnn = sparsevd.bayesianize(network)
    model = sparsevd.Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=len(train))
    guide = sparsevd.AutoSparseNormal(model, init_log_variance=-8.0)

    def posterior() -> sparsevd.SparseNormal:
        q = guide.posteriors[layer]
        return sparsevd.SparseNormal(q.loc.detach().clone(), q.log_variance.detach().clone())

    history = [posterior()]

    def record(epoch: int, numbers: dict[str, Any]) -> None:
        if (epoch + 1) % EVERY == 0 or epoch + 1 == args.epochs:
            history.append(posterior())

    sparsevd.fit(model, guide, batches(train, 100), epochs=args.epochs, callbacks=[record])
    return history


def kept(q: sparsevd.SparseNormal) -> Tensor:
    """Returns the means, with those that are dropped at zero."""
    return torch.where(q.log_alpha > THRESHOLD, 0.0, q.loc)


def draw_weights(frame: tuple[int, Tensor, Tensor], limits: tuple[float, float], figure: Any) -> None:
    """Draws the weights of units of a dense layer and the kernels of a convolution, each on one scale."""
    epoch, *weights = frame
    for part, weight, limit, title in zip(
        figure.subfigures(1, 2), weights, limits, ("dense layer", "convolution"), strict=True
    ):
        part.suptitle(f"{title}, epoch {epoch}")
        axes = part.subplots(4, 5, gridspec_kw={"wspace": 0.08, "hspace": 0.08})
        for axis, image in zip(axes.flat, weight.numpy(), strict=True):
            masked = np.ma.masked_equal(image, 0)
            axis.imshow(masked, cmap=plots.style.SIGNED, vmin=-limit, vmax=limit, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="lightgray", linewidth=0.5)


def draw_scales(frame: tuple[int, Tensor, Tensor], figure: Any) -> None:
    """Draws the standard deviations of weights against the magnitudes of their means."""
    epoch, loc, log_variance = frame
    plots.mean_and_scale(loc, log_variance, threshold=THRESHOLD, title=f"epoch {epoch}", figure=figure)
    figure.axes[0].set(xlim=(1e-6, 3), ylim=(3e-3, 3))


def draw_marginals(frame: tuple[int, Tensor, Tensor], figure: Any) -> None:
    """Draws the posterior densities of some weights."""
    epoch, loc, log_variance = frame
    axis = figure.subplots()
    w = torch.linspace(-2, 2, 1001)
    for q in map(sparsevd.SparseNormal, loc, log_variance):
        dropped = bool(q.log_alpha > THRESHOLD)
        axis.plot(w, q.log_prob(w).exp(), color=BLUE if dropped else ORANGE, linestyle="--" if dropped else "-")
    axis.plot([], [], color=ORANGE, label="kept")
    axis.plot([], [], color=BLUE, linestyle="--", label="dropped")
    axis.set(xlim=(-2, 2), ylim=(0.05, 100), yscale="log", xlabel="weight w", ylabel="posterior density")
    axis.set(title=f"ten weights, epoch {epoch}")
    axis.legend(loc="upper right")


def main() -> None:
    """Trains, and writes the files."""
    options = ArgumentParser(description=str(__doc__))
    options.add_argument("--epochs", type=positive, default=40, help="epochs of training (%(default)s)")
    options.add_argument("--seed", type=seed, default=0, help="of the random numbers (%(default)s)")
    options.add_argument("--out", type=Path, default=Path("."), help="the folder of the files (%(default)s)")
    args = options.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    dense = train(lenet_300_100(), "1.weight", args)
    convolution = train(lenet_5_caffe(), "0.weight", args)

    animate = partial(plots.animate, frames_per_second=4, hold=8, colors=32)
    images = [kept(q).view(-1, 28, 28) for q in dense], [kept(q).flatten(0, 1) for q in convolution]
    order = images[0][-1].count_nonzero((1, 2)).argsort(descending=True, stable=True)[:20]
    images = [image[order] for image in images[0]], images[1]
    limits = (0.3, max(float(image.abs().max()) for image in images[1]))
    epochs = [min(EVERY * number, args.epochs) for number in range(len(dense))]
    frames = list(zip(epochs, *images, strict=True))
    draw = lambda frame, figure: draw_weights(frame, limits, figure)  # noqa: E731
    animate(draw, frames, args.out / "weights.gif", size=(8, 3.6))

    some = torch.randperm(dense[0].loc.numel())[:2_000]
    cloud = [
        (epoch, q.loc.flatten()[some], q.log_variance.flatten()[some]) for epoch, q in zip(epochs, dense, strict=True)
    ]
    animate(draw_scales, cloud, args.out / "scales.gif", size=(5, 4))

    means, log_alpha = dense[-1].loc.flatten(), dense[-1].log_alpha.flatten()
    left = (log_alpha < THRESHOLD).nonzero()[:, 0]
    left = left[means[left].argsort()]
    spread = left[torch.linspace(0, len(left) - 1, 6).long()]  # from the most negative to the largest
    ten = torch.cat([spread, (log_alpha > THRESHOLD).nonzero()[:, 0][:4]])
    marginals = [
        (epoch, q.loc.flatten()[ten], q.log_variance.flatten()[ten]) for epoch, q in zip(epochs, dense, strict=True)
    ]
    animate(draw_marginals, marginals, args.out / "marginals.gif", size=(5, 4))
    print(f"animations: {args.out / 'weights.gif'}, scales.gif and marginals.gif beside it")


if __name__ == "__main__":
    main()
