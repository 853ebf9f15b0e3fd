"""`ganq push`: write a model as a folder that can be shared."""

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from cli.session import MODEL
from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NonEmptyPath
from jobs.errors import SpecError


@click.command(
    epilog=examples(
        "ganq push faces --to model/ --image-licence cc-by-4.0",
        "ganq push faces --to hf://ada/faces --image-licence cc-by-4.0",
        "ganq push faces --to model/ --checkpoint 400 --image-licence 'own photographs' --force",
    )
)
@click.argument("job", type=MODEL)
@click.option(
    "--to",
    "target",
    type=NonEmptyPath(),
    required=True,
    metavar="DIR|hf://USER/REPO",
    help="Folder to write, or a model repository of the Hugging Face Hub.",
)
@click.option("--checkpoint", default="best", show_default=True, help="best, last, or an epoch.")
@click.option(
    "--image-licence", help="Licence of the training images, for the model card; asked for on a terminal."
)
@click.option("--force", is_flag=True, help="Replace the files of an earlier push.")
@click.option("--private", is_flag=True, help="With hf://: create the repository as a private one.")
@output.json_option
def push(
    job: str,
    target: str,
    checkpoint: str,
    image_licence: str | None,
    force: bool,
    private: bool,
    as_json: bool,
) -> None:
    """
    Write the model of JOB to a folder: model.safetensors, config.json, samples, a model card.

    With hf://USER/REPO the folder is uploaded as one commit. The token is that of `hf auth login`,
    or HF_TOKEN; the repository is created if it does not exist.

    The card states what the job table records: images, data set fingerprint, metric, whether the
    model copies training images. ganq import reads the folder back to the same bytes.
    """
    from cli.session import clean_up_on_sigterm, open_session
    from ganq.sharing import hub
    from ganq.sharing.share import write_model
    from jobs.specs.base import check_checkpoint

    clean_up_on_sigterm()
    repository = hub.repository(target)  # before anything is asked or read
    if private and repository is None:
        raise SpecError("--private is for hf://USER/REPO")
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
    with TemporaryDirectory(prefix="ganq-push-") as temp:
        shared = write_model(
            session,
            found,
            Path(target if repository is None else temp).absolute(),
            checkpoint=checkpoint,
            licence=str(image_licence),
            force=force,
        )
        if repository is not None:
            commit = hub.upload(
                shared.folder, repository, f"Epoch {shared.checkpoint.epoch}", private=private
            )
            if as_json:
                epoch = shared.checkpoint.epoch
                output.print_json(
                    {"repository": repository, "commit": commit, "files": shared.files, "epoch": epoch}
                )
            else:
                click.echo(commit)
            return
    if as_json:
        output.print_json(
            {"folder": str(shared.folder), "files": shared.files, "epoch": shared.checkpoint.epoch}
        )
        return
    for name in shared.files:
        click.echo(shared.folder / name)
