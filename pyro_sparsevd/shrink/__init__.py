"""From a network with zeros to a smaller one. torch only."""

__all__ = ["ShrinkReport", "shrink", "shrink_report", "to_sparse"]

from .report import ShrinkReport, shrink_report
from .shrink import shrink
from .sparse_linear import to_sparse
