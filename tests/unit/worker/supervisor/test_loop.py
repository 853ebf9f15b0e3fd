"""What the supervisor looks at before it hands out a job."""

import pytest

from jobs.errors import VolumeError
from jobs.kinds import SPEC_VERSION
from storage.db.store import Claim
from storage.volume.layout import Volume
from worker.supervisor import loop
from worker.supervisor.lease import HeldLease
from worker.supervisor.loop import Supervisor


def test_the_volume_is_not_probed_for_each_of_many_small_jobs(tmp_path, queries, monkeypatch):
    looking = Supervisor.__new__(Supervisor)  # of all that a worker has, this needs three things
    looking.volume, looking.volume_due, looking.queries = Volume(tmp_path / "v"), 0.0, queries
    looking._check_volume()
    looking.volume.datasets.rmdir()

    looking._check_volume()
    assert not looking.volume.datasets.exists(), "the volume was shown to be there a moment ago"

    looking.volume_due = 0.0
    monkeypatch.setattr(loop, "VOLUME_SEEN_S", 0.0)
    for _ in range(2):
        looking._check_volume()
        looking.volume.datasets.rmdir()


def test_a_volume_that_has_gone_is_not_made_anew_for_the_next_job(tmp_path, queries, running_job_factory):
    looking = Supervisor.__new__(Supervisor)
    looking.volume, looking.volume_due, looking.queries = Volume(tmp_path / "v"), 0.0, queries
    running_job_factory()
    with pytest.raises(VolumeError, match="there are no jobs at"):
        looking._check_volume()
    assert not looking.volume.root.exists()


def test_a_job_whose_parts_are_deleted_first_does_not_take_the_next_one(
    store, running_job_factory, job_factory, worker_identity
):
    """A million files may take minutes, in which nobody would work on what was taken."""
    ending = Supervisor.__new__(Supervisor)  # an end needs these three things
    ending.store, ending.terminated_at = store, None
    ending.holder = holder = HeldLease.__new__(HeldLease)
    holder.taken = None
    lease, _, waiting = running_job_factory(), job_factory(), job_factory()

    holder.parts = [{"job_id": 1}]
    ending._succeed(lease, {}, Claim(worker_identity, ("train",), SPEC_VERSION))
    assert holder.taken is None

    holder.parts = []
    other = running_job_factory()
    ending._succeed(other, {}, Claim(worker_identity, ("train",), SPEC_VERSION))
    assert holder.taken.job_id < waiting.id
