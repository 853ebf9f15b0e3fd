"""Every command prints on every terminal: ASCII stands for what the terminal's encoding lacks."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobs.errors import DatasetError

from .submit.test_evaluate import REPORT

if TYPE_CHECKING:
    from unit.conftest import Ganq

NOT_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENCODINGS: dict[str, dict[str, str]] = {
    "ascii": NOT_UTF8,
    "latin-1": {**NOT_UTF8, "PYTHONIOENCODING": "latin-1"},
    "euc-jp": {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "euc-jp"},
}

# Each command in one process, which is what costs time; the last line of its output are the exit codes.
RUN = """
import json, os, signal, sys
import click
from cli.main import main, root

def pages(command, words):
    yield [*words, "--help"]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from pages(command.get_command(context, name), [*words, name])

codes = []
for argv in [*(pages(root, []) if sys.argv[1] == "help" else []), *json.loads(sys.argv[2])]:
    argv = [os.fsdecode(part.encode()) for part in argv]
    print("$", ascii(argv), flush=True)
    if "--watch" in argv:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 1.0)
    codes.append((argv, main(argv)))
    signal.setitimer(signal.ITIMER_REAL, 0)
    sys.stdout.flush(); sys.stderr.flush()
print("codes", json.dumps(codes))
"""


def run(commands: list[list[str]], env: dict[str, str], *, helps: bool = False) -> bytes:
    """The output of these commands into a pipe."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, "help" if helps else "", json.dumps(commands)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    return done.stdout


def run_on_terminal(commands: list[list[str]], env: dict[str, str]) -> bytes:
    """The same on a terminal, where tables are rich and bars are drawn."""
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-P", "-c", RUN, "", json.dumps(commands)],
        env={**os.environ, "TERM": "xterm", "COLUMNS": "90", "LINES": "30", **env},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    ):
        os.close(slave)
        said = b""
        try:
            while part := os.read(master, 65536):
                said += part
        except OSError:  # Linux's end of file
            pass
    os.close(master)
    return said


def exit_codes(text: str) -> Any:
    assert "codes [" in text, text[-2000:]
    return json.loads(text.rpartition("codes ")[2].splitlines()[0])


@pytest.fixture
def jobs(store: Any, job_factory: Any, running_job_factory: Any, queries: Any) -> dict[str, int]:
    """Jobs of a user with an accent, in the states whose pages differ."""
    user = "jürgen 山田"
    failed = running_job_factory(user=user, name="failed")
    store.fail(failed, DatasetError("größe → 山田 … × ·", hint="→ anders"))
    source = running_job_factory(user=user, name="source")
    store.succeed(source, {})
    for value in (0.0123, 0.5):
        spec = {"source": source.job_id, "path": None, "checkpoint": "best", "data": "/größe", "size": 24}
        lease = running_job_factory(kind="evaluate", spec=spec, user=user)
        kid = {"value": value, "spread": 0.001, "baseline": 0.0002, "note": None}
        store.succeed(lease, {**REPORT, "metrics": {"kid/random": kid}})
    running = running_job_factory(user=user, name="running")
    store.heartbeat(running, {"done": 3, "total": 8, "unit": "epochs", "rate": 1.5})
    return {
        "failed": failed.job_id,
        "source": source.job_id,
        "evaluated": lease.job_id,
        "running": running.job_id,
        "queued": job_factory(user=user, after=[running.job_id]).id,
    }


def commands(jobs: dict[str, int], tmp_path: Path, image_folder: Path) -> list[list[str]]:
    failed, queued, source = str(jobs["failed"]), str(jobs["queued"]), str(jobs["source"])
    return [
        ["status"],
        ["status", "--all", "--json"],
        ["status", "--user", "jürgen 山田"],
        *(["status", str(job)] for job in jobs.values()),
        ["wait", failed],
        ["wait", str(jobs["running"]), "--timeout", "0.1"],
        ["events", failed],
        ["events", str(jobs["running"])],
        ["logs", failed],
        ["open", source],
        ["checkpoints", source],
        ["compare"],
        ["workers"],
        ["health"],
        ["limit", "--user", "jürgen 山田", "2"],
        ["limit"],
        ["hold", queued],
        ["release", queued],
        ["retry", failed],
        ["cancel", failed],
        ["dataset", "list"],
        ["dataset", "check", str(image_folder)],
        ["dataset", "check", str(tmp_path / "größe")],
        ["submit", "train", "--data", str(image_folder), "--size", "16", "--dry-run"],
        ["submit", "generate", "--count", "4", "--from", source, "--dry-run"],
        ["submit", "evaluate", source, "--data", str(image_folder), "--dry-run"],
        ["export", source, "--out", str(tmp_path / "größe.pth")],
        ["import", str(tmp_path / "größe.pth")],
        ["gc"],
        ["gc", "--json"],
        ["db", "status"],
        ["completion", "bash"],
        ["doctor"],
        ["--version"],
        ["statsu"],
        ["submit", "train", "--sizé", "16"],
    ]


