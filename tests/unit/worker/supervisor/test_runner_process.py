"""The environment that a runner gets from its supervisor."""

import json
import os
import platform
import selectors
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from machine import until

from storage.volume.layout import Volume
from worker.supervisor.runner_process import OPENMP_VARIABLES, RunnerProcess, memory_policy, thread_policy

if TYPE_CHECKING:
    from storage.settings import Settings


def test_threads_that_wait_take_no_core_from_their_neighbours() -> None:
    assert thread_policy({}) == {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize("name", OPENMP_VARIABLES)
def test_a_setting_of_the_user_is_kept(name: Any) -> None:
    assert thread_policy({name: "whatever"}) == {}


def test_a_memory_setting_of_the_user_is_kept() -> None:
    assert memory_policy({"MALLOC_TRIM_THRESHOLD_": "1"}) == {}


def test_a_runner_is_started_under_both_policies(
    settings: "Settings", monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {**thread_policy({}), **memory_policy({})}
    for name in (*OPENMP_VARIABLES, *wanted):
        monkeypatch.delenv(name, raising=False)
    runner = RunnerProcess(settings, selectors.DefaultSelector())
    try:
        runner.ensure()
        shown = Path(f"/proc/{runner.pid}/environ")
        until(lambda: shown.read_text() != "", within_s=10, what="its environment")  # empty within execve()
        environment = shown.read_text().split("\0")
    finally:
        runner.kill()
    assert {f"{name}={value}" for name, value in wanted.items()} <= set(environment)


FREED = """
import torch
from pathlib import Path
from worker.host.process import release_free_memory

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

def passes(count):
    for _ in range(count):
        held = [torch.ones(5_000_000) for _ in range(6)]
        del held

passes(1)
release_free_memory()  # what the imports left is not the question
before = resident_mb()
large = torch.ones(50_000_000)
del large
print(resident_mb() - before)
passes(3)
before = resident_mb()
release_free_memory()
print(before - resident_mb())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps nothing")
def test_memory_is_kept_between_passes_and_given_back_when_asked() -> None:
    # Without the policy glibc sometimes keeps as much, if a small block is on top: no comparison is possible.
    env = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    env |= memory_policy({})
    done = subprocess.run([sys.executable, "-c", FREED], env=env, capture_output=True, text=True, check=True)
    of_large, given_back = (int(word) for word in done.stdout.split())
    assert of_large < 50, "of the 200 MB of one large block, which would leave a gap if it were kept"
    assert given_back > 100, "of 120 MB that were freed and kept, so that no page need be made anew"


SERVING = """
import sys, socket
import worker.runner.main as runner
from storage.volume.layout import Volume
from worker.ipc import Channel
from pathlib import Path

runner.release_free_memory = lambda: print("given back", flush=True)
ours, theirs = socket.socketpair()
serving = runner.Runner(Channel(theirs), Volume(Path(sys.argv[1])))
"""
IDLE = SERVING + "runner.IDLE_S = 0.05; serving.serve()"
ORDERED = (
    SERVING
    + """
for number, kind in enumerate(("trains", "trains", "draws")):
    about = {"job_id": number, "attempt": 1, "spec": {}, "inputs": {}, "checkpoints": [], "submitted_at": 0}
    serving.assignments.append({"kind": kind, "label": kind, **about})
    serving._run(serving._next_assignment())
    print(kind, flush=True)
"""
)


def test_a_runner_without_work_gives_its_memory_back_once() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", IDLE, "/nowhere"], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "given back\n"
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
        finally:
            process.kill()
        assert process.stdout.read() == ""


def test_a_runner_that_goes_over_to_another_kind_of_job_gives_back_what_the_last_one_left(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", ORDERED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["given back", "trains", "trains", "given back", "draws"]


def test_a_job_that_fails_before_its_first_progress_leaves_its_spec(tmp_path: Path) -> None:
    Volume(tmp_path).ensure()
    subprocess.run([sys.executable, "-c", ORDERED, str(tmp_path)], capture_output=True, check=True)
    assert json.loads((Volume(tmp_path).job(2) / "spec.json").read_text())["kind"] == "draws"
