"""Images of every kind come in, broken ones are left out with the reason, and the cache is found again."""

import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from jobs.context import GeneratedImage
from jobs.errors import (
    DatasetError,
    DiskFullError,
    NotFoundError,
    StopRequested,
    StorageError,
    VolumeError,
)
from storage.datasets import cache
from storage.datasets.cache import check, list_datasets, open_cached, open_images
from storage.datasets.checksums import BLOCK_BYTES, BlockChecksums, read_checksums
from storage.datasets.decode_pool import decode_all
from storage.datasets.sources import Reading, UnreadableError, open_reader, scan
from storage.results.writer import ImageFiles

if TYPE_CHECKING:
    from storage.volume.layout import Volume

RED = (200, 30, 40)


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Twenty different sound images."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for i in range(20):
        noise_image(i).save(folder / f"{i:03d}.png")
    return folder


def noise_image(seed: int, size: tuple[int, int] = (30, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be huge, and is."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    squeezer = zlib.compressobj(9)
    row = squeezer.compress(b"\0" * (1 + width // 8))
    body = row + b"".join(squeezer.compress(b"\0" * (1 + width // 8)) for _ in range(height - 1))
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", body + squeezer.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# --- what comes out ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(96, 96), (120, 90), (77, 201), (50, 40), (97, 96)])
def test_pixels_are_those_of_torchvisions_resize_and_centre_crop(
    size: Any, volume: "Volume", tmp_path: Path
) -> None:
    from torchvision import transforms

    folder = tmp_path / "one"
    folder.mkdir()
    original = noise_image(1, size)
    original.save(folder / "a.png")
    images = open_images(volume, str(folder), 48)
    expected = transforms.Compose([transforms.Resize(48), transforms.CenterCrop(48)])(original)
    assert np.array_equal(images.images_N3HW[0], np.asarray(expected).transpose(2, 0, 1))


def converted(folder: Path, name: str, image: Image.Image, **how: Any) -> NDArray[np.float64]:
    """The mean colour that ganq makes of an image."""
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **how)
    decoded = next(decode_all([(0, (folder / name).read_bytes())], size=16, workers=1))
    assert decoded.reason is None, decoded.facts
    mean_3: NDArray[np.float64] = np.frombuffer(decoded.pixels, np.uint8).reshape(3, -1).mean(axis=1)
    return mean_3


def test_transparency_is_composed_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (20, 20), (*RED, 0))
    assert converted(tmp_path, "clear.png", clear).tolist() == [255, 255, 255]
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, *RED])
    assert converted(tmp_path, "p.png", palette, transparency=1).tolist() == [255, 255, 255]
    assert converted(tmp_path, "q.png", palette).tolist() == list(RED)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    grey = Image.fromarray(np.full((20, 20), 32768, np.uint16))
    assert converted(tmp_path, "deep.png", grey).tolist() == [128, 128, 128]


def test_grey_and_cmyk_become_rgb(tmp_path: Path) -> None:
    assert converted(tmp_path, "grey.png", Image.new("L", (20, 20), 77)).tolist() == [77, 77, 77]
    red = converted(tmp_path, "c.jpg", Image.new("CMYK", (20, 20), (0, 255, 255, 0)), quality=95)
    assert red[0] > 200
    assert red[1] < 60


def test_an_image_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 40), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 40, 10))  # a white stripe at the top
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    decoded = next(decode_all([(0, buffer.getvalue())], size=40, workers=1))
    pixels = np.frombuffer(decoded.pixels, np.uint8).reshape(3, 40, 40)
    assert pixels[0, :10].max() == 0
    assert pixels[0, 30:].min() == 255


