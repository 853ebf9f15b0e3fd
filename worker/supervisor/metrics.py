"""
Prometheus metrics of one worker, served by its supervisor on GANQ_METRICS_PORT; off by default.

No label contains a job id, so that the number of series does not grow with the number of jobs. `instance` and
`job` are set by Prometheus; `ganq_build_info` maps an instance to the worker's name and device.
"""

import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from socketserver import ThreadingMixIn
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from jobs.errors import GanqError, one_line
from jobs.kinds import KINDS
from jobs.states import JobState, Outcome
from storage.db.rows import Lease, WorkerIdentity
from storage.settings import Settings

log = logging.getLogger("ganq.supervisor")

SCRAPE_S = 10.0
"""A client that sends or takes nothing for so long is disconnected."""
WAIT_BUCKETS = (0.1, 1, 5, 15, 60, 300, 1800, 7200, 43200)
RUN_BUCKETS = (1, 10, 60, 300, 1800, 7200, 21600, 86400)
SAVE_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300)
STALL_BUCKETS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
REQUEST_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5)
BYTE_BUCKETS = tuple(float(10**power) for power in range(4, 11))
OPERATIONS = {
    "succeed_and_claim": "finish",
    "_succeed": "finish",
    "fail": "finish",
    "crashed": "finish",
    "release": "finish",
    "cancel_done": "finish",
    "register_checkpoint": "checkpoint",
    "pin_inputs": "note",
    "note": "note",
}
"""Value of the label `operation` by the function that commits."""


class Metrics:
    """What a supervisor counts; this one counts nothing."""

    def start(self) -> None:
        """Serve the metrics."""

    def begun(self, lease: Lease) -> None:
        """Record that a claimed job begins."""

    def ended(self, lease: Lease, function: str, arguments: tuple[Any, ...], answer: Any) -> None:
        """Record the end of an attempt, committed by `function`, which has returned `answer`."""

    def lease_lost(self) -> None:
        """Record that the lease of the current job is lost."""

    def idle(self) -> None:
        """Record that this worker has no job."""

    def rescued(self, number: int) -> None:
        """Record jobs that the reaper has requeued."""

    def message(self, lease: Lease, message: Mapping[str, Any]) -> None:
        """Record a message of the runner."""

    def request(self, operation: str) -> AbstractContextManager[None]:
        """Measure a request to the job table."""
        return nullcontext()


def make_metrics(settings: Settings, who: WorkerIdentity) -> Metrics:
    """Return the metrics that the settings ask for."""
    address = settings.metrics_address
    return Metrics() if address is None else PrometheusMetrics(who, *address)


