"""
Checks before a job is accepted, so that a wrong path is reported at once.

Images are not decoded here; the data set's reader checks them on the worker.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.class_checks import no_classes, require_enough
from jobs.errors import DatasetError, NotFoundError, SpecError
from jobs.networks.layout import check_frozen, layers  # does not import torch
from jobs.specs import FEATURE_NETWORKS, TrainSpec
from storage.settings import Settings
from storage.status.units import clean

if TYPE_CHECKING:
    from storage.datasets.sources import Listing, Reading

MIN_PROBED, MAX_PROBED = 16, 500
"""Images that are opened to learn their size: the first usable ones, among the first files."""
ON_SERVER = ("server:", "dataset:")
"""Prefixes of what is on a server: a path, or an uploaded data set."""
WEIGHT_SUFFIXES = (".pth", ".pt", ".safetensors")


# --- the data set -------------------------------------------------------------------------


def find_data(settings: Settings, given: str | None) -> str:
    """
    Return the absolute path of the data set: as given, GANQ_DATA, or the one used last.

    Raises:
        SpecError: there is none of them.
        NotFoundError: the path does not exist.
    """
    if given is not None and not given.strip():
        raise SpecError("--data is empty", hint="give a folder, zip or tar of images")
    for chosen, source in (
        (given, "--data"),
        (settings.data, "GANQ_DATA"),
        (last_data(settings), "the data set that was used last"),
    ):
        if not chosen:
            continue
        path = Path(chosen).expanduser().absolute()
        if path.exists():
            return str(path)
        if chosen.startswith(ON_SERVER):
            raise NotFoundError(
                f"this machine does not have {chosen[:200]}, which a dry run reads",
                hint="leave out --dry-run: the server checks the request before it submits anything",
            )
        raise NotFoundError(
            f"there is no data set at {path}" + ("" if source == "--data" else f" ({source})"),
            hint="--data DIR takes a folder, zip or tar of images; ganq dataset make draws a data set",
        )
    raise SpecError(
        "no data set is given",
        hint="--data DIR takes your images; ganq dataset make draws a data set",
    )


def last_data(settings: Settings) -> str | None:
    """Return the data set that was drawn or used last on this machine."""
    try:
        return (settings.home / "last-data").read_text().strip() or None
    except OSError:
        return None


def remember_data(settings: Settings, path: str) -> None:
    """Make this data set the default of `ganq submit train`; failures are ignored."""
    target = settings.home / "last-data"
    temp = target.with_name(f".last-data-{os.getpid()}")
    try:
        temp.write_text(path + "\n")
        temp.replace(target)
    except (OSError, UnicodeError):  # a path need not be valid Unicode
        temp.unlink(missing_ok=True)


def reading_of(spec: Mapping[str, Any]) -> "Reading":
    """Return how a job with these options reads its data set."""
    from storage.datasets.sources import Reading

    return Reading.of_spec(spec)


def count_images(path: str, reading: "Reading") -> int:
    """
    Return how many files are images by their name, in a folder, zip or tar; none is opened.

    Raises:
        DatasetError: it is none of these, or cannot be read.
    """
    from storage.datasets.sources import scan

    return len(scan(Path(path), reading).names)


def data_notices(listing: "Listing", *, classes: bool) -> list[str]:
    """
    Return what a job will leave out by the names alone, and the classes that it will learn.

    Args:
        classes: whether it learns them.
    """
    from storage.datasets.summary import describe_ignored, of_listing

    found = of_listing(listing)
    if not classes:
        found.classes = {}
    lines = list(found.lines())
    ignored = {suffix: number for suffix, number in listing.ignored.items() if suffix != "(hidden)"}
    lines += [f"ignored: {line}" for line in describe_ignored(ignored)]
    return [clean(line) for line in lines]


def find_feature_network(given: dict[str, Any]) -> None:
    """
    Make the path of a feature network absolute and normalise its SHA-256, in place.

    Raises:
        NotFoundError: it is neither a built-in network nor a file.
    """
    network = given.get("feature_network")
    if network is not None and network not in FEATURE_NETWORKS:
        path = Path(network).expanduser().absolute()
        if not path.is_file():
            raise NotFoundError(
                f"--feature-network {network[:200]} is neither a built-in network nor a file",
                hint=f"{' or '.join(FEATURE_NETWORKS)}, or the path of a weight file",
            )
        given["feature_network"] = str(path)
    if "feature_sha256" in given:
        given["feature_sha256"] = given["feature_sha256"].strip().lower()


def usual_side(path: Path, reading: "Reading") -> int:
    """
    Return the shorter side of the images at a path, in pixels: that of most of the first usable ones.

    Raises:
        DatasetError: there is none, or none can be used.
    """
    import tempfile

    from storage.datasets.decode_pool import decode_all
    from storage.datasets.sources import UnreadableError, open_reader, scan
    from storage.datasets.summary import no_images

    listing = scan(path, reading)
    if not listing.names:
        raise no_images(listing)
    sides: Counter[int] = Counter()
    first = ""

    def contents(reader: Any) -> Iterator[tuple[int, bytes]]:
        nonlocal first
        for number, name in enumerate(listing.names):
            try:
                yield number, reader.read(name)
            except UnreadableError as exc:
                first = first or f"{name}: {exc}"

    with open_reader(listing, Path(tempfile.gettempdir()), reading) as reader:
        for answer in decode_all(contents(reader), size=0, workers=1, reading=reading):
            if answer.reason is None:
                sides[min(answer.facts["width"], answer.facts["height"])] += 1
            else:
                first = first or f"{listing.names[answer.number]}: {answer.reason}"
            if sides.total() == MIN_PROBED or answer.number >= MAX_PROBED:
                break
    if not sides:
        raise DatasetError(
            f"no image in {path} can be used ({first})", hint=f"ganq dataset check {path} lists them"
        )
    return sides.most_common(1)[0][0]


def check_training(spec: TrainSpec) -> "Listing":
    """
    Refuse a training that would fail in its first minute; return the listing of its data set.

    Raises:
        DatasetError: fewer images than one batch.
        NotFoundError, SpecError: the initial weights do not exist, or are not weights.
    """
    from storage.datasets.sources import scan
    from storage.datasets.summary import no_images, require_enough

    listing = scan(Path(spec.data), reading_of(spec.to_json()))
    found = len(listing.names)
    if found == 0:
        raise no_images(listing)
    require_enough(listing, found, listing.skipped, spec.max_skip)
    if found < spec.batch:
        raise DatasetError(
            f"{spec.data} contains {found} image{'s' * (found != 1)}, fewer than one batch of {spec.batch}",
            hint=f"use --batch {found} or less, or add images" if found > 1 else "add images",
        )
    spec.check_progressive(found)
    if spec.conditional:
        _check_classes(listing)
    for option, weights in (("--init-netg", spec.init_netg), ("--init-netd", spec.init_netd)):
        if weights is None:
            continue
        if not Path(weights).is_file():
            raise NotFoundError(f"{option}: the file {weights} does not exist", hint="check the path")
    return listing


def check_frozen_layers(spec: TrainSpec) -> None:
    """
    Check --freeze-d and --freeze-g against the number of layers.

    Raises:
        SpecError: all layers of a network would be frozen.
    """
    of_g, of_d = layers(spec.arch, spec.size, spec.patch_size)
    check_frozen("--freeze-g", spec.freeze_g, of_g)
    check_frozen("--freeze-d", spec.freeze_d, of_d)


def _check_classes(listing: "Listing") -> None:
    """
    Check the class folders.

    Raises:
        DatasetError: no classes, or a class with a single image.
    """
    classes = listing.classes()
    if lacking := listing.unlabelled():
        raise DatasetError(
            f"the dataset.json of {listing.source} has no label for {lacking} of {len(listing.names)} images",
            hint="add the labels, or move the file away to learn the folders",
        )
    if len(classes) < 2:
        raise no_classes()
    found = Counter(listing.class_of(name) for name in listing.names)
    require_enough({name: found[name] for name in classes})
