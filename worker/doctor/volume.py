"""Checks of `ganq doctor`: the shared volume, its file system, free space and contents."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from jobs.errors import VolumeError
from storage.db.tables import checkpoint
from storage.settings import Settings
from storage.volume.durable import MANIFEST
from storage.volume.filesystems import MOUNTINFO, Mount, is_network_filesystem, mount_of
from storage.volume.layout import FINGERPRINT, Volume
from storage.volume.ownership import quarantined
from worker.doctor.check import Finding, error, ok, warn
from worker.doctor.facts import Facts
from worker.doctor.job_table import EMPTY_BYTES, MOUNT_IN_MEMORY
from worker.doctor.jobs import listed
from worker.doctor.sharing import GUIDE, check_sharing

LOW_BYTES = 5_000_000_000
LOW_INODES = 10_000
MAX_CHECKPOINTS = 1000
CACHE_S = 90.0
"""A client of NFS may see what another has created with a delay of that length."""


def check_volume(settings: Settings, mountinfo: Path = MOUNTINFO) -> Iterator[Finding]:
    """Check that the volume exists, is writable, and has free space and safe mount options."""
    root = settings.volume
    if not root.exists():
        yield warn(
            "volume", f"there is no folder {root} yet", "the first worker creates it; or set GANQ_VOLUME"
        )
        return
    if not root.is_dir():
        yield error("volume", f"{root} is not a folder", "set GANQ_VOLUME to a folder")
        return
    mount = mount_of(root, mountinfo)
    kind = mount.kind if mount else "an unknown file system"
    reason = _write_error(root)
    if reason is not None:
        hint = f"see how it is mounted; several users share it by a group: {GUIDE}"
        yield error("volume", f"{root} cannot be written: {reason}", hint)
    about = os.statvfs(root)
    free = about.f_bavail * about.f_frsize
    free_text = f"{free / 1e9:,.1f} GB free"
    if free < EMPTY_BYTES:
        yield error("volume", f"{root} is full: {free_text}", "ganq gc --dry-run; waiting jobs then continue")
    elif free < LOW_BYTES:
        yield warn(
            "volume",
            f"{root} has little free space: {free_text}",
            "ganq gc --dry-run; ganq submit train --dry-run shows what a job needs",
        )
    elif reason is None:
        shared = " (shared)" if is_network_filesystem(kind) else ""
        yield ok("volume", f"{root}, on {kind}{shared}, {free_text}")
    if about.f_files and about.f_favail < LOW_INODES:
        yield warn("volume", f"only {about.f_favail:,} more files can be created on it", "delete old images")
    yield from check_sharing(root)
    if mount is not None:
        yield from check_mount(root, mount)


def _write_error(folder: Path) -> str | None:
    """
    Return why no file can be written; None: one was written, synced and deleted.

    Permission bits are not sufficient: they do not restrict root. NFS and quotas may report a lack of space
    only at fsync().
    """
    probe = folder / f".doctor-{os.getpid()}"
    try:
        probe.touch()
        with open(probe, "wb") as file:
            file.write(b"?" * 4096)
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as exc:
        with suppress(OSError):
            probe.unlink(missing_ok=True)
        return (exc.strerror or type(exc).__name__).lower()
    return None


def check_mount(root: Path, mount: Mount) -> Iterator[Finding]:
    """Check how the volume is mounted: in memory, in a container, NFS and CIFS with unsafe options."""
    options = mount.options
    if mount.kind in MOUNT_IN_MEMORY:
        yield warn("volume", f"{root} is in memory and lost at the next boot", "set GANQ_VOLUME to a disk")
    elif mount.kind == "overlay":
        yield warn(
            "volume",
            f"{root} is in the container itself and is deleted with it",
            "mount a volume there: docker run -v",
        )
    elif mount.kind in ("nfs", "nfs4"):
        soft = sorted(options & {"soft", "softerr"})
        if soft:
            yield error(
                "volume",
                f"{mount.point} is mounted {soft[0]}: if {mount.source} pauses, writes fail half-way",
                "mount it hard",
            )
        if not options & {"lookupcache=pos", "lookupcache=positive", "lookupcache=none"}:
            yield warn(
                "volume",
                f"{mount.point} caches missing names for up to 60 s: a node may see late what another has"
                " created",
                "mount it with lookupcache=positive",
            )
    elif mount.kind in ("cifs", "smb3"):
        if "hard" not in options:
            yield warn(
                "volume",
                f"{mount.point} is mounted soft, CIFS's default: if the server pauses, writes fail",
                "mount it with the option hard",
            )
        if "cache=loose" in options:
            yield error(
                "volume",
                f"{mount.point} has cache=loose: nodes read outdated data",
                "mount it with cache=strict",
            )


# --- checks that need the job table -------------------------------------------------------


def check_room(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Check that the next checkpoints fit: each is written before the previous one is deleted."""
    if not facts.checkpoint_bytes or not settings.volume.is_dir():
        return
    about = os.statvfs(settings.volume)
    free = about.f_bavail * about.f_frsize
    need = 2 * sum(facts.checkpoint_bytes)
    whose = (
        f"the next two checkpoints of {len(facts.running)} running job{'s' * (len(facts.running) > 1)}"
        if facts.running
        else "two checkpoints like the last ones"
    )
    message = f"{whose} need {_size(need)}, and {_size(free)} are free"
    hint = "ganq gc --dry-run shows what can be deleted; --keep-last keeps fewer"
    if free < need:
        yield error("room", message, hint)
    elif free < 5 * need:
        yield warn("room", message, hint)
    else:
        yield ok("room", message)


