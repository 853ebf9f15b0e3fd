"""`ganq push` and `ganq import` of the folder: the same bytes, and a card that says what the table knows."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from jobs.networks.dcgan import Architecture
from jobs.networks.weights import join
from jobs.specs import TrainSpec
from storage.results.codecs import encode_png
from storage.volume.checkpoints import write_checkpoint
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.queries import Queries
    from storage.db.rows import Lease
    from storage.db.store import JobStore
    from storage.settings import Settings

Train = Callable[..., int]


@pytest.fixture
def train(store: "JobStore", settings: "Settings", running_job_factory: "Callable[..., Lease]") -> Train:
    """Records a training with its checkpoint and a sample: train(arch, classes=("a", "b"))."""

    def run(arch: Architecture, classes: tuple[str, ...] = ()) -> int:
        spec = TrainSpec.create(data="/faces", recipe="rpgan", seed=5)
        lease = running_job_factory(spec=spec.to_json(), name="faces")
        volume = Volume(settings.volume)
        weights = join(arch.build_generator(1).state_dict(), arch.build_discriminator(2).state_dict())
        meta = {"arch": arch.to_json(), "classes": list(classes), "fingerprint": "f" * 64, "recipe": "rpgan"}
        target = volume.checkpoints(lease.job_id, 1) / "final"
        target.parent.mkdir(parents=True)
        sha256, size = write_checkpoint(target, generator=weights, meta=meta)
        (volume.attempt(lease.job_id, 1) / "samples").mkdir()
        sample = encode_png(np.zeros((9, 9, 3), np.uint8))
        (volume.attempt(lease.job_id, 1) / "samples" / "epoch-0004.png").write_bytes(sample)
        store.add_event(lease, "dataset", {"images": 800, "copies": 3, "reasons": {"empty file": 2}})
        store.register_checkpoint(
            lease,
            kind="final",
            epoch=4,
            step=40,
            path=volume.relative(target),
            manifest_sha256=sha256,
            size=size,
            metric=0.25,
        )
        store.succeed(lease, {"metric": {"key": "kid/effnet-lite0", "baseline": 0.01}})
        return lease.job_id

    return run


@pytest.mark.parametrize(
    ("arch", "classes"),
    [
        (Architecture(size=16, nz=8, ngf=4, ndf=4), ()),
        (Architecture(size=16, nz=8, ngf=4, ndf=4, norm_d="none", arch="resnet"), ()),
        (Architecture(size=24, nz=8, ngf=4, ndf=4, norm_d="spectral", classes=2), ("cats", "dogs")),
        (Architecture(size=16, nz=8, ngf=4, ndf=4, norm_d="none", arch="balanced", grey=True), ()),
        (Architecture(size=64, nz=8, ngf=4, ndf=4, norm_d="none", skips=True, full_res_conv=True), ()),
        (Architecture(size=64, nz=8, ngf=4, ndf=4, norm_d="none", patch_size=8, antialias=True), ()),
    ],
    ids=["dcgan", "resnet", "two classes", "balanced and grey", "skips and full-res-conv", "patches of 8"],
)
def test_a_pushed_folder_is_imported_to_the_same_bytes(
    ganq: "Ganq",
    train: Train,
    queries: "Queries",
    settings: "Settings",
    tmp_path: Path,
    image_folder: Path,
    arch: Any,
    classes: Any,
) -> None:
    job_id = train(arch, classes)
    said = ganq("push", job_id, "--to", tmp_path / "model", "--image-licence", "cc0-1.0")
    assert said.code == 0, said.err
    assert ganq("import", tmp_path / "model", "--name", "again").code == 0
    root = settings.volume
    first, again = (root / queries.choose_checkpoint(one, "best").path for one in (job_id, job_id + 1))
    assert (again / "generator.safetensors").read_bytes() == (first / "generator.safetensors").read_bytes()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == (
        first / "generator.safetensors"
    ).read_bytes()
    facts = json.loads((again / "state.json").read_text())
    assert (facts["arch"], facts["classes"], facts["epoch"]) == (arch.to_json(), list(classes), 4)

    for number, name in enumerate(classes * 2):
        (image_folder / name).mkdir(exist_ok=True)
        Image.new("RGB", (24, 24), (60 * number, 9, 9)).save(image_folder / name / f"{number}.png")
    for one in image_folder.glob("*.png") if classes else ():
        one.unlink()
    tuned = ganq("submit", "train", "--init-from", "again", "--data", image_folder, "--batch", 2, "--json")
    assert tuned.code == 0, tuned.err
    spec = TrainSpec.from_json(queries.get(job_id + 2).spec)
    assert Architecture.of_spec(spec, len(classes)) == arch
    assert spec.conditional == bool(classes)


def test_the_card_says_what_the_table_knows(
    ganq: "Ganq", train: Train, store: "JobStore", running_job_factory: "Callable[..., Lease]", tmp_path: Path
) -> None:
    job_id = train(Architecture(size=16, nz=8, ngf=4, ndf=4))
    push = ("push", "faces", "--to", tmp_path / "model", "--image-licence", "own photographs")
    assert ganq(*push).code == 0
    card = (tmp_path / "model" / "README.md").read_text()
    for fact in (
        "recipe: rpgan, seed 5",
        "training images: 800; left out: 2 unusable, 3 copies",
        "f" * 64,
        "licence of the training images: own photographs",
        "kid/effnet-lite0: 0.25 (real images against real images: 0.01)",
        "copies of training images: not tested (ganq submit evaluate faces)",
        "ganq submit generate --from faces --seeds 7",
        "![samples of epoch 4](samples/epoch-0004.png)",
    ):
        assert fact in card
    assert (tmp_path / "model" / "samples" / "epoch-0004.png").stat().st_size > 50
    lease = running_job_factory(kind="evaluate", spec={"source": job_id})
    store.succeed(lease, {"copying": {"verdict": "copies", "summary": "the model copies training images"}})
    assert "is not empty" in ganq(*push).err
    assert ganq(*push, "--force").code == 0
    assert (
        f"the model copies training images (job {lease.job_id})"
        in (tmp_path / "model" / "README.md").read_text()
    )


def test_what_cannot_be_pushed_or_imported_says_why(
    ganq: "Ganq", train: Train, job_factory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(Architecture(size=16, nz=8, ngf=4, ndf=4))
    model = tmp_path / "model"
    assert "--image-licence" in ganq("push", "faces", "--to", model).err
    assert "is not a repository" in ganq("push", "faces", "--to", "hf://faces", "--image-licence", "cc0").err
    assert "--private is for" in ganq("push", "faces", "--to", model, "--private").err
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "huggingface_hub", None)
        said = ganq("push", "faces", "--to", "hf://ada/faces", "--image-licence", "cc0")
        assert "pip install 'ganq[hub]'" in said.err
    generation = job_factory(kind="generate")
    assert "has no generator" in ganq("push", generation.id, "--to", model, "--image-licence", "x").err
    assert ganq("push", "faces", "--to", model, "--image-licence", "x").code == 0
    config = json.loads((model / "config.json").read_text())
    for change, told in (
        ({"classes": ["a"]}, "its classes or its epoch are malformed"),
        ({"arch": {"size": 16, "nz": 9, "ngf": 4, "ndf": 4}}, "Gene.0.weight"),
        ({"arch": {"size": 17}}, "is not a model of ganq"),
        ({"arch": []}, "is not a model of ganq"),
    ):
        (model / "config.json").write_text(json.dumps({**config, **change}))
        said = ganq("import", model, "--name", "again")
        assert said.code != 0
        assert told in said.err
    (model / "config.json").unlink()
    assert "config.json" in ganq("import", model, "--name", "again").err
