"""
Shares a machine's processor cores between CPU workers, each pinned to its own.

All get equally many, and cores that are left over stay free: the number of threads may be
part of what makes a picture's last bit, so that workers of one machine should not differ in it.
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
        """What `ganq worker` is told to run on these."""
        return "--gpus", "none", "--cores", ",".join(map(str, self.numbers))

    def pin(self) -> dict[str, str]:
        """
        Bind this process, and all that it starts, to these cores.

        Returns:
            The environment that tells OpenMP's threads of it, unless the user has decided.
        """
        os.sched_setaffinity(0, self.numbers)
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(len(self.numbers))}


def usable() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def divide(workers: int) -> list[Cores]:
    """
    Raises:
        ConfigError: there are fewer cores than workers.
    """
    there = usable()
    each = len(there) // workers
    if each == 0:
        raise ConfigError(
            f"--cpu-workers {workers} is more than the {len(there)} cores that may be used here",
            hint=f"--cpu-workers {len(there)} gives each a core of its own",
        )
    return [Cores(tuple(there[i * each : (i + 1) * each])) for i in range(workers)]


def parse(text: str) -> Cores:
    """
    '0,2-3' as taskset takes it.

    Raises:
        ConfigError: it names no cores, or some that may not be used.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        found = RANGE.fullmatch(part.strip())
        if found is None:
            raise ConfigError(f"--cores {text[:40]!r} names no cores", hint="e.g. --cores 0,2-3")
        numbers |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    there = usable()
    if not numbers or not numbers <= set(there):
        raise ConfigError(
            f"--cores {text[:40]!r} names cores that may not be used here",
            hint=f"those that may: {','.join(map(str, there))}",
        )
    return Cores(tuple(sorted(numbers)))
