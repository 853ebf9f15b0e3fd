"""The local stack of `ganq up`: job table, embedded Redis and workers of one machine."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import IO

from jobs.errors import ConfigError, GpuBusyError, one_line
from storage.db.queries import Queries
from storage.db.schema import open_database, prepare
from storage.settings import Settings
from worker.host import gpu
from worker.host.embedded_redis import EmbeddedRedis, worker_command
from worker.host.process import bound_to_this

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 90.0
POLL_S = 0.5
RETRY_S = 1.0
PAGE_MIN_UPTIME_S = 5.0


class LocalStack:
    """The processes of one machine; supervise() restarts those that were killed."""

    def __init__(
        self,
        gpus: str,
        cpu_workers: int | None,
        log: IO[bytes] | None,
        redis: EmbeddedRedis | None,
        page: Sequence[str] | None,
    ) -> None:
        self.redis = redis
        self.page_arguments = page
        self.page: subprocess.Popen[bytes] | None = None
        self._page_started = 0.0
        self.arguments = ["--gpus", gpus]
        if cpu_workers is not None:
            self.arguments += ["--cpu-workers", str(cpu_workers)]
        self.log = log
        self.worker = self.start_worker()
        self.start_page()

    def start_worker(self) -> "subprocess.Popen[bytes]":
        self.worker = subprocess.Popen(
            bound_to_this(signal.SIGTERM, worker_command("worker", *self.arguments)),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )
        return self.worker

    def start_page(self) -> None:
        """Start the server of the page (`ganq web`), if there is to be one."""
        if self.page_arguments is None:
            return
        self._page_started = time.monotonic()
        self.page = subprocess.Popen(
            bound_to_this(signal.SIGTERM, worker_command("web", *self.page_arguments)),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
            start_new_session=True,
        )

    def _supervise_page(self, report: Callable[[str], None]) -> None:
        """Restart the page if it has ended, unless it ended at once; it has then printed the reason."""
        if self.page is None or self.page.poll() is None:
            return
        self.page = None
        if time.monotonic() - self._page_started < PAGE_MIN_UPTIME_S:
            report("the page has ended; ganq web starts it again")
            return
        report("the page has ended; starting it again")
        with suppress(OSError):
            self.start_page()

    def supervise(self, report: Callable[[str], None]) -> int:
        """
        Wait until the worker exits by itself; restart it, or Redis, if it was killed.

        A worker that was killed (by the OOM killer, say) leaves a job to continue; without Redis each job
        waits for the next poll.

        Args:
            report: prints a line for the user.

        Returns:
            The worker's exit code.
        """
        while True:
            time.sleep(POLL_S)
            code = self.worker.poll()
            if code is not None and code >= 0:
                return code
            if code is not None:
                report(f"the worker was killed by {signal.Signals(-code).name}; starting another")
                time.sleep(RETRY_S)
                try:
                    self.start_worker()
                except OSError as exc:
                    report(f"the worker cannot be started: {one_line(exc)}")
            self._supervise_page(report)
            if self.redis is not None and not self.redis.runs():
                report("the embedded Redis has ended or lost its socket; starting another")
                try:
                    self.redis.start()
                except OSError as exc:
                    report(f"the embedded Redis cannot be started: {one_line(exc)}")
                    time.sleep(RETRY_S)
                except ConfigError as exc:  # workers poll for jobs meanwhile
                    report(f"{exc.message} → {exc.hint}")
                    time.sleep(RETRY_S)


@contextmanager
def local_stack(
    settings: Settings,
    *,
    gpus: str = "auto",
    cpu_workers: int | None = None,
    log: IO[bytes] | None = None,
    page: Sequence[str] | None = None,
) -> Iterator[LocalStack]:
    """
    Run the local stack for as long as the block runs.

    Args:
        gpus: see worker.host.gpu.choose().
        cpu_workers: number of workers that share the CPU, instead of GPUs.
        log: file for the workers' log; this process's stderr by default.
        page: arguments of `ganq web`, which is served beside them; None: no page.

    Raises:
        ConfigError: another stack of this GANQ_HOME runs, or a part does not start.
    """
    prepare(settings)
    try:
        lock = gpu.lock("up", settings.home)
    except GpuBusyError:
        raise ConfigError(
            f"ganq up already runs for {settings.home}",
            hint="ganq workers shows it; or set another GANQ_HOME",
        ) from None
    with lock, EmbeddedRedis(settings) if settings.embedded_redis else nullcontext() as redis:
        stack = LocalStack(gpus, cpu_workers, log, redis, page)
        try:
            yield stack
        finally:
            if stack.page is not None and stack.page.poll() is None:
                stack.page.terminate()
            stop(stack.worker)


def stop(worker: subprocess.Popen[bytes]) -> None:
    """Stop the worker: it saves and requeues the running job; kill it after STOP_TIMEOUT_S."""
    if worker.poll() is None:
        worker.send_signal(signal.SIGTERM)
        try:
            worker.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


def wait_ready(settings: Settings, worker: subprocess.Popen[bytes]) -> bool:
    """Wait until a worker is registered in the job table; return False if the process ended instead."""
    database = open_database(settings)
    queries = Queries(database)
    deadline = time.monotonic() + READY_TIMEOUT_S
    try:
        while time.monotonic() < deadline:
            if worker.poll() is not None:
                return False
            if any(one.silent_s < 30 and one.state in ("idle", "busy") for one in queries.workers()):
                return True
            time.sleep(0.1)
    finally:
        database.dispose()
    return True
