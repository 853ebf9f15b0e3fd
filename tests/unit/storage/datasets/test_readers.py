"""What users of other tools have met in data sets: each kind with files that are like it."""

import io
import json
import os
import struct
import tarfile
import unicodedata
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pytest
from PIL import Image

from jobs.errors import DatasetError
from storage.datasets.cache import check, open_images
from storage.datasets.decode_pool import Decoded, decode_all
from storage.datasets.names import class_depth
from storage.datasets.sources import Reading, scan
from storage.datasets.summary import Summary, of_listing

if TYPE_CHECKING:
    from storage.volume.layout import Volume

OLD = Reading(reader=1, keep_duplicates=True)


def noise(seed: int, size: tuple[int, int] = (30, 24)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, format: str, **how: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def png(seed: int = 0) -> bytes:
    return encoded(noise(seed), "PNG")


def decoded(data: bytes, reading: Reading | None = None, size: int = 16) -> Decoded:
    return next(decode_all([(0, data)], size=size, workers=1, reading=reading))


def pixels(answer: Decoded, size: int = 16) -> np.ndarray:
    assert answer.reason is None, answer.facts
    return np.frombuffer(answer.pixels, np.uint8).reshape(3, size, size)


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # ZipInfo cuts names at a zero, and leaves backslashes here
            out.writestr(info, data)
    return path


# --- metadata does not decide about pixels ------------------------------------------------------


def tiff_tags(*tags: tuple[int, int, int, int]) -> bytes:
    """EXIF of these (tag, type, count, value), in the order given."""
    entries = b"".join(struct.pack("<HHI", *tag[:3]) + struct.pack("<HH", tag[3], tag[3]) for tag in tags)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


def white_on_top(format: str, exif: bytes, **how: object) -> bytes:
    image = Image.new("RGB", (40, 40))
    image.paste((255, 255, 255), (0, 0, 40, 10))
    return encoded(image, format, exif=exif, **how)


@pytest.mark.parametrize(
    "tags",
    [
        [(0x0100, 3, 2, 7), (0x0112, 3, 1, 6)],  # ImageWidth of two values
        [(0x0112, 3, 1, 6), (0x0128, 3, 2, 2)],  # ResolutionUnit of two values
        [(0x0112, 3, 2, 6)],  # the orientation itself of two values
        [(0x0112, 3, 1, 6), (0x9003, 2, 4, 0xFFFF)],  # a date that is no text
    ],
)
@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_an_image_is_turned_though_other_tags_of_its_exif_are_malformed(tags: Any, format: str) -> None:
    data = white_on_top(format, tiff_tags(*tags))
    answer = decoded(data, size=40)
    assert answer.facts["notes"] == ["turned by EXIF"]
    assert pixels(answer, 40)[0, :, 31:].min() > 200, "the stripe lies at the right"


def chunk(kind: bytes, data: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


@pytest.mark.parametrize(
    "odd",
    [
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(1_300_000))),
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_300_000))),
        chunk(b"zTXt", b"a\0\7unknown compression"),
        chunk(b"tEXt", b"Comment\0hello", crc=1),
        chunk(b"pHYs", b"\0\0"),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_300_000))),
        chunk(b"gAMA", b""),
    ],
    ids=[
        "long text",
        "long packed text",
        "unknown packing",
        "wrong checksum",
        "cut pHYs",
        "huge iCCP",
        "gAMA",
    ],
)
@pytest.mark.parametrize("behind", [False, True], ids=["before the pixels", "behind them"])
def test_a_png_is_used_whatever_its_metadata_are(odd: Any, behind: bool) -> None:
    whole = png(3)
    at = len(whole) - 12 if behind else 33
    answer = decoded(whole[:at] + odd + whole[at:])
    assert np.array_equal(pixels(answer), pixels(decoded(whole)))


def test_a_png_with_a_wrong_checksum_of_its_pixels_is_still_broken() -> None:
    whole = bytearray(png(3))
    whole[60] ^= 1
    assert decoded(bytes(whole)).reason == "broken or truncated"


# --- one rule for names -------------------------------------------------------------------------


def names_and_classes(source: Path) -> tuple[list[str], tuple[str, ...]]:
    listing = scan(source)
    return listing.names, listing.classes()


