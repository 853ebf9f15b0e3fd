"""The kind: a spec without fields, and work that is none."""

from typing import Any, ClassVar

from jobs.kinds import KINDS, JobKind
from jobs.specs import Spec


class NoopSpec(Spec):
    """Nothing is asked."""

    kind: ClassVar[str] = "noop"


def run(spec: NoopSpec, ctx: Any) -> dict[str, Any]:
    """Do nothing."""
    return {}


def install() -> None:
    """Make it known in this process."""
    KINDS["noop"] = JobKind("noop", "benchmarks.noop.kind:NoopSpec", "benchmarks.noop.kind:run", 0)
