"""Effect handlers: the weight that is not sampled, and outputs sampled instead."""

__all__ = ["checkpoint_contexts", "local_reparam"]

from .local_reparam import local_reparam
from .trace import checkpoint_contexts
