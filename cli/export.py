"""`ganq export`: write the weights of a job for other programs."""

from pathlib import Path

import click

from cli.session import JOB
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NonEmptyPath
from ganq.trackers.export import TRACKERS
from jobs.errors import SpecError


@click.command(
    epilog=examples(
        "ganq export 12 --format onnx --out models/",
        "ganq export faces --format pth --checkpoint 400",
        "ganq export faces rates-1 rates-2 --to tensorboard runs/ --follow",
        "ganq export faces --to wandb runs/",
    )
)
@click.argument("jobs", type=JOB, nargs=-1, required=True)
@click.option(
    "--format",
    "form",
    type=click.Choice(["pth", "safetensors", "onnx"]),
    default="safetensors",
    show_default=True,
    help="pth: files as the tutorial saves them; onnx: the generator, verified with onnxruntime.",
)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or an epoch.")
@click.option(
    "--out", type=NonEmptyPath(path_type=Path), default=Path(), help="Folder for the files.  [default: here]"
)
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@click.option(
    "--to",
    type=(click.Choice([*TRACKERS]), NonEmptyPath(path_type=Path)),
    metavar="TRACKER DIR",
    help="Write curves and samples of trainings, not weights, for tensorboard, wandb or trackio.",
)
@click.option("--follow", is_flag=True, help="With --to: continue until the jobs have ended.")
@output.json_option
def export(
    jobs: tuple[str, ...],
    form: str,
    checkpoint: str,
    out: Path,
    force: bool,
    to: tuple[str, Path] | None,
    follow: bool,
    as_json: bool,
) -> None:
    """
    Write the weights of a checkpoint of JOB as netg and netd files, or its curves for a tracker.

    File names count epochs from 0, as in the tutorial: the weights after epoch 400 are
    netg_399. ganq import reads pth and safetensors files, except those of residual
    (recipe r3gan) and class-conditional networks.

    With --to, the curves have the tags of StyleGAN3 over the number of images that were seen.
    A second export to the same folder adds only what is new.
    """
    if to is not None:
        _to_tracker(jobs, *to, follow, as_json)
        return
    if len(jobs) > 1 or follow:
        raise SpecError(
            "--follow requires --to" if follow else "give one JOB, or --to for the curves of several",
            hint=f"ganq export {' '.join(jobs[:2])} --to tensorboard runs/{' --follow' * follow}",
        )
    job = jobs[0]
    from cli.session import clean_up_on_sigterm, open_session
    from jobs.specs import GenerateSpec
    from storage.volume.checkpoints import read_checkpoint
    from storage.weights.export import export as write_files

    clean_up_on_sigterm()
    GenerateSpec.create(source=1, count=1, checkpoint=checkpoint)  # check --checkpoint
    session = open_session()
    found = session.queries.find(job)
    chosen = session.queries.choose_checkpoint(found.id, checkpoint)
    snapshot = read_checkpoint(session.generator_volume(chosen), chosen, "generator")
    done = write_files(
        form, snapshot.meta["arch"], snapshot.tensors, out.absolute(), chosen.epoch, force=force
    )
    if as_json:
        output.print_json({"paths": [str(path) for path in done.paths], **done.facts})
        return
    for path in done.paths:
        click.echo(path)
    if form != "onnx":
        output.notice(f"weights after epoch {chosen.epoch} (file names count epochs from 0)")
    else:
        facts = done.facts
        output.notice(
            f"opset {facts['opset']}; onnxruntime and torch differ by at most {facts['max_abs_diff']:.1e} "
            f"(tolerance: {facts['tolerance']:.0e})"
        )


def _to_tracker(references: tuple[str, ...], tracker: str, folder: Path, follow: bool, as_json: bool) -> None:
    from cli.session import clean_up_on_sigterm, open_session
    from ganq.trackers.export import follow as write_runs

    clean_up_on_sigterm()
    session = open_session()
    jobs = list({job.id: job for job in map(session.queries.find, references)}.values())
    total = 0
    for added in write_runs(session, jobs, folder.absolute(), tracker, until_end=follow):
        total += added
    if as_json:
        output.print_json({"folder": str(folder.absolute()), "values": total})
        return
    click.echo(f"{output.count(total, 'value')} of {output.count(len(jobs), 'job')} written to {folder}")
    look = {
        "tensorboard": f"tensorboard --logdir {folder}",
        "wandb": f"wandb sync {folder}/*/wandb/offline-run-*",
        "trackio": f"TRACKIO_DIR={folder.absolute()} trackio show --project ganq",
    }
    output.notice(look[tracker])
