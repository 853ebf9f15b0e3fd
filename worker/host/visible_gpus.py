"""
The GPUs that this process may use: what CUDA_VISIBLE_DEVICES leaves of those that nvidia-smi names.

Slurm, Kubernetes, container engines and people hand out GPUs by this variable. The rules are those of
the CUDA programming guide: indices, UUIDs and MIG names, a UUID by as many of its first characters as
make it unique, and a list that ends at its first invalid entry.
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
"""First entries by which somebody says: no GPU. NoDevFiles is Slurm's."""
MIG_NAME = re.compile(r"MIG-(GPU-[0-9A-Fa-f-]+)/(\d+)/(\d+)")
"""A MIG device as drivers before R470 name it: GPU, GPU instance, compute instance. Later ones accept it."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG device of it, as the driver names it."""

    index: int
    uuid: str
    name: str
    memory_mib: int
    part: str = ""
    """Of a MIG device: '-mig0'."""

    @property
    def label(self) -> str:
        return f"gpu{self.index}{self.part}"

    @property
    def key(self) -> str:
        return self.uuid

    @property
    def arguments(self) -> tuple[str, ...]:
        """The options of `ganq worker` that select this GPU."""
        return "--gpus", self.uuid


def names_mig(*values: str | None) -> bool:
    """Whether one of these lists names a MIG device; asking nvidia-smi for those costs a call of its own."""
    return any("MIG-" in value for value in values if value)


def select(there: Sequence[Gpu], mig: Sequence[Gpu], env: Mapping[str, str]) -> list[Gpu]:
    """
    Return the GPUs that the environment allows, in the order of CUDA_VISIBLE_DEVICES.

    Args:
        there: all GPUs of this machine or container.
        mig: their MIG devices, where the environment names one.

    Raises:
        GpuUnavailableError: the list names no GPU that is here, or it cannot be known which one it means.
    """
    if not there:
        return []
    everything = [*there, *mig]
    chosen = list(there)
    if (given := env.get(VARIABLE)) is not None:
        chosen = _listed(given, there, everything)
        _require_known_order(given, chosen, there, env)
    container = env.get(CONTAINER_VARIABLE, "")
    # In a container the indices of this variable are the host's. Its UUIDs bind where the container
    # is privileged and so sees GPUs that were given to others.
    if container.startswith(("GPU-", "MIG-")):
        mine = {gpu.uuid: gpu for entry in container.split(",") for gpu in find(entry, everything)}
        if mine:
            chosen = list(mine.values()) if given is None else [gpu for gpu in chosen if gpu.uuid in mine]
    return chosen


def _listed(given: str, there: Sequence[Gpu], everything: Sequence[Gpu]) -> list[Gpu]:
    entries = [entry.strip() for entry in given.split(",")]
    if NO_GPU.fullmatch(entries[0]):
        return []
    chosen: dict[str, Gpu] = {}
    for entry in entries:
        found = find(entry, everything)
        if len(found) != 1:
            if not chosen:
                raise GpuUnavailableError(
                    f"{VARIABLE}={given[:200]} names no GPU of this machine",
                    hint=f"GPUs here: {described(there)}; correct it, or --gpus none runs on the CPU",
                )
            log.warning(
                "%s=%s: CUDA reads it up to %r, which is no GPU here", VARIABLE, given[:200], entry[:60]
            )
            break
        chosen[found[0].uuid] = found[0]
    return list(chosen.values())


def find(entry: str, gpus: Sequence[Gpu]) -> list[Gpu]:
    """Return those of the GPUs that an index, a UUID or its beginning, or a MIG name may mean."""
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
    given: str, chosen: Sequence[Gpu], there: Sequence[Gpu], env: Mapping[str, str]
) -> None:
    """
    Refuse indices that mean one GPU to CUDA and another to nvidia-smi.

    CUDA counts from the fastest model to the slowest unless CUDA_DEVICE_ORDER says otherwise,
    nvidia-smi by place on the bus. With one model the two agree.

    Raises:
        GpuUnavailableError: the worker might take a GPU that was given to somebody else.
    """
    by_index = any(entry.strip().isdigit() for entry in given.split(","))
    if not by_index or env.get(ORDER_VARIABLE) == "PCI_BUS_ID":
        return
    if len({gpu.name for gpu in there}) > 1 and len(chosen) < len(there):
        raise GpuUnavailableError(
            f"{VARIABLE}={given[:200]} counts GPUs of different models, which CUDA orders by speed",
            hint=f"set {ORDER_VARIABLE}=PCI_BUS_ID if nvidia-smi's numbers are meant, or use UUIDs",
        )


def described(gpus: Sequence[Gpu]) -> str:
    """Return '0 (NVIDIA H100), 1 (NVIDIA H100)'; MIG devices by UUID."""
    return ", ".join(f"{gpu.uuid if gpu.part else gpu.index} ({gpu.name})" for gpu in gpus) or "none"
