"""
What `ganq doctor` finds out about GPUs, their driver, and the torch that is installed for them.

torch is never imported in this process: its version and build stand in files that are
read as text, and where there are GPUs a child process says what it makes of them.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from jobs.errors import GanqError
from worker.doctor.check import Finding, error, ok

TORCH_NEEDED = (2, 10)
"""Older ones run code from files that weights_only=True should make safe: CVE-2026-24747."""
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""CUDA's major version → the oldest driver series that runs it (NVIDIA, CUDA compatibility)."""
DRIVER = Path("/proc/driver/nvidia/version")
TORCH_S = 60.0
"""Importing torch from a cold disk takes long."""

# No tensor is made: a context takes memory that a worker may need.
ASK_TORCH = """
import json, torch
there = torch.cuda.is_available()
print(json.dumps({
    "available": there,
    "arches": torch.cuda.get_arch_list() if there else [],
    "gpus": [[torch.cuda.get_device_name(i), list(torch.cuda.get_device_capability(i))]
             for i in range(torch.cuda.device_count())] if there else [],
}))
"""


def check_gpus_and_torch() -> Iterator[Finding]:
    """The GPUs that the driver names, and whether the installed torch can use them."""
    gpus, finding = check_gpus()
    yield finding
    installed = check_torch(gpus)
    yield installed
    if gpus and installed.level == "ok":
        yield check_use([sys.executable, "-P", "-c", ASK_TORCH])


def check_gpus() -> tuple[int, Finding]:
    """
    Returns:
        (number of GPUs, finding)
    """
    from worker.host import gpu
    from worker.host.visible_gpus import VARIABLE

    try:
        there = gpu.allowed()
    except GanqError as exc:
        return 0, error("gpus", exc.message, exc.hint)
    if not there:
        given = os.environ.get(VARIABLE)
        why = f"none, by {VARIABLE}={given[:80]!r}" if given is not None else "none that nvidia-smi knows"
        return 0, ok("gpus", f"{why}: a worker runs on the CPU")
    names = ", ".join(f"{one.label} {one.name} ({one.memory_mib / 1024:.0f} GiB)" for one in there)
    if given := os.environ.get(VARIABLE):
        names += f", by {VARIABLE}={given[:80]}"
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
        return error("torch", "torch is not installed", "pip install torch torchvision")
    version = installed.version
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) < TORCH_NEEDED:
        needed = ".".join(map(str, TORCH_NEEDED))
        return error(
            "torch",
            f"torch {version} may run code from weight files",
            f"pip install 'torch>={needed}' torchvision",
        )
    build = torch_build(Path(str(installed.locate_file("torch/version.py"))))
    if gpus and build == "cpu":
        return error(
            "torch",
            f"torch {version} is built for the CPU alone, and this machine has {gpus} GPU{'s' * (gpus > 1)}",
            "pip install --force-reinstall torch torchvision, from the index for your CUDA: pytorch.org",
        )
    cuda = re.match(r"CUDA (\d+)", build)
    driver = _driver() if gpus else None
    if cuda and driver and int(driver.split(".")[0]) < OLDEST_DRIVER.get(int(cuda[1]), 0):
        return error(
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


def check_use(command: list[str]) -> Finding:
    """
    Args:
        command: prints what torch makes of the GPUs, as ASK_TORCH does.
    """
    hint = "check the driver (nvidia-smi, dmesg), and that the container was given the GPU"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TORCH_S, check=False
        )
        told = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return error("torch", f"torch has not looked at the GPUs within {TORCH_S:.0f} s", hint)
    except (OSError, ValueError, IndexError):
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return error("torch", f"torch cannot be started: {said}", "pip install --force-reinstall torch")
    if not told["available"]:
        said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return error("torch", f"torch cannot use the GPUs that nvidia-smi names: {said}", hint)
    lacking = [name for name, capability in told["gpus"] if not runs_on(told["arches"], capability)]
    if lacking:
        return error(
            "torch",
            f"this build of torch has no code for {', '.join(lacking)}: only for {', '.join(told['arches'])}",
            "a torch for another CUDA version: pytorch.org",
        )
    return ok("torch", f"can use {len(told['gpus'])} GPU{'s' * (len(told['gpus']) > 1)}")


def runs_on(arches: list[str], capability: list[int]) -> bool:
    """
    Whether a build's code runs on a device of this compute capability.

    Machine code (sm_90) runs on the same major version and the same minor or newer;
    intermediate code (compute_90) on all that is newer.
    """
    major, minor = capability
    for one in arches:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", one)
        if found is None:
            continue
        built = int(found[2]), int(found[3])
        if found[1] == "sm" and built[0] == major and built[1] <= minor:
            return True
        if found[1] == "compute" and built <= (major, minor):
            return True
    return False
