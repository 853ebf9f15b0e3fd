"""Failpoints: what they do in a process that a test has armed; elsewhere they are inert."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jobs.failpoints import Entry, failpoint, parse

ROOT = Path(__file__).parents[2]
ARMED = {"GANQ_ENABLE_FAILPOINTS": "1"}


def start(code: str, **env: str) -> "subprocess.Popen[str]":
    """A process of its own, because the environment is read once, when the module is imported."""
    return subprocess.Popen(
        [sys.executable, "-c", f"from jobs.failpoints import failpoint\n{code}"],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(code: str, **env: str) -> tuple[int, str]:
    """Exit code, and what it printed."""
    process = start(code, **env)
    out, err = process.communicate(timeout=30)
    return process.returncode, out + err


PASS = "print([failpoint('p') for _ in range(3)])"
POINTS = {"GANQ_FAILPOINTS": "p=kill@1+"}


@pytest.mark.parametrize("enabled", [{}, {"GANQ_ENABLE_FAILPOINTS": "0"}, {"GANQ_ENABLE_FAILPOINTS": "true"}])
def test_without_the_switch_nothing_fires(enabled: Any) -> None:
    assert run_python(PASS, **POINTS, **enabled) == (0, f"{[False] * 3}\n")


def test_without_the_switch_not_even_nonsense_is_read() -> None:
    assert run_python("print(failpoint('p'))", GANQ_FAILPOINTS="no failpoint at all") == (0, "False\n")


def test_the_switch_alone_changes_nothing() -> None:
    assert run_python(PASS, **ARMED) == (0, f"{[False] * 3}\n")


def test_this_process_is_not_armed() -> None:
    assert not failpoint("anything")


# --- what an entry says -----------------------------------------------------------------------


def test_entries_are_read_with_their_times() -> None:
    assert parse("a=kill; b=sleep:0.5@3+;;c=raise:ENOSPC@2") == {
        "a": Entry("kill", "", 1, False),
        "b": Entry("sleep", "0.5", 3, True),
        "c": Entry("raise", "ENOSPC", 2, False),
    }


@pytest.mark.parametrize("text", ["a", "a=kill@x", "a=kill@1.5"])
def test_an_entry_that_says_nothing_is_refused_at_once(text: str) -> None:
    with pytest.raises(ValueError):
        parse(text)
    code, out = run_python("", GANQ_FAILPOINTS=text, **ARMED)
    assert code == 1
    assert "ValueError" in out


# --- what it does -----------------------------------------------------------------------------


def test_kill_is_sigkill_at_the_time_that_was_asked() -> None:
    code, out = run_python(
        "for n in range(5):\n  print(n, flush=True); failpoint('p')", GANQ_FAILPOINTS="p=kill@3", **ARMED
    )
    assert (code, out) == (-signal.SIGKILL, "0\n1\n2\n")


def test_stop_is_sigstop_and_the_process_continues_on_sigcont() -> None:
    process = start("failpoint('p'); print('on')", GANQ_FAILPOINTS="p=stop", **ARMED)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[0] == "on\n"


@pytest.mark.parametrize(
    ("argument", "expected"),
    [("ENOSPC", "OSError 28"), ("EIO", "OSError 5"), ("MemoryError", "MemoryError None")],
)
def test_raise_raises_what_was_asked_for(argument: str, expected: str) -> None:
    code = (
        "try:\n  failpoint('p')\nexcept BaseException as exc:\n"
        "  print(type(exc).__name__, getattr(exc, 'errno', None))"
    )
    assert run_python(code, GANQ_FAILPOINTS=f"p=raise:{argument}", **ARMED) == (0, f"{expected}\n")


TICKING = """
import threading, time
ticks = 0
def tick():
    global ticks
    while True:
        time.sleep(0.01); ticks += 1
threading.Thread(target=tick, daemon=True).start()
time.sleep(0.05); before = ticks; began = time.monotonic(); failpoint('p')
print(time.monotonic() - began > 0.45, ticks - before > 5)
"""


@pytest.mark.parametrize(("action", "others_run"), [("sleep:0.5", True), ("hang:0.5", False)])
def test_sleep_lets_other_threads_run_and_hang_does_not(action: str, others_run: bool) -> None:
    assert run_python(TICKING, GANQ_FAILPOINTS=f"p={action}", **ARMED) == (0, f"True {others_run}\n")


def test_on_asks_the_caller_to_act_and_every_other_name_does_not() -> None:
    code = "print([failpoint('p') for _ in range(4)], failpoint('q'))"
    assert run_python(code, GANQ_FAILPOINTS="p=on@2", **ARMED) == (0, "[False, True, False, False] False\n")
    assert run_python(code, GANQ_FAILPOINTS="p=on@2+", **ARMED) == (0, "[False, True, True, True] False\n")


def test_with_a_folder_for_marks_an_entry_fires_once_over_all_processes(tmp_path: Path) -> None:
    armed = {**ARMED, "GANQ_FAILPOINTS": "p=on@1+;q=on", "GANQ_FAILPOINTS_FIRED": str(tmp_path)}
    all_ = [
        start("print(sum(failpoint('p') for _ in range(100)), int(failpoint('q')))", **armed)
        for _ in range(4)
    ]
    counts = [one.communicate(timeout=30)[0].split() for one in all_]
    assert [sum(int(count[place]) for count in counts) for place in (0, 1)] == [1, 1]
    assert {one.name for one in tmp_path.iterdir()} == {"p", "q"}


def test_a_disabled_failpoint_costs_next_to_nothing() -> None:
    began = time.perf_counter()
    for _ in range(100_000):
        failpoint("train.stepped")
    assert time.perf_counter() - began < 0.5


# --- nobody sets it ---------------------------------------------------------------------------


def test_no_deployment_file_and_no_page_sets_the_switch() -> None:
    """docs/ may tell of it; nothing that somebody runs or copies may set it."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    shipped = [
        name for name in tracked if name and not name.startswith("tests/") and name != "jobs/failpoints.py"
    ]
    assert "Dockerfile" in shipped or not tracked[0], "this is no checkout of ganq"
    for name in shipped:
        result = (ROOT / name).read_text(errors="replace") if (ROOT / name).is_file() else ""
        for word in (
            "GANQ_ENABLE_FAILPOINTS=1",
            "GANQ_ENABLE_FAILPOINTS: ",
            "GANQ_GUARDS_OFF=",
            "GANQ_FAILPOINTS=",
        ):
            assert word not in result, f"{name} sets {word}"
