"""
What `ganq doctor` finds out about this machine: Redis, GPUs, the torch that is installed, the extras.

torch is never imported: its version and build stand in files that are read as text.
"""

import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from jobs.errors import GanqError
from storage.diagnosis import Finding, check_job_table, check_volume, fail, ok, warn
from storage.settings import Settings, redact

TORCH_NEEDED = (2, 10)
"""Older ones run code from files that weights_only=True should make safe: CVE-2026-24747."""
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA's major version → the oldest driver series that runs it (NVIDIA, CUDA compatibility)."""
LONGEST_SOCKET = 107
DRIVER = Path("/proc/driver/nvidia/version")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
USES = {
    "local": "the embedded Redis of ganq up",
    "faces": "ganq dataset make and ganq demo",
    "onnx": "ganq export --format onnx",
}
"""What each extra of the package is for."""


def examine(settings: Settings) -> Iterator[Finding]:
    """Every check, from what all else stands on to what is nice to have."""
    yield check_python()
    yield check_runtime(settings)
    yield from check_job_table(settings)
    yield check_redis(settings)
    yield from check_volume(settings)
    gpus, finding = check_gpus()
    yield finding
    yield check_torch(gpus)
    yield from check_extras()


def check_python() -> Finding:
    from storage.version import version

    return ok("ganq", f"{version()}, Python {'.'.join(map(str, sys.version_info[:3]))}")


def check_runtime(settings: Settings) -> Finding:
    """Where sockets and locks lie: a socket's path has at most 107 bytes."""
    longest = len(str(settings.runtime / "wake-4194304.sock").encode())
    if longest > LONGEST_SOCKET:
        return fail(
            "sockets",
            f"{settings.runtime} is too long for a socket ({longest} bytes, {LONGEST_SOCKET} are possible)",
            "set TMPDIR to a shorter path, e.g. /tmp",
        )
    return ok("sockets", str(settings.runtime))


# --- Redis --------------------------------------------------------------------------------


def check_redis(settings: Settings) -> Finding:
    """Whether the doorbell answers; without it workers find jobs by polling."""
    import redis

    # kombu and redis-py spell a unix socket in two ways.
    url = re.sub(r"^redis\+socket://", "unix://", settings.redis_url)
    late = f"jobs run all the same, up to {settings.poll_seconds:.0f} s later"
    try:
        client = redis.Redis.from_url(url, socket_connect_timeout=2.0, socket_timeout=2.0)
    except ValueError as exc:
        return fail(
            "redis", f"GANQ_REDIS_URL={redact(settings.redis_url)} is no URL of a Redis: {exc}", HINT_URL
        )
    try:
        client.ping()
        version = client.info("server").get("redis_version", "of an unknown version")
    except redis.exceptions.ConnectionError as exc:
        # Its subclasses tell of a server that is there and turns us away.
        if isinstance(exc, redis.exceptions.AuthenticationError):
            return fail("redis", f"Redis refuses the user or password: {_first(exc)}", HINT_URL)
        if settings.embedded_redis:
            return _embedded_redis_is_down(late)
        return warn(
            "redis", f"Redis does not answer: {_first(exc)}; {late}", "start it, or check GANQ_REDIS_URL"
        )
    except redis.exceptions.TimeoutError:
        return warn(
            "redis", f"Redis does not answer within 2 s; {late}", "check GANQ_REDIS_URL and the network"
        )
    except redis.exceptions.RedisError as exc:
        return fail("redis", f"Redis answers, but not as it should: {_first(exc)}", HINT_URL)
    finally:
        client.close()
    address = urlsplit(settings.redis_url)
    if address.scheme in ("redis", "rediss") and address.hostname not in LOOPBACK and not address.password:
        return warn(
            "redis",
            f"Redis {version} at {address.hostname} takes commands from anybody who reaches it",
            "give it a password and an ACL: docs/operations.md",
        )
    return ok("redis", f"Redis {version} answers; it need not keep anything on disk")


