"""Where the numbers are crunched: CPU or the one GPU this process is pinned to, and how exactly."""

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.errors import GpuUnavailableError, OutOfMemoryError

NamedTensors = Mapping[str, Tensor]
"""Tensors by what they are for: what chance has decided about a batch, or what a pass has made."""


def choose(wanted: str) -> torch.device:
    """
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
    Make a GPU's kernels give the same bits each time, or pick the fastest ones.

    Set anew by every job, because a warm process has run others before. A CPU is
    deterministic as it is, given its number of threads, and is left alone.
    """
    on_gpu = device.type == "cuda"
    torch.use_deterministic_algorithms(on_gpu and deterministic)
    torch.backends.cudnn.deterministic = on_gpu and deterministic
    torch.backends.cudnn.benchmark = on_gpu and not deterministic
    # Deterministic mode also fills each new tensor with NaN, against reads of raw memory: not needed here.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """
    A tensor that was made on the CPU, on the device; a GPU is not waited for.

    Plain memory is copied only after all that the GPU still has to do, and this process
    would wait for it at every step; pinned memory is copied when its turn comes.
    """
    if device.type != "cuda" or tensor.is_cuda:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def send_all(tensors: NamedTensors, device: torch.device) -> dict[str, Tensor]:
    """send() for each, under the same names."""
    return {name: send(one, device) for name, one in tensors.items()}


def build_fingerprint(device: torch.device, *, deterministic: bool) -> dict[str, Any]:
    """
    All that the last bit of a result may depend on besides the spec and the pictures.

    PyTorch promises no equal bits across releases, devices or thread counts.
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
"""What a fingerprint meant that does not say so."""


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed from one build_fingerprint() to another, for a person: 'torch 2.9 is now 2.10'."""
    before = {**DEFAULTS_OF_OLD_FINGERPRINTS, **before}
    return [f"{key} {before.get(key)} is now {now[key]}" for key in now if before.get(key) != now[key]]


def _cpu_name() -> str:
    """The processor's model, and the instructions that PyTorch's kernels use of it."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


@contextmanager
def memory_errors(hint: str) -> Iterator[None]:
    """
    Raises:
        OutOfMemoryError: instead of PyTorch's own, with a way out.
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
