"""Batches to a posterior in one call, for any model and likelihood."""

__all__ = ["adam", "fit", "require_finite_gradients", "require_finite_validation", "sparsity_of"]

import math
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from tqdm import tqdm

from .._modules import evaluation_mode
from ..infer.autoguide import AutoSparseNormal
from ..infer.buffers import unchanged_buffers, unchanged_buffers_on_error
from ..infer.checks import finite_value, raise_nonfinite
from ..infer.elbo import SparseVD_ELBO
from ..infer.kl import KL
from ..nn.supervised import Supervised
from ..sparsity.summary import sparsify
from .batches import EpochSize, arguments, batches, known_length, known_size, loss_of, size_of
from .schedule import check_schedule, kl_weight, learning_rate_factor


def fit(
    model: Callable[..., Any],
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
        model: A Pyro model: a torch module, such as :class:`~.supervised.Supervised`, or a function.
        guide: Its guide, such as :class:`~.autoguide.AutoSparseNormal`.
        loader: The batches: a ``DataLoader``, a list, or a function that returns the batches of an epoch. The parts of
            a tuple or list, and of a dictionary by their names, are the arguments of the model. They are moved to the
            device of the parameters.
        epochs: How many times to go through the data.
        lr: The learning rate.
        kl: The form of the divergence, as for :class:`~.elbo.SparseVD_ELBO`.
        warm_up: The part of the training after which c is 1; 0 for c = 1 from the start.
        validation: Batches of held-out data, of the same structure.
        callbacks: Functions of the number of an epoch and of its numbers, called after each epoch; they may add
            numbers of their own.
        description: What stands before the progress bar.

    Returns:
        For each epoch ``nll`` and ``kl``, in nats over the data set, means over its batches; ``sparsity`` and
        ``compression`` of a sparse posterior at the threshold 3; with ``validation`` the ``validation_nll``: the
        expected negative log likelihood of its data, scaled as in training, by one sample for each batch.

    Raises:
        TypeError: If the model is not callable, the guide no module, the loader neither iterable nor callable, or a
            batch no arguments of the model.
        ValueError: If the loader gives no batch, batches of different structures, or more data in an epoch than the
            model's ``num_data``, or can be gone through only once; if there is nothing to train; if a number is out of
            its range; or if the loss or a gradient is not finite, before a step is taken, or the validation.

    Warns:
        UserWarning: If the data of the first epoch are fewer than ``num_data`` by more than a batch, as the likelihood
            is scaled to that number; or if the loss depends on parameters that neither model nor guide has, such as
            those of ``pyro.param`` in a function.

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
    device = _device_of(loss)
    EpochSize(model).add(known_size(loader))
    if not list(guide.parameters()):  # Pyro's own guides make them in their first pass
        with torch.no_grad(), unchanged_buffers(model):
            loss_of(loss, next(batches("loader", loader, model, device)))
        device = _device_of(loss)
    optimizer = adam([{"params": _parameters(loss)}], lr)
    if validation is not None:
        _expected_nll(elbo, loss, batches("validation", validation, model, device))  # to fail before any step
    steps, callbacks = known_length(loader), tuple(callbacks)
    history: list[dict[str, float]] = []
    with tqdm(total=epochs, desc=description, unit="epoch") as progress:
        for epoch in range(epochs):
            loss.train()
            terms, size = [], EpochSize(model)
            for step, batch in enumerate(batches("loader", loader, model, device)):
                size.add(size_of(batch))
                _check_length(epochs, steps, warm_up)
                part = (epoch + (step / steps if steps else 0.0)) / epochs
                elbo.kl_weight = kl_weight(part, warm_up)
                for group in optimizer.param_groups:
                    group["lr"] = lr * learning_rate_factor(part)
                optimizer.zero_grad()
                _compute_gradients(elbo, loss, batch)
                optimizer.step()
                terms.append(torch.stack([elbo.terms["nll"], elbo.terms["kl"]]))
            steps = len(terms)
            if epoch == 0:
                size.warn_if_missing()
            nll, divergence = torch.stack(terms).mean(0).tolist()
            numbers = {"nll": nll, "kl": divergence, **sparsity_of(guide)}
            if validation is not None:
                held_out = batches("validation", validation, model, device)
                numbers["validation_nll"] = _expected_nll(elbo, loss, held_out)
            for callback in callbacks:
                callback(epoch, numbers)
            history.append(numbers)
            progress.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()}, refresh=False)
            progress.update()
    return history