def test_backslashes_separate_folders_in_a_zip_a_tar_and_a_folder(tmp_path: Path, volume: "Volume") -> None:
    files = {
        f"faces\\{kind}\\{i}.png": png(10 * (kind == "sad") + i) for kind in ("glad", "sad") for i in (1, 2)
    }
    windows = zipped(tmp_path / "w.zip", {"faces\\": b"", **files})
    plain = zipped(tmp_path / "p.zip", {name.replace("\\", "/"): data for name, data in files.items()})
    with tarfile.open(tmp_path / "w.tar", "w") as out:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    folder = tmp_path / "unzipped"  # as unzip leaves it on Linux
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    opened = [open_images(volume, str(source), 16) for source in (windows, plain, tmp_path / "w.tar", folder)]
    assert {one.classes for one in opened} == {("glad", "sad")}
    assert all(np.array_equal(one.images_N3HW, opened[0].images_N3HW) for one in opened)
    assert scan(windows, OLD).classes() == ()


def test_names_of_composed_and_decomposed_characters_are_one_class(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        folder = tmp_path / unicodedata.normalize(form, "Zoë")
        folder.mkdir()
        (folder / f"{form}.png").write_bytes(png())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.png").write_bytes(png(2))
    listing = scan(tmp_path)
    assert listing.classes() == ("Zoë", "other")
    assert [listing.class_of(name) for name in listing.names] == ["Zoë", "Zoë", "other"]


def test_two_files_whose_names_differ_in_their_form_alone_are_both_read(
    tmp_path: Path, volume: "Volume"
) -> None:
    forms: tuple[Literal["NFC", "NFD"], ...] = ("NFC", "NFD")
    for seed, form in enumerate(forms):
        (tmp_path / unicodedata.normalize(form, "é.png")).write_bytes(png(seed))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.png").write_bytes(png(2))
    (tmp_path / "a\\b.png").write_bytes(png(3))
    assert len(open_images(volume, str(tmp_path), 16)) == 4


def test_a_zip_of_macos_with_utf_8_that_it_does_not_declare_has_readable_classes(
    tmp_path: Path, volume: "Volume"
) -> None:
    path = tmp_path / "a.zip"
    files = {f"{kind}/{i}.png": png(i) for i, kind in enumerate(("Zoo", "cat"))}
    zipped(path, files)
    path.write_bytes(path.read_bytes().replace(b"Zoo/", "Z\u00fc/".encode()))
    assert open_images(volume, str(path), 16).classes == ("Zü", "cat")


def test_what_systems_add_is_no_image(tmp_path: Path) -> None:
    for name in ("__MACOSX/._1.png", "cats/@eaDir/1.png/SYNO.jpg", "cats/.thumbs/1.png", "lost+found/1.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png())
    (tmp_path / "cats" / "1.png").write_bytes(png())
    assert scan(tmp_path).names == ["cats/1.png"]
    (tmp_path / "cats" / "1.png").rename(tmp_path / "1.png")
    packed = zipped(
        tmp_path / "a.zip",
        {"faces/1.png": png(), "faces/__MACOSX/2.png": png(), "__MACOSX/faces/._1.png": b""},
    )
    assert scan(packed).names == ["faces/1.png"]


@pytest.mark.parametrize(
    ("names", "depth"),
    [
        (["a/1.png", "b/1.png"], 0),
        (["faces/a/1.png", "faces/b/1.png"], 1),
        (["train/a/1.png", "train/b/1.png", "val/a/2.png"], 1),
        (["data/Train/a/1.png", "data/TEST/b/1.png"], 2),
        (["train/1.png", "val/2.png"], None),
        (["train/1.png", "truck/2.png"], 0),
        (["a/1.png", "2.png"], None),
        (["00000/img00000000.png", "00001/img00001999.png"], None),
        (["00000/00000.png", "69000/69999.png"], None),
        (["00000/a.png", "00001/b.png"], 0),
        (["0/1.png", "9/2.png"], 0),
    ],
)
def test_packaging_is_no_class(names: list[str], depth: Any) -> None:
    assert class_depth(names) == depth


# --- amounts ------------------------------------------------------------------------------------


TAR_MODES: dict[str, Literal["w:gz", "w:xz", "w:bz2"]] = {
    "tar.gz": "w:gz",
    "tar.xz": "w:xz",
    "tar.bz2": "w:bz2",
}


@pytest.mark.parametrize("kind", ["zip", *TAR_MODES])
def test_bitmaps_that_shrink_a_thousand_times_are_read_from_an_archive(
    tmp_path: Path, volume: "Volume", kind: str
) -> None:
    path = tmp_path / f"shapes.{kind}"
    files = {}
    for i in range(6):
        image = Image.new("RGB", (640, 640), (255, 255, 255))
        image.paste((200, 10 * i, 0), (i, i, 300, 300))
        files[f"{i}.bmp"] = encoded(image, "BMP")
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name, data in files.items():
                out.writestr(name, data)
    else:
        with tarfile.open(path, TAR_MODES[kind]) as out:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
    assert path.stat().st_size * 100 < 6 * 1_228_854
    assert len(open_images(volume, str(path), 16)) == 6


# --- depth of 16 bits ---------------------------------------------------------------------------


def deep(most: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, most + 1, (24, 30), dtype=np.uint16))


def deep_colours(most: int) -> bytes:
    """A PNG of 16 bits for each colour, which Pillow cannot write."""
    values = np.random.default_rng(0).integers(0, most + 1, (24, 30, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 30, 24, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize(
    "data",
    [
        encoded(deep(4095), "PNG"),
        encoded(deep(4095), "TIFF"),
        encoded(Image.fromarray(np.full((24, 30), 4095, np.int32)), "TIFF"),
        deep_colours(4095),
    ],
    ids=["grey PNG", "grey TIFF", "TIFF of 32 bits", "colour PNG"],
)
def test_values_of_12_bits_are_noticed_and_can_be_scaled(data: Any, tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(data)
    (said,) = [line for line in check(tmp_path).lines() if "--white-level" in line]
    depth = check(tmp_path).depth
    assert depth is not None
    _, high = depth
    assert f"to {high:g} of 65535" in said
    assert 3900 <= high <= 4095
    plain, scaled = (pixels(decoded(data, Reading(white_level=level))).mean() for level in (0, 4095))
    assert plain < 17
    assert scaled > 100
    assert not [
        one
        for one in check(tmp_path, reading=Reading(white_level=4095)).lines(white_level=4095)
        if "--w" in one
    ]


def test_floats_need_a_white_level_and_have_one(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(np.full((24, 30), 0.5, np.float32)), "TIFF")
    assert decoded(data).reason == "floating-point pixels, with no range given"
    assert pixels(decoded(data, Reading(white_level=1.0))).tolist() == np.full((3, 16, 16), 128).tolist()


def test_the_whole_range_of_16_bits_is_not_reported(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(deep(65535), "PNG"))
    assert not [line for line in check(tmp_path).lines() if "--white-level" in line]


def test_a_cache_of_another_white_level_is_not_taken(tmp_path: Path, volume: "Volume") -> None:
    (tmp_path / "data").mkdir()
    for i in range(2):
        (tmp_path / "data" / f"{i}.png").write_bytes(encoded(deep(4095, i), "PNG"))
    levels = (0, 4095, 2000, 0, 4095)
    means = [
        float(
            open_images(
                volume, str(tmp_path / "data"), 16, reading=Reading(white_level=level)
            ).images_N3HW.mean()
        )
        for level in levels
    ]
    assert means[0] == means[3] < means[1] == means[4] < means[2]


# --- images that are not square -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "corner", "edge"),
    [("crop", 0, 0), ("pad", 0, 200), ("stretch", 200, 200)],
)
def test_an_oblong_image_is_cropped_padded_or_stretched(fit: str, corner: int, edge: int) -> None:
    image = Image.new("RGB", (48, 16))  # black, with the left third and the right third in grey
    for left in (0, 32):
        image.paste((200, 200, 200), (left, 0, left + 16, 16))
    square = pixels(decoded(encoded(image, "PNG"), Reading(fit=fit)))
    assert square.shape == (3, 16, 16)
    assert square[0, 0, 0] == corner
    assert square[0, 8, 1] == edge
    assert square[0, 8, 8] == 0, "the centre"


def test_a_cache_of_another_fit_is_not_taken_and_the_default_has_the_cache_of_before(
    tmp_path: Path, volume: "Volume"
) -> None:
    (tmp_path / "data").mkdir()
    for i in range(2):
        (tmp_path / "data" / f"{i}.png").write_bytes(png(i))
    found = [
        open_images(volume, str(tmp_path / "data"), 16, reading=Reading(fit=fit))
        for fit in ("crop", "pad", "stretch", "crop", "pad")
    ]
    assert found[0].fingerprint == open_images(volume, str(tmp_path / "data"), 16).fingerprint
    assert len({one.fingerprint for one in found}) == 3
    assert found[1].fingerprint == found[4].fingerprint
    assert len({one.images_N3HW.tobytes() for one in found}) == 3


def test_images_that_are_not_square_are_counted_with_what_happens_to_them(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(noise(i, (24, 24) if i else (30, 24)), "PNG"))
    found = check(tmp_path)
    assert found.oblong == 1
    (line,) = [line for line in found.lines() if line.startswith("fit: ")]
    assert line.startswith("fit: 1 of 3 files are not square: their centre is used (--fit crop); --fit pad")
    (line,) = [line for line in found.lines(fit="pad") if line.startswith("fit: ")]
    assert line.endswith("black bars are added (--fit pad)")


# --- nothing is lost in silence -----------------------------------------------------------------


def test_a_class_behind_a_link_out_of_the_folder_counts_with_all_its_images(
    tmp_path: Path, volume: "Volume"
) -> None:
    elsewhere = tmp_path / "elsewhere"
    for kind, folder in (("a", tmp_path / "data"), ("b", tmp_path / "data"), ("c", elsewhere)):
        (folder / kind).mkdir(parents=True)
        for i in range(4):
            (folder / kind / f"{i}.png").write_bytes(png(100 * ord(kind) + i))
    (tmp_path / "data" / "c").symlink_to(elsewhere / "c")
    with pytest.raises(DatasetError, match=r"4 of 12 images .* 4 × link out of the folder"):
        open_images(volume, str(tmp_path / "data"), 16)
    assert check(tmp_path / "data").image_count == 12


def test_a_link_inside_the_folder_is_followed_and_a_circle_ends(tmp_path: Path, volume: "Volume") -> None:
    (tmp_path / ".pool" / "c").mkdir(parents=True)
    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / ".pool" / "c" / f"{i}.png").write_bytes(png(i))
        (tmp_path / "a" / f"{i}.png").write_bytes(png(10 + i))
    (tmp_path / "cats").symlink_to(tmp_path / ".pool" / "c")
    (tmp_path / ".pool" / "c" / "round").symlink_to(tmp_path)
    images = open_images(volume, str(tmp_path), 16)
    assert images.classes == ("a", "cats")
    assert images.labels_N is not None
    assert images.labels_N.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_link_to_a_folder_beside_it_is_no_class_of_its_own(tmp_path: Path, volume: "Volume") -> None:
    for kind in ("blue", "red"):
        (tmp_path / kind).mkdir()
        for i in range(3):
            (tmp_path / kind / f"{i}.png").write_bytes(png(10 * ord(kind[0]) + i))
    (tmp_path / "alias").symlink_to("red")
    images = open_images(volume, str(tmp_path), 16)
    assert images.classes == ("blue", "red")
    assert len(images) == 6
    (left,) = scan(tmp_path).skipped
    assert (left.name, left.reason, left.images) == ("alias", "link to a folder that is read already", 0)


def test_a_folder_that_cannot_be_read_refuses_the_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "1.png").write_bytes(png())
    listed = os.scandir

    def scandir(path: str) -> object:
        if path.endswith("closed"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DatasetError, match="closed cannot be read: permission denied"):
        scan(tmp_path)
    assert scan(tmp_path, OLD).names == ["1.png"]


@pytest.mark.parametrize(
    ("format", "suffix"),
    [
        *(("AVIF", "avif"), ("JPEG2000", "jp2"), ("PPM", "ppm"), ("TGA", "tga"), ("QOI", "qoi")),
        *(("ICNS", "icns"), ("ICO", "ico"), ("PCX", "pcx"), ("SGI", "sgi"), ("DDS", "dds"), ("DIB", "dib")),
    ],
)
def test_every_format_that_pillow_decodes_is_read(format: Any, suffix: Any, tmp_path: Path) -> None:
    image = noise(1, (32, 32))
    (tmp_path / f"a.{suffix}").write_bytes(encoded(image, format))
    found = check(tmp_path)
    assert (found.usable, found.reasons.total()) == (1, 0)
    assert found.formats == {format: 1}


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.HEIC", HEIC, "HEIC is not read"),
        ("a.jpg", HEIC, "HEIC is not read"),
        ("a.jxl", b"\xff\x0a", "JPEG XL is not read"),
        ("a.NEF", b"II*\0", "camera raw is not read"),
        ("a.svg", b"<svg/>", "vector graphics is not read"),
    ],
)
def test_a_format_that_is_not_read_is_named_and_counted(
    name: str, data: Any, reason: str, tmp_path: Path, volume: "Volume"
) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DatasetError, match=f"1 of 4 images .* 1 × {reason}") as caught:
        open_images(volume, str(tmp_path), 16)
    assert "--max-skip 0.26" in str(caught.value.hint)
    assert len(open_images(volume, str(tmp_path), 16, max_skip=0.3)) == 3


