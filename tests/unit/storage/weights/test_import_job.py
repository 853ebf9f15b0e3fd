"""An import's row never names what a power cut may take."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import save_file

from jobs.networks.dcgan import Architecture
from storage.volume.durable import make_folder
from storage.volume.ownership import quarantined
from storage.weights.import_job import import_weights

if TYPE_CHECKING:
    from storage.db.store import JobStore
    from storage.volume.layout import Volume


@pytest.mark.parametrize("left_behind", [False, True], ids=["fresh", "after an import that was killed"])
def test_the_whole_path_to_imported_weights_is_synced_after_they_have_their_name(
    store: "JobStore", volume: "Volume", tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_behind: bool
) -> None:
    weights = Architecture(size=16, nz=8, ngf=4, ndf=4).build_generator(1).state_dict()
    save_file(weights, tmp_path / "g.safetensors")
    if left_behind:
        make_folder(volume.checkpoints(1, 1) / "import")
        (volume.checkpoints(1, 1) / "import" / "generator.safetensors").write_text("perhaps a former table's")
    synced: list[str] = []
    really = os.fsync

    def fsync(fd: int) -> None:
        really(fd)
        synced.append(os.readlink(f"/proc/self/fd/{fd}"))

    monkeypatch.setattr(os, "fsync", fsync)
    job = import_weights(store, volume, netg=tmp_path / "g.safetensors", netd=None, name="m", user="ada")
    place = volume.checkpoints(job.id, 1)
    assert synced[-4:] == [str(one) for one in (place, *place.parents[:3])]
    assert place.parents[2] == volume.jobs
    assert len(quarantined(volume)) == left_behind
    assert (place / "import" / "generator.safetensors").stat().st_size > 100
