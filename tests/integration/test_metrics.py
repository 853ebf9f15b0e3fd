"""Prometheus metrics of real workers and of the job table, and what reads them: alerts, dashboard."""

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from machine import Ganq, part, until
from services import Redis, Server, free_port

from jobs.errors import DiskFullError
from jobs.states import JobState
from storage.db.engine import Database
from storage.db.rows import Job, Lease, WorkerIdentity
from storage.db.store import JobStore
from storage.settings import Settings
from worker.supervisor.metrics import GpuCollector, PrometheusMetrics
from worker.table_metrics import TableMetrics

prometheus_client = pytest.importorskip(
    "prometheus_client", reason="the extra ganq[metrics] is not installed"
)

DEPLOY = Path(__file__).parents[2] / "deploy"
sqlite_only = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
NAME = re.compile(r"\bganq_[a-z_]+")


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def values(text: str, name: str) -> dict[str, float]:
    """Return the samples of a metric by their labels, as text."""
    found = re.findall(rf"^{name}(?:{{(.*)}})? (\S+)$", text, re.MULTILINE)
    return {labels: float(value) for labels, value in found}


def port_is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


# --- workers ------------------------------------------------------------------------------


@pytest.mark.slow
@sqlite_only
def test_a_worker_counts_its_jobs_checkpoints_and_images(
    ganq: Ganq, redis_url: str, small: list[str]
) -> None:
    port = free_port()
    ganq.start_worker(options=("--gpus", "none", "--metrics-port", str(port)))
    ganq("submit", "train", *small, "--epochs", "2", "--wait")
    ganq("submit", "generate", "--count", "24", "--wait")

    def published() -> str:
        text = scrape(port)
        return text if sum(values(text, "ganq_jobs_finished_total").values()) >= 2 else ""

    text = until(published, what="two finished jobs")
    finished = values(text, "ganq_jobs_finished_total")
    assert finished['code="",kind="train",outcome="succeeded"'] == 1
    assert finished['code="",kind="generate",outcome="succeeded"'] == 1
    assert finished['code="CRASH_LOOP",kind="train",outcome="failed"'] == 0
    assert values(text, "ganq_attempts_total")['outcome="succeeded"'] == 2
    images = values(text, "ganq_images_total")
    assert images == {'phase="train"': 192, 'phase="generate"': 24}
    assert values(text, "ganq_checkpoint_seconds_count")[""] >= 1
    assert values(text, "ganq_checkpoint_bytes_sum")[""] > 1000
    assert values(text, "ganq_training_stall_seconds_count")[""] == 1
    assert values(text, "ganq_job_wait_seconds_count")['kind="train",queue="default"'] == 1
    assert values(text, "ganq_job_run_seconds_count")['kind="generate",queue="default"'] == 1
    operations = set(values(text, "ganq_database_request_seconds_count"))
    assert {f'operation="{one}"' for one in ("claim", "checkpoint", "finish", "reap")} <= operations
    assert values(text, "ganq_worker_busy")[""] == 0
    assert 'worker="w1"' in next(iter(values(text, "ganq_build_info")))
    assert "job_id" not in text


@pytest.mark.slow
@sqlite_only
def test_metrics_are_off_by_default_and_then_on_the_loopback_only(ganq: Ganq, redis_url: str) -> None:
    worker = ganq.start_worker(GANQ_METRICS_PORT=str(port := free_port()))
    until(lambda: port_is_open(port), what="the port")
    supervisor = part(worker, "worker.supervisor.loop")
    assert supervisor is not None
    listening = [one.laddr for one in supervisor.net_connections() if one.status == "LISTEN"]
    assert listening == [("127.0.0.1", port)]
    other = ganq.start_worker("w2")
    until(lambda: "w2" in ganq.present(), what="the other worker")
    quiet = part(other, "worker.supervisor.loop")
    assert quiet is not None
    assert [one for one in quiet.net_connections() if one.status == "LISTEN"] == []


