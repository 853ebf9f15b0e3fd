"""Log a training run: lines of metrics.jsonl and log.txt, and progress; running means of its losses."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jobs.context import JobContext
from jobs.specs import TrainSpec
from jobs.training.stability import diverged_loss
from jobs.training.state import diverged

LOG_EVERY = 25
"""Batches between two lines of metrics, and between two checks for NaN."""
METRICS = ("loss_d", "loss_g", "d_real", "d_fake")
LOGGED_LOSSES = ("loss_d", "loss_g")


class TrainingLogger:
    """
    Logs one run.

    Args:
        per_epoch: batches in an epoch.
        delay: lines whose values may still be on their way from the device; 1 on a GPU.
    """

    def __init__(self, spec: TrainSpec, ctx: JobContext, per_epoch: int, *, delay: int = 0) -> None:
        self.delay = delay
        self.spec = spec
        self.ctx = ctx
        self.per_epoch = per_epoch
        self.end_step = spec.epochs * per_epoch
        """Where the run ends, for the progress."""
        self.means = RunningMeans()
        self.last: dict[str, float] = {}
        self.warning: str | None = None
        """A problem that is shown instead of the progress until it is solved."""
        self.diverged: str | None = None
        """Where a loss was first far too large in this attempt."""
        self._rate: float | None = None
        self.start_at(0)

    def start_at(self, step: int) -> None:
        """Start at a step, at the start of the run or after a rollback."""
        self.means = RunningMeans()
        self._pending: list[tuple[int, float, PendingMeans]] = []
        self._step, self._at = step, time.monotonic()

    def reset_clock(self) -> None:
        """Exclude the time until now, which was not training, from the next rate."""
        self._at = time.monotonic()

    def exclude(self, seconds: float) -> None:
        """Exclude seconds that were not training from the next rate."""
        self._at += seconds

    def step(self, step: int) -> None:
        """
        Report the progress after a batch; log a line every LOG_EVERY batches and at the end of an epoch.

        Raises:
            TrainingDivergedError: a loss is not finite.
        """
        if step % self.per_epoch % LOG_EVERY == 0:
            self.flush(step, delay=self.delay)
        self.report(step)

    def report(self, step: int) -> None:
        """Report how many images were seen, of all that the run will see."""
        self.ctx.report(
            step * self.spec.batch,
            self.end_step * self.spec.batch,
            "images",
            rate=self._rate,
            epoch=step // self.per_epoch,
            epochs=self.spec.epochs,
            phase=self.warning,
        )

    def flush(self, step: int, *, delay: int = 0) -> None:
        """
        Log the means since the last line.

        Args:
            delay: lines that may be written with a later one, when a GPU has computed their values
                without a wait.

        Raises:
            TrainingDivergedError: a loss is not finite.
        """
        if step != self._step:
            now = time.monotonic()
            self._rate = (step - self._step) * self.spec.batch / max(now - self._at, 1e-9)
            self._step, self._at = step, now
            self._pending.append((step, self._rate, self.means.take()))
        while len(self._pending) > delay:
            self._write(*self._pending.pop(0))

    def _write(self, step: int, rate: float, pending: "PendingMeans") -> None:
        means = pending.means(step)
        self.last |= means
        if self.diverged is None and (what := diverged_loss(means)) is not None:
            self.diverged = f"{what} at step {step}"
            self.ctx.log(f"the training has diverged: {self.diverged}")
            self.ctx.event("diverged", step=step, reason=what)
        epoch, batch_index = divmod(step, self.per_epoch)
        if batch_index == 0:
            losses = "  ".join(f"{name} {self.last[name]:.4f}" for name in LOGGED_LOSSES if name in self.last)
            self.ctx.log(f"epoch {epoch}/{self.spec.epochs}  {losses}  {rate:.0f} images/s")
        line: dict[str, Any] = {"step": step, "epoch": epoch, "images": step * self.spec.batch}
        line |= {name: means.get(name) for name in METRICS} | means
        line["images_per_s"] = round(rate, 2)
        if used := torch.cuda.max_memory_allocated():  # 0 on a CPU
            line["gpu_memory_bytes"] = used
        self.ctx.metrics(line)


class RunningMeans:
    """Means of named values, summed on the device. Adding never waits for a GPU; reading does."""

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Add scalars on the device. They are copied: a CUDA graph overwrites its own outputs."""
        names = tuple(values)
        values_V = torch.stack([value.detach() for value in values.values()])
        self._sums[names] = self._sums[names] + values_V if names in self._sums else values_V
        self._counts[names] = self._counts.get(names, 0) + 1

    def take(self) -> "PendingMeans":
        """Start copying the sums since the last call to the CPU, and reset them."""
        pending = PendingMeans(self._sums, self._counts)
        self._sums, self._counts = {}, {}
        return pending

    def read(self, step: int) -> dict[str, float]:
        """
        Return the means since the last reading, and reset them.

        Raises:
            TrainingDivergedError: a mean is NaN or infinite.
        """
        return self.take().means(step)


class PendingMeans:
    """Sums on their way from the device to pinned memory."""

    def __init__(self, sums: dict[tuple[str, ...], Tensor], counts: dict[tuple[str, ...], int]) -> None:
        self._counts = [(name, count) for names, count in counts.items() for name in names]
        self._sums = torch.cat(list(sums.values())) if sums else torch.empty(0)
        self._copied: torch.cuda.Event | None = None
        if self._sums.is_cuda:
            on_cpu = torch.empty(self._sums.shape, dtype=self._sums.dtype, pin_memory=True)
            self._sums = on_cpu.copy_(self._sums, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def means(self, step: int) -> dict[str, float]:
        """
        Return the means; wait for the copy if it has not completed.

        Args:
            step: named in the error.

        Raises:
            TrainingDivergedError: a mean is NaN or infinite.
        """
        if self._copied is not None:
            self._copied.synchronize()
        totals: dict[str, tuple[float, int]] = {}
        for (name, count), total in zip(self._counts, self._sums.tolist(), strict=True):
            before, times = totals.get(name, (0.0, 0))
            totals[name] = before + total, times + count
        means = {name: total / count for name, (total, count) in totals.items()}
        for name, mean in means.items():
            if not -float("inf") < mean < float("inf"):
                raise diverged(f"{name} is {mean}", step)
        return means
