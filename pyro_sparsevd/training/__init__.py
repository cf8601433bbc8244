"""From batches of data to a posterior: in one call, or with Lightning on many devices."""

__all__ = ["fit"]

from typing import Any

from .fit import fit


def __getattr__(name: str) -> Any:
    """Returns what needs Lightning, whose import takes seconds."""
    if name not in ("RandomState", "SparseVDModule"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import lightning  # noqa: F401
    except ImportError as error:
        raise ImportError(f'{name}: expected lightning; pip install "pyro-sparsevd[lightning]" installs it') from error
    from .lightning import RandomState, SparseVDModule

    return {"RandomState": RandomState, "SparseVDModule": SparseVDModule}[name]
