"""
Save checkpoints in the background, one at a time, while training continues.

Writing, syncing and registering a checkpoint takes a second or more. Training waits only for copying the
tensors, and for the previous checkpoint when the next is due. A full disk is tolerated for a few checkpoints:
the older ones remain, and space may be freed.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from jobs.context import CheckpointKind, JobContext, Sample
from jobs.errors import DiskFullError
from jobs.training.logger import TrainingLogger
from jobs.training.state import TrainState

MAX_MISSES = 3
"""Saves in a row that may find the disk full before the job is requeued."""


class AsyncCheckpointer:
    """
    Owns the checkpoint that is being saved: its tensors, its step, and the failures so far.

    Args:
        on_saved: called with the step of each checkpoint that was registered.
    """

    def __init__(self, ctx: JobContext, logger: TrainingLogger, on_saved: Callable[[int], None]) -> None:
        self.ctx = ctx
        self.logger = logger
        self.on_saved = on_saved
        self.misses = 0
        self.staging = StagingBuffers()
        self._in_flight: tuple[CheckpointKind, int] | None = None
        self.start_at(0)

    def start_at(self, step: int) -> None:
        """Start at a step that is already saved."""
        self.saved_step = step
        """The newest step that can be resumed from."""
        self._last_save = time.monotonic()

    def seconds_since_last(self) -> float:
        """Return the seconds since the last save began."""
        return time.monotonic() - self._last_save

    def prepare(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Allocate the staging buffers in the background, at the first call only."""
        self.staging.prepare(tensors)

    def save(
        self,
        kind: CheckpointKind,
        state: TrainState,
        *,
        epoch: int,
        meta: Mapping[str, Any],
        sample: Callable[[Mapping[str, Tensor]], Sample] | None = None,
    ) -> None:
        """
        Copy the state and save it in the background; wait for completion only if `kind` is 'final'.

        Args:
            epoch: completed epochs.
            meta: see JobContext.save_checkpoint().
            sample: gets the generator's tensors, returns the sample grid to draw beside the checkpoint.

        Raises:
            DiskFullError: no space for the final checkpoint, or for more than MAX_MISSES in a row.
        """
        self.wait()  # also for the staging buffers, which the previous checkpoint is written from
        self._in_flight = kind, state.step
        try:
            tensors = self.staging.copy(state.tensors())
            generator = state.generator_tensors(tensors)
            self.ctx.save_checkpoint(
                kind=kind,
                epoch=epoch,
                step=state.step,
                state=tensors,
                generator=generator,
                meta=meta,
                sample=sample(generator) if sample is not None else None,
            )
        except DiskFullError as full:
            self._in_flight = None
            self._missed(kind, state.step, full)
        if kind == "final":
            self.wait()
        self._last_save = time.monotonic()
        self.logger.reset_clock()

    def poll(self) -> None:
        """Process a save that has completed; never wait."""
        if self._in_flight is not None and not self.ctx.is_saving():
            self.wait()

    def wait(self) -> None:
        """
        Wait for the save in flight, if there is one.

        Raises:
            DiskFullError: it found no space, and more than MAX_MISSES in a row or the final one did not.
        """
        if self._in_flight is None:
            return
        (kind, step), self._in_flight = self._in_flight, None
        try:
            self.ctx.wait_for_save()
        except DiskFullError as full:
            self._missed(kind, step, full)
        else:
            self.saved_step = step
            self.misses, self.logger.warning = 0, None
            self.on_saved(step)

    def _missed(self, kind: CheckpointKind, step: int, full: DiskFullError) -> None:
        self.misses += 1
        if kind == "final" or self.misses > MAX_MISSES:
            raise full
        age = f"{(step - self.saved_step) * self.logger.spec.batch:,} images"
        self.ctx.log(f"NOT SAVED: {full.message}; the last checkpoint is {age} old, and training continues")
        self.logger.warning = f"{full.code}: {full.message}, {self.misses} of {MAX_MISSES} saves missed"
        self.ctx.event("checkpoint_save_failed", code=full.code, reason=full.message, misses=self.misses)


class StagingBuffers:
    """
    Copies of a run's tensors at one step; the next copy() overwrites them.

    The memory is reused: allocating fresh pages for a hundred megabytes takes longer than copying, and a GPU
    copies asynchronously only into pinned memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._allocation: threading.Thread | None = None

    def prepare(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """
        Allocate on another thread, once, so that the first copy() is as fast as the others.

        Args:
            tensors: returns what copy() will get.
        """
        if self._allocation is None:
            self._allocation = threading.Thread(
                target=self._allocate, args=(tensors(),), name="staging-buffers", daemon=True
            )
            self._allocation.start()

    def _allocate(self, tensors: Mapping[str, Tensor]) -> None:
        buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for buffer in buffers.values():
            buffer.zero_()  # the kernel maps pages at the first write
        self._buffers = buffers

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Copy tensors to the CPU and wait until the copies are complete.

        Args:
            tensors: on any device, in any memory layout. The copies have the same layout: changing it takes
                several times as long, and the writer can do that later.

        Returns:
            The copies under the same names.
        """
        if self._allocation is not None:
            self._allocation.join()
        # Release the buffers of names that no longer exist.
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        with torch.no_grad():
            for name, tensor in tensors.items():
                self._buffers[name].copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return dict(self._buffers)

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        """Return the buffer of this name if it has the tensor's form, else a new one."""
        old = self._buffers.get(name)
        form = (tensor.shape, tensor.dtype, tensor.stride())
        if old is not None and (old.shape, old.dtype, old.stride()) == form:
            return old
        return torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=tensor.is_cuda
        )
