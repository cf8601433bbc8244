"""What a compressed network must be, not run by default: minutes, with nothing else running.

``pytest tests/benchmarks/bench_compress.py -n 0 -s --data-dir DIR`` with the folder of full MNIST trains and compresses
both networks, prints the tables of ``tutorials/compress.py``, and checks them.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

SCRIPT = Path(__file__).parents[2] / "tutorials" / "compress.py"


class Case(NamedTuple):
    options: list[str]
    smaller: float  # the quantised file, beside the dense one
    faster: float  # the shrunk network on a batch of 1,000


CASES = {
    "lenet-300-100": Case(["--epochs", "108"], 150, 3),
    "lenet-5": Case(["--batch-size", "100", "--lr", "1e-3", "--fine-tune", "4", "--epochs", "45"], 400, 1.5),
}


@pytest.fixture
def data_dir(request):
    folder = request.config.getoption("--data-dir")
    assert folder is not None, "--data-dir: expected the folder of full MNIST"
    return folder


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("net", CASES)
def test_a_compressed_network_is_small_fast_and_as_accurate(net, seed, data_dir, device, tmp_path):
    case, out = CASES[net], tmp_path / "compress.png"
    options = ["--data-dir", data_dir, "--net", net, "--seed", str(seed), "--device", str(device), "--out", str(out)]
    subprocess.run([sys.executable, SCRIPT, *options, *case.options], check=True)
    found = json.loads(out.with_suffix(".json").read_text())
    sizes, errors, taken = found["bytes"], found["errors"], found["milliseconds"]
    quantised = "sparse, steps of the posterior's width"
    assert sizes["dense, torch.save"] / sizes[quantised] >= case.smaller
    assert errors[quantised] - errors["sparse, float32"] <= 0.001
    assert taken["dense"]["1000"] / taken["shrunk"]["1000"] >= case.faster
    assert taken["shrunk"]["1"] <= taken["dense"]["1"]
    assert found["loading_seconds"] < 0.05
