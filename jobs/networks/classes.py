"""
Class conditioning of the generator and the discriminator.

Shapes in names: B images, C channels, H and W pixels, Z latent dimensions.
"""

from collections.abc import Iterable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from jobs.class_checks import no_classes, require_enough, unknown_class
from jobs.context import Images

CLASS_COLUMNS = 8
MAX_CLASS_ROWS = 32
"""Maximum number of rows of a sample grid; the first classes are shown."""


class ClassLatents(nn.Module):
    """Append a learned embedding of the class to the latents."""

    NUMBERS: ClassVar[int] = 32

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes, self.NUMBERS)

    def forward(self, latents_BZ11: Tensor, labels_B: Tensor | None) -> Tensor:
        """
        Args:
            labels_B: int64. None: cycle through the classes.
        """
        if labels_B is None:
            labels_B = torch.arange(len(latents_BZ11), device=latents_BZ11.device) % self.classes
        return torch.cat([latents_BZ11, self.table(labels_B)[:, :, None, None]], dim=1)


class ClassScores(nn.Module):
    """
    Projection term of D's logit: the inner product of its features and an embedding of the class.

    Source: Miyato and Koyama 2018, arXiv:1802.05637, equation 4; with the mean over positions
    instead of the sum, a factor that the embedding can learn.
    """

    def __init__(self, classes: int, channels: int, *, spectral: bool = False) -> None:
        super().__init__()
        table = nn.Embedding(classes, channels)
        with torch.no_grad():
            table.weight.mul_(channels**-0.5)
        self.table = spectral_norm(table) if spectral else table

    def forward(self, features_BCHW: Tensor, labels_B: Tensor | None) -> Tensor:
        """
        Args:
            labels_B: int64. None: the classes are unknown, and the term is zero.
        """
        if labels_B is None:
            return features_BCHW.new_zeros(len(features_BCHW))
        vectors_BC = cast(Tensor, self.table(labels_B))
        return (features_BCHW.mean(dim=(2, 3)) * vectors_BC).sum(dim=1)


def require_classes(images: Images) -> tuple[str, ...]:
    """
    Return the classes of a data set for a conditional run.

    Raises:
        DatasetError: it has no classes, or one has too few images.
    """
    if images.labels_N is None or len(images.classes) < 2:
        raise no_classes()
    counts = [int((images.labels_N == place).sum()) for place in range(len(images.classes))]
    require_enough(dict(zip(images.classes, counts, strict=True)))
    return images.classes


def label_of(class_name: str | None, classes: tuple[str, ...]) -> int | None:
    """
    Return the label of a class; None if no class is requested.

    Raises:
        SpecError: the model has no such class.
    """
    if class_name is None:
        return None
    if class_name in classes:
        return classes.index(class_name)
    raise unknown_class(class_name, classes)


def labels_of(numbers: Iterable[int], classes: int, label: int | None) -> Tensor:
    """
    Return the label of each image: the requested class, else its sample index modulo the number of classes.

    Returns:
        int64 (len(numbers),).
    """
    return torch.tensor([number % classes if label is None else label for number in numbers])


def grid_labels(classes: int) -> Tensor:
    """Return the label of each image of a sample grid: one class per row, repeated if there are few."""
    rows = max(8, min(classes, MAX_CLASS_ROWS))
    return (torch.arange(rows) % classes).repeat_interleave(CLASS_COLUMNS)
