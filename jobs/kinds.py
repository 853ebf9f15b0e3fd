"""
The table of job kinds. A new kind is one row here, one spec, one run(spec, ctx).

The runner is a path, so that torch loads in a pinned worker and nowhere else.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from jobs.errors import SpecError

if TYPE_CHECKING:
    from jobs.context import JobContext
    from jobs.specs import Spec


SPEC_VERSION = 3
"""Version of what specs say (1: ganq 0.1, 2: 0.2); a worker leaves jobs with a newer one to newer workers."""


class Run(Protocol):
    """The work of a kind: returns JSON facts for the job's result."""

    def __call__(self, spec: Any, ctx: "JobContext") -> dict[str, Any]: ...


@dataclass(frozen=True)
class JobKind:
    """Properties of a job kind."""

    name: str
    spec: str
    runner: str | None  # None: made by the command line, never run by a worker
    priority: int  # default; higher runs first
    makes_model: bool = False  # others can draw from its checkpoints
    preemptible: bool = False  # it can stop at any step and resume bit-exactly
    splits: bool = False  # a large one is divided: its parts are jobs of the same kind
    needs_model: bool = False  # its spec names a `source` job, or none, and a `checkpoint` of it

    def spec_class(self) -> "type[Spec]":
        spec: type[Spec] = _resolve(self.spec)
        return spec

    def run_function(self) -> Run:
        if self.runner is None:
            raise SpecError(f"a job of kind {self.name} is not run by workers")
        run: Run = _resolve(self.runner)
        return run


def _resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


KINDS: dict[str, JobKind] = {
    kind.name: kind
    for kind in (
        JobKind(
            "train", "jobs.specs:TrainSpec", "jobs.training.train:run", 0, makes_model=True, preemptible=True
        ),
        JobKind(
            "generate",
            "jobs.specs:GenerateSpec",
            "jobs.generation.generate:run",
            10,
            splits=True,
            needs_model=True,
        ),
        JobKind("evaluate", "jobs.specs:EvaluateSpec", "jobs.evaluation.evaluate:run", 5, needs_model=True),
        JobKind("import", "jobs.specs:ImportSpec", None, 0, makes_model=True),
    )
}


def kind_named(name: str) -> JobKind:
    """
    Return a job kind by name.

    Raises:
        SpecError: if this version of ganq knows no such kind.
    """
    try:
        return KINDS[name]
    except KeyError:
        raise SpecError(f"there is no job kind {name[:40]!r}", hint=f"kinds: {', '.join(KINDS)}") from None
