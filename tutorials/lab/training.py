"""Trainings by Lightning that are quiet but for one progress bar, and resume from a checkpoint of their own options."""

__all__ = ["MaximumLikelihood", "Run", "train"]

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from pyro_sparsevd._files import replacing
from pyro_sparsevd._modules import run_network
from pyro_sparsevd.nn.supervised import fitted_targets
from pyro_sparsevd.training.fit import adam
from pyro_sparsevd.training.lightning import CheckpointError, RandomState, ResumableModule
from pyro_sparsevd.training.schedule import learning_rate_factor


@dataclass(frozen=True)
class Run:
    """Where a training runs, and what it resumes from.

    Args:
        trainer: Options of ``lightning.Trainer``; without any, it is one process, on the device of the parameters.
        checkpoint: A file that is written after each epoch, or after each hundredth part of many.
        resume: Whether to resume from it, if it is there.
        options: What determines the training besides the arguments of the recipe, such as a seed. A checkpoint of other
            options is refused.
    """

    trainer: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    resume: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


class MaximumLikelihood(ResumableModule):
    """A network that is fitted by Adam; the learning rate is constant for half of the steps, then falls to 0."""

    def __init__(self, network: nn.Module, likelihood: Callable[[Any], Any], lr: float) -> None:
        super().__init__()
        self.network, self.likelihood = network, likelihood
        self.save_hyperparameters({"lr": lr})

    def on_train_start(self) -> None:
        """Starts the sum of an epoch, also where Lightning resumes within one."""
        self.on_train_epoch_start()

    def on_train_epoch_start(self) -> None:
        """Starts the sum of an epoch."""
        self._nlls: list[Tensor] = []

    def training_step(self, batch: tuple[Any, Tensor], batch_idx: int) -> Tensor:
        """Returns the mean negative log likelihood of a batch, in nats."""
        x, y = batch
        likelihood = self.likelihood(run_network(self.network, x))
        nll = -likelihood.log_prob(fitted_targets(y, likelihood)).mean()
        self._nlls.append(nll.detach())
        return nll

    def on_train_epoch_end(self) -> None:
        """Logs the mean over the epoch."""
        self.log("nll", torch.stack(self._nlls).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        """Returns Adam and its schedule."""
        optimizer = adam([{"params": [p for p in self.parameters() if p.requires_grad]}], self.hparams["lr"])
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def train(
    module: ResumableModule,
    batches: DataLoader,
    *,
    epochs: int,
    run: Run,
    description: str,
    after_epoch: Callable[[int], Mapping[str, float]] | None = None,
) -> list[dict[str, float]]:
    """Trains a module, in place, and leaves it on the device that it was on.

    Args:
        module: The module.
        batches: The training data.
        epochs: How many times to go through them; 0 leaves the module as it is.
        run: Where, and from what to resume.
        description: The label of the progress bar.
        after_epoch: A function of the number of an epoch; its numbers are kept beside those that the module logs.

    Returns:
        The numbers of each epoch.

    Raises:
        CheckpointError: If the checkpoint cannot be read, or is of other options, parameters or more epochs.
    """
    if epochs == 0:
        return []
    device = next(module.parameters()).device
    record = _Record(description, run.checkpoint, after_epoch)
    module.save_hyperparameters(dict(run.options))
    resumed = run.checkpoint if run.resume and run.checkpoint is not None and run.checkpoint.is_file() else None
    with _quiet():
        trainer = lightning.Trainer(
            max_epochs=epochs,
            callbacks=[RandomState(), record],
            plugins=[_WholeFiles()],
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            **{"logger": False, **_on(device), **run.trainer},
        )
        try:
            trainer.fit(module, batches, ckpt_path=resumed)
        except CheckpointError as error:
            raise CheckpointError(f"{resumed}: {error}") from error
        finally:
            record.progress.close()
    module.to(device)
    return record.history


def _on(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {"accelerator": "cpu", "devices": 1}
    return {"accelerator": {"cuda": "gpu"}.get(device.type, device.type), "devices": [device.index or 0]}


class _Record(Checkpoint):
    """Keeps and shows the numbers of each epoch, and writes a checkpoint after it, or after each hundredth of many."""

    def __init__(
        self, description: str, path: Path | None, after_epoch: Callable[[int], Mapping[str, float]] | None
    ) -> None:
        self.description, self.path, self.after_epoch = description, path, after_epoch
        self.history: list[dict[str, float]] = []
        self.progress = tqdm(disable=True)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        done, epochs = len(self.history), trainer.max_epochs
        options: Any = {"desc": self.description, "unit": "epoch", "disable": not trainer.is_global_zero}
        self.progress = tqdm(total=epochs, initial=done, **options)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        numbers = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self.after_epoch is not None:
            numbers |= {name: float(value) for name, value in self.after_epoch(trainer.current_epoch).items()}
        self.history.append(numbers)
        done, epochs = len(self.history), trainer.max_epochs
        self.progress.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()}, refresh=False)
        self.progress.update()
        if self.path is not None and (done == epochs or done % math.ceil(epochs / 100) == 0):
            trainer.save_checkpoint(self.path)


class _WholeFiles(TorchCheckpointIO):
    """Checkpoints that are complete or absent at any moment, and hold no code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with replacing(path) as new:
            torch.save(checkpoint, new)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # which one depends on where the file is damaged
            raise CheckpointError(
                f"expected a checkpoint, but it cannot be read ({type(error).__name__}); remove it to start again"
            ) from error
        expected = {"state_dict", "optimizer_states", "loops", "callbacks", "hyper_parameters"}
        if not (isinstance(checkpoint, dict) and expected <= checkpoint.keys()):
            found = ", ".join(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
            raise CheckpointError(
                f"expected a checkpoint of {', '.join(sorted(expected))}, but got {found}; choose another file"
            )
        return checkpoint


@contextmanager
def _quiet() -> Iterator[None]:
    """Mutes Lightning's hints about devices, workers and loggers, and nothing else."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", PossibleUserWarning)
        for category in (DeprecationWarning, FutureWarning):  # of its own code
            warnings.filterwarnings("ignore", category=category, module=r"lightning\.")
        for logger in map(logging.getLogger, ("lightning.pytorch", "lightning.fabric")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield
