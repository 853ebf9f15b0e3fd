"""The command line against a real job table in a home of the test's own; Redis is not there."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass(frozen=True)
class Said:
    """What one command answered."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)

    def findings(self) -> dict[str, list[dict[str, Any]]]:
        """What `ganq doctor --json` found, by check."""
        found: dict[str, list[dict[str, Any]]] = {}
        for one in self.json()["findings"]:
            found.setdefault(one["check"], []).append(one)
        return found

    def error(self) -> Any:
        """The error of a command with --json."""
        return json.loads(self.err.strip().splitlines()[-1])["error"]


Ganq = Callable[..., Said]


@pytest.fixture
def backend() -> str:
    """The command line asks the same questions of both; storage's own tests run on Postgres too."""
    return "sqlite"


@pytest.fixture
def ganq(settings_env: dict[str, str], capsys: pytest.CaptureFixture[str]) -> Ganq:
    """Runs one command in this process, as the entry point does: ganq("status", "--json")."""
    from cli.main import main

    def run(*args: object) -> Said:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Said(code, out, err)

    return run


@pytest.fixture
def bare_ganq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ganq:
    """The same on a machine where ganq was never used: no home, no job table."""
    from cli.main import main

    monkeypatch.setenv("GANQ_HOME", str(tmp_path / "new-home"))
    monkeypatch.setenv("GANQ_REDIS_URL", "redis://127.0.0.1:1/0")

    def run(*args: object) -> Said:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return Said(code, out, err)

    return run


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder of 70 files that are images by their name, which is all that submit looks at."""
    folder = tmp_path / "faces"
    folder.mkdir()
    for number in range(70):
        (folder / f"{number:03d}.png").touch()
    return folder


@pytest.fixture
def trained(running_job_factory: Callable[..., Any], store: Any) -> Callable[..., int]:
    """Builds training jobs that have succeeded with a checkpoint: trained(epochs=8, name='faces')."""

    def make(*, epochs: int = 4, name: str | None = None, rate: float = 50.0, end: str = "succeed") -> int:
        from jobs.errors import DatasetError
        from jobs.specs import TrainSpec

        spec = TrainSpec.create(
            data="/pictures", recipe="sngan", epochs=epochs, size=24, ngf=8, ndf=8, batch=8
        )
        lease = running_job_factory(spec=spec.to_json(), name=name)
        store.heartbeat(
            lease,
            {
                "done": 4,
                "total": 4,
                "unit": "images",
                "rate": rate,
                "epoch": epochs,
                "epochs": epochs,
                "phase": None,
            },
        )
        store.register_checkpoint(
            lease,
            kind="final",
            epoch=epochs,
            step=epochs * 10,
            path=f"jobs/{lease.job_id:06d}/a1/checkpoints/epoch-{epochs:04d}",
            manifest_sha256="0" * 64,
            size=1000,
        )
        if end == "succeed":
            store.succeed(
                lease,
                {"checkpoint": f"checkpoints/epoch-{epochs:04d}", "samples": "samples", "bit_exact": True},
            )
        elif end == "fail":
            store.fail(lease, DatasetError("no images", hint="add images"))
        return int(lease.job_id)

    return make


@pytest.fixture
def speak(database: Any, make_identity: Callable[..., Any]) -> Callable[..., None]:
    """Has a worker speak in the job table, now or some seconds ago: speak('w1', 'idle', ago=90)."""
    import socket

    from sqlalchemy import text

    from storage.db.workers import WorkerStore
    from storage.version import version

    def report(name: str, state: str = "idle", *, ago: float = 0.0, **changes: Any) -> None:
        who = make_identity(name, **{"host": socket.gethostname(), "version": version(), **changes})
        WorkerStore(database, who).report(state)
        moved = text("UPDATE worker SET seen_at = seen_at - :ago WHERE name = :name")
        database.write(lambda conn: conn.execute(moved, {"ago": ago, "name": name}))

    return report
