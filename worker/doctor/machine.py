"""
Checks of `ganq doctor`: this machine's sandbox, file permissions, sockets and workers.

Commands find the workers of their machine by sockets in the temporary folder; a worker with another folder
(another TMPDIR, systemd's PrivateTmp) is not found there.
"""

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from storage import sandbox
from storage.db.rows import WorkerRow
from storage.settings import PREFIX, SECRETS, SOCKET_BYTES, Settings
from worker.celery_bridge.wakeup import WAKE_ENV
from worker.doctor.check import Finding, error, ok, warn
from worker.doctor.facts import Facts
from worker.doctor.jobs import alive, listed
from worker.host.embedded_redis import private_folder_hint
from worker.host.process import boot_id, has_died, proc_is_ours

# --- the sandbox --------------------------------------------------------------------------

REQUIREMENTS = {
    "landlock": "a kernel of 5.13 or newer with landlock in /sys/kernel/security/lsm",
    "seccomp": "a kernel with seccomp filters, on x86_64 or aarch64",
    "user": "in a container: map user 65534, or run ganq as a user who is not root",
}
"""Parts of the sandbox that a machine may lack, and what they require."""
SANDBOX_S = 60.0


def check_sandbox(script: Path = Path(sandbox.__file__)) -> Iterator[Finding]:
    """Start a process in the sandbox for foreign files, and report what this kernel does not support."""
    done = subprocess.run(
        [sys.executable, "-P", str(script)], env={}, capture_output=True, text=True, timeout=SANDBOX_S
    )
    try:
        missing: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        yield error(
            "sandbox",
            f"a sandboxed process does not start: {reason[:200]}",
            "weights, images and archives cannot be read on this machine",
        )
        return
    if missing:
        parts = ", ".join(f"{name} ({reason})" for name, reason in missing.items())
        yield warn(
            "sandbox",
            f"foreign weights, images and archives are read without a part of the sandbox: {parts}",
            "; ".join(REQUIREMENTS[name] for name in missing if name in REQUIREMENTS)
            or "read them on another machine",
        )
    else:
        yield ok("sandbox", "foreign files are read with limits, Landlock and seccomp, and never as root")


# --- files ---------------------------------------------------------------------------------


def check_files(settings: Settings, env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Check who may change the settings and read passwords: files and the folders that contain them."""
    config = Path(env.get(f"{PREFIX}CONFIG") or settings.home / "ganq.toml")
    secrets = [Path(name) for one in SECRETS if (name := env.get(f"{PREFIX}{one.upper()}_FILE"))]
    found = []
    for path in [config, *secrets]:
        if path.exists():
            found += list(_check_file(path, secret=path in secrets or _contains_password(path)))
    if settings.home.is_dir():
        found += list(_check_folder(settings.home))
    yield from found or [ok("files", "only their owner can change settings and read passwords")]


def _check_file(path: Path, *, secret: bool) -> Iterator[Finding]:
    about = path.stat()
    if about.st_mode & stat.S_IWOTH:
        yield error("files", f"{path} is writable by all users", f"chmod o-w {path}")
    elif about.st_uid not in (0, os.getuid()):
        yield warn(
            "files", f"{path} belongs to another user (uid {about.st_uid}), who may change it", "chown"
        )
    if secret and stat.S_ISREG(about.st_mode) and about.st_mode & stat.S_IROTH:
        yield warn("files", f"{path} contains a password and is readable by all users", f"chmod 600 {path}")
    yield from _check_folder(path.parent)


def _check_folder(folder: Path) -> Iterator[Finding]:
    """Check that not everybody can replace files: a world-writable folder needs the sticky bit."""
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield error("files", f"all users may replace the files in {folder}", f"chmod o-w {folder}")


def _contains_password(path: Path) -> bool:
    from urllib.parse import urlsplit

    with suppress(OSError, UnicodeDecodeError, ValueError):
        return any(
            urlsplit(word.strip("'\" ")).password for word in path.read_text().split() if "://" in word
        )
    return False


# --- the runtime folder -------------------------------------------------------------------


def check_runtime(settings: Settings) -> Iterator[Finding]:
    """Check the folder of the sockets: private to this user, short enough, in TMPDIR."""
    folder = settings.runtime
    requested = os.environ.get("TMPDIR") or tempfile.gettempdir()
    if Path(requested).absolute() != folder.parent.absolute():
        yield ok(
            "sockets",
            f"TMPDIR={requested} is not writable or too long for sockets ({SOCKET_BYTES} bytes):"
            f" {folder.parent} is used",
        )
    parent = folder.parent.stat()
    if parent.st_mode & stat.S_IWOTH and not parent.st_mode & stat.S_ISVTX:
        yield error(
            "sockets",
            f"all users may delete the files in {folder.parent}",
            f"chmod +t {folder.parent}",
        )
    try:
        about = folder.lstat()
    except FileNotFoundError:
        yield ok("sockets", f"{folder}, created when needed")
        return
    problems = []
    if not stat.S_ISDIR(about.st_mode):
        problems.append("is not a folder")
    if about.st_uid != os.getuid():
        problems.append(f"belongs to another user (uid {about.st_uid})")
    if stat.S_IMODE(about.st_mode) & 0o077:
        problems.append(f"is open to others (mode {stat.S_IMODE(about.st_mode):o})")
    if problems:
        yield error(
            "sockets", f"{folder} {' and '.join(problems)}: no worker starts", private_folder_hint(folder)
        )
    else:
        yield ok("sockets", str(folder))


# --- the workers of this machine ----------------------------------------------------------


def check_workers_here(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Check that the workers of this machine are alive and use the same runtime folder as this command."""
    boot = boot_id()
    local = [
        one
        for one in facts.workers
        if boot and (one.boot_id, one.host) == (boot, socket.gethostname()) and one.state != "stopped"
    ]
    dead = [one.name for one in local if has_died(one.pid or 0, one.start_ticks or 0)]
    if dead:
        yield warn(
            "workers",
            f"died on this machine: {listed(dead)}",
            "start them again; see their logs for the cause",
        )
    for one in local:
        if one.name not in dead and alive(one, settings):
            yield from _check_sockets(one, settings)


def _check_sockets(worker: WorkerRow, settings: Settings) -> Iterator[Finding]:
    env = _environment(worker.pid or 0)
    if env is None or WAKE_ENV not in env:
        return  # another user's process, whose environment is not visible
    wake_socket = Path(env[WAKE_ENV])
    folder = wake_socket.parent
    if folder != settings.runtime:
        yield warn(
            "sockets",
            f"the sockets of {worker.name} are in {folder}, not in {settings.runtime}:"
            " ganq health asks the job table instead",
            "set one TMPDIR and one GANQ_HOME for all of this machine",
        )
    elif not wake_socket.exists():
        yield warn(
            "sockets",
            f"the socket of {worker.name} is not in {folder}: ganq health asks the job table instead",
            f"a service needs PrivateTmp=no; if it was deleted, restart the worker and exclude {folder.name}"
            " from what cleans the folder (tmpfiles.d: x)",
        )


def _environment(pid: int) -> dict[str, str] | None:
    if not proc_is_ours():
        return None
    try:
        raw = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return None
    pairs = (part.partition("=") for part in raw.decode(errors="replace").split("\0") if part)
    return {name: value for name, _, value in pairs}
