"""
Layout of the shared volume. Paths are made from ids only, never from names.

    <volume>/jobs/000012/spec.json
    <volume>/jobs/000012/samples                      link to the sample grids of all attempts (training)
    <volume>/jobs/000012/a1/checkpoints/epoch-0005/   samples/   images/   grids/   metrics.jsonl   log.txt
    <volume>/datasets/<fingerprint>/images.u8  index.json  report.json
    <volume>/uploads/blobs/ab/<sha-256>   uploads/datasets/<id>/   what clients have uploaded
    <volume>/latest/<name, or kind>                   links to the newest attempt, for a file manager
"""

import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jobs.errors import VolumeError
from storage.volume.durable import make_folder, raise_storage_error
from storage.volume.permissions import group_umask

FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Volume:
    """The folder layout of one shared volume."""

    root: Path

    def job(self, job_id: int) -> Path:
        return self.jobs / f"{job_id:06d}"

    def attempt(self, job_id: int, attempt: int) -> Path:
        return self.job(job_id) / f"a{attempt}"

    @cached_property
    def jobs(self) -> Path:
        return self.root / "jobs"

    def samples(self, job_id: int) -> Path:
        """Return the link to the folder with the sample grids of all attempts of a training."""
        return self.job(job_id) / "samples"

    def checkpoints(self, job_id: int, attempt: int) -> Path:
        return self.attempt(job_id, attempt) / "checkpoints"

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    @property
    def uploads(self) -> Path:
        """Return the folder of uploaded files and data sets; see web/api/uploads.py."""
        return self.root / "uploads"

    def dataset(self, fingerprint: str) -> Path:
        if not FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(f"not a fingerprint: {fingerprint[:80]!r}")
        return self.datasets / fingerprint

    @property
    def latest(self) -> Path:
        return self.root / "latest"

    def relative(self, path: Path) -> str:
        """Return a path of this volume as the job table stores it."""
        return path.relative_to(self.root).as_posix()

    def absolute(self, relative: str) -> Path:
        """
        Return the path of a relative path of the job table.

        Raises:
            ValueError: it is outside the volume.
        """
        path = (self.root / relative).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(f"outside the volume: {relative!r}")
        return path

    def ensure(self, used: Callable[[], bool] = lambda: False) -> None:
        """
        Create the volume's folders and check that they are writable.

        Args:
            used: returns whether jobs of the job table have files here. Then an empty folder is another one,
                such as the mount point of a volume that is not mounted.

        Raises:
            VolumeError: it cannot be created, is no folder, is read-only, or is not the one that was used.
        """
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            raise VolumeError(f"{self.root} is not a folder", hint="point GANQ_VOLUME at a folder")
        if not os.path.isdir(self.jobs) and used():
            raise VolumeError(
                f"there are no jobs at {self.root}, but the job table has jobs with files",
                hint=f"mount the volume, or set GANQ_VOLUME; if the files are lost: mkdir -p {self.jobs}",
            )
        with group_umask(self.root):
            for folder in (self.jobs, self.datasets, self.latest):
                make_folder(folder)
        probe = self.root / f".probe-{secrets.token_hex(4)}"
        try:
            probe.touch()
            probe.unlink()
        except OSError as exc:
            raise_storage_error(exc, self.root)

    def point_latest(self, label: str, target: Path) -> None:
        """Link <volume>/latest/<label> to a result, if that is possible."""
        self.point(self.latest / label, target)

    def point(self, link: Path, target: Path) -> None:
        """Link a path of the volume to another, if that is possible; replace an older link."""
        path = os.path.relpath(target, link.parent)
        with suppress(OSError):
            try:
                link.symlink_to(path)
                return
            except FileNotFoundError:
                link.parent.mkdir(exist_ok=True)
            except FileExistsError:
                if os.path.islink(link) and os.readlink(link) == path:
                    return
            temp = link.with_name(f".{link.name}-{secrets.token_hex(4)}")
            temp.symlink_to(path)
            try:
                temp.rename(link)
            except OSError:  # a user has created a folder there
                temp.unlink()
