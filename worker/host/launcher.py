"""
`ganq worker`: one Celery process a GPU, each with a supervisor of its own.

With several GPUs this process starts one `ganq worker --gpus UUID` for each and
keeps them running; with one, or none, it becomes that worker. So with --cpu-workers, which
start one `ganq worker --cores …` for each share of the cores.
"""

import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jobs.errors import ConfigError, GpuBusyError
from storage.db.schema import prepare
from storage.settings import WORD, WORD_HINT, Settings
from worker.celery_bridge import environment
from worker.celery_bridge.notify import queue_key
from worker.celery_bridge.wakeup import WAKE_ENV, send_received
from worker.host import cores as core_units
from worker.host import gpu, logs
from worker.host.cores import Cores
from worker.host.embedded_redis import runtime_folder, worker_command
from worker.host.live_supervisors import ask_supervisors
from worker.host.process import bound_to_this
from worker.host.service_manager import ServiceManager
from worker.host.starting import until_started, wait

log = logging.getLogger("ganq.worker")

RESTART_PAUSE_S = (0.5, 2.0, 10.0, 30.0)
CELERY_GRACE_S = 8.0
SETTLE_S = 3.0
"""A worker whose parent was killed says within so long that it drains."""
LOCK_LOOK_S = 0.5
CELERY_PAUSE_S = (0.2, 0.5, 1.0, 2.0, 5.0)
NAME_TAKEN_EXIT = 5
IDLE_EXIT = 6  # the supervisor has drained, because --exit-when-idle says so
FATAL_EXIT = 4  # the supervisor says: a setting is wrong, trying again would end the same way


def launch(
    settings: Settings,
    *,
    gpus: str = "auto",
    queues: tuple[str, ...] = (),
    name: str | None = None,
    cpu_workers: int | None = None,
    cores: str | None = None,
    exit_when_idle_s: float | None = None,
) -> int:
    """
    Run workers until SIGTERM.

    Args:
        gpus: 'auto', 'all', 'none', or indices and UUIDs separated by commas.
        queues: queues to serve; the settings' by default.
        name: the worker's name; '<host>-gpu0' or '<host>-cpu' by default.
        cpu_workers: so many workers on the CPU, which share its cores.
        cores: of a worker on the CPU, those it is bound to: '0,2-3'.
        exit_when_idle_s: drain and return when no job could be claimed for this long.

    Returns:
        The exit code: 0 after a drain.

    Raises:
        GpuUnavailableError, GpuBusyError, ConfigError, StorageError: nothing was started.
    """
    _open_standard_files()
    logs.configure(settings)
    with logs.relayed(settings):
        installation = prepare(settings)
        chosen = _units(gpus, cpu_workers, cores)
        require_metrics_library(settings)
        manager = ServiceManager.from_environment(os.environ)
        queues = queues or tuple(one.strip() for one in settings.queues.split(",") if one.strip())
        require_queues(queues)
        if len(chosen) > 1:
            return Fleet(settings, chosen, queues, name, manager, exit_when_idle_s).run()
        unit = chosen[0] if chosen else None
        return Worker(settings, unit, queues, name, installation, manager, exit_when_idle_s).run()


def _units(gpus: str, cpu_workers: int | None, cores: str | None) -> Sequence[gpu.Gpu | Cores]:
    """
    What gets a worker each; none: the CPU as a whole.

    Raises:
        ConfigError: GPUs and cores were asked for at once.
    """
    if cpu_workers is None and cores is None:
        return gpu.choose(gpus)
    if gpus not in ("auto", "none") or (cpu_workers is not None and cores is not None):
        raise ConfigError("--gpus, --cpu-workers and --cores each say what to run on", hint="use one of them")
    return [core_units.parse(cores)] if cores is not None else core_units.divide(cpu_workers or 1)


def _described(unit: gpu.Gpu | Cores | None) -> str:
    """What `ganq workers` shows as the device."""
    if isinstance(unit, gpu.Gpu):
        return f"{unit.label} {unit.name}"
    return "cpu" if unit is None else f"cpu {','.join(map(str, unit.numbers))}"


def _usual_name(unit: gpu.Gpu | Cores | None) -> str:
    return f"{socket.gethostname().split('.')[0]}-{unit.label if unit else 'cpu'}"


