"""
Models that come with ganq: `--init-from builtin:faces`.

A model is a folder that `ganq push` has written, with its recipe and the licences of its images in README.md.
It is imported once into each installation, as `ganq import` does, and is then a job like any other.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ganq.session import Session
from jobs.errors import CheckpointCorruptError, JobNotFoundError, NotFoundError
from jobs.specs import NEW_NETWORK_OPTIONS

if TYPE_CHECKING:
    from storage.db.rows import Job

PREFIX = "builtin:"
MODELS = Path(__file__).parent
SHA256 = {"faces": "dc1d8a796969e3286db0f910a8d4bc7847733ea18adad23f4796dbfdbe2a8cbb"}
"""Hash of model.safetensors of each model."""


@dataclass(frozen=True)
class Builtin:
    """A model that comes with ganq."""

    name: str

    @property
    def folder(self) -> Path:
        return MODELS / self.name

    @property
    def job_name(self) -> str:
        """Return the name of its import; another release may bring other weights."""
        return f"builtin-{self.name}-{SHA256[self.name][:8]}"

    @property
    def networks(self) -> dict[str, Any]:
        """Return the options of a training that has its architecture."""
        arch: dict[str, Any] = json.loads((self.folder / "config.json").read_bytes())["arch"]
        return {**NEW_NETWORK_OPTIONS, **arch}

    def imported(self, session: Session) -> "Job":
        """
        Return the job that has its networks; import them if there is none.

        Raises:
            CheckpointCorruptError: the file in the installed package is not the one that was released.
            DiskFullError, VolumeError: it cannot be imported.
        """
        from storage.weights.import_job import import_weights
        from worker.host.accounts import worker_uids

        try:
            found = session.queries.find(self.job_name)
            if found.kind == "import" and session.queries.checkpoints(found.id):
                return found
        except JobNotFoundError:
            pass
        self._verify()
        return import_weights(
            session.store,
            session.volume,
            netg=self.folder,
            netd=None,
            name=self.job_name,
            user=session.settings.user,
            readers=worker_uids(session.queries),
        )

    def _verify(self) -> None:
        path = self.folder / "model.safetensors"
        try:
            found = hashlib.sha256(path.read_bytes()).hexdigest()
        except FileNotFoundError:
            found = "no file"
        if found != SHA256[self.name]:
            raise CheckpointCorruptError(
                f"{PREFIX}{self.name} has been changed: {path} is not the file that was released with ganq",
                hint="pip install --force-reinstall --no-deps ganq",
                expected=SHA256[self.name],
                found=found,
            )


def builtin_named(reference: str | None) -> Builtin | None:
    """
    Return the model that `builtin:NAME` names; None for any other reference.

    Raises:
        NotFoundError: there is no such model.
    """
    if reference is None or not reference.startswith(PREFIX):
        return None
    name = reference.removeprefix(PREFIX)
    if name not in SHA256:
        known = ", ".join(PREFIX + one for one in SHA256)
        raise NotFoundError(f"there is no {reference[:70]}", hint=f"ganq brings {known}")
    return Builtin(name)
