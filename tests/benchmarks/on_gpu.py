"""What a GPU makes of this package, in one command of at most 8 minutes; nothing else may run on it.

    python tests/benchmarks/on_gpu.py --out on_gpu.json

It runs the tests that are marked ``device`` there, and then measures steps of training on random images, by turns: a
dense network, Sparse VD by hand in plain PyTorch, cplxmodule where it is installed, vanilla Pyro (AutoNormal with
Trace_ELBO), and this package by one torch optimiser, without its check of finite numbers, as a CUDA graph, and by SVI;
in float32, with TF32, and under autocast to bfloat16. ``--device cpu --quick`` tries it without a GPU.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tutorials"), str(Path(__file__).parent)]

import peak_memory  # noqa: E402
import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from lab.nets import lenet_5_caffe, lenet_300_100, vgg_like  # noqa: E402
from pyro.infer import SVI, Trace_ELBO  # noqa: E402
from pyro.infer.autoguide import AutoNormal  # noqa: E402
from pyro.nn.module import to_pyro_module_  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from pyro_sparsevd._tables import as_text  # noqa: E402

NUM_DATA = 60_000
NETS = {"LeNet-300-100": lenet_300_100, "LeNet-5": lenet_5_caffe}
Step = Callable[[Tensor, Tensor], Any]


class Effort(NamedTuple):
    """How long to measure."""

    warm_up: int
    rounds: int
    steps: int
    batch: int
    images: int  # in a step of the VGG-like network
    width: float  # of the VGG-like network
    tests: tuple[str, ...]


FULL = Effort(10, 15, 20, 100, 512, 1.0, ())
QUICK = Effort(1, 2, 1, 20, 8, 0.1, ("-k", "moves_between"))


# Steps of training, each made for a network and a batch like those to come.


def optimised(loss: Callable[..., Tensor], parameters: Any, **options: Any) -> Step:
    """Returns the step of a loss by one Adam."""
    optimizer = torch.optim.Adam(parameters, 1e-3, fused=True, **options)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss(x, y).backward()
        optimizer.step()

    return step


def dense(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """The plain network: the floor."""
    return optimised(lambda x, y: F.cross_entropy(net(x), y), net.parameters())


def by_hand(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """The formulas of the paper, written the obvious way."""
    return optimised(*peak_memory.by_hand(net))


def cplxmodule(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """The layers of cplxmodule."""
    from cplxmodule.nn.relevance import Conv2dVD, LinearVD, penalties

    def noisy(layer: nn.Module) -> nn.Module:
        if isinstance(layer, nn.Linear):
            return LinearVD(layer.in_features, layer.out_features)
        return Conv2dVD(layer.in_channels, layer.out_channels, 5) if isinstance(layer, nn.Conv2d) else layer

    network = nn.Sequential(*map(noisy, net)).to(x.device)
    return optimised(
        lambda x, y: NUM_DATA * F.cross_entropy(network(x), y) + sum(penalties(network)), network.parameters()
    )


def vanilla_pyro(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Pyro's own guide and bound, which sample the weights."""
    to_pyro_module_(net)
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            zero = torch.zeros((), device=x.device)
            layer.weight = pyro.nn.PyroSample(
                dist.Normal(zero, 1.0).expand(layer.weight.shape).to_event(layer.weight.dim())
            )

    def model(x: Tensor, y: Tensor) -> None:
        logits = net(x)
        with pyro.plate("data", NUM_DATA, subsample=y):
            pyro.sample("y", dist.Categorical(logits=logits), obs=y)

    return SVI(model, AutoNormal(model, init_scale=1e-2), pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step


def package(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """This package, by one torch optimiser."""
    return optimised(*peak_memory.package(net))


def unchecked(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """This package, without its check of finite numbers."""
    return optimised(*peak_memory.package(net, check_finite=False))


def graph(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """This package, as a CUDA graph."""
    train = optimised(*peak_memory.package(net, check_finite=False), capturable=True)
    inputs, targets = x.clone(), y.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            train(inputs, targets)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        train(inputs, targets)

    def step(x: Tensor, y: Tensor) -> None:
        inputs.copy_(x)
        targets.copy_(y)
        captured.replay()

    return step


def by_svi(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    """This package, by SVI."""
    loss, _ = peak_memory.package(net)
    return SVI(loss.model, loss.guide, pyro.optim.Adam({"lr": 1e-3}), loss.elbo).step


ROWS = {
    "dense": dense,
    "by hand": by_hand,
    "cplxmodule": cplxmodule,
    "Pyro, AutoNormal": vanilla_pyro,
    "pyro_sparsevd": package,
    "pyro_sparsevd, no check": unchecked,
    "pyro_sparsevd, graph": graph,
    "pyro_sparsevd, SVI": by_svi,
}


# Number formats.


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Has products of float32 computed with TF32, or not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def bfloat16(device: torch.device) -> Iterator[None]:
    """Autocast to bfloat16, with TF32 for what stays in float32; without its cache, which no graph can hold."""
    with tf32(True), torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
        yield


FORMATS = {"fp32": lambda device: tf32(False), "TF32": lambda device: tf32(True), "bf16": bfloat16}


# Measurements.


def synchronize(device: torch.device) -> None:
    """Waits for what was started on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the time of what is run, on the device where that has a clock of its own."""
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def by_turns(steps: dict[str, Step], x: Tensor, y: Tensor, effort: Effort) -> dict[str, list[float]]:
    """Returns milliseconds a step of every row, of each round in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(effort.warm_up):
            step(x, y)
    for _ in range(effort.rounds):
        for name, step in steps.items():
            of_round = milliseconds(lambda step=step: [step(x, y) for _ in range(effort.steps)], x.device)
            times[name].append(of_round / effort.steps)
    return times


def host_waits(step: Step, x: Tensor, y: Tensor) -> int | None:
    """Returns how often a step makes the host wait for the device."""
    if x.device.type != "cuda":
        return None
    synchronize(x.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step(x, y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def peak_megabytes(step: Step, x: Tensor, y: Tensor) -> float | None:
    """Returns the memory that a step takes at its peak, beyond what is there between two steps."""
    if x.device.type != "cuda":
        return None
    synchronize(x.device)
    before = torch.cuda.memory_allocated(x.device)
    torch.cuda.reset_peak_memory_stats(x.device)
    step(x, y)
    synchronize(x.device)
    return (torch.cuda.max_memory_allocated(x.device) - before) / 2**20


def made(names: list[str], net: Callable[[], nn.Module], x: Tensor, y: Tensor) -> dict[str, Step]:
    """Returns the steps of those rows that this machine has, each after its first."""
    steps = {}
    for name in names:
        torch.manual_seed(0)
        try:
            step = ROWS[name](net().to(x.device), x, y)
        except ImportError as error:
            print(f"{name}: {error}")
            continue
        step(x, y)
        steps[name] = step
    return steps


def rows_of(title: str, number_format: str, steps: dict[str, Step], x: Tensor, y: Tensor, effort: Effort) -> list[dict]:
    """Measures steps on a batch; returns one record for each."""
    times = by_turns(steps, x, y, effort)
    return [
        {
            "net": title,
            "format": number_format,
            "row": name,
            "milliseconds": statistics.median(times[name]),
            "of dense": statistics.median(a / b for a, b in zip(times[name], times["dense"], strict=True)),
            "images per second": len(x) / statistics.median(times[name]) * 1e3,
            "host waits": host_waits(step, x, y),
            "peak MB": peak_megabytes(step, x, y),
        }
        for name, step in steps.items()
    ]


def lenets(device: torch.device, effort: Effort) -> Iterator[dict]:
    """Yields the records of both LeNets in all number formats."""
    x = torch.rand(effort.batch, 1, 28, 28, device=device)
    y = torch.randint(10, (effort.batch,), device=device)
    for title, net in NETS.items():
        for number_format, context in FORMATS.items():
            pyro.clear_param_store()
            with context(device):
                steps = made([n for n in ROWS if n != "pyro_sparsevd, graph" or device.type == "cuda"], net, x, y)
                yield from rows_of(title, number_format, steps, x, y, effort)


def vgg(device: torch.device, effort: Effort) -> Iterator[dict]:
    """Yields the records of the VGG-like network in channels-last order."""
    x = torch.rand(effort.images, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(10, (effort.images,), device=device)
    for number_format in ("TF32", "bf16"):
        with FORMATS[number_format](device):
            names = ["dense", "pyro_sparsevd", "pyro_sparsevd, no check"]
            steps = made(names, lambda: vgg_like(effort.width).to(memory_format=torch.channels_last), x, y)
            yield from rows_of("VGG-like", number_format, steps, x, y, effort)


def device_tests(device: torch.device, effort: Effort) -> dict[str, Any]:
    """Runs the tests that are marked for devices; returns their return code and the end of their report."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "device", "--device", str(device), *effort.tests]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [*command, "tests/test_devices.py"], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
        )
        code, report = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        code, report = 124, str(error)
    return {"return code": code, "seconds": time.perf_counter() - start, "report": report[-4000:]}


def machine(device: torch.device) -> dict[str, str]:
    """Returns what the numbers are of."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "pyro": pyro.__version__, "python": platform.python_version()}


def as_table(records: list[dict]) -> str:
    """Returns the records as a table of text."""
    head = ["net", "format", "row", "milliseconds", "of dense", "images per second", "host waits", "peak MB"]

    def cell(value: Any) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    return as_text([head, *([cell(record[name]) for name in head] for record in records)])


def main(*arguments: str) -> dict[str, Any]:
    """Measures, prints a table and writes the numbers; returns them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--quick", action="store_true", help="to see whether it runs; its numbers mean nothing")
    parser.add_argument("--out", type=Path, default=Path("on_gpu.json"), help="the file for the numbers")
    options = parser.parse_args(arguments or None)
    effort = QUICK if options.quick else FULL
    found: dict[str, Any] = {"machine": machine(options.device), "tests": device_tests(options.device, effort)}
    print(found["tests"]["report"])
    found["steps"] = []
    for part in (lenets, vgg):
        for record in part(options.device, effort):
            found["steps"].append(record)
            options.out.write_text(json.dumps(found, indent=1))  # so that what was measured before an error is there
    print(" ".join(f"{name} {value}" for name, value in found["machine"].items()))
    print(as_table(found["steps"]))
    return found


if __name__ == "__main__":
    sys.exit(main()["tests"]["return code"])
