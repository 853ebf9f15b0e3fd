"""
What is looked at before a job is accepted: cheap checks, so that a wrong path is known now.

Nothing is decoded here; the data set's own reader has the last word, on the worker.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.ui import output
from jobs.class_checks import no_classes, require_enough
from jobs.errors import DatasetError, NotFoundError, SpecError
from jobs.networks.layout import balanced_widths, check_frozen, layers, widths  # no torch comes with it
from jobs.specs import FEATURE_NETWORKS, TrainSpec, size_plan
from storage.settings import Settings

if TYPE_CHECKING:
    from storage.datasets.sources import Listing, Reading

LOOKED_AT, LOOKED_AT_MOST = 16, 500
"""Images that are opened to learn their size: so many usable ones, of so many."""
WEIGHTS = (".pth", ".pt", ".safetensors")


# --- the data set -------------------------------------------------------------------------


def find_data(settings: Settings, given: str | None) -> str:
    """
    The data set to train on: as given, else GANQ_DATA, else the one last made or used.

    Returns:
        Its absolute path.

    Raises:
        SpecError: none of them; the hint names both ways out.
        NotFoundError: there is nothing at that path.
    """
    if given is not None and not given.strip():
        raise SpecError("--data is empty", hint="name a folder, zip or tar of pictures")
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
        raise NotFoundError(
            f"there is no data set at {path}" + ("" if source == "--data" else f" ({source})"),
            hint="--data DIR names a folder, zip or tar of pictures; ganq dataset make draws one",
        )
    raise SpecError(
        "there is no data set to train on yet",
        hint="--data DIR names your pictures, or draw some: ganq dataset make",
    )


def last_data(settings: Settings) -> str | None:
    """The data set that was made or used last on this machine."""
    try:
        return (settings.home / "last-data").read_text().strip() or None
    except OSError:
        return None


def remember_data(settings: Settings, path: str) -> None:
    """Make this data set the default of the next `ganq submit train`; best effort."""
    target = settings.home / "last-data"
    temp = target.with_name(f".last-data-{os.getpid()}")
    try:
        temp.write_text(path + "\n")
        temp.replace(target)
    except (OSError, UnicodeError):  # the current folder may have any name
        temp.unlink(missing_ok=True)


def reading_of(spec: Mapping[str, Any]) -> "Reading":
    """Return how a job with these options reads its data set."""
    from storage.datasets.sources import Reading

    return Reading.of_spec(spec)


def count_images(path: str, reading: "Reading") -> int:
    """
    Return how many files are images by their name, in a folder, zip or tar; none is opened.

    Raises:
        DatasetError: neither of the three, or it cannot be read.
    """
    from storage.datasets.sources import scan

    return len(scan(Path(path), reading).names)


def notice_data(listing: "Listing", *, classes: bool) -> None:
    """
    Print what a job will leave out by the names alone, and the classes that it will learn.

    Args:
        classes: whether it learns them.
    """
    from storage.datasets.summary import of_listing

    found = of_listing(listing)
    if not classes:
        found.classes = {}
    for line in found.lines():
        output.notice(output.clean(line))
    ignored = {suffix: count for suffix, count in listing.ignored.items() if suffix != "(hidden)"}
    if ignored:
        total, kinds = sum(ignored.values()), ", ".join(sorted(ignored)[:6])
        output.notice(output.clean(f"{output.count(total, 'file')} ignored, no images by name: {kinds}"))


def find_feature_network(given: dict[str, Any]) -> None:
    """
    Make absolute the path of a feature network, and its sha-256 as a spec has it, in place.

    Raises:
        NotFoundError: neither a network that ganq brings along nor a file.
    """
    network = given.get("feature_network")
    if network is not None and network not in FEATURE_NETWORKS:
        path = Path(network).expanduser().absolute()
        if not path.is_file():
            raise NotFoundError(
                f"--feature-network {network[:200]}: there is no such network, and no such file",
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

    from storage.datasets.cache import no_images
    from storage.datasets.decode_pool import decode_all
    from storage.datasets.sources import UnreadableError, open_reader, scan

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
            if sides.total() == LOOKED_AT or answer.number >= LOOKED_AT_MOST:
                break
    if not sides:
        raise DatasetError(
            f"no image in {path} can be used ({first})", hint=f"ganq dataset check {path} lists them"
        )
    return sides.most_common(1)[0][0]


def check_training(spec: TrainSpec) -> "Listing":
    """
    Refuse what would fail on the worker's first minute.

    Returns:
        What is in the data set, by names.

    Raises:
        DatasetError: fewer pictures than one batch.
        NotFoundError, SpecError: starting weights that are not there, or no weights.
    """
    from storage.datasets.cache import no_images, require_enough
    from storage.datasets.sources import scan

    listing = scan(Path(spec.data), reading_of(spec.to_json()))
    found = len(listing.names)
    if found == 0:
        raise no_images(listing)
    require_enough(listing, found, listing.skipped, spec.max_skip)
    if found < spec.batch:
        raise DatasetError(
            f"{spec.data} holds {found} picture{'s' * (found != 1)}, fewer than one batch of {spec.batch}",
            hint=f"--batch {found} at most, or add pictures" if found > 1 else "add pictures",
        )
    if spec.conditional:
        _check_classes(listing)
    for option, weights in (("--init-netg", spec.init_netg), ("--init-netd", spec.init_netd)):
        if weights is None:
            continue
        if not Path(weights).is_file():
            raise NotFoundError(f"{option}: there is no file {weights}", hint="check the path")
        if not weights.lower().endswith(WEIGHTS):
            raise SpecError(
                f"{option}: {weights} is no weight file by its name", hint=f"it ends in {', '.join(WEIGHTS)}"
            )
    return listing


def check_frozen_layers(spec: TrainSpec) -> None:
    """
    Raises:
        SpecError: a network would have nothing to learn.
    """
    of_g, of_d = layers(spec.arch, spec.size)
    check_frozen("--freeze-g", spec.freeze_g, of_g)
    check_frozen("--freeze-d", spec.freeze_d, of_d)


def _check_classes(listing: "Listing") -> None:
    """
    Raises:
        DatasetError: no classes, or one with a single picture.
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


