"""`ganq keep` and `ganq rm`: what stays, what goes, and what is refused."""

import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import save_file
from volumes import Files

from jobs.networks.dcgan import Architecture
from storage.db.rows import Lease
from storage.db.store import JobStore
from storage.settings import Settings
from storage.volume.layout import Volume

if TYPE_CHECKING:
    from unit.conftest import Ganq


@pytest.fixture
def files(store: JobStore, settings: Settings) -> Files:
    return Files(store, Volume(settings.volume))


@pytest.fixture
def ended(files: Files, running_job_factory: Callable[..., Lease], store: JobStore) -> Lease:
    """A training of the name faces that succeeded long ago, with its checkpoint."""
    lease = running_job_factory(name="faces")
    files.checkpoint(lease, 2, kind="final")
    store.succeed(lease, {"bit_exact": True})
    files.ended_long_ago(lease.job_id)
    return lease


def on_terminal(env: dict[str, str], *arguments: str, answer: str) -> tuple[int, str]:
    """Run a command on a terminal of its own and type one answer."""
    master, slave = pty.openpty()
    command = [sys.executable, "-P", "-m", "cli.main", *arguments]
    with subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, **env}
    ) as process:
        os.close(slave)
        text, answered = b"", False
        while select.select([master], [], [], 60)[0]:
            try:
                read = os.read(master, 4096)
            except OSError:  # Linux says EIO when the other end is closed
                break
            text += read
            if b"[y/N]" in text and not answered:
                os.write(master, f"{answer}\n".encode())
                answered = True
        os.close(master)
    return process.returncode, text.decode()


def test_what_is_kept_is_deleted_neither_by_gc_nor_by_rm(ganq: "Ganq", files: Files, ended: Lease) -> None:
    assert ganq("keep", "faces").out == "job 1 (faces): kept\n"
    assert "ganq keep --undo 1" in ganq("status", "1").out
    assert ganq("status", "1", "--json").json()["kept"] is True
    assert "it is kept" in ganq("gc", "--jobs", "--named").err
    refused = ganq("rm", "1", "--yes")
    assert refused.code != 0
    assert "job 1 is kept" in refused.err
    assert "ganq keep --undo 1" in refused.err
    assert files.all_there()
    assert ganq("keep", "--undo", "1").out == "job 1 (faces): no longer kept\n"
    assert "deleted" in ganq("gc", "--jobs", "--named").out
    assert [one.type for one in files.queries.events(1)][-3:] == ["kept", "not_kept", "results_deleted"]


def test_rm_deletes_the_results_of_the_jobs_that_it_is_given_and_of_no_other(
    ganq: "Ganq", files: Files, ended: Lease, running_job_factory: Callable[..., Lease], store: JobStore
) -> None:
    other = running_job_factory(name="other")
    checkpoint = files.checkpoint(other, 2, kind="final")
    store.succeed(other, {"bit_exact": True})
    files.ended_long_ago(other.job_id)
    refused = ganq("rm", "faces")
    assert "add --yes" in refused.err
    assert files.registered(1)
    said = ganq("rm", "faces", "--yes")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("job 1 (faces): deleted, ")
    folder = files.volume.attempt(1, 1)
    assert not (folder / "checkpoints").exists()
    assert (folder / "log.txt").exists()
    assert checkpoint.is_dir()
    assert ganq("rm", "1", "--yes").out == "job 1 (faces): has no results\n"
    assert ganq("status", "1").code == 0


def test_rm_refuses_what_has_not_ended_and_what_another_job_needs(
    ganq: "Ganq", files: Files, ended: Lease, running_job_factory: Callable[..., Lease]
) -> None:
    running = running_job_factory()
    said = ganq("rm", str(running.job_id), "--yes")
    assert f"job {running.job_id} is running" in said.err
    waiting = ganq("submit", "generate", "--from", "1", "--count", "4", "--json").json()["id"]
    said = ganq("rm", "1", "--yes")
    assert f"job {waiting} needs the results of job 1" in said.err
    assert files.all_there()


def test_rm_waits_until_a_worker_knows_that_its_attempt_has_ended(
    ganq: "Ganq", files: Files, running_job_factory: Callable[..., Lease], store: JobStore
) -> None:
    lease = running_job_factory()
    files.checkpoint(lease, 2, kind="final")
    store.succeed(lease, {"bit_exact": True})
    said = ganq("rm", "1", "--yes")
    assert said.code != 0
    assert "try again in" in said.err
    assert files.all_there()


def test_imported_weights_go_by_rm_alone(
    ganq: "Ganq", settings: Settings, tmp_path: Path, files: Files
) -> None:
    weights = tmp_path / "netg.safetensors"
    save_file(
        Architecture(size=24, nz=6, ngf=4, ndf=8, norm_d="batch").build_generator(1).state_dict(), weights
    )
    job = ganq("import", str(weights), "--name", "old", "--json").json()["id"]
    files.ended_long_ago(job)
    assert "nothing to delete" in ganq("gc", "--jobs", "--named", "--older-than", "0d").out
    assert files.all_there()
    assert "deleted" in ganq("rm", "old", "--yes").out
    assert not files.registered(job)


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_rm_and_gc_ask_on_a_terminal_and_no_leaves_everything(
    settings_env: dict[str, str], files: Files, ended: Lease
) -> None:
    for command in (("rm", "1"), ("gc", "--jobs", "--named")):
        code, text = on_terminal(settings_env, *command, answer="n")
        assert code != 0
        assert "[y/N]" in text
        assert files.all_there()
        assert files.registered(1)
    code, text = on_terminal(settings_env, "rm", "1", answer="y")
    assert (code, "deleted" in text) == (0, True)
    assert not files.registered(1)


def test_rm_deletes_the_link_to_the_samples_of_all_attempts(ganq: "Ganq", files: Files, ended: Lease) -> None:
    from storage.results.attempts import gather_samples

    own = files.volume.attempt(ended.job_id, 1) / "samples"
    own.mkdir(exist_ok=True)
    (own / "epoch-0002.png").write_bytes(b"png")
    gather_samples(files.volume, ended.job_id, 1)
    assert (files.volume.samples(ended.job_id) / "epoch-0002.png").exists()
    assert ganq("gc").code == 0
    assert (files.volume.samples(ended.job_id) / "epoch-0002.png").exists(), "it is no garbage"
    assert ganq("rm", "faces", "--yes").code == 0
    assert not files.volume.samples(ended.job_id).is_symlink()
    assert not own.exists()


def test_rm_refuses_the_job_of_another_user(
    ganq: "Ganq", ended: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GANQ_USER", "grace")
    refused = ganq("rm", "faces", "--yes")
    assert refused.code == 1
    assert "job 1 is a job of tester" in refused.err
    assert "GANQ_USER=tester ganq rm 1" in refused.err
