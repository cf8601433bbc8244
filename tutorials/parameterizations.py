"""Additive against multiplicative noise (figure 2 of the paper): sparsity and bound over epochs, and gradient noise.

The posterior N(theta, sigma^2) is trained in (theta, log sigma^2) and in (theta, log alpha) from the same start. After
each epoch sparsity and the bound are kept; at the end the variance of the stochastic gradient in theta is measured at
one and the same posterior in both parameterisations, over repeated evaluations on one batch.
"""

from typing import Any, Literal

import torch
from common import categorical, in_order, load, parser, run_of, start, two_or_more, write
from lab.datasets import batches
from lab.nets import lenet_300_100
from lab.recipes import train_sparse
from matplotlib.figure import Figure
from torch import Tensor

import pyro_sparsevd as sparsevd

Parameterization = Literal["additive", "multiplicative"]
PARAMETERIZATIONS: tuple[Parameterization, ...] = ("additive", "multiplicative")


def gradient_variance(
    model: sparsevd.Supervised, guide: sparsevd.AutoSparseNormal, x: Tensor, y: Tensor, repeats: int
) -> Tensor:
    """Returns the variance of the gradient in theta of each weight."""
    loss = sparsevd.SparseVD_ELBO(kl="exact")(model, guide)
    loss(x, y)
    locs = list(guide.locs.parameters())
    draws = [torch.autograd.grad(loss(x, y), locs) for _ in range(repeats)]
    return torch.cat([torch.stack(of_site).var(0).flatten() for of_site in zip(*draws, strict=True)])


def main() -> None:
    """Runs the experiment."""
    options = parser(str(__doc__), epochs=60, out="parameterizations.png")
    options.add_argument(
        "--repeats", type=two_or_more, default=100, help="gradients to take the variance of (%(default)s)"
    )
    args = options.parse_args()
    data = load(args)
    histories: dict[str, list[dict[str, float]]] = {}
    ratios: dict[str, float] = {}
    for trained_in in PARAMETERIZATIONS:
        torch.manual_seed(args.seed)
        bnn = sparsevd.bayesianize(lenet_300_100().to(args.device))
        model = sparsevd.Supervised(bnn, categorical, num_data=len(data.train))
        guide = sparsevd.AutoSparseNormal(model, init_log_variance=-8.0, parameterization=trained_in)
        train, validation = batches(data.train, args.batch_size), in_order(data.validation)
        run = run_of(args, trained_in)
        history = train_sparse(model, guide, train, validation=validation, epochs=args.epochs, run=run)
        histories[trained_in] = history
        posteriors = {name: (q.loc.detach(), q.log_variance.detach()) for name, q in guide.posteriors.items()}
        x, y = data.train[:100]
        additive, multiplicative = (
            gradient_variance(model, at(posteriors, model, measured_in), x, y, args.repeats)
            for measured_in in PARAMETERIZATIONS
        )
        ratios[trained_in] = float((multiplicative / additive)[additive > 0].median())

    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, history), color, style in zip(histories.items(), ("#D55E00", "#0072B2"), ("-", "--"), strict=True):
        left.plot([100 * h["sparsity"] for h in history], color=color, linestyle=style, label=name)
        right.plot([h["nll"] + h["kl"] for h in history], color=color, linestyle=style, label=name)
    left.set(xlabel="epoch", ylabel="sparsity at threshold 3, %")
    right.set(xlabel="epoch", ylabel="negative bound, mean over the epoch, nats", yscale="log")
    left.legend()

    for name, history in histories.items():
        print(f"{name:15s} sparsity {history[-1]['sparsity']:.2%}, validation error {history[-1]['error']:.2%}")
    for name, ratio in ratios.items():
        print(f"{name:15s} posterior: variance of the gradient in theta, multiplicative over additive {ratio:.3g}")
    print("(the median over the weights)")
    write(args, figure, {"histories": histories, "median_variance_ratios": ratios})


def at(
    posteriors: dict[str, Any], model: sparsevd.Supervised, parameterization: Parameterization
) -> sparsevd.AutoSparseNormal:
    """Returns a guide in a parameterisation, at given posteriors."""
    guide = sparsevd.AutoSparseNormal(model, parameterization=parameterization)
    locs, spreads = (dict(part.named_parameters()) for part in list(guide.children())[:2])
    with torch.no_grad():
        for name, (loc, log_variance) in posteriors.items():
            key = f"{name}_unconstrained"
            locs[key].copy_(loc)
            log_square = 2 * loc.abs().clamp_min(1e-15).log()
            spreads[key].copy_(log_variance if parameterization == "additive" else log_variance - log_square)
    return guide


if __name__ == "__main__":
    start(main)
