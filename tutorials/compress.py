"""A network that was trained, compressed: to a small file, a smaller network and ONNX, with what each step changes.

Trains a dense LeNet, which stands for any network at hand, goes on from its weights with Sparse Variational Dropout,
prunes and fine-tunes. What is left is stored in several ways and read back, shrunk, exported, and run by onnxruntime;
three tables say what that does to the bytes, the time and the uncertainty. Data out of the distribution are patches
of the photographs that scikit-learn ships. Without --data-dir it uses the bundled digits.
"""

import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import onnxruntime
import torch
from classification import add_options, prune_and_tune, train
from common import Data, categorical, in_order, load, parser, positive, run_of, start, tolerance, write
from jsonargparse import Namespace
from lab.datasets import batches
from lab.recipes import fine_tune, score
from lenet import NETS
from matplotlib.figure import Figure
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.data import TensorDataset

import pyro_sparsevd as sparsevd
from pyro_sparsevd.evaluation import network_predictions, sampled_predictions, scores
from pyro_sparsevd.sparsity.quantization import quantization_steps

BATCH_SIZES = 1, 32, 1000
Runner: TypeAlias = Callable[[Tensor], Tensor]


def parse_args() -> Namespace:
    """Reads the options."""
    options = parser(str(__doc__), epochs=54, out="compress.png")
    options.add_argument("--net", choices=NETS, default="lenet-300-100")
    options.add_argument(
        "--tolerance", type=tolerance, default=0.001, help="what quantisation may add to the held-out NLL, in nats"
    )
    options.add_argument("--rounds", type=positive, default=9, help="of the timings, in turns (%(default)s)")
    add_options(options, lr=3e-3)
    args = options.parse_args()
    args.pretrained = True
    return args


