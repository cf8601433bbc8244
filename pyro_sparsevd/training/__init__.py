"""From batches of data to a posterior."""

__all__ = ["Checkpoint", "CheckpointError", "Split", "fit", "fit_posterior", "hold_out"]

from .checkpoints import Checkpoint, CheckpointError
from .fit import fit, fit_posterior
from .split import Split, hold_out
