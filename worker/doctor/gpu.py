"""
Checks of `ganq doctor`: GPUs, their driver, and the installed torch.

torch is not imported in this process. Its version and build are read from files as text; if there are GPUs,
a child process reports what torch sees.
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
"""Older versions run code from weight files in spite of weights_only=True: CVE-2026-24747."""
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Major version of CUDA → oldest driver series that supports it (NVIDIA, CUDA compatibility)."""
DRIVER = Path("/proc/driver/nvidia/version")
TORCH_S = 60.0
"""Importing torch from a cold disk takes some time."""

# Creates no tensor: a CUDA context takes memory that a worker may need.
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
    """Check the GPUs that the driver lists, and whether the installed torch can use them."""
    gpus, finding = check_gpus()
    yield finding
    installed = check_torch(gpus)
    yield installed
    if gpus and installed.level == "ok":
        yield check_torch_on_gpus([sys.executable, "-P", "-c", ASK_TORCH])


def check_gpus() -> tuple[int, Finding]:
    """Check the driver and list the GPUs; return (number of GPUs, finding)."""
    from worker.host import gpu
    from worker.host.visible_gpus import VARIABLE

    try:
        gpus = gpu.allowed()
    except GanqError as exc:
        return 0, error("gpus", exc.message, exc.hint)
    value = os.environ.get(VARIABLE)
    if not gpus:
        reason = f"none, by {VARIABLE}={value[:80]!r}" if value is not None else "nvidia-smi lists none"
        return 0, ok("gpus", f"{reason}: a worker runs on the CPU")
    names = ", ".join(f"{one.label} {one.name} ({one.memory_mib / 1024:.0f} GiB)" for one in gpus)
    if value:
        names += f", by {VARIABLE}={value[:80]}"
    driver = _driver()
    return len(gpus), ok("gpus", names + (f"; driver {driver}" if driver else ""))


def _driver() -> str | None:
    try:
        found = re.search(r"\b(\d{3,}(?:\.\d+)+)", DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else None


def check_torch(gpus: int) -> Finding:
    """Check that the installed torch is new enough and built for this machine's device."""
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
    """Return 'cpu', 'CUDA 12.8', 'ROCm 6.4' or 'an unknown device', read from torch/version.py as text."""
    try:
        source = version_file.read_text()
    except OSError:
        return "an unknown device"
    for name, title in (("cuda", "CUDA"), ("hip", "ROCm")):
        found = re.search(rf"^{name}\b[^=\n]*=\s*['\"]([\d.]+)", source, re.MULTILINE)
        if found:
            return f"{title} {found[1]}"
    return "cpu"


def check_torch_on_gpus(command: list[str]) -> Finding:
    """
    Check whether torch can use the GPUs.

    Args:
        command: prints what torch sees, as ASK_TORCH does.
    """
    hint = "check the driver (nvidia-smi, dmesg), and that the container was given the GPU"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TORCH_S, check=False
        )
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except subprocess.TimeoutExpired:
        return error("torch", f"torch has not listed the GPUs within {TORCH_S:.0f} s", hint)
    except (OSError, ValueError, IndexError):
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return error("torch", f"torch cannot be started: {reason}", "pip install --force-reinstall torch")
    if not answer["available"]:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return error("torch", f"torch cannot use the GPUs that nvidia-smi lists: {reason}", hint)
    arches, gpus = answer["arches"], answer["gpus"]
    unsupported = [name for name, capability in gpus if not runs_on(arches, capability)]
    if unsupported:
        return error(
            "torch",
            f"this build of torch has no code for {', '.join(unsupported)}: only for {', '.join(arches)}",
            "install a torch for another CUDA version: pytorch.org",
        )
    return ok("torch", f"can use {len(gpus)} GPU{'s' * (len(gpus) > 1)}")


def runs_on(arches: list[str], capability: list[int]) -> bool:
    """
    Return whether a build's code runs on a device of this compute capability.

    Machine code (sm_90) runs on the same major version and the same or a newer minor version, intermediate
    code (compute_90) on all newer ones.
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
