"""The package as a whole: what an import does, what README and tutorial do."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pyro_sparsevd

ROOT = Path(__file__).parents[1]


def _run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_an_import_changes_nothing_global_and_loads_no_plots():
    code = """
import logging, warnings, sys
import pyro, torch
def state():
    return (torch.distributions.Distribution._Distribution__validate_args
            if hasattr(torch.distributions.Distribution, "_Distribution__validate_args")
            else torch.distributions.Distribution._validate_args,
            torch.get_default_dtype(), torch.initial_seed(), logging.getLogger().level, torch.get_num_threads(),
            list(warnings.filters), pyro.settings.get())
before = state()
import pyro_sparsevd
print(before == state(), "matplotlib" in sys.modules)
"""
    assert _run(code) == "True False"


def test_modules_import_only_from_those_above_them():
    order = re.findall(r"^    ((?:\w+)(?:, \w+)*)  +\w", pyro_sparsevd.__doc__, re.M)
    order = [module for line in order for module in line.split(", ")]
    files = {path.stem for path in (ROOT / "pyro_sparsevd").glob("*.py")}
    assert set(order) == files - {"__init__", "conftest"}
    for position, module in enumerate(order):
        text = (ROOT / "pyro_sparsevd" / f"{module}.py").read_text()
        imported = re.findall(r"^from \.(\w+) import", text, re.M)
        imported += [n for line in re.findall(r"^from \. import (.+)$", text, re.M) for n in line.split(", ")]
        assert set(imported) <= set(order[:position]), module


def test_the_snippets_of_the_readme_run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert snippets
    namespace = {}
    for snippet in snippets:
        exec(snippet, namespace)


def _script(monkeypatch, name, *options):
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    return runpy.run_path(str(ROOT / "tutorials" / name), run_name="__main__")


def test_the_tutorial_runs_on_the_bundled_digits(monkeypatch, tmp_path, capsys, request):
    out = tmp_path / "figure.png"
    device = request.config.getoption("--device")
    options = ["--epochs", 2, "--batch-size", 500, "--device", device, "--out", out]
    _script(monkeypatch, "lenet.py", *options)
    printed = capsys.readouterr().out
    assert "test error of the pruned network" in printed
    assert str(out) in printed
    assert out.stat().st_size > 10_000
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert set(numbers["sites"]) == {"1.weight", "3.weight", "5.weight"}
    _script(monkeypatch, "lenet.py", *options, "--resume")
    assert (
        json.loads(out.with_suffix(".json").read_text())["errors"]["dense network"]
        == numbers["errors"]["dense network"]
    )


def test_the_tutorial_shifts_images_in_training_only(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    shift = runpy.run_path(str(ROOT / "tutorials" / "lenet.py"))["RandomShift"](2)
    images = torch.rand(200, 2, 9, 8)
    assert shift.eval()(images) is images
    shifted, padded = shift.train()(images), F.pad(images, (2,) * 4)
    corners = [(top, left) for top in range(5) for left in range(5)]
    found = [
        [c for c in corners if torch.equal(image[:, c[0] : c[0] + 9, c[1] : c[1] + 8], moved)]
        for image, moved in zip(padded, shifted, strict=True)
    ]
    assert all(len(which) == 1 for which in found)
    assert {which[0] for which in found} == set(corners)


def test_the_tutorial_refuses_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda: expected a CUDA device"):
        _script(monkeypatch, "lenet.py", "--device", "cuda")


BAD_OPTIONS = {
    "shift": (["--shift", "-1"], "argument --shift: expected 0 or a positive integer, but got -1"),
    "threshold": (["--threshold", "nan"], "argument --threshold: expected a finite number, but got nan"),
    "epochs": (["--epochs", "0"], "argument --epochs: expected a positive integer, but got 0"),
    "batch size": (["--batch-size", "-1"], "argument --batch-size: expected a positive integer, but got -1"),
    "out": (["--out", "no-folder/x.png"], "argument --out: expected a file in a folder that is there"),
    "device": (["--device", "abacus"], "argument --device: expected a device, such as cpu or cuda, but got abacus"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_the_tutorial_refuses_bad_options_at_once(monkeypatch, capsys, options, message):
    with pytest.raises(SystemExit):
        _script(monkeypatch, "lenet.py", *options)
    assert message in capsys.readouterr().err


def test_the_tutorial_says_that_data_are_missing(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte.* expected a file, but there is none"):
        _script(monkeypatch, "lenet.py", "--data-dir", tmp_path)
