"""Configuration of Sphinx. Notebooks are shown with the outputs they keep, and not run."""

import importlib
import inspect
import json
import re
import shutil
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import pyro_sparsevd

project = "pyro_sparsevd"
author = project_copyright = "the authors of pyro_sparsevd"
release = version = pyro_sparsevd.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
nitpicky = True
# What users get, but do not make themselves, has no page of its own.
nitpick_ignore = [
    ("py:class", "pyro_sparsevd.infer.local_gap.Estimate"),
    ("py:class", "pyro_sparsevd.infer.masked.SparsifiedGuide"),
    ("py:class", "pyro_sparsevd.ops.memory.Workspace"),
    ("py:exc", "CheckpointError"),
    ("py:exc", "RepeatedUseError"),
]
# Names of other packages are not looked up, so that the site builds without a network.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|matplotlib|nn|numpy|pathlib|pyro|torch|typing)\..*"),
    (
        r"py:.*",
        r"(Any|Callable|Collection|Distribution|Iterable|Iterator|Mapping|Sequence|Tensor|ndarray|optional)",
    ),
]

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_output_stderr = "remove"  # progress bars
nb_merge_streams = True

html_theme = "furo"
html_title = f"pyro_sparsevd {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_domain_indices = False  # one of modules would hold one module

# Sphinx reads nothing outside of its own folder. Git ignores these copies.
_here = Path(__file__).parent
shutil.rmtree(_here / "tutorials", ignore_errors=True)
for pattern in ("*.ipynb", "*.md", "images/*"):
    for path in (_here.parent / "tutorials").glob(pattern):
        target = _here / path.relative_to(_here.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
for path in (_here / "tutorials").glob(
    "*.*"
):  # notebooks and pages, not the folder of images
    path.write_text(path.read_text().replace("](../docs/", "](../"))


_ROW = re.compile(
    r"\[([^\]]+)\]\(([^)]+)\) \| (.+?) \| <img src=\"([^\"]+)\".* alt=\"([^\"]+)\"> \|$",
    re.M,
)
_CARD = """:::{{grid-item-card}} {title}
:img-top: {image}
:img-alt: {alt}
:link: {page}
:link-type: doc

{text}
:::
"""


def _with_gallery(contents: str, folder: Path) -> str:
    """Returns the list of tutorials with cards in place of the table of notebooks."""
    cards = []
    for _, file, text, image, alt in _ROW.findall(contents):
        cells = json.loads((folder / file).read_text())["cells"]
        heading = next(
            "".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"
        )
        title = heading.splitlines()[0].removeprefix("# ")
        number, page = file.partition("-")[0], Path(file).stem
        text = text[0].upper() + text[1:]
        cards.append(
            _CARD.format(
                title=f"{number} · {title}", image=image, alt=alt, page=page, text=text
            )
        )
    grid = (
        "::::{grid} 1 2 2 3\n:gutter: 3\n:class-container: gallery\n\n"
        + "\n".join(cards)
        + "::::\n"
    )
    table = r"^\| \| what it shows \| \|\n(\|.*\n)+"
    return re.sub(table, lambda _: grid, contents, flags=re.M)


_contents = _here / "tutorials" / "README.md"
_contents.write_text(_with_gallery(_contents.read_text(), _here / "tutorials"))


# Letters that browsers no longer make of an attribute, and spaces around operators.
_LETTERS = {r"\mathbb E": "𝔼", r"\mathcal L": "ℒ", r"\mathcal N": "𝒩"}
_SPACING = [
    (r"<mi>&#x0007E;</mi>", "<mo>∼</mo>"),
    (
        r"<mo[^>]*>(&#x0002F;|&#x0007C;)</mo>",
        r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>',
    ),
    (r"<mi>log</mi>(?!<mo[^>]*>&#x00028;)", r'<mi>log</mi><mspace width="0.17em"/>'),
]


def _as_mathml(translator: HTML5Translator, node: nodes.Element) -> None:
    """Writes a formula as MathML, which browsers draw without scripts or a network."""
    is_block = isinstance(node, nodes.math_block)
    formula = node.astext()
    for tex, letter in _LETTERS.items():
        formula = formula.replace(tex, letter)
    display = "block" if is_block else "inline"
    mathml = latex2mathml.converter.convert(formula, display=display)
    for pattern, replacement in _SPACING:
        mathml = re.sub(pattern, replacement, mathml)
    translator.body.append(f'<div class="math">{mathml}</div>' if is_block else mathml)
    raise nodes.SkipNode


def _without_unused_styles(
    app: Sphinx, page: str, template: str, context: dict, doctree: object
) -> None:
    """Leaves the styles of notebooks out of other pages: 43 kB."""
    if "cell docutils" not in context.get("body", ""):
        context["css_files"] = [
            file for file in context["css_files"] if "mystnb" not in str(file.filename)
        ]


def setup(app: Sphinx) -> None:
    """Registers what draws formulas, and what each page loads."""
    app.connect("html-page-context", _without_unused_styles)
    app.add_html_math_renderer("mathml", (_as_mathml, None), (_as_mathml, None))


_imported_on_demand = {"training": ("RandomState", "SparseVDModule")}


def _room_page(room: str) -> str:
    """Returns the page of a room: its public names, those of the package itself first."""
    package = importlib.import_module(f"pyro_sparsevd.{room}")
    at_top = [name for name in package.__all__ if name in pyro_sparsevd.__all__]
    names = [*at_top, *(name for name in package.__all__ if name not in at_top)]
    names += _imported_on_demand.get(room, ())
    sections = [_section(package, room, name) for name in names]
    return f"# sparsevd.{room}\n\n{package.__doc__}\n\n" + "\n".join(sections)


def _section(package: object, room: str, name: str) -> str:
    value = getattr(package, name)
    if inspect.ismodule(getattr(pyro_sparsevd, room)):
        at_top, elsewhere = pyro_sparsevd.__all__, f"sparsevd.{room}"
    else:  # sparsevd.shrink is the function
        at_top, elsewhere = vars(pyro_sparsevd), f"pyro_sparsevd.{room}"
    shown = f"sparsevd.{name}" if name in at_top else f"{elsewhere}.{name}"
    if inspect.ismodule(value):
        return f"## {shown}\n\n```{{eval-rst}}\n.. automodule:: {value.__name__}\n   :members:\n```\n"
    is_class, is_function = inspect.isclass(value), inspect.isfunction(value)
    if not (is_class or is_function):
        return f"## {shown}\n\n`{value!r}`\n"
    kind = "class" if is_class else "function"
    members = "   :members:\n" if kind == "class" else ""
    return f"## {shown}\n\n```{{eval-rst}}\n.. auto{kind}:: {value.__module__}.{name}\n{members}```\n"


shutil.rmtree(_here / "api", ignore_errors=True)
(_here / "api").mkdir()
for _room in re.findall(r"^    (\w+)  +\w", pyro_sparsevd.__doc__ or "", re.M):
    (_here / "api" / f"{_room}.md").write_text(_room_page(_room))
