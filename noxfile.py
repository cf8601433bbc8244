"""Sessions of nox: ``nox -l`` lists them, ``nox -s tests`` runs one."""

import nox

nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["lint", "typing", "docs", "tests", "lowest", "newest", "no_compiler"]

LOWEST = ["torch==2.9.0", "pyro-ppl==1.9.2", "numpy==1.26.4", "matplotlib==3.10.1"]


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """The test suite on the torch that the numbers of the documentation were measured with."""
    session.install("torch==2.13.0", "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.10")
def lowest(session: nox.Session) -> None:
    """The test suite on the lowest versions that pyproject.toml promises."""
    session.install(*LOWEST, "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.13")
def newest(session: nox.Session) -> None:
    """The test suite on the newest versions of everything."""
    session.install("--upgrade", "-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session(python="3.11")
def no_compiler(session: nox.Session) -> None:
    """The core's tests where the loops in C could not be compiled."""
    session.install("torch==2.13.0", "-e", ".[test]", env={"CC": "/bin/false"})
    session.run("pytest", "tests/ops", "tests/infer", *session.posargs)


@nox.session(python="3.11")
def notebooks(session: nox.Session) -> None:
    """The tutorials, executed."""
    session.install("torch==2.13.0", "-e", ".[test]")
    session.run("pytest", "tests/tutorials/test_tutorials.py", *session.posargs)


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """The documentation; warnings are errors."""
    session.install("torch==2.13.0", "-e", ".[dev]")
    session.run("python", "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Style."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session(python="3.11")
def typing(session: nox.Session) -> None:
    """Types."""
    session.install("torch==2.13.0", "-e", ".[dev]")
    session.run("mypy")