def hold(settings: Settings, name: str, device: gpu.Gpu | None) -> list[socket.socket]:
    """
    Take the locks that make a worker the only one of its name and on its GPU.

    A service that is killed and started again finds the workers of before still saving their jobs:
    wait for workers that drain, however long they may, and refuse beside one that does not.

    Raises:
        GpuBusyError: another worker holds one of them, and stays.
    """
    stays_at, said = time.monotonic() + SETTLE_S, False
    while True:
        locks: list[socket.socket] = []
        try:
            locks.append(gpu.lock(f"worker {name}", settings.home))
            if device is not None:
                locks.append(gpu.lock(device.uuid))
            return locks
        except GpuBusyError as exc:
            for one in locks:
                one.close()
            others = ask_supervisors(settings.runtime)
            if any(one.facts.get("state") == "draining" for one in others):
                # When its supervisor has gone, Celery may take so long to follow.
                stays_at = time.monotonic() + CELERY_GRACE_S + SETTLE_S
                if not said:
                    log.warning("%s and is draining: waiting until it has ended", exc.message)
                    said = True
            if time.monotonic() > stays_at:
                raise
        time.sleep(LOCK_LOOK_S)


class Worker:
    """Celery in this process, the supervisor beside it."""

    def __init__(
        self,
        settings: Settings,
        unit: gpu.Gpu | Cores | None,
        queues: tuple[str, ...],
        name: str | None,
        installation: str,
        manager: ServiceManager | None = None,
        exit_when_idle_s: float | None = None,
    ) -> None:
        self.settings = settings
        self.manager = manager
        self.usual_name = None if name else _usual_name(unit)
        self.name = name or _usual_name(unit)
        self.number = 1
        self.installation = installation
        # And the keys of version 0.2.0 and older, until all commands and workers are upgraded.
        self.keys = [queue_key(one, mark) for mark in dict.fromkeys((installation, "")) for one in queues]
        device = unit if isinstance(unit, gpu.Gpu) else None
        folder = runtime_folder(settings)
        self.locks = hold(settings, self.name, device)
        self.environment = {
            **os.environ,
            **gpu.pin(device),
            **(unit.pin() if isinstance(unit, Cores) else {}),
            WAKE_ENV: str(folder / f"wake-{os.getpid()}.sock"),
            "GANQ_PARENT": str(os.getpid()),
            "GANQ_WORKER_NAME": self.name,
            "GANQ_WORKER_DEVICE": _described(unit),
            "GANQ_WORKER_QUEUES": ",".join(queues),
        }
        if settings.metrics_port:
            self.environment["GANQ_METRICS_PORT"] = settings.metrics_port
        if exit_when_idle_s is not None:
            self.environment["GANQ_WORKER_EXIT_WHEN_IDLE"] = str(exit_when_idle_s)
        self.app: Any = None
        self.stopping = False
        self.drained = threading.Event()
        self.exit_code = 0
        self.supervisor: subprocess.Popen[str] | None = None
        self.told: subprocess.Popen[str] | None = None

    def run(self) -> int:
        """Start the supervisor, then Celery; return when both have drained."""
        import warnings

        environment.clear(os.environ)  # before Celery is imported

        from celery.exceptions import CPendingDeprecationWarning
        from celery.platforms import SecurityWarning
        from celery.signals import task_received, worker_shutting_down

        from worker.celery_bridge.app import make_app

        # Celery warns root of pickled messages; only JSON is accepted here.
        warnings.filterwarnings("ignore", category=SecurityWarning)
        # And of a default that will change: ganq sets it.
        warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
        os.environ.update(gpu.pin(None) | {WAKE_ENV: self.environment[WAKE_ENV]})
        self.app = make_app(self.settings)
        if self.manager is not None:
            self.manager.watch(self.settings.runtime, lambda: (self.name,))
        until_started(self._start_supervisor, "the supervisor", log)
        # It also ends this process when Celery does not: no thread need be started for that then.
        keeper = threading.Thread(target=self._keep_and_leave, name="keeper", daemon=True)
        until_started(keeper.start, "the thread keeper", log)
        worker_shutting_down.connect(lambda **_: self._stop(), weak=False)
        task_received.connect(lambda **_: send_received(self.environment[WAKE_ENV]), weak=False)
        try:
            self._run_celery()
        finally:
            if self.told is not self.supervisor:
                self._stop()
            self.drained.wait(timeout=self.settings.drain_seconds + 30)
            self._remove_socket()
        return self.exit_code

    def _run_celery(self) -> None:
        """
        Celery until it is told to stop.

        A message that it cannot read, which anybody who may write to Redis can send, ends
        Celery's worker. It is then started again, the bells thrown away: the message would
        come back, and the dispatcher rings again. The supervisor works on meanwhile.
        """
        from worker.celery_bridge.app import register_task

        def on_signal(*_: Any) -> None:
            self._stop()

        arguments = ["--quiet", "worker", "--hostname", f"{self.name}@%h", "--loglevel", "WARNING"]
        arguments += ["--queues", ",".join(self.keys)]
        arguments += ["--without-gossip", "--without-mingle", "--pool", "prefork", "--concurrency", "1"]
        register_task(self.app)
        tries = 0
        while not self.stopping:
            began = time.monotonic()
            try:
                self.app.worker_main(arguments)
            except SystemExit as exc:
                log.debug("Celery left with %s", exc.code)
            for sig in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sig, on_signal)  # Celery's own mean nothing while it is not running
            if self.stopping:
                return
            tries = 0 if time.monotonic() - began > 60 else tries + 1
            log.warning("Celery's worker has ended by itself (see above); starting it again")
            again_at = time.monotonic() + CELERY_PAUSE_S[min(tries, len(CELERY_PAUSE_S) - 1)]
            while not self.stopping and time.monotonic() < again_at:
                time.sleep(0.1)
            self._throw_bells_away()

    def _throw_bells_away(self) -> None:
        from kombu.exceptions import OperationalError
        from redis.exceptions import RedisError

        try:
            with self.app.connection_for_write() as connection:
                for key in self.keys:
                    connection.default_channel.queue_purge(key)
        except (OperationalError, RedisError, OSError) as exc:
            log.debug("bells not thrown away: %s", exc)

    def _start_supervisor(self) -> None:
        # Its own session: a terminal's Ctrl-C and a group's SIGTERM go to Celery alone,
        # which passes them on once.
        self.supervisor = subprocess.Popen(
            [sys.executable, "-P", "-m", "worker.supervisor.loop"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # The locks live as long as either: a supervisor whose launcher was killed still
            # drains, with its runner on the GPU, and no second worker may begin there.
            pass_fds=[lock.fileno() for lock in self.locks],
        )

    def _keep_supervisor(self) -> None:
        """Ring for the supervisor, and start another if it dies."""
        tries = 0
        while True:
            began = time.monotonic()
            assert self.supervisor is not None
            assert self.supervisor.stdout is not None
            for line in self.supervisor.stdout:
                self._ring(line.split())
            code = self.supervisor.wait()
            if self.stopping:
                return
            if code == NAME_TAKEN_EXIT and self.usual_name is not None:
                self._take_another_name()
                self._start_supervisor()
                continue
            if code in (FATAL_EXIT, NAME_TAKEN_EXIT, IDLE_EXIT):
                self.exit_code = int(code != IDLE_EXIT)
                self.stopping = True
                if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # else Celery has not begun
                    os.kill(os.getpid(), signal.SIGTERM)
                return
            tries = 0 if time.monotonic() - began > 60 else tries + 1
            log.warning("the supervisor has ended (code %s); starting another", code)
            wait(RESTART_PAUSE_S[min(tries, len(RESTART_PAUSE_S) - 1)], lambda: self.stopping)
            # The new one dies with this thread, which lives as long as the process.
            until_started(self._start_supervisor, "the supervisor", log, lambda: self.stopping)
            if self.stopping:
                self._stop()  # one that was started meanwhile, too
                if self.supervisor.poll() is not None:
                    return

    def _take_another_name(self) -> None:
        """Two machines or containers may have one host name: 'trainer-gpu0' becomes 'trainer-gpu0-2'."""
        for number in itertools.count(self.number + 1):
            name = f"{self.usual_name}-{number}"
            try:
                lock = gpu.lock(f"worker {name}", self.settings.home)
            except GpuBusyError:
                continue
            self.locks[0].close()
            self.locks[0] = lock
            self.number, self.name = number, name
            self.environment["GANQ_WORKER_NAME"] = name
            log.warning("this worker is now named %s; --name gives it a name of its own", name)
            return

    def _ring(self, words: list[str]) -> None:
        from worker.celery_bridge.app import send_notification

        if len(words) == 3 and words[0] == "ring" and words[2].isdigit():
            try:
                send_notification(self.app, words[1], int(words[2]), self.installation)
            except Exception as exc:  # it costs seconds; without this thread there would be no supervisor
                log.debug("not rung: %s", exc)

    def _stop(self) -> None:
        """Pass a signal on, once for each that came: the second hastens the supervisor."""
        if self.manager is not None and not self.stopping:
            self.manager.stopping()
        self.stopping = True
        if self.supervisor is not None and self.supervisor.poll() is None:
            self.told = self.supervisor
            self.supervisor.terminate()

    def _keep_and_leave(self) -> None:
        """
        Keep a supervisor, and when the last has drained, end this process if Celery does not.

        It waits half a minute and more for a Redis that hangs; nothing that it still does matters.
        """
        from billiard import active_children

        self._keep_supervisor()
        self.drained.set()
        time.sleep(CELERY_GRACE_S)
        log.warning("Celery does not end (does Redis hang?): leaving without it")
        for child in active_children():
            os.kill(child.pid, signal.SIGKILL)
        self._remove_socket()
        os._exit(self.exit_code)

    def _remove_socket(self) -> None:
        Path(self.environment[WAKE_ENV]).unlink(missing_ok=True)


class Fleet:
    """
    One child `ganq worker` a GPU or a share of the cores; restarts those that fall, passes signals on.

    The children drain when this process dies, however it dies.
    """

    def __init__(
        self,
        settings: Settings,
        units: Sequence[gpu.Gpu | Cores],
        queues: tuple[str, ...],
        name: str | None,
        manager: ServiceManager | None = None,
        exit_when_idle_s: float | None = None,
    ) -> None:
        self.settings = settings
        self.manager = manager
        self.exit_when_idle_s = exit_when_idle_s
        self.units = units
        self.queues = queues
        self.name = name
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.stopping = False

    def run(self) -> int:
        """
        Raises:
            GpuBusyError: there is such a set already; nothing was started.
        """
        for one in self.units:
            for lock in hold(self.settings, self._name(one), one if isinstance(one, gpu.Gpu) else None):
                lock.close()  # for the child
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self._stop)
        if self.manager is not None:
            self.manager.watch(self.settings.runtime, self._names)
        tries: dict[str, int] = {}
        while not self.stopping and not self._all_idle():
            for one in self.units:
                child = self.children.get(one.key)
                if child is None or (child.poll() is not None and not self._is_idle(child)):
                    tries[one.key] = tries.get(one.key, -1) + 1
                    if tries[one.key]:
                        wait(
                            RESTART_PAUSE_S[min(tries[one.key], len(RESTART_PAUSE_S)) - 1],
                            lambda: self.stopping,
                        )
                    self._start(one)
            wait(1.0, lambda: self.stopping)
        codes = [child.wait() for child in self.children.values()]
        return max((abs(code) for code in codes), default=0)

    def _is_idle(self, child: "subprocess.Popen[bytes]") -> bool:
        """Return whether a child has ended because no job could be claimed."""
        return self.exit_when_idle_s is not None and child.poll() == 0

    def _all_idle(self) -> bool:
        children = self.children.values()
        return len(children) == len(self.units) and all(self._is_idle(child) for child in children)

    def _names(self) -> list[str]:
        """Return the names of the children that run, or should."""
        gone = {key for key, child in self.children.items() if self._is_idle(child)}
        return [self._name(one) for one in self.units if one.key not in gone]

    def _name(self, one: gpu.Gpu | Cores) -> str:
        return f"{self.name}-{one.label}" if self.name else _usual_name(one)

    def _metrics_option(self, one: gpu.Gpu | Cores) -> tuple[str, ...]:
        """Give each child a port of its own: the first, the one after it, …"""
        address = self.settings.metrics_address
        if address is None:
            return ()
        host, port = address
        return ("--metrics-port", f"{host}:{port + [unit.key for unit in self.units].index(one.key)}")

    def _start(self, one: gpu.Gpu | Cores) -> None:
        command = worker_command(
            *("worker", *one.arguments, "--queues", ",".join(self.queues), "--name", self._name(one)),
            *self._metrics_option(one),
            *(() if self.exit_when_idle_s is None else ("--exit-when-idle", f"{self.exit_when_idle_s:f}s")),
        )
        bound = bound_to_this(signal.SIGTERM, command)
        child = until_started(
            lambda: subprocess.Popen(bound, start_new_session=True),
            f"the worker {self._name(one)}",
            log,
            lambda: self.stopping,
        )
        if child is not None:
            self.children[one.key] = child
            if self.stopping:  # the signal came before it was in the list
                child.terminate()

    def _stop(self, *_: Any) -> None:
        if self.manager is not None and not self.stopping:
            self.manager.stopping()
        self.stopping = True
        for child in self.children.values():
            if child.poll() is None:
                child.terminate()


