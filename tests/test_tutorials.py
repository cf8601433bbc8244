"""The scripts run; the notebooks do, in smoke mode, and what they keep is small; their last cells assert."""

import json
import runpy
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TUTORIALS = Path(__file__).parents[1] / "tutorials"
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
    assert any("assert " in cell.source for cell in cells[-2:])


def test_every_notebook_is_in_the_table_of_contents():
    contents = (TUTORIALS / "README.md").read_text()
    assert NOTEBOOKS
    assert all(path.name in contents for path in NOTEBOOKS)


SCRIPTS = {
    "random_labels.py": ["--epochs", 3, "--hidden", 20, "--batch-size", 500],
    "linear_models.py": ["--epochs", 20, "--horseshoe-samples", 2],
    "kl_cost.py": ["--epochs", 1, "--seeds", 1, "--batch-size", 500],
    "parameterizations.py": ["--epochs", 1, "--repeats", 3, "--batch-size", 500],
    "vgg.py": ["--epochs", 1, "--width", 0.05, "--fine-tune", 1, "--batch-size", 500],
    "compress.py": ["--epochs", 2, "--fine-tune", 1, "--batch-size", 500, "--rounds", 1],
    "compare_priors.py": ["--epochs", 1, "--batch-size", 500],
    "pruning_compared.py": ["--epochs", 1, "--fine-tune", 1, "--batch-size", 500],
}


OTHER_DATA = [("compare_priors.py", ["--epochs", 2, "--data", data]) for data in ("diabetes", "synthetic")]


@pytest.mark.parametrize(("name", "options"), [*SCRIPTS.items(), *OTHER_DATA], ids=str)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_script_writes_numbers_and_a_figure(name, options, monkeypatch, tmp_path, request):
    out = tmp_path / "figure.png"
    options = [*options, "--device", request.config.getoption("--device"), "--out", out]
    monkeypatch.syspath_prepend(str(TUTORIALS))
    monkeypatch.setattr(sys, "argv", [name, *map(str, options)])
    runpy.run_path(str(TUTORIALS / name), run_name="__main__")
    assert out.stat().st_size > 10_000
    assert json.loads(out.with_suffix(".json").read_text())["options"]["seed"] == 0


def test_every_script_is_tried():
    others = {"classification.py", "common.py", "lenet.py"}
    assert {path.name for path in TUTORIALS.glob("*.py")} == {*SCRIPTS, *others}
