"""Import weights from outside as a finished job, from which `generate --from NAME` generates."""

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import ConfigError
from jobs.kinds import SPEC_VERSION
from storage.db.queries import Queries
from storage.db.rows import Job
from storage.db.store import JobStore
from storage.volume.checkpoints import GENERATOR, write_checkpoint
from storage.volume.durable import make_folder, sync_parents
from storage.volume.layout import Volume
from storage.volume.ownership import quarantine
from storage.volume.permissions import account_of, group_umask, may_not_read


def import_weights(
    store: JobStore,
    volume: Volume,
    *,
    netg: Path,
    netd: Path | None,
    name: str,
    user: str,
    readers: Sequence[int] = (),
) -> Job:
    """
    Convert foreign weight files and record them as a job of kind `import`.

    Args:
        netg, netd: .pth or .safetensors files; without netd, --keep cannot score. Or `netg` is a folder that
            `ganq push` has written.
        readers: accounts of the workers; if they are not known, the owner of the volume's folder of jobs.

    Raises:
        ConfigError: no worker could read the imported files; nothing was recorded.
        ForeignFileError, NotFoundError: the files are not weights of such networks; nothing was recorded.
        DiskFullError, VolumeError: nothing was recorded.
    """
    from jobs.networks.weights import epoch_of_name
    from jobs.specs import NETWORK_OPTIONS, ImportSpec
    from storage.weights.load import load_origin
    from storage.weights.model_folder import load_model

    if netd is None and netg.is_dir():
        about, tensors = load_model(netg)
    else:
        arch, tensors = load_origin(netg, netd)
        about = {"arch": arch, "epoch": epoch_of_name(netg.name) or 0}
    arch, epoch = about["arch"], about["epoch"]
    spec = ImportSpec.create(
        netg=str(netg),
        netd=str(netd) if netd else None,
        **{name: arch[name] for name in NETWORK_OPTIONS if name in arch and name != "norm_d"},
        grey=arch.get("grey", False),
        conditional=bool(arch.get("classes")),
        norm_d=arch["norm_d"] if any(key.startswith("D.") for key in tensors) else None,
    )
    volume.ensure(Queries(store.database).any_begun)
    staged = volume.jobs / f".import-{secrets.token_hex(6)}"
    meta = {**about, "recipe": "import", "step": 0, "kind": "import"}
    with group_umask(volume.root):
        digest, size = write_checkpoint(staged, generator=tensors, meta=meta)

    placed = staged
    try:
        _require_readable(staged, readers or [volume.jobs.stat().st_uid])
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise

    def place(job_id: int) -> tuple[str, str, int, int]:
        target = volume.checkpoints(job_id, 1) / "import"
        nonlocal placed
        if placed != target:  # this may be tried again
            if volume.job(
                job_id
            ).exists():  # of an import that was killed before its row, or of an older table
                quarantine(volume, job_id)
            with group_umask(volume.root):
                make_folder(target.parent, named=False)
            placed = placed.rename(target)
        # The row that will name it must not be more durable than it.
        sync_parents(target, volume.jobs)
        return volume.relative(target), digest, size, epoch

    try:
        return store.add_finished(
            kind="import", spec=spec.to_json(), spec_version=SPEC_VERSION, user=user, name=name, files=place
        )
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _require_readable(folder: Path, readers: Sequence[int]) -> None:
    """
    Check that workers can read the imported files.

    Raises:
        ConfigError: none of these accounts may read the imported files.
    """
    if all(may_not_read(folder / GENERATOR, uid=uid) is not None for uid in readers):
        raise ConfigError(
            f"the workers' user {account_of(readers[0])} could not read the imported weights",
            hint="give the volume to a common group (docs/operations.md, Several Unix users); "
            "or umask 022, and import them again",
        )