def _open_standard_files() -> None:
    """
    Put /dev/null where stdin, stdout or stderr was closed (`ganq worker >&-`).

    The next file that is opened would get that number, and what this process or a child
    says would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(null := os.open(os.devnull, os.O_RDWR), number)
            if null != number:
                os.close(null)
            os.set_inheritable(number, True)
        for attribute in (name, f"__{name}__"):  # Celery logs to sys.__stderr__
            if getattr(sys, attribute) is None:
                setattr(sys, attribute, os.fdopen(number, "w" if number else "r", closefd=False))


def require_metrics_library(settings: Settings) -> None:
    """
    Raises:
        ConfigError: metrics are asked for, and the library that serves them is not installed.
    """
    if settings.metrics_port and find_spec("prometheus_client") is None:
        raise ConfigError("metrics need the package prometheus-client", hint="pip install 'ganq[metrics]'")


def require_queues(queues: tuple[str, ...]) -> None:
    """
    Raises:
        ConfigError: no queue, or one whose name has characters that do not belong there.
    """
    if not queues:
        raise ConfigError("GANQ_QUEUES names no queue", hint="leave it out to serve the queue default")
    for one in queues:
        if not WORD.fullmatch(one):
            raise ConfigError(f"{one[:40]!r} cannot be a queue's name", hint=WORD_HINT)
