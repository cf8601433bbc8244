"""README and documentation: their examples run, their pictures are there, and numbers stand in one place."""

import os
import re
import subprocess
import sys
import textwrap
import warnings
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

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
    """Runs the blocks of a page, in one namespace; returns the names that they made."""
    before = FRAGMENTS.get(page.stem, dict)() | namespace
    found = dict(before)
    for line, code in code_blocks(page):
        exec(compile("\n" * (line - 1) + textwrap.dedent(code), page, "exec"), found)
    return found.keys() - before.keys() - {"__builtins__"}


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
        assert run(page, {"range": lambda *bounds: range(*bounds) if len(bounds) > 1 else range(min(FEW, *bounds))})


def _in_few_epochs(function, *args, epochs, **options):
    return function(*args, epochs=min(FEW, epochs), **options)


@pytest.mark.slow
@each_with_code
def test_examples_run_as_they_are_printed(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert run(page, {})


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


class Page(HTMLParser):
    """What a page of the site names: its anchors, and the addresses that it shows, links to and loads."""

    def __init__(self, path):
        super().__init__()
        self.path, self.anchors = path, {"", "top"}
        self.pictures, self.links, self.loaded = set(), set(), set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes[name] for name in ("id", "name") if attributes.get(name)}
        if tag == "img":
            self.pictures.add(attributes["src"])
        elif tag == "a" and "href" in attributes:
            self.links.add(attributes["href"])
        elif tag == "script" and "src" in attributes:
            self.loaded.add(attributes["src"])
        elif tag == "link" and attributes["rel"] == "stylesheet":
            self.loaded.add(attributes["href"])

    def target(self, address):
        """Returns the file and the anchor of an address."""
        parts = urlsplit(address)
        return (self.path.parent / unquote(parts.path)).resolve() if parts.path else self.path, unquote(parts.fragment)

    def weight(self):
        files = {self.target(address)[0] for address in self.pictures | self.loaded if is_inside(address)}
        return sum(path.stat().st_size for path in {self.path, *files})


def is_inside(address):
    parts = urlsplit(address)
    return not (parts.scheme or parts.netloc)


def build(folder):
    """Builds the site, where a warning is an error, and returns its pages by path."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", folder / "cache"]
    done = subprocess.run(
        [*command, ROOT / "docs", folder / "html"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in sorted((folder / "html").resolve().rglob("*.html"))}


def without_a_file(page, addresses):
    return [(page.path.name, a) for a in addresses if not (is_inside(a) and page.target(a)[0].is_file())]


def leads_nowhere(page, address, pages):
    path, anchor = page.target(address)
    if path in pages:
        return anchor not in pages[path].anchors
    return bool(anchor) or not path.is_file()


# One test, since two builds at a time would write the same copies of notebooks.
def test_pictures_links_and_formulas_of_the_site(tmp_path):
    for module in ("furo", "latex2mathml", "myst_nb", "sphinx_copybutton", "sphinx_design"):
        pytest.importorskip(module)
    pages = build(tmp_path)
    assert len(pages) > 50
    assert [missing for page in pages.values() for missing in without_a_file(page, page.pictures)] == []
    assert [missing for page in pages.values() for missing in without_a_file(page, page.loaded)] == []
    links = [(page, link) for page in pages.values() for link in page.links if is_inside(link)]
    assert len(links) > 1000
    assert [(page.path.name, link) for page, link in links if leads_nowhere(page, link, pages)] == []

    notebooks = {path.stem for path in (ROOT / "tutorials").glob("*.ipynb")}
    gallery = next(page for path, page in pages.items() if path.match("tutorials/README.html"))
    assert {Path(picture).stem for picture in gallery.pictures} == notebooks

    pages_alone = {path: page for path, page in pages.items() if path.stem not in notebooks}
    assert {path.name: page.weight() for path, page in pages_alone.items() if page.weight() > 500_000} == {}

    texts = [path.read_text(encoding="utf-8") for path in pages]
    formulas = [formula for text in texts for formula in re.findall(r"<math.*?</math>", text, re.S)]
    assert len(formulas) > 100
    assert [formula for formula in formulas if re.search(r"\\|&#x0005C;|mathvariant=\"(?!normal)", formula)] == []


def numbers(text):
    """Returns the numbers of a text, not those within names such as LeNet-5."""
    return re.findall(r"(?<![\w.-])\d+(?:\.\d+)?(?![\w-])", re.sub(r"(?<=\d),(?=\d{3})", "", text))
