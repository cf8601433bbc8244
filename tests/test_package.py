"""The package as a whole: what an import does, what the tutorial does."""

import ast
import graphlib
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


def test_an_import_changes_nothing_global_and_loads_no_plots_or_trainer():
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
print(before == state(), "matplotlib" in sys.modules, "lightning" in sys.modules)
"""
    assert _run(code) == "True False False"


def _imports_of_modules():
    """Returns the modules that each module imports from the package, by its path such as ``infer.elbo``."""
    folder = ROOT / "pyro_sparsevd"
    files = {".".join(p.relative_to(folder).with_suffix("").parts): p for p in folder.rglob("*.py")}
    found = {}
    for name, path in files.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = name.split(".")[: -node.level] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    candidates = (".".join([*base, alias.name]), ".".join(base), ".".join([*base, "__init__"]))
                    found[name].add(next(candidate for candidate in candidates if candidate in files))
    return found


def test_imports_point_one_way_through_the_rooms():
    below = ["_compat", "_files", "_modules", "_tables"]
    rooms = [*below, *re.findall(r"^    (\w+)  +\w", pyro_sparsevd.__doc__, re.M), "__init__", "__main__"]
    imports = _imports_of_modules()
    graphlib.TopologicalSorter(imports).prepare()  # raises where there is a circle
    for module, imported in imports.items():
        place = rooms.index(module.split(".")[0])
        assert all(rooms.index(name.split(".")[0]) <= place for name in imported), (module, imported)


# What torch and Pyro have subclasses override or call, and the dictionaries of a module.
PROTOCOLS = {
    *("_buffers", "_modules", "_parameters", "_forward_hooks", "_forward_pre_hooks"),  # nn.Module
    *("_extended_shape", "_get_checked_instance", "_validate_args", "_validate_sample"),  # Distribution
    *("_get_traces", "_model"),  # ELBO and AutoGuide
}


def test_private_names_of_others_are_in_compat_alone():
    used, own = {}, set(PROTOCOLS)
    for path in (ROOT / "pyro_sparsevd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and path.name != "_compat.py":
                own.add(node.attr)
            elif isinstance(node, ast.Attribute) and path.name != "_compat.py":
                used.setdefault(node.attr, path.name)
            elif isinstance(node, ast.ImportFrom) and not node.level and path.name != "_compat.py":
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                used.update((name, path.name) for name in names if name != "__future__")
    private = {name: file for name, file in used.items() if re.match("_[^_]", name)}
    assert {name: file for name, file in private.items() if name not in own} == {}


def test_contributing_names_files_that_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    names = re.findall(r"`(\w+/(?:\w+\.py)?|\w+\.py)`", text)
    paths = [ROOT / ("" if name.startswith("tests/") else "pyro_sparsevd") / name for name in names]
    paths += [ROOT / path for path in re.findall(r"^pytest (\S+/\S+)", text, re.M)]
    assert len(paths) > 20
    assert [path for path in paths if not path.exists()] == []


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


@pytest.mark.parametrize(
    ("pretrained", "title"),
    [([], "dense network, trained separately"), (["--pretrained"], "weights of the first layer, dense")],
    ids=["random init", "pretrained"],
)
def test_the_tutorial_says_which_network_it_draws_before(pretrained, title, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    figures = []
    monkeypatch.setattr("classification.write", lambda args, figure, numbers: figures.append(figure))
    options = ["--epochs", 1, "--batch-size", 1_000, "--threshold", 3, "--out", tmp_path / "x.png", *pretrained]
    _script(monkeypatch, "lenet.py", *options)
    ((before, after, *_),) = (figure.subfigs for figure in figures)
    assert before.get_suptitle().endswith(title)
    assert after.get_suptitle().endswith("pruned")


def test_a_script_says_that_a_checkpoint_is_damaged(monkeypatch, tmp_path):
    (tmp_path / "x.dense.ckpt").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"--resume: .*x.dense.ckpt: expected a checkpoint, but it cannot be read"):
        _script(monkeypatch, "lenet.py", "--out", tmp_path / "x.png", "--resume")


ENDINGS = "argument --out: expected a file name with one of the endings .eps"
UNUSABLE = "argument --device: expected a device that torch can use here, but got"
BAD_OPTIONS = [
    ("lenet.py", ["--epochs", "0"], 'error: Parser key "epochs": Not of type PositiveInt: 0 does not conform'),
    ("lenet.py", ["--seed", "4294967296"], 'error: Parser key "seed": Not of type seed: 4294967296'),
    ("lenet.py", ["--threshold", "nan"], 'error: Parser key "threshold": Not of type finite: nan'),
    ("lenet.py", ["--device", "abacus"], "argument --device: expected a device, such as cpu or cuda, but got abacus"),
    ("lenet.py", ["--device", "cuda:99"], f"{UNUSABLE} cuda:99"),
    ("lenet.py", ["--device", "xpu:99"], f"{UNUSABLE} xpu:99"),
    ("lenet.py", ["--device", "meta"], f"{UNUSABLE} meta"),
    ("lenet.py", ["--out", "no-folder/x.png"], "argument --out: expected a file in a folder that is there"),
    ("lenet.py", ["--out", "folder.png"], "argument --out: expected the name of a file, but folder.png is a folder"),
    *[("lenet.py", ["--out", name], ENDINGS) for name in ("a.xyz", "a.json", "run.v2", "o", ".", ".png")],
    (
        "random_labels.py",
        ["--width", "0.5"],
        "argument --width: expected no such option with --data digits, but got 0.5",
    ),
    (
        "random_labels.py",
        ["--data", "cifar10", "--hidden", "7"],
        "argument --hidden: expected no such option with --data cifar10, but got 7",
    ),
    (
        "compare_priors.py",
        ["--data", "diabetes", "--data-dir", "x"],
        "argument --data-dir: expected it with --data digits only, but got it with --data diabetes",
    ),
]


@pytest.mark.parametrize(("script", "options", "message"), BAD_OPTIONS, ids=str)
def test_a_script_refuses_bad_options_at_once(monkeypatch, tmp_path, capsys, script, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    monkeypatch.syspath_prepend(str(ROOT / "tutorials"))
    monkeypatch.setattr("common.prepare", None)  # so that a script that goes on fails rather than trains
    with pytest.raises(SystemExit):
        _script(monkeypatch, script, *options)
    assert message in capsys.readouterr().err


def test_the_tutorial_says_that_data_are_missing(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=r"train-images-idx3-ubyte.* expected a file, but there is none"):
        _script(monkeypatch, "lenet.py", "--data-dir", tmp_path)
