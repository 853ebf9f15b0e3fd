"""
Divide a machine's processor cores between CPU workers, each pinned to its own.

All get the same number, and remaining cores stay free: the last bit of an image may depend on the number of
threads, so the workers of one machine must not differ in it.
"""

import os
import re
from dataclasses import dataclass

from jobs.errors import ConfigError

RANGE = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


@dataclass(frozen=True)
class Cores:
    """The cores of one worker."""

    numbers: tuple[int, ...]

    @property
    def label(self) -> str:
        return f"cpu{self.numbers[0]}"

    @property
    def key(self) -> str:
        return self.label

    @property
    def arguments(self) -> tuple[str, ...]:
        """Return the options of `ganq worker` that select these cores."""
        return "--gpus", "none", "--cores", ",".join(map(str, self.numbers))

    def pin(self) -> dict[str, str]:
        """
        Bind this process and its children to these cores.

        Returns:
            Environment variables for OpenMP; none if the user has set OMP_NUM_THREADS.
        """
        os.sched_setaffinity(0, self.numbers)
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(len(self.numbers))}


def usable() -> list[int]:
    """Return the cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def divide(workers: int) -> list[Cores]:
    """
    Divide the usable cores between this number of workers.

    Raises:
        ConfigError: there are fewer cores than workers.
    """
    available = usable()
    each = len(available) // workers
    if each == 0:
        raise ConfigError(
            f"--cpu-workers {workers} is more than the {len(available)} cores that may be used here",
            hint=f"--cpu-workers {len(available)} gives each worker one core",
        )
    return [Cores(tuple(available[i * each : (i + 1) * each])) for i in range(workers)]


def parse(text: str) -> Cores:
    """
    Parse a list of cores as taskset accepts it: '0,2-3'.

    Raises:
        ConfigError: the text is not a list of cores, or names some that may not be used.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        found = RANGE.fullmatch(part.strip())
        if found is None:
            raise ConfigError(f"--cores {text[:40]!r} is not a list of cores", hint="e.g. --cores 0,2-3")
        numbers |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    available = usable()
    if not numbers or not numbers <= set(available):
        raise ConfigError(
            f"--cores {text[:40]!r} names cores that may not be used here",
            hint=f"usable cores: {','.join(map(str, available))}",
        )
    return Cores(tuple(sorted(numbers)))
