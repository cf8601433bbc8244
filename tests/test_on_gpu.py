"""The benchmark for who has a GPU, tried on the CPU."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "benchmarks" / "on_gpu.py"


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return runpy.run_path(str(SCRIPT))


def test_rows_are_measured_by_turns_and_make_a_table(on_gpu):
    x, y = torch.rand(4, 1, 28, 28), torch.tensor([1, 2, 3, 4])
    names = [name for name in on_gpu["ROWS"] if "graph" not in name and name != "cplxmodule"]
    steps = on_gpu["made"](names, on_gpu["NETS"]["LeNet-300-100"], x, y)
    records = on_gpu["rows_of"]("LeNet-300-100", "fp32", steps, x, y, on_gpu["QUICK"])
    assert [record["row"] for record in records] == names
    assert records[0]["of dense"] == 1
    assert all(record["milliseconds"] > 0 and math.isfinite(record["of dense"]) for record in records)
    lines = on_gpu["as_table"](records).splitlines()
    assert len(lines) == 1 + len(records)
    assert "pyro_sparsevd, no check" in lines[-2]


@pytest.mark.parametrize("name", ["fp32", "TF32", "bf16"])
def test_number_formats_are_what_they_were_afterwards(on_gpu, name):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with on_gpu["FORMATS"][name](torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == ("highest" if name == "fp32" else "high")
        assert torch.is_autocast_enabled("cpu") == (name == "bf16")
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


@pytest.mark.slow
def test_the_whole_of_it_runs_on_the_cpu(on_gpu, tmp_path, capsys):
    out = tmp_path / "on_gpu.json"
    found = on_gpu["main"]("--device", "cpu", "--quick", "--out", str(out))
    assert found["tests"]["return code"] == 0
    assert json.loads(out.read_text())["steps"] == found["steps"]
    assert {record["net"] for record in found["steps"]} == {"LeNet-300-100", "LeNet-5", "VGG-like"}
    assert "VGG-like" in capsys.readouterr().out
