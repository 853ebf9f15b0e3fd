"""`ganq remake`: generate an image again from its passport."""

from pathlib import Path

import click

from cli.session import JOB
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NonEmptyPath


@click.command(
    epilog=examples(
        "ganq remake 000007.png", "ganq remake 000007.png --out again.png", "ganq remake x.png --from faces"
    )
)
@click.argument("file", type=NonEmptyPath(path_type=Path))
@click.option(
    "--from",
    "source",
    type=JOB,
    help="Take the best checkpoint of this job.  [default: that of the passport]",
)
@click.option("--out", type=NonEmptyPath(path_type=Path), help="Write the PNG to this path.")
@output.json_option
def remake(file: Path, source: str | None, out: Path | None, as_json: bool) -> int:
    """
    Generate the image of FILE again, and compare both.

    PNG files of `ganq submit generate` have a passport: checkpoint, seed, index, options and the
    build that made them. Exit code 1 if the pixels of FILE are not those of the image that was
    made again; the facts that differ are printed.
    """
    from cli.session import open_session
    from ganq.remake import remake as make_again
    from storage.volume.durable import write_bytes

    made = make_again(open_session(), file, source)
    if out is not None:
        write_bytes(out.absolute(), made.data)
    job_id, epoch, index = made.checkpoint.job_id, made.checkpoint.epoch, made.passport["index"]
    if as_json:
        output.print_json(
            {
                "job": job_id,
                "epoch": epoch,
                "same_bytes": made.same_bytes,
                "same_pixels": made.same_pixels,
                "differences": made.differences,
                "passport": made.passport,
                "out": None if out is None else str(out.absolute()),
            }
        )
        return 0 if made.same_pixels else 1
    what = "the same bytes" if made.same_bytes else "the same pixels" if made.same_pixels else "another image"
    click.echo(f"{output.clean(str(file))}: {what}; image {index} of job {job_id}, epoch {epoch}")
    for one in made.differences:
        click.echo(f"  {output.clean(one)}")
    if out is not None:
        click.echo(f"written to {output.clean(str(out))}")
    return 0 if made.same_pixels else 1
