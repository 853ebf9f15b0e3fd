"""
Make what ganq 0.2 leaves behind, for test_0_2.py.

Run with the interpreter of a checkout of ganq 0.2 (commit 7c878f0), from its root:

    python -P make_0_2.py HOME [postgresql://…]
    tar -C HOME --sort=name -cJf ganq-0.2-sqlite.tar.xz .

For Postgres, HOME/dump.sql is what `pg_dump --no-owner --no-privileges --inserts` prints of the database.
The jobs: three that have ended, one that was trained to its end (whole), the same one killed half way
(interrupted), and four that wait. Its ganq.toml and commands use the names of 0.2.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

GANQ = (sys.executable, "-P", "-m", "cli.main")
SMALL = (
    *("--size", "16", "--ngf", "4", "--ndf", "4", "--nz", "8", "--batch", "8"),
    *("--device", "cpu", "--metric", "none", "--save-every", "1"),
)
LONG = ["--recipe", "r3", "--epochs", "40", "--checkpoint-seconds", "1", "--keep-last", "2"]
SETTINGS = {"wishes": 0.5, "ring_again": 60, "heartbeat": 0.5, "lease": 3, "poll": 1}


def draw(folder: Path) -> None:
    """Draw 24 images of a square on a plain ground."""
    folder.mkdir()
    rng = np.random.default_rng(7)
    for i in range(24):
        pixels = np.zeros((24, 24, 3), np.uint8)
        pixels[:] = rng.integers(0, 255, 3)
        x, y = rng.integers(2, 12, 2)
        pixels[y : y + 9, x : x + 9] = rng.integers(0, 255, 3)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")


def main(home: Path, url: str | None) -> None:
    home.mkdir(parents=True)
    draw(home / "pictures")
    (home / "ganq.toml").write_text("".join(f"{name}_seconds = {s}\n" for name, s in SETTINGS.items()))
    env = {**os.environ, "GANQ_HOME": str(home), "GANQ_USER": "ada"}
    if url:
        env["GANQ_DATABASE_URL"] = url

    def ganq(*arguments: str) -> str:
        done = subprocess.run([*GANQ, *arguments], env=env, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout

    def train(*arguments: str) -> None:
        ganq("submit", "train", "--data", str(home / "pictures"), *SMALL, *arguments)

    if url:
        ganq("db", "upgrade")
    up = subprocess.Popen([*GANQ, "up", "--gpus", "none"], env=env, start_new_session=True)
    time.sleep(6)
    train("--recipe", "pairs", "--epochs", "3", "--name", "done")
    train("--recipe", "origin", "--epochs", "3", "--name", "tutorial")
    ganq("submit", "generate", "--from", "done", "--count", "8", "--seed", "5", "--name", "images")
    train(*LONG, "--name", "whole", "--wait")
    train(*LONG, "--name", "interrupted")
    while (json.loads(ganq("status", "5", "--json")).get("progress") or {}).get("epoch", 0) < 5:
        time.sleep(0.5)
    for process in [*psutil.Process(up.pid).children(recursive=True), psutil.Process(up.pid)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    up.wait()
    train("--recipe", "plus", "--epochs", "2", "--name", "waiting")
    ganq("submit", "generate", "--from", "waiting", "--count", "8")
    train("--name", "swept", "--epochs", "2", "--sweep", "recipe=pairs,plus")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
