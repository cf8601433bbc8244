"""Training with Lightning: on any device, on many of them, with its loggers and checkpoints."""

__all__ = ["CheckpointError", "RandomState", "ResumableModule", "SparseVDModule"]

import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import lightning
import numpy as np
import torch
from pyro import poutine
from torch import Tensor, nn

from ..infer.elbo import SparseVD_ELBO
from ..infer.kl import KL
from .batches import EpochSize, inputs, known_size, loss_of, size_of
from .fit import adam, check_model_and_guide, require_finite_gradients, require_finite_validation, sparsity_of
from .schedule import check_schedule, kl_weight, learning_rate_factor


class CheckpointError(ValueError):
    """A checkpoint from which a training cannot resume."""


class ResumableModule(lightning.LightningModule):
    """A module that resumes from checkpoints of its own options, ``hparams``, and refuses others by name.

    The options are those that it was made with, and whatever else a script adds to ``hparams``, such as its seed. A
    resumed training may have more epochs, but not fewer.
    """

    _is_training = False

    def setup(self, stage: str) -> None:
        """Notes whether a checkpoint is one to resume from."""
        self._is_training = stage == "fit"

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps how long the training was to be."""
        checkpoint["max_epochs"] = self.trainer.max_epochs

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises CheckpointError, before anything is changed, for a checkpoint of other options or parameters."""
        if self._is_training:
            self._require_same_options(checkpoint)
        expected, found = _shapes(self.state_dict()), _shapes(checkpoint["state_dict"])
        for name in {**expected, **found}:
            if expected.get(name) != found.get(name):
                raise CheckpointError(
                    f"expected a checkpoint with {name} of shape {expected.get(name)}, but got {found.get(name)}; go "
                    "on with the network that it is of, or start again"
                )

    def _require_same_options(self, checkpoint: dict[str, Any]) -> None:
        stored, options = checkpoint.get("hyper_parameters", {}), dict(self.hparams)
        for name in {**options, **stored}:
            if options.get(name) != stored.get(name):
                _refuse(name, options.get(name), stored.get(name))
        before, now = checkpoint.get("max_epochs"), self.trainer.max_epochs
        if before and now and 0 <= now < before:
            _refuse("epochs", now, before)


def _refuse(name: str, expected: Any, found: Any) -> None:
    raise CheckpointError(
        f"expected the checkpoint of a training with {name} {expected}, but it is of one with {name} {found}; go on "
        f"with {name} {found}, or start again"
    )


