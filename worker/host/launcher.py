"""
The launcher, `ganq worker`: one Celery process per GPU, each with its own supervisor.

With several GPUs this process starts one `ganq worker --gpus UUID` for each and keeps them running; with
one or none it becomes that worker. In the same way --cpu-workers starts one `ganq worker --cores …` for
each share of the cores.
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
from storage.settings import NAME_HINT, WORKER_NAME_PATTERN, Settings
from worker.celery_bridge import environment
from worker.celery_bridge.notify import queue_key
from worker.celery_bridge.wakeup import WAKE_ENV, send_received
from worker.host import cores as cpu_cores
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
DRAIN_NOTICE_S = 3.0
"""A worker whose parent was killed reports within so long that it drains."""
LOCK_POLL_S = 0.5
CELERY_PAUSE_S = (0.2, 0.5, 1.0, 2.0, 5.0)
NAME_TAKEN_EXIT = 5
DRAIN_EXIT = 7  # exit code of a supervisor that has drained because of `ganq drain`
IDLE_EXIT = 6  # exit code of a supervisor that has drained because of --exit-when-idle
FLEET_ENV = "GANQ_WORKER_IN_FLEET"
"""Environment variable of a worker that a Fleet has started."""
FATAL_EXIT = 4  # exit code of a supervisor that would fail again, e.g. because a setting is wrong


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
        cpu_workers: number of workers on the CPU, which share its cores.
        cores: cores to which a worker on the CPU is bound: '0,2-3'.
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
        devices = _devices(gpus, cpu_workers, cores)
        require_metrics_library(settings)
        manager = ServiceManager.from_environment(os.environ)
        queues = queues or tuple(one.strip() for one in settings.queues.split(",") if one.strip())
        require_queues(queues)
        if len(devices) > 1:
            return Fleet(settings, devices, queues, name, manager, exit_when_idle_s).run()
        device = devices[0] if devices else None
        return Worker(settings, device, queues, name, installation, manager, exit_when_idle_s).run()


Device = gpu.Gpu | Cores


def _devices(gpus: str, cpu_workers: int | None, cores: str | None) -> Sequence[Device]:
    """
    Return the devices that get one worker each; none: one worker on all cores.

    Raises:
        ConfigError: GPUs and cores were requested at once.
    """
    if cpu_workers is None and cores is None:
        return gpu.choose(gpus)
    if gpus not in ("auto", "none") or (cpu_workers is not None and cores is not None):
        raise ConfigError("--gpus, --cpu-workers and --cores exclude each other", hint="use one of them")
    return [cpu_cores.parse(cores)] if cores is not None else cpu_cores.divide(cpu_workers or 1)


def _describe(device: Device | None) -> str:
    """Return the device as `ganq workers` shows it."""
    if isinstance(device, gpu.Gpu):
        return f"{device.label} {device.name}"
    return "cpu" if device is None else f"cpu {','.join(map(str, device.numbers))}"


def _default_name(device: Device | None) -> str:
    return f"{socket.gethostname().split('.')[0]}-{device.label if device else 'cpu'}"


def acquire_locks(settings: Settings, name: str, device: gpu.Gpu | None) -> list[socket.socket]:
    """
    Acquire the locks on a worker's name and on its GPU.

    When a service is killed and started again, the previous workers may still be saving their jobs: wait
    for workers that drain, as long as that takes, and fail beside one that does not.

    Raises:
        GpuBusyError: another worker holds one of the locks, and does not drain.
    """
    give_up_at, logged = time.monotonic() + DRAIN_NOTICE_S, False
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
                # After its supervisor has exited, Celery may take that long to follow.
                give_up_at = time.monotonic() + CELERY_GRACE_S + DRAIN_NOTICE_S
                if not logged:
                    log.warning("%s and is draining: waiting until it has exited", exc.message)
                    logged = True
            if time.monotonic() > give_up_at:
                raise
        time.sleep(LOCK_POLL_S)


class Worker:
    """Runs Celery in this process and the supervisor as a child process."""

    def __init__(
        self,
        settings: Settings,
        device: Device | None,
        queues: tuple[str, ...],
        name: str | None,
        installation: str,
        manager: ServiceManager | None = None,
        exit_when_idle_s: float | None = None,
    ) -> None:
        self.settings = settings
        self.manager = manager
        self.default_name = None if name else _default_name(device)
        self.name = name or _default_name(device)
        self.name_number = 1
        self.installation = installation
        # And the keys of version 0.2.0 and older, until all commands and workers are upgraded.
        self.keys = [queue_key(one, prefix) for prefix in dict.fromkeys((installation, "")) for one in queues]
        used_gpu = device if isinstance(device, gpu.Gpu) else None
        folder = runtime_folder(settings)
        self.locks = acquire_locks(settings, self.name, used_gpu)
        self.environment = {
            **os.environ,
            **gpu.pin(used_gpu),
            **(device.pin() if isinstance(device, Cores) else {}),
            WAKE_ENV: str(folder / f"wake-{os.getpid()}.sock"),
            "GANQ_PARENT": str(os.getpid()),
            "GANQ_WORKER_NAME": self.name,
            "GANQ_WORKER_DEVICE": _describe(device),
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
        self.signalled: subprocess.Popen[str] | None = None
        """The supervisor to which SIGTERM was sent."""

    def run(self) -> int:
        """Start the supervisor, then Celery; return the exit code when both have drained."""
        import warnings

        environment.clear(os.environ)  # before Celery is imported

        from celery.exceptions import CPendingDeprecationWarning
        from celery.platforms import SecurityWarning
        from celery.signals import task_received, worker_shutting_down

        from worker.celery_bridge.app import make_app

        # Celery warns about running as root, because of pickled messages; only JSON is accepted here.
        warnings.filterwarnings("ignore", category=SecurityWarning)
        # And about a default that will change: ganq sets it.
        warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
        os.environ.update(gpu.pin(None) | {WAKE_ENV: self.environment[WAKE_ENV]})
        self.app = make_app(self.settings)
        if self.manager is not None:
            self.manager.watch(self.settings.runtime, lambda: (self.name,))
        until_started(self._start_supervisor, "the supervisor", log)
        # This thread also ends the process if Celery does not, when no thread may be available any more.
        keeper = threading.Thread(target=self._keep_supervisor_and_exit, name="keeper", daemon=True)
        until_started(keeper.start, "the thread keeper", log)
        worker_shutting_down.connect(lambda **_: self._stop(), weak=False)
        task_received.connect(lambda **_: send_received(self.environment[WAKE_ENV]), weak=False)
        try:
            self._run_celery()
        finally:
            if self.signalled is not self.supervisor:
                self._stop()
            self.drained.wait(timeout=self.settings.drain_seconds + 30)
            self._remove_socket()
        return self.exit_code

    def _run_celery(self) -> None:
        """
        Run Celery until SIGTERM.

        A message that Celery cannot read, which anybody who may write to Redis can send, ends its worker.
        It is then restarted after the queues were emptied, as the message would be delivered again. The
        dispatcher notifies again; the supervisor works on meanwhile.
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
                log.debug("Celery exited with %s", exc.code)
            for sig in (signal.SIGTERM, signal.SIGINT):
                signal.signal(sig, on_signal)  # Celery's handlers do nothing while it is not running
            if self.stopping:
                return
            tries = 0 if time.monotonic() - began > 60 else tries + 1
            log.warning("Celery's worker has ended by itself (see above); restarting it")
            again_at = time.monotonic() + CELERY_PAUSE_S[min(tries, len(CELERY_PAUSE_S) - 1)]
            while not self.stopping and time.monotonic() < again_at:
                time.sleep(0.1)
            self._purge_notifications()

    def _purge_notifications(self) -> None:
        from kombu.exceptions import OperationalError
        from redis.exceptions import RedisError

        try:
            with self.app.connection_for_write() as connection:
                for key in self.keys:
                    connection.default_channel.queue_purge(key)
        except (OperationalError, RedisError, OSError) as exc:
            log.debug("notifications are not purged: %s", exc)

    def _start_supervisor(self) -> None:
        # In its own session: a terminal's Ctrl-C and a process group's SIGTERM reach Celery alone,
        # which forwards them once.
        self.supervisor = subprocess.Popen(
            [sys.executable, "-P", "-m", "worker.supervisor.loop"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Both processes hold the locks: a supervisor whose launcher was killed still drains, with its
            # runner on the GPU, and no second worker may start there.
            pass_fds=[lock.fileno() for lock in self.locks],
        )

    def _keep_supervisor(self) -> None:
        """Send the supervisor's notifications, and start another supervisor if it dies."""
        tries = 0
        while True:
            began = time.monotonic()
            assert self.supervisor is not None
            assert self.supervisor.stdout is not None
            for line in self.supervisor.stdout:
                self._notify(line.split())
            code = self.supervisor.wait()
            if self.stopping:
                return
            if code == NAME_TAKEN_EXIT and self.default_name is not None:
                self._choose_another_name()
                self._start_supervisor()
                continue
            if code in (FATAL_EXIT, NAME_TAKEN_EXIT, IDLE_EXIT, DRAIN_EXIT):
                self.exit_code = int(code not in (IDLE_EXIT, DRAIN_EXIT))
                if code == DRAIN_EXIT and FLEET_ENV in os.environ:
                    self.exit_code = DRAIN_EXIT  # the fleet starts no other
                self.stopping = True
                if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:  # else Celery has not started
                    os.kill(os.getpid(), signal.SIGTERM)
                return
            tries = 0 if time.monotonic() - began > 60 else tries + 1
            log.warning("the supervisor has ended (code %s); starting another", code)
            wait(RESTART_PAUSE_S[min(tries, len(RESTART_PAUSE_S) - 1)], lambda: self.stopping)
            # The new one dies with this thread, which runs as long as the process.
            until_started(self._start_supervisor, "the supervisor", log, lambda: self.stopping)
            if self.stopping:
                self._stop()  # one that was started meanwhile, too
                if self.supervisor.poll() is not None:
                    return

    def _choose_another_name(self) -> None:
        """Append a number, 'trainer-gpu0-2', where two machines or containers have one host name."""
        for number in itertools.count(self.name_number + 1):
            name = f"{self.default_name}-{number}"
            try:
                lock = gpu.lock(f"worker {name}", self.settings.home)
            except GpuBusyError:
                continue
            self.locks[0].close()
            self.locks[0] = lock
            self.name_number, self.name = number, name
            self.environment["GANQ_WORKER_NAME"] = name
            log.warning("this worker is now named %s; --name sets another name", name)
            return

    def _notify(self, words: list[str]) -> None:
        from worker.celery_bridge.app import send_notification

        if len(words) == 3 and words[0] == "notify" and words[2].isdigit():
            try:
                send_notification(self.app, words[1], int(words[2]), self.installation)
            except Exception as exc:  # if this thread ended, no supervisor would be restarted
                log.debug("no notification is sent: %s", exc)

    def _stop(self) -> None:
        """Forward each signal to the supervisor; a second one shortens its drain."""
        if self.manager is not None and not self.stopping:
            self.manager.stopping()
        self.stopping = True
        if self.supervisor is not None and self.supervisor.poll() is None:
            self.signalled = self.supervisor
            self.supervisor.terminate()

    def _keep_supervisor_and_exit(self) -> None:
        """
        Keep a supervisor running; when the last has drained, end this process if Celery does not.

        Celery waits half a minute and more for a Redis that hangs, and has nothing left to do.
        """
        from billiard import active_children

        self._keep_supervisor()
        self.drained.set()
        time.sleep(CELERY_GRACE_S)
        log.warning("Celery does not end (does Redis hang?): exiting without it")
        for child in active_children():
            os.kill(child.pid, signal.SIGKILL)
        self._remove_socket()
        os._exit(self.exit_code)

    def _remove_socket(self) -> None:
        Path(self.environment[WAKE_ENV]).unlink(missing_ok=True)


class Fleet:
    """
    Runs one child `ganq worker` per GPU or share of the cores; restarts those that exit, forwards signals.

    The children drain when this process dies for any reason.
    """

    def __init__(
        self,
        settings: Settings,
        devices: Sequence[Device],
        queues: tuple[str, ...],
        name: str | None,
        manager: ServiceManager | None = None,
        exit_when_idle_s: float | None = None,
    ) -> None:
        self.settings = settings
        self.manager = manager
        self.exit_when_idle_s = exit_when_idle_s
        self.devices = devices
        self.queues = queues
        self.name = name
        self.children: dict[str, subprocess.Popen[bytes]] = {}
        self.stopping = False

    def run(self) -> int:
        """
        Run the workers until SIGTERM.

        Returns:
            The exit code: that of the worst child.

        Raises:
            GpuBusyError: such workers run already; nothing was started.
        """
        for one in self.devices:
            used_gpu = one if isinstance(one, gpu.Gpu) else None
            for lock in acquire_locks(self.settings, self._name(one), used_gpu):
                lock.close()  # the child acquires it
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self._stop)
        if self.manager is not None:
            self.manager.watch(self.settings.runtime, self._names)
        tries: dict[str, int] = {}
        while not self.stopping and not self._all_idle():
            for one in self.devices:
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
        codes = [0 if code == DRAIN_EXIT else code for code in codes]
        return max((abs(code) for code in codes), default=0)

    def _is_idle(self, child: "subprocess.Popen[bytes]") -> bool:
        """Return whether a child has ended because no job could be claimed, or because of `ganq drain`."""
        return child.poll() == DRAIN_EXIT or (self.exit_when_idle_s is not None and child.poll() == 0)

    def _all_idle(self) -> bool:
        children = self.children.values()
        return len(children) == len(self.devices) and all(self._is_idle(child) for child in children)

    def _names(self) -> list[str]:
        """Return the names of the children that run, or should."""
        idle = {key for key, child in self.children.items() if self._is_idle(child)}
        return [self._name(one) for one in self.devices if one.key not in idle]

    def _name(self, one: Device) -> str:
        return f"{self.name}-{one.label}" if self.name else _default_name(one)

    def _metrics_option(self, one: Device) -> tuple[str, ...]:
        """Return the option that gives each child its own port: the first, the one after it, …"""
        address = self.settings.metrics_address
        if address is None:
            return ()
        host, port = address
        return ("--metrics-port", f"{host}:{port + [device.key for device in self.devices].index(one.key)}")

    def _start(self, one: Device) -> None:
        command = worker_command(
            *("worker", *one.arguments, "--queues", ",".join(self.queues), "--name", self._name(one)),
            *self._metrics_option(one),
            *(() if self.exit_when_idle_s is None else ("--exit-when-idle", f"{self.exit_when_idle_s:f}s")),
        )
        bound = bound_to_this(signal.SIGTERM, command)
        child = until_started(
            lambda: subprocess.Popen(bound, start_new_session=True, env={**os.environ, FLEET_ENV: "1"}),
            f"the worker {self._name(one)}",
            log,
            lambda: self.stopping,
        )
        if child is not None:
            self.children[one.key] = child
            if self.stopping:  # the signal arrived before the child was in the list
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
    Open /dev/null as stdin, stdout or stderr if they were closed (`ganq worker >&-`).

    Otherwise the next file that is opened gets that number, and output of this process or a child is
    written into it.
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
    Check that the library that serves metrics is installed, if they are requested.

    Raises:
        ConfigError: it is not.
    """
    if settings.metrics_port and find_spec("prometheus_client") is None:
        raise ConfigError("metrics need the package prometheus-client", hint="pip install 'ganq[metrics]'")


def require_queues(queues: tuple[str, ...]) -> None:
    """
    Validate names of queues.

    Raises:
        ConfigError: there is none, or a name has an invalid character.
    """
    if not queues:
        raise ConfigError("GANQ_QUEUES names no queue", hint="leave it out to serve the queue default")
    for one in queues:
        if not WORKER_NAME_PATTERN.fullmatch(one):
            raise ConfigError(f"{one[:40]!r} cannot be a queue's name", hint=NAME_HINT)
