"""What is done beside the main work keeps its order, raises where it is waited for, and stops soon."""

import threading
from typing import Any

import pytest

from jobs.errors import DiskFullError, StopRequested
from jobs.generation.pipeline import BackgroundWriter


def convey(things: Any, work: Any, then: Any = lambda: None) -> None:
    with BackgroundWriter(work, ahead=2) as conveyor:
        for thing in things:
            conveyor.put(thing)
        then()


def test_all_is_done_in_order_by_the_end_of_the_block() -> None:
    done: list[int] = []
    convey(range(1000), done.append)
    assert done == list(range(1000))


def test_no_more_than_a_few_wait() -> None:
    gate, taken, put = threading.Event(), [], []

    def work(thing: Any) -> None:
        gate.wait(10)
        taken.append(thing)

    def feed(conveyor: Any) -> None:
        for thing in range(10):
            conveyor.put(thing)
            put.append(thing)

    with BackgroundWriter(work, ahead=2) as conveyor:
        feeder = threading.Thread(target=feed, args=(conveyor,))
        feeder.start()
        feeder.join(0.3)
        assert len(put) <= 3, "one in hand, two that wait"
        gate.set()
        feeder.join(10)
    assert taken == list(range(10))


@pytest.mark.parametrize("error", [DiskFullError("full"), StopRequested("cancel")], ids=["error", "stop"])
def test_an_error_is_raised_at_the_next_call_and_nothing_more_is_done(error: Any) -> None:
    done = []

    def work(thing: Any) -> None:
        if thing == 3:
            raise error
        done.append(thing)

    with pytest.raises(type(error)) as caught:
        convey(range(100), work)
    assert caught.value is error
    assert done == [0, 1, 2]


def test_an_error_of_the_last_thing_is_raised_at_the_end() -> None:
    def work(thing: Any) -> None:
        raise DiskFullError("full")

    with pytest.raises(DiskFullError):
        convey([1], work)


def test_a_stop_waits_for_what_is_in_hand_and_lets_the_rest_fall() -> None:
    begun, go_on, done = threading.Event(), threading.Event(), []

    def work(thing: Any) -> None:
        begun.set()
        go_on.wait(10)
        done.append(thing)

    def then_stop() -> None:
        begun.wait(10)
        threading.Timer(0.2, go_on.set).start()
        raise StopRequested("cancel")

    with pytest.raises(StopRequested):
        convey(range(3), work, then_stop)
    assert done == [0], "nobody works on after the block"
