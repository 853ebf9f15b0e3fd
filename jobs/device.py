"""The device of a process: the CPU or the GPU that it is pinned to, and its determinism."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.errors import GpuUnavailableError, OutOfMemoryError

NamedTensors = Mapping[str, Tensor]
"""Tensors by name: the inputs or outputs of a phase."""


def choose(wanted: str) -> torch.device:
    """
    Return the device for a --device.

    Args:
        wanted: 'auto', 'cpu' or 'cuda'.

    Raises:
        GpuUnavailableError: 'cuda' where there is none.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise GpuUnavailableError(
            "--device cuda: this worker has no GPU that PyTorch can use",
            hint="--device auto takes what is there; ganq doctor shows why",
        )
    return torch.device("cuda" if there and wanted != "cpu" else "cpu")


def set_exactness(device: torch.device, *, deterministic: bool) -> None:
    """
    Select deterministic kernels on a GPU, or the fastest ones.

    Every job sets this, because a warm process has run others before. A CPU is deterministic for a given
    number of threads.
    """
    on_gpu = device.type == "cuda"
    torch.use_deterministic_algorithms(on_gpu and deterministic)
    torch.backends.cudnn.deterministic = on_gpu and deterministic
    torch.backends.cudnn.benchmark = on_gpu and not deterministic
    # Deterministic mode also fills each new tensor with NaN, against reads of raw memory: not needed here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """
    Copy a tensor to the device without synchronising with a GPU.

    A copy from pageable memory waits for all queued work of the GPU; a copy from pinned memory is queued.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def send_all(tensors: NamedTensors, device: torch.device) -> dict[str, Tensor]:
    """Apply send() to each tensor."""
    return {name: send(one, device) for name, one in tensors.items()}


def build_fingerprint(device: torch.device, *, deterministic: bool) -> dict[str, Any]:
    """
    Return what the last bit of a result may depend on besides the spec and the images.

    PyTorch does not guarantee equal bits across releases, devices or thread counts.
    """
    on_gpu = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "deterministic": deterministic or not on_gpu,
        "cuda": torch.version.cuda if on_gpu else None,
    }


DEFAULTS_OF_OLD_FINGERPRINTS = {"precision": "fp32"}
"""Entries that fingerprints of old versions lack."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two build_fingerprint() in words: 'torch 2.9 is now 2.10'."""
    before = {**DEFAULTS_OF_OLD_FINGERPRINTS, **before}
    return [f"{key} {before.get(key)} is now {now[key]}" for key in now if before.get(key) != now[key]]


def _cpu_name() -> str:
    """Return the processor's model and the instruction set that PyTorch's kernels use."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


@contextmanager
def memory_errors(hint: str) -> Iterator[None]:
    """
    Translate out-of-memory errors.

    Raises:
        OutOfMemoryError: instead of PyTorch's own, with the hint.
    """
    try:
        yield
    except torch.OutOfMemoryError as exc:
        raise OutOfMemoryError("the GPU has not enough free memory for this job", hint=hint) from exc
    except MemoryError as exc:
        raise OutOfMemoryError("this machine has not enough free memory for this job", hint=hint) from exc
    except RuntimeError as exc:
        if "DefaultCPUAllocator" not in str(exc):
            raise
        raise OutOfMemoryError("this machine has not enough free memory for this job", hint=hint) from exc