@pytest.mark.slow
@sqlite_only
def test_a_port_that_is_taken_costs_one_line_and_no_job(ganq: Ganq, redis_url: str, small: list[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ganq.start_worker(options=("--gpus", "none", "--metrics-port", str(port)))
        ganq("submit", "train", *small, "--epochs", "1", "--wait")
    assert ganq.log().count(f"no metrics: port {port} of 127.0.0.1 cannot be used") == 1


@pytest.mark.tier2
@sqlite_only
def test_clients_that_send_nothing_do_not_keep_others_from_scraping(ganq: Ganq, redis_url: str) -> None:
    port = free_port()
    ganq.start_worker(options=("--gpus", "none", "--metrics-port", str(port)))
    until(lambda: port_is_open(port), what="the port")
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    began = time.monotonic()
    assert "ganq_build_info" in scrape(port)
    assert time.monotonic() - began < 5
    for one in silent:
        one.settimeout(30)
        assert one.recv(1) == b""  # the worker hangs up by itself
        one.close()


@sqlite_only
@pytest.mark.parametrize("wrong", ["0", "65536", "http", "127.0.0.1:", "-1"])
def test_a_port_that_is_none_is_refused(ganq: Ganq, wrong: str) -> None:
    done = ganq.run("worker", "--gpus", "none", f"--metrics-port={wrong}")
    assert done.returncode == 2
    assert "is not a port" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_resumed_training_counts_only_what_this_attempt_adds(
    running_job_factory: Callable[..., Lease], worker_identity: WorkerIdentity
) -> None:
    from dataclasses import replace

    lease = replace(running_job_factory(spec={"data": "/pictures", "batch": 16}), attempt=2)
    metrics = PrometheusMetrics(worker_identity, "127.0.0.1", 1)
    metrics.begun(lease)
    for done in (1600, 1616, 1632):
        metrics.message(lease, {"op": "progress", "progress": {"done": done, "total": 9600}})
    assert metrics.registry.get_sample_value("ganq_images_total", {"phase": "train"}) == 48


QUEUED, FAILED, CANCELLED = JobState.QUEUED, JobState.FAILED, JobState.CANCELLED


@sqlite_only
@pytest.mark.parametrize(
    ("function", "answer", "outcome", "finished"),
    [
        ("fail", QUEUED, "retried", None),
        ("fail", FAILED, "failed", ("failed", "DISK_FULL")),
        ("fail", CANCELLED, "cancelled", ("cancelled", "")),
        ("crashed", QUEUED, "crashed", None),
        ("crashed", FAILED, "crashed", ("failed", "CRASH_LOOP")),
        ("crashed", CANCELLED, "cancelled", ("cancelled", "")),
        ("release", QUEUED, "requeued", None),
        ("release", CANCELLED, "cancelled", ("cancelled", "")),
        ("cancel_done", None, "cancelled", ("cancelled", "")),
        ("succeed", None, "succeeded", ("succeeded", "")),
    ],
)
def test_an_end_is_counted_by_outcome_and_code(
    function: str,
    answer: JobState | None,
    outcome: str,
    finished: tuple[str, str] | None,
    running_job_factory: Callable[..., Lease],
    worker_identity: WorkerIdentity,
) -> None:
    assert hasattr(JobStore, function), "the supervisor's commits have these names"
    arguments: dict[str, Any] = {"fail": DiskFullError("no room"), "succeed": {"longest_stall_s": 0.02}}
    metrics = PrometheusMetrics(worker_identity, "127.0.0.1", 1)
    lease = running_job_factory()
    metrics.begun(lease)
    metrics.ended(lease, function, (lease, arguments.get(function, "why")), answer)
    sample = metrics.registry.get_sample_value
    assert sample("ganq_attempts_total", {"outcome": outcome}) == 1
    text = prometheus_client.generate_latest(metrics.registry).decode()
    counted = {labels for labels, number in values(text, "ganq_jobs_finished_total").items() if number}
    if finished is None:
        assert counted == set()
    else:
        state, code = finished
        assert counted == {f'code="{code}",kind="train",outcome="{state}"'}
    assert sample("ganq_training_stall_seconds_count") == (function == "succeed")


def test_without_a_driver_there_is_no_gpu_metric_and_no_error() -> None:
    families = list(GpuCollector("GPU-00000000-0000-0000-0000-000000000000").collect())
    assert [one.samples for one in families] == [[], []]


def test_the_gpu_is_read_by_its_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test machine need have a GPU: NVML itself is replaced."""
    from types import SimpleNamespace

    asked = []

    def handle(uuid: str) -> str:
        asked.append(uuid)
        return "gpu"

    fake = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetMemoryInfo=lambda _: SimpleNamespace(used=5_000_000),
        nvmlDeviceGetUtilizationRates=lambda _: SimpleNamespace(gpu=87),
        NVMLError=RuntimeError,
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    used, busy = list(GpuCollector("GPU-1").collect())
    assert (asked, used.samples[0].value, busy.samples[0].value) == (["GPU-1"], 5_000_000, 0.87)


# --- the job table ------------------------------------------------------------------------


@pytest.fixture
def table_registry(database: Database, settings: Settings) -> Any:
    settings.volume.mkdir(parents=True)
    registry = prometheus_client.CollectorRegistry()
    registry.register(TableMetrics(database, settings))
    return registry


def test_the_table_reports_jobs_by_state_and_0_for_an_empty_queue(
    database: Database,
    settings: Settings,
    redis_url: str,
    job_factory: Callable[..., Job],
    running_job_factory: Callable[..., Lease],
    store: Any,
    monkeypatch: pytest.MonkeyPatch,
    table_registry: Any,
) -> None:
    first = job_factory(queue="urgent")
    store.hold(job_factory().id, held=True)
    running_job_factory(kind="generate")
    sample = table_registry.get_sample_value
    assert sample("ganq_jobs", {"state": "queued", "kind": "train", "queue": "urgent"}) == 1
    assert sample("ganq_jobs", {"state": "held", "kind": "train", "queue": "default"}) == 1
    assert sample("ganq_jobs", {"state": "running", "kind": "generate", "queue": "default"}) == 1
    assert sample("ganq_queue_claimable_jobs", {"queue": "urgent"}) == 1
    assert sample("ganq_queue_claimable_jobs", {"queue": "default"}) == 0
    assert 0 < sample("ganq_queue_oldest_wait_seconds", {"queue": "urgent"}) < 60
    assert sample("ganq_queue_oldest_wait_seconds", {"queue": "default"}) == 0
    assert sample("ganq_notifications_waiting", {"queue": "default"}) == 0
    assert sample("ganq_workers", {"state": "idle"}) == 0
    assert sample("ganq_volume_free_bytes") > 0
    assert sample("ganq_job_table_up") == 1

    store.request_cancel(first.id)
    assert sample("ganq_queue_claimable_jobs", {"queue": "urgent"}) == 1, "kept for 15 s"
    monkeypatch.setattr("worker.table_metrics.CACHE_S", 0.0)
    assert sample("ganq_queue_claimable_jobs", {"queue": "urgent"}) == 0
    assert sample("ganq_jobs", {"state": "queued", "kind": "train", "queue": "urgent"}) == 0


def test_a_job_table_that_is_away_is_reported_and_so_is_a_redis(
    database: Database, settings: Settings, table_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.errors import DatabaseUnavailableError

    def away(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailableError("the job table does not answer")

    monkeypatch.setattr(database, "read", away)
    text = prometheus_client.generate_latest(table_registry).decode()
    assert values(text, "ganq_job_table_up") == {"": 0}
    assert values(text, "ganq_notifications_waiting") == {}
    assert values(text, "ganq_workers") == {}


@pytest.mark.slow
@sqlite_only
def test_the_web_server_reports_the_table_to_a_scrape_with_its_token(ganq: Ganq, small: list[str]) -> None:
    token, port = ganq.folder / "token", free_port()
    token.write_text("t" * 43 + "\n")
    token.chmod(0o600)
    ganq("submit", "train", *small)
    command = [sys.executable, "-P", "-m", "cli.main", "web", f"--port={port}", f"--token-file={token}"]
    with subprocess.Popen(command, env=ganq.env, cwd=ganq.folder, stderr=subprocess.DEVNULL) as server:
        try:
            until(lambda: port_is_open(port), what="the port")
            request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics")
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=10)
            request.add_header("Authorization", "Bearer " + "t" * 43)
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read().decode()
        finally:
            server.terminate()
    assert values(text, "ganq_queue_claimable_jobs") == {'queue="default"': 1}


# --- alerts and dashboard -----------------------------------------------------------------


def existing(table_registry: Any, who: WorkerIdentity) -> set[str]:
    """Return the names of all series that ganq exposes."""
    names = set()
    for registry in (PrometheusMetrics(who, "127.0.0.1", 1).registry, table_registry):
        for family in registry.collect():
            endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
            names |= {family.name + ending for ending in endings.get(family.type, [""])}
    return names


@sqlite_only
def test_alerts_and_dashboard_query_only_metrics_that_exist(
    table_registry: Any, worker_identity: WorkerIdentity
) -> None:
    names = existing(table_registry, worker_identity)
    dashboard = json.loads((DEPLOY / "grafana" / "ganq.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = yaml.safe_load((DEPLOY / "prometheus" / "ganq.rules.yml").read_text())["groups"][0]["rules"]
    queries += [rule["expr"] for rule in rules]
    asked = {name for query in queries for name in NAME.findall(query)}
    assert len(queries) > 30
    assert asked <= names, f"no such metric: {asked - names}"
    panels = [panel["id"] for panel in dashboard["panels"]]
    assert len(panels) == len(set(panels))


@sqlite_only
def test_the_operations_page_names_every_metric(table_registry: Any, worker_identity: WorkerIdentity) -> None:
    page = (DEPLOY.parent / "docs" / "deploy" / "monitoring.md").read_text()
    missing = []
    for name in existing(table_registry, worker_identity):
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        if not re.search(rf"\b{base}\b", page):
            missing.append(base)
    assert missing == []


@needs_promtool
def test_the_alerts_fire_when_they_should_and_not_otherwise() -> None:
    for command in (["check", "rules", "ganq.rules.yml"], ["test", "rules", "ganq.rules.test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_example_configuration_is_valid() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", "prometheus.yml"],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


class Prometheus(Server):
    """A real server that scrapes every second and evaluates ganq's alerts."""

    def __init__(self, targets: list[int]) -> None:
        super().__init__()
        self.port = free_port()
        shutil.copy(DEPLOY / "prometheus" / "ganq.rules.yml", self.folder)
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["ganq.rules.yml"],
            "scrape_configs": [
                {
                    "job_name": "ganq",
                    "static_configs": [{"targets": [f"127.0.0.1:{target}" for target in targets]}],
                }
            ],
        }
        (self.folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.start(
            [
                "prometheus",
                f"--config.file={self.folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={self.folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
            ],
            lambda: port_is_open(self.port),
        )

    def ask(self, path: str, **query: str) -> Any:
        from urllib.parse import urlencode

        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]

    def value(self, query: str) -> float | None:
        result = self.ask("query", query=query)["result"]
        return float(result[0]["value"][1]) if result else None


@pytest.fixture
def table_port(table_registry: Any) -> Iterator[int]:
    server, thread = prometheus_client.start_http_server(0, "127.0.0.1", table_registry)
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.tier2
@sqlite_only
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_a_real_prometheus_scrapes_a_worker_and_the_table(
    ganq: Ganq, redis_server: Redis, small: list[str], table_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.table_metrics.CACHE_S", 0.5)
    port = free_port()
    with Prometheus([port, table_port]) as prometheus:
        worker = ganq.start_worker(options=("--gpus", "none", "--metrics-port", str(port)))
        ganq("submit", "train", *small, "--epochs", "2", "--wait")
        until(
            lambda: prometheus.value('ganq_jobs_finished_total{outcome="succeeded"}') == 1,
            what="the finished job",
        )
        until(lambda: prometheus.value("sum(up)") == 2, what="both scraped")
        assert prometheus.value('ganq_images_total{phase="train"}') == 192
        until(lambda: prometheus.value('ganq_workers{state="idle"}') == 1, what="the idle worker")
        rules = prometheus.ask("rules")["groups"][0]["rules"]
        assert {rule["health"] for rule in rules} == {"ok"}

        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
        ganq("submit", "train", *small, "--epochs", "2")
        until(
            lambda: (
                {one["labels"]["alertname"] for one in prometheus.ask("alerts")["alerts"]}
                >= {"GanqNoWorkers"}
            ),
            what="the alert that no worker is there",
        )
