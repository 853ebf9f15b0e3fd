"""
The outside checker: was anything lost, published twice, or made otherwise than undisturbed?

    python checker.py --table URL --volume DIR --accepted FILE --like-table URL --like-volume DIR

It imports nothing of ganq nor of its tests: it reads the tables with plain SQL, and the files as the
documents describe them. FILE holds {job id: name} of all jobs that were accepted. Names end in -NUMBER; the
undisturbed run has one job for each name without that number. Exit code 1 on any violation.
"""

import argparse
import hashlib
import json
import sqlite3
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

ENDS = ("succeeded", "failed", "cancelled")
Row = dict[str, Any]


def rows(url: str, sql: str) -> list[Row]:
    """
    Args:
        url: sqlite:///PATH, or what libpq takes.
    """
    if url.startswith("sqlite:///"):
        path = url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as conn:
            conn.row_factory = sqlite3.Row
            return [dict(row) for row in conn.execute(sql)]
    import psycopg
    from psycopg.rows import dict_row

    with psycopg.connect(url, connect_timeout=10, row_factory=dict_row) as conn:
        return list(conn.execute(sql.encode()))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Run:
    """The tables and files of one installation."""

    def __init__(self, url: str, volume: Path) -> None:
        self.volume = volume
        self.jobs: dict[int, Row] = {}
        for row in rows(url, "SELECT * FROM job ORDER BY id"):
            for column in ("spec", "result"):
                if isinstance(row[column], str):
                    row[column] = json.loads(row[column])
            self.jobs[row["id"]] = row
        self.attempts: dict[int, list[Row]] = defaultdict(list)
        for row in rows(url, "SELECT * FROM attempt ORDER BY job_id, number"):
            self.attempts[row["job_id"]].append(row)
        self.checkpoints: dict[int, list[Row]] = defaultdict(list)
        for row in rows(url, "SELECT * FROM checkpoint ORDER BY id"):
            self.checkpoints[row["job_id"]].append(row)
        self.endings: Counter[int] = Counter()
        for row in rows(url, "SELECT job_id, type FROM event"):
            self.endings[row["job_id"]] += row["type"] in ENDS

    def attempt_folder(self, row: Row) -> Path:
        return self.volume / "jobs" / f"{row['id']:06d}" / f"a{row['attempt']}"


# --- what files say -----------------------------------------------------------------------------


def images(folder: Path, digest: str) -> Iterator[tuple[int, str, bytes, str]]:
    """
    Yield position, promised hash, bytes and file of each image of a result.

    Raises:
        ValueError, OSError, KeyError: the manifest is another one than the row says, or lacks something.
    """
    data = (folder / "manifest.jsonl").read_bytes()
    if sha256(data) != digest:
        raise ValueError("manifest.jsonl is not the one that the row names")
    position = 0
    for line in map(json.loads, data.splitlines()):
        if "shard" in line:  # refers to the manifest of a shard
            part = (folder / line["manifest"]).read_bytes()
            if sha256(part) != line["sha256"]:
                raise ValueError(f"{line['manifest']} is not the one that manifest.jsonl names")
            within = [one for one in map(json.loads, part.splitlines()) if "index" in one]
        else:
            within = [line] if "index" in line else []
        archives = [line] if "archive" in line else line.get("archives", ())
        for one in archives:
            if sha256((folder / one["archive"]).read_bytes()) != one["sha256"]:
                raise ValueError(f"{one['archive']} is not what its line says")
        for one in within:
            yield position, one["sha256"], bytes_at(folder, one), one["file"]
            position += 1


def bytes_at(folder: Path, line: Row) -> bytes:
    with open(folder / line["file"], "rb") as file:
        file.seek(line.get("offset", 0))
        return file.read(line["bytes"] if "offset" in line else -1)


