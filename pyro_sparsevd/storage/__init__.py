"""A network as a small file, or for other runtimes. torch only."""

__all__ = ["StorageError", "export_onnx", "load_sparse", "register_architecture", "save_sparse"]

from .onnx import export_onnx
from .range_coder import StorageError
from .sparse_file import load_sparse, register_architecture, save_sparse
