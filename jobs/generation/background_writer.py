"""What is done beside the main work: encoding and writing, while the next pictures are computed."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class BackgroundWriter(Generic[T]):
    """
    Hands things in their order to a thread of its own, which is a few behind at most.

    What goes wrong there is raised here: at the next put(), or at the end of the block. A
    block that ends by an exception waits for what is in hand, and lets the rest fall.

    Args:
        work: what the thread does with each thing.
        ahead: things that may wait; put() blocks when so many do.
    """

    def __init__(self, work: Callable[[T], None], *, ahead: int) -> None:
        self.work = work
        self.error: BaseException | None = None
        self._fallen = False
        self._things: queue.Queue[T | None] = queue.Queue(ahead)
        self._thread = threading.Thread(target=self._run, name="conveyor", daemon=True)

    def put(self, thing: T) -> None:
        self._raise()
        self._things.put(thing)

    def _run(self) -> None:
        # It takes things to the end whatever happens, so that put() never waits for nobody.
        while (thing := self._things.get()) is not None:
            if self._fallen or self.error is not None:
                continue
            try:
                self.work(thing)
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
        self._fallen = kind is not None
        self._things.put(None)
        self._thread.join()
        if kind is None:
            self._raise()