# --- what it will cost --------------------------------------------------------------------


def weights_of(size: int, nz: int, ngf: int, ndf: int, norm_d: str, arch: str = "dcgan") -> tuple[int, int]:
    """
    Numbers that the two networks hold, buffers included, without building them.

    Returns:
        (generator, discriminator)
    """
    _, triple = size_plan(size)
    factors = widths(size)
    if arch == "resnet":
        return _residual_weights([ngf * one for one in factors], [ndf * one for one in factors], nz, triple)
    edge = 25 if triple else 16
    per_norm = 4  # weight, bias, running mean and variance of each channel
    generator, channels = 0, nz
    for factor in balanced_widths(size) if arch == "balanced" else factors:
        generator += channels * ngf * factor * 16 + per_norm * ngf * factor + 1
        channels = ngf * factor
    generator += (9 * channels + 1) * 3 * (9 if triple else 4) if arch == "balanced" else channels * 3 * edge
    spectral = norm_d == "spectral"
    discriminator, channels = 0, 3
    for place, factor in enumerate(reversed(factors)):
        kernel = edge if place == 0 else 16
        out = ndf * factor
        discriminator += channels * out * kernel
        if spectral:  # bias, and the power iteration's u and v
            discriminator += 2 * out + channels * kernel
        elif norm_d == "none":
            discriminator += out
        elif place > 0:
            discriminator += per_norm * out + 1
        channels = out
    discriminator += channels * 16 + 1
    if spectral:
        discriminator += 1 + channels * 16
    return generator, discriminator


def _residual_weights(g: list[int], d: list[int], nz: int, triple: bool) -> tuple[int, int]:
    """
    Args:
        g, d: channels of each, from the 4×4 picture outwards.
    """
    pixels = 3 * (9 if triple else 4)

    def blocks(channels: list[int]) -> int:
        """Two 1×1, a grouped 3×3 and two biases for each, and the 1×1 between neighbours."""
        inside = sum(2 * c * c + 9 * c * (16 if c % 16 == 0 else c) + 2 * c for c in channels)
        return inside + sum(a * b for a, b in pairwise(channels))

    generator = nz * g[0] * 16 + blocks(g) + (9 * g[-1] + 1) * pixels
    discriminator = 9 * pixels * d[-1] + blocks(d) + 16 * d[0] + d[0]
    return generator, discriminator


def checkpoint_bytes(spec: TrainSpec) -> int:
    """
    Bytes of one checkpoint, about: the state (both networks, two moments of Adam each,
    the moving average) and beside it what generation needs.
    """
    generator, discriminator = weights_of(spec.size, spec.nz, spec.ngf, spec.ndf, spec.norm_d, spec.arch)
    average = generator if spec.ema_half_life_kimg > 0 else 0
    return 4 * (3 * (generator + discriminator) + average + generator + discriminator)


def checkpoints_kept(spec: TrainSpec) -> int:
    """Checkpoints on disk at most: the last ones, every keep_every-th, the final, a resume point."""
    saved = spec.epochs // spec.save_every
    apart = spec.epochs // spec.keep_every if spec.keep_every else 0
    return min(saved, spec.keep_last + apart) + 2


def training_plan(spec: TrainSpec, pictures: int) -> dict[str, int]:
    """
    What a run will do: steps of each network, pictures that D sees, bytes on disk.

    Args:
        pictures: files that are pictures by their name.
    """
    batches = pictures // spec.batch
    kept = checkpoints_kept(spec)
    return {
        "pictures": pictures,
        "batches_per_epoch": batches,
        "steps_d": spec.epochs * -(-batches // spec.d_every),
        "steps_g": spec.epochs * -(-batches // spec.g_every),
        "pictures_shown": spec.epochs * batches * spec.batch,
        "sample_grids": spec.epochs // spec.save_every,
        "checkpoints_kept": kept,
        "checkpoint_bytes": checkpoint_bytes(spec),
        "bytes_on_disk": kept * checkpoint_bytes(spec) + pictures * 3 * spec.size**2,
    }
