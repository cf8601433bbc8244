"""Which inputs matter: sparse linear and logistic regression as plain Pyro models, without any network.

1,000 objects have 10 features that matter and 990 that are noise. A log-uniform prior on the coefficients and SVI
tell which to keep; beside it stand the Lasso with its penalty cross-validated and, unless --horseshoe-samples is 0,
a horseshoe prior under NUTS, where a feature counts as kept if the central 90 % of its samples exclude 0. --device and
--resume concern the first, as --epochs and --batch-size do; the others run on the CPU, from the start. By default an
epoch is one step on all objects. --data-dir is there as in the other scripts: the data are made, not read.
"""

import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from common import finite, natural, parser, run_of, start, write
from jsonargparse import Namespace
from lab.datasets import batches
from lab.recipes import train_sparse
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS
from sklearn.linear_model import LassoCV, LogisticRegressionCV
from torch import Tensor
from torch.utils.data import TensorDataset

import pyro_sparsevd as sparsevd

OBJECTS, RELEVANT, NOISE = 1_000, 10, 990

# scikit-learn 1.8 has another name for the penalty.
_SINCE_1_8 = "use_legacy_attributes" in inspect.signature(LogisticRegressionCV).parameters
_L1: dict[str, Any] = {"l1_ratios": (1.0,), "use_legacy_attributes": False} if _SINCE_1_8 else {"penalty": "l1"}


def likelihood(kind: str, output: Tensor) -> dist.TorchDistribution:
    """Returns the distribution of the targets; a regression's noise has a scale of its own, with a prior."""
    if kind == "logistic":
        return dist.Bernoulli(logits=output)
    return dist.Normal(output, pyro.sample("scale", dist.LogNormal(0.0, 1.0)))


def sparse_model(kind: str) -> Callable:
    """Returns a linear model with a log-uniform prior on its coefficients."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        with torch.device(x.device):
            bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
            coefficients = pyro.sample("coefficients", sparsevd.LogUniform().expand([1, x.shape[1]]).to_event(2))
            fn = likelihood(kind, F.linear(x, coefficients)[:, 0] + bias)
        with pyro.plate("data", OBJECTS, subsample=x):
            pyro.sample("y", fn, obs=y)

    return model


def horseshoe_model(kind: str) -> Callable:
    """Returns a linear model with a horseshoe prior on its coefficients, not centred."""

    def model(x: Tensor, y: Tensor | None = None) -> None:
        bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
        shared = pyro.sample("shared_scale", dist.HalfCauchy(0.1))
        scales = pyro.sample("scales", dist.HalfCauchy(torch.ones(x.shape[1])).to_event(1))
        units = pyro.sample("units", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
        coefficients = pyro.deterministic("coefficients", units * scales * shared)
        fn = likelihood(kind, x @ coefficients + bias)
        with pyro.plate("data", len(x)):
            pyro.sample("y", fn, obs=y)

    return model


def make_data(kind: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns features and targets of twice as many objects, half of them to test on, and the true coefficients."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * OBJECTS, RELEVANT + NOISE, generator=generator)
    true = torch.zeros(RELEVANT + NOISE)
    true[:RELEVANT] = (1 + torch.rand(RELEVANT, generator=generator)) * (-1.0) ** torch.arange(RELEVANT)
    output = x @ true
    if kind == "logistic":
        return x, (torch.rand(2 * OBJECTS, generator=generator) < output.sigmoid()).float(), true
    return x, output + 0.3 * torch.randn(2 * OBJECTS, generator=generator), true


def fit_sparse(kind: str, x: Tensor, y: Tensor, args: Namespace) -> dict[str, Any]:
    """Fits the posterior, and keeps what the threshold keeps."""
    pyro.clear_param_store()
    model = sparse_model(kind)
    guide = sparsevd.AutoSparseNormal(model, init_log_variance=-8.0)
    data = TensorDataset(x.to(args.device), y.to(args.device))
    guide(*data[:])
    options = {"epochs": args.epochs, "lr": 1e-2, "warm_up": 0.25, "run": run_of(args, kind)}
    train_sparse(model, guide, batches(data, args.batch_size), **options)
    guide.cpu()
    summary = sparsevd.sparsify(guide, args.threshold)
    median = guide.median()
    coefficients = summary.masked("coefficients", median["coefficients"])[0]
    log_alpha = guide.posteriors["coefficients"].log_alpha[0].detach()
    return {"coefficients": coefficients, "bias": median["bias"], "kept": coefficients != 0, "log_alpha": log_alpha}


def fit_lasso(kind: str, x: Tensor, y: Tensor, args: Namespace) -> dict[str, Any]:
    """Fits scikit-learn's Lasso, or a logistic regression with its penalty."""
    if kind == "logistic":
        found = LogisticRegressionCV(Cs=np.logspace(-3, 0, 10), solver="liblinear", scoring="neg_log_loss", **_L1)
        found.fit(x.numpy(), y.numpy())
    else:
        found = LassoCV(cv=5).fit(x.numpy(), y.numpy())
    coefficients = torch.as_tensor(found.coef_).float().reshape(-1)
    bias = torch.as_tensor(np.asarray(found.intercept_)).float().reshape(())
    return {"coefficients": coefficients, "bias": bias, "kept": coefficients != 0}


