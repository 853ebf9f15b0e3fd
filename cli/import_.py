"""`ganq import`: import weights for `submit generate --from NAME`."""

from pathlib import Path

import click

from cli.ui import output
from cli.ui.lazy import examples
from cli.ui.params import NonEmptyPath


@click.command(
    "import",
    epilog=examples(
        "ganq import netg_399.pth netd_399.pth --name heads",
        "ganq import generator.safetensors --name heads",
        "ganq import model/ --name heads",
        "ganq submit generate heads --keep 64 --of 512",
    ),
)
@click.argument("netg", type=NonEmptyPath(path_type=Path))
@click.argument("netd", type=NonEmptyPath(path_type=Path), required=False)
@click.option("--name", required=True, help="Name of the model.")
@output.json_option
def import_(netg: Path, netd: Path | None, name: str, as_json: bool) -> None:
    """
    Import the weights of a DCGAN, as the tutorial saves them.

    NETG is the file of the generator, NETD that of the discriminator. Without NETD, images
    cannot be scored (--keep). NETG may be a checkpoint with both networks under their
    names, e.g. netG and netD, generator, g_ema. Files are read in a sandbox, and code in
    them is never executed. Image size and channels are derived from the weights. Residual (recipe r3gan)
    and class-conditional networks can only be imported from a folder of ganq push, which NETG may be.
    """
    from cli.session import clean_up_on_sigterm, open_session
    from jobs.specs import check_name
    from storage.weights.import_job import import_weights
    from worker.host.accounts import worker_uids

    clean_up_on_sigterm()
    check_name(name)
    session = open_session(create=True)
    job = import_weights(
        session.store,
        session.volume,
        netg=netg.absolute(),
        netd=netd.absolute() if netd else None,
        name=name,
        user=session.settings.user,
        readers=worker_uids(session.queries),
    )
    if as_json:
        output.print_json({"id": job.id, "name": job.name, "kind": job.kind, "spec": job.spec})
        return
    spec = job.spec
    click.echo(
        f"model {job.name} is job {job.id}: {spec['size']}×{spec['size']}, nz {spec['nz']}, "
        f"ngf {spec['ngf']}, " + (f"ndf {spec['ndf']}" if spec.get("norm_d") else "no discriminator")
    )
    click.echo(f"next: ganq submit generate {job.name} --count 64")
