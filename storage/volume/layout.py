"""
Where things lie on the shared volume. Paths are made from ids only, never from names.

    <volume>/jobs/000012/spec.json
    <volume>/jobs/000012/a1/checkpoints/epoch-0005/   samples/   images/   grids/   metrics.jsonl   log.txt
    <volume>/datasets/<fingerprint>/images.u8  index.json  report.json
    <volume>/latest/<name, or kind>                   links to the newest attempt, for a file manager
"""

import os
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.errors import VolumeError
from storage.volume.durable import make_folder, raise_storage_error

FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Volume:
    """The folder layout of one shared volume."""

    root: Path

    def job(self, job_id: int) -> Path:
        return self.jobs / f"{job_id:06d}"

    def attempt(self, job_id: int, attempt: int) -> Path:
        return self.job(job_id) / f"a{attempt}"

    @property
    def jobs(self) -> Path:
        return self.root / "jobs"

    def checkpoints(self, job_id: int, attempt: int) -> Path:
        return self.attempt(job_id, attempt) / "checkpoints"

    @property
    def datasets(self) -> Path:
        return self.root / "datasets"

    def dataset(self, fingerprint: str) -> Path:
        if not FINGERPRINT.fullmatch(fingerprint):
            raise ValueError(f"not a fingerprint: {fingerprint[:80]!r}")
        return self.datasets / fingerprint

    @property
    def latest(self) -> Path:
        return self.root / "latest"

    def relative(self, path: Path) -> str:
        """How a path of this volume stands in the job table."""
        return path.relative_to(self.root).as_posix()

    def absolute(self, relative: str) -> Path:
        """
        Raises:
            ValueError: if the path would leave the volume.
        """
        path = (self.root / relative).resolve()
        if not path.is_relative_to(self.root.resolve()):
            raise ValueError(f"outside the volume: {relative!r}")
        return path

    def ensure(self, used: Callable[[], bool] = lambda: False) -> None:
        """
        Make the volume's folders and show that they can be written.

        Args:
            used: whether work lies here by what the job table knows. Then a folder that holds none is another
                one: the place where a disk is to be mounted, say, which would be filled in its stead.

        Raises:
            VolumeError: missing and not creatable, not a folder, read-only, or not the one that was used.
        """
        if os.path.exists(self.root) and not os.path.isdir(self.root):
            raise VolumeError(f"{self.root} is not a folder", hint="point GANQ_VOLUME at a folder")
        if not os.path.isdir(self.jobs) and used():
            raise VolumeError(
                f"there are no jobs at {self.root}, where those of the job table have left their files",
                hint=f"mount the volume, or set GANQ_VOLUME; if they are lost: mkdir -p {self.jobs}",
            )
        for folder in (self.jobs, self.datasets, self.latest):
            make_folder(folder)
        probe = self.root / f".probe-{secrets.token_hex(4)}"
        try:
            probe.touch()
            probe.unlink()
        except OSError as exc:
            raise_storage_error(exc, self.root)

    def point_latest(self, label: str, target: Path) -> None:
        """Give a result a stable, human path: <volume>/latest/<label>. Best effort: a link is no result."""
        link, path = self.latest / label, f"../{self.relative(target)}"
        with suppress(OSError):
            try:
                link.symlink_to(path)
                return
            except FileNotFoundError:
                self.latest.mkdir(exist_ok=True)
            except FileExistsError:
                pass
            temp = self.latest / f".{label}-{secrets.token_hex(4)}"
            temp.symlink_to(path)
            try:
                temp.rename(link)
            except OSError:  # somebody has put a folder there: it is theirs
                temp.unlink()
