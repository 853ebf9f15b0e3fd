"""
Finds GPUs and pins a process to one, before anything imports torch.

Asks nvidia-smi, which comes with the driver: importing torch to count devices
would take seconds and open a CUDA context in the wrong process.
"""

import errno
import hashlib
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from jobs.errors import GpuBusyError, GpuUnavailableError
from worker.host import visible_gpus
from worker.host.visible_gpus import Gpu as Gpu  # launcher.py and the tests use it from here

QUERY = "index,uuid,name,memory.total"
ASK_TIMEOUT_S = 20.0
LABEL_BYTES = 60  # of the 107 that a socket's address has
GPU_LINE = re.compile(r"GPU (\d+): (.+?) \(UUID:")
MIG_LINE = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+):\s*\(UUID: (MIG-[^\s)]+)\)")
"""As `nvidia-smi -L` names them."""


def discover() -> list[Gpu]:
    """
    All GPUs of this machine, by index; none where there is no driver.

    Raises:
        GpuUnavailableError: there is a driver, and it does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    lines = _ask(program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
    return [_parse(line) for line in lines if line.strip()]


def discover_mig() -> list[Gpu]:
    """
    Return the MIG devices of this machine's GPUs.

    Raises:
        GpuUnavailableError: there is a driver, and it does not answer.
    """
    program = shutil.which("nvidia-smi")
    found: list[Gpu] = []
    index, model = 0, ""
    for line in _ask(program, "-L") if program else []:
        if gpu := GPU_LINE.match(line):
            index, model = int(gpu[1]), gpu[2]
        elif mig := MIG_LINE.match(line):
            memory = re.search(r"(\d+)gb", mig[1])
            name, memory_mib = f"{model} MIG {mig[1]}", int(memory[1]) * 1024 if memory else 0
            found.append(Gpu(index, mig[3], name, memory_mib, f"-mig{mig[2]}"))
    return found


def _ask(program: str, *arguments: str) -> list[str]:
    """
    Return the lines of nvidia-smi's answer; none where it knows no GPU.

    Raises:
        GpuUnavailableError: it does not answer.
    """
    try:
        asked = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ASK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise GpuUnavailableError(f"nvidia-smi does not answer: {exc}", hint="check the driver") from exc
    if asked.returncode != 0:
        said = (asked.stdout + asked.stderr).strip().splitlines() or ["no reason given"]
        if "No devices were found" in said[0]:
            return []
        raise GpuUnavailableError(
            f"nvidia-smi failed: {said[0]}", hint="check the driver, or run with --gpus none"
        )
    return asked.stdout.splitlines()


def allowed(wanted: str = "", env: Mapping[str, str] = os.environ) -> list[Gpu]:
    """
    Return the GPUs of this machine that the environment lets this process use.

    Args:
        wanted: the value of `--gpus`, which may name MIG devices.

    Raises:
        GpuUnavailableError: see discover() and visible_gpus.select().
    """
    lists = env.get(visible_gpus.VARIABLE), env.get(visible_gpus.CONTAINER_VARIABLE), wanted
    there = discover()
    mig = discover_mig() if there and visible_gpus.names_mig(*lists) else []
    selected = visible_gpus.select(there, mig, env)
    if env.get(visible_gpus.VARIABLE) is None and visible_gpus.names_mig(wanted):
        selected += [gpu for gpu in mig if gpu not in selected]
    return selected


def _parse(line: str) -> Gpu:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4 or not parts[0].isdigit() or not re.fullmatch(r"[A-Za-z0-9-]+", parts[1]):
        raise GpuUnavailableError(f"nvidia-smi answered what ganq cannot read: {line[:80]!r}")
    memory = int(parts[3]) if parts[3].isdigit() else 0  # '[N/A]' on GPUs with unified memory
    return Gpu(int(parts[0]), parts[1], parts[2], memory)


def choose(wanted: str) -> list[Gpu]:
    """
    Return the GPUs that `--gpus` names, of those that CUDA_VISIBLE_DEVICES allows.

    Args:
        wanted: 'auto' or 'all' (every one; none where there is none), 'none',
            or nvidia-smi's indices and UUIDs separated by commas.

    Raises:
        GpuUnavailableError: one of them is not there; the hint lists those that are.
    """
    if wanted == "none":
        return []
    there = allowed(wanted)
    if wanted in ("auto", "all"):
        return there
    chosen: dict[str, Gpu] = {}
    for name in wanted.split(","):
        found = visible_gpus.find(name, there)
        if not found or (len(found) > 1 and not name.strip().isdigit()):
            given = os.environ.get(visible_gpus.VARIABLE)
            among = f"among those of {visible_gpus.VARIABLE}={given[:200]}" if given else "on this machine"
            raise GpuUnavailableError(
                f"there is no GPU {name.strip()[:60]!r} {among}",
                hint=f"GPUs here: {visible_gpus.described(there)}; --gpus none runs on the CPU",
            )
        chosen.update({gpu.uuid: gpu for gpu in found})
    return list(chosen.values())


def pin(gpu: Gpu | None) -> dict[str, str]:
    """
    The environment that shows one GPU, or none, to a process and its children.

    The UUID is used because an index changes its meaning with CUDA's own ordering.
    """
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": gpu.uuid if gpu else "",
        # cuBLAS is deterministic only with a fixed workspace, read when CUDA starts.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def lock(label: str, scope: Path | None = None) -> socket.socket:
    """
    Hold a GPU (its UUID) or a worker's name against a second worker on this machine.

    The lock is the address of a unix socket in the abstract namespace. Unlike a file in the temporary
    folder, it has no owner who could keep other users out, nothing that cleans that folder can part it
    from its holder, and workers with different temporary folders meet.

    Args:
        scope: a folder for which the lock holds; the whole machine by default.

    Returns:
        An open socket; the lock is held until it is closed here and in every process that inherited it.

    Raises:
        GpuBusyError: another worker holds it.
    """
    place = ""
    if scope is not None:
        try:
            about = scope.stat()  # not its name: two containers on one network may each have a /data
            place = f"@{about.st_dev:x}.{about.st_ino:x}"
        except OSError:
            place = f"@{hashlib.sha256(os.fsencode(scope)).hexdigest()[:32]}"
    if len(label.encode()) > LABEL_BYTES:
        label = hashlib.sha256(label.encode()).hexdigest()[:LABEL_BYTES]
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        held.bind(f"\0ganq-lock/{label}{place}")
    except OSError as exc:
        held.close()
        if exc.errno != errno.EADDRINUSE:
            raise
        raise GpuBusyError(
            f"another worker of this machine already holds {label}",
            hint="ganq workers shows it; give this one another --gpus or --name",
        ) from exc
    return held
