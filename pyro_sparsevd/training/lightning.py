"""Training with Lightning: on any device, on many of them, with its loggers and checkpoints."""

__all__ = ["RandomState", "SparseVDModule"]

import random
from typing import Any

import lightning
import numpy as np
import torch
from pyro import poutine
from torch import Tensor, nn

from ..infer.elbo import SparseVD_ELBO
from ..infer.kl import KL
from ..infer.schedules import LinearWarmup
from .batches import loss_of, size_of
from .fit import learning_rate_factor, require_finite_gradients, sparsity_of


class SparseVDModule(lightning.LightningModule):
    """A model and its guide as what a ``lightning.Trainer`` trains.

    The objective and its schedules are those of :func:`~.fit.fit`: Adam, a learning rate that is constant for
    half of the steps and then falls linearly to 0, and a KL weight that is 0 for a fortieth of the steps and then rises
    linearly to 1. Logged are ``nll`` and ``kl`` in nats over the data set, ``sparsity`` and ``compression``, and
    ``validation_nll``, scaled likewise.

    Each process of several has batches of its own; ``num_data`` of the model is the size of the whole data set, and
    the gradients' average is that of the joint batch. Seed the processes differently, or they share their noise:
    ``lightning.seed_everything(seed + rank)``.

    Args:
        model: A Pyro model that is a torch module, such as :class:`~.supervised.Supervised`.
        guide: Its guide.
        lr: The learning rate.
        kl: The form of the divergence, as for :class:`~.elbo.SparseVD_ELBO`.
        warm_up: The part of the steps after which the KL weight is 1; 0 for 1 from the start.
        weight_decay: Of the means and the other parameters; the log variances have none.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 1))
        >>> model = sparsevd.Supervised(bnn, sparsevd.GaussianLikelihood(), num_data=20)
        >>> SparseVDModule(model, sparsevd.AutoSparseNormal(model)).model is model
        True
    """

    def __init__(
        self,
        model: nn.Module,
        guide: nn.Module,
        *,
        lr: float = 3e-3,
        kl: KL = "exact",
        warm_up: float = 0.5,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.elbo = SparseVD_ELBO(kl=kl)
        self.loss = self.elbo(model, guide)
        self.lr, self.warm_up, self.weight_decay = lr, warm_up, weight_decay

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
        parameters = dict(self.loss.named_parameters())
        log_variances = [p for name, p in parameters.items() if "log_variances" in name.split(".")]
        others = [p for name, p in parameters.items() if "log_variances" not in name.split(".")]
        groups = [
            {"params": others, "weight_decay": self.weight_decay},
            {"params": log_variances, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.Adam(groups, self.lr)
        steps = self.trainer.estimated_stepping_batches
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step / steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss of a batch, in nats over the data set."""
        steps = self.trainer.estimated_stepping_batches
        schedule = LinearWarmup(steps / 40, self.warm_up * steps) if self.warm_up else lambda step: 1.0
        self.elbo.kl_weight = schedule(self.global_step)
        loss = loss_of(self.loss, batch)
        options: Any = {"on_step": False, "on_epoch": True, "batch_size": size_of(batch)}
        self.log_dict(dict(self.elbo.terms), prog_bar=True, **options)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Stops before a gradient that is not finite reaches the parameters."""
        if self.trainer.precision != "16-mixed":  # there, the scaling of the loss finds out what overflows
            require_finite_gradients(self.loss)

    def on_train_epoch_end(self) -> None:
        """Logs sparsity and compression."""
        self.log_dict(sparsity_of(self.guide), prog_bar=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the expected negative log likelihood of held-out data, scaled as in training."""
        loss_of(self.loss, batch)
        self.log(
            "validation_nll",
            self.elbo.terms["nll"],
            prog_bar=True,
            sync_dist=True,
            batch_size=size_of(batch),
        )

    def predict_step(self, batch: Any, batch_idx: int, num_samples: int = 20) -> Tensor:
        """Returns samples of the model's output, of shape ``(num_samples, M, ...)``."""
        x = batch[0] if isinstance(batch, tuple | list) else batch
        outputs = []
        for _ in range(num_samples):
            trace = poutine.trace(self.guide).get_trace(x)
            outputs.append(poutine.replay(self.model, trace=trace)(x))
        return torch.stack(outputs)


class RandomState(lightning.Callback):
    """Keeps the states of all generators of random numbers in checkpoints, so that a resumed run goes on as before."""

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
        torch.set_rng_state(state_dict["torch"])
        if state_dict["cuda"]:
            torch.cuda.set_rng_state_all(state_dict["cuda"])
        np.random.set_state(state_dict["numpy"])  # noqa: NPY002
        random.setstate(state_dict["python"])