def tensors(path: Path) -> dict[str, str]:
    """Return name → hash over type, shape and bytes of each tensor of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    body = data[8 + length :]
    return {
        name: sha256(f"{about['dtype']} {about['shape']} ".encode() + body[slice(*about["data_offsets"])])
        for name, about in header.items()
        if name != "__metadata__"
    }


# --- the questions ------------------------------------------------------------------------------


def lost(run: Run, accepted: dict[int, str]) -> Iterator[str]:
    """Every accepted job is there and has succeeded: no fault of a network or a host explains a failure."""
    for job_id, name in accepted.items():
        row = run.jobs.get(job_id)
        if row is None or row["name"] != name:
            yield f"job {job_id} ({name}) was accepted and is not in the table"
        elif row["state"] != "succeeded":
            why = f": {row['error_code']} {row['error_message']}" if row["error_code"] else ""
            yield f"job {job_id} ({name}) is {row['state']}{why}"
    names = Counter(row["name"] for row in run.jobs.values() if row["name"])
    yield from (f"{name} was accepted once and is there {n} times" for name, n in names.items() if n > 1)


def published_twice(run: Run) -> Iterator[str]:
    """One attempt of each job has succeeded, the last one; all others ended before it began."""
    for row in run.jobs.values():
        if row["state"] not in ENDS:
            continue
        attempts = run.attempts[row["id"]]
        won = [one["number"] for one in attempts if one["outcome"] == "succeeded"]
        if won != ([row["attempt"]] if row["state"] == "succeeded" else []):
            yield f"job {row['id']} is {row['state']} in attempt {row['attempt']}; {won} have succeeded"
        if still := [one["number"] for one in attempts if one["ended_at"] is None]:
            yield f"job {row['id']} has ended, and its attempts {still} have not"
        if row["state"] == "succeeded" and [one["number"] for one in attempts] != list(
            range(1, row["attempt"] + 1)
        ):
            yield f"job {row['id']} has the attempts {[one['number'] for one in attempts]}"
        for one, then in pairwise(attempts):
            if one["ended_at"] is not None and one["ended_at"] > then["started_at"]:
                yield f"job {row['id']}: attempt {one['number']} ended after the next one had begun"
        if run.endings[row["id"]] != 1:
            yield f"job {row['id']} has ended {run.endings[row['id']]} times, says its history"


def spoilt(run: Run) -> Iterator[str]:
    """Every file that a row or a manifest names is there, with its hash, and no other lies beside them."""
    for row in run.jobs.values():
        for one in run.checkpoints[row["id"]]:
            try:
                yield from whole_checkpoint(run, one)
            except (OSError, ValueError, KeyError) as exc:
                yield f"checkpoint {one['path']} of job {row['id']}: {exc}"
        if row["kind"] == "generate" and row["state"] == "succeeded" and row["part_of"] is None:
            try:
                yield from whole_result(run, row)
            except (OSError, ValueError, KeyError) as exc:
                yield f"result of job {row['id']}: {exc}"


def whole_checkpoint(run: Run, one: Row) -> Iterator[str]:
    folder = run.volume / one["path"]
    data = (folder / "MANIFEST.json").read_bytes()
    if sha256(data) != one["manifest_sha256"]:
        yield f"checkpoint {one['path']}: its manifest is not the one of its row"
    for file in json.loads(data)["files"]:
        if sha256((folder / file["name"]).read_bytes()) != file["sha256"]:
            yield f"checkpoint {one['path']}: {file['name']} is not what its manifest says"
    (attempt,) = [each for each in run.attempts[one["job_id"]] if each["number"] == one["attempt"]]
    if attempt["ended_at"] is not None and one["created_at"] > attempt["ended_at"]:
        yield f"checkpoint {one['path']} was registered after attempt {one['attempt']} had ended"


def whole_result(run: Run, row: Row) -> Iterator[str]:
    folder = run.attempt_folder(row)
    named = set()
    number = 0
    for position, promised, data, file in images(folder, row["result"]["manifest_sha256"]):
        named.add(file)
        number += 1
        if sha256(data) != promised:
            yield f"image {position} of job {row['id']} is not what its manifest says"
    spec = row["spec"]
    asked = spec["keep"] or spec["count"]
    if number != asked:
        yield f"job {row['id']} was asked for {asked} images and has {number}"
    there = {one.relative_to(folder).as_posix() for one in (folder / "images").rglob("*") if one.is_file()}
    if more := there - named:
        yield f"job {row['id']} has images that its manifest does not name: {sorted(more)[:3]}"
    others = [
        one.parent.name
        for one in folder.parent.glob("a*/manifest.jsonl")
        if one.parent != folder and sha256(one.read_bytes()) == row["result"]["manifest_sha256"]
    ]
    if others:
        yield f"job {row['id']} has its result in {folder.name} and in {others}"


def made(run: Run, row: Row) -> dict[str, str]:
    """Return what a job has made: name → hash of each image or tensor."""
    if row["kind"] == "train":
        final = [one for one in run.checkpoints[row["id"]] if one["kind"] == "final"]
        if len(final) != 1:
            raise ValueError(f"there are {len(final)} final checkpoints")
        return tensors(run.volume / final[0]["path"] / "state.safetensors")
    found = images(run.attempt_folder(row), row["result"]["manifest_sha256"])
    return {f"image {position}": sha256(data) for position, _, data, _ in found}


def unequal(run: Run, like: Run) -> Iterator[str]:
    """Each job has made what the undisturbed job of its name has made."""
    models = {}
    for row in like.jobs.values():
        if row["name"]:
            if row["state"] != "succeeded":
                yield f"the undisturbed {row['name']} is {row['state']}"
                return
            models[row["name"].rpartition("-")[0]] = made(like, row)
    for row in run.jobs.values():
        if not row["name"] or row["state"] != "succeeded":
            continue
        try:
            mine, model = made(run, row), models[row["name"].rpartition("-")[0]]
        except (OSError, ValueError, KeyError) as exc:
            yield f"{row['name']} (job {row['id']}): {exc!r}"
            continue
        different = [name for name in {*mine, *model} if mine.get(name) != model.get(name)]
        if different:
            yield (
                f"{row['name']} (job {row['id']}) differs from the undisturbed run in {len(different)} of "
                f"{len(model)}: {', '.join(sorted(different)[:3])}"
            )


def check(run: Run, like: Run, accepted: dict[int, str]) -> list[str]:
    """Return all violations."""
    return [*lost(run, accepted), *published_twice(run), *spoilt(run), *unequal(run, like)]


def facts(run: Run) -> dict[str, Any]:
    """Return what was checked, in numbers."""
    named = [row for row in run.jobs.values() if row["name"]]
    outcomes = Counter(one["outcome"] for each in run.attempts.values() for one in each)
    results = [row["result"] or {} for row in named if row["kind"] == "generate"]
    return {
        "jobs": len(named),
        "shards": len(run.jobs) - len(named),
        "attempts": dict(outcomes),
        "images": sum(one.get("image_count", 0) for one in results),
        "checkpoints": sum(map(len, run.checkpoints.values())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for option in ("--table", "--like-table"):
        parser.add_argument(option, required=True)
    for option in ("--volume", "--like-volume", "--accepted"):
        parser.add_argument(option, required=True, type=Path)
    given = parser.parse_args()
    run = Run(given.table, given.volume)
    accepted = {int(job_id): name for job_id, name in json.loads(given.accepted.read_text()).items()}
    found = check(run, Run(given.like_table, given.like_volume), accepted)
    for one in found:
        print(one)
    print(json.dumps({**facts(run), "violations": len(found)}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
