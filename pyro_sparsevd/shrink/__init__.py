"""From a network with zeros to a smaller one. torch only."""

__all__ = ["LayerSize", "SelectFeatures", "ShrinkReport", "SparseLinear", "shrink", "shrink_report", "to_sparse"]

from .report import LayerSize, ShrinkReport, shrink_report
from .shrink import SelectFeatures, shrink
from .sparse_linear import SparseLinear, to_sparse
