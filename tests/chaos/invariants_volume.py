"""The part of chaos.invariants that reads files: I5, I6, I7, I9 and the secrets of I10."""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from chaos.invariants import ENDS, Memory, View, look
from results import verify_files, verify_manifest

from jobs.errors import GanqError
from jobs.renamed import renamed_result
from jobs.specs import GenerateSpec
from storage.db.engine import Database
from storage.db.store.pins import pinned_ids
from storage.results.formats import MANIFEST as PICTURES_MANIFEST
from storage.results.formats import RESULT
from storage.volume.durable import MANIFEST, TEMP_MARK, sha256_file
from storage.volume.layout import Volume

BESIDE_A_RESULT = {"log.txt", "metrics.jsonl"}
GENERATES = "generate"


def check_volume(
    database: Database, volume: Volume, view: View, memory: Memory, secrets: Sequence[str] = ()
) -> list[str]:
    """Return violations in files that the table refers to; what was deleted since the snapshot is none."""
    found: list[str] = []
    for row in view.jobs.values():
        about = list(_files_of(row, view, volume, memory))
        if about:
            # Retention and gc delete the row before the file: a row that still exists
            # after the file was found missing is a violation.
            now = look(database)
            about = list(_files_of(now.jobs[row.id], now, volume, Memory()))
        found += about
        found += whole_spec(row.id, volume)
    found += whole_links(volume)
    if secrets:
        found += no_secret_in_files(volume.jobs, secrets)
    return found


def _files_of(row: Any, view: View, volume: Volume, memory: Memory) -> Iterator[str]:
    for one in view.checkpoints[row.id]:
        yield from whole_checkpoint(one, volume, memory)
    yield from pinned_input(row, view)
    yield from exact_pictures(row, view, volume, memory)
    yield from whole_report(row, volume)


# --- I7 -------------------------------------------------------------------------------------


def whole_checkpoint(one: Any, volume: Volume, memory: Memory) -> Iterator[str]:
    """I7: a registered checkpoint exists, is intact, has its final name and no other files."""
    who = f"I7: checkpoint {one.id} of job {one.job_id} at {one.path}"
    if TEMP_MARK in one.path:
        yield f"{who} has a temporary name"
    try:
        folder = volume.absolute(one.path)
    except ValueError:
        yield f"{who} lies outside the volume"
        return
    try:
        manifest = (folder / MANIFEST).read_bytes()
        if hashlib.sha256(manifest).hexdigest() != one.manifest_sha256:
            yield f"{who}: its manifest is not the one that was registered"
            return
        if (one.path, one.manifest_sha256) in memory.verified:
            return
        listed = json.loads(manifest)["files"]
        bad = [each["name"] for each in listed if sha256_file(folder / each["name"]) != each["sha256"]]
        there = {each.name for each in folder.iterdir()}
    except (OSError, ValueError) as exc:
        yield f"{who}: {exc}"
        return
    if bad:
        yield f"{who}: {', '.join(bad)} changed after it was registered"
    if more := there - {each["name"] for each in listed} - {MANIFEST}:
        yield f"{who} holds what its manifest does not list: {sorted(more)}"
    if not bad and not more:
        memory.verified.add((one.path, one.manifest_sha256))


def pinned_input(row: Any, view: View) -> Iterator[str]:
    """I7: the checkpoint that a queued or running job has pinned has not been deleted."""
    wanted = pinned_ids(row.inputs)
    if row.state not in ENDS and wanted:
        ids = {one.id for each in view.checkpoints.values() for one in each}
        if gone := sorted(wanted - ids):
            yield f"I7: job {row.id} is {row.state}, and {gone} of the checkpoints that it reads are gone"


def whole_spec(job_id: int, volume: Volume) -> list[str]:
    path = volume.job(job_id) / "spec.json"
    try:
        if path.exists() and json.loads(path.read_text())["job"] != job_id:
            return [f"I7: {path} is another job's"]
    except (OSError, ValueError, KeyError) as exc:
        return [] if isinstance(exc, FileNotFoundError) else [f"I7: {path} is torn: {exc}"]
    return []


def whole_links(volume: Volume) -> list[str]:
    """I7: each link under latest/ points into the volume and to nothing temporary."""
    found = []
    for link in volume.latest.iterdir() if volume.latest.is_dir() else ():
        if link.is_symlink() and not link.name.startswith("."):
            target = link.resolve()
            if TEMP_MARK in str(target) or not target.is_relative_to(volume.root.resolve()):
                found.append(f"I7: {link} leads to {target}")
    return found


# --- I5 and the results of I4 ---------------------------------------------------------------


def images_requested(spec: dict[str, Any]) -> int:
    """Return the number of images that a generation must produce."""
    if spec.get("keep") is not None:
        return int(spec["keep"])
    if spec.get("interpolate"):
        return GenerateSpec.from_json(spec).total
    if spec.get("seeds"):
        return sum(last - first + 1 for first, last in spec["seeds"])
    return int(spec["count"])


