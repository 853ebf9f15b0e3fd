"""
When a run's checkpoints are safe: handed over one at a time, while training goes on.

Writing, syncing and registering a checkpoint takes a second or many; training waits
for none of it, but for the one before when the next is due. A full disk is borne for a
while: the checkpoints that are there stay, and there may be room again.
"""

import time
from collections.abc import Callable

from jobs.context import CheckpointKind, JobContext
from jobs.errors import DiskFullError
from jobs.training.logger import TrainingLogger

MISSES = 3
"""Saves in a row that may find the disk full before the job goes back to the queue."""


class AsyncCheckpointer:
    """
    One run's checkpoints on their way.

    Args:
        safe: called with the step of each that is registered.
    """

    def __init__(self, ctx: JobContext, logger: TrainingLogger, safe: Callable[[int], None]) -> None:
        self.ctx = ctx
        self.logger = logger
        self.safe = safe
        self.misses = 0
        self._on_its_way: tuple[CheckpointKind, int] | None = None
        self.start_at(0)

    def start_at(self, step: int) -> None:
        """The run begins at this step, which needs no saving."""
        self.step = step
        """The newest step that can be taken up again."""
        self.handed_at = time.monotonic()

    def hand_over(self, kind: CheckpointKind, step: int, save: Callable[[], None]) -> None:
        """
        Save, and do not wait for it; but for the last one of a run.

        Raises:
            DiskFullError: no room for the last checkpoint of all, or too often in a row.
        """
        self.settle()
        self._on_its_way = kind, step
        try:
            save()
        except DiskFullError as full:
            self._on_its_way = None
            self._miss(kind, step, full)
        if kind == "final":
            self.settle()
        self.handed_at = time.monotonic()
        self.logger.rest()

    def look(self) -> None:
        """Take note of a save that has ended; waits for none."""
        if self._on_its_way is not None and not self.ctx.is_saving():
            self.settle()

    def settle(self) -> None:
        """
        Wait for the save that is on its way.

        Raises:
            DiskFullError: it found no room, and that cannot be borne any longer.
        """
        if self._on_its_way is None:
            return
        (kind, step), self._on_its_way = self._on_its_way, None
        try:
            self.ctx.wait_for_save()
        except DiskFullError as full:
            self._miss(kind, step, full)
        else:
            self.step = step
            self.misses, self.logger.trouble = 0, None
            self.safe(step)

    def _miss(self, kind: CheckpointKind, step: int, full: DiskFullError) -> None:
        self.misses += 1
        if kind == "final" or self.misses > MISSES:
            raise full
        age = f"{(step - self.step) * self.logger.spec.batch:,} pictures"
        self.ctx.log(f"NOT SAVED: {full.message}; the last checkpoint is {age} old, and training goes on")
        self.logger.trouble = f"{full.code}: {full.message}, {self.misses} of {MISSES} saves missed"
        self.ctx.event("checkpoint_save_failed", code=full.code, reason=full.message, misses=self.misses)
