"""`ganq show` and `ganq schema`: jobs as text that can be submitted again."""

import click

from cli.session import JOB, open_session
from cli.ui import output
from cli.ui.lazy import examples

FORMATS = ("command", "toml", "python", "json")


@click.command(
    epilog=examples(
        "ganq show faces",
        "ganq show 12 --as toml > jobs.toml",
        "ganq show 12 --as json | ganq submit -f -",
    )
)
@click.argument("job", type=JOB)
@click.option(
    "--as",
    "form",
    type=click.Choice(FORMATS),
    default="command",
    show_default=True,
    help="Format: a command, a job file (TOML or JSON), or Python.",
)
def show(job: str, form: str) -> None:
    """
    Print JOB as a request that submits an equal one.

    Options that the recipe sets are left out. Comments contain the fingerprint of the data set and, of a
    generation, the versions of the build, if the job has run.
    """
    from ganq.submission.describe import describe

    session = open_session()
    found = session.queries.find(job)
    if session.remote:
        from ganq.remote.upload import of_server

        text = describe(found, session.queries, form, written=of_server)
    else:
        text = describe(found, session.queries, form)
    click.echo(text, nl=False)


@click.command(epilog=examples("ganq schema > jobs.schema.json"))
def schema() -> None:
    """Print the JSON Schema of job files (`ganq submit -f`), for editors."""
    from ganq.submission.schema import job_file_schema

    output.print_json(job_file_schema())
