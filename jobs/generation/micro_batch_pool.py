"""
Micro-batches side by side on the cores of a CPU.

Threads that share a micro-batch wait for each other at every layer, and for the one whose core
is just encoding or writing; lanes that have one each wait for nobody.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

MOST = 8
"""Lanes at most, because each holds the activations of its micro-batch; they share the threads."""


class MicroBatchPool:
    """
    Does several pieces of work at once, each on an equal share of this process's threads.

    On a GPU, or when there is but one piece, it is done at once by the caller, on all of them.

    Args:
        pieces: how many will come.
    """

    def __init__(self, device: torch.device, pieces: int) -> None:
        self.threads = torch.get_num_threads()
        self.number = max(min(MOST, self.threads, pieces), 1) if device.type == "cpu" else 1
        self._pool: ThreadPoolExecutor | None = None

    @property
    def ahead(self) -> int:
        """How many may be under way beside the one that is waited for, so that no lane is ever empty."""
        return self.number if self.number > 1 else 0

    def begin(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
        """Set about a piece of work; what this returns waits until it is done, and raises what it raised."""
        if self._pool is None:
            done = work(*args, **kwargs)
            return lambda: done
        return self._pool.submit(work, *args, **kwargs).result

    def __enter__(self) -> Self:
        if self.number > 1:
            share = self.threads // self.number
            self._pool = ThreadPoolExecutor(
                self.number, "lane", initializer=torch.set_num_threads, initargs=(share,)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            # The count is each thread's own, but threads to come begin with the one that was set last.
            torch.set_num_threads(self.threads)
