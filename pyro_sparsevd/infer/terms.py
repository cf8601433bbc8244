"""The terms of a bound, site by site: negative log likelihoods, and the KL of the latents."""

__all__ = ["nll_and_kl_terms"]

from collections.abc import Collection

from ..poutine.trace import Sites, log_prob
from .checks import check_auxiliary, check_latent, check_plates
from .kl import KL, Terms, kl_terms


def nll_and_kl_terms(
    model_sites: Sites, guide_sites: Sites, kl: KL, joint: Collection[str], warned: set[str]
) -> tuple[Terms, Terms]:
    """Returns the negative log likelihoods and the KL of latents, each by site; see :func:`~.kl.kl_terms`."""
    nlls: Terms = []
    latents = []
    for name, site in model_sites.items():
        check_plates(name, site)
        if site["is_observed"]:
            nlls.append((name, -log_prob(site)))
            continue
        if name not in guide_sites:
            raise ValueError(
                f"{name}: expected this latent of the model in the guide, which has no such site; a model whose passes "
                "use different layers of a network must be a Supervised"
            )
        check_latent(name, guide_sites[name], site)
        latents.append((name, guide_sites[name], site))
    kls = kl_terms(latents, kl, joint, warned)
    for name in [name for name in guide_sites if name not in model_sites]:
        check_auxiliary(name, guide_sites[name])
        check_plates(name, guide_sites[name])
        kls.append((name, log_prob(guide_sites[name])))
    return nlls, kls
