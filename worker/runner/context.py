"""RunContext: implements JobContext over the shared volume and the channel to the supervisor."""

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jobs.context import (
    PLAIN_NAMES,
    CheckpointKind,
    ImageNames,
    Images,
    ImageSink,
    Sample,
    Shard,
    ShardFiles,
    Snapshot,
)
from jobs.errors import CheckpointCorruptError, DatasetError, StopRequested
from jobs.failpoints import failpoint
from jobs.states import StopReason
from storage.users import this_account
from storage.volume.checkpoints import adopt_checkpoint, find_unregistered, read_checkpoint, write_checkpoint
from storage.volume.durable import TEMP_MARK, gone, make_folder, require_room, sync_parents, write_json
from storage.volume.layout import Volume
from storage.volume.ownership import is_of, quarantine_if_orphaned, recorded_spec
from worker.ipc import Channel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from storage.results.writer import ImageFiles
    from storage.volume.checkpoints import Unregistered

REPORT_EVERY_S = 0.25
SKIPPED_SHOWN = 50


@dataclass(frozen=True)
class CheckpointPointer:
    """A checkpoint's row, as the assignment contains it."""

    job_id: int
    path: str
    manifest_sha256: str
    epoch: int
    step: int
    kind: str = ""
    bytes: int = 0


class SaveThread(threading.Thread):
    """Writes one checkpoint while training continues; keeps its error for wait_for_save()."""

    def __init__(self, write: Callable[[], None]) -> None:
        super().__init__(name="save", daemon=True)
        self.write = write
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.write()
        except Exception as exc:
            self.error = exc