def exact_pictures(row: Any, view: View, volume: Volume, memory: Memory) -> Iterator[str]:
    """I5: a succeeded generation has exactly its images, in the folder of the attempt that succeeded."""
    result = renamed_result(row.result or {})
    if row.kind != GENERATES or row.state != "succeeded" or "deleted_at" in result:
        return
    if row.part_of is not None and view.jobs[row.part_of].state in ENDS:
        return  # the parent has merged them, or they are no longer needed
    # Not volume.attempt(): a test may have disabled the guard that gives each attempt its own folder.
    folder = volume.job(row.id) / f"a{row.attempt}"
    digest = str(result.get("manifest_sha256"))
    where = (volume.relative(folder), digest)
    if where in memory.verified:
        return
    try:
        elsewhere = [
            path.parent.name
            for path in sorted(volume.job(row.id).glob(f"a*/{PICTURES_MANIFEST}"))
            if path.parent != folder and sha256_file(path) == digest
        ]
        if elsewhere and not (folder / PICTURES_MANIFEST).exists():
            yield f"I4: attempt {row.attempt} of job {row.id} succeeded, and its result lies in {elsewhere}"
        number = verify_manifest(folder, manifest_sha256=digest)
        missing = [name for name in result["grids"] if not (folder / name).is_file()]
        verify_files(folder, result.get("files", ()))
        others = {
            one.name
            for one in folder.iterdir()
            if one.name not in BESIDE_A_RESULT and not RESULT.fullmatch(one.name)
        }
    except (GanqError, OSError, KeyError) as exc:
        yield f"I5: the result of job {row.id} (attempt {row.attempt}): {exc}"
        return
    asked = number if row.part_of is not None else images_requested(row.spec)
    if number != asked or result.get("image_count") != number:
        reported = result.get("image_count")
        yield f"I5: job {row.id} was asked for {asked} images, reports {reported}, has {number}"
    if missing or others:
        yield f"I5: job {row.id} lacks {missing}, and has what nobody asked for: {sorted(others)}"
    elif number == asked:
        memory.verified.add(where)


def whole_report(row: Any, volume: Volume) -> Iterator[str]:
    """I5: the files of a succeeded evaluation exist and agree with its row."""
    result = row.result or {}
    if row.kind != "evaluate" or row.state != "succeeded" or "deleted_at" in result:
        return
    try:
        verify_files(volume.job(row.id) / f"a{row.attempt}", result["files"])
    except (GanqError, OSError, KeyError) as exc:
        yield f"I5: the report of job {row.id} (attempt {row.attempt}): {exc}"


# --- I6 -------------------------------------------------------------------------------------


def unequal_trainings(view: View, volume: Volume) -> list[str]:
    """I6, when nothing runs: trainings of one spec have the same bits in their final checkpoints."""
    from machine import weights

    results: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row in view.jobs.values():
        if row.kind != "train" or row.state != "succeeded" or "deleted_at" in (row.result or {}):
            continue
        final = [one for one in view.checkpoints[row.id] if one.kind == "final"]
        digest = weights(volume.absolute(final[-1].path)) if final else "no final checkpoint"
        results[json.dumps(row.spec, sort_keys=True)][digest].append(row.id)
    found = [
        f"I6: trainings of one spec ended with different bits: {list(ids.values())}"
        for ids in results.values()
        if len(ids) > 1
    ]
    return found + [
        f"I6: jobs {ids['no final checkpoint']} have no final checkpoint"
        for ids in results.values()
        if "no final checkpoint" in ids
    ]


# --- I3, processes --------------------------------------------------------------------------


def runners(volume: Volume) -> dict[str, set[int]]:
    """Return each worker's name → process ids of its runners, for workers that use this volume."""
    found: dict[str, set[int]] = defaultdict(set)
    for process in psutil.process_iter():
        try:
            if "worker.runner.main" not in process.cmdline() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            about = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        # Not by its path alone: a worker of the random mode sees the volume through a mount beside it.
        if Path(about.get("GANQ_VOLUME", "/")).parent == volume.root.parent:
            found[about.get("GANQ_WORKER_NAME", "?")].add(process.pid)
    return found


def two_runners(before: dict[str, set[int]], now: dict[str, set[int]]) -> list[str]:
    """
    I3: a worker, and so its GPU, has one runner.

    Args:
        before, now: two looks, a second apart: one that is being killed is gone in the second.
    """
    return [
        f"I3: worker {name} has {len(both)} runners at once: {sorted(both)}"
        for name in now
        if len(both := before.get(name, set()) & now[name]) > 1
    ]


# --- I9 -------------------------------------------------------------------------------------


def leftovers(database: Database, volume: Volume) -> list[str]:
    """I9, when nothing runs: gc leaves nothing temporary or unreferenced, and a second gc deletes nothing."""
    from storage.gc.policy import Policy
    from storage.gc.sweep import Collector

    garbage = Collector(database, volume, Policy(grace_s=0.0, temp_s=0.0))
    swept = garbage.sweep(garbage.plan())
    found = [f"I9: gc could not delete {item.path}: {why}" for item, why in swept.failed]
    found += [f"I9: gc would delete {item.path} at its second run" for item in garbage.plan().items]
    jobs = volume.jobs
    found += [f"I9: gc has left {path}" for path in sorted(jobs.rglob(f"*{TEMP_MARK}*"))]
    rows = {one.path for each in look(database).checkpoints.values() for one in each}
    for path in sorted(jobs.glob("*/a*/checkpoints/*")):
        if volume.relative(path) not in rows:
            found.append(f"I9: gc has left {path}, which no row points to")
    return found


# --- I10 ------------------------------------------------------------------------------------


def no_secret_in_files(folder: Path, secrets: Sequence[str]) -> list[str]:
    """I10: no log, spec or metric contains a secret."""
    found = []
    for here, _, names in os.walk(folder):  # ignores files that vanish meanwhile, unlike rglob()
        for path in (Path(here, name) for name in sorted(names)):
            with suppress(FileNotFoundError):
                if path.suffix in (".txt", ".json", ".jsonl", ".log"):
                    result = path.read_text(errors="replace")
                    if any(secret in result for secret in secrets):
                        found.append(f"I10: a secret stands in {path}")
    return found
