"""Labelled data in memory."""

__all__ = ["Split", "hold_out"]

import torch
from torch import Tensor
from torch.utils.data import TensorDataset


class Split(TensorDataset):
    """Images with their labels, or features with their targets: one part, such as the training set, of a data set.

    Args:
        images: float32 in [0, 1], of shape ``(N, channels, height, width)``; or features of any shape ``(N, ...)``.
        labels: int64, of shape ``(N,)``; or targets.

    Raises:
        ValueError: If there are not as many labels as images.

    Example:
        >>> len(Split(torch.zeros(3, 1, 28, 28), torch.tensor([7, 2, 1])))
        3
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(labels) != (count := len(images)):
            raise ValueError(f"Split: expected a label for each of {count} images, but got {len(labels)} labels")
        super().__init__(images, labels)

    @property
    def images(self) -> Tensor:
        """The images."""
        return self.tensors[0]

    @property
    def labels(self) -> Tensor:
        """The labels."""
        return self.tensors[1]

    def chunks(self, size: int = 1_000) -> list[tuple[Tensor, Tensor]]:
        """Returns the data in order, as pairs of at most ``size`` images and their labels."""
        return list(zip(self.images.split(size), self.labels.split(size), strict=True))


def hold_out(split: Split, count: int, seed: int = 0) -> tuple[Split, Split]:
    """Returns the rest of the data and ``count`` random ones, to validate on; both are shuffled copies.

    Args:
        split: The data.
        count: How many to hold out.
        seed: The seed of the choice. Torch's global generator is left alone.

    Raises:
        ValueError: If ``count`` is not an integer from 1 to ``len(split) - 1``.

    Example:
        >>> [len(part) for part in hold_out(Split(torch.rand(10, 1, 28, 28), torch.arange(10)), count=3)]
        [7, 3]
    """
    if not (isinstance(count, int) and 0 < count < len(split)):
        raise ValueError(f"hold_out: expected count, an integer from 1 to {len(split) - 1}, but got {count!r}")
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    rest, held_out = (Split(split.images[i], split.labels[i]) for i in (order[count:], order[:count]))
    return rest, held_out
