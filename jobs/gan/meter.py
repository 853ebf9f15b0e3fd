"""Losses and scores between two log lines, summed on the device and read once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from jobs.gan.state import diverged


class Meter:
    """Means of named values. Reading waits for a GPU; adding does not."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Values are scalars on the device."""
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, step: int) -> dict[str, float]:
        """
        The means since the last reading, and a fresh start.

        Raises:
            TrainingDivergedError: one of them is NaN or infinite.
        """
        if not self._sums:
            return {}
        sums = torch.stack(list(self._sums.values())).tolist()
        means = {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
        self._sums.clear()
        self._counts.clear()
        for name, mean in means.items():
            if not -float("inf") < mean < float("inf"):
                raise diverged(f"{name} is {mean}", step)
        return means
