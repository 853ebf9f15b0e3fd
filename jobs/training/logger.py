"""What a training run says while it runs: lines of metrics, lines of the log, how far it is."""

import time
from typing import Any

from jobs.context import JobContext
from jobs.specs import TrainSpec
from jobs.training.running_means import Reading, RunningMeans

LOG_EVERY = 25
"""Batches between two lines of metrics, and between two looks for NaN."""
METRICS = ("loss_d", "loss_g", "d_real", "d_fake")
SHOWN_LOSSES = ("loss_d", "loss_g")


class TrainingLogger:
    """
    One run's voice.

    Args:
        per_epoch: batches in an epoch.
        late: lines that may wait for their values while training goes on; 1 on a GPU.
    """

    def __init__(self, spec: TrainSpec, ctx: JobContext, per_epoch: int, *, late: int = 0) -> None:
        self.late = late
        self.spec = spec
        self.ctx = ctx
        self.per_epoch = per_epoch
        self.running_means = RunningMeans()
        self.last: dict[str, float] = {}
        self.trouble: str | None = None
        """What the run suffers from, shown instead of its progress until it is over."""
        self._rate: float | None = None
        self.start_at(0)

    def start_at(self, step: int) -> None:
        """The run begins here, or has gone back to here."""
        self.running_means = RunningMeans()
        self._lines: list[tuple[int, float, Reading]] = []
        self._step, self._at = step, time.monotonic()

    def rest(self) -> None:
        """What took time just now was no training: the next rate counts from here."""
        self._at = time.monotonic()

    def stepped(self, step: int) -> None:
        """
        Raises:
            TrainingDivergedError: a loss is not finite.
        """
        epoch, place = divmod(step, self.per_epoch)
        if place % LOG_EVERY == 0:
            self.write(step, late=self.late)
        self.ctx.report(
            step * self.spec.batch,
            self.spec.epochs * self.per_epoch * self.spec.batch,
            "pictures",
            rate=self._rate,
            epoch=epoch,
            epochs=self.spec.epochs,
            phase=self.trouble,
        )

    def write(self, step: int, *, late: int = 0) -> None:
        """
        One line of metrics; a value that is not finite ends it here.

        Args:
            late: lines that may be written with a later one: by then a GPU has their values, and
                nothing has waited for it.

        Raises:
            TrainingDivergedError: a loss is not finite.
        """
        if step != self._step:
            now = time.monotonic()
            self._rate = (step - self._step) * self.spec.batch / max(now - self._at, 1e-9)
            self._step, self._at = step, now
            self._lines.append((step, self._rate, self.running_means.take()))
        while len(self._lines) > late:
            self._tell(*self._lines.pop(0))

    def _tell(self, step: int, rate: float, reading: Reading) -> None:
        means = reading.means(step)
        self.last |= means
        epoch, place = divmod(step, self.per_epoch)
        if place == 0:
            losses = "  ".join(f"{name} {self.last[name]:.4f}" for name in SHOWN_LOSSES if name in self.last)
            self.ctx.log(f"epoch {epoch}/{self.spec.epochs}  {losses}  {rate:.0f} pictures/s")
        line: dict[str, Any] = {"step": step, "epoch": epoch, "images": step * self.spec.batch}
        line |= {name: means.get(name) for name in METRICS} | means
        self.ctx.metrics({**line, "images_per_s": round(rate, 2)})
