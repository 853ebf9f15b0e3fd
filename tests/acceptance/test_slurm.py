"""deploy/slurm/ganq-worker.sbatch on a real Slurm of the test's own: slurmctld and slurmd on the loopback."""

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from machine import Ganq, until
from services import Server, free_port

SCRIPT = Path(__file__).parents[2] / "deploy" / "slurm" / "ganq-worker.sbatch"
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
missing = [program for program in NEEDED if shutil.which(program) is None]

pytestmark = [
    pytest.mark.tier2,
    pytest.mark.parametrize("backend", ["sqlite"], indirect=True),
    pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
]


class Slurm:
    """One controller and one node with two cores."""

    def __init__(self) -> None:
        self.munge, self.controller, self.node = Server(), Server(), Server()
        self.folder = self.munge.folder
        self.folder.chmod(0o755)  # munge refuses a folder that others cannot enter
        for name in ("state", "spool", "bin"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._configure()
        program = self.folder / "bin" / "ganq"
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m cli.main "$@"\n')
        program.chmod(0o755)
        self.env = {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{program.parent}:{os.environ['PATH']}",
        }
        self.socket = self.folder / "munge.sock"
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _configure(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmUser": "root",
            # A job that was requeued waits for as long as its old credential is valid.
            "AuthInfo": f"socket={folder / 'munge.sock'},cred_expire=5",
            "SlurmctldPort": free_port(),
            "SlurmdPort": free_port(),
            "StateSaveLocation": folder / "state",
            "SlurmdSpoolDir": folder / "spool",
            "SlurmctldPidFile": folder / "controller.pid",
            "SlurmdPidFile": folder / "node.pid",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "ReturnToService": 2,
            "KillWait": 30,
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        lines.append(
            f"NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN"
        )
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP")
        (folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _start(self) -> None:
        names = ("key-file", "munge.key"), ("pid-file", "munge.pid"), ("log-file", "munge.log")
        files = [f"--{option}={self.folder / name}" for option, name in (*names, ("seed-file", "munge.seed"))]
        command = ["munged", "--foreground", "--force", f"--socket={self.socket}", *files]
        self.munge.start(command, self.socket.exists)
        env = {**os.environ, **self.env}
        self.controller.start(["slurmctld", "-D", "-c"], lambda: "n1" in self("sinfo", "-h", "-N"), env=env)
        self.node.start(["slurmd", "-D", "-N", "n1"], lambda: "idle" in self("sinfo", "-h"), env=env)

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            command, env={**os.environ, **self.env}, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        return self("squeue", "-h", "-o", "%T", "-j", job)

    def restarts(self, job: str) -> int:
        found = re.search(r"Restarts=(\d+)", self("scontrol", "show", "job", job))
        return int(found[1]) if found else 0

    def stop(self) -> None:
        if self.controller.process is not None:
            until(
                lambda: self("scancel", "--user=root") or not self("squeue", "-h"),
                what="an empty queue of Slurm",
            )
        for server in (self.node, self.controller, self.munge):
            server.stop()


@pytest.fixture
def slurm() -> Iterator[Slurm]:
    cluster = Slurm()
    yield cluster
    cluster.stop()


def submit(slurm: Slurm, ganq: Ganq, *options: str) -> str:
    """Submit the script as its users do; returns Slurm's id of the job."""
    done = subprocess.run(
        ["sbatch", "--parsable", *options, str(SCRIPT), "--gpus", "none", "--exit-when-idle", "5"],
        env={**ganq.env, **slurm.env},
        cwd=ganq.folder,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def log(ganq: Ganq, job: str) -> str:
    return (ganq.folder / f"ganq-worker-{job}.log").read_text()


def test_a_job_survives_the_time_limit_and_finishes_in_the_next_allocation(
    slurm: Slurm, ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    train = ganq.json("submit", "train", *small, "--epochs", "800")["id"]
    # Slurm checks limits each half minute: SIGTERM comes 30 to 60 s after the start.
    job = submit(slurm, ganq, "--time=2", "--signal=B:TERM@60")
    until(lambda: ganq.peek(train)["state"] == "running", what="the job to run in the allocation")
    assert ganq.peek(train)["worker"].endswith(f"-slurm-{job}")
    until(lambda: slurm.restarts(job) >= 1, what="Slurm to requeue the job")
    # With the old limit each allocation would have half a minute for the job.
    slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    assert ganq.peek(train)["state"] == "queued"
    saved = ganq.steps(train)[-1]
    assert "requeued" in ganq("events", str(train))

    until(lambda: ganq.peek(train)["state"] == "succeeded", within_s=450, what="the job to finish")
    assert ganq.peek(train)["attempt"] >= 2
    assert ganq.job(train)["result"]["resumed_from"] >= saved > 0
    # The worker is idle then and exits with 0: Slurm counts the allocation as completed.
    until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), what="the end")


def test_scancel_saves_the_job_and_leaves_it_to_other_workers(
    slurm: Slurm, ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    train = ganq.json("submit", "train", *small, "--epochs", "4000")["id"]
    job = submit(slurm, ganq)
    until(lambda: len(ganq.steps(train)) > 0, what="a checkpoint")
    slurm("scancel", job)
    until(lambda: ganq.peek(train)["state"] == "queued", within_s=30, what="the job in the queue")
    until(lambda: not slurm("squeue", "-h"), what="an empty queue of Slurm")
    assert slurm.restarts(job) == 0
    assert "requeued" in ganq("events", str(train))


def test_a_worker_without_work_gives_the_allocation_back(slurm: Slurm, ganq: Ganq, redis_url: str) -> None:
    job = submit(slurm, ganq)
    until(lambda: slurm.state(job) == "RUNNING", what="the allocation")
    until(lambda: "JobState=COMPLETED" in slurm("scontrol", "show", "job", job), what="the end")
    assert "this worker exits" in log(ganq, job)