def fit_horseshoe(kind: str, x: Tensor, y: Tensor, args: Namespace) -> dict[str, Any]:
    """Samples the posterior of the horseshoe model."""
    kernel = NUTS(horseshoe_model(kind), max_tree_depth=8)  # shorter trees leave intervals that are far too narrow
    mcmc = MCMC(kernel, args.horseshoe_samples, warmup_steps=args.horseshoe_samples)
    mcmc.run(x, y)
    samples = mcmc.get_samples()
    coefficients = samples["units"] * samples["scales"] * samples["shared_scale"][:, None]
    low, high = coefficients.quantile(torch.tensor([0.05, 0.95]), dim=0)
    return {"coefficients": coefficients.mean(0), "bias": samples["bias"].mean(), "kept": (low > 0) | (high < 0)}


def evaluate(kind: str, found: dict[str, Any], x: Tensor, y: Tensor) -> dict[str, float]:
    """Returns which features were kept, and the error on other objects."""
    output = x @ found["coefficients"] + found["bias"]
    error = ((output > 0).float() != y).float().mean() if kind == "logistic" else ((output - y) ** 2).mean()
    kept = found["kept"]
    return {
        "relevant_kept": int(kept[:RELEVANT].sum()),
        "noise_kept": int(kept[RELEVANT:].sum()),
        "error": float(error),
    }


def draw(truths: dict[str, Tensor], estimates: dict[str, dict[str, dict[str, Any]]], count: int = 50) -> Figure:
    """Draws the first coefficients, true and as each method found them, for each kind of data a row on one scale."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, len(estimates["regression"]), sharex=True, sharey="row", squeeze=False)
    for row, (kind, of_methods) in zip(axes, estimates.items(), strict=True):
        row[0].set(ylabel="coefficient")
        for axis, (name, found) in zip(row, of_methods.items(), strict=True):
            kept, values, true = (v[:count] for v in (found["kept"], found["coefficients"], truths[kind]))
            features = torch.arange(len(true))
            axis.plot(features, true, "o", color="black", fillstyle="none", markersize=5, label="truth")
            axis.plot(features[~kept], values[~kept], ".", color="#0072B2", markersize=3, label="estimate, dropped")
            axis.plot(features[kept], values[kept], "X", color="#D55E00", label="estimate, kept")
            axis.set(title=f"{kind}, {name}")
    for axis in axes[-1]:
        axis.set(xlabel=f"feature (the first {count})")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def main() -> None:
    """Runs the experiment."""
    options = parser(
        str(__doc__), epochs=3_000, out="linear_models.png", batch_size=OBJECTS, data_dir="not read: the data are made"
    )
    options.add_argument("--threshold", type=finite, default=3.0, help="log alpha above which features are dropped")
    options.add_argument("--horseshoe-samples", type=natural, default=300, help="and as many to warm up (%(default)s)")
    args = options.parse_args()
    methods = {"Sparse VD": fit_sparse, "Lasso": fit_lasso, "horseshoe, NUTS": fit_horseshoe}
    if args.horseshoe_samples == 0:
        del methods["horseshoe, NUTS"]
    results: dict[str, dict[str, float]] = {}
    estimates: dict[str, dict[str, dict[str, Any]]] = {}
    truths: dict[str, Tensor] = {}
    for kind in ("regression", "logistic"):
        pyro.set_rng_seed(args.seed)
        x, y, truths[kind] = make_data(kind, args.seed)
        train, test = (x[:OBJECTS], y[:OBJECTS]), (x[OBJECTS:], y[OBJECTS:])
        estimates[kind] = {}
        for name, method in methods.items():
            before = time.perf_counter()
            found = estimates[kind][name] = method(kind, *train, args)
            seconds = time.perf_counter() - before
            results[f"{kind}, {name}"] = {**evaluate(kind, found, *test), "seconds": seconds}

    print(f"\n{'':30s}{'relevant kept':>14s}{'noise kept':>12s}{'test error':>12s}{'seconds':>9s}")
    for name, r in results.items():
        kept = f"{r['relevant_kept']:>9d} / {RELEVANT}{r['noise_kept']:>6d} / {NOISE}"
        print(f"{name:30s}{kept}{r['error']:12.3f}{r['seconds']:9.1f}")
    print("test error: mean squared error of the regression, fraction of wrong labels of the logistic regression")
    write(args, draw(truths, estimates), {"results": results})


if __name__ == "__main__":
    start(main)
