"""Losses and scores between two log lines, summed on the device and read once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from jobs.training.state import diverged


class RunningMeans:
    """Means of named values. Reading waits for a GPU; adding does not."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Values are scalars on the device. They are copied: a recorded step writes over its own."""
        names = tuple(values)
        values_V = torch.stack([value.detach() for value in values.values()])
        self._sums[names] = self._sums[names] + values_V if names in self._sums else values_V
        self._counts[names] = self._counts.get(names, 0) + 1

    def take(self) -> "Reading":
        """What was added since the last time, on its way to the CPU; and a fresh start."""
        reading = Reading(self._sums, self._counts)
        self._sums, self._counts = {}, {}
        return reading

    def read(self, step: int) -> dict[str, float]:
        """
        The means since the last reading, and a fresh start.

        Raises:
            TrainingDivergedError: one of them is NaN or infinite.
        """
        return self.take().means(step)


class Reading:
    """Sums that were asked for. A GPU writes them into pinned memory when it comes to it."""

    def __init__(self, sums: dict[tuple[str, ...], Tensor], counts: dict[tuple[str, ...], int]) -> None:
        self._counts = [(name, count) for names, count in counts.items() for name in names]
        self._sums = torch.cat(list(sums.values())) if sums else torch.empty(0)
        self._done: torch.cuda.Event | None = None
        if self._sums.is_cuda:
            there = torch.empty(self._sums.shape, dtype=self._sums.dtype, pin_memory=True)
            self._sums = there.copy_(self._sums, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def means(self, step: int) -> dict[str, float]:
        """
        Wait for them, if they are not there yet.

        Args:
            step: what they belong to.

        Raises:
            TrainingDivergedError: one of them is NaN or infinite.
        """
        if self._done is not None:
            self._done.synchronize()
        totals: dict[str, tuple[float, int]] = {}
        for (name, count), total in zip(self._counts, self._sums.tolist(), strict=True):
            before, times = totals.get(name, (0.0, 0))
            totals[name] = before + total, times + count
        means = {name: total / count for name, (total, count) in totals.items()}
        for name, mean in means.items():
            if not -float("inf") < mean < float("inf"):
                raise diverged(f"{name} is {mean}", step)
        return means
