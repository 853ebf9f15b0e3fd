"""`ganq webhook` and `ganq wait --notify`."""

import base64
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from receiver import Receiver
from sqlalchemy import text
from unit.conftest import Ganq

from cli.ui.notify_here import notify_here
from storage.db.engine import Database
from storage.db.rows import Job
from storage.db.store import JobStore
from storage.db.webhooks import Webhooks

URL = "https://1.1.1.1/hook?token=hidden"
Make = Callable[..., Job]


def test_the_secret_is_printed_once_and_nothing_else_on_stdout(ganq: Ganq, database: Database) -> None:
    made = ganq("webhook", "add", URL, "--user", "ada", "--label", "project=faces", "--events", "failed")
    secret = made.out.strip()
    assert len(base64.b64decode(secret.removeprefix("whsec_"), validate=True)) == 32
    assert "not shown again" in made.err
    assert secret not in made.err
    listed = ganq("webhook", "list")
    assert "failed · user ada · label project=faces" in listed.out
    for shown in (listed.out, ganq("webhook", "list", "--json").out):
        assert secret not in shown
        assert "hidden" not in shown
    (one,) = ganq("webhook", "list", "--json").json()
    assert (one["id"], one["state"], one["events"], one["users"]) == (1, "ok", ["failed"], ["ada"])
    assert ganq("webhook", "add", URL, "--json").json()["secret"].startswith("whsec_")


def test_a_new_machine_has_no_webhooks_and_adding_one_creates_the_job_table(bare_ganq: Ganq) -> None:
    assert bare_ganq("webhook", "list").out == "no webhooks: ganq webhook add https://HOST/PATH\n"
    assert bare_ganq("webhook", "deliveries").out == "no deliveries\n"
    assert bare_ganq("webhook", "add", URL).code == 0
    assert "1.1.1.1" in bare_ganq("webhook", "list").out


def test_a_job_is_named_by_its_name(ganq: Ganq, job_factory: Make) -> None:
    job_factory()
    job = job_factory(name="faces")
    assert ganq("webhook", "add", URL, "--job", "faces", "--events", "all", "--json").json()["jobs"] == [
        job.id
    ]
    assert ganq("webhook", "add", URL, "--job", "nope").code == 3


@pytest.mark.parametrize(
    ("args", "code", "part"),
    [
        (("http://localhost:9/",), 1, "GANQ_WEBHOOK_NETWORKS"),
        (("http://ada:pw@1.1.1.1/",), 2, "user or password"),
        (("hook.example",), 2, "https://HOST/PATH"),
        (("command",), 2, "GANQ_WEBHOOK_COMMAND"),
        ((URL, "--events", "fail"), 2, "did you mean failed?"),
        ((URL, "--events", ","), 2, "all means each"),
        ((URL, "--kind", "paint"), 2, "paint"),
        ((URL, "--label", "=x"), 2, "label"),
        ((URL, "--user", " "), 2, "user name"),
    ],
)
def test_a_webhook_that_cannot_be_is_refused_with_the_way_out(
    ganq: Ganq, database: Database, args: tuple[str, ...], code: int, part: str
) -> None:
    said = ganq("webhook", "add", *args)
    assert said.code == code
    assert part in said.err
    assert "pw" not in said.err
    assert ganq("webhook", "list", "--json").json() == []


def test_a_test_message_says_whether_it_was_taken(
    ganq: Ganq, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GANQ_WEBHOOK_NETWORKS", "127.0.0.0/8")
    with Receiver(lambda number: 204 if number == 1 else 500) as receiver:
        receiver.secret = ganq("webhook", "add", receiver.url).out.strip()
        assert "took it: HTTP 204" in ganq("webhook", "test", "1").out
        refused = ganq("webhook", "test", "1")
    assert (refused.code, "did not take it: HTTP 500" in refused.err) == (1, True)
    assert receiver.received[0].message["type"] == "ganq.test"
    assert ganq("webhook", "test", "7").code == 3


def test_deliveries_and_a_disabled_webhook_are_listed_with_the_reason(
    ganq: Ganq, database: Database, store: JobStore, job_factory: Make
) -> None:
    ganq("webhook", "add", URL)
    job = job_factory()
    store.request_cancel(job.id)
    assert "cancelled" in ganq("webhook", "deliveries", "1").out
    (one,) = ganq("webhook", "deliveries", "--json").json()
    assert (one["job"], one["type"], one["state"], one["attempts"]) == (job.id, "cancelled", "pending", 0)
    assert ganq("webhook", "deliveries", "--state", "failed").out == "no deliveries\n"
    assert ganq("webhook", "deliveries", "7").code == 3
    disable = (
        "UPDATE webhook SET disabled_at = created_at, disabled_reason = 'its receiver answered 410 Gone'"
    )
    database.write(lambda conn: conn.execute(text(disable)))
    listed = ganq("webhook", "list")
    assert "disabled" in listed.out
    assert "410 Gone" in listed.err
    assert "ganq webhook enable 1" in listed.err
    assert ganq("webhook", "enable", "1").out == (
        "webhook 1 (https://1.1.1.1/hook) is enabled; 1 delivery will be sent\n"
    )
    assert ganq("webhook", "remove", "1").out == "webhook 1 (https://1.1.1.1/hook) is removed\n"
    assert Webhooks(database).all() == []
    for command in ("enable", "remove"):
        assert ganq("webhook", command, "1").code == 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NETWORKS", "10.0.0.0/99"),
        ("DELIVERY", "maybe"),
        ("TIMEOUT_SECONDS", "60"),
        ("TIMEOUT_SECONDS", "0"),
    ],
)
def test_a_setting_of_webhooks_that_cannot_be_is_refused(
    ganq: Ganq, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"GANQ_WEBHOOK_{name}", value)
    said = ganq("webhook", "list")
    assert said.code == 2
    assert f"GANQ_WEBHOOK_{name}" in said.err


@pytest.mark.parametrize("program", ["notify-send", "osascript"])
def test_wait_notifies_the_desktop_when_the_jobs_have_ended(
    ganq: Ganq,
    store: JobStore,
    job_factory: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    program: str,
) -> None:
    """With a stand-in for the program of the desktop, which tests have not."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / program
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/shown\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    job = job_factory(name='fa"ces')
    store.request_cancel(job.id)
    assert ganq("wait", job.id).code == 1
    assert not (tmp_path / "shown").exists()
    assert ganq("wait", job.id, "--notify").code == 1
    assert (tmp_path / "shown").read_text().splitlines()[-2:] == [
        "ganq",
        f'job {job.id} (fa"ces) was cancelled',
    ]
    script.write_text("#!/bin/sh\nexit 1\n")
    assert ganq("wait", job.id, "--notify").code == 1


def test_the_bell_rings_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    reader, terminal = os.openpty()
    with open(terminal, "w") as stderr, open(tmp_path / "log", "w") as log:
        for stream in (log, stderr):
            monkeypatch.setattr(sys, "stderr", stream)
            notify_here("job 1 has succeeded")
        assert os.read(reader, 10) == b"\a"
    os.close(reader)
    assert (tmp_path / "log").read_text() == ""
