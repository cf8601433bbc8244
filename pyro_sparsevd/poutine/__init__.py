"""Effect handlers: the weight that is sampled only where needed, and the local reparameterisation trick."""

__all__ = ["local_reparam", "recompute_contexts"]

from . import local_forms as local_forms
from .local_reparam import local_reparam
from .trace import recompute_contexts
