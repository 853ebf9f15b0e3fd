"""
`ganq gc`: find unreferenced files on the volume, and delete them.

plan() changes nothing. sweep() checks each item again before it deletes it. It renames the item to a
`.trash-` name first, so that readers see all of a folder or none of it. After a kill the next run
continues, because trash is garbage, too. Rows that point to files are deleted before the files.
"""

import errno
import fcntl
import os
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from sqlalchemy import Connection, text

from jobs.errors import StorageError, VolumeError
from jobs.failpoints import failpoint
from storage.datasets.cache import INDEX
from storage.db.engine import Database
from storage.gc import policy as rules
from storage.gc import scan as facts
from storage.gc import uploads
from storage.gc.archive import archived_ids
from storage.gc.delete import delete_tree, opened
from storage.gc.policy import TRASH, JobFacts, Policy, Reason
from storage.volume.layout import Volume
from storage.volume.ownership import recorded_spec

BATCH_SIZE = 200
"""Jobs in one transaction."""
SAMPLED = 100
BUSY = (errno.EBUSY, errno.ENOTEMPTY)
"""NFS keeps a file that is open under another name until it is closed."""
ADVISORY_LOCK = 0x67616E71676300  # 'ganqgc'


Deletion = tuple[str, Reason, int | None]
"""(path relative to the volume, reason, job)."""


class CollectorBusyError(StorageError):
    """Another gc of this job table is running."""

    code = "GC_RUNNING"


@dataclass(frozen=True)
class Item:
    """A file, a link or a folder that may be deleted."""

    path: str
    """Relative to the volume."""
    reason: Reason
    bytes: int
    job_id: int | None = None
    cache: rules.Cache | None = None


@dataclass
class Plan:
    """What may be deleted, and notes on what is kept."""

    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spared: list[tuple[JobFacts, str]] = field(default_factory=list)
    """Jobs whose results are old enough and stay all the same, with the reason."""


@dataclass
class Swept:
    """Result of sweep()."""

    gone: list[Item] = field(default_factory=list)
    kept: list[tuple[Item, str]] = field(default_factory=list)
    """Needed after all, changed meanwhile, or in use."""
    failed: list[tuple[Item, str]] = field(default_factory=list)