class RunContext:
    """
    The context of one attempt; see jobs.context.JobContext.

    Files are written in the attempt's folder; progress, events and checkpoints go to the supervisor.
    """

    def __init__(self, assignment: dict[str, Any], channel: Channel, volume: Volume) -> None:
        self.job_id: int = assignment["job_id"]
        self.attempt: int = assignment["attempt"]
        self.assignment = assignment
        self.channel = channel
        self.volume = volume
        self.folder = volume.attempt(self.job_id, self.attempt)
        self._stop: str | None = None
        self._time_is_up = False
        ends_in_s = assignment.get("ends_in_s")
        self._ends_at = None if ends_in_s is None else time.monotonic() + ends_in_s
        self._acknowledged = threading.Event()
        self._reported_at = 0.0
        self._sinks: list[ImageFiles] = []
        self._save: SaveThread | None = None
        self._unacknowledged: CheckpointPointer | None = None
        self._checkpoints = [CheckpointPointer(**one) for one in assignment["checkpoints"]]  # newest first
        self._require_folder(volume.jobs)
        orphaned = quarantine_if_orphaned(
            volume, self.job_id, self.attempt, assignment["submitted_at"], assignment["spec"]
        )
        # The folder need not be durable before something in it is registered: see _make_durable().
        make_folder(self.folder, inside=volume.jobs, named=False)
        self._spec_written = self._durable = False
        self._log = open(self.folder / "log.txt", "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._metrics: IO[bytes] | None = None  # opened by the first record
        if orphaned is not None:
            self.log(
                f"this folder was of a job of another job table, with the same id: moved to {orphaned.name}"
            )
            self.event("quarantined", folder=volume.relative(orphaned))

    def close(self) -> None:
        if self._save is not None:
            self._save.join()  # the supervisor acknowledges a checkpoint before it reads the end of the job
        for sink in self._sinks:
            sink.discard()  # images that a stop left unpublished; does nothing after publish()
        if "_shards_folder" in vars(self):
            shutil.rmtree(self._shards_folder, ignore_errors=True)
        self._log.close()
        if self._metrics is not None:
            self._metrics.close()

    @cached_property
    def _shards_folder(self) -> Path:
        """Folder of shards that are generated again; after a kill `ganq gc` deletes it by its name."""
        return self.folder / f"shards{TEMP_MARK}{secrets.token_hex(4)}"

    # --- messages of the supervisor, on the receiving thread -------------------------------

    def request_stop(self, reason: str) -> None:
        if reason == StopReason.STOP_AFTER:
            self._time_is_up = True  # no reason to abandon what the job is doing
        else:
            self._stop = reason

    def acknowledge(self) -> None:
        if self._unacknowledged is not None:
            self._checkpoints = [self._unacknowledged, *self._checkpoints]
        self._acknowledged.set()

    def forget(self, paths: list[str]) -> None:
        """Drop checkpoints that retention has deleted."""
        self._checkpoints = [one for one in self._checkpoints if one.path not in paths]

    # --- JobContext ------------------------------------------------------------------------

    def stop_reason(self) -> str | None:
        if failpoint("context.preempted"):
            self._stop = StopReason.PREEMPT
        return self._stop or (StopReason.STOP_AFTER if self._time_is_up else None)

    def stop_step(self) -> int | None:
        step: int | None = self.assignment["inputs"].get("stop_step")
        return step

    def pin_stop_step(self, step: int) -> None:
        self._send("inputs", inputs={"stop_step": step})

    def report(
        self,
        done: int,
        total: int,
        unit: str,
        *,
        rate: float | None = None,
        epoch: int | None = None,
        epochs: int | None = None,
        phase: str | None = None,
    ) -> None:
        self.write_spec()
        now = time.monotonic()
        if now - self._reported_at < REPORT_EVERY_S and done < total:
            return
        self._reported_at = now
        facts = {
            "done": done,
            "total": total,
            "unit": unit,
            "rate": rate,
            "epoch": epoch,
            "epochs": epochs,
            "phase": phase,
            "ends_in_s": None if self._ends_at is None else round(max(0.0, self._ends_at - now), 1),
        }
        self._send("progress", progress={key: value for key, value in facts.items() if value is not None})

    def log(self, message: str) -> None:
        _append(self._log, f"{time.strftime('%H:%M:%S')} {message}\n")

    def metrics(self, record: Mapping[str, float | int | str | None]) -> None:
        if self._metrics is None:
            self._metrics = open(self.folder / "metrics.jsonl", "ab", buffering=0)  # noqa: SIM115
        _append(self._metrics, json.dumps(dict(record)) + "\n")

    def images(self, data: str, size: int, *, pin: str = "fingerprint") -> Images:
        from dataclasses import replace

        from storage.datasets.cache import left_out, open_cached, open_images
        from storage.datasets.sources import Reading
        from storage.datasets.summary import Summary
        from storage.volume.permissions import may_not_read

        known = self.assignment["inputs"].get(pin)
        spec = self.assignment["spec"]
        reading = Reading.of_spec(spec)
        if pin != "fingerprint":
            # Generated images: an evaluation must see duplicates.
            reading = replace(reading, keep_duplicates=True)

        def progress(done: int, total: int) -> None:
            self.report(done, total, "images", phase="reading images")
            if self._stop is not None:
                raise StopRequested(self._stop)

        reported: set[str] = set()

        def damaged(what: str) -> None:
            if what not in reported:  # both calls below may report it
                reported.add(what)
                self.log(f"{what}; decoding the data set again")
                self.event("dataset_damaged", reason=what)

        if known is not None:
            cached = open_cached(self.volume, known, progress=progress, damaged=damaged)
            if cached is not None:
                return cached
        if (unreadable := may_not_read(Path(data))) is not None:
            raise DatasetError(
                f"the worker's user {this_account()} may not read {unreadable}",
                hint="let that account read it (a common group, chmod g+rX): docs/operations.md, "
                f"Several Unix users; then ganq retry {self.job_id}",
            )
        summary: list[Summary] = []
        images = open_images(
            self.volume,
            data,
            size,
            reading=reading,
            found=summary.append,
            max_skip=spec["max_skip"],
            workers=spec["loader_workers"],
            progress=progress,
            damaged=damaged,
        )
        for one in left_out(self.volume, images.fingerprint)[:SKIPPED_SHOWN]:
            name = " ".join(one.name.splitlines())  # a file name may contain any character
            self.log(f"left out: {name}: {one.reason}")
        found = summary[0]
        self.log(f"{len(images)} images used")
        options = {"white_level": reading.white_level, "fit": reading.fit, "grey": spec.get("grey", False)}
        for line in found.lines(**options):
            self.log(" ".join(line.splitlines()))
        self.event("dataset", **found.to_json() | ({} if pin == "fingerprint" else {"of": pin}))
        if known is None:
            self._send("inputs", inputs={pin: images.fingerprint})
        elif known != images.fingerprint:
            raise DatasetError(
                f"the images at {data} are not those of this run's first attempt, and their copy was deleted",
                hint=f"restore them, then ganq retry {self.job_id}; or start a new run with the new ones",
            )
        return images

    def event(self, type: str, **detail: Any) -> None:
        self._send("event", type=type, detail=detail)

    def resume(
        self, restore: Callable[[Snapshot], None], *, whole_epoch: bool = False, step: int | None = None
    ) -> Snapshot | None:
        candidates = [one for one in self._checkpoints if one.kind != "resume" or not whole_epoch]
        candidates.sort(key=lambda one: one.step != step)  # stable: the newest first among the others
        for one in candidates:
            try:
                snapshot = read_checkpoint(self.volume, one, "state")
                restore(snapshot)
            except CheckpointCorruptError as exc:
                self.log(f"checkpoint {one.path} is skipped: {exc.message}")
                self.event("checkpoint_skipped", path=one.path, step=one.step, reason=exc.message)
                continue
            # The next checkpoint is written before this one is deleted, and other jobs write there, too.
            require_room(self.folder, 2 * one.bytes)
            return snapshot
        unregistered = self._resume_unregistered(restore, whole_epoch=whole_epoch)
        if unregistered is not None:
            return unregistered
        if candidates:
            job_id = candidates[0].job_id
            raise CheckpointCorruptError(
                f"none of the {len(candidates)} checkpoints of job {job_id} is intact",
                hint=f"ganq retry {job_id} starts it again from the beginning",
            )
        return None

    def _resume_unregistered(
        self, restore: Callable[[Snapshot], None], *, whole_epoch: bool
    ) -> Snapshot | None:
        """
        Resume from an intact checkpoint without a row, if no registered one can be read.

        The job table may have lost its last commits (a standby that took over, a restored copy), while
        retention has deleted the files of the rows that it has. The checkpoint is verified like any other,
        linked into this attempt's folder and registered, together with the epochs before it whose rows were
        lost with it.
        """
        recorded = recorded_spec(self.volume, self.job_id)
        expected = self.assignment["submitted_at"], lambda: self.assignment["spec"]
        if recorded is None or not is_of(recorded, self.job_id, *expected):
            return None
        found = find_unregistered(self.volume, self.job_id, {one.path for one in self._checkpoints})
        for place, one in reversed(list(enumerate(found))):
            kind = one.facts.get("kind")
            if kind not in ("resume", "epoch", "final") or (whole_epoch and kind == "resume"):
                continue
            pointer = CheckpointPointer(
                self.job_id,
                self.volume.relative(one.folder),
                one.manifest_sha256,
                one.facts["epoch"],
                one.facts["step"],
            )
            try:
                snapshot = read_checkpoint(self.volume, pointer, "state")
                restore(snapshot)
            except CheckpointCorruptError as exc:
                self.log(f"checkpoint {pointer.path}, which has no row, is skipped: {exc.message}")
                continue
            self.log(f"the job table has no checkpoint that can be read: {pointer.path} is restored")
            self.event("checkpoint_recovered", path=pointer.path, step=pointer.step)
            require_room(self.folder, 2 * one.bytes)
            self._make_durable()
            epochs = {each.facts["step"]: each for each in found[:place] if each.facts.get("kind") == "epoch"}
            for each in sorted(epochs.values(), key=lambda each: int(each.facts["step"])):
                if each.facts["step"] < pointer.step:
                    self._adopt(each)
            self._adopt(one)
            return snapshot
        return None

    def _adopt(self, one: "Unregistered") -> None:
        """Link a checkpoint without a row into this attempt's folder and register it."""
        target, own = one.folder, self.volume.checkpoints(self.job_id, self.attempt)
        if target.parent != own:  # a table that lost a claim assigns its attempt number again
            target = self._unused_folder(own / one.folder.name)
            adopt_checkpoint(one, target, inside=self.folder)
        facts = one.facts
        self._register(
            target, facts["kind"], facts["epoch"], facts["step"], one.manifest_sha256, one.bytes, facts
        )

    def model(self) -> Snapshot:
        return read_checkpoint(
            self.volume, CheckpointPointer(**self.assignment["inputs"]["checkpoint"]), "generator"
        )

    def model_sha256(self) -> str:
        return str(self.assignment["inputs"]["checkpoint"]["manifest_sha256"])

    def models(self) -> Iterator[Snapshot]:
        for pointer in self.assignment["inputs"].get("checkpoints", ()):
            yield read_checkpoint(self.volume, CheckpointPointer(**pointer), "generator")

    def sample_grids(self) -> list[Sample]:
        from storage.results.attempts import sample_files

        files = sample_files(self.volume, self.assignment["spec"]["source"])
        return [Sample(path.stem, partial(_decoded, path)) for _, path in files]

    def generated_images(self, most: int) -> "Iterator[NDArray[np.uint8]] | None":
        from storage.results.reader import read_images

        pinned = self.assignment["inputs"].get("pictures")
        if pinned is None:
            return None
        folder = self.volume.attempt(pinned["job_id"], pinned["attempt"])
        return read_images(folder, pinned["manifest_sha256"], most)

    def save_files(self, files: "Mapping[str, bytes | NDArray[np.uint8]]") -> list[dict[str, Any]]:
        from storage.results.files import write_files

        self._make_durable()
        return write_files(self.folder, files)

    def weights(self, path: str, *, sha256: str | None = None) -> "dict[str, Tensor]":
        from storage.results.files import require_sha256
        from storage.weights.load import read_weights

        if sha256 is not None:
            require_sha256(Path(path), sha256)
        return read_weights(Path(path))

    def save_checkpoint(
        self,
        *,
        kind: CheckpointKind,
        epoch: int,
        step: int,
        state: "Mapping[str, Tensor]",
        generator: "Mapping[str, Tensor]",
        meta: Mapping[str, Any],
        sample: Sample | None = None,
    ) -> None:
        name = {"resume": f"resume-{step:09d}", "epoch": f"epoch-{epoch:04d}", "final": "final"}[kind]
        target = self._unused_folder(self.volume.checkpoints(self.job_id, self.attempt) / name)
        facts = {**meta, "kind": kind, "epoch": epoch, "step": step}
        assert not self.is_saving(), "wait_for_save() first"
        self._save = SaveThread(
            partial(self._write, target, kind, epoch, step, state, generator, facts, sample)
        )

    def _write(
        self,
        target: Path,
        kind: str,
        epoch: int,
        step: int,
        state: "Mapping[str, Tensor]",
        generator: "Mapping[str, Tensor]",
        facts: Mapping[str, Any],
        sample: Sample | None,
    ) -> None:
        """Write the files of a checkpoint and register it; runs on the save thread."""
        self._make_durable()
        if sample is not None:
            self.save_sample(sample.name, sample.draw())
        began = time.monotonic()
        digest, size = write_checkpoint(
            target, state=state, generator=generator, meta=facts, inside=self.folder
        )
        seconds = time.monotonic() - began
        self._register(target, kind, epoch, step, digest, size, facts, seconds=seconds)
        self.log(f"checkpoint {target.name}: epoch {epoch}, step {step}, {size / 1e6:.1f} MB")

    def _register(
        self,
        target: Path,
        kind: str,
        epoch: int,
        step: int,
        digest: str,
        size: int,
        facts: Mapping[str, Any],
        *,
        seconds: float | None = None,
    ) -> None:
        """Ask the supervisor to insert a checkpoint's row; wait until that is committed."""
        path = self.volume.relative(target)
        self._unacknowledged = CheckpointPointer(self.job_id, path, digest, epoch, step, kind, size)
        self._acknowledged.clear()
        self._send(
            "checkpoint",
            kind=kind,
            epoch=epoch,
            step=step,
            path=path,
            manifest_sha256=digest,
            bytes=size,
            metric=facts.get("metric"),
            seconds=seconds,
        )
        # The supervisor acknowledges the committed row, or kills this process if the lease is lost. While the
        # database is unavailable both wait.
        self._acknowledged.wait()

    def is_saving(self) -> bool:
        return self._save is not None and self._save.is_alive()

    def wait_for_save(self) -> None:
        save, self._save = self._save, None
        if save is not None:
            if save.is_alive():
                self._send("quiet", why="saving a checkpoint")  # a slow volume is not a stall
            save.join()
            if save.error is not None:
                raise save.error

    def save_sample(self, name: str, pixels_HW3: "NDArray[np.uint8]") -> None:
        from storage.results.codecs import write_png

        folder = self.folder / "samples"
        make_folder(folder, inside=self.folder)
        write_png(folder / f"{name}.png", pixels_HW3)
        self.volume.point(self.volume.samples(self.job_id), folder)

    def shards(self) -> list[Shard]:
        from storage.results.reader import PublishedImages, are_there, is_there

        found = []
        for one in self.assignment["shards"]:
            if self._stop is not None:
                raise StopRequested(self._stop)
            folder, digest = self.volume.attempt(one["job_id"], one["attempt"]), one["manifest_sha256"]
            files = ShardFiles(folder, manifest_sha256=digest, **one["files"]) if "files" in one else None
            there = is_there(folder, digest) if files is None else are_there(files)
            images = PublishedImages(folder, digest) if there else None
            equal = one.get("all_equal", False)
            found.append(Shard(one["job_id"], tuple(one["draws"]), images, one.get("build"), files, equal))
        return found

    def image_sink(
        self,
        *,
        format: str = "png",
        quality: int | None = None,
        total: int | None = None,
        names: ImageNames = PLAIN_NAMES,
        shard: int | None = None,
        of_shards: bool = False,
    ) -> ImageSink:
        from storage.results.writer import ImageFiles

        # publish() syncs the whole file system where that works; FUSE and 9p support fsync alone.
        self._make_durable()
        folder = self.folder if shard is None else self._shards_folder / f"{shard:04d}"
        sink = ImageFiles(
            folder,
            inside=self.folder,
            format=format,
            quality=quality,
            total=total,
            names=names,
            of_shards=of_shards,
        )
        self._sinks.append(sink)
        return sink

    def scratch(self) -> Path:
        return self.folder

    # --- the attempt's folder ---------------------------------------------------------------

    def write_spec(self) -> None:
        """
        Write spec.json (the resolved spec and the inputs) and the link in latest/, once.

        Not before the first progress: it waits for the disk, longer than a very short job takes.
        """
        if self._spec_written:
            return
        from storage.version import version

        path = self.volume.job(self.job_id) / "spec.json"
        if not path.exists():
            about = {"ganq": version(), "kind": self.assignment["kind"], "inputs": self.assignment["inputs"]}
            about["submitted_at"] = self.assignment["submitted_at"]  # identifies the job for ganq gc
            write_json(path, {"job": self.job_id, "spec": self.assignment["spec"], **about}, named=False)
        if self.assignment["kind"] == "train" and self.attempt > 1:
            from storage.results.attempts import gather_samples

            gather_samples(self.volume, self.job_id, self.attempt)
        self.volume.point_latest(self.assignment["label"], self.folder)
        self._spec_written = True

    def _make_durable(self) -> None:
        """
        Make this attempt's folder durable, once: what is registered must exist after a power cut.

        Raises:
            VolumeError: the folder is gone. Created again, it might be on the disk below a mount.
        """
        self._require_folder(self.folder)
        if not self._durable:
            self.write_spec()
            sync_parents(self.folder, self.volume.jobs)
            self._durable = True

    def _require_folder(self, folder: Path) -> None:
        if not os.path.isdir(folder):  # False, too, without the permission to look
            raise gone(folder)

    def _unused_folder(self, target: Path) -> Path:
        """Return this folder, or one with a number: after a rollback a run reaches the same step again."""
        registered = {one.path for one in self._checkpoints}
        folder, number = target, 1
        while self.volume.relative(folder) in registered:
            number += 1
            folder = target.with_name(f"{target.name}.{number}")
        if folder.exists():  # renamed, but never registered: its parent folder could not be synced
            shutil.rmtree(folder)
        return folder

    def _send(self, op: str, **fields: Any) -> None:
        self.channel.send(op, job_id=self.job_id, **fields)


def _append(file: IO[bytes], line: str) -> None:
    """Write a line to a log; a log that cannot be written, as on a full disk, must not end the job."""
    with suppress(OSError):
        file.write(line.encode(errors="backslashreplace"))


def _decoded(path: Path) -> "NDArray[np.uint8]":
    from storage.results.codecs import decode

    return decode(path.read_bytes())
