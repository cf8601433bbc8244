"""How much of a threshold that was chosen on held-out data is chance, by several rules of choice.

Trains LeNet-300-100 for each seed, fine-tunes it at several thresholds, and predicts training images that were held
out, 20,000 of MNIST or 2,000 of the bundled digits. Each rule then chooses among the thresholds on many validation sets
of a quarter of these images, and what it chose is measured on the others. The test images are not used.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from classification import THRESHOLDS
from common import Data, categorical, classifier, in_order, load, natural, parser, positive, run_of, start, write
from lab.datasets import batches
from lab.nets import lenet_300_100
from lab.recipes import fine_tune, train_sparse
from matplotlib.figure import Figure
from torch import Tensor

import pyro_sparsevd as sparsevd
from pyro_sparsevd.evaluation import network_predictions
from pyro_sparsevd.sparsity.threshold import smoothed_threshold

VALIDATION_SETS = 150
TOLERANCE = 0.05


class Tuned(NamedTuple):
    """What a fine-tuned network makes of each held-out image."""

    nll: Tensor
    wrong: Tensor
    compression: float

    def of(self, images: Tensor) -> "Tuned":
        """Returns the same of some of the images."""
        return Tuned(self.nll[images], self.wrong[images], self.compression)


def smoothed(tuned: Mapping[float, Tuned]) -> float:
    """The rule of :func:`choose_threshold`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the ends of the thresholds tried
        return smoothed_threshold({t: found.nll.mean().item() for t, found in tuned.items()}, TOLERANCE)


def not_smoothed(tuned: Mapping[float, Tuned]) -> float:
    """The same tolerance above the best likelihood itself."""
    best = min(found.nll.mean() for found in tuned.values())
    return min(t for t, found in tuned.items() if found.nll.mean() <= (1 + TOLERANCE) * best)


def paired_tests(tuned: Mapping[float, Tuned]) -> float:
    """The smallest that is not shown to be worse than the best, in likelihood or error, by a test at 2.5 % each."""
    best = min(tuned.values(), key=lambda found: found.nll.mean().item())

    def as_good(found: Tuned) -> bool:
        worse = torch.stack([found.nll - best.nll, found.wrong - best.wrong])
        return bool((worse.mean(1) <= 1.96 * worse.std(1, correction=0) / worse.shape[1] ** 0.5).all())

    return min(t for t, found in tuned.items() if as_good(found))


RULES: dict[str, Callable[[Mapping[float, Tuned]], float]] = {
    "two paired tests": paired_tests,
    "within 5 % of the best": not_smoothed,
    "within 5 % of the best of a curve": smoothed,
    "always 1": lambda tuned: 1.0,
}


def tune(seed: int, data: Data, args: Any) -> dict[float, Tuned]:
    """Trains a network, and returns what it is at each threshold."""
    torch.manual_seed(seed)
    model, guide = classifier(lenet_300_100().to(args.device), len(data.train))
    train = batches(data.train, args.batch_size)
    train_sparse(model, guide, train, epochs=args.epochs, run=run_of(args, str(seed), seed=seed))
    options = {"epochs": args.epochs // 9 if args.fine_tune is None else args.fine_tune, "run": run_of(args)}
    found = {}
    for threshold in THRESHOLDS:
        summary = sparsevd.sparsify(guide, threshold)
        network = fine_tune(sparsevd.prune(model.network, guide, summary), categorical, train, **options)
        predicted = network_predictions(network, categorical, in_order(data.validation))
        found[threshold] = Tuned(-predicted.log_likelihoods[0].double(), predicted.errors, summary.compression)
    return found


def choices(rule: Callable, tuned: Mapping[float, Tuned]) -> dict[str, list[float]]:
    """Returns what a rule chooses on each of many validation sets, and how good that is."""
    generator = torch.Generator().manual_seed(0)
    number = len(tuned[THRESHOLDS[0]].nll)
    found: dict[str, list[float]] = {"threshold": [], "compression": [], "nll": [], "error": []}
    for _ in range(VALIDATION_SETS):
        used, others = torch.randperm(number, generator=generator).split([number // 4, number - number // 4])
        threshold = rule({t: network.of(used) for t, network in tuned.items()})
        chosen = tuned[threshold].of(others)
        values = threshold, chosen.compression, chosen.nll.mean().item(), chosen.wrong.mean().item()
        for values_of, value in zip(found.values(), values, strict=True):
            values_of.append(value)
    return found


def summarise(found: list[dict[str, list[float]]]) -> dict[str, float]:
    """Returns the means over trainings, and the mean standard deviations within one."""
    return {
        "sd of threshold": statistics.mean(statistics.pstdev(of["threshold"]) for of in found),
        "sd of log compression": statistics.mean(statistics.pstdev(map(math.log, of["compression"])) for of in found),
        **{name: statistics.mean(statistics.mean(of[name]) for of in found) for name in found[0]},
    }


def draw(tuned: Mapping[int, Mapping[float, Tuned]], chosen: Mapping[str, list[dict[str, list[float]]]]) -> Figure:
    """Draws the likelihoods of each training with their curve, and how often each rule chooses each threshold."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = torch.linspace(THRESHOLDS[0], THRESHOLDS[-1], 100)
    powers = torch.arange(3)
    for color, (seed, of) in enumerate(tuned.items()):
        nlls = torch.stack([found.nll.mean() for found in of.values()]).float()
        left.plot(THRESHOLDS, nlls, "o", color=f"C{color}", label=f"seed {seed}")
        curve = torch.linalg.lstsq(torch.tensor(THRESHOLDS)[:, None] ** powers, nlls[:, None]).solution
        left.plot(grid, (grid[:, None] ** powers) @ curve, color=f"C{color}")
    left.set(xlabel="threshold", ylabel="negative log likelihood", title="fine-tuned networks, all held-out images")
    left.legend()
    for position, (rule, found) in enumerate(chosen.items()):
        every = [t for of in found for t in of["threshold"]]
        heights = [every.count(t) / len(every) for t in THRESHOLDS]
        places = [t + 0.1 * (position - (len(chosen) - 1) / 2) for t in THRESHOLDS]
        right.bar(places, heights, width=0.1, label=rule)
    right.set(xlabel="threshold", ylabel="frequency", title="chosen on a quarter of these images")
    right.legend()
    return figure


def main() -> None:
    """Runs the experiment."""
    options = parser(str(__doc__), epochs=54, out="threshold_choice.png")
    options.add_argument("--seeds", type=positive, default=4, help="how many, from --seed (%(default)s)")
    options.add_argument("--fine-tune", type=natural, help="epochs for the weights that are left (a ninth of --epochs)")
    args = options.parse_args()
    data = load(args, held_out=(2_000, 20_000))
    tuned = {seed: tune(seed, data, args) for seed in range(args.seed, args.seed + args.seeds)}
    chosen = {name: [choices(rule, of) for of in tuned.values()] for name, rule in RULES.items()}
    results = {name: summarise(found) for name, found in chosen.items()}
    print("\n" + " " * 34 + "".join(f"{title:>23s}" for title in results["always 1"]))
    for name, values in results.items():
        print(f"{name:34s}" + "".join(f"{value:23.4f}" for value in values.values()))
    points = {
        seed: {t: [f.compression, *(v.mean().item() for v in f[:2])] for t, f in of.items()}
        for seed, of in tuned.items()
    }
    write(args, draw(tuned, chosen), {"results": results, "compression, nll, error": points})


if __name__ == "__main__":
    start(main)
