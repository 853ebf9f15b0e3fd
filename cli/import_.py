"""`ganq import`: make weights from elsewhere usable by `generate --from NAME`."""

from pathlib import Path

import click

from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NamedPath


@click.command(
    "import",
    epilog=examples(
        "ganq import netg_399.pth netd_399.pth --name heads",
        "ganq import generator.safetensors --name heads",
        "ganq submit generate --from heads --keep 64 --of 512",
    ),
)
@click.argument("netg", type=NamedPath(path_type=Path))
@click.argument("netd", type=NamedPath(path_type=Path), required=False)
@click.option("--name", required=True, help="What to call the model.")
@output.json_option
def import_(netg: Path, netd: Path | None, name: str, as_json: bool) -> None:
    """
    Read the weights of a DCGAN, as the tutorial saves them, and keep them on the volume.

    NETG is the generator's file, NETD the discriminator's; without NETD pictures
    cannot be scored (--keep). Files are read in a sandbox and converted; code in
    them is never run. Picture size and widths are taken from the weights. Not for
    residual networks (recipe r3gan), nor for those that know classes.
    """
    from cli.session import leave_nothing_half_made, open_session
    from jobs.specs import check_name
    from storage.weights.import_job import import_weights

    leave_nothing_half_made()
    check_name(name)
    session = open_session(create=True)
    job = import_weights(
        session.store,
        session.volume,
        netg=netg.absolute(),
        netd=netd.absolute() if netd else None,
        name=name,
        user=session.settings.user,
    )
    if as_json:
        output.print_json({"id": job.id, "name": job.name, "kind": job.kind, "spec": job.spec})
        return
    spec = job.spec
    click.echo(
        f"model {job.name} is job {job.id}: {spec['size']}×{spec['size']}, nz {spec['nz']}, "
        f"ngf {spec['ngf']}, " + (f"ndf {spec['ndf']}" if netd else "no discriminator")
    )
    click.echo(f"next: ganq submit generate --from {job.name} --count 64")
