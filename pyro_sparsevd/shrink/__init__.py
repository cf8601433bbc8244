"""From a network with zeros to a smaller one. torch only."""

__all__ = ["shrink", "shrink_with_report", "to_sparse"]

from .shrink import shrink, shrink_with_report
from .sparse_linear import to_sparse
