"""`ganq dataset`: check images before training, draw a demo data set, list decoded data sets."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from cli.ui import output
from cli.ui.lazy import Entry, LazyGroup, examples
from cli.ui.params import NonEmptyPath
from cli.ui.progress import progress
from jobs.errors import SpecError

COMMANDS = (
    Entry("check", "cli.dataset:check", "Check the images of a data set."),
    Entry("make", "cli.dataset:make", "Draw a data set of cartoon faces."),
    Entry("list", "cli.dataset:list_", "List the decoded data sets on the volume."),
)

MAX_SKIPPED_SHOWN, MAX_COPIES_SHOWN = 20, 10
TITLES = ("classes: ", "left out: ", "converted: ", "fit: ")
MAX_SKIP = "Maximum fraction of images that are left out."
WHITE_LEVEL = "Value of white in grey images of 16 bits or floats.  [default: 65535]"
UNPACKED = "Maximum unpacked size of an archive in gigabytes."


@click.group(cls=LazyGroup, entries=COMMANDS)
def dataset() -> None:
    """Check, draw and list data sets."""


@click.command(epilog=examples("ganq dataset check faces/", "ganq dataset check faces.zip --json"))
@click.argument("data", type=NonEmptyPath(path_type=Path))
@click.option("--max-skip", type=click.FloatRange(0, 1), default=0.05, show_default=True, help=MAX_SKIP)
@click.option("--white-level", type=click.FloatRange(0, 2**32), default=0.0, help=WHITE_LEVEL)
@click.option("--max-unpacked-gb", type=click.FloatRange(0), default=100.0, show_default=True, help=UNPACKED)
@output.json_option
def check(data: Path, max_skip: float, white_level: float, max_unpacked_gb: float, as_json: bool) -> int:
    """
    Open every image of DATA (folder, zip or tar) as training would, and print a report.

    Reports counts, sizes, modes, formats, conversions, duplicate files, and each file that is
    left out with the reason. Exit code 1 if more than --max-skip are left out.
    """
    from storage.datasets.cache import check as check_images
    from storage.datasets.sources import Reading
    from storage.datasets.summary import describe_ignored

    reading = Reading(white_level=white_level, max_unpacked_gb=max_unpacked_gb)
    with progress("checking", "images") as update:
        found = check_images(data.absolute(), reading=reading, progress=update)
    left_out = found.reasons.total()
    passed = found.usable > 0 and left_out <= max_skip * found.images
    if as_json:
        output.print_json(found.to_json())
        return 0 if passed else 1
    images = output.count(found.image_count, "image")
    click.echo(f"{found.source} ({found.kind}): {images}, {found.usable} usable")
    for title, counts in (("sizes", found.sizes), ("modes", found.modes), ("formats", found.formats)):
        if counts:
            click.echo(f"  {title:10}" + _top_counts(counts.most_common()))
    for line in found.lines(white_level=white_level):
        title, _, rest = line.partition(": ") if line.startswith(TITLES) else ("note", "", line)
        click.echo(f"  {title:10}{output.clean(rest)}")
    for line in describe_ignored(found.ignored):
        click.echo(f"  {'ignored':10}{output.clean(line)}")
    for file in found.skipped[:MAX_SKIPPED_SHOWN]:
        detail = f" ({output.clean(file.detail)})" if file.detail else ""
        click.echo(f"  left out  {output.clean(file.name)}: {file.reason}{detail}")
    for copy, original in list(found.copy_of.items())[:MAX_COPIES_SHOWN]:
        click.echo(f"  copy      {output.clean(copy)} of {output.clean(original)}")
    hidden = max(len(found.skipped) - MAX_SKIPPED_SHOWN, 0) + max(len(found.copy_of) - MAX_COPIES_SHOWN, 0)
    if hidden:
        click.echo(f"  … and {hidden} more; --json lists all")
    if not found.usable:
        output.notice("no file can be used; are these images?")
    elif not passed:
        share = min(left_out / found.images + 0.01, 1.0)
        output.notice(f"more than {max_skip:.0%} cannot be used: repair them, or use --max-skip {share:.2f}")
    return 0 if passed else 1


def _top_counts(counts: list[tuple[str, int]]) -> str:
    shown = ", ".join(f"{output.clean(name)}: {count}" for name, count in counts[:6])
    return shown + (f", {len(counts) - 6} others" if len(counts) > 6 else "")


def _print_styles(as_json: bool) -> None:
    from storage.datasets.synthetic import styles

    if as_json:
        output.print_json([vars(style) for style in styles()])
        return
    rows = [(s.name, s.title, s.creator, s.licence, s.source) for s in styles()]
    output.print_table(["STYLE", "TITLE", "ARTIST", "LICENCE", "SOURCE"], rows)


@click.command(
    epilog=examples(
        "ganq dataset make",
        "ganq dataset make faces --style big-smile --count 5000",
        "ganq dataset make --styles",
    )
)
@click.argument("folder", type=NonEmptyPath(path_type=Path), required=False)
@click.option("--style", default="adventurer", show_default=True, help="Drawing style; --styles lists them.")
@click.option("--count", type=int, default=2000, show_default=True, help="Number of faces.")
@click.option("--size", type=int, default=96, show_default=True, help="Side in pixels.")
@click.option("--seed", type=int, default=0, show_default=True, help="Random seed.")
@click.option(
    "--styles",
    "list_styles",
    is_flag=True,
    help="List the styles with their artists and licences.",
)
@output.json_option
def make(
    folder: Path | None, style: str, count: int, size: int, seed: int, list_styles: bool, as_json: bool
) -> None:
    """
    Draw cartoon faces into FOLDER and make it the default data set of `ganq submit train`.

    The styles are works of artists under free licences; ATTRIBUTION.txt in the folder names
    them.  [default folder: GANQ_HOME/pictures/STYLE-COUNT]
    """
    if list_styles:
        _print_styles(as_json)
        return
    from cli.session import clean_up_on_sigterm
    from ganq.submission.preflight import remember_data
    from storage.datasets.synthetic import make_faces, styles
    from storage.settings import Settings

    clean_up_on_sigterm()
    settings = Settings.load()
    target = (folder or settings.home / "pictures" / f"{style}-{count}").absolute()
    before = len(list(target.glob("face-*.png")))
    with progress("drawing", "faces") as update:
        make_faces(target, style=style, count=count, size=size, seed=seed, progress=update)
    remember_data(settings, str(target))
    if before > count:
        output.notice(f"they replace the {before} faces that were there; --count {before} draws those again")
    drawn = next(each for each in styles() if each.name == style)
    facts: dict[str, Any] = {"folder": str(target), "count": count, "size": size, "seed": seed, **vars(drawn)}
    if as_json:
        output.print_json(facts)
        return
    click.echo(f"{count} faces in {target}")
    click.echo(f"{drawn.title} by {drawn.creator}, {drawn.licence}")
    click.echo(
        f"next: ganq submit train --epochs 100{_train_options(size, count)}   (--data is now this folder)"
    )


def _train_options(size: int, count: int) -> str:
    """Return the options that a training on these images needs because of their size and number."""
    from jobs.recipes import DEFAULT_RECIPE
    from jobs.specs import TrainSpec, size_plan

    defaults = TrainSpec.create(data="/", recipe=DEFAULT_RECIPE)
    options = ""
    with suppress(SpecError):
        size_plan(size)
        options += f" --size {size}" if size != defaults.size else ""
    return options + (f" --batch {count}" if 2 <= count < defaults.batch else "")


@click.command("list", epilog=examples("ganq dataset list"))
@output.json_option
def list_(as_json: bool) -> None:
    """List the decoded data sets on the volume, oldest first."""
    from storage.datasets.cache import list_datasets
    from storage.reachable import require_answer
    from storage.settings import Settings
    from storage.volume.layout import Volume

    require_answer(root := Settings.load().volume)
    found = list_datasets(Volume(root))
    if as_json:
        output.print_json(found)
        return
    if not found:
        output.notice("no data set is decoded yet; the first training on a data set decodes it")
        return
    rows = [
        (
            entry["fingerprint"][:12],
            str(entry["count"]),
            f"{entry['size']}×{entry['size']}",
            f"{entry['bytes'] / 1e6:.0f} MB",
            entry["source"],
        )
        for entry in found
    ]
    output.print_table(["FINGERPRINT", "IMAGES", "SIZE", "BYTES", "SOURCE"], rows)
