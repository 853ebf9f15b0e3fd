"""
Tier 3: what few machines have, a GPU and a folder on a real NFS server. By hand:

    pytest -m tier3
    GANQ_TEST_NFS=/mnt/nfs/some-folder pytest -m tier3
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos.attempts import Desk
from PIL import Image

from jobs.errors import ConfigError
from jobs.specs import TrainSpec
from storage.datasets.cache import open_images
from storage.db.engine import Database
from storage.settings import Settings
from storage.volume.durable import read_verified, write_folder
from storage.volume.layout import Volume

pytestmark = [pytest.mark.tier3, pytest.mark.timeout(900)]

NFS = "GANQ_TEST_NFS"


@pytest.fixture
def nfs() -> Iterator[Path]:
    place = os.environ.get(NFS)
    if not place:
        pytest.skip(f"no NFS folder: {NFS} names one")
    kind = subprocess.run(["stat", "-f", "-c", "%T", place], capture_output=True, text=True, check=True)
    if "nfs" not in kind.stdout:
        pytest.skip(f"{place} is on {kind.stdout.strip()}, not on NFS")
    folder = Path(tempfile.mkdtemp(dir=place))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def desk(root: Path, number: int, **options: object) -> Desk:
    """A job on a volume at `root`, its images beside it."""
    images = root / "pictures"
    if not images.exists():
        images.mkdir()
        for i in range(24):
            Image.effect_noise((40, 40), 60 + i).convert("RGB").save(images / f"{i:02d}.png")
    volume = Volume(root / "volume")
    volume.ensure()
    fixed = {"size": 32, "ngf": 8, "ndf": 8, "nz": 8, "batch": 4, "epochs": 3, "save_every": 1}
    spec = TrainSpec.create(data=str(images), **{**fixed, **options})
    fingerprint = open_images(volume, str(images), 32, workers=1).fingerprint
    return Desk(volume, number, spec, fingerprint)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["dcgan", "sngan", "rpgan"])
def test_on_a_gpu_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, recipe: str
) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    how = {"device": "cuda", "recipe": recipe, "deterministic": True, "checkpoint_seconds": 1e-9}
    straight, killed = desk(tmp_path, 1, **how), desk(tmp_path, 2, **how)
    assert straight.attempt()["op"] == "done"
    for point in ("train.stepped=kill@4", "folder.renamed=kill@2", "train.between_networks=kill@3"):
        assert killed.attempt(point)["op"] == "killed"
    assert killed.attempt()["op"] == "done"
    assert killed.result["bit_exact"] is True
    assert killed.final() == straight.final()


def test_on_nfs_a_run_that_was_killed_ends_with_the_bits_of_one_that_was_not(nfs: Path) -> None:
    straight = desk(nfs, 1, device="cpu")
    killed = desk(nfs, 2, device="cpu")
    assert straight.attempt()["op"] == "done"
    for point in ("folder.renamed=kill@1", "folder.begun=kill@2"):
        assert killed.attempt(point)["op"] == "killed"
    assert killed.attempt()["op"] == "done"
    assert killed.final() == straight.final()
    for one in killed.checkpoints:
        read_verified(killed.folder(one), "state.safetensors", one.manifest_sha256)


def test_on_nfs_a_reader_never_sees_a_torn_folder(nfs: Path) -> None:
    for number in range(50):
        target = nfs / f"checkpoint-{number}"
        digest, _ = write_folder(target, {"state.json": lambda path: path.write_bytes(b"x" * 100_000)})
        assert len(read_verified(target, "state.json", digest)) == 100_000


def test_sqlite_on_nfs_is_refused(nfs: Path) -> None:
    settings = Settings(
        home=nfs,
        volume=nfs / "volume",
        database_url=f"sqlite:///{nfs / 'ganq.db'}",
        redis_url="redis://127.0.0.1:1/0",
        user="tester",
    )
    with pytest.raises(ConfigError):
        Database(settings)
