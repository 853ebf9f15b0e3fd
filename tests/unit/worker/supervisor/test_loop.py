"""Checks of the volume before a job begins."""

import socket
from pathlib import Path

import pytest

from storage.volume.layout import Volume
from worker.ipc import Channel
from worker.runner.main import Runner
from worker.supervisor import loop
from worker.supervisor.loop import Supervisor


def test_the_volume_is_not_probed_for_each_of_many_small_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    looking = Supervisor.__new__(Supervisor)
    looking.next_volume_check = 0.0
    assert looking._volume_check_due()
    assert not looking._volume_check_due(), "the volume was shown to be there a moment ago"
    monkeypatch.setattr(loop, "VOLUME_CHECK_S", 0.0)
    looking.next_volume_check = 0.0
    assert looking._volume_check_due()
    assert looking._volume_check_due()


def test_a_volume_that_was_unmounted_is_not_made_again_for_the_next_job(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        runner = Runner(Channel(theirs), Volume(tmp_path / "v"))
        assignment = {"job_id": 1, "attempt": 1, "kind": "train", "see_volume": True}
        runner.assignments.append(assignment)
        runner._run(assignment)
        (answer,) = Channel(ours).receive() or []
    assert answer["code"] == "VOLUME_UNAVAILABLE"
    assert "there are no jobs at" in answer["message"]
    assert not runner.assignments, "the failed assignment is removed"
    assert not (tmp_path / "v").exists()
