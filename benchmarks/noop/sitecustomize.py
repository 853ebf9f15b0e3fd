"""Python runs this at its start in the workers of a benchmark, whose PYTHONPATH holds this folder."""

from jobs.kinds import KINDS, JobKind

KINDS["noop"] = JobKind("noop", "benchmarks.noop.kind:NoopSpec", "benchmarks.noop.kind:run", 0)