def test_only_the_first_frame_of_a_gif_is_used(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 20), colour) for colour in (RED, (0, 255, 0))]
    mean = converted(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert np.abs(mean - RED).max() < 8


# --- what is left out -------------------------------------------------------------------------


def test_broken_images_are_left_out_and_reported(faces: Path, volume: "Volume") -> None:
    (faces / "a-empty.png").touch()
    (faces / "b-text.png").write_text("<html>not an image</html>")
    whole = (faces / "001.png").read_bytes()
    (faces / "c-torn.png").write_bytes(whole[: len(whole) // 2])
    noise_image(1, (4, 40)).save(faces / "d-tiny.png")
    (faces / "e-bomb.png").write_bytes(bomb(20_000, 20_000))
    (faces / "notes.txt").write_text("no image, and none is claimed")
    images = open_images(volume, str(faces), 16, max_skip=0.3)
    assert len(images) == 20
    report = json.loads((volume.dataset(images.fingerprint) / "report.json").read_text())
    reasons = {one["name"]: one["reason"] for one in report["skipped"]}
    assert set(reasons) == {"a-empty.png", "b-text.png", "c-torn.png", "d-tiny.png", "e-bomb.png"}
    assert reasons["a-empty.png"] == "empty file"
    assert "megapixels" in reasons["e-bomb.png"]
    assert report["ignored"] == {".txt": 1}


def test_too_many_broken_images_refuse_the_data_set_and_leave_nothing(faces: Path, volume: "Volume") -> None:
    for i in range(5):
        (faces / f"broken{i}.png").write_bytes(b"no")
    with pytest.raises(DatasetError) as caught:
        open_images(volume, str(faces), 16)
    assert "5 of 25" in caught.value.message
    assert "--max-skip 0.21" in (caught.value.hint or "")
    assert list(volume.datasets.iterdir()) == []


def test_a_folder_without_images_is_a_clear_error(tmp_path: Path, volume: "Volume") -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").touch()
    with pytest.raises(DatasetError, match="no images"):
        open_images(volume, str(tmp_path / "empty"), 16)
    with pytest.raises(NotFoundError):
        open_images(volume, str(tmp_path / "nowhere"), 16)
    with pytest.raises(DatasetError, match="not a folder, zip or tar"):
        open_images(volume, str(tmp_path / "empty" / "readme.md"), 16)


def test_pipes_devices_and_links_that_lead_away_are_left_out(
    faces: Path, volume: "Volume", tmp_path: Path
) -> None:
    os.mkfifo(faces / "pipe.png")
    outside = tmp_path / "outside.png"
    noise_image(99).save(outside)
    (faces / "away.png").symlink_to(outside)
    (faces / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (faces / "loop").symlink_to(faces)
    (faces / "inside.png").symlink_to(faces / "001.png")
    listing = scan(faces)
    assert "inside.png" in listing.names
    assert {one.name for one in listing.skipped} == {"pipe.png", "away.png", "nowhere.png", "loop"}
    with pytest.raises(DatasetError, match="link"):
        open_images(volume, str(faces), 16)
    assert len(open_images(volume, str(faces), 16, reading=Reading(keep_duplicates=True), max_skip=0.2)) == 21


def test_a_pipe_that_takes_a_files_place_does_not_hang_the_reader(faces: Path) -> None:
    listing = scan(faces)
    (faces / "005.png").unlink()
    os.mkfifo(faces / "005.png")
    with open_reader(listing, faces) as reader, pytest.raises(UnreadableError):
        reader.read("005.png")


def test_a_decoder_that_dies_costs_one_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from storage.datasets import decode_pool

    real = decode_pool.Decoder._ask

    def murderous(self: Any, number: Any, data: Any, size: Any) -> Any:
        if number == 3:
            process = self._ensure()
            process.kill()
            # It dies under the question, not before it, or a new one would be started at once.
            with monkeypatch.context() as patch:
                patch.setattr(self, "_ensure", lambda: process)
                return real(self, number, data, size)
        return real(self, number, data, size)

    monkeypatch.setattr(decode_pool.Decoder, "_ask", murderous)
    buffer = io.BytesIO()
    noise_image(1).save(buffer, "PNG")
    answers = list(decode_all([(n, buffer.getvalue()) for n in range(8)], size=16, workers=1))
    assert [one.number for one in answers if one.reason] == [3]
    assert "decoder" in (answers[3].reason or "")


def test_a_decoder_that_hangs_costs_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.datasets import decode_pool

    monkeypatch.setattr(decode_pool, "WALL_SECONDS", 1.0)
    monkeypatch.setattr(decode_pool, "WATCH_SECONDS", 0.1)
    real = decode_pool.Decoder._ask

    def sleepy(self: Any, number: Any, data: Any, size: Any) -> Any:
        if number == 3:
            os.kill(self._ensure().pid, signal.SIGSTOP)
        return real(self, number, data, size)

    monkeypatch.setattr(decode_pool.Decoder, "_ask", sleepy)
    buffer = io.BytesIO()
    noise_image(1).save(buffer, "PNG")
    answers = list(decode_all([(n, buffer.getvalue()) for n in range(8)], size=16, workers=1))
    assert [one.number for one in answers if one.reason] == [3]


def test_a_decoder_that_is_killed_once_costs_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    from storage.datasets import decode_pool

    real = decode_pool.Decoder._ask
    killed: list[int] = []

    def unlucky(self: Any, number: Any, data: Any, size: Any) -> Any:
        if number == 3 and not killed:
            killed.append(number)
            os.kill(self._ensure().pid, signal.SIGKILL)
        return real(self, number, data, size)

    monkeypatch.setattr(decode_pool.Decoder, "_ask", unlucky)
    buffer = io.BytesIO()
    noise_image(1).save(buffer, "PNG")
    answers = list(decode_all([(n, buffer.getvalue()) for n in range(8)], size=16, workers=1))
    assert killed
    assert not [one for one in answers if one.reason]


def test_decoders_that_cannot_start_are_not_the_images_fault(
    faces: Path, volume: "Volume", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(StorageError, match="does not start"):
        open_images(volume, str(faces), 16)
    assert list(volume.datasets.iterdir()) == []


def test_a_stop_while_decoding_leaves_neither_files_nor_processes(faces: Path, volume: "Volume") -> None:
    def stop(done: int, total: int) -> None:
        if done == 2:
            raise StopRequested("cancel")

    with pytest.raises(StopRequested):
        open_images(volume, str(faces), 16, workers=2, progress=stop)
    assert list(volume.datasets.iterdir()) == []
    left = [
        one
        for one in psutil.Process().children()
        if any("decode_worker.py" in part for part in one.cmdline())
    ]
    assert not left


# --- trees and archives -----------------------------------------------------------------------


def test_class_folders_become_labels_and_flat_folders_have_none(
    faces: Path, volume: "Volume", tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    for name in ("cats", "dogs"):
        (tree / name).mkdir(parents=True)
        for i in range(3):
            noise_image(i + len(name) * (name == "dogs")).save(tree / name / f"{i}.png")
    images = open_images(volume, str(tree), 16)
    assert images.classes == ("cats", "dogs")
    assert images.labels_N is not None
    assert images.labels_N.tolist() == [0, 0, 0, 1, 1, 1]
    assert open_images(volume, str(faces), 16).classes == ()


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_gives_the_same_images_as_its_folder(
    kind: str, faces: Path, volume: "Volume", tmp_path: Path
) -> None:
    archive = tmp_path / f"faces.{kind}"
    names = sorted(faces.iterdir(), reverse=True)  # the archive's own order must not matter
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as out:
            for name in names:
                out.write(name, name.name)
    else:
        with tarfile.open(archive, "w:gz" if kind == "tar.gz" else "w") as out:
            for name in names:
                out.add(name, name.name)
    packed, plain = open_images(volume, str(archive), 16), open_images(volume, str(faces), 16)
    assert packed.fingerprint == plain.fingerprint
    assert np.array_equal(packed.images_N3HW, plain.images_N3HW)
    assert not list(volume.datasets.glob(".unpack-*"))


def packed(path: Path, names: list[str], mode: Literal["w", "w:gz", "w:xz", "w:bz2"] = "w:gz") -> Path:
    with tarfile.open(path, mode) as out:
        for i, name in enumerate(names):
            buffer = io.BytesIO()
            noise_image(i).save(buffer, "PNG")
            info = tarfile.TarInfo(name)
            info.size = len(buffer.getvalue())
            out.addfile(info, io.BytesIO(buffer.getvalue()))
    return path


def test_a_tar_of_the_current_folder_has_the_same_names_and_classes(volume: "Volume", tmp_path: Path) -> None:
    flat = packed(tmp_path / "flat.tgz", ["./1.png", "./2.png"])
    assert open_images(volume, str(flat), 16).classes == ()
    tree = packed(tmp_path / "tree.tgz", ["./cats/1.png", "./dogs/2.png"])
    images = open_images(volume, str(tree), 16)
    assert images.classes == ("cats", "dogs")
    assert images.labels_N is not None
    assert images.labels_N.tolist() == [0, 1]
    assert check(tree).classes == {"cats": 1, "dogs": 1}


def test_the_one_folder_around_an_archive_is_no_class(volume: "Volume", tmp_path: Path) -> None:
    archive = packed(tmp_path / "w.tgz", ["faces/cats/1.png", "faces/dogs/2.png"])
    assert open_images(volume, str(archive), 16).classes == ("cats", "dogs")


@pytest.mark.parametrize("mode", ["w:gz", "w:xz", "w:bz2"])
def test_a_torn_archive_is_one_clear_line(
    mode: Literal["w:gz", "w:xz", "w:bz2"], volume: "Volume", tmp_path: Path
) -> None:
    whole = packed(tmp_path / "whole", [f"{i}.png" for i in range(40)], mode).read_bytes()
    (tmp_path / "torn").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError):
        open_images(volume, str(tmp_path / "torn"), 16)
    assert list(volume.datasets.iterdir()) == []


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_broken_member_of_a_zip_costs_one_image(method: Any, volume: "Volume", tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", method) as out:
        for i in range(30):
            buffer = io.BytesIO()
            noise_image(i).save(buffer, "PNG")
            out.writestr(f"{i:02d}.png", buffer.getvalue())
        offset = out.getinfo("05.png").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 40 : offset + 300] = b"\xff" * 260
    path.write_bytes(data)
    assert len(open_images(volume, str(path), 16)) == 29


def test_a_huge_header_in_a_tar_is_refused_unread(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 40 << 20
    (tmp_path / "a.tar").write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + b"\0" * (40 << 20))
    with pytest.raises(DatasetError, match="a header of"):
        scan(tmp_path / "a.tar")


def test_an_image_that_vanishes_while_it_is_read_refuses_the_data_set(
    faces: Path, volume: "Volume", monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cache._Source._digest

    def then_vanish(*given: Any) -> Any:
        digests = real(*given)
        (faces / "007.png").unlink()
        return digests

    monkeypatch.setattr(cache._Source, "_digest", then_vanish)
    with pytest.raises(DatasetError, match="changed while"):
        open_images(volume, str(faces), 16)
    assert list(volume.datasets.iterdir()) == []


def test_max_skip_holds_for_a_cache_that_another_job_made(faces: Path, volume: "Volume") -> None:
    for i in range(5):
        (faces / f"broken{i}.png").write_bytes(b"no")
    open_images(volume, str(faces), 16, max_skip=0.5)
    with pytest.raises(DatasetError, match="5 of 25"):
        open_images(volume, str(faces), 16)


def test_a_folder_of_links_that_lead_away_says_so(faces: Path, volume: "Volume", tmp_path: Path) -> None:
    away = tmp_path / "away"
    away.mkdir()
    for one in faces.iterdir():
        (away / one.name).symlink_to(one)
    with pytest.raises(DatasetError, match="20 × link out of the folder"):
        open_images(volume, str(away), 16)


def test_a_link_that_takes_a_files_place_is_not_followed_out(faces: Path, tmp_path: Path) -> None:
    listing = scan(faces)
    outside = tmp_path / "outside.png"
    noise_image(99).save(outside)
    (faces / "005.png").unlink()
    (faces / "005.png").symlink_to(outside)
    with open_reader(listing, faces) as reader, pytest.raises(UnreadableError):
        reader.read("005.png")


@pytest.mark.parametrize("index", ["[]", '{"count": 20, "size": 16}', "{torn"])
def test_a_cache_with_a_broken_index_is_made_again(index: str, faces: Path, volume: "Volume") -> None:
    first = open_images(volume, str(faces), 16)
    (volume.dataset(first.fingerprint) / "index.json").write_text(index)
    assert list_datasets(volume) == []
    assert len(open_images(volume, str(faces), 16)) == 20


def test_sound_pixels_under_broken_exif_are_used() -> None:
    buffer = io.BytesIO()
    broken = b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage"
    Image.new("RGB", (20, 20), RED).save(buffer, "JPEG", exif=broken)
    assert next(decode_all([(0, buffer.getvalue())], size=16, workers=1)).reason is None


@pytest.mark.parametrize("limit", [resource.RLIMIT_AS, resource.RLIMIT_CPU])
def test_decoders_work_under_the_limits_of_a_tighter_surrounding(limit: Any) -> None:
    code = (
        "import io, resource; from PIL import Image; from storage.datasets.decode_pool import decode_all\n"
        f"resource.setrlimit({int(limit)}, ({{v}}, {{v}}))\n"
        "b = io.BytesIO(); Image.new('RGB', (20, 20)).save(b, 'PNG')\n"
        "print(next(decode_all([(0, b.getvalue())], size=16, workers=1)).reason)"
    ).format(v=2 << 30 if limit == resource.RLIMIT_AS else 30)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_members_that_lead_out_of_an_archive_are_left_out(tmp_path: Path, volume: "Volume") -> None:
    buffer = io.BytesIO()
    noise_image(1).save(buffer, "PNG")
    data = buffer.getvalue()
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as out:
        for name in ("../up.png", "/abs.png", "a\\..\\b.png", "good.png"):
            out.writestr(name, data)
        link = zipfile.ZipInfo("link.png")
        link.external_attr = 0o120777 << 16
        out.writestr(link, "/etc/passwd")
    listing = scan(tmp_path / "evil.zip")
    assert listing.names == ["good.png"]
    assert len(listing.skipped) == 4
    with tarfile.open(tmp_path / "evil.tar", "w") as out:
        for name in ("../up.png", "good.png"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
        hard = tarfile.TarInfo("hard.png")
        hard.type, hard.linkname = tarfile.SYMTYPE, "/etc/passwd"
        out.addfile(hard)
    assert scan(tmp_path / "evil.tar").names == ["good.png"]
    assert len(open_images(volume, str(tmp_path / "evil.tar"), 16, max_skip=0.7)) == 1
    assert not (tmp_path / "up.png").exists()


def test_an_archive_bomb_is_refused_by_an_amount_with_the_option_that_lifts_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a.png", b"\0" * (50 << 20))
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as out:
        info = tarfile.TarInfo("a.png")
        info.size = 50 << 20
        out.addfile(info, io.BytesIO(b"\0" * info.size))
    for name in ("bomb.zip", "bomb.tar.gz"):
        with pytest.raises(DatasetError, match=r"unpacks to more than 0\.04 GB") as caught:
            scan(tmp_path / name, Reading(max_unpacked_gb=0.04))
        assert "--max-unpacked-gb 1 raises the limit" in str(caught.value.hint)
        assert scan(tmp_path / name).names == ["a.png"]


def test_a_job_of_0_2_still_leaves_out_what_unpacks_to_more_than_a_hundred_times_its_size(
    tmp_path: Path,
) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("a.png", b"\0" * (50 << 20))
    assert [one.reason for one in scan(tmp_path / "bomb.zip", Reading(reader=1)).skipped] == [
        "unpacks to more than 100 times its size"
    ]


# --- the cache --------------------------------------------------------------------------------


def test_a_second_look_decodes_nothing(faces: Path, volume: "Volume") -> None:
    calls: list[int] = []
    first = open_images(volume, str(faces), 16, progress=lambda done, total: calls.append(done))
    assert calls[-1] == 20
    calls.clear()
    again = open_images(volume, str(faces), 16, progress=lambda done, total: calls.append(done))
    assert set(calls) == {0}  # it says that it looks, and decodes none
    assert again.fingerprint == first.fingerprint


def test_the_cache_outlives_its_source(faces: Path, volume: "Volume") -> None:
    first = open_images(volume, str(faces), 16)
    for one in faces.iterdir():
        one.unlink()
    cached = open_cached(volume, first.fingerprint)
    assert cached is not None
    assert len(cached) == 20


@pytest.mark.parametrize("change", ["content", "name", "size"])
def test_another_content_name_or_size_is_another_fingerprint(
    change: str, faces: Path, volume: "Volume"
) -> None:
    first = open_images(volume, str(faces), 16)
    size = 16
    if change == "content":
        noise_image(1234).save(faces / "003.png")
    elif change == "name":
        (faces / "003.png").rename(faces / "0035.png")
    else:
        size = 24
    assert open_images(volume, str(faces), size).fingerprint != first.fingerprint


def test_a_cache_that_lost_bytes_is_made_again(faces: Path, volume: "Volume") -> None:
    first = open_images(volume, str(faces), 16)
    pixels = np.array(first.images_N3HW)
    with open(volume.dataset(first.fingerprint) / "images.u8", "r+b") as file:
        file.truncate(100)
    assert open_cached(volume, first.fingerprint) is None
    assert np.array_equal(open_images(volume, str(faces), 16).images_N3HW, pixels)


def zero_half(path: Path) -> None:
    """Half of a file becomes zeros, with the time and size that it had: what a disk does, not a person."""
    about = path.stat()
    with open(path, "r+b") as file:
        file.seek(about.st_size // 2)
        file.write(bytes(about.st_size - about.st_size // 2))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def swap_two_labels(path: Path) -> None:
    index = json.loads(path.read_text())
    index["labels"].reverse()
    path.write_text(json.dumps(index))


def change_a_checksum(path: Path) -> None:
    index = json.loads(path.read_text())
    index["checksums"]["crc32"][0] ^= 1
    path.write_text(json.dumps(index))


def lose_a_checksum(path: Path) -> None:
    index = json.loads(path.read_text())
    index["checksums"] = {"crc32": []}
    path.write_text(json.dumps(index))


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process remembers which files it has compared; a new one has compared none."""
    monkeypatch.setattr(cache, "_intact", type("Forgetful", (set,), {"add": lambda self, key: None})())


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("images.u8", zero_half, "1 of 1 blocks are not what was written, the first at byte 0"),
        ("index.json", swap_two_labels, "its index is not the one that was written"),
        ("index.json", change_a_checksum, "1 of 1 blocks are not"),
        ("index.json", lose_a_checksum, "its checksums are not those that were written"),
    ],
)
def test_a_cache_that_was_damaged_is_reported_and_made_again(
    faces: Path, volume: "Volume", tmp_path: Path, new_process: None, name: str, harm: Any, said: str
) -> None:
    tree = tmp_path / "tree"
    for number, kind in enumerate(("cats", "dogs")):
        (tree / kind).mkdir(parents=True)
        for i in range(20):
            noise_image(100 * number + i).save(tree / kind / f"{i:03d}.png")
    first = open_images(volume, str(tree), 16)
    pixels, labels = np.array(first.images_N3HW), first.labels_N
    folder = volume.dataset(first.fingerprint)
    harm(folder / name)
    heard: list[str] = []
    assert open_cached(volume, first.fingerprint, damaged=heard.append) is None
    again = open_images(volume, str(tree), 16, damaged=heard.append)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.images_N3HW, pixels)
    assert again.labels_N is not None
    assert labels is not None
    assert np.array_equal(again.labels_N, labels)
    assert len(heard) == 2
    assert all(str(folder) in one and said in one for one in heard)
    assert open_cached(volume, first.fingerprint, damaged=heard.append) is not None
    assert len(heard) == 2
    assert [one.name for one in volume.datasets.iterdir()] == [first.fingerprint]


def test_a_cache_is_read_once_by_a_process_and_again_when_it_changed(
    faces: Path, volume: "Volume", monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = open_images(volume, str(faces), 16).fingerprint
    read: list[int] = []

    def noted(*given: Any) -> Any:
        read.append(1)
        return read_checksums(*given)

    monkeypatch.setattr(cache, "read_checksums", noted)
    assert open_cached(volume, fingerprint) is not None
    assert not read
    os.utime(volume.dataset(fingerprint) / "images.u8")
    assert open_cached(volume, fingerprint) is not None
    assert open_cached(volume, fingerprint) is not None
    assert len(read) == 1


@pytest.mark.parametrize("writable", [True, False], ids=["writable", "read-only"])
def test_a_cache_of_the_last_release_is_used_and_gets_checksums(
    faces: Path, volume: "Volume", new_process: None, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    first = open_images(volume, str(faces), 16)
    path = volume.dataset(first.fingerprint) / "index.json"
    index = json.loads(path.read_text())
    del index["checksums"]  # as ganq 0.1.0 wrote it
    path.write_text(json.dumps(index))
    if not writable:
        refuse = VolumeError("cannot write", hint="")
        monkeypatch.setattr(cache, "write_json", lambda *given: (_ for _ in ()).throw(refuse))
    before = path.parent.joinpath("images.u8").stat()
    assert open_images(volume, str(faces), 16).fingerprint == first.fingerprint
    assert path.parent.joinpath("images.u8").stat() == before
    zero_half(path.parent / "images.u8")
    heard: list[str] = []
    opened = open_cached(volume, first.fingerprint, damaged=heard.append)
    assert (opened is None, len(heard)) == ((True, 1) if writable else (False, 0))


def test_the_last_release_reads_a_cache_with_checksums(faces: Path, volume: "Volume") -> None:
    """Its index has the keys that it had, with the same meaning."""
    fingerprint = open_images(volume, str(faces), 16).fingerprint
    index = json.loads((volume.dataset(fingerprint) / "index.json").read_text())
    old = {"format", "count", "size", "source", "names", "classes", "labels", "created_at"}
    assert index.keys() == old | {"checksums", "reader"}
    assert index["format"] == 1


@pytest.mark.parametrize("sizes", [[1], [BLOCK_BYTES], [BLOCK_BYTES - 1, 2, 3 * BLOCK_BYTES], [0, 7, 0]])
def test_checksums_of_a_stream_are_those_of_the_file(tmp_path: Path, sizes: Any) -> None:
    stream = BlockChecksums()
    with open(tmp_path / "a", "w+b") as file:
        for number, size in enumerate(sizes):
            data = bytes([number + 1]) * size
            file.write(data)
            stream.update(data)
        file.flush()
        assert read_checksums(file.fileno(), sum(sizes), lambda done, blocks: None) == stream.crc32


def test_a_run_that_is_to_stop_does_not_wait_for_the_checksums(tmp_path: Path) -> None:
    with open(tmp_path / "a", "w+b") as file:
        file.truncate(200 * BLOCK_BYTES)
        seen: list[int] = []

        def stop(done: int, blocks: int) -> None:
            seen.append(done)
            raise StopRequested("cancel")

        with pytest.raises(StopRequested):
            read_checksums(file.fileno(), 200 * BLOCK_BYTES, stop)
    assert seen == [1]


def test_readers_of_a_cache_that_is_made_again_see_all_of_it_or_nothing(
    faces: Path, volume: "Volume", tmp_path: Path, new_process: None
) -> None:
    first = open_images(volume, str(faces), 16)
    pixels = np.array(first.images_N3HW)
    images = volume.dataset(first.fingerprint) / "images.u8"
    ended = threading.Event()
    wrong: list[str] = []

    def look() -> None:
        while not ended.is_set():
            seen = open_cached(volume, first.fingerprint)
            if seen is not None and not np.array_equal(seen.images_N3HW, pixels):
                wrong.append("half")

    threads = [threading.Thread(target=look) for _ in range(2)]
    for one in threads:
        one.start()
    try:
        for _ in range(5):
            # Another file, because a reader may have mapped this one.
            shutil.copy(images, tmp_path / "damaged")
            zero_half(tmp_path / "damaged")
            os.replace(tmp_path / "damaged", images)
            assert np.array_equal(open_images(volume, str(faces), 16).images_N3HW, pixels)
    finally:
        ended.set()
        for one in threads:
            one.join()
    assert not wrong


def test_two_builders_at_once_end_with_one_whole_cache(faces: Path, volume: "Volume") -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(open_images(volume, str(faces), 16).fingerprint))
        for _ in range(4)
    ]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(found) == 4
    assert [one.name for one in volume.datasets.iterdir()] == [found[0]]


def test_a_cache_that_does_not_fit_is_refused_with_bytes_needed_and_free(
    faces: Path, volume: "Volume", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(DiskFullError) as caught:
        open_images(volume, str(faces), 16)
    assert "free" in caught.value.message
    assert list(volume.datasets.iterdir()) == []


@pytest.fixture
def result(tmp_path: Path) -> Callable[[str], Path]:
    """What a generation of five images has published in a format: images, a grid, a manifest."""

    def make(format: str) -> Path:
        folder = tmp_path / format
        folder.mkdir()
        sink = ImageFiles(folder, format=format, total=5)
        sink.add(
            GeneratedImage(np.full((8, 8, 3), number, np.uint8), {"draw": number, "seed": 0, "score": None})
            for number in range(5)
        )
        sink.add_grid("grid-0000", np.zeros((16, 24, 3), np.uint8))
        sink.publish()
        return folder

    return make


@pytest.mark.parametrize("format", ["png", "tar"])
def test_of_what_a_generation_made_its_images_are_taken_and_not_its_grids(
    result: Callable[[str], Path], format: str
) -> None:
    listing = scan(result(format))
    assert len(listing.names) == 5
    assert listing.classes() == ()


def test_images_in_an_npz_are_no_data_set_and_the_error_names_one(result: Callable[[str], Path]) -> None:
    with pytest.raises(DatasetError, match=r"pictures\.npz") as caught:
        scan(result("npz"))
    assert "--format png" in str(caught.value.hint)


def test_a_folder_of_ones_own_with_a_manifest_is_taken_whole(result: Callable[[str], Path]) -> None:
    folder = result("png")
    shutil.rmtree(folder / "grids")
    Image.new("RGB", (8, 8)).save(folder / "mine.png")
    assert len(scan(folder).names) == 6


def test_images_are_in_the_order_of_their_names(faces: Path, volume: "Volume") -> None:
    images = open_images(volume, str(faces), 24)
    for i in (0, 7, 19):
        with Image.open(faces / f"{i:03d}.png") as one:
            expected = np.asarray(one.crop((3, 0, 27, 24))).transpose(2, 0, 1)
        assert np.array_equal(images.images_N3HW[i], expected)


def test_the_list_names_source_count_and_size(faces: Path, volume: "Volume") -> None:
    open_images(volume, str(faces), 16)
    (one,) = list_datasets(volume)
    assert (one["source"], one["count"], one["size"], one["bytes"]) == (str(faces), 20, 16, 20 * 3 * 16 * 16)


def test_check_counts_files_that_are_copies_of_others(faces: Path) -> None:
    assert check(faces).copies == 0
    one = next(faces.glob("*.png")).read_bytes()
    for name in ("a.png", "b.png"):
        (faces / name).write_bytes(one)
    assert (check(faces).usable, check(faces).copies) == (22, 2)
    for name in ("x.png", "y.png"):
        (faces / name).write_bytes(b"no")
    assert check(faces).copies == 2, "what is left out is nobody's copy"


def test_check_counts_what_training_would_find(faces: Path) -> None:
    (faces / "x.png").write_bytes(b"no")
    Image.new("RGBA", (30, 24), (1, 2, 3, 4)).save(faces / "y.png")
    found = check(faces)
    assert (found.image_count, found.usable) == (22, 21)
    assert found.sizes["30×24"] == 21
    assert found.modes == {"RGB": 20, "RGBA": 1}
    assert [one.name for one in found.skipped] == ["x.png"]
