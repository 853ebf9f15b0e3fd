"""
What is tried before a diverged run is given up.

A run is bit-exact, so it first repeats the same steps from a checkpoint: a bit flip in memory does not happen
twice, and the run ends as if nothing had happened. If it diverges there again, the learning rates are halved,
once and for the rest of the run.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from jobs.errors import CollapsedError, TrainingDivergedError

LOWER_LR_SCALE = 0.5
"""Factor of the learning rates after the rollback that lowers them."""

Action = Literal["the same again", "lower rates", "to stop there"]


@dataclass
class Rollbacks:
    """The rollbacks of a run so far."""

    lr_scale: float = 1.0
    """Factor of the spec's learning rates."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One entry per rollback: the step where it diverged, the step it returned to, the scale after."""
    diverged_at: int | None = None
    """The step of the last divergence, until a later checkpoint is saved."""
    exhausted: bool = False
    """Nothing is left to try; the run ends at the checkpoint it returned to."""

    def next_action(self, diverged: TrainingDivergedError) -> Action:
        """
        Return what to do after a divergence.

        Raises:
            TrainingDivergedError: nothing is left to try.
        """
        again = self.diverged_at is not None
        self.diverged_at = diverged.step
        if isinstance(diverged, CollapsedError):
            # A collapse develops over many steps, so a bit flip is not its cause.
            self.exhausted = self.lr_scale != 1.0
            self.lr_scale = LOWER_LR_SCALE
            return "to stop there" if self.exhausted else "lower rates"
        if not again:
            return "the same again"
        if self.lr_scale == 1.0:
            self.lr_scale = LOWER_LR_SCALE
            return "lower rates"
        raise TrainingDivergedError(
            f"{diverged.message}; going back and halving the learning rates did not help",
            hint=diverged.hint,
            step=diverged.step,
        ) from diverged

    def add(self, to_step: int) -> None:
        """Record a rollback to a step."""
        self.history.append({"step": self.diverged_at, "to": to_step, "lr_scale": self.lr_scale})

    def saved(self, step: int) -> None:
        """Clear the divergence once a finite state at or after its step was saved."""
        if self.diverged_at is not None and step >= self.diverged_at:
            self.diverged_at = None

    # --- in a checkpoint ---------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {"lr_scale": self.lr_scale, "rollbacks": self.history}

    @classmethod
    def from_json(cls, meta: dict[str, Any]) -> "Rollbacks":
        return cls(lr_scale=meta.get("lr_scale", 1.0), history=list(meta.get("rollbacks", ())))
