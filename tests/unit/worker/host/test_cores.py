"""CPU workers share a machine's cores equally and without overlap, and each stays on its own."""

import os
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.errors import ConfigError
from worker.host import cores, launcher


@given(st.sets(st.integers(0, 200), min_size=1, max_size=64), st.integers(1, 64))
def test_cores_are_divided_equally_and_none_is_given_twice(there: Any, workers: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cores, "usable", lambda: sorted(there))
        if workers > len(there):
            with pytest.raises(ConfigError, match=f"more than the {len(there)} cores"):
                cores.divide(workers)
            return
        shares = cores.divide(workers)
    given_out = [number for share in shares for number in share.numbers]
    assert len(shares) == workers
    assert len({len(share.numbers) for share in shares}) == 1, "equally many threads, equal bits"
    assert len(set(given_out)) == len(given_out)
    assert set(given_out) <= there
    assert len(there) - len(given_out) < workers
    assert len({share.label for share in shares}) == workers, "workers need names of their own"


def test_cores_are_named_as_for_taskset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "usable", lambda: [0, 1, 2, 3, 6])
    assert cores.parse("0,2-3").numbers == (0, 2, 3)
    for wrong in ("", "a", "1-", "3-2", "4", "0-6", "-1"):
        with pytest.raises(ConfigError):
            cores.parse(wrong)


def test_a_pinned_process_and_its_children_stay_on_their_cores_with_as_many_threads() -> None:
    script = (
        "import os, subprocess, sys; from worker.host.cores import Cores;"
        "os.environ.update(Cores((max(os.sched_getaffinity(0)),)).pin());"
        "subprocess.run([sys.executable, '-c',"
        "'import os; print(len(os.sched_getaffinity(0)), os.environ[\"OMP_NUM_THREADS\"])'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.parametrize(
    ("gpus", "workers", "these"), [("0", 2, None), ("all", None, "0"), ("none", 2, "0"), ("auto", 1, "0")]
)
def test_gpus_and_cores_at_once_are_refused(gpus: str, workers: Any, these: Any) -> None:
    with pytest.raises(ConfigError, match="exclude each other"):
        launcher._devices(gpus, workers, these)
