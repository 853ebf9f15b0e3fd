"""`ganq dataset`: look at pictures before training, draw a demo set, list what is decoded."""

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
    Entry("check", "cli.dataset:check", "Open every picture and say what training would find."),
    Entry("make", "cli.dataset:make", "Draw cartoon faces to train on."),
    Entry("list", "cli.dataset:list_", "List the data sets that are decoded on the volume."),
)

SHOWN = 20


@click.group(cls=LazyGroup, entries=COMMANDS)
def dataset() -> None:
    """Check, make and list data sets."""


@click.command(epilog=examples("ganq dataset check faces/", "ganq dataset check faces.zip --json"))
@click.argument("data", type=NamedPath(path_type=Path))
@output.json_option
def check(data: Path, as_json: bool) -> int:
    """
    Open every picture of DATA (folder, zip or tar) as training would, and report.

    Counts, sizes and kinds, what is converted on the way, copies of one file, and each file
    that would be left out with the reason. Exit code 1 if more than 5 % would be.
    """
    from storage.datasets.cache import check as look

    with progress("looking", "pictures") as tick:
        found = look(data.absolute(), progress=tick)
    bad = found.pictures - found.usable
    fine = found.usable > 0 and bad <= 0.05 * found.pictures
    if as_json:
        output.print_json(found.to_json())
        return 0 if fine else 1
    click.echo(f"{found.source} ({found.kind}): {found.pictures} pictures, {found.usable} usable")
    for title, counts in (
        ("sizes", found.sizes),
        ("modes", found.modes),
        ("formats", found.formats),
        ("converted", found.notes),
    ):
        if counts:
            click.echo(f"  {title:10}" + _most(counts.most_common()))
    if found.classes:
        click.echo(f"  {'classes':10}" + _most(list(found.classes.items())))
    if found.copies:
        different = found.usable - found.copies
        click.echo(
            f"  {'copies':10}{found.copies} are the very files of others: {different} different pictures"
        )
    if found.ignored:
        total, suffixes = sum(found.ignored.values()), ", ".join(sorted(found.ignored)[:8])
        click.echo(f"  {'ignored':10}{output.count(total, 'file')}, no pictures by name ({suffixes})")
    for one in found.skipped[:SHOWN]:
        detail = f" ({output.clean(one.detail)})" if one.detail else ""
        click.echo(f"  left out  {output.clean(one.name)}: {one.reason}{detail}")
    if len(found.skipped) > SHOWN:
        click.echo(f"  … and {len(found.skipped) - SHOWN} more; --json lists all")
    if not fine:
        share = min(bad / found.pictures + 0.01, 1.0)
        output.notice(
            "none of them can be used: are these pictures?"
            if bad == found.pictures
            else f"too many are unusable for training's default of 5 %: mend them, or --max-skip {share:.2f}"
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
