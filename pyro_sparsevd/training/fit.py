"""Batches to a posterior in one call, for any model and likelihood."""

__all__ = ["fit", "learning_rate_factor", "require_finite_gradients", "sparsity_of"]

import math
import warnings
from collections.abc import Callable, Iterable, Sized
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .._modules import evaluation_mode
from ..infer.autoguide import AutoSparseNormal
from ..infer.elbo import SparseVD_ELBO
from ..infer.kl import KL
from ..infer.schedules import LinearWarmup
from ..nn.supervised import Supervised
from ..sparsity.summary import sparsify
from .batches import batches, loss_of, size_of


def fit(
    model: nn.Module,
    guide: nn.Module,
    loader: Iterable[Any] | Callable[[], Iterable[Any]],
    *,
    epochs: int,
    lr: float = 3e-3,
    kl: KL = "exact",
    warm_up: float = 0.5,
    validation: Iterable[Any] | None = None,
    callbacks: Iterable[Callable[[int, dict[str, float]], Any]] = (),
    description: str | None = None,
) -> list[dict[str, float]]:
    r"""Fits a guide to a model on batches of data, with Adam and a progress bar.

    It minimises :math:`-\mathbb E_q \log p(y \mid w) + c \, \mathrm{KL}(q \,\|\, p)`, the loss of
    :class:`~.elbo.SparseVD_ELBO`. The weight :math:`c` is 0 for a fortieth of the training, then rises linearly to 1;
    the learning rate is constant for half of the training, then falls linearly to 0.

    Args:
        model: A Pyro model that is a torch module, such as :class:`~.supervised.Supervised`.
        guide: Its guide, such as :class:`~.autoguide.AutoSparseNormal`.
        loader: The batches: a ``DataLoader``, a list, or a function that returns the batches of an epoch. The parts of
            a tuple or list, and of a dictionary by their names, are the arguments of the model. They are moved to the
            device of the parameters.
        epochs: How many times to go through the data.
        lr: The learning rate.
        kl: The form of the divergence, as for :class:`~.elbo.SparseVD_ELBO`.
        warm_up: The part of the training after which c is 1; 0 for c = 1 from the start.
        validation: Batches of held-out data.
        callbacks: Functions of the number of an epoch and of its numbers, called after each epoch; they may add
            numbers of their own.
        description: What stands before the progress bar.

    Returns:
        For each epoch ``nll`` and ``kl``, in nats over the data set, means over its batches; ``sparsity`` and
        ``compression`` of a sparse posterior at the threshold 3; with ``validation`` the ``validation_nll``: the
        expected negative log likelihood of its data, scaled as in training, by one sample for each batch.

    Raises:
        TypeError: If model or guide is no module, or the loader neither iterable nor callable.
        ValueError: If the loader gives no batch, can be gone through only once, or has more data in an epoch than the
            model's ``num_data``; if a number is out of its range; or if loss or gradient is not finite, before a
            step is taken.

    Warns:
        UserWarning: If the data of the first epoch are fewer than ``num_data`` by more than a batch, as the likelihood
            is scaled to that number.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 1))
        >>> model = sparsevd.Supervised(bnn, sparsevd.GaussianLikelihood(), num_data=20)
        >>> guide = sparsevd.AutoSparseNormal(model)
        >>> history = sparsevd.fit(model, guide, [(torch.randn(10, 4), torch.randn(10, 1))] * 2, epochs=3)
        >>> sorted(history[-1])
        ['compression', 'kl', 'nll', 'sparsity']
    """
    _check(model, guide, epochs, lr, warm_up)
    elbo = SparseVD_ELBO(kl=kl)
    loss = elbo(model, guide)
    device = next((p.device for p in loss.parameters()), torch.device("cpu"))
    if not list(guide.parameters()):  # Pyro's own guides make them in their first pass
        with torch.no_grad():
            loss_of(loss, next(batches("loader", loader, device)))
    optimizer = torch.optim.Adam(loss.parameters(), lr)
    kl_weight = LinearWarmup(epochs / 40, warm_up * epochs) if warm_up else lambda time: 1.0
    steps = len(loader) if isinstance(loader, Sized) else 0
    history: list[dict[str, float]] = []
    with tqdm(total=epochs, desc=description, unit="epoch") as progress:
        for epoch in range(epochs):
            loss.train()
            terms, count, largest = [], 0, 0
            for step, batch in enumerate(batches("loader", loader, device)):
                size = size_of(batch)
                count, largest = count + size, max(largest, size)
                _check_size(model, count)
                time = epoch + (step / steps if steps else 0.0)
                elbo.kl_weight = kl_weight(time)
                for group in optimizer.param_groups:
                    group["lr"] = lr * learning_rate_factor(time / epochs)
                optimizer.zero_grad()
                loss_of(loss, batch).backward()
                require_finite_gradients(loss)
                optimizer.step()
                terms.append(torch.stack([elbo.terms["nll"], elbo.terms["kl"]]))
            steps = len(terms)
            if epoch == 0:
                _warn_of_missing_data(model, count, largest)
            nll, divergence = torch.stack(terms).mean(0).tolist()
            numbers = {"nll": nll, "kl": divergence, **sparsity_of(guide)}
            if validation is not None:
                numbers["validation_nll"] = _expected_nll(elbo, loss, batches("validation", validation, device))
            for callback in callbacks:
                callback(epoch, numbers)
            history.append(numbers)
            progress.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()}, refresh=False)
            progress.update()
    return history


