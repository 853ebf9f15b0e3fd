"""The outside checker reports what is broken: a real result, changed in every way that it must notice."""

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from cluster.run import CHECKER, family
from machine import Ganq

from storage.datasets.synthetic import make_faces

pytestmark = pytest.mark.tier2


class Results:
    """What one worker has made of a family: twice, once as the undisturbed run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.volume = folder / "home" / "volume"

    def sql(self, statement: str) -> None:
        with closing(sqlite3.connect(self.folder / "home" / "ganq.db")) as conn, conn:
            assert conn.execute(statement).rowcount, f"changed nothing: {statement}"

    def file(self, pattern: str) -> Path:
        """Return the first file of this pattern in the folder of the jobs."""
        return min((self.volume / "jobs").glob(pattern))

    def check(self) -> list[str]:
        like = self.folder / "like"
        tables = ["--table", f"sqlite:///{self.volume.parent / 'ganq.db'}"]
        tables += ["--like-table", f"sqlite:///{like / 'ganq.db'}"]
        volumes = ["--volume", str(self.volume), "--like-volume", str(like / "volume")]
        done = subprocess.run(
            [
                *(sys.executable, "-I", str(CHECKER), *tables, *volumes),
                "--accepted",
                str(self.folder / "ids"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        *found, facts = done.stdout.splitlines() or [done.stderr]
        assert done.returncode == (1 if found else 0), done.stderr
        assert json.loads(facts)["violations"] == len(found)
        return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("r")
    data = make_faces(folder / "faces", count=40, size=24)
    for home, number in (("like", 0), ("home", 1)):
        (folder / home).mkdir()
        env = {"GANQ_HOME": str(folder / home), "GANQ_REDIS_URL": "redis://127.0.0.1:1/0", "GANQ_USER": "t"}
        ganq = Ganq({**env, "GANQ_POLL_SECONDS": "0.3"}, folder)
        file = folder / f"{home}.json"
        file.write_text(json.dumps({"job": family(0, number, data)}))
        accepted = ganq.json("submit", "-f", str(file))
        (folder / "ids").write_text(json.dumps({job["id"]: job["name"] for job in accepted}))
        ganq.start_worker(options=("--gpus", "none", "--exit-when-idle", "1")).wait(300)
        ganq.stop()
    return folder


@pytest.fixture
def results(made: Path, tmp_path: Path) -> Results:
    shutil.copytree(made, tmp_path / "r", symlinks=True)
    return Results(tmp_path / "r")


def flip(path: Path, at: int = -1) -> None:
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def forge(results: Results) -> None:
    """Replace an image and write its new hash wherever one stands: only the undisturbed run can tell."""
    from hashlib import sha256

    folder = results.file("000002/a1")
    (folder / "images" / "000000.png").write_bytes((folder / "images" / "000001.png").read_bytes())
    manifest = folder / "manifest.jsonl"
    first, second, *others = map(json.loads, manifest.read_text().splitlines())
    first |= {key: second[key] for key in ("sha256", "bytes")}
    manifest.write_text("".join(f"{json.dumps(one)}\n" for one in (first, second, *others)))
    digest = sha256(manifest.read_bytes()).hexdigest()
    results.sql(f"UPDATE job SET result = json_set(result, '$.manifest_sha256', '{digest}') WHERE id = 2")


def retrain(results: Results) -> None:
    """Change a tensor and the hashes of its files: only the undisturbed run can tell."""
    from hashlib import sha256

    folder = results.file("000001/a1/checkpoints/final")
    flip(folder / "state.safetensors")
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    for one in manifest["files"]:
        one["sha256"] = sha256((folder / one["name"]).read_bytes()).hexdigest()
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    digest = sha256((folder / "MANIFEST.json").read_bytes()).hexdigest()
    results.sql(f"UPDATE checkpoint SET manifest_sha256 = '{digest}' WHERE kind = 'final'")


ATTEMPT = "INSERT INTO attempt (job_id, number, lease_token, worker, started_at, ended_at, outcome)"
WAYS: dict[str, tuple[Callable[[Results], object], str]] = {
    "an attempt that never ended": (
        lambda r: r.sql("UPDATE attempt SET ended_at = NULL, outcome = NULL WHERE job_id = 2"),
        "its attempts [1] have not",
    ),
    "a job that is not in the table": (
        lambda r: (r.folder / "ids").write_text(
            json.dumps({**json.loads((r.folder / "ids").read_text()), "99": "images0-2"})
        ),
        "was accepted and is not in the table",
    ),
    "a job that is there twice": (
        lambda r: r.sql("UPDATE job SET name = 'images0-1' WHERE name = 'best0-1'"),
        "is there 2 times",
    ),
    "two attempts that succeeded": (
        lambda r: r.sql(f"{ATTEMPT} VALUES (2, 2, 'x', 'w2', 9e9, 9e9, 'succeeded')"),
        "[1, 2] have succeeded",
    ),
    "attempts that overlap": (
        lambda r: r.sql(f"{ATTEMPT} VALUES (2, 0, 'x', 'w2', 1, 9e9, 'lost')"),
        "ended after the next one had begun",
    ),
    "a job that ended twice": (
        lambda r: r.sql("INSERT INTO event (job_id, at, type) VALUES (2, 1, 'succeeded')"),
        "has ended 2 times",
    ),
    "a checkpoint from after the end": (
        lambda r: r.sql("UPDATE checkpoint SET created_at = 9e9"),
        "was registered after attempt 1 had ended",
    ),
    "a byte of an image": (lambda r: flip(r.file("000002/a1/images/*")), "is not what its manifest says"),
    "a byte of an archive": (lambda r: flip(r.file("*/a1/shard-*.tar"), 600), "is not what"),
    "a byte of a checkpoint": (lambda r: flip(r.file("*/a1/checkpoints/*/state.safetensors")), "is not what"),
    "a byte of a manifest": (lambda r: flip(r.file("000002/a1/manifest.jsonl"), 12), "is not the one"),
    "an image that is gone": (lambda r: r.file("000002/a1/images/*").unlink(), "No such file"),
    "an image too many": (
        lambda r: (r.file("000002/a1/images") / "999999.png").write_bytes(b""),
        "its manifest does not name",
    ),
    "a result that lies in two folders": (
        lambda r: shutil.copytree(r.file("000002/a1"), r.file("000002") / "a2"),
        "has its result in a1 and in ['a2']",
    ),
    "another image with its right hash": (forge, "differs from the undisturbed run in 1 of 40: image 0"),
    "another tensor with its right hash": (retrain, "train0-1 (job 1) differs from the undisturbed run in 1"),
}


def test_it_is_silent_about_a_sound_run(results: Results) -> None:
    assert results.check() == []


@pytest.mark.parametrize("way", WAYS)
def test_it_reports(way: str, results: Results) -> None:
    change, sentence = WAYS[way]
    change(results)
    found = results.check()
    assert any(sentence in one for one in found), found