def _check(model: Any, guide: Any, epochs: Any, lr: float, warm_up: float) -> None:
    check_model_and_guide(model, guide)
    if isinstance(epochs, bool) or not isinstance(epochs, Integral) or epochs <= 0:
        raise ValueError(f"epochs: expected a positive integer, but got {epochs!r}")
    check_schedule(lr, warm_up)


def _check_length(epochs: int, steps: int, warm_up: float) -> None:
    if epochs == 1 and not steps and warm_up:
        raise ValueError(
            "epochs: expected 2 or more for batches whose number is not known before, as the warm-up needs it; give "
            "batches with a length, such as a list, or warm_up=0"
        )


def check_model_and_guide(model: Any, guide: Any) -> None:
    """Raises TypeError for a model or a guide that cannot be trained, or each in the place of the other."""
    if not callable(model) or isinstance(model, AutoGuide):
        raise TypeError(f"model: expected a torch module or a function, but got {type(model).__name__}")
    if not isinstance(guide, nn.Module) or isinstance(guide, Supervised):
        raise TypeError(
            f"guide: expected a torch module, whose parameters can be trained, but got {type(guide).__name__}; use SVI "
            "for functions"
        )


def _device_of(loss: nn.Module) -> torch.device | None:
    return next((p.device for p in loss.parameters()), None)


def _parameters(loss: nn.Module) -> list[nn.Parameter]:
    parameters = [p for p in loss.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model and guide: expected parameters to train, but they have none that require a gradient")
    return parameters


def adam(groups: list[dict[str, Any]], lr: float) -> torch.optim.Adam:
    """Returns Adam, with one loop over all parameters where their devices have it."""
    devices = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.Adam(groups, lr, fused=devices <= {"cpu", "cuda"})


def _compute_gradients(elbo: SparseVD_ELBO, loss: Any, batch: Any) -> None:
    """Computes the gradients of a batch; raises where a step would make parameters NaN or infinite.

    Batch, loss and gradients are read together, after the backward pass: on an accelerator, the one wait of a step.
    """
    elbo.check_finite = not elbo.terms  # in the first pass, before model or guide make parameters of the batch
    try:
        with unchanged_buffers_on_error(loss.model, with_frozen=False):
            value = loss_of(loss, batch)
            value.backward()
            if finite_value(value + 0 * gradient_norm(loss), batch) is None:
                _raise_not_finite(elbo, loss, batch)
    except ValueError as error:
        raise_nonfinite(error, loss.model, loss.guide, *arguments(batch))
        raise
    finally:
        elbo.check_finite = True


def _raise_not_finite(elbo: SparseVD_ELBO, loss: Any, batch: Any) -> None:
    elbo.check_finite = True
    try:
        with torch.no_grad():
            loss_of(loss, batch)  # raises, and names what is not finite, unless the gradients alone are not
        require_finite_gradients(loss)
        raise ValueError("loss: expected a finite number, but it is not for one of two samples; try it again")
    finally:
        loss.zero_grad()


def gradient_norm(loss: nn.Module) -> Tensor:
    """Returns the norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in loss.parameters() if p.grad is not None])


def require_finite_gradients(loss: nn.Module) -> None:
    """Raises where a step would make parameters NaN or infinite."""
    gradients = {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}
    if not gradient_norm(loss).isfinite():
        wrong = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
        found = ", ".join(wrong) or "all together, by an overflow"
        raise ValueError(
            f"gradient: expected finite numbers, but those of {found} are not; no step was taken. "
            "torch.autograd.detect_anomaly() finds where they come from"
        )


def require_finite_validation(nll: float) -> None:
    """Raises where held-out data have no likelihood, which says nothing and hides in every mean of it."""
    if not math.isfinite(nll):
        raise ValueError(f"validation: expected a finite negative log likelihood of the held-out data, but got {nll}")


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
    nll = float(torch.stack(terms) @ torch.tensor(sizes).to(terms[0]) / sum(sizes))
    require_finite_validation(nll)
    return nll
