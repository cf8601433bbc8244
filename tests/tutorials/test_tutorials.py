"""The scripts run; the notebooks do, in smoke mode, and what they keep is small; their last cells assert."""

import json
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from torch.utils.data import TensorDataset

from pyro_sparsevd.nn import PRIOR_NAMES

TUTORIALS = Path(__file__).parents[2] / "tutorials"
NOTEBOOKS = sorted(TUTORIALS.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("default")  # those of Jupyter's own machinery
def test_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("CI", "true")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": TUTORIALS}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_keeps_its_outputs_and_is_small(path):
    assert path.stat().st_size < 1_000_000
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert "site-packages" not in path.read_text()  # as in warnings, with the path of a machine
    assert any("assert " in cell.source for cell in cells[-2:])


def test_every_notebook_is_in_the_table_of_contents():
    contents = (TUTORIALS / "README.md").read_text()
    assert NOTEBOOKS
    assert all(path.name in contents for path in NOTEBOOKS)


# How to try each script, and an option with which it must not go on from what it left.
SCRIPTS = {
    "random_labels.py": ("--epochs 3 --hidden 20 --batch-size 500", "--dropout 0.3"),
    "linear_models.py": ("--epochs 20 --batch-size 500 --horseshoe-samples 2", "--seed 1"),
    "kl_cost.py": ("--epochs 1 --seeds 1 --batch-size 500", "--batch-size 400"),
    "parameterizations.py": ("--epochs 1 --repeats 3 --batch-size 500", "--seed 1"),
    "vgg.py": (
        "--epochs 1 --width 0.05 --fine-tune 1 --threshold 0 --batch-size 500 --precision bf16-mixed",
        "--width 0.04",
    ),
    "compress.py": ("--epochs 2 --fine-tune 1 --threshold 1 --batch-size 500 --rounds 1", "--warm-up 0.4"),
    "threshold_choice.py": ("--epochs 1 --seeds 1 --fine-tune 1 --batch-size 500", "--batch-size 400"),
    "pruning_compared.py": ("--epochs 1 --fine-tune 1 --batch-size 500", "--batch-size 400"),
}
PRIORS = {data: ["--epochs", 2, "--data", data] for data in ("diabetes", "synthetic")}
PRIORS["digits"] = ["--epochs", 1, "--batch-size", 500]


def _run(monkeypatch, name, *options):
    monkeypatch.syspath_prepend(str(TUTORIALS))
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    return runpy.run_path(str(TUTORIALS / name), run_name="__main__")


def _functions(monkeypatch, name):
    monkeypatch.syspath_prepend(str(TUTORIALS))
    return runpy.run_path(str(TUTORIALS / name))


def _check_output(out):
    with Image.open(out) as image:
        assert len(image.convert("RGB").getcolors(10_000_000)) > 4  # an empty one has 1
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert numbers["options"]["seed"] == 0
    return numbers


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_script_writes_its_output_and_goes_on_with_the_same_options_only(name, monkeypatch, tmp_path, request):
    options, other = (text.split() for text in SCRIPTS[name])
    options += ["--device", request.config.getoption("--device"), "--out", tmp_path / "figure.png"]
    _run(monkeypatch, name, *options)
    _check_output(tmp_path / "figure.png")
    expected = " ".join(other).strip("-").replace("-", "_")
    with pytest.raises(SystemExit, match=f"--resume: .* expected the checkpoint of a training with {expected}, but"):
        _run(monkeypatch, name, *options, "--resume", *other)


def test_intervals_are_measured(monkeypatch, tmp_path):
    out = tmp_path / "figure.png"
    _run(monkeypatch, "intervals.py", "--epochs", 20, "--seeds", 1, "--nuts-samples", 2, "--out", out)
    results = _check_output(out)["results"]
    assert 1.6 < results["normal, exact, r = 0"]["NLL of new targets"] < 1.95
    assert 0.8 < results["normal, exact, r = 0.7"]["coverage of new targets"] < 0.95


def test_random_labels_of_images_in_colour_are_one_picture(monkeypatch, tmp_path, request):
    out, device = tmp_path / "figure.png", request.config.getoption("--device")
    options = ["--data", "cifar10", "--labels", "random", "--epochs", 1, "--width", 0.05, "--batch-size", 500]
    _run(monkeypatch, "random_labels.py", *options, "--device", device, "--out", out)
    numbers = _check_output(out)
    assert set(numbers["results"]) == {"binary dropout, random labels", "Sparse VD, random labels"}


@pytest.mark.parametrize("data", PRIORS)
def test_priors_are_compared_in_a_table_and_a_picture(data, monkeypatch, tmp_path, request):
    options = [*PRIORS[data], "--device", request.config.getoption("--device"), "--out", tmp_path / "figure.png"]
    _run(monkeypatch, "compare_priors.py", *options)
    results = _check_output(tmp_path / "figure.png")["results"]
    assert [result["prior"] for result in results] == list(PRIOR_NAMES)


def test_the_scale_of_the_gaussian_prior_is_chosen_on_held_out_digits(monkeypatch):
    functions = _functions(monkeypatch, "pruning_compared.py")
    of_class = [TensorDataset(torch.ones(4, 3), torch.full((4,), label)) for label in range(3)]
    networks = {}
    for label, scale in enumerate(functions["PRIOR_SCALES"]):
        networks[scale] = torch.nn.Linear(3, 3)
        torch.nn.init.zeros_(networks[scale].weight)
        networks[scale].bias.data = 5 * torch.eye(3)[label]
    train, validation, test = of_class
    assert functions["best_held_out"](networks, functions["Data"](train, validation, test)) == 0.3


def test_random_labels_draws_what_the_network_with_dropout_memorises(monkeypatch):
    functions = _functions(monkeypatch, "random_labels.py")
    dropout = [{"train_error": 0.9, "error": 0.8}, {"train_error": 0.25, "error": 0.75}]
    sparse = [{"error": 0.9, "sparsity": 0.0}, {"error": 0.9, "sparsity": 0.5}]
    (true,) = functions["draw"]({"true": (dropout, sparse)}).axes
    assert [list(line.get_ydata()) for line in true.get_lines()] == [[90, 25], [80, 75], [90, 90], [0, 50]]
    assert "error on training data" in true.get_lines()[0].get_label()


def test_linear_models_are_drawn_on_one_scale_with_kept_features_marked(monkeypatch):
    functions = _functions(monkeypatch, "linear_models.py")
    coefficients = torch.tensor([2.0, -1.0, 0.5])
    found = {"coefficients": coefficients, "kept": torch.tensor([True, False, True])}
    estimates = {
        kind: {"A": found, "B": {**found, "coefficients": 9 * coefficients}} for kind in ("regression", "logistic")
    }
    figure = functions["draw"](dict.fromkeys(estimates, coefficients), estimates)
    lines = [{line.get_label(): line for line in axis.get_lines()} for axis in figure.axes]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert list(lines[0]["estimate, kept"].get_ydata()) == [2.0, 0.5]
    assert list(lines[0]["estimate, dropped"].get_xdata()) == [1]
    assert len({line.get_marker() for line in lines[0].values()}) == 3


def test_animations_are_written(monkeypatch, tmp_path):
    _run(monkeypatch, "animations.py", "--epochs", 1, "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["marginals.gif", "scales.gif", "weights.gif"]
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.n_frames >= 2  # the last one is held


def test_every_script_is_tried():
    others = {"animations.py", "classification.py", "common.py", "compare_priors.py", "intervals.py", "lenet.py"}
    assert {path.name for path in TUTORIALS.glob("*.py")} == {*SCRIPTS, *others}
