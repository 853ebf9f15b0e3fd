"""
Finds GPUs and pins a process to one, before anything imports torch.

Asks nvidia-smi, which comes with the driver: importing torch to count devices
would take seconds and open a CUDA context in the wrong process.
"""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jobs.errors import GpuBusyError, GpuUnavailableError

QUERY = "index,uuid,name,memory.total"
ASK_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Gpu:
    """One GPU as the driver names it."""

    index: int
    uuid: str
    name: str
    memory_mib: int

    @property
    def label(self) -> str:
        return f"gpu{self.index}"

    @property
    def key(self) -> str:
        return self.uuid

    @property
    def arguments(self) -> tuple[str, ...]:
        """What `ganq worker` is told to run on this one."""
        return "--gpus", self.uuid


def discover() -> list[Gpu]:
    """
    All GPUs of this machine, by index; none where there is no driver.

    Raises:
        GpuUnavailableError: there is a driver, and it does not answer.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        asked = subprocess.run(
            [program, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
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
    return [_parse(line) for line in asked.stdout.splitlines() if line.strip()]


def _parse(line: str) -> Gpu:
    parts = [part.strip() for part in line.split(",")]
    if len(parts) != 4 or not parts[0].isdigit() or not re.fullmatch(r"[A-Za-z0-9-]+", parts[1]):
        raise GpuUnavailableError(f"nvidia-smi answered what ganq cannot read: {line[:80]!r}")
    memory = int(parts[3]) if parts[3].isdigit() else 0  # '[N/A]' on GPUs with unified memory
    return Gpu(int(parts[0]), parts[1], parts[2], memory)


def choose(wanted: str) -> list[Gpu]:
    """
    The GPUs that `--gpus` names.

    Args:
        wanted: 'auto' or 'all' (every GPU; none where there is none), 'none',
            or indices and UUIDs separated by commas.

    Raises:
        GpuUnavailableError: one of them is not there; the hint lists those that are.
    """
    if wanted == "none":
        return []
    there = discover()
    if wanted in ("auto", "all"):
        return there
    known = {str(gpu.index): gpu for gpu in there} | {gpu.uuid: gpu for gpu in there}
    chosen: dict[str, Gpu] = {}
    for one in wanted.split(","):
        gpu = known.get(one.strip())
        if gpu is None:
            names = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in there) or "none"
            raise GpuUnavailableError(
                f"there is no GPU {one.strip()[:60]!r} on this machine",
                hint=f"GPUs here: {names}; --gpus none runs on the CPU",
            )
        chosen[gpu.uuid] = gpu
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


def lock(label: str, folder: Path | None = None) -> IO[str]:
    """
    Hold a GPU (its UUID) or a CPU worker's name against a second worker on this machine.

    Args:
        folder: where the lock lies; the machine's temporary folder by default, so that
            workers of different GANQ_HOMEs meet.

    Returns:
        An open file; the lock is held until it is closed or the process ends.

    Raises:
        GpuBusyError: another worker holds it.
    """
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", label)
    path = (folder or Path(tempfile.gettempdir())) / f"ganq-{safe}.lock"
    try:
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
    except PermissionError:  # made by another user: reading is enough for a lock
        file = open(path)  # noqa: SIM115 - stays open for as long as the lock is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        file.close()
        raise GpuBusyError(
            f"another worker of this machine already holds {label}",
            hint="ganq workers shows it; give this one another --gpus or --name",
        ) from exc
    return file
