"""
The pipeline of a generation: compute micro-batches, copy them to the CPU, encode and write them.

Three stages overlap. On a CPU several micro-batches are computed at once, each on its share of the threads:
threads that share a micro-batch wait for each other at every layer. On a GPU one micro-batch is computed
while the one before is copied. A background thread encodes and writes the images that are complete.

Shapes in names: B images in a micro-batch, H, W pixels.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Generic, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from jobs import grids

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

P = ParamSpec("P")
T = TypeVar("T")

MAX_MICRO_BATCHES = 8
"""Micro-batches at once, at most: each holds its own activations."""


class MicroBatchPool:
    """
    Computes several micro-batches at once on a CPU, each on an equal share of this process's threads.

    On a GPU, or for a single micro-batch, the caller computes them one by one on all threads.

    Args:
        count: micro-batches that will be submitted.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.threads = torch.get_num_threads()
        limit = min(MAX_MICRO_BATCHES, self.threads, count)
        self.workers = max(limit, 1) if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    @property
    def ahead(self) -> int:
        """Return how many micro-batches to submit beside the awaited one, so that no worker is idle."""
        return self.workers if self.workers > 1 else 0

    def submit(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """Start a micro-batch; return a function that waits for its result and raises its exception."""
        if self._pool is None:
            result = work(*args, **kwargs)
            return lambda: result
        return self._pool.submit(work, *args, **kwargs).result

    def __enter__(self) -> Self:
        if self.workers > 1:
            share = self.threads // self.workers
            self._pool = ThreadPoolExecutor(
                self.workers, "micro-batch", initializer=torch.set_num_threads, initargs=(share,)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            # The count belongs to a thread, but new threads begin with the count that was set last.
            torch.set_num_threads(self.threads)


@dataclass(frozen=True)
class CopyInFlight:
    """A micro-batch that is being copied to the CPU."""

    bytes_BHW3: Tensor
    scores_B: Tensor
    finite: Tensor
    copied: "torch.cuda.Event | None"

    def wait(self) -> "tuple[NDArray[np.uint8], list[float], bool]":
        """
        Wait for the copy.

        Returns:
            Images uint8 (B, H, W, 3), scores, and whether all values of both are finite.
        """
        if self.copied is not None:
            self.copied.synchronize()
        return self.bytes_BHW3.numpy(), self.scores_B.tolist(), bool(self.finite)


class DeviceToHostCopier:
    """Copies micro-batches to pinned memory on a separate stream; on a CPU there is nothing to copy."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def ahead(self) -> int:
        """Return how many copies may be in flight: a GPU copies one micro-batch and computes the next."""
        return 0 if self.stream is None else 1

    def start(self, images_B3HW: Tensor, scores_B: Tensor) -> CopyInFlight:
        """
        Start copying a micro-batch.

        Args:
            images_B3HW: float, in [-1, 1].
            scores_B: float; empty if no scores were requested.
        """
        bytes_BHW3 = grids.as_bytes(images_B3HW)
        finite = torch.isfinite(images_B3HW.sum() + scores_B.sum())
        if self.stream is None:
            return CopyInFlight(bytes_BHW3, scores_B.float(), finite, None)
        self.stream.wait_stream(torch.cuda.current_stream(images_B3HW.device))
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            on_cpu = [_start_copy(one, self.stream) for one in (bytes_BHW3, scores_B.float(), finite)]
            copied.record(self.stream)
        return CopyInFlight(on_cpu[0], on_cpu[1], on_cpu[2], copied)


def _start_copy(tensor: Tensor, stream: "torch.cuda.Stream") -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    # The allocator must not reuse its memory before the copy has read it.
    tensor.record_stream(stream)
    return host


class BackgroundWriter(Generic[T]):
    """
    Processes items in order on a thread, at most a few items behind.

    An exception of the thread is raised by the next put() or at the end of the block. A block that ends
    with an exception waits for the item in progress and discards the rest.

    Args:
        work: processes one item.
        ahead: items that may wait; put() blocks when the queue is full.
    """

    def __init__(self, work: Callable[[T], None], *, ahead: int) -> None:
        self.work = work
        self.error: BaseException | None = None
        self._aborted = False
        self._items: queue.Queue[T | None] = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._run, name="background-writer", daemon=True)

    def put(self, item: T) -> None:
        """Queue an item; raise the exception of an earlier one."""
        self._raise()
        self._items.put(item)

    def _run(self) -> None:
        # Items are taken to the end even after an error, so that put() never blocks forever.
        while (item := self._items.get()) is not None:
            if self._aborted or self.error is not None:
                continue
            try:
                self.work(item)
            except BaseException as exc:  # StopRequested is no Exception
                self.error = exc

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._aborted = kind is not None
        self._items.put(None)
        self._thread.join()
        if kind is None:
            self._raise()
