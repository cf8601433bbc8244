"""From batches of data to a posterior."""

__all__ = ["Checkpoint", "CheckpointError", "Split", "fit_posterior", "hold_out"]

from .checkpoints import Checkpoint, CheckpointError
from .loop import fit_posterior
from .split import Split, hold_out
