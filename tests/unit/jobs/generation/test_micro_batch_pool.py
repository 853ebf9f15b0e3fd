"""Work side by side on a CPU: at once, each on its share of the threads, and nothing is left behind."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from jobs.errors import OutOfMemoryError
from jobs.generation import pipeline
from jobs.generation.pipeline import MicroBatchPool

CPU = torch.device("cpu")


@pytest.fixture
def four_threads() -> Iterator[Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def in_lanes(number: Any, work: Any, pieces: Any = 8) -> Any:
    """What each of some pieces returns, in their order."""
    with MicroBatchPool(CPU, number) as open_lanes:
        waiting = [open_lanes.submit(work, piece) for piece in range(pieces)]
        return [wait() for wait in waiting]


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("number", [2, 3, 4])
def test_that_many_pieces_are_worked_on_at_once(number: int) -> None:
    together = threading.Barrier(number)
    assert in_lanes(number, lambda _: together.wait(10), pieces=number)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("pieces", "share"), [(1, 4), (2, 2), (3, 1), (4, 1), (100, 1)])
def test_each_thread_has_an_equal_share_of_the_threads(pieces: int, share: int) -> None:
    assert set(in_lanes(pieces, lambda _: torch.get_num_threads())) == {share}


@pytest.mark.usefixtures("four_threads")
def test_afterwards_every_thread_has_all_threads_again() -> None:
    in_lanes(4, lambda _: torch.zeros(1))
    found = [torch.get_num_threads()]
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [4, 4]


def test_many_cores_share_a_few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    many = MicroBatchPool(CPU, 1000)
    assert (many.workers, many.ahead) == (pipeline.MAX_MICRO_BATCHES, pipeline.MAX_MICRO_BATCHES)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("device", "pieces"), [("cuda", 100), ("cpu", 1)])
def test_on_a_gpu_and_for_a_single_piece_the_caller_works_itself_on_all_threads(
    device: str, pieces: int
) -> None:
    with MicroBatchPool(torch.device(device), pieces) as alone:
        assert alone.ahead == 0
        wait = alone.submit(lambda: (threading.current_thread(), torch.get_num_threads()))
        assert wait() == (threading.current_thread(), 4)


@pytest.mark.usefixtures("four_threads")
def test_results_come_in_the_order_in_which_the_work_was_begun() -> None:
    def work(piece: Any) -> Any:
        time.sleep(0.02 * (piece % 3))
        return piece

    assert in_lanes(4, work, pieces=12) == list(range(12))


@pytest.mark.usefixtures("four_threads")
def test_an_error_is_raised_to_who_waits_and_what_was_not_begun_is_left() -> None:
    done = []

    def work(piece: Any) -> None:
        if piece == 0:
            raise OutOfMemoryError("too small")
        time.sleep(0.05)
        done.append(piece)

    with pytest.raises(OutOfMemoryError):
        in_lanes(2, work, pieces=50)
    assert len(done) <= 4
    assert torch.get_num_threads() == 4
