"""What `ganq doctor` finds out about the shared volume: its kind, its room, whether it is the right one."""

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

LOW_BYTES = 5_000_000_000
LOW_INODES = 10_000
LOOKED_FOR = 1000
CACHE_S = 90.0
"""For so long a client of NFS may not see what another has made."""


def check_volume(settings: Settings, mountinfo: Path = MOUNTINFO) -> Iterator[Finding]:
    """There, writable, on what kind of file system, with room."""
    root = settings.volume
    if not root.exists():
        yield warn(
            "volume", f"there is no folder {root} yet", "the first worker makes it; or set GANQ_VOLUME"
        )
        return
    if not root.is_dir():
        yield error("volume", f"{root} is not a folder", "point GANQ_VOLUME at a folder")
        return
    mount = mount_of(root, mountinfo)
    kind = mount.kind if mount else "an unknown file system"
    reason = _cannot_write(root)
    if reason is not None:
        yield error("volume", f"{root} cannot be written: {reason}", "check its owner and how it is mounted")
    about = os.statvfs(root)
    free = about.f_bavail * about.f_frsize
    room = f"{free / 1e9:,.1f} GB free"
    if free < EMPTY_BYTES:
        yield error("volume", f"{root} is full: {room}", "ganq gc --dry-run; waiting jobs then go on")
    elif free < LOW_BYTES:
        yield warn(
            "volume",
            f"{root} has little room: {room}",
            "ganq gc --dry-run; ganq submit train --dry-run says what a job will need",
        )
    elif reason is None:
        shared = " (shared)" if is_network_filesystem(kind) else ""
        yield ok("volume", f"{root}, on {kind}{shared}, {room}")
    if about.f_files and about.f_favail < LOW_INODES:
        yield warn("volume", f"only {about.f_favail:,} more files can be made on it", "delete old pictures")
    if mount is not None:
        yield from check_mount(root, mount)


def _cannot_write(folder: Path) -> str | None:
    """
    Why a file cannot be kept there; found out by keeping one, because root may all by its bits.

    Synced, too: NFS and quotas may say only then that there is no room.
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
    """How it is mounted: memory, a container's own layer, NFS and CIFS with risky options."""
    options = mount.options
    if mount.kind in MOUNT_IN_MEMORY:
        yield warn(
            "volume", f"{root} lies in memory and is gone at the next boot", "set GANQ_VOLUME to a disk"
        )
    elif mount.kind == "overlay":
        yield warn(
            "volume",
            f"{root} lies in the container itself and is gone with it",
            "mount a volume there: docker run -v",
        )
    elif mount.kind in ("nfs", "nfs4"):
        soft = sorted(options & {"soft", "softerr"})
        if soft:
            yield error(
                "volume",
                f"{mount.point} is mounted {soft[0]}: a pause of {mount.source} becomes an error in the"
                " middle of a write",
                "mount it hard",
            )
        if not options & {"lookupcache=pos", "lookupcache=positive", "lookupcache=none"}:
            yield warn(
                "volume",
                f"{mount.point} remembers for up to 60 s what is not there: a node may not see at once what"
                " another has made",
                "mount it with lookupcache=positive",
            )
    elif mount.kind in ("cifs", "smb3"):
        if "hard" not in options:
            yield warn(
                "volume",
                f"{mount.point} is mounted soft, CIFS's default: a pause of the server becomes an error",
                "mount it with the option hard",
            )
        if "cache=loose" in options:
            yield error(
                "volume",
                f"{mount.point} has cache=loose: nodes read what is no longer so",
                "mount it with cache=strict",
            )


# --- what needs the job table, too --------------------------------------------------------


def check_room(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Whether the next checkpoints fit: each is written beside the last one before that goes."""
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
    said = f"{whose} need {_size(need)}, and {_size(free)} are free"
    hint = "ganq gc --dry-run says what can go; --keep-last keeps fewer"
    if free < need:
        yield error("room", said, hint)
    elif free < 5 * need:
        yield warn("room", said, hint)
    else:
        yield ok("room", said)


def check_datasets(settings: Settings) -> Iterator[Finding]:
    """Read every decoded data set and compare it with its checksums."""
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
                "the next job that reads it decodes its pictures again, if they are still there",
            )
    said = f"{intact} decoded data set{'s' * (intact != 1)} intact"
    if unknown:
        said += f", of which {unknown} of an older ganq cannot be checked before a job has opened them"
    yield ok("datasets", said)


def check_same_volume(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Jobs that run elsewhere write here, unless this is not the folder that they call the volume."""
    volume = Volume(settings.volume)
    if not settings.volume.is_dir():
        return
    old = [one for one in facts.running if facts.attempt_started.get(one.id, 0.0) > CACHE_S][:20]
    absent = [one for one in old if not volume.attempt(one.id, one.attempt).is_dir()]
    if absent:
        where = sorted({one.worker for one in absent if one.worker})
        yield error(
            "volume",
            f"running jobs write to another folder than {settings.volume}:"
            f" {listed([str(one.id) for one in absent])} on {listed(where)}",
            "GANQ_VOLUME must be the same shared folder on every machine: is it mounted here, and there?",
        )
    elif old:
        yield ok("volume", f"the same that {listed(sorted({str(one.worker) for one in old}))} write to")


def check_orphans(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """What nothing points to any more; `ganq gc` deletes it."""
    from storage.gc.sweep import Collector

    volume = Volume(settings.volume)
    if facts.database is None or not volume.jobs.is_dir():
        return
    if left := quarantined(volume):
        folders = f"{len(left)} folder{'s' * (len(left) > 1)} of jobs of another job table"
        yield warn(
            "orphans",
            f"{folders}, e.g. {left[0]}: ids were given out again after a restore",
            "keep what you need of them, and delete the rest by hand",
        )
    try:
        plan = Collector(facts.database, volume).plan()
    except VolumeError as exc:
        yield error("orphans", exc.message, exc.hint)
        return
    size = sum(one.bytes for one in plan.items)
    if not plan.items:
        yield ok("orphans", "none: the job table points to all that lies on the volume")
        return
    number = len(plan.items)
    said = f"{number:,} thing{'s' * (number > 1)} on the volume that nobody needs, {_size(size)}"
    about = os.statvfs(settings.volume)
    if size > 0.1 * about.f_blocks * about.f_frsize:
        yield warn("orphans", said, "ganq gc deletes them, ganq gc --dry-run lists them")
    else:
        yield ok("orphans", f"{said}: ganq gc --dry-run lists them")


def check_registered(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Checkpoints that the job table points to and that are not there: the newest are looked for."""
    from sqlalchemy import select

    volume = Volume(settings.volume)
    if facts.database is None or not volume.root.is_dir():
        return
    newest = select(checkpoint.c.job_id, checkpoint.c.path).order_by(checkpoint.c.id.desc()).limit(LOOKED_FOR)
    rows = facts.database.read(lambda conn: list(conn.execute(newest)))
    gone = [row for row in rows if not (volume.root / row.path / MANIFEST).exists()]
    # Retention lets the row go first and the files afterwards, so none of these was let go.
    if gone:
        yield error(
            "missing",
            f"{len(gone):,} of the newest {len(rows):,} checkpoints are not on the volume, those of jobs"
            f" {listed(sorted({str(row.job_id) for row in gone}, key=int))}: e.g. {gone[0].path}",
            "is GANQ_VOLUME the right folder? bring its files back; ganq retry JOB trains anew without them",
        )


def _size(number: float) -> str:
    return f"{number / 1e9:,.1f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"
