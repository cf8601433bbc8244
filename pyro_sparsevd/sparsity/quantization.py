"""Quantisation steps in proportion to the posterior's standard deviation."""

__all__ = ["quantization_steps"]

import math
from collections.abc import Callable

import torch
from pyro.infer.autoguide.guides import AutoGuide
from torch import Tensor, nn

from ..distributions.sparse_normal import SparseNormal
from ..storage.rounding import quantized
from .summary import sparse_normal_parts


def quantization_steps(
    guide: AutoGuide, net: nn.Module, nll: Callable[[nn.Module], float], tolerance: float
) -> dict[str, float]:
    r"""Returns the widest steps, in proportion to the posterior's σ, at which held-out data are predicted as well.

    A weight that is known only to ±σ needs no more bits than that. The step of a tensor is

    .. math:: \Delta = c \sqrt{\textstyle\frac 1K \sum_k \sigma_k^2}

    over its :math:`K` weights that are not zero; its rounding error is :math:`\Delta / \sqrt{12}`. The factor
    :math:`c`, common to all, is the largest of 4, 4/2^¼, 4/2^½, …, 4/2^10 for which, and for the next of them,
    ``nll(quantised)`` is at most ``nll(net) + tolerance``: one factor alone may be right by luck. A parameter that
    has no posterior, such as a bias, has twice the smallest step of the weights of its module that have one: it adds
    one error to a unit to which each of its weights adds another. Without such weights, as in normalisation layers, it
    has no step, and is stored as it is.

    References:
        | Bayesian Compression for Deep Learning (Louizos, Ullrich, Welling, 2017)
        | https://arxiv.org/abs/1705.08665

    Args:
        guide: The guide that the network was pruned from.
        net: The network, as :func:`~.pruning.prune` returns it; it may have been fine-tuned since.
        nll: A function of a network that returns the negative log likelihood of held-out data, in nats; it is called
            some fifteen times.
        tolerance: How much larger that may get, in nats.

    Returns:
        A step for each parameter to quantise, for :func:`~.sparse_file.save_sparse`.

    Raises:
        TypeError: If the guide has no factorised Gaussian part.
        ValueError: If ``tolerance`` is not positive and finite, the guide is of another network, a weight or ``nll``
            is not finite, or no factor keeps to the tolerance.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 3))
        >>> guide = sparsevd.AutoSparseNormal(bnn, init_log_variance=-8.0)
        >>> small = sparsevd.prune(bnn, guide, sparsevd.sparsify(guide))
        >>> x, y = torch.randn(100, 4), torch.randint(3, (100,))
        >>> steps = quantization_steps(guide, small, lambda net: nn.functional.cross_entropy(net(x), y).item(), 0.01)
        >>> sorted(steps)
        ['bias', 'weight']
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"tolerance: expected a positive and finite number of nats, but got {tolerance}")
    scales = _scales(guide, net)
    if not math.isfinite(limit := nll(net) + tolerance):
        raise ValueError(f"nll: expected a finite number for the network, but got {limit - tolerance}")
    factors = [4 * 2 ** (-power / 4) for power in range(42)]
    wider: dict[str, float] = {}
    for factor in factors:
        steps = {name: factor * scale for name, scale in scales.items()}
        is_within = nll(quantized(net, steps)) <= limit
        if is_within and wider:
            return wider
        wider = steps if is_within else {}
    raise ValueError(
        f"tolerance: expected steps that raise the negative log likelihood by at most {tolerance}, but even those of "
        f"{factors[-2]:g} σ raise it more; does nll return the same for the same network, or raise the tolerance"
    )


@torch.no_grad()
def _scales(guide: AutoGuide, net: nn.Module) -> dict[str, float]:
    """Returns the scales that the steps of the parameters are proportional to."""
    posteriors = {name: q for part in sparse_normal_parts(guide) for name, q in part.posteriors.items()}
    parameters = {name: p for name, p in net.named_parameters() if p.is_floating_point()}
    sites = _by_parameter(posteriors, parameters)
    scales = {name: _width(name, parameters[name], q) for name, q in sites.items()}
    if not scales:
        known = ", ".join(posteriors) or "none"
        raise ValueError(f"guide: expected the sites of the network, of {', '.join(parameters)}, but it has {known}")
    scales = {name: scale for name, scale in scales.items() if scale > 0}
    for name in parameters.keys() - sites.keys():
        module = name.rpartition(".")[0]
        beside = [scales[other] for other in sites if other in scales and other.rpartition(".")[0] == module]
        if beside:
            scales[name] = max(2 * min(beside), _floor(parameters[name]))
    return {name: scales[name] for name in parameters if name in scales}


def _by_parameter(posteriors: dict[str, SparseNormal], parameters: dict[str, nn.Parameter]) -> dict[str, SparseNormal]:
    """Returns the posteriors by names of parameters, without the prefix of a module around the network."""
    fits = ((site, name) for site, q in posteriors.items() for name, p in parameters.items() if q.loc.shape == p.shape)
    ends = {site[: -len(name)] for site, name in fits if site.endswith(f".{name}")}
    found = [{n: posteriors[p + n] for n in parameters if p + n in posteriors} for p in ("", *sorted(ends))]
    return max(found, key=len)


def _width(name: str, weight: Tensor, posterior: SparseNormal) -> float:
    """Returns the root mean square σ of the weights that are not zero."""
    variance = posterior.log_variance.exp()
    if variance.shape != weight.shape:
        raise ValueError(
            f"{name}: expected a weight of the posterior's shape {tuple(variance.shape)}, but got "
            f"{tuple(weight.shape)}; find the steps before the network is shrunk, they are good for both"
        )
    kept = variance[weight.to(variance.device) != 0]
    return max(float(kept.double().mean().sqrt()), _floor(weight)) if kept.numel() else 0.0


def _floor(weight: Tensor) -> float:
    """Returns the smallest scale at which even the narrowest steps reach each weight within 2^24 steps."""
    return float(weight.abs().max()) / 2**15 if weight.numel() else 0.0
