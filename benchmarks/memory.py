"""Memory of a worker's processes, and of the runner in addition to PyTorch."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks import stack
from benchmarks.measure import Ratio, limit
from benchmarks.neighbours import Watch
from jobs.specs import TrainSpec

DESCRIPTION = """\
MB (10⁶ bytes) of PSS from smaps_rollup, which divides shared pages among processes. Supervisor and
Celery: the supervisor, `ganq worker` and its pool process, after a job; the maximum of the samples during
the training. The runner's maximum in a training at ngf 64, batch 256, is compared with the sum of a process
that has only imported torch, the decoded data set and 1 GB."""

MB = 1e6


def pss(pid: int) -> float:
    """Return the bytes of a process, 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _parts(up: int) -> dict[str, list[psutil.Process]]:
    """Return the child processes of `ganq up`, by role."""
    found: dict[str, list[psutil.Process]] = {"supervisor": [], "runner": [], "celery": [], "redis": []}
    for process in psutil.Process(up).children(recursive=True):
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if "worker.supervisor.loop" in line:
            found["supervisor"].append(process)
        elif "worker.runner.main" in line:
            found["runner"].append(process)
        elif line and "redis" in line[0]:
            found["redis"].append(process)
        elif "worker" in line or any("celery" in word or "ForkPool" in word for word in line):
            found["celery"].append(process)
    return found


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """Run the benchmark; return the table's lines, and all samples."""
    data = stack.faces(work)
    spec = TrainSpec.create(data=str(data), recipe="dcgan", epochs=1, save_every=1, device="cpu")
    bare = subprocess.Popen(
        [sys.executable, "-c", "import torch; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert bare.stdout is not None
    bare.stdout.readline()
    samples: dict[str, list[float]] = {}
    with stack.Queue(work / "memory-queue") as queue:
        job = queue.submit(spec)
        while not queue.queries.get(job.id).state.terminal:
            for name, processes in _parts(queue.up.pid).items():
                samples.setdefault(name, []).append(sum(pss(one.pid) for one in processes) / MB)
            samples.setdefault("bare torch", []).append(pss(bare.pid) / MB)
            time.sleep(0.2)
        queue.wait(job)
        cache = sum(one.stat().st_size for one in queue.settings.volume.glob("datasets/*/images.u8")) / MB
    bare.communicate(b"\n")
    most = {name: max(values) for name, values in samples.items()}
    most["data set"] = cache
    own = max(a + b for a, b in zip(samples["supervisor"], samples["celery"], strict=True))
    allowed = most["bare torch"] + cache + 1000
    lines = [
        limit("supervisor + Celery processes", "120 MB", "PSS, MB", own, 120.0),
        limit(
            "runner in training, ngf 64, batch 256",
            "torch + data set + 1 GB",
            "PSS, MB",
            most["runner"],
            allowed,
        ),
    ]
    return lines, {"highest": most, "samples": samples}
