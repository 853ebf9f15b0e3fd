"""
Find GPUs and pin a process to one, before anything imports torch.

GPUs are listed by nvidia-smi, which comes with the driver: importing torch to count devices would take
seconds and open a CUDA context in the wrong process.
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
NVIDIA_SMI_S = 20.0
LABEL_BYTES = 60  # of the 107 bytes of a socket's address
GPU_LINE = re.compile(r"GPU (\d+): (.+?) \(UUID:")
MIG_LINE = re.compile(r"\s+MIG (\S+)\s+Device\s+(\d+):\s*\(UUID: (MIG-[^\s)]+)\)")
"""As `nvidia-smi -L` prints them."""


def discover() -> list[Gpu]:
    """
    Return all GPUs of this machine, by index; none if there is no driver.

    Raises:
        GpuUnavailableError: there is a driver, and it does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    lines = _run_nvidia_smi(program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits")
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
    for line in _run_nvidia_smi(program, "-L") if program else []:
        if gpu := GPU_LINE.match(line):
            index, model = int(gpu[1]), gpu[2]
        elif mig := MIG_LINE.match(line):
            memory = re.search(r"(\d+)gb", mig[1])
            name, memory_mib = f"{model} MIG {mig[1]}", int(memory[1]) * 1024 if memory else 0
            found.append(Gpu(index, mig[3], name, memory_mib, f"-mig{mig[2]}"))
    return found


def _run_nvidia_smi(program: str, *arguments: str) -> list[str]:
    """
    Return the lines that nvidia-smi prints; none if there is no GPU.

    Raises:
        GpuUnavailableError: it does not answer.
    """
    try:
        done = subprocess.run(
            [program, *arguments],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=NVIDIA_SMI_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise GpuUnavailableError(f"nvidia-smi does not answer: {exc}", hint="check the driver") from exc
    if done.returncode != 0:
        output = (done.stdout + done.stderr).strip().splitlines() or ["no reason given"]
        if "No devices were found" in output[0]:
            return []
        raise GpuUnavailableError(
            f"nvidia-smi failed: {output[0]}", hint="check the driver, or run with --gpus none"
        )
    return done.stdout.splitlines()


def allowed(wanted: str = "", env: Mapping[str, str] = os.environ) -> list[Gpu]:
    """
    Return the GPUs of this machine that the environment lets this process use.

    Args:
        wanted: the value of `--gpus`, which may name MIG devices.

    Raises:
        GpuUnavailableError: see discover() and visible_gpus.select().
    """
    lists = env.get(visible_gpus.VARIABLE), env.get(visible_gpus.CONTAINER_VARIABLE), wanted
    gpus = discover()
    mig = discover_mig() if gpus and visible_gpus.names_mig(*lists) else []
    selected = visible_gpus.select(gpus, mig, env)
    if env.get(visible_gpus.VARIABLE) is None and visible_gpus.names_mig(wanted):
        selected += [gpu for gpu in mig if gpu not in selected]
    return selected


def _parse(line: str) -> Gpu:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4 or not parts[0].isdigit() or not re.fullmatch(r"[A-Za-z0-9-]+", parts[1]):
        raise GpuUnavailableError(f"nvidia-smi printed a line that ganq cannot read: {line[:80]!r}")
    memory_mib = int(parts[3]) if parts[3].isdigit() else 0  # '[N/A]' on GPUs with unified memory
    return Gpu(int(parts[0]), parts[1], parts[2], memory_mib)


def choose(wanted: str) -> list[Gpu]:
    """
    Return the GPUs that `--gpus` names, of those that CUDA_VISIBLE_DEVICES allows.

    Args:
        wanted: 'auto' or 'all' (all that there are, maybe none), 'none', or nvidia-smi's indices and UUIDs
            separated by commas.

    Raises:
        GpuUnavailableError: one of them does not exist; the hint lists those that do.
    """
    if wanted == "none":
        return []
    available = allowed(wanted)
    if wanted in ("auto", "all"):
        return available
    chosen: dict[str, Gpu] = {}
    for name in wanted.split(","):
        found = visible_gpus.find(name, available)
        if not found or (len(found) > 1 and not name.strip().isdigit()):
            value = os.environ.get(visible_gpus.VARIABLE)
            among = f"among those of {visible_gpus.VARIABLE}={value[:200]}" if value else "on this machine"
            raise GpuUnavailableError(
                f"there is no GPU {name.strip()[:60]!r} {among}",
                hint=f"GPUs here: {visible_gpus.described(available)}; --gpus none uses the CPU",
            )
        chosen.update({gpu.uuid: gpu for gpu in found})
    return list(chosen.values())


def pin(gpu: Gpu | None) -> dict[str, str]:
    """
    Return the environment that makes one GPU, or none, visible to a process and its children.

    The GPU is named by UUID, because the meaning of an index depends on CUDA's ordering.
    """
    return {
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": gpu.uuid if gpu else "",
        # cuBLAS is deterministic only with a fixed workspace, read when CUDA starts.
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }


def lock(label: str, scope: Path | None = None) -> socket.socket:
    """
    Lock a GPU (its UUID) or a worker's name against a second worker on this machine.

    The lock is the address of a unix socket in the abstract namespace. Unlike a file in the temporary
    folder it has no owner who could exclude other users, cannot be deleted by a program that cleans the
    folder, and is shared by workers with different temporary folders.

    Args:
        scope: a folder for which the lock is valid; the whole machine by default.

    Returns:
        An open socket; the lock is held until it is closed here and in every process that inherited it.

    Raises:
        GpuBusyError: another worker holds it.
    """
    place = ""
    if scope is not None:
        try:
            about = scope.stat()  # not its name: two containers with one network may each have a /data
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
            hint="ganq workers shows it; use another --gpus or --name",
        ) from exc
    return held
