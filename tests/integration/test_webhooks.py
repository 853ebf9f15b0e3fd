"""Webhooks: which events are delivered, how often, in which order, and to which addresses."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from receiver import Receiver, wait_until
from sqlalchemy import text
from tls import Authority

from jobs.errors import ConfigError, GanqError, NotFoundError, SpecError
from storage.db.backup import backup, open_backup, restore
from storage.db.engine import Database
from storage.db.rows import Job, Lease, WorkerIdentity
from storage.db.store import JobStore
from storage.db.store.waiting import Extras
from storage.db.webhooks import FAILED, LEASE_S, PENDING, Filters, Webhook, Webhooks
from storage.db.workers import WorkerStore
from storage.settings import Settings
from worker.doctor.webhooks import check_webhooks
from worker.supervisor.reaper import Recovery
from worker.supervisor.webhooks import DelivererStarter
from worker.webhooks import deliver, targets
from worker.webhooks import send as sender
from worker.webhooks.deliver import delivering, retry_in_s
from worker.webhooks.message import message_of
from worker.webhooks.message import test_message as a_test_message
from worker.webhooks.send import Reply, send
from worker.webhooks.targets import AddressForbiddenError, addresses, read_target

ALL = Filters(events=())
LOOPBACK = "127.0.0.0/8"
CANCELLED = ["submitted", "cancel_requested", "cancelled"]
# apprise imports a module that Python 3.13 has no longer.
pytestmark = pytest.mark.filterwarnings("ignore:.*imghdr.*:DeprecationWarning")
sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)

Make = Callable[..., Job]


@pytest.fixture
def hooks(database: Database, monkeypatch: pytest.MonkeyPatch) -> Webhooks:
    monkeypatch.setattr(deliver, "POLL_S", 0.05)
    database.require_schema()
    return Webhooks(database)


@pytest.fixture
def allowed(settings: Settings) -> Settings:
    """
    Settings that allow receivers on this machine, with pauses that a test can wait for.

    On a busy machine the receiver may take seconds; a message repeated for that would be one too many.
    """
    return replace(
        settings, webhook_networks=LOOPBACK, webhook_retry_seconds=0.0002, webhook_timeout_seconds=20.0
    )


def types(hooks: Webhooks, webhook: Webhook) -> list[str]:
    return [one.event.type for one in reversed(hooks.deliveries(webhook.id))]


def states(hooks: Webhooks, webhook: Webhook) -> list[str]:
    return [one.state for one in reversed(hooks.deliveries(webhook.id))]


def all_delivered(hooks: Webhooks) -> bool:
    counts = hooks.counts().values()
    return any(one.get("delivered") for one in counts) and not any(
        one.get(state) for one in counts for state in (PENDING, FAILED)
    )


def post(url: str, settings: Settings, secret: str = "") -> Reply:
    """Send one message to a URL."""
    hook = Webhook(1, "http", url, secret or "whsec_AAAA", ALL, "ada", 0.0, None, None, None, None)
    return asyncio.run(send(hook, a_test_message("i", "1", time.time()), settings))


# --- which events -------------------------------------------------------------------------------


def test_only_events_after_the_webhook_that_pass_its_filters_are_delivered(
    hooks: Webhooks, job_factory: Make, store: JobStore
) -> None:
    def cancel(**about: Any) -> Job:
        job = job_factory(**about)
        store.request_cancel(job.id)
        return job

    before = cancel()
    named = job_factory(user="ada")
    every = hooks.create("http", "https://a.example/", ALL, "ada")
    ends = hooks.create("http", "https://b.example/", Filters(), "ada")
    of_bob = hooks.create("http", "https://c.example/", Filters(events=("cancelled",), users=("bob",)), "ada")
    of_job = hooks.create("http", "https://d.example/", Filters(jobs=(named.id,)), "ada")
    evaluations = hooks.create("http", "https://e.example/", Filters(kinds=("evaluate",)), "ada")
    cancel(user="bob b")
    cancel(user="bob", kind="evaluate")
    store.request_cancel(named.id)

    assert types(hooks, every) == CANCELLED * 2 + CANCELLED[1:]
    assert types(hooks, ends) == ["cancelled"] * 3
    assert [one.job.user for one in hooks.deliveries(of_bob.id)] == ["bob"]
    assert [one.job.id for one in hooks.deliveries(of_job.id)] == [named.id]
    assert [one.job.kind for one in hooks.deliveries(evaluations.id)] == ["evaluate"]
    assert before.id not in {one.job.id for one in hooks.deliveries(limit=1000)}


def test_the_labels_of_a_job_are_those_of_the_time_of_delivery(
    hooks: Webhooks, job_factory: Make, store: JobStore
) -> None:
    job = job_factory(extras=Extras(labels={"project": "faces", "site": "a"}))
    other = job_factory(extras=Extras(labels={"project": "cats"}))
    labelled = hooks.create("http", "https://a.example/", Filters(labels=("project=faces", "site")), "ada")
    store.request_cancel(job.id)
    store.request_cancel(other.id)
    assert [one.job.id for one in hooks.batch(labelled, 10)] == [job.id]
    assert [one.job.id for one in hooks.deliveries(labelled.id)] == [job.id], "the others are deleted"


def test_a_shard_is_not_reported_beside_its_parent(
    hooks: Webhooks, job_factory: Make, store: JobStore
) -> None:
    every = hooks.create("http", "https://a.example/", ALL, "ada")
    shards = [({"source": 1, "count": 4, "first": first}, 0) for first in (0, 2)]
    parent = job_factory(kind="generate", shards=shards, max_workers=2)
    store.request_cancel(parent.id)
    assert {one.job.id for one in hooks.deliveries(every.id)} == {parent.id}


# --- what is sent, and how often ----------------------------------------------------------------


def test_a_receiver_that_fails_every_third_request_gets_all_events_in_the_order_of_each_job(
    hooks: Webhooks, allowed: Settings, job_factory: Make, store: JobStore, database: Database
) -> None:
    with Receiver(lambda number: 500 if number % 3 == 0 else 200) as receiver:
        hook = hooks.create("http", f"{receiver.url}/in", ALL, "ada")
        receiver.secret = hook.secret
        for _ in range(5):
            store.request_cancel(job_factory().id)
        with delivering(database, allowed):
            wait_until(lambda: all_delivered(hooks))
    taken = receiver.taken()
    assert len(taken) == 15
    assert len({one.id for one in taken}) == 15, "without a crash each is taken once"
    for job in {one.job for one in taken}:
        assert [one.message["type"] for one in taken if one.job == job] == [f"job.{one}" for one in CANCELLED]
    assert any(one.attempts > 1 for one in hooks.deliveries(hook.id))
    assert all(one.status == 200 for one in hooks.deliveries(hook.id))
    assert hooks.get(hook.id).state == "ok"


def test_a_message_has_the_facts_of_event_and_job(
    hooks: Webhooks,
    allowed: Settings,
    running_job_factory: Callable[..., Lease],
    store: JobStore,
    database: Database,
) -> None:
    from jobs.errors import DatasetError

    with Receiver() as receiver:
        hook = hooks.create("http", f"{receiver.url}/in?key=1", Filters(), "ada")
        receiver.secret = hook.secret
        lease = running_job_factory(name="faces", extras=Extras(labels={"project": "x"}))
        store.fail(lease, DatasetError("no images", hint="add images"))
        with delivering(database, allowed):
            wait_until(lambda: all_delivered(hooks))
    (one,) = receiver.taken()
    assert one.path == "/in?key=1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", one.message["timestamp"])
    job = one.message["data"]["job"]
    assert (one.message["type"], job["name"], job["state"]) == ("job.failed", "faces", "failed")
    assert job["labels"] == {"project": "x"}
    assert job["error"] == {"code": "BAD_DATASET", "message": "no images", "hint": "add images"}
    assert one.id == f"evt_{database.installation}_{one.event}"


def test_a_large_message_is_sent_without_result_and_detail(
    hooks: Webhooks, running_job_factory: Callable[..., Lease], store: JobStore
) -> None:
    hook = hooks.create("http", "https://a.example/", Filters(), "ada")
    for size in (100, 30_000):
        store.succeed(running_job_factory(), {"notes": "x" * size})
    small, large = (message_of(one, "i") for one in hooks.batch(hook, 10))
    assert json.loads(small.body)["data"]["job"]["result"] == {"notes": "x" * 100}
    assert len(large.body) < 2000
    assert json.loads(large.body)["data"]["job"]["result"] is None


def test_the_pauses_are_those_of_the_standard() -> None:
    minute, hour = 60.0, 3600.0
    schedule = [5.0, *(5 * minute, 30 * minute), *(n * hour for n in (2, 5, 10, 14, 20, 24))]
    for attempts, pause_s in enumerate(schedule, start=1):
        found = retry_in_s(attempts, 5.0)
        assert found is not None
        assert pause_s <= found <= 1.1 * pause_s
    assert retry_in_s(len(schedule) + 1, 5.0) is None
    assert retry_in_s(1, 5.0, retry_after_s=120.0) == 120.0


def test_a_delivery_that_always_fails_is_given_up_and_the_next_event_follows(
    hooks: Webhooks,
    allowed: Settings,
    job_factory: Make,
    store: JobStore,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(deliver, "RETRIES", (1, 1))
    with Receiver(lambda number: 500 if number <= 3 else 200) as receiver:
        hook = hooks.create("http", receiver.url, ALL, "ada")
        store.request_cancel(job_factory().id)
        with delivering(database, allowed):
            wait_until(lambda: not hooks.deliveries(state=PENDING))
        assert states(hooks, hook) == ["failed", "delivered", "delivered"]
        (failed,) = hooks.deliveries(hook.id, state=FAILED)
        assert (failed.attempts, failed.status, failed.error) == (3, 500, "HTTP 500: not a success")
        hooks.enable(hook.id)
        with delivering(database, allowed):
            wait_until(lambda: all_delivered(hooks))
    assert [one.message["type"] for one in receiver.taken()] == [
        "job.cancel_requested",
        "job.cancelled",
        "job.submitted",
    ]


@sqlite_only
@pytest.mark.parametrize("status", [410, 302, 307])
def test_gone_disables_a_webhook_and_a_redirect_is_not_followed(
    hooks: Webhooks, allowed: Settings, job_factory: Make, store: JobStore, database: Database, status: int
) -> None:
    with Receiver() as other, Receiver(lambda _: (status, ("location", other.url))) as receiver:
        hook = hooks.create("http", receiver.url, Filters(), "ada")
        store.request_cancel(job_factory().id)
        with delivering(database, allowed):
            wait_until(lambda: hooks.deliveries()[0].attempts)
    assert other.received == []
    found = hooks.get(hook.id)
    if status == 410:
        assert (found.state, found.disabled_reason) == ("disabled", "its receiver answered 410 Gone")
        store.request_cancel(job_factory().id)
        assert states(hooks, hook) == ["failed"], "a disabled webhook gets no further events"
    else:
        assert found.state == "failing"
        (finding,) = check_webhooks(database)
        assert "has failed since" in finding.message
        assert finding.message.endswith("; 1 delivery waits")
        assert "not followed" in (hooks.deliveries()[0].error or "")


def test_a_webhook_that_has_failed_for_days_is_disabled_and_enabling_it_sends_what_is_left(
    hooks: Webhooks, allowed: Settings, job_factory: Make, store: JobStore, database: Database
) -> None:
    answers = [500]
    with Receiver(lambda _: answers[0]) as receiver:
        hook = hooks.create("http", receiver.url, Filters(), "ada")
        long_ago = text("UPDATE webhook SET failing_since = created_at - 432001")
        database.write(lambda conn: conn.execute(long_ago))
        store.request_cancel(job_factory().id)
        with delivering(database, allowed):
            wait_until(lambda: hooks.get(hook.id).disabled_at)
        found = hooks.get(hook.id)
        assert (
            found.disabled_reason
            == "no delivery has succeeded for 5 days; the last error: HTTP 500: not a success"
        )
        (finding,) = check_webhooks(database)
        assert (finding.level, "disabled since" in finding.message) == ("warn", True)
        assert f"ganq webhook enable {hook.id}" in (finding.hint or "")
        answers[0] = 200
        assert hooks.enable(hook.id).state == "ok"
        with delivering(database, allowed):
            wait_until(lambda: all_delivered(hooks))
    assert [one.level for one in check_webhooks(database)] == ["ok"]


def test_a_receiver_that_hangs_delays_no_other(
    hooks: Webhooks, allowed: Settings, job_factory: Make, store: JobStore, database: Database
) -> None:
    with Receiver() as receiver:
        hung = hooks.create("http", f"{receiver.url}/hang", Filters(), "ada")
        hooks.create("http", f"{receiver.url}/quick", Filters(), "ada")
        for _ in range(4):
            store.request_cancel(job_factory().id)
        with delivering(database, replace(allowed, webhook_timeout_seconds=3.0)):
            wait_until(lambda: len(receiver.taken("/quick")) == 4)
            assert hooks.get(hung.id).state == "ok", "its first attempts are not over yet"
            wait_until(lambda: hooks.deliveries(hung.id)[-1].error)
            assert hooks.deliveries(hung.id)[-1].error == "no answer within 3 s"
            receiver.released.set()


# --- several processes --------------------------------------------------------------------------


def test_two_deliverers_send_each_event_once(
    hooks: Webhooks, allowed: Settings, job_factory: Make, store: JobStore, database: Database
) -> None:
    with Receiver() as receiver:
        hooks.create("http", receiver.url, ALL, "ada")
        for _ in range(10):
            store.request_cancel(job_factory().id)
        with delivering(database, allowed), delivering(database, allowed):
            wait_until(lambda: all_delivered(hooks))
    assert len(receiver.taken()) == 30


def test_the_webhook_of_a_process_that_is_gone_is_delivered_by_another_after_its_lease(
    hooks: Webhooks, job_factory: Make, store: JobStore, database: Database
) -> None:
    hook = hooks.create("http", "https://a.example/", Filters(), "ada")
    store.request_cancel(job_factory().id)
    assert hooks.lease(hook.id, "gone", ["http"]) is not None
    assert (hooks.due("me", ["http"]), hooks.lease(hook.id, "me", ["http"])) == ([], None)
    for set_back in (False, True):  # a lease of a time before the clock was set back has ended, too
        until = f"lease_until {'+' if set_back else '-'} {LEASE_S + 1}"
        moved = text(f"UPDATE webhook SET lease_until = {until}")
        database.write(lambda conn, moved=moved: conn.execute(moved))  # type: ignore[misc]
        assert hooks.due("me", ["http"]) == [hook.id]
        assert hooks.due("me", ["command"]) == []
        assert hooks.lease(hook.id, "me", ["http"]) is not None
        assert hooks.due("another", ["http"]) == []
        hooks.release(hook.id, "me")
        hooks.lease(hook.id, "gone", ["http"])


def test_a_worker_starts_a_process_that_delivers_only_what_nobody_else_does(
    hooks: Webhooks,
    allowed: Settings,
    settings_env: dict[str, str],
    job_factory: Make,
    store: JobStore,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GANQ_WEBHOOK_NETWORKS", LOOPBACK)
    with Receiver() as receiver:
        hooks.create("http", receiver.url, Filters(), "ada")
        store.request_cancel(job_factory().id)
        starter = DelivererStarter(database, allowed)
        starter.tick()
        assert starter.process is None, "a server of the page would have had no time"
        database.write(lambda conn: conn.execute(text("UPDATE delivery SET created_at = created_at - 60")))
        off = replace(allowed, webhook_delivery="off")
        DelivererStarter(database, off).tick()
        with delivering(database, off):
            assert "deliverer" not in {one.name for one in threading.enumerate()}
        starter.tick()
        assert starter.process is not None
        other = DelivererStarter(database, allowed)
        other.tick()
        assert other.process is None, "the first one has the lease"
        try:
            wait_until(lambda: receiver.taken())
            wait_until(lambda: all_delivered(hooks))
            starter.process.terminate()
            assert starter.process.wait(10) == 0
        finally:
            starter.process.kill()
            starter.process.wait()


@sqlite_only
def test_the_recovery_of_a_worker_has_webhooks_delivered(
    hooks: Webhooks,
    allowed: Settings,
    settings_env: dict[str, str],
    job_factory: Make,
    store: JobStore,
    database: Database,
    make_identity: Callable[..., WorkerIdentity],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GANQ_WEBHOOK_NETWORKS", LOOPBACK)
    workers = WorkerStore(database, make_identity("w1"))
    recovery = Recovery(database, allowed, workers, lambda *_: None, lambda: None, lambda _: None)
    with Receiver() as receiver:
        hooks.create("http", receiver.url, Filters(), "ada")
        store.request_cancel(job_factory().id)
        database.write(lambda conn: conn.execute(text("UPDATE delivery SET created_at = created_at - 60")))
        recovery.start()
        try:
            wait_until(lambda: receiver.taken() and all_delivered(hooks), 60)
        finally:
            recovery.stop()
            recovery.join()
            assert recovery.deliverer.process is not None
            recovery.deliverer.process.kill()
            recovery.deliverer.process.wait()


def test_removing_a_webhook_removes_its_deliveries_and_breaks_no_job(
    hooks: Webhooks, job_factory: Make, store: JobStore, database: Database
) -> None:
    hook, other = (hooks.create("http", f"https://{one}.example/", ALL, "ada") for one in "ab")
    store.request_cancel(job_factory().id)
    hooks.remove(hook.id)
    assert [one.webhook_id for one in hooks.deliveries()] == [other.id] * 3
    with pytest.raises(NotFoundError):
        hooks.remove(hook.id)
    # As if the event were recorded while the webhook was removed.
    database.write(lambda conn: conn.execute(text("DELETE FROM webhook")))
    hooks.prune()
    assert hooks.deliveries() == []


def test_old_outcomes_are_forgotten_and_what_waits_is_not(
    hooks: Webhooks, job_factory: Make, store: JobStore, database: Database
) -> None:
    hooks.create("http", "https://a.example/", ALL, "ada")
    store.request_cancel(job_factory().id)
    old = "UPDATE delivery SET tried_at = created_at - 604801"
    database.write(lambda conn: conn.execute(text(old)))
    first = "UPDATE delivery SET state = 'delivered' WHERE event_id = (SELECT min(event_id) FROM delivery)"
    database.write(lambda conn: conn.execute(text(first)))
    hooks.prune()
    assert [one.event.type for one in hooks.deliveries()] == ["cancelled", "cancel_requested"]


def test_a_restored_job_table_does_not_send_old_events_again(
    hooks: Webhooks, job_factory: Make, store: JobStore, database: Database, tmp_path: Path
) -> None:
    hooks.create("http", "https://a.example/", ALL, "ada")
    store.request_cancel(job_factory().id)
    done = "UPDATE delivery SET state = 'delivered'"
    database.write(lambda conn: conn.execute(text(done)))
    backup(database, tmp_path / "backup")
    for table in ("delivery", "webhook", "event", "attempt", "job"):
        database.write(lambda conn, table=table: conn.execute(text(f"DELETE FROM {table}")))  # type: ignore[misc]
    restore(database, open_backup(tmp_path / "backup"))
    assert [one.state for one in hooks.deliveries()] == ["delivered"] * 3


# --- addresses ----------------------------------------------------------------------------------


@sqlite_only
@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "2130706433", "0x7f.1", "10.1.2.3", "192.168.0.1", "169.254.169.254"),
        *("0.0.0.0", "100.64.0.1", "224.0.0.1", "255.255.255.255", "[::1]", "[fe80::1]", "[fd00::1]"),
        *("[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::]"),
    ],
)
def test_an_address_that_is_not_public_is_refused(settings: Settings, host: str) -> None:
    url = f"http://{host}:8000/"
    with pytest.raises(AddressForbiddenError) as refused:
        read_target(url, settings)
    assert "GANQ_WEBHOOK_NETWORKS" in (refused.value.hint or "")
    assert "not a public address" in (post(url, settings).error or "")


@sqlite_only
def test_public_addresses_and_allowed_networks_may_be_reached(settings: Settings) -> None:
    for host in ("8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8"):
        assert addresses(host, 443, settings) == [host]
    lab = replace(settings, webhook_networks="10.0.0.0/8, fd00::/8")
    for host in ("10.1.2.3", "fd00::1", "8.8.8.8", "::ffff:10.1.2.3"):
        assert addresses(host, 443, lab) == [host]
    with pytest.raises(AddressForbiddenError):
        addresses("192.168.0.1", 443, lab)


@sqlite_only
def test_the_connection_is_made_to_the_address_that_was_checked(
    allowed: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that gives the second question another answer (DNS rebinding)."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def rebinding(host: Any, *args: Any, **more: Any) -> Any:
        if host == "hook.example":
            asked.append(host)
            host = "127.0.0.1" if len(asked) == 1 else "127.0.0.9"
        return real(host, *args, **more)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    only = replace(allowed, webhook_networks="127.0.0.1/32")
    with Receiver() as receiver, Receiver(address="127.0.0.9") as hidden:
        url = f"http://hook.example:{receiver.port}/"
        assert post(url, only).delivered
        assert asked == ["hook.example"]
        assert receiver.received[0].host == f"hook.example:{receiver.port}"
        again = post(f"http://hook.example:{hidden.port}/", only)
        assert "hook.example is 127.0.0.9, which is not a public address" in (again.error or "")
    assert hidden.received == []


@sqlite_only
def test_the_certificate_must_be_that_of_the_host_and_not_of_the_address(
    allowed: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **more: real("127.0.0.1", *args, **more))
    sender._tls.cache_clear()
    try:
        with Receiver(certificate=authority.issue("hook", for_host="DNS:hook.example")) as receiver:
            assert post(f"https://hook.example:{receiver.port}/", allowed).status == 204
            for host in ("other.example", "127.0.0.1"):
                refused = post(f"https://{host}:{receiver.port}/", allowed).error or ""
                assert "certificate verify failed" in refused
    finally:
        sender._tls.cache_clear()
    assert len(receiver.received) == 1


@sqlite_only
@pytest.mark.parametrize(
    ("said", "pause_s"), [("120", 120.0), ("9999999", 86400.0), ("soon", 0.0), ("", 0.0)]
)
def test_a_receiver_may_ask_for_a_later_repetition(allowed: Settings, said: str, pause_s: float) -> None:
    with Receiver(lambda _: (503, ("retry-after", said))) as receiver:
        reply = post(receiver.url, allowed)
    assert (reply.status, reply.retry_after_s) == (503, pause_s)


@sqlite_only
@pytest.mark.parametrize(
    ("answer", "part"),
    [
        (b"SSH-2.0-OpenSSH_9.7\r\n", "not HTTP"),
        (b"HTTP/1.1 200", "not HTTP"),
        (b"", "not HTTP"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", ""),
        (b"HTTP/1.1 200 OK\r\n" + b"x: " + b"y" * 100_000, "not HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n", ""),
    ],
)
def test_only_the_head_of_an_answer_is_read_and_it_must_be_http(
    allowed: Settings, answer: bytes, part: str
) -> None:
    def serve(listener: socket.socket) -> None:
        line, _ = listener.accept()
        with line, suppress(OSError):  # the client closes as soon as it knows
            line.recv(65536)
            line.sendall(answer)
            line.shutdown(socket.SHUT_WR)
            line.recv(65536)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        reply = post(f"http://127.0.0.1:{listener.getsockname()[1]}/", allowed)
        thread.join(5)
    assert (reply.delivered, part in (reply.error or "")) == (not part, True)


@sqlite_only
@pytest.mark.parametrize(
    ("hosts", "host", "passes"),
    [
        ("", "hooks.example", True),
        ("hooks.example", "hooks.example", True),
        ("hooks.example", "x.hooks.example", False),
        ("*.lab.example, other.example", "gpu.lab.example", True),
        ("*.lab.example", "lab.example", False),
        ("*.lab.example", "evillab.example", False),
    ],
)
def test_the_list_of_hosts_allows_these_alone(
    settings: Settings, hosts: str, host: str, passes: bool
) -> None:
    listed = replace(settings, webhook_hosts=hosts)
    if passes:
        targets.check_host(host, listed)
    else:
        with pytest.raises(AddressForbiddenError):
            targets.check_host(host, listed)


@sqlite_only
@pytest.mark.parametrize(
    "url",
    [
        *("", "ftp://a.example/", "a.example/hook", "https://", "https:///path", "http://a.example:99999/"),
        *(
            "http://ada:secret@a.example/",
            "https://a.example/a b",
            "https://a.example/\n",
            "file:///etc/passwd",
        ),
        *("http://[::1/", "exec:/bin/sh", "commands", "http://" + "a" * 70 + ".example/"),
    ],
)
def test_what_is_no_url_is_refused_in_one_line(settings: Settings, url: str) -> None:
    with pytest.raises(SpecError) as refused:
        read_target(url, settings)
    assert "secret" not in refused.value.message
    assert "\n" not in refused.value.message


@sqlite_only
def test_a_receiver_that_cannot_be_reached_is_named_with_the_reason(allowed: Settings) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        assert post(f"http://127.0.0.1:{taken.getsockname()[1]}/", allowed).error == "connection refused"
    unknown = post("http://does-not-exist.invalid/", allowed)
    assert not unknown.delivered
    with Receiver() as receiver:
        assert "ssl" in (post(f"https://127.0.0.1:{receiver.port}/", allowed).error or "").lower()


# --- a command, and services through apprise ----------------------------------------------------


@contextmanager
def script(folder: Path, code: str) -> Iterator[str]:
    path = folder / "told.py"
    path.write_text(code)
    yield f"{sys.executable} {path}"


@sqlite_only
def test_the_command_of_the_settings_gets_the_event_on_its_standard_input(
    hooks: Webhooks, allowed: Settings, job_factory: Make, store: JobStore, database: Database, tmp_path: Path
) -> None:
    told = tmp_path / "told.json"
    code = f"""import os, sys