def test_names_alone_say_what_will_be_left_out_and_how_to_use_it(tmp_path: Path) -> None:
    for i in range(2):
        (tmp_path / f"{i}.heic").write_bytes(HEIC)
        (tmp_path / f"{i}.png").write_bytes(png(i))
    (line,) = of_listing(scan(tmp_path)).lines()
    assert line == "left out: 2 × HEIC is not read; to use HEIC, convert it: magick mogrify -format jpg FILES"


# --- colours ------------------------------------------------------------------------------------

SRGB = ((0.436, 0.222, 0.014), (0.385, 0.717, 0.097), (0.143, 0.061, 0.714))
P3 = ((0.515, 0.241, -0.001), (0.292, 0.692, 0.042), (0.157, 0.067, 0.784))
ADOBE = ((0.610, 0.311, 0.019), (0.205, 0.626, 0.061), (0.149, 0.063, 0.745))


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def profile(colours: tuple[tuple[float, ...], ...], gamma: float, space: bytes = b"RGB ") -> bytes:
    """A small ICC profile: columns of a matrix and a gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + fixed(0.9642) + fixed(1) + fixed(0.8249)
    tags = {b"wtpt": white, b"desc": b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(79)}
    if space == b"RGB ":
        for key, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), colours, strict=True):
            tags[key] = b"XYZ " + bytes(4) + b"".join(map(fixed, column))
        tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    else:
        tags[b"kTRC"] = curve
    table, body = struct.pack(">I", len(tags)), b""
    at = 128 + 4 + 12 * len(tags)
    for key, data in tags.items():
        data += bytes(-len(data) % 4)
        table += key + struct.pack(">II", at + len(body), len(data))
        body += data
    head = struct.pack(">I", at + len(body)) + bytes(4) + struct.pack(">I", 0x02100000) + b"mntr" + space
    head += b"XYZ " + bytes(12) + b"acsp" + bytes(28) + fixed(0.9642) + fixed(1) + fixed(0.8249)
    return head.ljust(128, b"\0") + table + body


@pytest.mark.parametrize(
    ("colours", "gamma"),
    [(P3, 2.2), (ADOBE, 2.2), (SRGB, 1.0), (SRGB[::-1], 2.2)],
    ids=["Display P3", "Adobe RGB", "linear", "swapped primaries"],
)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_colour_profiles_are_converted_to_srgb(colours: Any, gamma: float, format: str) -> None:
    from PIL import ImageCms

    icc = profile(colours, gamma)
    how = (
        {"quality": 100, "subsampling": 0}
        if format == "JPEG"
        else {"lossless": True}
        if format == "WEBP"
        else {}
    )
    image = Image.new("RGB", (16, 16), (200, 120, 60))
    answer = decoded(encoded(image, format, icc_profile=icc, **how))
    assert answer.facts["notes"] == ["colour profile converted to sRGB"]
    expected = ImageCms.profileToProfile(image, io.BytesIO(icc), ImageCms.createProfile("sRGB"))
    assert expected is not None
    assert np.abs(pixels(answer)[:, 8, 8].astype(int) - expected.getpixel((8, 8))).max() <= 3
    assert np.abs(pixels(answer)[:, 8, 8].astype(int) - (200, 120, 60)).max() > 6
    assert (
        np.abs(
            pixels(decoded(encoded(image, format, icc_profile=icc, **how), OLD))[0].astype(int) - 200
        ).max()
        < 3
    )


def test_srgb_under_another_name_and_broken_profiles_change_no_bit() -> None:
    from PIL import ImageCms

    plain = pixels(decoded(png(1)))
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (srgb, srgb[:200], b"x" * 500, profile(SRGB, 1.0, b"GRAY")):
        answer = decoded(encoded(noise(1), "PNG", icc_profile=icc))
        assert np.array_equal(pixels(answer), plain)
        assert "changed" not in answer.facts


def test_profiles_of_grey_transparent_and_palette_images_are_converted() -> None:
    linear_grey, linear = profile(SRGB, 1.0, b"GRAY"), profile(SRGB, 1.0)
    grey = encoded(Image.new("L", (16, 16), 55), "PNG", icc_profile=linear_grey)
    assert pixels(decoded(grey)).mean() > 100
    clear = Image.new("RGBA", (16, 16), (55, 55, 55, 255))
    clear.paste((0, 0, 0, 0), (0, 0, 8, 16))
    found = pixels(decoded(encoded(clear, "PNG", icc_profile=linear)))
    assert found[0, 0, 0] == 255
    assert found[0, 0, 15] > 100
    palette = encoded(Image.new("RGB", (16, 16), (55, 55, 55)).quantize(4), "PNG", icc_profile=linear)
    assert pixels(decoded(palette)).mean() > 100


@pytest.mark.parametrize("make", ["RGB", "L", "1", "quality"])
def test_a_data_set_without_colour_is_noticed(make: str, tmp_path: Path) -> None:
    for i in range(5):
        grey = noise(i).convert("L")
        if make == "quality":
            grey.convert("RGB").save(tmp_path / f"{i}.jpg", quality=40)
        else:
            grey.convert(make).save(tmp_path / f"{i}.png")
    assert "5 of 5 images are grey: --grey" in "\n".join(check(tmp_path).lines())
    noise(9).save(tmp_path / "colour.png")
    assert "grey" not in "\n".join(check(tmp_path).lines())


# --- labels and copies --------------------------------------------------------------------------


def stylegan(path: Path, labels: object, folder: str = "") -> Path:
    files = {f"{folder}0000{i // 2}/img{i:08d}.png": png(i) for i in range(4)}
    return zipped(path, {**files, f"{folder}dataset.json": json.dumps({"labels": labels}).encode()})


NAMES = [f"0000{i // 2}/img{i:08d}.png" for i in range(4)]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (list(zip(NAMES, [1, 0, 1, 0], strict=True)), ("0", "1"), [1, 0, 1, 0]),
        (list(zip(NAMES, [10, 2, 10, 2], strict=True)), ("2", "10"), [1, 0, 1, 0]),
        (list(zip(NAMES, [[0, 1], [1, 0], [0, 1], [1, 0]], strict=True)), ("0", "1"), [1, 0, 1, 0]),
        (list(zip(NAMES, [[0.5, -1.2]] * 4, strict=True)), (), None),
        (None, (), None),
    ],
    ids=["numbers", "numbers in order", "vectors", "camera angles", "none"],
)
@pytest.mark.parametrize("kind", ["zip", "folder", "tar"])
def test_labels_of_stylegan_are_the_classes(
    labels: Any, classes: Any, numbers: Any, kind: str, tmp_path: Path, volume: "Volume"
) -> None:
    source = stylegan(tmp_path / "a.zip", labels, "ffhq/" if kind == "tar" else "")
    if kind != "zip":
        with zipfile.ZipFile(source) as packed:
            packed.extractall(tmp_path / "out")
        source = tmp_path / "out"
    if kind == "tar":
        with tarfile.open(tmp_path / "a.tar", "w") as out:
            out.add(source, ".")
        source = tmp_path / "a.tar"
    images = open_images(volume, str(source), 16)
    assert images.classes == classes
    assert (None if images.labels_N is None else images.labels_N.tolist()) == numbers


def test_images_without_a_label_leave_no_classes_and_are_counted(tmp_path: Path) -> None:
    listing = scan(stylegan(tmp_path / "a.zip", list(zip(NAMES[:3], [0, 1, 0], strict=True))))
    assert (listing.classes(), listing.unlabelled()) == ((), 1)


def test_a_dataset_json_of_another_program_is_ignored(tmp_path: Path) -> None:
    files = {f"{kind}/{i}.png": png(i) for kind in ("a", "b") for i in range(2)}
    for text in ("[]", '{"labels": 3}', "{torn", '{"info": {}}', "[" * 100_000):
        listing = scan(zipped(tmp_path / "a.zip", {**files, "dataset.json": text.encode()}))
        assert listing.classes() == ("a", "b")


def test_copies_are_named_and_left_out_unless_they_are_asked_for(tmp_path: Path, volume: "Volume") -> None:
    for i in range(6):
        (tmp_path / f"{i}.png").write_bytes(png(i % 3))
    found: list[Summary] = []
    images = open_images(volume, str(tmp_path), 16, found=found.append)
    assert (len(images), found[0].copies) == (3, 3)
    assert "left out: 3 files with the bytes of another (--keep-duplicates uses them)" in found[0].lines()
    assert check(tmp_path).copy_of == {"3.png": "0.png", "4.png": "1.png", "5.png": "2.png"}
    assert len(open_images(volume, str(tmp_path), 16, reading=Reading(keep_duplicates=True))) == 6
    for name in ("3.png", "4.png", "5.png"):
        (tmp_path / name).unlink()
    assert open_images(volume, str(tmp_path), 16).fingerprint == images.fingerprint


# --- what stored jobs have ----------------------------------------------------------------------


def test_a_data_set_without_any_such_case_has_the_cache_of_ganq_0_2(tmp_path: Path, volume: "Volume") -> None:
    for kind in ("a", "b"):
        (tmp_path / "data" / kind).mkdir(parents=True)
    for i in range(4):
        (tmp_path / "data" / "ab"[i % 2] / f"{i}.png").write_bytes(png(i))
    Image.new("RGB", (40, 30), (9, 90, 200)).save(
        tmp_path / "data" / "a" / "t.jpg", exif=tiff_tags((0x0112, 3, 1, 6))
    )
    Image.fromarray(np.full((24, 30), 40000, np.uint16)).save(tmp_path / "data" / "a" / "deep.png")
    Image.new("RGBA", (24, 30), (9, 200, 9, 40)).save(tmp_path / "data" / "b" / "clear.webp")
    old = open_images(volume, str(tmp_path / "data"), 16, reading=OLD)
    folder = volume.dataset(old.fingerprint)
    index = json.loads((folder / "index.json").read_text())
    assert index.pop("reader") == 1
    before = (folder / "images.u8").stat()
    new = open_images(volume, str(tmp_path / "data"), 16)
    assert new.fingerprint == old.fingerprint
    assert (folder / "images.u8").stat() == before, "it is not made again"
    assert len(list(volume.datasets.iterdir())) == 1
    again: list[int] = []
    open_images(volume, str(tmp_path / "data"), 16, progress=lambda done, total: again.append(done))
    assert set(again) == {0}, "and now it is known to be right for both"


def test_where_the_readers_differ_each_has_its_cache(tmp_path: Path, volume: "Volume") -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(noise(i), "PNG", icc_profile=profile(P3, 2.2)))
    for first, second in ((OLD, Reading()), (Reading(), OLD)):
        one = open_images(volume, str(tmp_path), 16, reading=first)
        two = open_images(volume, str(tmp_path), 16, reading=second)
        assert one.fingerprint != two.fingerprint
        assert not np.array_equal(one.images_N3HW, two.images_N3HW)
    assert len(list(volume.datasets.iterdir())) == 2


def test_a_stored_job_keeps_its_classes_though_folders_are_packaging_now(
    tmp_path: Path, volume: "Volume"
) -> None:
    for i, kind in enumerate(("train", "val")):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "1.png").write_bytes(png(i))
    new = open_images(volume, str(tmp_path), 16)
    assert new.classes == ()
    assert open_images(volume, str(tmp_path), 16, reading=OLD).classes == ("train", "val")
    assert open_images(volume, str(tmp_path), 16).fingerprint == new.fingerprint