def check_datasets(settings: Settings) -> Iterator[Finding]:
    """Verify every decoded data set by its checksums."""
    from storage.datasets.cache import IMAGES, find_damage, read_index
    from storage.datasets.checksums import CHECKSUMS

    volume = Volume(settings.volume)
    intact = unknown = 0
    for folder in sorted(volume.datasets.glob("*")):
        if not FINGERPRINT.fullmatch(folder.name):
            continue
        index = read_index(folder)
        what: str | None = "its index is broken, or its images have another size"
        if index is not None:
            try:
                with open(folder / IMAGES, "rb") as file:
                    what = find_damage(folder, index, file) if CHECKSUMS in index else None
            except OSError as exc:
                what = (exc.strerror or str(exc)).lower()
            unknown += CHECKSUMS not in index
        intact += what is None
        if what is not None:
            yield error(
                "datasets",
                f"{folder} is damaged: {what}",
                "the next job that reads it decodes its images again, if they still exist",
            )
    message = f"{intact} decoded data set{'s' * (intact != 1)} intact"
    if unknown:
        message += f", of which {unknown} of an older ganq cannot be verified before a job has opened them"
    yield ok("datasets", message)


def check_same_volume(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Check that running jobs write to this folder: otherwise machines have different volumes."""
    volume = Volume(settings.volume)
    if not settings.volume.is_dir():
        return
    running = [one for one in facts.running if facts.attempt_started.get(one.id, 0.0) > CACHE_S][:20]
    missing = [one for one in running if not volume.attempt(one.id, one.attempt).is_dir()]
    if missing:
        workers = sorted({one.worker for one in missing if one.worker})
        yield error(
            "volume",
            f"running jobs write to another folder than {settings.volume}:"
            f" {listed([str(one.id) for one in missing])} on {listed(workers)}",
            "GANQ_VOLUME must be the same shared folder on every machine: is it mounted on both?",
        )
    elif running:
        yield ok("volume", f"the same as that of {listed(sorted({str(one.worker) for one in running}))}")


def check_orphans(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Report unreferenced files, which `ganq gc` deletes, and quarantined folders."""
    from storage.gc.sweep import Collector

    volume = Volume(settings.volume)
    if facts.database is None or not volume.jobs.is_dir():
        return
    if left := quarantined(volume):
        folders = f"{len(left)} folder{'s' * (len(left) > 1)} of jobs of another job table"
        yield warn(
            "orphans",
            f"{folders}, e.g. {left[0]}: job ids were assigned again after a restore",
            "keep what you need of them, and delete the rest manually",
        )
    try:
        plan = Collector(facts.database, volume).plan()
    except VolumeError as exc:
        yield error("orphans", exc.message, exc.hint)
        return
    size = sum(one.bytes for one in plan.items)
    if not plan.items:
        yield ok("orphans", "none: the job table refers to everything on the volume")
        return
    number = len(plan.items)
    message = f"{number:,} unreferenced item{'s' * (number > 1)} on the volume, {_size(size)}"
    about = os.statvfs(settings.volume)
    if size > 0.1 * about.f_blocks * about.f_frsize:
        yield warn("orphans", message, "ganq gc deletes them, ganq gc --dry-run lists them")
    else:
        yield ok("orphans", f"{message}: ganq gc --dry-run lists them")


def check_registered(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Check that the newest checkpoints of the job table exist on the volume."""
    from sqlalchemy import select

    volume = Volume(settings.volume)
    if facts.database is None or not volume.root.is_dir():
        return
    newest = (
        select(checkpoint.c.job_id, checkpoint.c.path).order_by(checkpoint.c.id.desc()).limit(MAX_CHECKPOINTS)
    )
    rows = facts.database.read(lambda conn: list(conn.execute(newest)))
    missing = [row for row in rows if not (volume.root / row.path / MANIFEST).exists()]
    # Retention deletes the row before the files, so it has deleted none of these.
    if missing:
        yield error(
            "missing",
            f"{len(missing):,} of the newest {len(rows):,} checkpoints are not on the volume, those of jobs"
            f" {listed(sorted({str(row.job_id) for row in missing}, key=int))}: e.g. {missing[0].path}",
            "is GANQ_VOLUME the right folder? restore its files; without them, ganq retry JOB starts again",
        )


def _size(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