if not os.path.exists({str(told)!r} + '.1'):
    open({str(told)!r} + '.1', 'w').close()
    sys.exit('not this time')
open({str(told)!r}, 'w').write(sys.stdin.read())
"""
    with pytest.raises(ConfigError, match="no command"):
        read_target("command", allowed)
    with script(tmp_path, code) as command:
        able = replace(allowed, webhook_command=command)
        hook = hooks.create(*read_target("command", able), Filters(), "ada")
        job = job_factory()
        store.request_cancel(job.id)
        assert hooks.due("me", targets.channels(allowed)) == [], "a machine without the setting leaves it"
        with delivering(database, able):
            wait_until(lambda: hooks.deliveries(hook.id)[0].error)
            assert hooks.deliveries(hook.id)[0].error == "the command exited with 1: not this time"
            wait_until(lambda: all_delivered(hooks))
    assert told.read_text().startswith('{"type":"job.cancelled"')
    assert f'"id":{job.id}' in told.read_text()
    assert told.read_text().endswith("}\n"), "a command may append it to a file of lines"


@sqlite_only
def test_a_command_that_hangs_is_killed_with_what_it_has_started(allowed: Settings, tmp_path: Path) -> None:
    code = f"""import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])
open({str(tmp_path / "child")!r}, 'w').write(str(child.pid))
time.sleep(60)
"""
    hook = Webhook(1, "command", "command", "", ALL, "ada", 0.0, None, None, None, None)
    with script(tmp_path, code) as command:
        slow = replace(allowed, webhook_command=command, webhook_timeout_seconds=2.0)
        reply = asyncio.run(send(hook, a_test_message("i", "1", time.time()), slow))
    assert reply.error == "no answer within 2 s"
    child = int((tmp_path / "child").read_text())

    def has_ended() -> bool:
        try:
            return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    wait_until(has_ended)
    missing = replace(slow, webhook_command="/does/not/exist")
    reply = asyncio.run(send(hook, a_test_message("i", "1", time.time()), missing))
    assert reply.error == "no such file or directory"


@sqlite_only
def test_a_service_of_apprise_gets_a_sentence(
    hooks: Webhooks, allowed: Settings, job_factory: Make, store: JobStore, database: Database
) -> None:
    with Receiver(lambda number: 500 if number == 1 else 200) as receiver:
        url = f"apprise+ntfy://127.0.0.1:{receiver.port}/topic"
        with pytest.raises(AddressForbiddenError):
            read_target(url, replace(allowed, webhook_networks=""))
        hook = hooks.create(*read_target(url, allowed), Filters(), "ada")
        job = job_factory(name="faces")
        store.request_cancel(job.id)
        patient = replace(allowed, webhook_timeout_seconds=20.0, webhook_retry_seconds=0.5)
        with delivering(database, patient):
            wait_until(lambda: hooks.deliveries(hook.id)[0].error)
            failed = hooks.deliveries(hook.id)[0].error or ""
            wait_until(lambda: all_delivered(hooks))
    assert failed.startswith("Failed to send ntfy notification")
    (taken,) = receiver.taken()
    assert taken.message["topic"] == "topic"
    assert taken.message["title"] == f"ganq: job {job.id} (faces) was cancelled"
    assert taken.message["message"] == "train of tester"
    assert hooks.deliveries(hook.id)[0].attempts == 2


@sqlite_only
@pytest.mark.parametrize(
    ("url", "hosts", "part"),
    [
        ("apprise+json://8.8.8.8/x", "", "a webhook with https:// is signed"),
        ("apprise+syslog://", "", "ganq wait --notify"),
        ("apprise+nonsense://x", "", "appriseit.com"),
        ("apprise+slack://short", "", "appriseit.com"),
        ("apprise+ntfys://topic", "hooks.example", "ntfys: would allow it"),
        ("apprise+ntfy://2130706433/topic", "", "GANQ_WEBHOOK_NETWORKS"),
        ("apprise+mailto://ada:pw@a.example?smtp=127.0.0.1&to=b@a.example", "", "GANQ_WEBHOOK_NETWORKS"),
    ],
)
def test_a_service_that_may_not_be_used_is_refused(
    settings: Settings, url: str, hosts: str, part: str
) -> None:
    with pytest.raises(GanqError) as refused:
        read_target(url, replace(settings, webhook_hosts=hosts))
    assert part in (refused.value.hint or "")
    assert "pw" not in refused.value.message


@sqlite_only
def test_without_apprise_the_extra_is_named(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(ConfigError) as refused:
        read_target("apprise+ntfys://topic", settings)
    assert refused.value.hint == "pip install 'ganq[notify]'"


@sqlite_only
def test_what_nobody_delivers_is_reported_with_what_is_missing(
    hooks: Webhooks, job_factory: Make, store: JobStore, database: Database
) -> None:
    assert list(check_webhooks(database)) == []
    hooks.create("command", "command", Filters(), "ada")
    store.request_cancel(job_factory().id)
    database.write(lambda conn: conn.execute(text("UPDATE delivery SET created_at = created_at - 90")))
    (finding,) = check_webhooks(database)
    assert finding.message == "webhook 1 (command): 1 delivery waits, and nobody delivers them"
    assert (finding.hint or "").endswith("where GANQ_WEBHOOK_COMMAND is set")


@sqlite_only
def test_a_deliverer_waits_for_a_job_table_that_does_not_answer(
    hooks: Webhooks, allowed: Settings, job_factory: Make, store: JobStore, database: Database
) -> None:
    """A table that cannot be read for a while delays deliveries, and does not end them."""
    with Receiver() as receiver:
        hooks.create("http", receiver.url, Filters(), "ada")
        database.write(lambda conn: conn.execute(text("ALTER TABLE delivery RENAME TO away")))
        with delivering(database, allowed):
            time.sleep(0.3)
            database.write(lambda conn: conn.execute(text("ALTER TABLE away RENAME TO delivery")))
            store.request_cancel(job_factory().id)
            wait_until(lambda: all_delivered(hooks) and receiver.taken())


# --- chaos --------------------------------------------------------------------------------------


@pytest.mark.tier2
def test_a_thousand_events_survive_the_kills_of_all_deliverers(
    hooks: Webhooks,
    settings_env: dict[str, str],
    job_factory: Make,
    store: JobStore,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A receiver that fails every third request, and two deliverers that are killed all the time."""
    for name, value in {"NETWORKS": LOOPBACK, "RETRY_SECONDS": "0.002", "TIMEOUT_SECONDS": "5"}.items():
        monkeypatch.setenv(f"GANQ_WEBHOOK_{name}", value)
    started: list[subprocess.Popen[bytes]] = []

    def start() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", "-m", "cli.main", "webhook", "deliver"]
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        return started[-1]

    with Receiver(lambda number: 500 if number % 3 == 0 else 200) as receiver:
        hook = hooks.create("http", receiver.url, ALL, "ada")
        receiver.secret = hook.secret
        alive = [start(), start()]
        kills = 0
        try:
            for number in range(334):
                store.request_cancel(job_factory().id)
                if number % 60 == 59:
                    before = receiver.requests
                    wait_until(lambda before=before: receiver.requests > before, 90)  # type: ignore[misc]
                    for one in alive:
                        os.kill(one.pid, signal.SIGKILL)
                        one.wait()
                        kills += 1
                    alive = [start(), start()]
            wait_until(lambda: all_delivered(hooks), 300)
        finally:
            for one in alive:
                one.kill()
                one.wait()
    expected = {one.event.id for one in hooks.deliveries(limit=10_000)}
    taken = receiver.taken()
    assert len(expected) == 1002
    assert {one.event for one in taken} == expected, "none is lost"
    for job in {one.job for one in taken}:
        first = dict.fromkeys(one.event for one in taken if one.job == job)
        assert list(first) == sorted(first), "in the order of the job's events"
    refused = sum(not one.taken for one in receiver.received)
    assert all(one.status in (200, 500) for one in receiver.received), "each signature was verified"
    with capsys.disabled():
        print(
            f"\n1,002 events, {len(receiver.received)} requests, {refused} refused, {kills} kills, "
            f"{len(taken) - 1002} sent twice, 0 lost"
        )
