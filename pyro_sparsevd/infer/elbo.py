"""The evidence lower bound with closed-form divergences and local reparameterisation."""

__all__ = ["SparseVD_ELBO"]

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypeAlias, get_args

import torch
from pyro.infer.elbo import ELBO
from pyro.poutine.messenger import unwrap
from torch import Tensor

from .._compat import not_compiled, validation_deferred
from .._modules import random_state
from ..distributions.validation import raise_invalid
from ..ops.memory import Workspace
from ..poutine.local_reparam import LocalReparamMessenger
from ..poutine.trace import Sites, SiteTrace, log_prob, value_for_density, without_subsampling
from ..poutine.unsampled_weight import PassNotes, PassSpoiled, RepeatedUseError, UnsampledWeight
from .buffers import unchanged_buffers_on_error
from .checks import (
    check_auxiliary,
    check_latent,
    check_plates,
    finite_value,
    is_waited_for,
    raise_device_error,
    raise_nonfinite,
)
from .dependence import is_factorised, sampled_before_parents
from .gaussians import with_auxiliary_sites_exchanged
from .kl import KL, Terms, kl_terms
from .loss_module import LossModule, seen_by_svi, warn_of_untrained
from .site_names import SiteNames

_Evaluation: TypeAlias = tuple[Tensor, Tensor, Tensor, float | None]  # loss, nll, KL; the loss's value if it is checked


