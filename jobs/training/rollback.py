"""
What is tried before a run whose numbers have left the rails is given up.

A run repeats itself to the last bit. So it first goes back and does the same again: a
bit that fell over in memory will not fall a second time, and the run ends as if nothing
had been. If it diverges there again it is its own doing, and the learning rates are
halved, once and for the rest of the run.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.errors import CollapsedError, TrainingDivergedError

LOWER = 0.5
"""What the learning rates are multiplied with, once."""

Way = Literal["the same again", "lower rates", "to stop there"]


@dataclass
class Rollbacks:
    """How often a run has gone back, and what it has left to try."""

    lr_scale: float = 1.0
    """What the rates of the spec are multiplied with."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry for each: the step where it diverged, the step it went back to, the scale after."""
    seen_at: int | None = None
    """Where it last diverged, until a checkpoint shows that it got past."""
    given_up: bool = False
    """Nothing is left to try, and the run ends where it went back to."""

    def rollback_target(self, diverged: TrainingDivergedError) -> Way:
        """
        What to try now.

        Raises:
            TrainingDivergedError: nothing is left.
        """
        again = self.seen_at is not None
        self.seen_at = diverged.step
        if isinstance(diverged, CollapsedError):
            # A collapse comes over many steps, so no bit that fell over is behind it.
            self.given_up = self.lr_scale != 1.0
            self.lr_scale = LOWER
            return "to stop there" if self.given_up else "lower rates"
        if not again:
            return "the same again"
        if self.lr_scale == 1.0:
            self.lr_scale = LOWER
            return "lower rates"
        raise TrainingDivergedError(
            f"{diverged.message}; going back and halving the learning rates did not help",
            hint=diverged.hint,
            step=diverged.step,
        ) from diverged

    def rolled_back(self, to: int) -> None:
        self.history.append({"step": self.seen_at, "to": to, "lr_scale": self.lr_scale})

    def saved(self, step: int) -> None:
        """A state without NaN was kept: where the trouble had shown, or later, it is over."""
        if self.seen_at is not None and step >= self.seen_at:
            self.seen_at = None

    # --- in a checkpoint ---------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {"lr_scale": self.lr_scale, "rollbacks": self.history}

    @classmethod
    def from_json(cls, meta: dict[str, Any]) -> "Rollbacks":
        return cls(lr_scale=meta.get("lr_scale", 1.0), history=list(meta.get("rollbacks", ())))
