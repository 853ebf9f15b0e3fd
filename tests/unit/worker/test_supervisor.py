"""What the supervisor looks at before it hands out a job."""

from storage.volume import Volume
from worker import supervisor
from worker.supervisor import Supervisor


def test_the_volume_is_not_probed_for_each_of_many_small_jobs(tmp_path, monkeypatch):
    looking = Supervisor.__new__(Supervisor)  # of all that a worker has, this needs two things
    looking.volume, looking.volume_due = Volume(tmp_path / "v"), 0.0
    looking._see_volume()
    looking.volume.datasets.rmdir()

    looking._see_volume()
    assert not looking.volume.datasets.exists(), "the volume was shown to be there a moment ago"

    looking.volume_due = 0.0
    monkeypatch.setattr(supervisor, "VOLUME_SEEN_S", 0.0)
    for _ in range(2):
        looking._see_volume()
        looking.volume.datasets.rmdir()
