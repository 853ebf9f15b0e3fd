"""`ganq export`: a job's weights as files for other programs."""

from pathlib import Path

import click

from cli.session import JOB
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NamedPath


@click.command(
    epilog=examples(
        "ganq export 12 --format onnx --out models/",
        "ganq export faces --format pth --checkpoint 400",
    )
)
@click.argument("job", type=JOB)
@click.option(
    "--format",
    "form",
    type=click.Choice(["pth", "safetensors", "onnx"]),
    default="safetensors",
    show_default=True,
    help="pth: the tutorial's two files; onnx: the generator, checked in onnxruntime.",
)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or a number of epochs.")
@click.option(
    "--out", type=NamedPath(path_type=Path), default=Path(), help="Folder for the files.  [default: here]"
)
@click.option("--force", is_flag=True, help="Replace files that are there.")
@output.json_option
def export(job: str, form: str, checkpoint: str, out: Path, force: bool, as_json: bool) -> None:
    """
    Write the weights of JOB's checkpoint as netg and netd files.

    Files carry the tutorial's 0-based epoch: after 400 epochs, netg_399. ganq import
    reads pth and safetensors back, but not of residual networks (recipe r3gan), nor of
    networks that know classes.
    """
    from cli.session import leave_nothing_half_made, open_session
    from jobs.specs import GenerateSpec
    from storage.volume.checkpoints import read_checkpoint
    from storage.weights.export import export as write_files

    leave_nothing_half_made()
    GenerateSpec.create(source=1, count=1, checkpoint=checkpoint)  # a word that names no checkpoint
    session = open_session()
    found = session.queries.find(job)
    chosen = session.queries.choose_checkpoint(found.id, checkpoint)
    snapshot = read_checkpoint(session.volume, chosen, "generator")
    done = write_files(
        form, snapshot.meta["arch"], snapshot.tensors, out.absolute(), chosen.epoch, force=force
    )
    if as_json:
        output.print_json({"paths": [str(path) for path in done.paths], **done.facts})
        return
    for path in done.paths:
        click.echo(path)
    if form == "onnx":
        facts = done.facts
        output.notice(
            f"opset {facts['opset']}; onnxruntime and torch differ by {facts['max_abs_diff']:.1e} at most "
            f"(allowed: {facts['tolerance']:.0e})"
        )
