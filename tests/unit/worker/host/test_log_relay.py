"""The log relay: no process blocks on it, and dropped lines are counted."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.host import log_relay, logs

LINES = 60_000
LIMIT = 100_000


class Started:
    """A relay between two pipes."""

    def __init__(self, *arguments: str, destination: int | None = None) -> None:
        reader, self.into = os.pipe()
        self.out, writer = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", log_relay.__file__, *arguments],
            stdin=reader,
            stderr=writer if destination is None else destination,
        )
        os.close(reader)
        os.close(writer)

    def close(self) -> None:
        for one in (self.into, self.out):
            try:
                os.close(one)
            except OSError:
                continue

    def say(self, text: str) -> None:
        data = text.encode()
        while data:
            data = data[os.write(self.into, data) :]

    def end(self) -> str:
        """Close the writers' end, and read the rest."""
        os.close(self.into)
        result = b""
        while part := os.read(self.out, 1 << 16):
            result += part
        assert self.process.wait(timeout=10) == 0
        return result.decode()


@pytest.fixture
def start() -> Iterator[type[Started]]:
    made: list[Started] = []

    def make(*arguments: str, destination: int | None = None) -> Started:
        made.append(Started(*arguments, destination=destination))
        return made[-1]

    yield make  # type: ignore[misc]
    for one in made:
        one.close()
        one.process.kill()
        one.process.wait()


def test_lines_arrive_whole_and_in_order(start: type[Started]) -> None:
    relay = start("text")
    result = "".join(f"line {number} é\n" for number in range(LINES)) + "the last has no end"
    relay.say(result[:1001])
    relay.say(result[1001:])
    assert relay.end() == result + "\n"


@pytest.mark.parametrize("form", ["text", "json"])
def test_unread_lines_are_dropped_and_counted(start: type[Started], form: str) -> None:
    relay = start(form, str(LIMIT))
    began = time.monotonic()
    relay.say("".join(f"line {number}\n" for number in range(LINES)))
    assert time.monotonic() - began < 10, "the writer did not wait for a reader"
    time.sleep(0.5)
    lines = relay.end().splitlines()
    gaps = [line for line in lines if "dropped" in line]
    if form == "json":
        facts = [json.loads(line) for line in gaps]
        assert {one["level"] for one in facts} == {"WARNING"}
        gaps = [one["message"] for one in facts]
    counts = [re.match(r".*?([\d,]+) lines of this log were dropped", gap) for gap in gaps]
    dropped = sum(int(one[1].replace(",", "")) for one in counts if one)
    kept = [int(line.removeprefix("line ")) for line in lines if line.startswith("line ")]
    assert dropped > 0
    assert dropped + len(kept) == LINES
    assert kept == sorted(kept)


def test_after_a_gap_the_log_continues(start: type[Started]) -> None:
    relay = start("text", str(LIMIT))
    relay.say("".join(f"line {number}\n" for number in range(LINES)))
    time.sleep(0.5)
    result = b""
    while b"dropped" not in result:
        result += os.read(relay.out, 1 << 16)
    relay.say("after the gap\n")
    assert "after the gap" in relay.end()


def test_a_destination_that_takes_nothing_is_not_waited_for_at_the_end(start: type[Started]) -> None:
    relay = start("text")
    relay.say("x" * 99 + "\n")
    relay.say(("x" * 99 + "\n") * 5000)
    os.close(relay.into)
    assert relay.process.wait(timeout=log_relay.LINGER_S + 5) == 0


def test_a_full_disk_and_a_lost_reader_stop_no_writer(start: type[Started]) -> None:
    with open("/dev/full", "wb") as full:
        relay = start("text", destination=full.fileno())
    relay.say("line\n" * LINES)
    gone = start("text")
    os.close(gone.out)
    gone.say("line\n" * LINES)
    for one in (relay, gone):
        assert one.process.poll() is None
        os.close(one.into)
        assert one.process.wait(timeout=log_relay.LINGER_S + 5) == 0


def test_signals_to_a_whole_service_leave_the_log_until_its_last_line(start: type[Started]) -> None:
    relay = start("text")
    relay.say("first\n")
    assert os.read(relay.out, 100) == b"first\n"
    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        relay.process.send_signal(sig)
    relay.say("last\n")
    assert relay.end() == "last\n"


def test_a_machine_that_starts_no_process_has_its_log_without_a_relay(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from storage.settings import Settings

    def refuse(*_: object, **__: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with logs.relayed(Settings.load({"GANQ_HOME": str(tmp_path)})):
        os.write(2, b"said all the same\n")
    assert "said all the same" in capfd.readouterr().err


def test_a_worker_of_several_shares_the_relay_of_its_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from storage.settings import Settings

    settings = Settings.load({"GANQ_HOME": str(tmp_path)})
    with logs.relayed(settings):
        outer = os.environ[logs.RELAY_ENV]
        monkeypatch.setattr(subprocess, "Popen", None)
        with logs.relayed(settings):
            assert os.environ[logs.RELAY_ENV] == outer
        monkeypatch.undo()
    assert logs.RELAY_ENV not in os.environ