def learning_rate_factor(part: float) -> float:
    """Returns the factor of the learning rate after a part of the training: 1 for half of it, then falling to 0."""
    return min(1.0, 2 * (1 - part))


def _check(model: Any, guide: Any, epochs: Any, lr: Any, warm_up: Any) -> None:
    for name, value in (("model", model), ("guide", guide)):
        if not isinstance(value, nn.Module):
            raise TypeError(
                f"{name}: expected a torch module, whose parameters can be trained, but got {type(value).__name__}; "
                "use SVI for functions"
            )
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs <= 0:
        raise ValueError(f"epochs: expected a positive integer, but got {epochs!r}")
    if not 0 < lr < math.inf:
        raise ValueError(f"lr: expected a positive and finite number, but got {lr}")
    if warm_up and not 1 / 40 < warm_up <= 1:
        raise ValueError(f"warm_up: expected 0 or a part of the training above 1/40 and up to 1, but got {warm_up}")


def require_finite_gradients(loss: nn.Module) -> None:
    """Raises where a step would make parameters NaN or infinite."""
    gradients = {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}
    if not torch.nn.utils.get_total_norm(gradients.values()).isfinite():
        wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        found = ", ".join(wrong) or "all together, by an overflow"
        raise ValueError(
            f"gradient: expected finite numbers, but those of {found} are not; no step was taken. "
            "torch.autograd.detect_anomaly() finds where they come from"
        )


def _check_size(model: nn.Module, count: int) -> None:
    if isinstance(model, Supervised) and count > model.num_data:
        raise ValueError(f"num_data: expected as many data as an epoch has, {count} or more, but got {model.num_data}")


def _warn_of_missing_data(model: nn.Module, count: int, largest: int) -> None:
    if isinstance(model, Supervised) and count <= model.num_data - largest:  # a last, smaller batch may be dropped
        warnings.warn(
            f"num_data: the likelihood is scaled to {model.num_data} data, but an epoch has {count}",
            stacklevel=3,
        )


def sparsity_of(guide: nn.Module) -> dict[str, float]:
    """Returns sparsity and compression at the threshold 3, where the guide has sites with a sparse prior."""
    if not any(isinstance(part, AutoSparseNormal) and part.sparse_sites for part in guide.modules()):
        return {}
    summary = sparsify(guide, 3.0)
    return {"sparsity": summary.sparsity, "compression": summary.compression}


@torch.no_grad()
def _expected_nll(elbo: SparseVD_ELBO, loss: nn.Module, batches: Iterable[Any]) -> float:
    """Returns the mean over held-out data of the scaled negative log likelihood, in evaluation mode."""
    terms, sizes = [], []
    with evaluation_mode(loss):
        for batch in batches:
            loss_of(loss, batch)
            terms.append(elbo.terms["nll"])
            sizes.append(max(size_of(batch), 1))
    return float(torch.stack(terms) @ torch.tensor(sizes).to(terms[0]) / sum(sizes))
