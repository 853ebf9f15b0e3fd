"""
The checks of `ganq doctor`, their order and time limits; each is in the module of its subject.

Independent checks run concurrently, so that all take as long as the slowest: at most a minute and a half
with GPUs, half a minute without.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata

from storage.reachable import HINT, is_reachable, timeout_message
from storage.settings import Settings
from worker.celery_bridge import environment
from worker.doctor.check import Finding, Probe, error, ok, warn, within
from worker.doctor.facts import Facts
from worker.doctor.gpu import check_gpus_and_torch
from worker.doctor.job_table import check_job_table
from worker.doctor.machine import check_files, check_runtime, check_sandbox, check_workers_here
from worker.doctor.redis_server import check_notifications, check_redis
from worker.doctor.volume import (
    check_datasets,
    check_orphans,
    check_registered,
    check_room,
    check_same_volume,
    check_volume,
)

TABLE_S = 15.0
REDIS_S = 12.0
VOLUME_S = 10.0
ORPHANS_S = 10.0
GPU_S = 85.0
"""nvidia-smi has 20 s, torch 60."""
DATASETS_S = 24 * 3600.0
LOCAL_CHECK_S = 5.0
HINT_DATABASE = "is the server running and reachable? a firewall may drop packets"
HINT_VOLUME = HINT
USES = {
    "local": "the embedded Redis of ganq up",
    "faces": "ganq dataset make and ganq demo",
    "hub": "ganq push --to hf://USER/REPO",
    "judge": "--feature-network effnet-lite2",
    "metrics": "ganq worker --metrics-port: GPU utilisation and memory for Prometheus",
    "notify": "ganq webhook add apprise+…: Slack, ntfy, mail",
    "onnx": "ganq export --format onnx",
    "tensorboard": "ganq export --to tensorboard",
    "trackio": "ganq export --to trackio",
    "video": "ganq submit generate --interpolate: the frames as MP4",
    "wandb": "ganq export --to wandb",
}
"""Purpose of each extra of the package."""


def examine(
    settings: Settings, left_out: Sequence[tuple[str, str]] = (), *, verify_data: bool = False
) -> Iterator[Finding]:
    """
    Run all checks and yield their findings, from the most fundamental to the optional.

    Args:
        left_out: folders of PYTHONPATH that are not searched, and why.
        verify_data: verify the decoded data sets, too, however long that takes.
    """
    facts = Facts()
    # In a child process: a thread that waits for a hung volume could prevent this process from exiting.
    reachable = is_reachable(settings.volume, VOLUME_S)

    def begin(check: str, run: partial[Iterator[Finding]], within_s: float, hint: str) -> Probe:
        return Probe(check, run, within_s=within_s, hint=hint)

    table = begin("database", partial(check_job_table, settings, facts), TABLE_S, HINT_DATABASE)
    redis = begin(
        "redis", partial(check_redis, settings), REDIS_S, "check GANQ_REDIS_URL and the name server"
    )
    volume: Iterable[Finding] = [error("volume", timeout_message(settings.volume, VOLUME_S), HINT_VOLUME)]
    if reachable:
        volume = begin("volume", partial(check_volume, settings), VOLUME_S, HINT_VOLUME)
    gpus = begin("gpus", partial(check_gpus_and_torch), GPU_S, "nvidia-smi hangs: check the driver (dmesg)")
    files = begin("files", partial(check_files, settings), LOCAL_CHECK_S, HINT_VOLUME)
    sockets = begin("sockets", partial(check_runtime, settings), LOCAL_CHECK_S, HINT_VOLUME)
    sandboxed = begin(
        "sandbox", partial(check_sandbox), LOCAL_CHECK_S, "a sandboxed process hangs: see dmesg"
    )
    yield check_python()
    yield from check_environment(left_out)
    yield from files
    yield from sockets
    yield from sandboxed
    yield from table
    # The following need facts from the job table.
    here = begin("sockets", partial(check_workers_here, settings, facts), LOCAL_CHECK_S, HINT_VOLUME)
    on_volume = []
    if reachable:
        on_volume = [
            begin("volume", partial(check_same_volume, settings, facts), VOLUME_S, HINT_VOLUME),
            begin("room", partial(check_room, settings, facts), VOLUME_S, HINT_VOLUME),
            begin("missing", partial(check_registered, settings, facts), VOLUME_S, HINT_VOLUME),
            begin("orphans", partial(_orphans, settings, facts), ORPHANS_S + 1.0, HINT_VOLUME),
        ]
    notifications = begin(
        "redis", partial(check_notifications, settings, facts), REDIS_S, "check GANQ_REDIS_URL"
    )
    yield from here
    yield from redis
    yield from notifications
    yield from volume
    for one in on_volume:
        yield from one
    if verify_data and reachable:
        yield from begin("datasets", partial(check_datasets, settings), DATASETS_S, HINT_VOLUME)
    yield from gpus
    yield from check_extras()
    facts.close()


def _orphans(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Check for unreferenced files; a volume that is too large for the time limit is not an error."""
    try:
        yield from within(ORPHANS_S, lambda: list(check_orphans(settings, facts)))
    except TimeoutError:
        yield ok(
            "orphans",
            f"not counted, as that takes longer than {ORPHANS_S:.0f} s: ganq gc --dry-run counts them",
        )


def check_python() -> Finding:
    from storage.version import version

    if version() == "0+unknown":
        return warn("ganq", "ganq is not installed, only found on the import path", "pip install ganq")
    return ok("ganq", f"{version()}, Python {'.'.join(map(str, sys.version_info[:3]))}")


def check_environment(left_out: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    """
    Report what the environment sets for other programs, and ganq ignores.

    Args:
        left_out: folders of PYTHONPATH that are not searched, each with what would hide a module.
    """
    if names := environment.foreign(os.environ):
        yield ok("ignored", f"{', '.join(names)}: settings of other programs, which ganq does not read")
    if left_out:
        folders = ", ".join(f"{folder} ({name})" for folder, name in left_out)
        yield ok("ignored", f"PYTHONPATH: {folders} would hide modules that ganq needs, and is not searched")


# --- extras -------------------------------------------------------------------------------


def check_extras() -> Iterator[Finding]:
    """Report which extras of the package are installed; training needs none."""
    for extra, packages in extras().items():
        missing = [name for name in packages if not _installed(name)]
        use = USES.get(extra, f"ganq[{extra}]")
        if missing:
            yield ok("extras", f"{extra} is not installed ({use}): pip install 'ganq[{extra}]'")
        else:
            yield ok("extras", f"{extra} is installed ({use})")


def extras() -> dict[str, list[str]]:
    """Return the extras that the package declares: extra → names of distributions."""
    found: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("ganq") or []
    except metadata.PackageNotFoundError:
        return {}
    for line in requirements:
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        name = re.match(r"[A-Za-z0-9._-]+", line)
        if extra and name:
            found.setdefault(extra[1], []).append(name[0])
    return found


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
