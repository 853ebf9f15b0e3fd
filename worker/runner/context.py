"""RunContext: what a running job may do, carried out on the shared volume and told to the supervisor."""

import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jobs.context import CheckpointKind, Images, ImageSink, Part, Sample, Snapshot
from jobs.errors import CheckpointCorruptError, DatasetError, StopRequested, VolumeError
from jobs.failpoints import failpoint
from jobs.states import StopReason
from storage.volume.checkpoints import adopt_checkpoint, find_unregistered, read_checkpoint, write_checkpoint
from storage.volume.durable import TEMP_MARK, make_folder, require_room, sync_parents, write_json
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
class Checkpointed:
    """A checkpoint's row, as the supervisor hands it over."""

    job_id: int
    path: str
    manifest_sha256: str
    epoch: int
    step: int
    kind: str = ""
    bytes: int = 0


class Saver(threading.Thread):
    """Writes one checkpoint beside the training; keeps what went wrong for who waits."""

    def __init__(self, write: Callable[[], None]) -> None:
        super().__init__(name="saver", daemon=True)
        self.write = write
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.write()
        except Exception as exc:
            self.error = exc


class RunContext:
    """One attempt's view of the world; implements jobs.context.JobContext."""

    def __init__(self, order: dict[str, Any], channel: Channel, volume: Volume) -> None:
        self.job_id: int = order["job_id"]
        self.attempt: int = order["attempt"]
        self.order = order
        self.channel = channel
        self.volume = volume
        self.folder = volume.attempt(self.job_id, self.attempt)
        # Shards that this attempt makes again; a temporary name, so that `ganq gc` takes what a kill leaves.
        self._shards = self.folder / f"shards{TEMP_MARK}{secrets.token_hex(4)}"
        self._stop: str | None = None
        self._acked = threading.Event()
        self._reported_at = 0.0
        self._sinks: list[ImageFiles] = []
        self._saver: Saver | None = None
        self._announced: Checkpointed | None = None
        self._checkpoints = [Checkpointed(**pointer) for pointer in order["checkpoints"]]  # newest first
        self._require(volume.jobs)
        former = quarantine_if_orphaned(
            volume, self.job_id, self.attempt, order["submitted_at"], order["spec"]
        )
        # Its name need not outlive a power cut before something in it is registered: see _keep().
        make_folder(self.folder, named=False)
        self._introduced = self._kept = False
        self._log = open(self.folder / "log.txt", "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._metrics: IO[bytes] | None = None  # a training's
        if former is not None:
            self.log(f"here lay a job of another job table, under the same id: it is in {former.name} now")
            self.event("quarantined", folder=volume.relative(former))

    def close(self) -> None:
        if self._saver is not None:
            self._saver.join()  # its supervisor answers: the end of this job is told after this
        for sink in self._sinks:
            sink.discard()  # what a stop left unpublished; nothing after publish()
        shutil.rmtree(self._shards, ignore_errors=True)
        self._log.close()
        if self._metrics is not None:
            self._metrics.close()

    # --- told by the supervisor, from the reading thread -----------------------------------

    def ask_to_stop(self, reason: str) -> None:
        self._stop = reason

    def acknowledge(self) -> None:
        if self._announced is not None:
            self._checkpoints = [self._announced, *self._checkpoints]
        self._acked.set()

    def forget(self, paths: list[str]) -> None:
        """These checkpoints were let go by retention."""
        self._checkpoints = [one for one in self._checkpoints if one.path not in paths]

    # --- JobContext ------------------------------------------------------------------------

    def stop_reason(self) -> str | None:
        if failpoint("context.preempted"):
            self._stop = StopReason.PREEMPT
        return self._stop

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
        self.introduce()
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

        known = self.order["inputs"].get(pin)
        spec = self.order["spec"]
        reading = Reading.of_spec(spec)
        if pin != "fingerprint":
            # Generated images: that many are alike is what an evaluation must see.
            reading = replace(reading, keep_duplicates=True)

        def progress(done: int, total: int) -> None:
            self.report(done, total, "images", phase="reading images")
            if self._stop is not None:
                raise StopRequested(self._stop)

        reported: set[str] = set()

        def damaged(what: str) -> None:
            if what not in reported:  # both calls below may find it
                reported.add(what)
                self.log(f"{what}; it is decoded again")
                self.event("dataset_damaged", reason=what)

        if known is not None:
            cached = open_cached(self.volume, known, progress=progress, damaged=damaged)
            if cached is not None:
                return cached
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
            name = " ".join(one.name.splitlines())  # a file's name may hold any character
            self.log(f"left out: {name}: {one.reason}")
        found = summary[0]
        self.log(f"{len(images)} images used")
        for line in found.lines(white_level=reading.white_level, grey=spec.get("grey", False)):
            self.log(" ".join(line.splitlines()))
        self.event("dataset", **found.to_json() | ({} if pin == "fingerprint" else {"of": pin}))
        if known is None:
            self._send("inputs", inputs={pin: images.fingerprint})
        elif known != images.fingerprint:
            raise DatasetError(
                f"the pictures at {data} are not those that this run began with, and their copy is gone",
                hint=f"bring them back, then ganq retry {self.job_id}; or start a new run with the new ones",
            )
        return images

    def event(self, type: str, **detail: Any) -> None:
        self._send("event", type=type, detail=detail)

    def resume(
        self, restore: Callable[[Snapshot], None], *, whole_epoch: bool = False, step: int | None = None
    ) -> Snapshot | None:
        wanted = [one for one in self._checkpoints if one.kind != "resume" or not whole_epoch]
        wanted.sort(key=lambda one: one.step != step)  # stable: the newest first among the others
        for one in wanted:
            try:
                snapshot = read_checkpoint(self.volume, one, "state")
                restore(snapshot)
            except CheckpointCorruptError as exc:
                self.log(f"checkpoint {one.path} is skipped: {exc.message}")
                self.event("checkpoint_skipped", path=one.path, step=one.step, reason=exc.message)
                continue
            # The next one is written before this one goes, and others write there, too.
            require_room(self.folder, 2 * one.bytes)
            return snapshot
        found = self._resume_unregistered(restore, whole_epoch=whole_epoch)
        if found is not None:
            return found
        if wanted:
            whose = wanted[0].job_id
            raise CheckpointCorruptError(
                f"none of the {len(wanted)} checkpoints of job {whose} is whole",
                hint=f"ganq retry {whose} starts it again from nothing",
            )
        return None

    def _resume_unregistered(
        self, restore: Callable[[Snapshot], None], *, whole_epoch: bool
    ) -> Snapshot | None:
        """
        Go on from a whole checkpoint that has no row, where none that has one can be read.

        The job table may have lost its last commits (a standby that took over, a restored copy), and
        retention has deleted what its rows point to. What is found is checked as any checkpoint is, linked
        into this attempt's folder and registered; the epochs before it, too, whose rows were lost with it.
        """
        said = recorded_spec(self.volume, self.job_id)
        about = self.order["submitted_at"], lambda: self.order["spec"]
        if said is None or not is_of(said, self.job_id, *about):
            return None
        found = find_unregistered(self.volume, self.job_id, {one.path for one in self._checkpoints})
        for place, one in reversed(list(enumerate(found))):
            kind = one.facts.get("kind")
            if kind not in ("resume", "epoch", "final") or (whole_epoch and kind == "resume"):
                continue
            pointer = Checkpointed(
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
            self.log(f"the job table has no checkpoint that can be read: {pointer.path} is taken up")
            self.event("checkpoint_recovered", path=pointer.path, step=pointer.step)
            require_room(self.folder, 2 * one.bytes)
            self._keep()
            epochs = {each.facts["step"]: each for each in found[:place] if each.facts.get("kind") == "epoch"}
            for each in sorted(epochs.values(), key=lambda each: int(each.facts["step"])):
                if each.facts["step"] < pointer.step:
                    self._adopt(each)
            self._adopt(one)
            return snapshot
        return None

    def _adopt(self, one: "Unregistered") -> None:
        """Make a checkpoint that has no row one of this attempt's."""
        target, own = one.folder, self.volume.checkpoints(self.job_id, self.attempt)
        if target.parent != own:  # a table that lost a claim gives out its number again
            target = self._free_place(own / one.folder.name)
            adopt_checkpoint(one, target)
        facts = one.facts
        self._register(
            target, facts["kind"], facts["epoch"], facts["step"], one.manifest_sha256, one.bytes, facts
        )

    def model(self) -> Snapshot:
        return read_checkpoint(self.volume, Checkpointed(**self.order["inputs"]["checkpoint"]), "generator")

    def model_sha256(self) -> str:
        return str(self.order["inputs"]["checkpoint"]["manifest_sha256"])

    def models(self) -> Iterator[Snapshot]:
        for pointer in self.order["inputs"].get("checkpoints", ()):
            yield read_checkpoint(self.volume, Checkpointed(**pointer), "generator")

    def generated_images(self, most: int) -> "Iterator[NDArray[np.uint8]] | None":
        from storage.results.reader import read_images

        pinned = self.order["inputs"].get("pictures")
        if pinned is None:
            return None
        folder = self.volume.attempt(pinned["job_id"], pinned["attempt"])
        return read_images(folder, pinned["manifest_sha256"], most)

    def save_files(self, files: "Mapping[str, bytes | NDArray[np.uint8]]") -> list[dict[str, Any]]:
        from storage.results.files import write_files

        self._keep()
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
        target = self._free_place(self.volume.checkpoints(self.job_id, self.attempt) / name)
        facts = {**meta, "kind": kind, "epoch": epoch, "step": step}
        assert not self.is_saving(), "wait_for_save() first"
        self._saver = Saver(partial(self._write, target, kind, epoch, step, state, generator, facts, sample))

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
        """The part of a save that nobody waits for; on the saver's thread."""
        self._keep()
        if sample is not None:
            self.save_sample(sample.name, sample.draw())
        began = time.monotonic()
        digest, size = write_checkpoint(target, state=state, generator=generator, meta=facts)
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
        """Have the supervisor write a checkpoint's row, and wait until it is committed."""
        path = self.volume.relative(target)
        self._announced = Checkpointed(self.job_id, path, digest, epoch, step, kind, size)
        self._acked.clear()
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
        # The supervisor answers when the row is committed, or kills this process when
        # the lease is lost; a database that is away makes both of us wait.
        self._acked.wait()

    def is_saving(self) -> bool:
        return self._saver is not None and self._saver.is_alive()

    def wait_for_save(self) -> None:
        saver, self._saver = self._saver, None
        if saver is not None:
            if saver.is_alive():
                self._send("quiet", why="saving a checkpoint")  # however slow the volume: not hung
            saver.join()
            if saver.error is not None:
                raise saver.error

    def save_sample(self, name: str, pixels_HW3: "NDArray[np.uint8]") -> None:
        from storage.results.codecs import write_png

        folder = self.folder / "samples"
        make_folder(folder)
        write_png(folder / f"{name}.png", pixels_HW3)

    def parts(self) -> list[Part]:
        from storage.results.reader import is_there, read_manifest

        found = []
        for one in self.order["parts"]:
            if self._stop is not None:
                raise StopRequested(self._stop)
            folder, digest = self.volume.attempt(one["job_id"], one["attempt"]), one["manifest_sha256"]
            made = read_manifest(folder, digest) if is_there(folder, digest) else None
            found.append(Part(one["job_id"], tuple(one["draws"]), made))
        return found

    def pictures(
        self,
        *,
        format: str = "png",
        quality: int | None = None,
        total: int | None = None,
        part: int | None = None,
    ) -> ImageSink:
        from storage.results.writer import ImageFiles

        self._keep()  # publish() syncs the whole file system, where it can: FUSE and 9p pass on fsync alone
        folder = self.folder if part is None else self._shards / f"{part:04d}"
        sink = ImageFiles(folder, format=format, quality=quality, total=total)
        self._sinks.append(sink)
        return sink

    def scratch(self) -> Path:
        return self.folder

    # --- inside ----------------------------------------------------------------------------

    def introduce(self) -> None:
        """
        Say once what lies here: what was asked, resolved, and what answers it (spec.json), and its link.

        Not before there is something to tell: it waits for the disk, longer than a job of nothing takes.
        """
        if self._introduced:
            return
        from storage.version import version

        path = self.volume.job(self.job_id) / "spec.json"
        if not path.exists():
            about = {"ganq": version(), "kind": self.order["kind"], "inputs": self.order["inputs"]}
            about["submitted_at"] = self.order["submitted_at"]  # ganq gc knows the job by it
            write_json(path, {"job": self.job_id, "spec": self.order["spec"], **about}, named=False)
        self.volume.point_latest(self.order["label"], self.folder)
        self._introduced = True

    def _keep(self) -> None:
        """
        Make this attempt's folder durable, once: what is registered must be found after a power cut.

        Raises:
            VolumeError: it has gone. What is made anew in its place may be the disk below a mount.
        """
        self._require(self.folder)
        if not self._kept:
            self.introduce()
            sync_parents(self.folder, self.volume.jobs)
            self._kept = True

    def _require(self, folder: Path) -> None:
        if not os.path.isdir(folder):  # False, too, where we may not look
            raise VolumeError(f"{folder} is gone", hint="is the volume still mounted there?")

    def _free_place(self, target: Path) -> Path:
        """This folder, or one beside it: a run that went back comes by the same step again."""
        known = {one.path for one in self._checkpoints}
        place, again = target, 1
        while self.volume.relative(place) in known:
            again += 1
            place = target.with_name(f"{target.name}.{again}")
        if place.exists():  # renamed, but never registered: the folder above could not be synced
            shutil.rmtree(place)
        return place

    def _send(self, op: str, **facts: Any) -> None:
        self.channel.send(op, job_id=self.job_id, **facts)


def _append(file: IO[bytes], line: str) -> None:
    """A log that cannot be written, as on a full disk, must not end the work that it tells of."""
    with suppress(OSError):
        file.write(line.encode(errors="backslashreplace"))
