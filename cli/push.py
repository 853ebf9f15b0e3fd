"""`ganq push`: write a model as a folder that can be shared."""

from pathlib import Path

import click

from cli.session import JOB
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NonEmptyPath
from jobs.errors import SpecError


@click.command(
    epilog=examples(
        "ganq push faces --to model/ --image-licence cc-by-4.0",
        "ganq push faces --to model/ --checkpoint 400 --image-licence 'own photographs' --force",
    )
)
@click.argument("job", type=JOB)
@click.option("--to", "folder", type=NonEmptyPath(), required=True, help="Folder to write.")
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or an epoch.")
@click.option(
    "--image-licence", help="Licence of the training images, for the model card; asked for on a terminal."
)
@click.option("--force", is_flag=True, help="Replace the files of an earlier push.")
@output.json_option
def push(
    job: str, folder: str, checkpoint: str, image_licence: str | None, force: bool, as_json: bool
) -> None:
    """
    Write the model of JOB to a folder: model.safetensors, config.json, samples, a model card.

    The card states what the job table records: images, data set fingerprint, metric, whether the
    model copies training images. ganq import reads the folder back to the same bytes.
    """
    from cli.session import clean_up_on_sigterm, open_session
    from ganq.share import write_model
    from jobs.specs.base import check_checkpoint

    clean_up_on_sigterm()
    if folder.startswith("hf://"):
        raise SpecError(
            "ganq push writes to folders, not to the Hugging Face Hub",
            hint=f"ganq push {job} --to model/, then: hf upload {folder.removeprefix('hf://')} model/",
        )
    check_checkpoint(checkpoint)
    session = open_session()
    found = session.queries.find(job)
    if image_licence is None:
        if as_json or not output.on_terminal():
            raise SpecError(
                "the model card states the licence of the training images",
                hint="add --image-licence cc-by-4.0, or another one in words",
            )
        image_licence = click.prompt("licence of the training images", default="not known", err=True)
    shared = write_model(
        session,
        found,
        Path(folder).absolute(),
        checkpoint=checkpoint,
        licence=str(image_licence),
        force=force,
    )
    if as_json:
        output.print_json(
            {"folder": str(shared.folder), "files": shared.files, "epoch": shared.checkpoint.epoch}
        )
        return
    for name in shared.files:
        click.echo(shared.folder / name)
