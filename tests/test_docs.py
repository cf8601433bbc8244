"""README and documentation: their examples run, their pictures are there, and numbers stand in one place."""

import re
import textwrap
import warnings
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_sparsevd as sparsevd

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
# What Lightning says of trainings so small, and of its own use of torch.
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
# Sphinx puts copies of the notebooks, and the pages of the API, beside the pages.
PAGES = [p for p in sorted((ROOT / "docs").rglob("*.md")) if p.parent.name in ("docs", "howto")]
FEW = 3


def names_of_fragments():
    """Returns what pages speak of whose examples are lines of a program that they do not show as a whole."""
    bnn = sparsevd.bayesianize(torch.nn.Linear(4, 3))
    model = sparsevd.Supervised(bnn, lambda logits: dist.Categorical(logits=logits), num_data=20)
    guide, elbo = sparsevd.AutoSparseNormal(model), sparsevd.SparseVD_ELBO()
    x, y = torch.randn(20, 4), torch.randint(3, (20,))
    modules = {"torch": torch, "pyro": pyro, "sparsevd": sparsevd}
    return modules | {"model": model, "guide": guide, "elbo": elbo, "loss": elbo(model, guide), "x": x, "y": y}


FRAGMENTS = dict.fromkeys(["layers", "pyro-tools", "torch-tools"], names_of_fragments)


def code_blocks(page, language="python"):
    """Returns the first line, counted from 1, and the code of each block."""
    text = page.read_text()
    found = re.finditer(rf"^( *)```{language}\n(.*?)^\1```", text, re.S | re.M)
    return [(text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found]


def run(page, namespace):
    namespace = FRAGMENTS.get(page.stem, dict)() | namespace
    for line, code in code_blocks(page):
        exec(compile("\n" * (line - 1) + textwrap.dedent(code), page, "exec"), namespace)


WITH_CODE = [p for p in [README, *PAGES] if code_blocks(p)]
each_with_code = pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.stem)
each_page = pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)


@each_with_code
def test_examples_run_in_few_epochs(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("fit", "compare_priors"):
        function = getattr(sparsevd, name)
        monkeypatch.setattr(sparsevd, name, partial(_in_few_epochs, function))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "thresholds: chose")  # after so few epochs, all thresholds are alike
        run(page, {"range": lambda *bounds: range(*bounds) if len(bounds) > 1 else range(min(FEW, *bounds))})


def _in_few_epochs(function, *args, epochs, **options):
    return function(*args, epochs=min(FEW, epochs), **options)


@pytest.mark.slow
@each_with_code
def test_examples_run_as_they_are_printed(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run(page, {})


@each_page
def test_lines_of_code_fit_on_the_page(page):
    lines = [line for _, code in code_blocks(page, r"\w*") for line in code.splitlines()]
    assert [line for line in lines if len(line) > 88 and not line.startswith("|")] == []


@each_page
def test_pictures_are_there(page):
    named = re.findall(r"!\[[^\]]*\]\(([^)]+)\)|<img src=\"([^\"]+)\"", page.read_text())
    paths = [path for pair in named for path in pair if path and not path.startswith("https:")]
    assert [path for path in paths if not (page.parent / path).is_file()] == []


def test_results_of_the_readme_are_those_of_the_benchmarks():
    results = re.search(r"^## Results\n(.*?)^## ", README.read_text(), re.S | re.M)[1]
    known = [float(number) for number in numbers((ROOT / "docs" / "benchmarks.md").read_text())]
    shown = numbers(results)
    assert len(shown) > 10
    digits = {number: len(number.partition(".")[2]) for number in shown}
    assert [n for n in shown if float(n) not in {round(value, digits[n]) for value in known}] == []


def numbers(text):
    """Returns the numbers of a text, not those within names such as LeNet-5."""
    return re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w-])", re.sub(r"(?<=\d),(?=\d{3})", "", text))