def _shapes(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


class SparseVDModule(ResumableModule):
    """A model and its guide as what a ``lightning.Trainer`` trains.

    The objective and its schedules are those of :func:`~.fit.fit`: Adam, a learning rate that is constant for
    half of the steps and then falls linearly to 0, and a KL weight that is 0 for a fortieth of the steps and then rises
    linearly to 1. Logged are ``nll`` and ``kl`` in nats over the data set, ``sparsity`` and ``compression``, and
    ``validation_nll``, scaled likewise.

    Each process of several has batches of its own; ``num_data`` of the model is the size of the whole data set, and
    the gradients' average is that of the joint batch. Processes that draw the same random numbers share their noise:
    give the trainer a :class:`RandomState`.

    Args:
        model: A Pyro model: a torch module, such as :class:`~.supervised.Supervised`, or a function.
        guide: Its guide.
        lr: The learning rate.
        kl: The form of the divergence, as for :class:`~.elbo.SparseVD_ELBO`.
        warm_up: The part of the steps after which the KL weight is 1; 0 for 1 from the start.
        weight_decay: Of the means and the other parameters; the log variances have none.

    Raises:
        CheckpointError: When resumed from a checkpoint of other options, of other parameters, of another ``num_data``
            or of a training for more epochs.
        ValueError: If ``lr`` or ``warm_up`` is out of its range. While it trains: as of :func:`~.fit.fit`, and if the
            guide has no parameters yet or the number of steps is unknown.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 1))
        >>> model = sparsevd.Supervised(bnn, sparsevd.GaussianLikelihood(), num_data=20)
        >>> SparseVDModule(model, sparsevd.AutoSparseNormal(model)).model is model
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: nn.Module,
        *,
        lr: float = 3e-3,
        kl: KL = "exact",
        warm_up: float = 0.5,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        check_model_and_guide(model, guide)
        check_schedule(lr, warm_up)
        self.elbo = SparseVD_ELBO(kl=kl)
        self.loss = self.elbo(model, guide)
        options = {"lr": lr, "kl": kl, "warm_up": warm_up, "weight_decay": weight_decay}
        self.save_hyperparameters({**options, "num_data": getattr(model, "num_data", None)})

    @property
    def model(self) -> Any:
        """The model."""
        return self.loss.model

    @property
    def guide(self) -> Any:
        """The guide."""
        return self.loss.guide

    def configure_optimizers(self) -> Any:
        """Returns Adam and the schedule of its learning rate."""
        if not list(self.guide.parameters()):
            raise ValueError("guide: expected parameters, but it has none yet; call it with a batch before")
        steps = self.trainer.estimated_stepping_batches
        if not 0 < steps < math.inf:
            raise ValueError(
                f"trainer: expected max_epochs, or max_steps where batches have no length, but got {steps} steps"
            )
        parameters = dict(self.loss.named_parameters())
        is_variance = {name: not {"log_variances", "log_alphas"}.isdisjoint(name.split(".")) for name in parameters}
        log_variances = [p for name, p in parameters.items() if is_variance[name]]
        others = [p for name, p in parameters.items() if not is_variance[name]]
        groups = [
            {"params": others, "weight_decay": self.hparams["weight_decay"]},
            {"params": log_variances, "weight_decay": 0.0},
        ]
        optimizer = adam(groups, self.hparams["lr"])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Refuses more data than the model was told of, where their number is known before an epoch."""
        EpochSize(self.model).add(known_size(self.trainer.train_dataloader))
        self.on_train_epoch_start()  # which Lightning leaves out where it resumes within an epoch

    def on_train_epoch_start(self) -> None:
        """Starts the sums of an epoch."""
        self._steps = self.trainer.estimated_stepping_batches
        self._size = EpochSize(self.model, self.trainer.world_size)
        self._terms: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of a batch, in nats over the data set."""
        self._size.add(size_of(batch))
        self.elbo.kl_weight = kl_weight(self.global_step / self._steps, self.hparams["warm_up"])
        loss = loss_of(self.loss, batch)
        self._terms.append(torch.stack([self.elbo.terms["nll"], self.elbo.terms["kl"]]))
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stops before a gradient that is not finite reaches the parameters."""
        if self.trainer.precision != "16-mixed":  # there, the scaling of the loss finds out what overflows
            require_finite_gradients(self.loss)

    def on_train_epoch_end(self) -> None:
        """Logs the means over the epoch of the terms of the loss, sparsity and compression."""
        if self.current_epoch == 0 and len(self._terms) == self.trainer.num_training_batches:
            self._size.warn_if_missing()
        nll, divergence = torch.stack(self._terms).mean(0)
        self.log_dict({"nll": nll, "kl": divergence}, prog_bar=True, sync_dist=True)
        self.log_dict(sparsity_of(self.guide), prog_bar=True, sync_dist=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the expected negative log likelihood of held-out data, scaled as in training."""
        loss_of(self.loss, batch)
        options: Any = {"batch_size": size_of(batch), "prog_bar": True, "sync_dist": True}
        self.log("validation_nll", self.elbo.terms["nll"], **options)

    def on_validation_epoch_end(self) -> None:
        """Stops where that is not finite."""
        require_finite_validation(float(self.trainer.callback_metrics["validation_nll"]))

    def predict_step(self, batch: Any, batch_idx: int, num_samples: int = 20) -> Tensor:
        """Returns samples of the model's output, of shape ``(num_samples, M, ...)``."""
        args, kwargs = inputs(batch)
        outputs = []
        for _ in range(num_samples):
            trace = poutine.trace(self.guide).get_trace(*args, **kwargs)
            outputs.append(poutine.replay(self.model, trace=trace)(*args, **kwargs))
        return torch.stack(outputs)


class RandomState(lightning.Callback):
    """Random numbers of a training: each process has its own, and a resumed one goes on as before.

    Checkpoints keep the states of all generators of the first process. Resumed after an epoch, on one device of the
    same kind, a training is bit by bit the one that was never interrupted; on several, the noise of the others is new.
    """

    _loaded: dict[str, Any] | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Seeds all processes but the first anew, which otherwise may share their noise."""
        if trainer.global_rank:
            torch.manual_seed(int(torch.randint(2**62, ())) + trainer.global_rank)

    def state_dict(self) -> dict[str, Any]:
        """Returns the states, of types that ``torch.load`` takes from strangers."""
        state: Any = np.random.get_state()  # noqa: NPY002 # the one that others use
        kind, keys, *others = state
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": (kind, keys.tolist(), *others),
            "python": random.getstate(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets the states: what is random from here on is so as it was when the checkpoint was written."""
        torch.set_rng_state(state_dict["torch"].cpu())
        for device, state in zip(range(torch.cuda.device_count()), state_dict["cuda"], strict=False):
            torch.cuda.set_rng_state(state.cpu(), device)
        np.random.set_state(state_dict["numpy"])  # noqa: NPY002
        random.setstate(state_dict["python"])
        self._loaded = state_dict

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Notes that there was something left to train."""
        self._loaded = None

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Sets the states again after a training that was finished, as the trainer used random numbers to find out."""
        if self._loaded is not None:
            self.load_state_dict(self._loaded)