class Collector:
    """Garbage collection of one volume and its job table."""

    def __init__(self, database: Database, volume: Volume, policy: Policy | None = None) -> None:
        self.database = database
        self.volume = volume
        self.policy = policy or Policy()

    # --- planning -------------------------------------------------------------------------

    def plan(self) -> Plan:
        """
        Find what may be deleted.

        Raises:
            VolumeError: there is no volume, or it belongs to another job table.
            DatabaseUnavailableError: the job table cannot be read.
        """
        plan = Plan()
        for name in ("jobs", "datasets", "latest", "uploads"):
            if (self.volume.root / name).is_symlink():
                plan.notes.append(f"{name} is a link, and was not searched")
        now = facts.volume_clock(self.volume)
        folders = facts.job_folders(self.volume)
        known = self.database.read(facts.known_jobs)
        self._require_same(folders, known)
        items = self._loose(now)
        items += self._without_job(sorted(set(folders) - known), max(known, default=0), now, plan)
        ours = sorted(set(folders) & known)
        for start in range(0, len(ours), BATCH_SIZE):
            items += self._of_jobs(ours[start : start + BATCH_SIZE], plan)
        unused = {f"datasets/{one.fingerprint}": one for one in self._datasets(now)}
        items += [(path, Reason.DATASET, None) for path in unused]
        items += self._uploads(now)
        items += self._links(now, [path for path, _, _ in items])
        self._measure(items, unused, plan)
        return plan

    def plan_results(self, ids: Sequence[int]) -> Plan:
        """
        Plan the deletion of what these jobs have produced, at any age.

        Raises:
            VolumeError, DatabaseUnavailableError: as for plan().
        """
        plan = Plan()
        folders = facts.job_folders(self.volume)
        self._require_same(folders, self.database.read(facts.known_jobs))
        found = self._of_jobs(sorted(set(ids) & set(folders)), plan)
        self._measure([one for one in found if one[1] is Reason.RESULTS], {}, plan)
        return plan

    def _measure(self, items: Sequence[Deletion], unused: dict[str, rules.Cache], plan: Plan) -> None:
        for path, reason, job_id in items:
            try:
                size = facts.measure(self.volume.root / path)[0]
                if reason is Reason.UPLOAD:
                    size = uploads.bytes_of(self.volume.root / path)
                plan.items.append(Item(path, reason, size, job_id, unused.get(path)))
            except facts.MountedError as exc:
                plan.notes.append(str(exc))
            except FileNotFoundError:
                continue  # it was renamed or deleted meanwhile
            except OSError as exc:
                plan.notes.append(f"{path} cannot be read: {(exc.strerror or str(exc)).lower()}")

    def _require_same(self, folders: dict[int, str], known: set[int]) -> None:
        """
        Check that the volume belongs to this job table.

        Raises:
            VolumeError: most of what lies here is of jobs that this table does not have.
        """
        ours = facts.sample(set(folders) & known, SAMPLED)
        said = {one: recorded_spec(self.volume, one) for one in ours}

        def compare(conn: Connection) -> list[bool]:
            rows = facts.job_facts(conn, ours)
            imports = [
                True
                for one in ours
                if said[one] is None and rows[one].kind == "import" and self._has_checkpoint(rows[one])
            ]
            return imports + [
                facts.belongs(conn, rows[one], spec) for one, spec in said.items() if spec is not None
            ]

        same = self.database.read(compare)
        strangers = len(set(folders) - known)
        if strangers:  # a gc that was interrupted leaves folders of jobs that it has archived
            strangers = len(set(folders) - known - archived_ids(self.volume))
        trusted = len(set(folders) & known) * same.count(True) / max(len(same), 1)
        if strangers > trusted or same.count(False) > same.count(True):
            raise VolumeError(
                f"{self.volume.root} is not this job table's volume: of its {len(folders)} job folders, "
                f"{strangers} have no job, and {same.count(False)} of {len(same)} that were compared "
                "are of other jobs",
                hint="check GANQ_VOLUME and GANQ_DATABASE_URL (ganq doctor shows both); nothing was deleted",
            )

    def _has_checkpoint(self, job: JobFacts) -> bool:
        return any((self.volume.root / path).is_dir() for path in job.checkpoints)

    def _without_job(self, ids: Sequence[int], newest: int, now: float, plan: Plan) -> list[Deletion]:
        """Return folders of jobs that were never committed, such as those of a killed import."""
        found: list[Deletion] = []
        for job_id in ids:
            folder = self.volume.job(job_id)
            with suppress(OSError):  # missing, or not readable
                if job_id > newest:
                    # A table that was restored from a backup lacks jobs, and their folders are results.
                    plan.notes.append(
                        f"jobs/{folder.name} stays: the table ends at job {newest}, and may be an older copy"
                    )
                elif now - facts.measure(folder)[1] >= self.policy.temp_s:
                    found.append((f"jobs/{folder.name}", Reason.NO_JOB, None))
        return found

    def _of_jobs(self, ids: Sequence[int], plan: Plan | None) -> list[Deletion]:
        """Return what may be deleted of these jobs."""
        seen = {one: facts.see_job(self.volume, one) for one in ids}  # before the table is read
        policy = self.policy

        def ask(conn: Connection) -> list[Deletion]:
            found: list[Deletion] = []
            known = facts.job_facts(conn, ids)
            needed = facts.needed_jobs(conn) if policy.jobs_s is not None else {}
            for job_id, job in known.items():
                going = dict(rules.leftovers(job, seen[job_id], policy))
                if job_id not in needed:
                    going = {**dict(rules.results(job, seen[job_id], policy)), **going}
                    if plan is not None and (why := rules.why_spared(job, policy)) is not None:
                        plan.spared.append((job, why))
                if not going:
                    continue
                said = recorded_spec(self.volume, job_id)
                if said is None:  # an import, or an attempt that ended before its first progress
                    if job.kind == "import" and (job.results_deleted or self._has_checkpoint(job)):
                        found += [(path, reason, job_id) for path, reason in going.items()]
                    continue
                if not facts.belongs(conn, job, said):
                    if plan is not None:
                        plan.notes.append(
                            f"{seen[job_id].folder} stays: it belongs to job {job_id} of another table"
                        )
                    continue
                found += [(path, reason, job_id) for path, reason in going.items()]
            return found

        found = self.database.read(ask, patience_s=30.0)
        whole_folders = {path for path, reason, _ in found if reason in (Reason.RESULTS, Reason.SHARD)}
        return [one for one in found if not _inside(one[0], whole_folders)]

    def _loose(self, now: float) -> list[Deletion]:
        """Return temporary files that belong to no attempt."""
        volume = self.volume
        found: list[Deletion] = []
        for folder, pattern in (
            (volume.root, rules.ROOT_TEMPS),
            (volume.jobs, rules.JOB_TEMPS),
            (volume.latest, rules.LINK_TEMPS),
            (volume.datasets, rules.DATASET_TEMPS),
        ):
            names = facts.names(folder)
            readers, there = [], []
            if folder == volume.datasets and any(map(pattern.fullmatch, names)):
                readers = self.database.read(facts.dataset_readers)
                there = [name for name in names if (folder / name / INDEX).is_file()]
            for name in names:
                path = folder / name
                if rules.TRASHED.fullmatch(name):
                    found.append((volume.relative(path), Reason.TRASH, None))
                elif pattern.fullmatch(name):
                    with suppress(OSError):
                        age_s = now - facts.measure(path)[1]
                        if rules.abandoned(age_s, readers, there, self.policy):
                            found.append((volume.relative(path), Reason.UNFINISHED, None))
        return found

    def _datasets(self, now: float) -> list[rules.Cache]:
        age_s = self.policy.datasets_s
        if age_s is None:
            return []
        seen = list(facts.caches(self.volume, now))
        readers = self.database.read(facts.dataset_readers)
        return [one for one in seen if rules.unused(one, readers, age_s)]

    def _uploads(self, now: float) -> list[Deletion]:
        if self.volume.uploads.is_symlink():
            return []
        return list(uploads.unneeded(self.volume, self._needed_sets(), now, self.policy))

    def _needed_sets(self) -> set[str]:
        age_s = self.policy.datasets_s
        if age_s is None:
            return set()
        return self.database.read(partial(uploads.needed_sets, age_s=age_s), patience_s=30.0)

    def _links(self, now: float, going: Sequence[str]) -> list[Deletion]:
        """Return ganq's own links in latest/ that dangle, or will after the sweep."""
        found: list[Deletion] = []
        for entry in facts.entries(self.volume.latest):
            with suppress(OSError):
                if not entry.is_symlink() or entry.name.startswith("."):
                    continue
                target = os.readlink(entry.path)
                if not rules.LINK_TARGET.fullmatch(target):
                    continue
                where = target.removeprefix("../")
                lost = not os.path.lexists(self.volume.root / where) or _inside(where, set(going))
                if lost and now - entry.stat(follow_symlinks=False).st_mtime >= self.policy.temp_s:
                    found.append((f"latest/{entry.name}", Reason.LINK, None))
        return found

    # --- sweeping -------------------------------------------------------------------------

    def sweep(self, plan: Plan) -> Swept:
        """
        Delete the items of a plan that are still garbage.

        Raises:
            DatabaseUnavailableError: the remaining items were not deleted.
        """
        done = Swept()
        by_job: dict[int, list[Item]] = defaultdict(list)
        loose = []
        for item in plan.items:
            if item.job_id is None:
                loose.append(item)
            else:
                by_job[item.job_id].append(item)
        ids = sorted(by_job)
        for start in range(0, len(ids), BATCH_SIZE):
            some = ids[start : start + BATCH_SIZE]
            self._delete_rows([one for job_id in some for one in by_job[job_id]], done)
            for job_id in some:
                self._sweep_job(job_id, by_job[job_id], done)
        for item in loose:
            self._sweep_loose(item, done)
        return done

    def _delete_rows(self, items: Sequence[Item], done: Swept) -> None:
        """Remove results from the table before their files are deleted."""
        ids = sorted({one.job_id for one in items if one.reason is Reason.RESULTS and one.job_id})
        age_s = self.policy.jobs_s
        if not ids or age_s is None:
            return

        self.database.write(partial(facts.delete_results, ids=ids, age_s=age_s))
        failpoint("gc.results_deleted")

    def _sweep_job(self, job_id: int, items: Sequence[Item], done: Swept) -> None:
        # Without --jobs: results whose rows were removed are leftovers now, the others are not.
        fresh = Collector(self.database, self.volume, Policy(grace_s=self.policy.grace_s))
        still = {path for path, _, _ in fresh._of_jobs([job_id], None)}
        for item in items:
            if item.path in still or _inside(item.path, still):
                self._remove(item, done)
            else:
                done.kept.append((item, f"job {job_id} uses it, or is needed again"))

    def _sweep_loose(self, item: Item, done: Swept) -> None:
        if item.reason is Reason.NO_JOB:
            job_id = int(PurePosixPath(item.path).name)
            if self.database.read(lambda conn: facts.job_facts(conn, [job_id])):
                done.kept.append((item, "there is such a job now"))
                return
        ask: Callable[[int, str], str | None] | None = None
        if item.cache is not None:
            ask = partial(self._is_in_use, item.cache)
        elif item.reason is Reason.LINK:
            ask = self._is_link
        elif item.reason is Reason.UPLOAD:
            self._sweep_upload(item, done)
            return
        elif item.reason is Reason.UNFINISHED and item.path.startswith(uploads.BLOBS):
            ask = partial(self._is_arriving, facts.volume_clock(self.volume))
        self._remove(item, done, ask)

    def _sweep_upload(self, item: Item, done: Swept) -> None:
        """Delete an uploaded data set, then the blobs that no other one has."""
        inodes: set[int] = set()
        now, path = facts.volume_clock(self.volume), PurePosixPath(item.path)

        def ask(folder: int, trash: str) -> str | None:
            # A submission touches the folder before its row is committed, and fails once it is renamed.
            age_s = now - os.stat(trash, dir_fd=folder).st_mtime
            if path.name in self._needed_sets() or age_s < (self.policy.datasets_s or 0.0):
                return "a job reads it"
            inodes.update(uploads.files_of(folder, trash))
            return None

        self._remove(item, done, ask)
        if done.gone and done.gone[-1] is item:
            uploads.delete_blobs(self.volume, inodes)

    def _is_arriving(self, now: float, folder: int, trash: str) -> str | None:
        """Return why an uploaded file is kept: an upload goes on, or a data set has it now."""
        about = os.stat(trash, dir_fd=folder, follow_symlinks=False)
        used = now - about.st_mtime < self.policy.uploads_s or about.st_nlink > 1
        return "an upload goes on" if used else None

    def _is_in_use(self, cache: rules.Cache, folder: int, trash: str) -> str | None:
        """
        Return why a data set is kept, after its folder was renamed.

        A job that opened it before was claimed before, and is found here. A later one decodes it again.
        """
        readers = self.database.read(facts.dataset_readers)
        return None if rules.unused(cache, readers, self.policy.datasets_s or 0.0) else "a job reads it"

    def _is_link(self, folder: int, trash: str) -> str | None:
        """Return why a link is kept: a worker may have pointed it to a new attempt."""
        where = os.readlink(trash, dir_fd=folder).removeprefix("../")
        return "it was replaced" if os.path.lexists(self.volume.root / where) else None

    def _remove(self, item: Item, done: Swept, ask: Callable[[int, str], str | None] | None = None) -> None:
        """Rename an item, then delete it; `ask` may return in between why it must be restored."""
        path = PurePosixPath(item.path)
        try:
            with opened(self.volume.root, path.parent) as folder:
                trash = path.name
                if not rules.TRASHED.fullmatch(trash):
                    trash = f"{TRASH}{secrets.token_hex(6)}"
                    os.rename(path.name, trash, src_dir_fd=folder, dst_dir_fd=folder)
                    failpoint("gc.renamed")
                    why: str | None = "the job table went away"
                    try:
                        why = ask(folder, trash) if ask is not None else None
                    finally:
                        if why is not None:
                            os.rename(trash, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                    if why is not None:
                        done.kept.append((item, why))
                        return
                delete_tree(folder, trash)
        except FileNotFoundError:
            done.kept.append((item, "it has gone by itself"))
        except OSError as exc:
            told = (exc.strerror or str(exc)).lower()
            (done.kept if exc.errno in BUSY else done.failed).append((item, told))
        else:
            failpoint("gc.deleted")
            done.gone.append(item)


def _inside(path: str, folders: set[str]) -> bool:
    return any(str(one) in folders for one in PurePosixPath(path).parents)


@contextmanager
def alone(database: Database) -> Iterator[None]:
    """
    Allow one gc at a time for one job table: two would do no harm, but each would report half.

    Raises:
        CollectorBusyError: another one is running.
    """
    busy = CollectorBusyError("another ganq gc is running", hint="wait until it has ended")
    if database.is_sqlite:
        path = Path(database.url.removeprefix("sqlite:///"))
        # Lock the folder itself, so that no lock file remains; the kernel unlocks it when the process ends.
        fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                raise busy from exc
            yield
        finally:
            os.close(fd)
        return
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        if not conn.execute(text("SELECT pg_try_advisory_lock(:key)"), {"key": ADVISORY_LOCK}).scalar_one():
            raise busy
        try:
            yield
        finally:
            conn.invalidate()  # the lock ends with the session, even if the server cannot be reached
