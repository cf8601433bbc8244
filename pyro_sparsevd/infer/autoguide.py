"""The factorised Gaussian guide.

Its parameters are in :mod:`~.parameters`; :mod:`~.latents` says what is sampled at a site.
"""

__all__ = ["AutoSparseNormal"]

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import helpful_support_errors
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.messenger import unwrap
from torch import Tensor, nn

from .._compat import call_context
from .._modules import same_random_numbers
from ..distributions.sparse_normal import SparseNormal
from ..poutine.param_store import ensure_unique_name, params_are_traced, register_params
from ..poutine.trace import SiteTrace, active_trace
from .buffers import unchanged_buffers
from .initialization import Start, init_to_weights, initial_value
from .latents import Latent, attribute_sites, is_target, keep_latents, latent_of
from .masked import SparsifiedGuide
from .parameters import GaussianParameters, Parameterization

_NO_SIZE = -1  # how Pyro notes a plate without a size


class AutoSparseNormal(GaussianParameters):
    r"""A guide with an independent Gaussian, in θ and log σ², for each element of each latent.

    A latent of real support is sampled from :class:`~.sparse_normal.SparseNormal` at its own site, where the
    divergence from the log-uniform prior is found; one of constrained support from the Gaussian transformed onto it.

    .. math:: q(w) = \prod_i \mathcal N(w_i \mid \theta_i, \sigma_i^2)

    The parameters ``locs`` and ``log_variances`` exist at once for the sites that are attributes of the model, as
    those of :func:`~.bayesianize.bayesianize`, and for others after the first call: give a torch optimiser
    ``parameters()`` after that. ``load_state_dict`` makes them from the state, without data;
    ``pyro.get_param_store().load`` before the first call, or before a step of SVI, works as for Pyro's guides. They
    are never shared with another guide through Pyro's parameter store: a second guide is numbered there. Weight decay
    must not touch ``log_variances``.

    References:
        | Variational Dropout Sparsifies Deep Neural Networks (Molchanov, Ashukha, Vetrov, 2017)
        | https://arxiv.org/abs/1701.05369

    Args:
        model: A Pyro model.
        init_loc_fn: The initial value of each latent, as for Pyro's own guides.
        init_log_variance: The initial log σ² of sites with a sparse prior, where small is part of the method. About
            -8 suits a trained network.
        init_scale: The initial σ of all other sites, in unconstrained space, as for ``AutoNormal``.
        create_plates: As for ``AutoNormal``: returns the plates to use, given the arguments of the model.
        parameterization: ``"additive"``, w = θ + σε, or, to compare, ``"multiplicative"``, w = θ(1 + √α ε), whose
            parameters are ``locs`` and ``log_alphas`` and whose gradient in θ is noisier.

    Raises:
        ValueError: If ``parameterization`` is neither of the two, an initial log σ² not between -80 and 80, or an
            initial value of another shape than its site, or, when first called, if the model has a discrete latent.

    Example:
        >>> model = lambda: pyro.sample("w", sparsevd.LogUniform().expand([3]).to_event(1))
        >>> guide = AutoSparseNormal(model)
        >>> guide()["w"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        model: Callable,
        *,
        init_loc_fn: Callable = init_to_weights,
        init_log_variance: float = -10.0,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
        parameterization: Parameterization = "additive",
    ) -> None:
        super().__init__(model, init_log_variance, init_scale, create_plates, parameterization)
        self.init_loc_fn = init_loc_fn
        self._given: set[str] = set()
        self._other_frames: dict[str, Any] = {}
        module = unwrap(model)
        others = module.parameters() if isinstance(module, nn.Module) else ()
        self.num_model_parameters = sum(p.numel() for p in others)
        for name, prior in attribute_sites(model):  # each in a trace of its own, as a handler may tell names apart
            with BlockMessenger(), SiteTrace() as early, InitMessenger(self._initial_value):
                pyro.sample(name, prior)
            self._add_sites(early.found)

    @property
    def model(self) -> Callable:
        """The model; a guide that was pickled has none."""
        if self._model is None:
            raise RuntimeError("This guide was unpickled without its model; call a guide once before it is pickled.")
        return Start(self._initial_value, self._given)(self._model[0])

    @property
    def posteriors(self) -> dict[str, SparseNormal]:
        """The Gaussian of each site, in unconstrained space, over the full size of every plate."""
        return {name: self._posterior(name) for name in self._site_names()}

    @property
    def site_log_alphas(self) -> dict[str, Tensor]:
        """The log α of each element of each site, or of its group where the prior has groups."""
        posteriors = self.posteriors
        return {name: site.log_alpha(posteriors[name]) for name, site in self._sites.items()}

    @property
    def num_parameters(self) -> int:
        """The number of elements of all latents and, if the model is a module, of all its parameters."""
        return sum(q.loc.numel() for q in self.posteriors.values()) + self.num_model_parameters

    @property
    def sparse_sites(self) -> tuple[str, ...]:
        """The names of the sites whose prior makes them sparse, such as the log-uniform one."""
        return tuple(name for name, site in self._known_sites().items() if site.is_sparse)

    @property
    def real_sites(self) -> tuple[str, ...]:
        """The names of the sites of real numbers, any of which may be dropped."""
        return tuple(name for name, site in self._known_sites().items() if site.is_real)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Samples all latents; returns their values by the names of their sites. The arguments are the model's."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        recorder = active_trace()
        if recorder is not None and not (self._has_plates() or self.create_plates):
            return {n: recorder.sample(n, s.posterior(*self._raw_parameters_of(n))) for n, s in self._sites.items()}
        plates = self._create_plates(*args, **kwargs)
        unobserved = not params_are_traced()
        result = {}
        for name, site in self._sites.items():
            with ExitStack() as stack:
                sized = [plate for plate in site.plates if plates[plate].size != _NO_SIZE]
                for plate in sized:
                    stack.enter_context(plates[plate])
                # pyro.param is the most expensive part of the guide; skip it where no handler records parameters.
                read = self._raw_parameters_of if unobserved and not site.plates else self._parameters_of
                loc, log_variance = read(name)
                # Entered after pyro.param, which fails in a plate without a size.
                for plate in set(site.plates).difference(sized):
                    stack.enter_context(plates[plate])
                result[name] = pyro.sample(name, site.posterior(loc, log_variance))
        return result

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns the posterior median of each latent by the name of its site.

        The arguments are the model's; once the parameters exist, they are not needed.
        """
        self._require_sites(*args, **kwargs)
        return {name: self.in_support(name, self._parameters_of(name)[0]).clone() for name in self._sites}

    @torch.no_grad()
    def quantiles(self, quantiles: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns posterior quantiles of each latent, those of its unconstrained space transformed.

        Args:
            quantiles: Probabilities between 0 and 1.
            *args: As for the model; not needed once the parameters exist.
            **kwargs: As for the model; not needed once the parameters exist.

        Returns:
            The quantiles of each latent, along a new first dimension, by the name of its site.
        """
        self._require_sites(*args, **kwargs)
        result = {}
        for name, posterior in self.posteriors.items():
            probabilities = torch.as_tensor(quantiles, dtype=posterior.loc.dtype, device=posterior.loc.device)
            probabilities = probabilities.reshape(-1, *(1 for _ in posterior.batch_shape))
            result[name] = self.in_support(name, posterior.icdf(probabilities))
        return result

    def sparsified(self, summary: Any) -> "SparsifiedGuide":
        """Returns the posterior with the dropped weights at zero.

        Args:
            summary: A :class:`~.summary.SparsitySummary` of this guide.

        Returns:
            A guide that samples with the masks of the summary held, for ``Predictive`` and the like, and for more
            training, with an optimiser of its own.

        Raises:
            ValueError: If the summary is of another model.
        """
        return SparsifiedGuide(self, summary.masks)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Samples all latents, see :meth:`forward`."""
        if not self._uses_store():
            return super().__call__(*args, **kwargs)
        ensure_unique_name(self, self._stored())
        if self.prototype_trace is None:
            with call_context(self):
                for name in self._sites:  # by pyro.param, which takes the values that the store was loaded with
                    self._parameters_of(name)
        try:
            return super().__call__(*args, **kwargs)
        finally:  # also after an error, since the store holds this guide's parameters by then
            register_params(self, self._stored())

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        early = dict(self._sites)
        try:
            with unchanged_buffers(self._model and self._model[0]), same_random_numbers(self._model and self._model[0]):
                super()._setup_prototype(*args, **kwargs)
                self._set_up_sites()
        except BaseException:
            self._sites, self.prototype_trace = early, None  # so that the next call finds the error again
            raise
        for name in early.keys() - self._sites.keys():
            self._remove_site(name)
        plates = {plate for site in self._sites.values() for plate in site.plates}
        frames = {name: frame for name, frame in self._prototype_frames.items() if name in plates}
        self._other_frames = {name: f for name, f in frames.items() if name in self._given or f.size == _NO_SIZE}
        self._prototype_frames: dict[str, Any] = {n: f for n, f in frames.items() if n not in self._other_frames}
        keep_latents(self.prototype_trace)

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        plates = super()._create_plates(*args, **kwargs)
        # In an AutoGuideList, plates are the list's: of its create_plates, or with a subsample that the list chooses.
        is_made = self.master is None or self.master().create_plates is not None
        for name, frame in self._other_frames.items():
            if frame.size == _NO_SIZE:
                plates.setdefault(name, pyro.plate(name, dim=frame.dim))
            elif not (is_made and name in plates):
                raise ValueError(
                    f"{name}: the model gives the subsample of this plate, and the guide, which has latents in it, runs"
                    " before the model; give the guide create_plates, a function of the model's arguments that returns "
                    f"pyro.plate({name!r}, {frame.full_size}, dim={frame.dim}, subsample=...)"
                )
        return plates

    def _set_up_sites(self) -> None:
        trace: Any = self.prototype_trace
        found = {name: site for name, site in trace.iter_stochastic_nodes() if not is_target(site)}
        if self._loaded:
            found = {name: site for name, site in found.items() if name in self._loaded or name in self._sites}
        unknown = self._loaded - found.keys()
        if unknown:
            raise ValueError(f"guide: its state was loaded with sites that the model does not have: {sorted(unknown)}")
        self._sites = {}
        self._add_sites(found)

    def _initial_value(self, site: Any) -> Any:
        # After a state was loaded, a site without parameters there is a target, which a prediction leaves unobserved.
        is_unknown = self._loaded and site["name"] not in self._loaded and site["name"] not in self._sites
        if is_unknown or is_target(site):
            return site["fn"]()
        return initial_value(site, self.init_loc_fn(site))

    @torch.no_grad()
    def _add_sites(self, found: Mapping[str, Any]) -> None:
        """Makes the parameters of the sites of a trace."""
        for name, site in found.items():
            with helpful_support_errors(site):
                latent, loc = latent_of(name, site["fn"], site["value"], site["cond_indep_stack"])
            self._sites[name] = latent
            log_variance = self.init_log_variance if latent.is_sparse else 2 * math.log(self.init_scale)
            self._write(name, loc, latent.event_dim, log_variance)

    def _posterior(self, name: str) -> SparseNormal:
        loc, log_variance = self._parameters_of(name)
        site = self._sites.get(name)
        return site.gaussian(loc, log_variance) if site else SparseNormal(loc, log_variance, validate_args=False)

    def _known_sites(self) -> dict[str, Latent]:
        if not self._sites:
            raise RuntimeError("The priors of this guide's model are not known yet; call the guide once.")
        return self._sites

    def _require_sites(self, *args: Any, **kwargs: Any) -> None:
        if self.prototype_trace is None and (args or kwargs or not self._sites):
            self._setup_prototype(*args, **kwargs)

    def _uses_store(self) -> bool:
        return self.prototype_trace is None or params_are_traced() or self._has_plates()

    def _has_plates(self) -> bool:
        return any(site.plates for site in self._sites.values())
