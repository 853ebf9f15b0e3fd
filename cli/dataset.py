"""`ganq dataset`: check images before training, draw a demo set, list what is decoded."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from cli.ui import output
from cli.ui.lazy import Entry, LazyGroup, examples
from cli.ui.params import NamedPath
from cli.ui.progress import progress
from jobs.errors import SpecError

COMMANDS = (
    Entry("check", "cli.dataset:check", "Open every image and report what training would find."),
    Entry("make", "cli.dataset:make", "Draw cartoon faces to train on."),
    Entry("list", "cli.dataset:list_", "List the data sets that are decoded on the volume."),
)

SHOWN, COPIES_SHOWN = 20, 10
TITLES = ("classes: ", "left out: ", "converted: ")
MAX_SKIP = "Share of images that may be left out."
WHITE_LEVEL = "Value that becomes white in grey images of 16 bits or floats.  [default: 65535]"
UNPACKED = "What an archive may unpack to, in gigabytes."


@click.group(cls=LazyGroup, entries=COMMANDS)
def dataset() -> None:
    """Check, make and list data sets."""


@click.command(epilog=examples("ganq dataset check faces/", "ganq dataset check faces.zip --json"))
@click.argument("data", type=NamedPath(path_type=Path))
@click.option("--max-skip", type=click.FloatRange(0, 1), default=0.05, show_default=True, help=MAX_SKIP)
@click.option("--white-level", type=click.FloatRange(0, 2**32), default=0.0, help=WHITE_LEVEL)
@click.option("--max-unpacked-gb", type=click.FloatRange(0), default=100.0, show_default=True, help=UNPACKED)
@output.json_option
def check(data: Path, max_skip: float, white_level: float, max_unpacked_gb: float, as_json: bool) -> int:
    """
    Open every image of DATA (folder, zip or tar) as training would, and report.

    The report has counts, sizes and formats, what is converted on the way, copies of one file, and each
    file that would be left out with the reason. Exit code 1 if more than --max-skip would be.
    """
    from storage.datasets.cache import check as look
    from storage.datasets.sources import Reading

    reading = Reading(white_level=white_level, max_unpacked_gb=max_unpacked_gb)
    with progress("looking", "images") as tick:
        found = look(data.absolute(), reading=reading, progress=tick)
    bad = found.reasons.total()
    fine = found.usable > 0 and bad <= max_skip * found.pictures
    if as_json:
        output.print_json(found.to_json())
        return 0 if fine else 1
    click.echo(f"{found.source} ({found.kind}): {found.pictures} images, {found.usable} usable")
    for title, counts in (("sizes", found.sizes), ("modes", found.modes), ("formats", found.formats)):
        if counts:
            click.echo(f"  {title:10}" + _most(counts.most_common()))
    for line in found.lines(white_level=white_level):
        title, _, rest = line.partition(": ") if line.startswith(TITLES) else ("note", "", line)
        click.echo(f"  {title:10}{output.clean(rest)}")
    if found.ignored:
        total, suffixes = sum(found.ignored.values()), ", ".join(sorted(found.ignored)[:8])
        click.echo(f"  {'ignored':10}{output.count(total, 'file')}, no images by name ({suffixes})")
    for one in found.skipped[:SHOWN]:
        detail = f" ({output.clean(one.detail)})" if one.detail else ""
        click.echo(f"  left out  {output.clean(one.name)}: {one.reason}{detail}")
    for copy, of in list(found.copy_of.items())[:COPIES_SHOWN]:
        click.echo(f"  copy      {output.clean(copy)} of {output.clean(of)}")
    hidden = max(len(found.skipped) - SHOWN, 0) + max(len(found.copy_of) - COPIES_SHOWN, 0)
    if hidden:
        click.echo(f"  … and {hidden} more; --json lists all")
    if not fine:
        share = min(bad / found.pictures + 0.01, 1.0)
        output.notice(
            "none of them can be used: are these images?"
            if not found.usable
            else f"more than {max_skip:.0%} cannot be used: repair them, or --max-skip {share:.2f}"
        )
    return 0 if fine else 1


def _most(counts: list[tuple[str, int]]) -> str:
    shown = ", ".join(f"{output.clean(name)}: {count}" for name, count in counts[:6])
    return shown + (f", {len(counts) - 6} others" if len(counts) > 6 else "")


def _print_styles(as_json: bool) -> None:
    from storage.datasets.synthetic import styles

    if as_json:
        output.print_json([vars(one) for one in styles()])
        return
    rows = [(one.name, one.title, one.creator, one.licence, one.source) for one in styles()]
    output.print_table(["STYLE", "TITLE", "ARTIST", "LICENCE", "SOURCE"], rows)


@click.command(
    epilog=examples(
        "ganq dataset make",
        "ganq dataset make faces --style big-smile --count 5000",
        "ganq dataset make --styles",
    )
)
@click.argument("folder", type=NamedPath(path_type=Path), required=False)
@click.option("--style", default="adventurer", show_default=True, help="Whose drawing; --styles lists them.")
@click.option("--count", type=int, default=2000, show_default=True, help="How many faces.")
@click.option("--size", type=int, default=96, show_default=True, help="Side in pixels.")
@click.option("--seed", type=int, default=0, show_default=True, help="Another seed, other faces.")
@click.option(
    "--styles",
    "list_styles",
    is_flag=True,
    help="List the styles with their artists and licences, and leave.",
)
@output.json_option
def make(
    folder: Path | None, style: str, count: int, size: int, seed: int, list_styles: bool, as_json: bool
) -> None:
    """
    Draw cartoon faces into FOLDER and make it the default of `ganq submit train`.

    The styles are by artists, under licences that allow it; who drew them stands in
    ATTRIBUTION.txt beside the pictures.  [default folder: GANQ_HOME/pictures/STYLE-COUNT]
    """
    if list_styles:
        _print_styles(as_json)
        return
    from cli.session import leave_nothing_half_made
    from cli.submit.preflight import remember_data
    from storage.datasets.synthetic import make_faces, styles
    from storage.settings import Settings

    leave_nothing_half_made()
    settings = Settings.load()
    target = (folder or settings.home / "pictures" / f"{style}-{count}").absolute()
    with progress("drawing", "faces") as tick:
        make_faces(target, style=style, count=count, size=size, seed=seed, progress=tick)
    remember_data(settings, str(target))
    drawn = next(one for one in styles() if one.name == style)
    facts: dict[str, Any] = {"folder": str(target), "count": count, "size": size, "seed": seed, **vars(drawn)}
    if as_json:
        output.print_json(facts)
        return
    click.echo(f"{count} faces in {target}")
    click.echo(f"{drawn.title} by {drawn.creator}, {drawn.licence}")
    click.echo(f"next: ganq submit train --epochs 100{_fitting(size, count)}   (--data is these from now on)")


def _fitting(size: int, count: int) -> str:
    """The options without which a training would enlarge these pictures, or find too few of them."""
    from jobs.recipes import DEFAULT_RECIPE
    from jobs.specs import TrainSpec, size_plan

    usual = TrainSpec.create(data="/", recipe=DEFAULT_RECIPE)
    options = ""
    with suppress(SpecError):
        size_plan(size)
        options += f" --size {size}" if size != usual.size else ""
    return options + (f" --batch {count}" if 2 <= count < usual.batch else "")


@click.command("list", epilog=examples("ganq dataset list"))
@output.json_option
def list_(as_json: bool) -> None:
    """List the data sets that are decoded on the volume, oldest first."""
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
        output.notice("none is decoded yet: the first training on a data set does it")
        return
    rows = [
        (
            one["fingerprint"][:12],
            str(one["count"]),
            f"{one['size']}×{one['size']}",
            f"{one['bytes'] / 1e6:.0f} MB",
            one["source"],
        )
        for one in found
    ]
    output.print_table(["FINGERPRINT", "PICTURES", "SIZE", "BYTES", "SOURCE"], rows)
