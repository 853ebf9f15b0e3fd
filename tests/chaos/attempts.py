"""
Attempts of one training job, cheap enough for a property: real files, real processes, real SIGKILL.

A fork server holds torch; each attempt is a child of it that runs the true worker.runner.main.Runner
with the true RunContext on a volume. Desk plays the supervisor: it hands out the order, registers
checkpoints, lets old ones go, and may die at its own bad moments.
"""

import hashlib
import json
import multiprocessing
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from jobs.specs import TrainSpec
from storage.volume.layout import Volume
from worker.ipc import Channel
from worker.supervisor.retention import prunable

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "jobs.training.train",
        "worker.runner.main",
        "safetensors.torch",
        "storage.results.writer",
    ]
)
PARTS = ("g.", "d.", "ema.", "opt_g.", "opt_d.")


def _attempt(sock: socket.socket, volume: str, failpoints: str, threads: int) -> None:
    """Run one runner process until the desk closes the channel or a failpoint kills it."""
    import torch

    import jobs.failpoints
    from worker.runner.main import Runner

    torch.set_num_threads(threads)
    jobs.failpoints._entries = jobs.failpoints.parse(failpoints)
    Runner(Channel(sock), Volume(Path(volume))).serve()


@dataclass
class Desk:
    """One job, and what the job table would contain of it."""

    volume: Volume
    job_id: int
    spec: TrainSpec
    fingerprint: str
    attempts: int = 0
    checkpoints: list[SimpleNamespace] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)

    def attempt(
        self, failpoints: str = "", *, dies: str = "", at: int = 1, threads: int = 1
    ) -> dict[str, Any]:
        """
        Run the job until it ends or something dies.

        Args:
            failpoints: of the runner, as in GANQ_FAILPOINTS.
            dies: 'before_register' or 'registered': where the supervisor dies, its runner with it.
            at: at which checkpoint it dies.
            threads: of PyTorch; another number is another build.

        Returns:
            The runner's last message; {'op': 'killed'} if it said none.
        """
        self.attempts += 1
        ours, theirs = socket.socketpair()
        given = (theirs, str(self.volume.root), failpoints, threads)
        child = FORKS.Process(target=_attempt, args=given, daemon=True)
        child.start()
        theirs.close()
        channel = Channel(ours)
        channel.send("run", order=self._order())
        try:
            while (messages := channel.receive()) is not None:
                for message in messages:
                    if message["op"] in ("done", "stopped", "failed", "crashed"):
                        self.result = message.get("result", self.result)
                        return message
                    if message["op"] == "event":
                        self.events.append(message)
                    if message["op"] == "checkpoint":
                        at -= 1
                        if dies == "before_register" and at == 0:
                            return {"op": "killed"}
                        self._register(message, channel, dies == "registered" and at == 0)
                        if dies == "registered" and at == 0:
                            return {"op": "killed"}
            return {"op": "killed"}
        finally:
            child.kill()
            child.join()
            child.close()
            channel.close()

    def _order(self) -> dict[str, Any]:
        keys = ("path", "manifest_sha256", "epoch", "step", "kind", "bytes")
        return {
            "job_id": self.job_id,
            "attempt": self.attempts,
            "kind": "train",
            "label": "train",
            "spec": self.spec.to_json(),
            "submitted_at": 0.0,
            "inputs": {"fingerprint": self.fingerprint},
            "checkpoints": [
                {"job_id": self.job_id, **{key: getattr(one, key) for key in keys}}
                for one in reversed(self.checkpoints)
            ],
        }

    def _register(self, message: dict[str, Any], channel: Channel, dies: bool) -> None:
        facts = {key: message[key] for key in ("path", "manifest_sha256", "epoch", "step", "kind", "bytes")}
        number = self.checkpoints[-1].id + 1 if self.checkpoints else 1
        self.checkpoints.append(SimpleNamespace(id=number, metric=None, **facts))
        if dies:
            return
        channel.send("ack", ok=True)
        going = prunable(
            self.checkpoints,  # type: ignore[arg-type]
            keep_last=self.spec.keep_last,
            keep_every=self.spec.keep_every,
        )
        self.checkpoints = [one for one in self.checkpoints if one not in going]
        for one in going:
            shutil.rmtree(self.volume.absolute(one.path))
        channel.send("forgotten", paths=[one.path for one in going])

    # --- what came of it ----------------------------------------------------------------------

    def folder(self, one: SimpleNamespace) -> Path:
        return self.volume.absolute(one.path)

    def kept(self) -> dict[tuple[str, int], dict[str, str]]:
        """Return the hashes of each checkpoint that is not a resume checkpoint, by kind and step."""
        return {
            (one.kind, one.step): hashes(self.folder(one)) for one in self.checkpoints if one.kind != "resume"
        }

    def final(self) -> dict[str, str]:
        """Return the hashes of the final checkpoint."""
        assert self.checkpoints[-1].kind == "final"
        return hashes(self.folder(self.checkpoints[-1]))

    def samples(self) -> dict[str, set[str]]:
        """Return the name of each sample grid → its hashes in all attempts that wrote it."""
        found: dict[str, set[str]] = {}
        for path in sorted(self.volume.job(self.job_id).glob("a*/samples/*.png")):
            found.setdefault(path.name, set()).add(hashlib.sha256(path.read_bytes()).hexdigest())
        return found

    def log(self) -> str:
        return "".join(
            (self.volume.attempt(self.job_id, number) / "log.txt").read_text()
            for number in range(1, self.attempts + 1)
            if (self.volume.attempt(self.job_id, number) / "log.txt").exists()
        )


def hashes(folder: Path) -> dict[str, str]:
    """Return one sha-256 for each of G, D, EMA and the two optimisers, and one for the generator's file."""
    from safetensors.numpy import load_file

    state = load_file(folder / "state.safetensors")
    reported = {}
    for part in PARTS:
        digest = hashlib.sha256()
        for name in sorted(key for key in state if key.startswith(part)):
            digest.update(f"{name} {state[name].dtype} {state[name].shape}".encode())
            digest.update(np.ascontiguousarray(state[name]).tobytes())
        reported[part] = digest.hexdigest()
    reported["generator"] = hashlib.sha256((folder / "generator.safetensors").read_bytes()).hexdigest()
    return reported


def meta(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json."""
    found: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return found