HINT_URL = (
    "GANQ_REDIS_URL is redis://USER:PASSWORD@HOST:6379/0, best in a file that GANQ_REDIS_URL_FILE names"
)


def _embedded_redis_is_down(late: str) -> Finding:
    from worker.local import redis_server

    try:
        program = redis_server()
    except GanqError as exc:
        return fail("redis", exc.message, exc.hint)
    return warn("redis", f"the embedded Redis ({program}) is not running; {late}", "ganq up starts it")


def _first(exc: Exception) -> str:
    return redact((str(exc).strip().splitlines() or [type(exc).__name__])[0]).rstrip(".")


# --- GPUs and torch -----------------------------------------------------------------------


def check_gpus() -> tuple[int, Finding]:
    """
    Returns:
        (number of GPUs, finding)
    """
    from worker import gpu

    try:
        there = gpu.discover()
    except GanqError as exc:
        return 0, fail("gpus", exc.message, exc.hint)
    if not there:
        return 0, ok("gpus", "none that nvidia-smi knows: a worker runs on the CPU")
    names = ", ".join(f"{one.label} {one.name} ({one.memory_mib / 1024:.0f} GiB)" for one in there)
    driver = _driver()
    return len(there), ok("gpus", names + (f"; driver {driver}" if driver else ""))


def _driver() -> str | None:
    try:
        found = re.search(r"\b(\d{3,}(?:\.\d+)+)", DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else None


def check_torch(gpus: int) -> Finding:
    """The installed torch: new enough, and built for the device that is here."""
    try:
        installed = metadata.distribution("torch")
    except metadata.PackageNotFoundError:
        return fail("torch", "torch is not installed", "pip install torch torchvision")
    version = installed.version
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < TORCH_NEEDED:
        needed = ".".join(map(str, TORCH_NEEDED))
        return fail(
            "torch",
            f"torch {version} may run code from weight files",
            f"pip install 'torch>={needed}' torchvision",
        )
    build = torch_build(Path(str(installed.locate_file("torch/version.py"))))
    if gpus and build == "cpu":
        return fail(
            "torch",
            f"torch {version} is built for the CPU alone, and this machine has {gpus} GPU{'s' * (gpus > 1)}",
            "pip install --force-reinstall torch torchvision, from the index for your CUDA: pytorch.org",
        )
    cuda = re.match(r"CUDA (\d+)", build)
    driver = _driver() if gpus else None
    if cuda and driver and int(driver.split(".")[0]) < OLDEST_DRIVER.get(int(cuda[1]), 0):
        return fail(
            "torch",
            f"torch {version} is built for {build}, which the driver {driver} is too old for",
            f"a driver of the series {OLDEST_DRIVER[int(cuda[1])]} or newer, or a torch for an older CUDA",
        )
    return ok("torch", f"{version}, built for {'the CPU' if build == 'cpu' else build}")


def torch_build(version_file: Path) -> str:
    """'cpu', 'CUDA 12.8', 'ROCm 6.4' or 'an unknown device'; torch/version.py is read, not run."""
    try:
        source = version_file.read_text()
    except OSError:
        return "an unknown device"
    for name, title in (("cuda", "CUDA"), ("hip", "ROCm")):
        found = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([\d.]+)", source, re.MULTILINE)
        if found:
            return f"{title} {found[1]}"
    return "cpu"


# --- extras -------------------------------------------------------------------------------


def check_extras() -> Iterator[Finding]:
    """Which optional parts of the package are installed; none is needed to train."""
    for extra, packages in extras().items():
        missing = [name for name in packages if not _installed(name)]
        use = USES.get(extra, f"ganq[{extra}]")
        if missing:
            yield ok("extras", f"{extra} is not installed ({use}): pip install 'ganq[{extra}]'")
        else:
            yield ok("extras", f"{extra} is installed ({use})")


def extras() -> dict[str, list[str]]:
    """The package's own list of its extras: extra → names of distributions."""
    found: dict[str, list[str]] = {}
    try:
        needs = metadata.requires("ganq") or []
    except metadata.PackageNotFoundError:
        return {}
    for line in needs:
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
