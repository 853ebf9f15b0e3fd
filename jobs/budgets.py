"""Budgets of `--stop-after`: running time, images or epochs, as '10m', '200k-images' or '50-epochs'."""

import re
from dataclasses import dataclass
from typing import Literal

from jobs.durations import in_words, parse
from jobs.errors import SpecError

FACTORS = {"": 1, "k": 1_000, "m": 1_000_000}
MOST = 10**12
_COUNT = re.compile(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([km]?)(?:-(images|epochs?))?")
HINT = "e.g. 10m or 2h30m of running time, 200k-images, 50-epochs"


@dataclass(frozen=True)
class Budget:
    """How far a training goes; its schedules are those of all its epochs."""

    unit: Literal["s", "images", "epochs"]
    amount: float
    """Seconds of running time over all attempts, or a whole number of images or epochs."""

    def __str__(self) -> str:
        if self.unit == "s":
            return in_words(self.amount)
        number = int(self.amount)
        if self.unit == "images" and number % 1000 == 0:
            return f"{number // 1000}k-images"
        return f"{number}-{self.unit}"

    @property
    def seconds(self) -> float | None:
        """Return the running time; None if it is not a time."""
        return self.amount if self.unit == "s" else None

    def steps(self, *, per_epoch: int, batch: int) -> int | None:
        """Return the step at which it is used up; None for a time."""
        if self.unit == "s":
            return None
        if self.unit == "epochs":
            return int(self.amount) * per_epoch
        return -(-int(self.amount) // batch)


def read_switches(given: str) -> tuple[int, ...]:
    """
    Read the switches of `--progressive`: '20k,60k', or 'none'.

    Returns:
        The counts of images.

    Raises:
        SpecError: it is neither.
    """
    text = given.strip().lower()
    if text == "none":
        return ()
    counts = []
    for part in text.split(","):
        found = _COUNT.fullmatch(part.strip())
        amount = round(float(found[1]) * FACTORS[found[2]], 6) if found and not found[3] else 0.5
        if amount != int(amount) or not 1 <= amount <= MOST:
            raise SpecError(
                f"--progressive {text[:40]!r}: not two counts of images", hint="e.g. 20k,60k; or none"
            )
        counts.append(int(amount))
    return tuple(counts)


def read_budget(given: str | int) -> Budget:
    """
    Read a budget; a plain number counts epochs.

    Raises:
        SpecError: it is none.
    """
    text = str(given).strip().lower()
    found = _COUNT.fullmatch(text)
    if found is not None and (found[3] or not found[2]):
        unit: Literal["images", "epochs"] = "images" if found[3] == "images" else "epochs"
        amount = round(float(found[1]) * FACTORS[found[2]], 6)
        if amount != int(amount) or not 1 <= amount <= MOST:
            raise SpecError(f"--stop-after {text[:40]}: not a whole number of {unit}", hint=HINT)
        return Budget(unit, int(amount))
    try:
        seconds = parse(text)
    except ValueError:
        raise SpecError(f"--stop-after {text[:40]!r} is not valid", hint=HINT) from None
    if not 1 <= seconds <= 1e9:
        raise SpecError(f"--stop-after {text[:40]}: at least a second, at most 30 years", hint=HINT)
    return Budget("s", float(round(seconds)))
