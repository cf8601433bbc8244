"""The sparse network of a posterior, and its training with zeros that stay zero."""

__all__ = ["fixed_sparsity", "prune"]

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide.guides import AutoGuide
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from .._compat import forget_on_state_dict, forget_place, leave_pyro, site_name, sites_of
from .._modules import copied
from ..infer.masked import check_masks
from ..nn.scales import ScaleSite
from ..nn.sites import SharedSite, SitePrior, without_sites
from ..nn.weights import weights_of
from .summary import SparsitySummary, sparse_normal_parts


@torch.no_grad()
def prune(bnn: PyroModule, guide: AutoGuide, summary: SparsitySummary) -> nn.Module:
    """Returns the network of the posterior means with the dropped weights at zero.

    Its modules are of the classes that they had before :func:`~.bayesianize.bayesianize`, with nothing of Pyro left
    unless the class is itself a ``PyroModule``; its state has the original names. Zeros stored densely save neither
    memory nor time: see :func:`~.shrink.shrink.shrink` and :func:`~.sparse_file.save_sparse`.

    Args:
        bnn: The Bayesian network.
        guide: The guide of a model with this network.
        summary: What :func:`~.summary.sparsify` found in the guide.

    Returns:
        The deterministic network, on the device and of the dtype of the guide, in the mode that ``bnn`` is in.

    Raises:
        TypeError: If ``bnn`` is not a ``PyroModule``, or the guide has no factorised Gaussian part.
        ValueError: If the guide lacks a site of the network, or the summary is of another model.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 3))
        >>> guide = sparsevd.AutoSparseNormal(bnn)
        >>> prune(bnn, guide, sparsevd.sparsify(guide))
        Linear(in_features=4, out_features=3, bias=True)
    """
    if not isinstance(bnn, PyroModule):
        raise TypeError(f"bnn: expected the result of bayesianize, but got {type(bnn).__name__}")
    locs: dict[str, Tensor] = {}
    for part in sparse_normal_parts(guide):
        locs.update({name: part.in_support(name, q.loc) for name, q in part.posteriors.items()})
    check_masks({name: loc.shape for name, loc in locs.items()}, summary.masks)
    weights = {name: nn.Parameter(summary.masked(name, loc).clone()) for name, loc in locs.items()}
    net = copied(bnn)
    for module in net.modules():
        if isinstance(module, PyroModule):
            _set_weights(module, weights)
    for module in net.modules():
        if isinstance(module, PyroModule):
            _restore_class(module)
    return net


@contextmanager
def fixed_sparsity(net: nn.Module) -> Iterator[nn.Module]:
    """Keeps weights that are zero at zero while a sparse network is trained further.

    Their gradients are masked, and they are set to zero after each step of any torch optimiser, which may have momentum
    from before. This holds for all parameters of two or more dimensions, but for those that are not weights by
    :func:`~.selection.choose`, such as class tokens, and are zero as a whole.

    Args:
        net: A deterministic network, such as :func:`prune` returns.

    Yields:
        The network.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> net.weight.data = torch.tensor([[0.0, 1.0]])
        >>> with fixed_sparsity(net):
        ...     optimizer = torch.optim.SGD(net.parameters(), 0.1)
        ...     net(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> net.weight
        Parameter containing:
        tensor([[0.0000, 0.9000]], requires_grad=True)
    """
    weights = weights_of(net)
    sparse = [p for name, p in net.named_parameters() if p.dim() > 1 and (name in weights or p.any())]
    zeros: dict[Tensor, Tensor] = {weight: weight.detach() == 0 for weight in sparse}

    @torch.no_grad()
    def set_zeros(weights: Iterable[Tensor]) -> None:
        for weight in weights:
            if weight in zeros:
                weight.masked_fill_(zeros[weight], 0)  # a product with the mask would keep NaN

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        set_zeros(weight for group in optimizer.param_groups for weight in group["params"])

    trained = [(weight, mask) for weight, mask in zeros.items() if weight.requires_grad]
    hooks = [w.register_hook(partial(torch.masked_fill, mask=mask, value=0)) for w, mask in trained]
    hooks.append(register_optimizer_step_post_hook(after_step))
    try:
        yield net
    finally:
        for hook in hooks:
            hook.remove()
        set_zeros(zeros)


def _set_weights(module: PyroModule, weights: dict[str, nn.Parameter]) -> None:
    for attribute, prior in sites_of(module).items():
        if isinstance(prior, ScaleSite):
            delattr(module, prior.buffer)
            continue
        owner, name = (prior.owner, prior.attribute) if isinstance(prior, SharedSite) else (module, attribute)
        site = site_name(owner, name)
        if site not in weights:
            known = ", ".join(weights) or "none"
            raise ValueError(
                f"{site}: expected this site of the network in the guide, but the guide has {known}; is it the guide "
                "of another network, or was the site hidden from it?"
            )
        module._parameters[attribute] = weights[site]
        if isinstance(prior, SitePrior):
            shape = module.get_buffer(prior.buffer).shape
            if weights[site].shape != shape:
                raise ValueError(
                    f"{site}: expected a posterior of shape {tuple(shape)}, but the guide has "
                    f"{tuple(weights[site].shape)}; is it the guide of another network?"
                )
            delattr(module, prior.buffer)


def _restore_class(module: PyroModule) -> None:
    """Undoes ``to_pyro_module_``; a module whose own class is a PyroModule stays one, without sites."""
    original = next((base for base in type(module).__bases__ if PyroModule[base] is type(module)), None)
    forget_on_state_dict(module, without_sites)
    sites_of(module).clear()
    if original is None:
        forget_place(module)
    else:
        leave_pyro(module, original)
