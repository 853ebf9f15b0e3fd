"""Bad input and bad surroundings: one clear line, the way out, an exit code, nothing half-written."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from machine import until

from cli import main as entry
from storage.db.engine import SCHEMA_REVISION

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.queries import Queries
    from storage.db.rows import Job
    from storage.db.store import JobStore
    from storage.settings import Settings


def set_schema(path: Path, revision: str) -> None:
    with sqlite3.connect(path) as conn:
        conn.execute("UPDATE alembic_version SET version_num = ?", (revision,))
        conn.execute("UPDATE schema_info SET compatible_from = ?", (revision,))
    conn.close()


def one_line_and_hint(err: str) -> tuple[str, str]:
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 2, err
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("  → ")
    return lines[0], lines[1]


def test_an_unknown_command_names_the_near_one(ganq: "Ganq") -> None:
    said = ganq("statsu")
    assert said.code == 2
    line, hint = one_line_and_hint(said.err)
    assert "Did you mean 'status'?" in line
    assert "ganq --help" in hint


def test_an_unknown_option_is_a_usage_error(ganq: "Ganq", image_folder: Path) -> None:
    said = ganq("submit", "train", "--data", image_folder, "--epoch-count", 3)
    assert said.code == 2
    line, _ = one_line_and_hint(said.err)
    assert "--epoch-count" in line


def test_a_value_of_the_wrong_type_is_a_usage_error(ganq: "Ganq", image_folder: Path) -> None:
    said = ganq("submit", "train", "--data", image_folder, "--epochs", "many")
    assert said.code == 2
    assert "'many'" in one_line_and_hint(said.err)[0]


@pytest.mark.parametrize(
    "option",
    [
        ("status", "--limit"),
        ("status", "--before"),
        ("logs", 1, "--lines"),
        ("up", "--cpu-workers"),
        ("worker", "--cpu-workers"),
    ],
)
def test_a_number_that_is_not_whole_is_called_no_integer(ganq: "Ganq", option: Any) -> None:
    said = ganq(*option, "1.5")
    assert said.code == 2
    assert one_line_and_hint(said.err)[0].endswith("'1.5' is not a valid integer")


def test_a_job_that_does_not_exist_is_exit_code_3_in_every_command_that_takes_one(ganq: "Ganq") -> None:
    for command in (
        ("status",),
        ("wait",),
        ("logs",),
        ("events",),
        ("cancel",),
        ("hold",),
        ("release",),
        ("retry",),
        ("open",),
        ("checkpoints",),
    ):
        said = ganq(*command, 99)
        assert said.code == 3, command
        assert "there is no job 99" in one_line_and_hint(said.err)[0]


def test_with_json_the_error_is_json_on_stderr_and_stdout_stays_empty(ganq: "Ganq") -> None:
    said = ganq("status", 99, "--json")
    assert said.code == 3
    assert said.out == ""
    assert said.error() == {
        "code": "JOB_NOT_FOUND",
        "message": "there is no job 99",
        "hint": "ganq status lists them",
    }


@pytest.mark.parametrize(
    ("revision", "word", "way"), [("0000", "older", "ganq db upgrade"), ("9999", "newer", "install")]
)
def test_a_database_of_another_schema_is_refused_and_left_alone(
    ganq: "Ganq", settings: "Settings", image_folder: Path, revision: str, word: str, way: str
) -> None:
    path = settings.home / "ganq.db"
    set_schema(path, revision)
    for command in (("status",), ("submit", "train", "--data", image_folder), ("cancel", "1")):
        said = ganq(*command)
        assert said.code == 1
        line, hint = one_line_and_hint(said.err)
        assert word in line
        assert way in hint
    with sqlite3.connect(path) as conn:
        assert conn.execute("SELECT count(*) FROM job").fetchone() == (0,)
        assert conn.execute("SELECT version_num FROM alembic_version").fetchone() == (revision,)
    conn.close()


def test_db_upgrade_refuses_a_database_from_the_future(ganq: "Ganq", settings: "Settings") -> None:
    set_schema(settings.home / "ganq.db", "9999")
    said = ganq("db", "upgrade")
    assert said.code == 1
    assert "newer" in one_line_and_hint(said.err)[0]


def test_db_upgrade_makes_the_tables_of_a_new_home_and_then_has_nothing_to_do(
    bare_ganq: "Ganq", tmp_path: Path
) -> None:
    assert bare_ganq("db", "status").code == 1
    first = bare_ganq("db", "upgrade", "--json").json()
    assert (first["before"], first["schema"]) == (None, SCHEMA_REVISION)
    assert bare_ganq("db", "upgrade", "--json").json()["before"] == SCHEMA_REVISION
    assert bare_ganq("db", "status").code == 0


def test_a_file_that_is_no_database_is_named_as_such(ganq: "Ganq", settings: "Settings") -> None:
    (settings.home / "ganq.db").write_bytes(b"these are not the tables you are looking for" * 100)
    said = ganq("status")
    assert said.code == 1
    assert "not a SQLite database" in one_line_and_hint(said.err)[0]


def test_a_postgres_that_is_not_there_is_one_line_and_its_password_is_masked(
    ganq: "Ganq", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GANQ_DATABASE_URL", "postgresql://ganq:geheim@127.0.0.1:1/ganq")
    monkeypatch.setattr("storage.db.engine.Database.read.__kwdefaults__", {"patience_s": 0.2})
    said = ganq("status")
    assert said.code == 1
    assert "cannot be reached" in one_line_and_hint(said.err)[0]
    assert "geheim" not in said.err


def test_a_setting_that_cannot_work_is_named(ganq: "Ganq", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GANQ_POLL_SECONDS", "soon")
    said = ganq("status")
    assert said.code == 2
    assert "GANQ_POLL_SECONDS=soon" in one_line_and_hint(said.err)[0]


def test_a_home_that_cannot_be_made_is_one_line_and_nothing_is_written(
    bare_ganq: "Ganq", monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image_folder: Path
) -> None:
    blocked = tmp_path / "a-file"
    blocked.touch()
    monkeypatch.setenv("GANQ_HOME", str(blocked / "home"))
    said = bare_ganq("submit", "train", "--data", image_folder)
    assert said.code == 1
    one_line_and_hint(said.err)
    assert said.out == ""
    assert blocked.read_bytes() == b""


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes wherever it likes")
def test_a_read_only_home_is_one_line(
    bare_ganq: "Ganq", monkeypatch: pytest.MonkeyPatch, tmp_path: Path, image_folder: Path
) -> None:
    home = tmp_path / "new-home"
    home.mkdir(mode=0o500)
    said = bare_ganq("submit", "train", "--data", image_folder)
    assert said.code == 1
    one_line_and_hint(said.err)
    assert list(home.iterdir()) == []


def test_commands_before_the_first_job_say_how_to_begin(bare_ganq: "Ganq", tmp_path: Path) -> None:
    said = bare_ganq("status")
    assert said.code == 0
    assert "no jobs yet" in said.out
    assert "ganq submit train" in said.out
    assert bare_ganq("status", "--json").json() == []
    assert bare_ganq("workers").code == 0
    assert bare_ganq("wait", 1).code == 3
    assert bare_ganq("submit", "generate", "--count", 3).code == 3
    assert not (tmp_path / "new-home").exists(), "a command that only asks has written something"


def test_an_unexpected_error_is_one_line_that_says_it_is_a_defect(
    ganq: "Ganq", monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("storage.db.queries.Queries.page", fail)
    said = ganq("status")
    assert said.code == 1
    line, hint = one_line_and_hint(said.err)
    assert line == "error: ZeroDivisionError: division by zero"
    assert hint == f"  → {entry.INTERNAL_ERROR_HINT}"
    with pytest.raises(ZeroDivisionError):
        entry.main(["status", "--debug"])
    monkeypatch.setenv("GANQ_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        entry.main(["status"])


def test_control_characters_of_an_argument_do_not_reach_the_terminal(ganq: "Ganq") -> None:
    said = ganq("status", "\x1b[31mred\x07")
    assert said.code == 3
    assert "\x1b" not in said.err
    assert "\x07" not in said.err


def run_process(shell: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)


def test_a_closed_reader_is_quiet(ganq: "Ganq", job_factory: Callable[..., object]) -> None:
    for _ in range(200):
        job_factory()
    done = run_process(
        f"{sys.executable} -m cli.main status --json --all | head -c 1; echo ${{PIPESTATUS[0]}}"
    )
    assert done.stderr == ""
    assert done.stdout == "[141\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_cannot_be_written_is_one_line(
    ganq: "Ganq", job_factory: Callable[..., object]
) -> None:
    job_factory()
    done = run_process(f"{sys.executable} -m cli.main status > /dev/full")
    assert done.returncode == 1
    line, hint = one_line_and_hint(done.stderr)
    assert line == "error: the output could not be written: no space left on device"
    assert "may have succeeded" in hint


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_the_exit_code_says_how_it_went_where_stderr_takes_nothing(
    ganq: "Ganq", job_factory: "Callable[..., Job]", store: "JobStore"
) -> None:
    job_factory()
    store.request_cancel(1)
    for command, code in (("status 999", 3), ("stats", 2), ("wait 1", 1), ("cancel 998 999", 3)):
        done = run_process(f"{sys.executable} -m cli.main {command} 2> /dev/full")
        assert done.returncode == code, command


@pytest.mark.parametrize("command", ["status", "submit train --data", "cancel --all --yes --user"])
def test_an_argument_that_is_no_text_is_refused_before_anything_is_done(
    ganq: "Ganq", queries: "Queries", command: str
) -> None:
    done = run_process(f"{sys.executable} -m cli.main {command} $'x\\xff'")
    assert done.returncode == 2
    assert one_line_and_hint(done.stderr)[0] == "error: 'x?' is not UTF-8"


def test_a_data_set_in_a_folder_whose_name_is_no_text_is_refused_however_it_is_reached(
    ganq: "Ganq", queries: "Queries", image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = image_folder.with_name("odd\udcff")
    odd.mkdir()
    image_folder.rename(odd / "faces")
    monkeypatch.chdir(odd)
    from_there = ganq("submit", "train", "--data", "faces")
    monkeypatch.setenv("GANQ_DATA", str(odd / "faces"))
    from_the_environment = ganq("submit", "train")
    for said in (from_there, from_the_environment):
        assert said.code == 2
        assert "error: --data '" in said.err
        assert "odd?/faces' is not UTF-8" in said.err
    assert queries.counts()["queued"] == 0


@pytest.mark.parametrize("more", ["", "--json", "--sweep seed=0-1"])
def test_a_job_that_was_accepted_is_reported_where_the_answer_cannot_be_written(
    ganq: "Ganq", queries: "Queries", image_folder: Path, more: str
) -> None:
    done = run_process(f"{sys.executable} -m cli.main submit train --data {image_folder} {more} > /dev/full")
    assert done.returncode == 1
    assert "is accepted, but the output could not be written" in done.stderr
    assert "no worker is running" in done.stderr, "nobody was rung"
    assert "no space left on device" in done.stderr
    assert queries.counts()["queued"] == (2 if "sweep" in more else 1)


@pytest.mark.parametrize("more", ["", "--json"])
def test_what_is_asked_of_several_jobs_is_done_to_all_where_the_answer_cannot_be_written(
    ganq: "Ganq", queries: "Queries", job_factory: Callable[..., object], more: str
) -> None:
    for _ in range(3):
        job_factory()
    done = run_process(f"{sys.executable} -m cli.main cancel 1 2 3 {more} > /dev/full")
    assert done.returncode == 1
    assert "it was: job 1 cancelled, job 2 cancelled, job 3 cancelled" in done.stderr
    assert "no space left on device" in done.stderr
    assert queries.counts()["cancelled"] == 3

    piped = run_process(f"{sys.executable} -m cli.main retry 1 2 3 {more} | true; echo ${{PIPESTATUS[0]}}")
    assert (piped.stdout, piped.stderr.count("Traceback")) == ("141\n", 0)
    assert queries.counts()["queued"] == 3


def test_ctrl_c_while_waiting_is_130_and_says_that_the_work_continues(
    ganq: "Ganq", job_factory: Callable[..., object]
) -> None:
    job_factory()
    waiting = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "wait", "1"], stderr=subprocess.PIPE, text=True
    )
    assert waiting.stderr is not None
    assert "job 1: queued" in waiting.stderr.readline()
    waiting.send_signal(2)
    rest = waiting.stderr.read()
    assert waiting.wait(10) == 130
    waiting.stderr.close()
    assert "the jobs continue" in rest
    assert "Traceback" not in rest


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_command_that_is_terminated_takes_what_is_half_made_away(
    tmp_path: Path, sent: Any, code: int
) -> None:
    asked = ["dataset", "make", str(tmp_path / "faces"), "--count", "100000"]
    drawing = subprocess.Popen(
        [sys.executable, "-m", "cli.main", *asked], env={**os.environ, "GANQ_HOME": str(tmp_path)}
    )
    until(lambda: list(tmp_path.glob(".faces-*/*.png")))
    drawing.send_signal(sent)
    assert drawing.wait(30) == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        ("submit", "generate", "--count", 8, "--out", ""),
        ("submit", "generate", "--count", 8, "--from", ""),
        ("submit", "train", "--continue", " "),
        ("submit", "evaluate", ""),
        ("dataset", "make", ""),
        ("dataset", "check", ""),
        ("export", 1, "--out", ""),
        ("import", "", "--name", "heads"),
        ("status", ""),
    ],
)
def test_an_empty_path_or_job_is_neither_the_current_folder_nor_the_default(
    ganq: "Ganq", trained: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    trained()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    said = ganq(*command)
    assert said.code == 2
    assert "is empty" in one_line_and_hint(said.err)[0]
    assert not list((tmp_path / "here").iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ("submit", "generate", "--seeds", "١"),
        ("submit", "generate", "--count", 1, "--time-limit", "١h"),
        ("submit", "generate", "--sweep", "seed=0-١", "--count", 1),
        ("gc", "--older-than", "١d", "--jobs"),
    ],
)
def test_digits_of_other_scripts_are_no_numbers(
    ganq: "Ganq", trained: Callable[..., int], command: Any
) -> None:
    trained()
    said = ganq(*command)
    assert said.code == 2
    assert "١" in one_line_and_hint(said.err)[0]


def test_a_name_of_other_digits_is_no_id(ganq: "Ganq", job_factory: Callable[..., object]) -> None:
    job_factory()
    said = ganq("status", "١")
    assert said.code == 3
    assert "there is no job named '١'" in said.err
