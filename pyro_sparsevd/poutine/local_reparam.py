r"""The local reparameterisation trick, as an effect handler.

Under :func:`local_reparam`, a factorised Gaussian sample site yields an
:class:`~.unsampled_weight.UnsampledWeight`: a tensor of the right shape, dtype and device that holds a mean and a log
variance, and no numbers. ``F.linear`` and the convolutions that receive one sample their output instead of the weight.
Anything else samples the weight, once, and computes with that sample. The handler is used in the three ways of Pyro's
own::

    guide = local_reparam(guide)                     # a function of a function
    with local_reparam(): ...                        # a context
    trace = poutine.trace(local_reparam(guide)).get_trace(x, y)
    poutine.replay(model, trace=trace)(x, y)         # the model receives the unsampled weight

A linear layer on a matrix is exact: each example, a row, has its own, independent sample of the weight, integrated out.
In a convolution the noise of each output pixel is independent, and in a linear layer on more than two dimensions that
of each position, while one sample of the weight would correlate those of an example: the marginals are right, and the
gradient has less variance. Exclude a site, or use ``SparseVD_ELBO(local_reparam=False)``, where those correlations
matter.

References:
    | Variational Dropout and the Local Reparameterization Trick (Kingma, Salimans, Welling, 2015)
    | https://arxiv.org/abs/1506.02557
"""

__all__ = ["LocalReparamMessenger", "local_reparam"]

from collections.abc import Callable, Collection
from typing import Any

from pyro.poutine.messenger import Messenger
from torch.distributions import Normal

from .._compat import in_function_transform
from ..distributions.sparse_normal import SparseNormal
from ..distributions.util import unwrap_independent
from ..ops.memory import Workspace
from .unsampled_weight import PassNotes, UnsampledWeight


class LocalReparamMessenger(Messenger):
    """The handler behind :func:`local_reparam`; ``notes`` are those of :class:`~.unsampled_weight.UnsampledWeight`."""

    def __init__(
        self, exclude: Collection[str] = (), workspace: Workspace | None = None, notes: PassNotes | None = None
    ) -> None:
        super().__init__()
        self.exclude = exclude
        self.workspace = Workspace() if workspace is None else workspace
        self.notes = notes

    def __enter__(self) -> "LocalReparamMessenger":
        self.workspace.start_step()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        if msg["done"] or msg["value"] is not None or msg["name"] in self.exclude or msg["cond_indep_stack"]:
            return
        base: Any = unwrap_independent(fn)
        is_normal = isinstance(base, SparseNormal) or getattr(type(base), "rsample", None) is Normal.rsample
        if is_normal and fn.event_shape and not fn.batch_shape and not in_function_transform():
            msg["value"] = UnsampledWeight(base, msg["name"], self.workspace, self.notes)


def local_reparam(
    fn: Callable | None = None, *, exclude: Collection[str] = (), workspace: Workspace | None = None
) -> Any:
    """Leaves factorised Gaussian weights unsampled, so that layers sample outputs instead of weights, where they can.

    Args:
        fn: A function with Pyro sample statements, such as a guide; without it, a context manager is returned.
        exclude: Names of sites that are sampled as usual. A weight that a model uses more than once in a pass, such as
            a tied or a recurrent one, must have one sample.
        workspace: Where to take memory from; one that is kept from step to step saves its allocation.

    Returns:
        The wrapped function, or a context manager.

    Raises:
        RepeatedUseError: Later, where a weight that was not excluded is used a second time.

    Example:
        >>> guide = lambda: pyro.sample("w", pyro.distributions.Normal(torch.zeros(3, 4), 1.0).to_event(2))
        >>> w = local_reparam(guide)()
        >>> w
        UnsampledWeight('w', shape=(3, 4))
        >>> torch.nn.functional.linear(torch.randn(8, 4), w).shape
        torch.Size([8, 3])
    """
    messenger = LocalReparamMessenger(exclude, workspace)
    return messenger if fn is None else messenger(fn)