def photographs(count: int = 2_000) -> Tensor:
    """Returns grey patches of 28x28 of the two photographs that scikit-learn ships."""
    generator = np.random.default_rng(0)
    patches = []
    for photograph in load_sample_images().images:
        grey = photograph.mean(-1) / 255
        for _ in range(count // 2):
            y, x = generator.integers(0, np.array(grey.shape) - 28)
            patches.append(grey[y : y + 28, x : x + 28])
    return torch.from_numpy(np.stack(patches)).float()[:, None]


def files(
    folder: Path, dense: nn.Module, tuned: nn.Module, tiny: nn.Module, steps: dict[str, float], args: Namespace
) -> dict[str, tuple[int, Callable[[], nn.Module] | None]]:
    """Writes each kind of file; returns its size in bytes, and how to get the network back from it."""
    buffer = io.BytesIO()
    torch.save(dense.state_dict(), buffer)
    found: dict[str, tuple[int, Callable[[], nn.Module] | None]] = {"dense, torch.save": (buffer.tell(), lambda: dense)}
    kinds = {"float32": None, "float16": torch.float16, "steps of the posterior's width": steps}
    sparsevd.storage.register_architecture(args.net, NETS[args.net])  # so that its files load without a network
    for kind, values in kinds.items():
        path = folder / f"{len(found)}.svd"
        sparsevd.save_sparse(tuned, path, values=values, architecture=args.net)
        found[f"sparse, {kind}"] = path.stat().st_size, lambda path=path: sparsevd.load_sparse(path)  # type: ignore[misc]
    for name, net in (("dense", dense), ("shrunk", tiny)):
        path = folder / f"{name}.onnx"
        sparsevd.export_onnx(net, path, torch.zeros(1, 1, 28, 28))
        found[f"{name}, ONNX"] = path.stat().st_size, None
    return found


def onnx_runner(path: Path) -> Runner:
    """Returns a function that runs an ONNX file with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


@torch.inference_mode()
def times(runners: dict[str, Runner], x: Tensor, rounds: int) -> dict[str, dict[int, float]]:
    """Returns the milliseconds that each takes for a batch of each size: medians of rounds in turns."""
    found: dict[str, dict[int, float]] = {name: {} for name in runners}
    for size in BATCH_SIZES:
        batch = x.repeat(-(-size // len(x)), 1, 1, 1)[:size]
        timers = {
            name: Timer("run(x)", globals={"run": run, "x": batch}, num_threads=torch.get_num_threads())
            for name, run in runners.items()
        }
        number = max(3, 300 // size)
        taken = [{name: timer.timeit(number).mean for name, timer in timers.items()} for _ in range(rounds)]
        for name in runners:
            found[name][size] = 1e3 * statistics.median(turn[name] for turn in taken)
    return found


def uncertainties(
    dense: nn.Module, tuned: nn.Module, model: Any, guide: Any, summary: Any, data: Data
) -> dict[str, dict[str, float]]:
    """Returns how good and how sure the predictions are, before and after."""
    other = photographs()
    test, ood = in_order(data.test), in_order(TensorDataset(other, torch.zeros(len(other), dtype=torch.long)))
    mean = sparsevd.prune(model.network, guide, sparsevd.sparsify(guide, float("inf")))
    masked = sparsevd.prune(model.network, guide, summary)
    networks = {"dense": dense, "posterior mean": mean, "masked mean": masked, "masked mean, fine-tuned": tuned}
    found = {
        name: scores(network_predictions(net, categorical, test), network_predictions(net, categorical, ood))
        for name, net in networks.items()
    }
    for name, posterior in (("20 samples", guide), ("20 sparsified samples", guide.sparsified(summary))):
        found[name] = scores(sampled_predictions(model, posterior, test), sampled_predictions(model, posterior, ood))
    return found


def draw(sizes: dict[str, int], taken: dict[str, dict[int, float]]) -> Figure:
    """Draws the bytes of the files and the time of a thousand images."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.barh(list(sizes), [size / 1e3 for size in sizes.values()], color="#0072B2")
    left.set(xscale="log", xlim=(1, 10_000), xlabel="file, kB", title="bytes")
    right.barh(list(taken), [found[1000] for found in taken.values()], color="#D55E00")
    right.set(xlabel="1,000 images, ms", title="time")
    for axes in (left, right):
        axes.invert_yaxis()
        for bars in axes.containers:
            axes.bar_label(bars, fmt="{:,.4g}", padding=2)
    right.margins(x=0.2)
    return figure


def main() -> None:
    """Runs the tutorial."""
    args = parse_args()
    torch.manual_seed(args.seed)
    data = load(args)
    dense, model, guide, _ = train(args, lambda: NETS[args.net]().to(args.device), data, {"net": args.net})
    summary, threshold, pruned, tuned = prune_and_tune(model, guide, data, args)
    # The steps are chosen on validation images that this network was not tuned on.
    of_train = batches(data.train, args.batch_size)
    held = fine_tune(pruned, categorical, of_train, epochs=args.fine_tune, run=run_of(args))
    validation = in_order(data.validation)
    steps = quantization_steps(guide, held, lambda net: score(net, categorical, validation, "nll"), args.tolerance)
    dense, tuned = dense.cpu().eval(), tuned.cpu().eval()
    x = data.test.tensors[0][:1000].cpu()
    tiny = sparsevd.shrink(tuned, x[:2])
    report = sparsevd.shrink_report(tuned, tiny, x[:2])
    print(f"\n{summary}\n\n{report}")

    with TemporaryDirectory() as name:
        folder = Path(name)
        kept = files(folder, dense, tuned, tiny, steps, args)
        runners: dict[str, Runner] = {
            "dense": dense,
            "masked": tuned,
            "CSR": sparsevd.to_sparse(tuned),
            "shrunk": tiny,
        }
        runners |= {f"{kind}, onnxruntime": onnx_runner(folder / f"{kind}.onnx") for kind in ("dense", "shrunk")}
        taken = times(runners, x, args.rounds)
        start = time.perf_counter()
        reload = kept["sparse, steps of the posterior's width"][1]
        assert reload is not None
        reload()
        loading = time.perf_counter() - start
        test = in_order(data.test)
        errors = {kind: score(again(), categorical, test) for kind, (_, again) in kept.items() if again is not None}
        parity = (runners["shrunk, onnxruntime"](x) - tuned(x)).abs().max().item()

    sizes = {kind: size for kind, (size, _) in kept.items()}
    whole = sizes["dense, torch.save"]
    print(f"\n{'file':40s}{'bytes':>10s}{'smaller':>9s}{'test error':>12s}")
    for kind, size in sizes.items():
        found = f"{100 * errors[kind]:.2f} %" if kind in errors else ""
        print(f"{kind:40s}{size:>10,}{whole / size:>8.1f}x{found:>12s}")
    print(f"load_sparse: {1e3 * loading:.0f} ms; largest difference of an output by onnxruntime: {parity:.1e}")
    print(f"\n{'ms for a batch of':24s}" + "".join(f"{size:>10,}" for size in BATCH_SIZES))
    for kind, of in taken.items():
        print(f"{kind:24s}" + "".join(f"{of[size]:10.3f}" for size in BATCH_SIZES))
    measured = uncertainties(dense.to(args.device), tuned.to(args.device), model, guide, summary, data)
    titles = {
        "error": "error",
        "nll": "NLL",
        "brier": "Brier",
        "calibration_error": "ECE",
        "entropy": "entropy",
        "mutual_information": "mutual i.",
        "ood_auroc": "OOD AUROC",
    }
    print(f"\n{'':24s}" + "".join(f"{title:>10s}" for title in titles.values()))
    for kind, numbers in measured.items():
        print(f"{kind:24s}" + "".join(f"{numbers[name]:10.4f}" for name in titles))
    results = {
        "threshold": threshold,
        "bytes": sizes,
        "errors": errors,
        "loading_seconds": loading,
        "milliseconds": taken,
        "shrunk": report.to_dict(),
        "uncertainty": measured,
        **summary.to_dict(),
    }
    write(args, draw(sizes, taken), results)


if __name__ == "__main__":
    start(main)
