"""
The GPUs that this process may use: those that nvidia-smi lists and CUDA_VISIBLE_DEVICES allows.

Slurm, Kubernetes, container engines and users assign GPUs by this variable. The rules are those of the CUDA
programming guide: indices, UUIDs and MIG names; a UUID may be shortened to a unique prefix; the list ends
at its first invalid entry.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.errors import GpuUnavailableError

log = logging.getLogger("ganq.worker")

VARIABLE = "CUDA_VISIBLE_DEVICES"
CONTAINER_VARIABLE = "NVIDIA_VISIBLE_DEVICES"
ORDER_VARIABLE = "CUDA_DEVICE_ORDER"
NO_GPU = re.compile(r"-\d+|NoDevFiles|none|", re.IGNORECASE)
"""First entries that mean: no GPU. NoDevFiles is Slurm's."""
MIG_NAME = re.compile(r"MIG-(GPU-[0-9A-Fa-f-]+)/(\d+)/(\d+)")
"""A MIG device as drivers before R470 name it: GPU, GPU instance, compute instance. Newer ones accept it."""


@dataclass(frozen=True)
class Gpu:
    """One GPU or one MIG device, as the driver names it."""

    index: int
    uuid: str
    name: str
    memory_mib: int
    part: str = ""
    """Suffix of a MIG device: '-mig0'."""

    @property
    def label(self) -> str:
        return f"gpu{self.index}{self.part}"

    @property
    def key(self) -> str:
        return self.uuid

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the options of `ganq worker` that select this GPU."""
        return "--gpus", self.uuid


def names_mig(*values: str | None) -> bool:
    """Return whether one of these lists names a MIG device, for which nvidia-smi needs a second call."""
    return any("MIG-" in value for value in values if value)


def select(gpus: Sequence[Gpu], mig: Sequence[Gpu], env: Mapping[str, str]) -> list[Gpu]:
    """
    Return the GPUs that the environment allows, in the order of CUDA_VISIBLE_DEVICES.

    Args:
        gpus: all GPUs of this machine or container.
        mig: their MIG devices, if the environment names one.

    Raises:
        GpuUnavailableError: the list names no GPU of this machine, or is ambiguous.
    """
    if not gpus:
        return []
    devices = [*gpus, *mig]
    chosen = list(gpus)
    if (value := env.get(VARIABLE)) is not None:
        chosen = _listed(value, gpus, devices)
        _require_known_order(value, chosen, gpus, env)
    container = env.get(CONTAINER_VARIABLE, "")
    # In a container the indices of this variable are the host's. Its UUIDs count: a privileged container
    # also sees GPUs that are assigned to others.
    if container.startswith(("GPU-", "MIG-")):
        assigned = {gpu.uuid: gpu for entry in container.split(",") for gpu in find(entry, devices)}
        if assigned:
            chosen = (
                list(assigned.values()) if value is None else [gpu for gpu in chosen if gpu.uuid in assigned]
            )
    return chosen


def _listed(value: str, gpus: Sequence[Gpu], devices: Sequence[Gpu]) -> list[Gpu]:
    """Return the devices that a value of CUDA_VISIBLE_DEVICES names, up to its first invalid entry."""
    entries = [entry.strip() for entry in value.split(",")]
    if NO_GPU.fullmatch(entries[0]):
        return []
    chosen: dict[str, Gpu] = {}
    for entry in entries:
        found = find(entry, devices)
        if len(found) != 1:
            if not chosen:
                raise GpuUnavailableError(
                    f"{VARIABLE}={value[:200]} names no GPU of this machine",
                    hint=f"GPUs here: {described(gpus)}; correct it, or use --gpus none for the CPU",
                )
            log.warning(
                "%s=%s: CUDA reads it up to %r, which is no GPU here", VARIABLE, value[:200], entry[:60]
            )
            break
        chosen[found[0].uuid] = found[0]
    return list(chosen.values())


def find(entry: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """Return the GPUs that an index, a UUID or its prefix, or a MIG name may mean."""
    entry = entry.strip()
    if entry.isascii() and entry.isdigit():
        found = [gpu for gpu in gpus if gpu.index == int(entry)]
        return [gpu for gpu in found if not gpu.part] or found
    if not entry.startswith(("GPU-", "MIG-")):
        return []
    found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(entry.lower())]
    exact = [gpu for gpu in found if len(gpu.uuid) == len(entry)]
    if found or (name := MIG_NAME.fullmatch(entry)) is None:
        return exact or found
    divided = {gpu.index for gpu in gpus if gpu.part}
    return [
        Gpu(gpu.index, entry, f"{gpu.name} MIG", 0, f"-mig{name[2]}.{name[3]}")
        for gpu in find(name[1], gpus)
        if gpu.index in divided
    ]


def _require_known_order(
    value: str, chosen: Sequence[Gpu], gpus: Sequence[Gpu], env: Mapping[str, str]
) -> None:
    """
    Refuse indices that mean one GPU to CUDA and another to nvidia-smi.

    CUDA numbers GPUs from the fastest model to the slowest unless CUDA_DEVICE_ORDER is set; nvidia-smi by
    PCI bus id. With one model they agree.

    Raises:
        GpuUnavailableError: the worker might take a GPU that is assigned to somebody else.
    """
    by_index = any(entry.strip().isdigit() for entry in value.split(","))
    if not by_index or env.get(ORDER_VARIABLE) == "PCI_BUS_ID":
        return
    if len({gpu.name for gpu in gpus}) > 1 and len(chosen) < len(gpus):
        raise GpuUnavailableError(
            f"{VARIABLE}={value[:200]} uses indices of GPUs of different models, which CUDA orders by speed",
            hint=f"set {ORDER_VARIABLE}=PCI_BUS_ID if nvidia-smi's indices are meant, or use UUIDs",
        )


def described(gpus: Sequence[Gpu]) -> str:
    """Return the GPUs as text: '0 (NVIDIA H100), 1 (NVIDIA H100)'; MIG devices by UUID."""
    return ", ".join(f"{gpu.uuid if gpu.part else gpu.index} ({gpu.name})" for gpu in gpus) or "none"
