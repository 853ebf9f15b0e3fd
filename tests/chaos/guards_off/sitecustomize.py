"""
Take guards out of a process, to show what they protect from.

Python imports this module when it starts, if this folder is on PYTHONPATH. GANQ_GUARDS_OFF names the
guards, separated by commas. Each is taken out as soon as the module that contains it has been imported.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def finish_fence(finish: Any) -> None:
    """Finish whatever attempt the row is in."""
    from sqlalchemy import bindparam, select

    from storage.db.tables import job

    finish.OWN_ROW = select(job).where(job.c.id == bindparam("owned_id")).with_for_update()

    def finish_unfenced(conn: Any, lease: Any, new: Any, outcome: Any, values: dict[str, Any]) -> bool:
        finish.finish_attempt(conn, lease, lambda row: (new, outcome, values), set(), None)
        return True

    finish.finish_fenced = finish_unfenced


def checkpoint_fence(checkpoints: Any) -> None:
    """Register a checkpoint of any attempt."""
    checkpoints.fence_of = lambda lease: checkpoints.job.c.id == lease.job_id


def claim_cas(claim: Any) -> None:
    """Choose a job in one transaction, and take it in another whatever became of it."""
    from sqlalchemy import bindparam

    from storage.db.tables import CLOCKS

    for dialect in CLOCKS:
        claim.CLAIMS[dialect, "unguarded"] = claim._claim_statement(claim.job.c.id == bindparam("this"))

    def not_plain(*args: Any) -> None:
        raise claim._NotPlainError

    def take(self: Any, conn: Any) -> Any:
        seen = claim.peek(conn, self.capabilities)
        claim.check_schema(conn, seen.revision)
        candidate = claim.Candidate("unguarded", {"this": self.chosen or -1}, "", False)
        return self._claim_first(conn, [candidate])

    def claim_unguarded(self: Any, who: Any, *, kinds: Any, spec_version: int) -> Any:
        one = claim.Claim(who, kinds, spec_version)
        one.chosen = self.database.read(lambda conn: claim.best_job(conn, one.capabilities))
        return self._claim(one)

    claim.Claim.take = take
    claim.Claim.take_plain = claim.Claim.call = not_plain  # the job ends alone, and claim() is asked
    claim.ClaimMixin.claim = claim_unguarded


def fsync(durable: Any) -> None:
    """Sync neither files nor names."""
    os.fsync = durable.sync_filesystem = _nothing


def attempt_folder(layout: Any) -> None:
    """Let all attempts of a job write to one folder."""
    layout.Volume.attempt = lambda self, job_id, attempt: self.job(job_id) / "a1"


GUARDS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "finish_fence": ("storage.db.store.finish", finish_fence),
    "checkpoint_fence": ("storage.db.store.checkpoints", checkpoint_fence),
    "claim_cas": ("storage.db.store.claim", claim_cas),
    "fsync": ("storage.volume.durable", fsync),
    "attempt_folder": ("storage.volume.layout", attempt_folder),
}
"""Guard → the module that contains it, and the function that takes it out."""


class _Loader(importlib.abc.Loader):
    """Load a module as `inner` does, then take its guard out."""

    def __init__(self, inner: importlib.abc.Loader, take_out: Callable[[Any], None]) -> None:
        self.inner, self.take_out = inner, take_out

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        self.take_out(module)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, guards: Sequence[str]) -> None:
        self.modules = dict(GUARDS[name] for name in guards)

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.modules:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.modules[name])
        return spec


if _named := [name for name in os.environ.get("GANQ_GUARDS_OFF", "").split(",") if name]:
    sys.meta_path.insert(0, _Finder(_named))
