"""
What `ganq doctor` finds out about this machine: whose its files are, and whether its workers meet.

Commands find the workers of their machine by sockets in the temporary folder; a worker with another
one (another TMPDIR, systemd's PrivateTmp) is not found there.
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

# --- reading what comes from outside -----------------------------------------------------------

WALLS = {
    "landlock": "a kernel of 5.13 or newer with landlock in /sys/kernel/security/lsm",
    "seccomp": "a kernel with seccomp filters, on x86_64 or aarch64",
    "user": "in a container: map user 65534, or run ganq as a user who is not root",
}
"""Walls that a machine may lack, and what gives them."""
SANDBOX_S = 60.0


def check_sandbox(script: Path = Path(sandbox.__file__)) -> Iterator[Finding]:
    """Confine a process as the readers of foreign files are, and name the walls that this kernel lacks."""
    done = subprocess.run(
        [sys.executable, "-P", str(script)], env={}, capture_output=True, text=True, timeout=SANDBOX_S
    )
    try:
        missing: dict[str, str] = json.loads(done.stdout)
    except ValueError:
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        yield error(
            "sandbox",
            f"a confined process does not start: {said[:200]}",
            "weights, pictures and archives cannot be read here",
        )
        return
    if missing:
        named = ", ".join(f"{name} ({why})" for name, why in missing.items())
        yield warn(
            "sandbox",
            f"foreign weights, pictures and archives are read without a part of the sandbox: {named}",
            "; ".join(WALLS[name] for name in missing if name in WALLS) or "read them on another machine",
        )
    else:
        yield ok("sandbox", "foreign files are read with limits, Landlock and seccomp, and never as root")


# --- files that decide --------------------------------------------------------------------


def check_files(settings: Settings, env: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Who may change the settings and read the passwords: files, and the folders that hold them."""
    config = Path(env.get(f"{PREFIX}CONFIG") or settings.home / "ganq.toml")
    secret = [Path(name) for one in SECRETS if (name := env.get(f"{PREFIX}{one.upper()}_FILE"))]
    found = []
    for path in [config, *secret]:
        if path.exists():
            found += list(_file(path, secret=path in secret or _holds_password(path)))
    if settings.home.is_dir():
        found += list(_folder(settings.home))
    yield from found or [ok("files", "settings and passwords are in the hands of their owner alone")]


def _file(path: Path, *, secret: bool) -> Iterator[Finding]:
    about = path.stat()
    if about.st_mode & stat.S_IWOTH:
        yield error("files", f"{path} can be written by everybody", f"chmod o-w {path}")
    elif about.st_uid not in (0, os.getuid()):
        yield warn(
            "files", f"{path} belongs to another user (uid {about.st_uid}), who may change it", "chown"
        )
    if secret and stat.S_ISREG(about.st_mode) and about.st_mode & stat.S_IROTH:
        yield warn("files", f"{path} holds a password and can be read by everybody", f"chmod 600 {path}")
    yield from _folder(path.parent)


def _folder(folder: Path) -> Iterator[Finding]:
    """A folder that all may write, without the sticky bit: anybody may put another file in a file's place."""
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        yield error(
            "files", f"everybody may put other files in the place of those in {folder}", f"chmod o-w {folder}"
        )


def _holds_password(path: Path) -> bool:
    from urllib.parse import urlsplit

    with suppress(OSError, UnicodeDecodeError, ValueError):
        return any(
            urlsplit(word.strip("'\" ")).password for word in path.read_text().split() if "://" in word
        )
    return False


# --- the runtime folder -------------------------------------------------------------------


def check_runtime(settings: Settings) -> Iterator[Finding]:
    """Where sockets and locks lie: private to this user, short enough, where TMPDIR says."""
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
            f"anybody may take away what lies in {folder.parent}",
            f"chmod +t {folder.parent}",
        )
    try:
        about = folder.lstat()
    except FileNotFoundError:
        yield ok("sockets", f"{folder}, made when it is needed")
        return
    wrong = []
    if not stat.S_ISDIR(about.st_mode):
        wrong.append("is no folder")
    if about.st_uid != os.getuid():
        wrong.append(f"belongs to another user (uid {about.st_uid})")
    if stat.S_IMODE(about.st_mode) & 0o077:
        wrong.append(f"is open to others (mode {stat.S_IMODE(about.st_mode):o})")
    if wrong:
        yield error(
            "sockets", f"{folder} {' and '.join(wrong)}: no worker starts", private_folder_hint(folder)
        )
    else:
        yield ok("sockets", str(folder))


# --- the workers of this machine ----------------------------------------------------------


def check_workers_here(settings: Settings, facts: Facts) -> Iterator[Finding]:
    """Whether the workers of this machine live, and use the same runtime folder as this command."""
    here = boot_id()
    ours = [
        one
        for one in facts.workers
        if here and (one.boot_id, one.host) == (here, socket.gethostname()) and one.state != "stopped"
    ]
    dead = [one.name for one in ours if has_died(one.pid or 0, one.start_ticks or 0)]
    if dead:
        yield warn(
            "workers", f"died on this machine: {listed(dead)}", "start them again; their logs may say why"
        )
    for one in ours:
        if one.name not in dead and alive(one, settings):
            yield from _runtime_of(one, settings)


def _runtime_of(worker: WorkerRow, settings: Settings) -> Iterator[Finding]:
    env = _environment(worker.pid or 0)
    if env is None or WAKE_ENV not in env:
        return  # another user's: its surroundings are not ours to see
    socket = Path(env[WAKE_ENV])
    theirs = socket.parent
    if theirs != settings.runtime:
        yield warn(
            "sockets",
            f"the sockets of {worker.name} are in {theirs}, not in {settings.runtime}:"
            " ganq health asks the job table instead",
            "set one TMPDIR and one GANQ_HOME for all of this machine",
        )
    elif not socket.exists():
        yield warn(
            "sockets",
            f"the socket of {worker.name} is not in {theirs}: ganq health asks the job table instead",
            f"a service needs PrivateTmp=no; if it was deleted, restart the worker and exclude {theirs.name}"
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
