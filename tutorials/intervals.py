"""What posterior intervals are worth: linear regressions with 50 features of which 5 matter, and 100 objects.

For several priors: how often the central 90 % of the posterior hold a true coefficient that is not 0, and the central
90 % of the prediction a new target; and the negative log likelihood of new targets, in nats. The normal prior has its
exact posterior, and a horseshoe under NUTS stands beside the posteriors that factorise. The scale of the noise is
known to be 1, so that no prediction has less than 1.419 nats.
"""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from common import bare_parser, natural, positive, start, write
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS
from torch import Tensor, nn

import pyro_sparsevd as sparsevd

OBJECTS, TRUE, NOISE_FEATURES, SAMPLES = 100, (2.0, -1.5, 1.0, -0.7, 0.4), 45, 1_000


def make_data(correlation: float, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns features and targets to fit, and as many as SAMPLES to test on; any two features correlate."""
    generator = torch.Generator().manual_seed(seed)
    size = OBJECTS + SAMPLES, len(TRUE) + NOISE_FEATURES
    shared = torch.randn(size[0], 1, generator=generator)
    x = (1 - correlation) ** 0.5 * torch.randn(size, generator=generator) + correlation**0.5 * shared
    y = x[:, : len(TRUE)] @ torch.tensor(TRUE) + torch.randn(size[0], generator=generator)
    return x[:OBJECTS], y[:OBJECTS], x[OBJECTS:], y[OBJECTS:]


def factorised(prior: Any, x: Tensor, y: Tensor, epochs: int) -> Tensor:
    """Returns samples of the coefficients under the factorised posterior."""
    network = nn.Sequential(nn.Linear(x.shape[1], 1, bias=False), nn.Flatten(0))
    model = sparsevd.Supervised(
        sparsevd.bayesianize(network, prior), lambda mean: dist.Normal(mean, 1.0), num_data=len(x)
    )
    guide = sparsevd.AutoSparseNormal(model, init_log_variance=-8.0)
    sparsevd.fit(model, guide, [(x, y)], epochs=epochs, lr=1e-2)
    return guide.posteriors["0.weight"].sample((SAMPLES,))[:, 0]


def exact(x: Tensor, y: Tensor) -> Tensor:
    """Returns samples of the coefficients under the posterior of a standard normal prior."""
    precision = torch.eye(x.shape[1]) + x.T @ x
    mean = torch.linalg.solve(precision, x.T @ y)
    return dist.MultivariateNormal(mean, precision_matrix=precision).sample((SAMPLES,))


def horseshoe_by_nuts(x: Tensor, y: Tensor, samples: int) -> Tensor:
    """Returns samples of the coefficients under a horseshoe prior."""

    def model() -> None:
        shared = pyro.sample("shared", dist.HalfCauchy(1.0))
        scales = pyro.sample("scales", dist.HalfCauchy(torch.ones(x.shape[1])).to_event(1))
        units = pyro.sample("units", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        coefficients = pyro.deterministic("coefficients", shared * scales * units)
        pyro.sample("y", dist.Normal(x @ coefficients, 1.0).to_event(1), obs=y)

    mcmc = MCMC(NUTS(model, max_tree_depth=8), samples, warmup_steps=samples)
    mcmc.run()
    found = mcmc.get_samples()
    return found["shared"][:, None] * found["scales"] * found["units"]


def score(coefficients: Tensor, x: Tensor, y: Tensor) -> list[float]:
    """Returns the coverage of true coefficients, and the coverage and the mean NLL of new targets."""
    means = coefficients @ x.T
    nll = -(dist.Normal(means, 1.0).log_prob(y).logsumexp(0) - torch.tensor(float(len(means))).log()).mean()
    true = coefficients[:, : len(TRUE)]
    return [covered(true, torch.tensor(TRUE)), covered(means + torch.randn_like(means), y), float(nll)]


def covered(samples: Tensor, values: Tensor) -> float:
    """Returns the part of the values that the central 90 % of their samples hold."""
    low, high = samples.quantile(torch.tensor([0.05, 0.95]), dim=0)
    return float(((low <= values) & (values <= high)).float().mean())


def main() -> None:
    """Runs the experiment."""
    options = bare_parser(str(__doc__), epochs=4_000, out="intervals.png")
    options.add_argument("--seeds", type=positive, default=4, help="how many data sets, from --seed (%(default)s)")
    options.add_argument("--nuts-samples", type=natural, default=500, help="after as many of warm-up (%(default)s)")
    args = options.parse_args()
    methods = {
        "log-uniform": lambda x, y: factorised(sparsevd.LogUniform(), x, y, args.epochs),
        "horseshoe": lambda x, y: factorised(sparsevd.nn.horseshoe(), x, y, args.epochs),
        "normal": lambda x, y: factorised(dist.Normal(0.0, 1.0), x, y, args.epochs),
        "normal, exact": exact,
    }
    if args.nuts_samples:
        methods["horseshoe, NUTS"] = lambda x, y: horseshoe_by_nuts(x, y, args.nuts_samples)
    titles = "coverage of true coefficients", "coverage of new targets", "NLL of new targets"
    results: dict[str, dict[str, list[float]]] = {}
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    axes = figure.subplots(1, len(titles))
    print("\n" + " " * 24 + "".join(f"{title:>32s}" for title in titles))
    for correlation in (0.0, 0.7):
        data = [make_data(correlation, seed) for seed in range(args.seed, args.seed + args.seeds)]
        for name, method in methods.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(args.seed)
            found = torch.tensor([score(method(x, y), new_x, new_y) for x, y, new_x, new_y in data])
            case = f"{name}, r = {correlation:g}"
            results[case] = dict(zip(titles, found.mean(0).tolist(), strict=True))
            print(f"{case:24s}" + "".join(f"{value:32.3f}" for value in results[case].values()), flush=True)
            for axis, title in zip(axes, titles, strict=True):
                axis.barh(case, results[case][title], color="#0072B2" if correlation == 0 else "#D55E00")
    for axis, title in zip(axes, titles, strict=True):
        axis.invert_yaxis()
        axis.set(title=title)
        axis.label_outer()
    axes[2].set_xlim(1.4, None)
    for axis in axes[:2]:
        axis.axvline(0.9, color="black", linestyle=":")
    write(args, figure, {"results": results})


if __name__ == "__main__":
    start(main)
