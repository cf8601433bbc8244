"""Configuration of Sphinx. Notebooks are shown with the outputs they keep, and not run."""

import importlib
import pkgutil
import re
import shutil
from pathlib import Path

from sphinx.application import Sphinx

import pyro_sparsevd

project = "pyro_sparsevd"
author = "the authors of pyro_sparsevd"
release = version = pyro_sparsevd.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
nitpicky = True
# Names of other packages are not looked up, so that the site builds without a network.
nitpick_ignore_regex = [
    (r"py:.*", r"(collections|matplotlib|nn|numpy|pathlib|pyro|torch|typing)\..*"),
    (r"py:.*", r"(Any|Callable|Collection|Distribution|Iterable|Iterator|Mapping|Sequence|Tensor|ndarray|optional)"),
]

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_typehints_format = "short"

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"

html_theme = "furo"
html_title = f"pyro_sparsevd {version}"

# Sphinx reads nothing outside of its own folder. Git ignores this copy.
_here = Path(__file__).parent
shutil.rmtree(_here / "tutorials", ignore_errors=True)
for pattern in ("*.ipynb", "*.md", "images/*.png"):
    for path in (_here.parent / "tutorials").glob(pattern):
        target = _here / path.relative_to(_here.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)


def _list_modules(app: Sphinx, docname: str, source: list[str]) -> None:
    """Puts a section for each room and its modules, in the order of the package's docstring, into the API page."""
    if docname == "api":
        rooms = re.findall(r"^    (\w+)  +\w", pyro_sparsevd.__doc__ or "", re.M)
        source[0] = source[0].replace("<!-- modules -->", "\n".join(map(_room, rooms)))


def _room(room: str) -> str:
    package = importlib.import_module(f"pyro_sparsevd.{room}")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "_fused")
    return f"## {room}\n\n{package.__doc__}\n\n" + "\n".join(_section(f"{room}.{name}") for name in names)


def _section(name: str) -> str:
    # What is defined elsewhere is documented there: two targets of one name are a warning.
    module = importlib.import_module(f"pyro_sparsevd.{name}")
    home = {public: getattr(getattr(module, public), "__module__", module.__name__) for public in module.__all__}
    elsewhere = ", ".join(public for public, of in home.items() if of != module.__name__)
    options = "   :members:\n" + (f"   :exclude-members: {elsewhere}\n" if elsewhere else "")
    return f"### {name}\n\n```{{eval-rst}}\n.. automodule:: {module.__name__}\n{options}```\n"


def setup(app: Sphinx) -> None:
    """Makes the API page; Sphinx calls this."""
    app.connect("source-read", _list_modules)