@pytest.mark.tier2
def test_every_command_and_every_help_page_prints_in_every_encoding(
    ganq: "Ganq", jobs: dict[str, int], tmp_path: Path, small: list[str], settings_env: dict[str, str]
) -> None:
    typed = commands(jobs, tmp_path, Path(small[1]))
    reference = run(typed, {"LC_ALL": "C.UTF-8"}, helps=True).decode()
    assert "defect in ganq" not in reference
    for encoding, env in ENCODINGS.items():
        text = run(typed, env, helps=True).decode(encoding)
        assert "defect in ganq" not in text, encoding
        assert "Traceback" not in text, encoding
        assert "job table" in text
        for (argv, code), (_, expected) in zip(exit_codes(text), exit_codes(reference), strict=True):
            # A path with an accent is one only where the locale has it; nothing else may differ.
            accented = any(not part.isascii() for part in argv)
            assert code == expected or (accented and env is not ENCODINGS["euc-jp"]), (encoding, argv)
    ascii_text = run([["status", str(jobs["failed"])], ["statsu"]], NOT_UTF8).decode("ascii")
    assert "by jurgen ??" in ascii_text
    assert "grosse -> ?? ... x -" in ascii_text
    assert "  -> ganq --help" in ascii_text


def test_tables_bars_and_watching_work_on_terminals_of_every_encoding(
    ganq: "Ganq", jobs: dict[str, int], tmp_path: Path, small: list[str], settings_env: dict[str, str]
) -> None:
    typed = [
        ["status"],
        ["status", "--watch"],
        ["status", str(jobs["running"]), "--watch"],
        ["status", str(jobs["failed"])],
        ["wait", str(jobs["running"]), "--timeout", "0.5"],
        ["wait", str(jobs["failed"])],
        ["compare"],
        ["workers"],
        ["limit", "--user", "jürgen 山田", "2"],
        ["limit"],
        ["doctor"],
        ["dataset", "check", small[1]],
        ["checkpoints", str(jobs["source"])],
    ]
    reference = run_on_terminal(typed, {"LC_ALL": "C.UTF-8"}).decode()
    assert "█" in reference
    for encoding, env in ENCODINGS.items():
        text = run_on_terminal(typed, env).decode(encoding)
        assert "defect in ganq" not in text, encoding
        assert "Traceback" not in text, encoding
        codes = [code for _, code in exit_codes(text)]
        assert codes == [code for _, code in exit_codes(reference)], encoding
        if encoding != "euc-jp":
            assert "####" in text, "the bar"
            table = re.sub(r"\x1b\[[0-9;]*m", "", text.split("$ ")[1])
            assert max(map(len, table.splitlines())) <= 90, "no line is wider than the terminal"


def test_streams_of_any_encoding_take_what_no_encoding_has(tmp_path: Path) -> None:
    script = (
        "import sys; from jobs.text import *; use_streams_of_any_encoding(); use_streams_of_any_encoding()\n"
        "print('a\\udcff→é山'); print('\\u2026', file=sys.stderr)"
    )
    for encoding, said in {
        "utf-8": "a?→é山\n",
        "ascii": "a?->e?\n",
        "latin-1": "a?->é?\n",
        "cp1252": "a?->é?\n",
        "euc-jp": "a?→é山\n",
    }.items():
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            capture_output=True,
            check=True,
        )
        assert done.stdout.decode(encoding) == said
        assert done.stderr.decode(encoding) in ("…\n", "...\n")


def test_a_worker_logs_arrows_as_text(settings_env: dict[str, str]) -> None:
    script = (
        "import logging; from storage.settings import Settings; from worker.host import logs\n"
        "logs.configure(Settings.load()); logging.getLogger('ganq').warning('gr\\xf6\\xdfe \\u2192 doctor')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, **NOT_UTF8}, capture_output=True, check=True
    )
    assert done.stderr.decode("ascii").rstrip().endswith("grosse -> doctor")


def test_settings_in_a_file_are_utf_8_in_every_locale(tmp_path: Path) -> None:
    config = tmp_path / "ganq.toml"
    config.write_text('user = "jürgen"\n', encoding="utf-8")
    config.chmod(0o600)
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "from storage.settings import Settings; print(ascii(Settings.load().user))",
        ],
        env={"PATH": os.environ["PATH"], "GANQ_HOME": str(tmp_path), **NOT_UTF8},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "'j\\xfcrgen'\n", done.stderr


def test_streams_that_cannot_be_reconfigured_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from jobs.text import use_streams_of_any_encoding

    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", output)
    use_streams_of_any_encoding()
    print("→")
    assert output.getvalue() == "→\n"