class PrometheusMetrics(Metrics):
    """Counters, histograms and gauges in a registry of their own."""

    def __init__(self, who: WorkerIdentity, host: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.host, self.port = host, port
        self.server: WSGIServer | None = None
        self.registry = here = CollectorRegistry(auto_describe=True)
        of_job = ("kind", "queue")
        self.wait = Histogram(
            "ganq_job_wait_seconds",
            "Time from submission to the first claim.",
            of_job,
            buckets=WAIT_BUCKETS,
            registry=here,
        )
        self.run = Histogram(
            "ganq_job_run_seconds", "Duration of an attempt.", of_job, buckets=RUN_BUCKETS, registry=here
        )
        self.finished = Counter(
            "ganq_jobs_finished", "Jobs that ended here.", ("kind", "outcome", "code"), registry=here
        )
        self.attempts = Counter(
            "ganq_attempts", "Attempts that ended here, by outcome.", ("outcome",), registry=here
        )
        self.rescues = Counter(
            "ganq_rescues", "Jobs of unresponsive workers that this worker requeued.", registry=here
        )
        self.losses = Counter(
            "ganq_lease_losses", "Leases that this worker lost while it ran the job.", registry=here
        )
        self.saves = Histogram(
            "ganq_checkpoint_seconds",
            "Time to write and sync a checkpoint; training continues meanwhile.",
            buckets=SAVE_BUCKETS,
            registry=here,
        )
        self.saved = Histogram(
            "ganq_checkpoint_bytes", "Size of a checkpoint.", buckets=BYTE_BUCKETS, registry=here
        )
        self.missed = Counter(
            "ganq_checkpoints_missed",
            "Checkpoints that could not be saved, as on a full disk.",
            registry=here,
        )
        self.stalls = Histogram(
            "ganq_training_stall_seconds",
            "Longest time for which a finished training was blocked by a checkpoint.",
            buckets=STALL_BUCKETS,
            registry=here,
        )
        self.images = Counter("ganq_images", "Images trained on or generated.", ("phase",), registry=here)
        self.requests = Histogram(
            "ganq_database_request_seconds",
            "Duration of a request to the job table.",
            ("operation",),
            buckets=REQUEST_BUCKETS,
            registry=here,
        )
        self.busy = Gauge("ganq_worker_busy", "1 while the worker runs a job.", registry=here)
        info = Gauge(
            "ganq_build_info",
            "Version, name and device of the worker.",
            ("version", "worker", "device"),
            registry=here,
        )
        info.labels(who.version, who.name, who.device).set(1)
        # Series exist from the beginning: increase() does not see a counter that appears with a value.
        for outcome in Outcome:
            self.attempts.labels(outcome)
        for kind in KINDS:
            self.finished.labels(kind, JobState.FAILED, "CRASH_LOOP")
        for phase in ("train", "generate"):
            self.images.labels(phase)
        here.register(cast(Any, GpuCollector(os.environ.get("CUDA_VISIBLE_DEVICES", ""))))
        self._counted: int | None = None

    # --- served ---------------------------------------------------------------------------

    def start(self) -> None:
        from prometheus_client import make_wsgi_app

        try:
            self.server = _Server((self.host, self.port), _Handler)
        except (OSError, OverflowError) as exc:
            why = one_line(exc)
            log.warning("no metrics: port %s of %s cannot be used (%s)", self.port, self.host, why)
            return
        self.server.set_app(make_wsgi_app(self.registry))
        threading.Thread(target=self.server.serve_forever, name="metrics", daemon=True).start()
        log.info("metrics: http://%s:%s/metrics", self.host, self.port)

    # --- counted --------------------------------------------------------------------------

    def begun(self, lease: Lease) -> None:
        job = lease.job
        self.busy.set(1)
        self._counted = 0 if lease.attempt == 1 else None
        if lease.attempt == 1 and job.started_at is not None:
            self.wait.labels(job.kind, job.queue).observe(max(job.started_at - job.created_at, 0.0))

    def ended(self, lease: Lease, function: str, arguments: tuple[Any, ...], answer: Any) -> None:
        job = lease.job
        self.run.labels(job.kind, job.queue).observe(lease.ran_s)
        if isinstance(answer, JobState):
            state = answer
        else:
            state = JobState.CANCELLED if function == "cancel_done" else JobState.SUCCEEDED
        if function == "crashed" and state is not JobState.CANCELLED:
            outcome = Outcome.CRASHED
        elif state is JobState.QUEUED:
            outcome = Outcome.REQUEUED if function == "release" else Outcome.RETRIED
        else:
            outcome = Outcome(state)
        self.attempts.labels(outcome).inc()
        if state is JobState.QUEUED:
            return
        error = next((one for one in arguments if isinstance(one, GanqError)), None)
        code = "" if state is not JobState.FAILED else error.code if error is not None else "CRASH_LOOP"
        self.finished.labels(job.kind, state, code).inc()
        result = next((one for one in arguments if isinstance(one, dict)), {})
        if isinstance(stall_s := result.get("longest_stall_s"), float | int):
            self.stalls.observe(stall_s)

    def lease_lost(self) -> None:
        self.losses.inc()

    def idle(self) -> None:
        self.busy.set(0)

    def rescued(self, number: int) -> None:
        self.rescues.inc(number)

    def message(self, lease: Lease, message: Mapping[str, Any]) -> None:
        op = message["op"]
        if op == "progress":
            self._progress(lease, message["progress"])
        elif op == "checkpoint":
            self.saved.observe(message["bytes"])
            if message.get("seconds") is not None:
                self.saves.observe(message["seconds"])
        elif op == "event" and message["type"] == "checkpoint_save_failed":
            self.missed.inc()

    def _progress(self, lease: Lease, facts: Mapping[str, Any]) -> None:
        """Count the images since the last report of this attempt."""
        kind, done = lease.job.kind, facts["done"]
        if kind not in ("train", "generate") or facts.get("phase") in ("reading images", "merging shards"):
            return
        if self._counted is None:  # a resumed training begins with what earlier attempts have done
            self._counted = max(done - int(lease.job.spec.get("batch", 0)), 0) if kind == "train" else 0
        if done > self._counted:
            self.images.labels(kind).inc(done - self._counted)
        self._counted = done  # a rollback goes back

    @contextmanager
    def request(self, operation: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            operation = OPERATIONS.get(operation, operation)
            self.requests.labels(operation).observe(time.monotonic() - began)


class GpuCollector:
    """
    Utilisation and memory of this worker's GPU, read from NVML at each scrape.

    Without nvidia-ml-py or a driver there are no such metrics.

    Args:
        uuid: of the GPU or the MIG instance; empty on the CPU.
    """

    def __init__(self, uuid: str) -> None:
        self.uuid = uuid
        self.reading = threading.Lock()

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import GaugeMetricFamily

        used = GaugeMetricFamily("ganq_worker_gpu_memory_used_bytes", "Memory in use on the worker's GPU.")
        busy = GaugeMetricFamily(
            "ganq_worker_gpu_utilization_ratio", "Utilisation of the worker's GPU, 0 to 1."
        )
        # A driver that hangs blocks one scrape, not each that follows.
        if self.uuid and find_spec("pynvml") is not None and self.reading.acquire(blocking=False):
            try:
                self._read(used, busy)
            finally:
                self.reading.release()
        yield used
        yield busy

    def _read(self, used: Any, busy: Any) -> None:
        import pynvml

        try:
            pynvml.nvmlInit()
            gpu = pynvml.nvmlDeviceGetHandleByUUID(self.uuid)
            used.add_metric([], pynvml.nvmlDeviceGetMemoryInfo(gpu).used)
            busy.add_metric([], pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100)
        except pynvml.NVMLError as exc:  # no driver; or a MIG instance, which has no utilisation
            log.debug("GPU not read: %s", exc)


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Handler(WSGIRequestHandler):
    timeout = SCRAPE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Write no line for each scrape."""
