"""`ganq remake`: an image is made again from its passport, and what differs is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file
from unit.jobs.local_context import LocalContext

import jobs.generation.generate
from jobs.networks.dcgan import Architecture
from jobs.specs import GenerateSpec
from storage.results.codecs import encode_png
from storage.results.passport import read_passport
from storage.results.writer import ImageFiles
from storage.volume.checkpoints import read_checkpoint
from storage.volume.layout import Volume
from storage.weights.import_job import import_weights

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.queries import Queries
    from storage.db.store import JobStore
    from storage.settings import Settings

Make = Callable[..., list[Path]]
ARCH = Architecture(size=16, nz=8, ngf=4, ndf=4)


@pytest.fixture
def make(store: "JobStore", queries: "Queries", settings: "Settings", tmp_path: Path) -> Make:
    """Writes the files of a generation from an imported model: make(seed=3, count=4)."""

    volume = Volume(settings.volume)

    def run(*, weights: int = 1, folder: str = "made", **options: Any) -> list[Path]:
        netg, netd = tmp_path / f"g{weights}.safetensors", tmp_path / f"d{weights}.safetensors"
        save_file(ARCH.build_generator(weights).state_dict(), netg)
        save_file(ARCH.build_discriminator(weights).state_dict(), netd)
        job = import_weights(store, volume, netg=netg, netd=netd, name=f"m{weights}", user="ada")
        checkpoint = queries.choose_checkpoint(job.id, "best")
        given = {"source": job.id, "grid": 0, "micro_batch": 4, "device": "cpu", **options}
        if not {"interpolate", "keep", "seeds"} & set(given):
            given.setdefault("count", 6)
        context = LocalContext(tmp_path, source=read_checkpoint(volume, checkpoint, "generator"))
        context.sink = cast(Any, ImageFiles(tmp_path / folder, format=given.get("format", "png"), total=6))
        jobs.generation.generate.run(GenerateSpec.create(**given), context)
        return sorted((tmp_path / folder / "images").iterdir())

    return run


def again(path: Path, target: Path, change: Callable[[dict[str, Any]], None] = lambda facts: None) -> Path:
    """Save a PNG by Pillow, with its passport changed."""
    facts = read_passport(path.read_bytes(), "x")
    change(facts)
    text = PngImagePlugin.PngInfo()
    text.add_text("ganq", json.dumps(facts))
    with Image.open(path) as image:
        image.save(target, pnginfo=text)
    return target


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 7},
        {"micro_batch": 3, "noise_std": 0.8, "truncation": 1.5},
        {"keep": 2, "of": 6},
        {"reject": 0.5},
        {"interpolate": (3, 9), "frames": 6},
        {"seeds": ((2, 3), (90, 90))},
    ],
    ids=lambda options: ",".join(options),
)
def test_each_image_is_made_again_byte_for_byte(ganq: "Ganq", make: Make, options: dict[str, Any]) -> None:
    made = make(**options)
    for path in (made[0], made[-1]):
        said = ganq("remake", path, "--out", path.with_suffix(".again"))
        assert said.code == 0, said.err
        assert "the same bytes" in said.out
        assert path.with_suffix(".again").read_bytes() == path.read_bytes()


def test_without_a_passport_the_bytes_are_those_of_the_last_release(ganq: "Ganq", make: Make) -> None:
    assert not GenerateSpec.from_json({"source": 1, "count": 1}).passport, "a stored spec has none"
    plain, with_one = make(passport=False, folder="plain"), make(folder="new", weights=2)
    for path in plain:
        with Image.open(path) as image:
            assert path.read_bytes() == encode_png(np.asarray(image))
    assert "has no passport" in ganq("remake", plain[0]).err
    assert with_one[0].stat().st_size > plain[0].stat().st_size


def test_a_file_that_an_editor_saved_has_the_same_pixels(ganq: "Ganq", make: Make, tmp_path: Path) -> None:
    said = ganq("remake", again(make()[1], tmp_path / "saved.png"))
    assert said.code == 0
    assert "the same pixels; image 1 of job 1" in said.out
    assert "the pixels are equal; another program" in said.out


def test_changed_pixels_are_counted(ganq: "Ganq", make: Make, tmp_path: Path) -> None:
    edited = again(make()[0], tmp_path / "edited.png")
    passport = read_passport(edited.read_bytes(), "x")
    text = PngImagePlugin.PngInfo()
    text.add_text("ganq", json.dumps(passport))
    with Image.open(edited) as image:
        red, green, blue = cast("tuple[int, int, int]", image.getpixel((3, 4)))
        image.putpixel((3, 4), (red ^ 1, green, blue))
        image.save(edited, pnginfo=text)
        image.resize((32, 32)).save(tmp_path / "larger.png", pnginfo=text)
    said = ganq("remake", edited)
    assert said.code == 1
    assert "the pixels were changed after the image was generated: 1 of 256, by at most 1 of 255" in said.out
    assert "32×32 pixels, generated were 16×16" in ganq("remake", tmp_path / "larger.png").out


def test_the_fact_that_differs_is_named(ganq: "Ganq", make: Make, tmp_path: Path) -> None:
    path = make(seed=3)[0]
    make(weights=2, folder="other")

    def other_seed(facts: dict[str, Any]) -> None:
        facts["spec"]["seed"] = 4

    def other_build(facts: dict[str, Any]) -> None:
        other_seed(facts)
        facts["build"]["torch"] = "1.0"

    said = ganq("remake", again(path, tmp_path / "a.png", other_seed))
    assert said.code == 1
    assert "index, seed or options in the passport are not those" in said.out
    assert (
        "another build: torch 1.0 is now 2."
        in ganq("remake", again(path, tmp_path / "b.png", other_build)).out
    )
    said = ganq("remake", path, "--from", "m2")
    assert said.code == 1
    assert "the checkpoint is another one (job 2, epoch" in said.out
    assert ganq("remake", path, "--json").json()["same_bytes"] is True


def test_files_that_cannot_be_made_again_say_why(ganq: "Ganq", make: Make, tmp_path: Path) -> None:
    path = make()[0]

    def unknown(facts: dict[str, Any]) -> None:
        facts["checkpoint"] = "0" * 64

    def hostile(facts: dict[str, Any]) -> None:
        facts["spec"]["out"] = "/etc"

    def newer(facts: dict[str, Any]) -> None:
        facts["version"] = 2

    def damaged(facts: dict[str, Any]) -> None:
        facts["index"] = "7"

    for change, told in (
        (unknown, "no checkpoint of this job table has the SHA-256 000000000000…"),
        (hostile, "there is no option 'out' of a generation"),
        (newer, "is of a newer ganq"),
        (damaged, "is damaged"),
    ):
        said = ganq("remake", again(path, tmp_path / "x.png", change))
        assert said.code != 0
        assert told in said.err
    with Image.open(path) as image:
        image.save(tmp_path / "x.jpg")
    assert "is no PNG" in ganq("remake", tmp_path / "x.jpg").err
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:-100])
    assert ganq("remake", tmp_path / "cut.png").code != 0
    assert "cannot be read" in ganq("remake", tmp_path / "none.png").err
