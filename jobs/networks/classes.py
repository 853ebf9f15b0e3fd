"""
What makes a pair class-conditional: G is told which class to draw, D which class it is shown.

Shapes in names: B pictures, C channels, H and W pixels, Z latent numbers.
"""

from collections.abc import Iterable
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from jobs.class_checks import no_classes, require_enough, unknown_class
from jobs.context import Images

CLASS_COLUMNS = 8
MOST_ROWS = 32
"""Rows of a sample grid at most; of more classes the first are shown."""


class ClassLatents(nn.Module):
    """Joins the latents of a picture with numbers that stand for its class, learned like a weight."""

    NUMBERS: ClassVar[int] = 32

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.table = nn.Embedding(classes, self.NUMBERS)

    def forward(self, latents_BZ11: Tensor, labels_B: Tensor | None) -> Tensor:
        """
        Args:
            labels_B: int64. None: the classes in turn.
        """
        if labels_B is None:
            labels_B = torch.arange(len(latents_BZ11), device=latents_BZ11.device) % self.classes
        return torch.cat([latents_BZ11, self.table(labels_B)[:, :, None, None]], dim=1)


class ClassScores(nn.Module):
    """
    What is added to D's logit: the inner product of its features and a vector of the class.

    Source: Miyato and Koyama 2018, arXiv:1802.05637, equation 4; the mean over places
    instead of their sum, a factor that the vector can learn.
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
            labels_B: int64. None: nothing is known of the classes, and nothing is added.
        """
        if labels_B is None:
            return features_BCHW.new_zeros(len(features_BCHW))
        vectors_BC = cast(Tensor, self.table(labels_B))
        return (features_BCHW.mean(dim=(2, 3)) * vectors_BC).sum(dim=1)


def require_classes(images: Images) -> tuple[str, ...]:
    """
    The classes of a data set that a conditional run learns.

    Raises:
        DatasetError: there are none, or one has too few pictures.
    """
    if images.labels_N is None or len(images.classes) < 2:
        raise no_classes()
    counts = [int((images.labels_N == place).sum()) for place in range(len(images.classes))]
    require_enough(dict(zip(images.classes, counts, strict=True)))
    return images.classes


def label_of(class_name: str | None, classes: tuple[str, ...]) -> int | None:
    """
    The number of a class by its name; None if no class is asked for.

    Raises:
        SpecError: the model knows no such class.
    """
    if class_name is None:
        return None
    if class_name in classes:
        return classes.index(class_name)
    raise unknown_class(class_name, classes)


def labels_of(numbers: Iterable[int], classes: int, label: int | None) -> Tensor:
    """
    The class of each picture: the one that is asked for, else its number modulo how many there are.

    Returns:
        int64 (len(numbers),).
    """
    return torch.tensor([number % classes if label is None else label for number in numbers])


def grid_labels(classes: int) -> Tensor:
    """The class of each picture on a sample grid: one a row, again from the first when there are few."""
    rows = max(8, min(classes, MOST_ROWS))
    return (torch.arange(rows) % classes).repeat_interleave(CLASS_COLUMNS)