class SparseVD_ELBO(ELBO):  # noqa: N801 # Pyro's naming
    r"""The loss of Sparse Variational Dropout: the negative evidence lower bound of any reparameterised guide.

    .. math:: \mathcal L = -\frac NM \sum_{m=1}^M \mathbb E_q \log p(y_m \mid x_m, w) + c \; \mathrm{KL}(q \| p)

    All terms are in nats over the whole data set: the factor N/M is the scale of the plate of the data. Weights of
    factorised Gaussian posterior are replaced by samples of the outputs that they produce, see
    :func:`~.local_reparam.local_reparam`; a weight that turns out to be used more than once in a pass is sampled, from
    then on. Each latent's divergence is taken in closed form where one is known, with the approximate or the exact form
    for log-uniform priors; else from one sample with the densities at hand, which a debug-level log says, and a warning
    where the prior is improper. So it is for a latent whose prior may depend on one that the guide samples later. A
    latent with a closed form has no densities computed.

    Use it with ``pyro.infer.SVI``, or faster, as a torch module with one optimiser for all parameters. Latents that are
    no attributes of the model have theirs only after a call::

        loss = SparseVD_ELBO()(model, guide)
        loss(x, y)
        optimizer = torch.optim.Adam(loss.parameters())
        loss(x, y).backward()

    ``torch.compile`` of such a module, or of what contains it, leaves the loss as it is.

    References:
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
        | https://arxiv.org/abs/1701.05369

    Args:
        kl: The divergence: ``"approximate"`` (the paper's equation 14), ``"exact"``, or ``"monte_carlo"`` for one
            sample of every latent, which is infinite where that leaves the bounds of its prior; an improper
            log-uniform prior then counts with the constant of the other two, and the gradient of log \|w\|, of no
            finite variance, hardly makes anything sparse.
        kl_weight: c, the weight of the divergence of every latent; an attribute that may be set at every step.
        local_reparam: Whether to sample outputs instead of weights; not where the model differentiates its network
            with ``create_graph=True``, since sampled outputs have no second derivative.
        num_particles: The number of samples that are averaged.
        check_finite: Whether to raise where the loss or what is given is not finite, or not valid for a distribution
            that validates, before a gradient is computed: one read of the loss, and the one wait of a step on an
            accelerator. Without it, the loss is NaN where a value or a parameter is not valid, and a step can be
            captured as a CUDA graph, with the ``kl_weight`` of that step. A gradient that is not finite where the loss
            is, as of ``sqrt`` at 0 or where log σ² leaves -87 to 87 in single precision, is not looked for: the next
            step names the parameter.
        exclude: Names or globs of sites whose weights are sampled in spite of ``local_reparam``: where rows that a
            layer gives are mixed later on, as in a graph, see :func:`~.local_gap.local_reparam_gap`.

    Raises:
        ValueError: If an option is out of range. When evaluated: if a latent is discrete, enumerated, not
            reparameterised or missing from the guide; if the loss is not finite, naming the argument, parameter or
            site; or if an argument is on another device.

    Example:
        >>> bnn = sparsevd.bayesianize(nn.Linear(4, 3))
        >>> model = sparsevd.Supervised(bnn, lambda x: dist.Categorical(logits=x), num_data=100)
        >>> guide, elbo = sparsevd.AutoSparseNormal(model), SparseVD_ELBO(kl="exact", kl_weight=0.5)
        >>> loss = elbo(model, guide)(torch.randn(10, 4), torch.zeros(10))
        >>> bool(loss == elbo.terms["nll"] + 0.5 * elbo.terms["kl"])
        True
    """

    def __init__(
        self,
        kl: KL = "approximate",
        kl_weight: float = 1.0,
        local_reparam: bool = True,
        num_particles: int = 1,
        check_finite: bool = True,
        exclude: str | Iterable[str] = (),
    ) -> None:
        if kl not in get_args(KL):
            raise ValueError(f"kl: expected one of {', '.join(map(repr, get_args(KL)))}, but got {kl!r}")
        if not (isinstance(num_particles, int) and num_particles > 0):
            raise ValueError(f"num_particles: expected a positive integer, but got {num_particles!r}")
        super().__init__(num_particles=num_particles)
        self.kl = kl
        self.kl_weight = kl_weight
        self.local_reparam = local_reparam
        self.check_finite = check_finite
        self.terms: dict[str, Tensor] = {}
        self._sampled_sites = SiteNames(globs=exclude)
        self._newly_sampled = PassNotes()
        self._warned_sites: set[str] = set()
        self._is_checked = False
        self._workspace = Workspace()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_workspace"}  # a copy has its own memory

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _workspace=Workspace())

    def __call__(self, model: Any, guide: Any) -> LossModule:
        """Returns the loss as a torch module of the parameters of model and guide, which is called as the model is."""
        return LossModule(model, guide, self)

    @property
    def kl_weight(self) -> float:
        """The weight of the divergence."""
        return self._kl_weight

    @kl_weight.setter
    def kl_weight(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"kl_weight: expected a finite number, at least 0, but got {value}")
        self._kl_weight = value

    @not_compiled  # the compiler cannot trace weights that are not sampled
    def differentiable_loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """Returns the loss, a scalar in nats over the data set, whose gradients are unbiased estimates.

        Args:
            model: The model.
            guide: The guide.
            *args: Given to both.
            **kwargs: Given to both.

        Returns:
            The loss. Its terms, detached, are in ``terms``.
        """
        return self._loss_and_value(model, guide, args, kwargs)[0]

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns the loss as a number, see :meth:`differentiable_loss`."""
        with torch.no_grad():
            loss, value = self._loss_and_value(model, guide, args, kwargs)
        return loss.item() if value is None else value

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Returns the loss as a number, and adds its gradients to the parameters'; what ``SVI.step`` calls."""
        loss, value = self._loss_and_value(model, guide, args, kwargs)
        seen = None if self._is_checked else seen_by_svi()
        if seen is not None:
            self._is_checked = True
            remedy = "give what has them to pyro.module, or make it a PyroModule"
            warn_of_untrained(loss, seen, f"SVI does not see them; {remedy}")
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item() if value is None else value

    @not_compiled
    def _loss_and_value(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Tensor, float | None]:
        """Returns the loss, and its value if that was checked."""
        try:
            # In the first pass, because a guide or model may make parameters of what it is given.
            if self.check_finite and not self.terms and finite_value(None, *args, *kwargs.values()) is None:
                raise ValueError("arguments: expected finite numbers")
            loss, nll, kl, value = self._evaluate(model, guide, args, kwargs)
        # torch.utils.checkpoint ends a recomputation by an exception of another type.
        except (RuntimeError, ValueError) as error:
            raise_device_error(error, model, guide, args, kwargs)
            if self.check_finite:
                raise_nonfinite(error, model, guide, args, kwargs)
            raise
        self.terms = {"nll": nll.detach(), "kl": kl.detach()}
        return loss, value

    def _evaluate(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> _Evaluation:
        """Evaluates the loss, and starts again where a weight is used otherwise than once to make outputs to sample.

        All such weights of a pass are found at once. From then on they are sampled at their sites, so that random
        numbers are the same for a layer that is computed again in the backward pass, and for a run that is resumed.
        """
        while True:
            self._newly_sampled = PassNotes()
            # Later passes save neither generators nor frozen parameters: both cost time, and no CUDA graph can hold the
            # former. One that starts again goes on with other random numbers.
            restore_random_state = None if self.terms else random_state(unwrap(model))
            try:
                deferred = validation_deferred() if is_waited_for(guide, args, kwargs) else nullcontext()
                with unchanged_buffers_on_error(model, with_frozen=not self.terms), deferred:
                    return self._evaluate_once(model, guide, args, kwargs)
            except Exception:  # of any type, since the pass ran with weights that cannot be used like this
                if not self._newly_sampled:
                    raise
                self._sampled_sites |= self._newly_sampled
                if restore_random_state is not None:
                    restore_random_state()

    def _evaluate_once(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> _Evaluation:
        factorised = is_factorised(guide)
        traces = list(self._get_traces(model, guide, args, kwargs))
        particles = [self._terms(of_model, of_guide, factorised) for of_model, of_guide in traces]
        self._newly_sampled.is_running = False
        nll, kl = (_mean([_sum(terms) for terms in of_kind]) for of_kind in zip(*particles, strict=True))
        loss = nll + self.kl_weight * kl
        value = finite_value(loss, *args, *kwargs.values()) if self.check_finite else None
        if self.check_finite and value is None:
            for name, site in (item for trace in traces for sites in reversed(trace) for item in sites.items()):
                raise_invalid(name, site["fn"], value_for_density(site))
            raise ValueError(
                f"loss: expected a finite number, but got nll {nll.item()} and kl {kl.item()}"
                + _sites_not_finite(particles)
            )
        return loss, nll, kl, value

    def _get_trace(self, model: Callable, guide: Callable, args: Any, kwargs: Any) -> tuple[Sites, Sites]:
        self._workspace.start_step()
        reparam = None
        if self.local_reparam:
            reparam = LocalReparamMessenger(self._sampled_sites, self._workspace, self._newly_sampled)
        with SiteTrace(local_reparam=reparam) as guide_sites:
            guide(*args, **kwargs)
        if not self.terms:
            self._sampled_sites.check(guide_sites.found)
        with SiteTrace(guide_sites.found) as model_sites:
            model(*args, **kwargs)
        if self._newly_sampled:
            raise PassSpoiled
        return without_subsampling(model_sites.found), without_subsampling(guide_sites.found)

    def _terms(self, model_sites: Sites, guide_sites: Sites, factorised: bool) -> tuple[Terms, Terms]:
        """Returns the negative log likelihoods and the KL of one particle, by site."""
        guide_sites = with_auxiliary_sites_exchanged(guide_sites)
        joint = [] if factorised else sampled_before_parents(model_sites, guide_sites)
        unsampled = {name for name in joint if isinstance(guide_sites[name]["value"], UnsampledWeight)}
        if unsampled:  # their outputs were sampled, so they have no value of which to take the density
            if not self.local_reparam or unsampled & self._sampled_sites:  # by a local_reparam of the user's
                raise RepeatedUseError(min(unsampled))
            self._newly_sampled |= unsampled
            raise PassSpoiled
        nlls: Terms = []
        latents = []
        for name, site in model_sites.items():
            check_plates(name, site)
            if site["is_observed"]:
                nlls.append((name, -log_prob(site)))
                continue
            if name not in guide_sites:
                raise ValueError(
                    f"{name}: expected this latent of the model in the guide, which has no such site; a model whose "
                    "passes use different layers of a network must be a Supervised"
                )
            check_latent(name, guide_sites[name], site)
            latents.append((name, guide_sites[name], site))
        kls = kl_terms(latents, self.kl, joint, self._warned_sites)
        for name in [name for name in guide_sites if name not in model_sites]:
            check_auxiliary(name, guide_sites[name])
            check_plates(name, guide_sites[name])
            kls.append((name, log_prob(guide_sites[name])))
        return nlls, kls


def _sum(terms: Terms) -> Tensor:
    values = [value for _, value in terms]
    return sum(values[1:], start=values[0]) if values else torch.zeros(())


def _mean(of_particles: list[Tensor]) -> Tensor:
    return of_particles[0] if len(of_particles) == 1 else torch.stack(of_particles).mean()


def _sites_not_finite(particles: list[tuple[Terms, Terms]]) -> str:
    """Returns the end of a message that says which sites spoil a loss, if single ones do."""
    terms = [term for of_particle in particles for of_kind in of_particle for term in of_kind]
    names = dict.fromkeys(name for name, value in terms if not math.isfinite(value.detach()))
    return f"; not finite are the terms of {', '.join(names)}" if names else ""
