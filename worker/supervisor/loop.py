"""
The supervisor process: claims a job, assigns it to the runner, commits what the runner reports, claims again.

It is a separate process in its own session, so that neither Redis nor Celery can stop its heartbeats. No
other process of a worker uses the database. The main loop below runs in one thread; the heartbeat, recovery
and the status socket have their own.
"""

import logging
import os
import queue
import random
import selectors
import signal
import socket
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from jobs.errors import (
    DatabaseUnavailableError,
    GanqError,
    LeaseLostError,
    ProcessUnavailableError,
    SchemaMismatchError,
    VolumeError,
    WorkerNameTakenError,
    error_of,
    one_line,
)
from jobs.failpoints import failpoint
from jobs.kinds import KINDS, SPEC_VERSION
from jobs.states import StopReason
from storage.db.queries import Queries
from storage.db.rows import Lease, WorkerIdentity
from storage.db.schema import open_database
from storage.db.store import Claim, JobStore
from storage.db.workers import WorkerStore
from storage.reachable import HINT
from storage.settings import Settings
from storage.volume.layout import Volume
from worker.celery_bridge.wakeup import WAKE_ENV, WakeSocket
from worker.host import logs
from worker.host.embedded_redis import runtime_folder
from worker.host.process import boot_id, die_with_parent, has_died, start_ticks
from worker.host.starting import until_started
from worker.ipc import Message
from worker.supervisor.assignment import make_assignment
from worker.supervisor.heartbeat import Fault, Heartbeat, LeaseEvent
from worker.supervisor.lease import HeldLease
from worker.supervisor.metrics import make_metrics
from worker.supervisor.reaper import Recovery
from worker.supervisor.retention import Retention, shard_folders
from worker.supervisor.runner_process import RunnerProcess
from worker.supervisor.status_socket import StatusSocket, status_socket_path
from worker.supervisor.volume_monitor import VolumeMonitor
from worker.supervisor.watchdog import CANCEL_GRACE_S, SAME_SIGNAL_S, SECOND_SIGNAL_GRACE_S, time_limit_error

log = logging.getLogger("ganq.supervisor")

SHORT_POLL_S = 0.3
STUCK_POLL_S = 1.0
"""Interval of the checks whether a stuck runner has died."""
VOLUME_CHECK_S = 10.0
CONNECTIONS = 2
"""To Postgres: a third thread waits, for some milliseconds. An idle worker keeps one."""
NAME_TAKEN_EXIT = 5
IDLE_EXIT = 6
DRAIN_EXIT = 7
FATAL_EXIT = 4
"""Another supervisor would fail in the same way: see worker/host/launcher.py."""


class Supervisor:
    """One worker: one GPU or the CPU, one job at a time."""

    def __init__(
        self,
        settings: Settings,
        identity: WorkerIdentity,
        wake_path: Path,
        *,
        exit_when_idle_s: float | None = None,
    ) -> None:
        self.settings = settings
        self.exit_when_idle_s = exit_when_idle_s
        self.idle_since = time.monotonic()
        self.exits_idle = False
        self.exits_drained = False
        self.identity = identity
        self.volume = Volume(settings.volume)
        self.metrics = make_metrics(settings, identity)
        self.database = open_database(settings, connections=CONNECTIONS)
        self.store = JobStore(self.database)
        self.queries = Queries(self.database)
        self.workers = WorkerStore(
            self.database,
            identity,
            lease_seconds=settings.lease_seconds,
            heartbeat_seconds=settings.heartbeat_seconds,
        )
        # Polling a local file is cheap, so a lost notification costs little there.
        self.poll_s = min(settings.poll_seconds, 3.0 if settings.is_sqlite else settings.poll_seconds)
        self.kinds = tuple(name for name, kind in KINDS.items() if kind.runner is not None)

        self.terminated_at: float | None = None
        """When the first SIGTERM arrived (monotonic seconds)."""
        self.second_signal = False
        self.fatal_error: GanqError | None = None
        self.draining = False
        self.next_poll = 0.0
        self.next_volume_check = 0.0

        self.lease_events: queue.SimpleQueue[tuple[LeaseEvent, Lease]] = queue.SimpleQueue()
        self.selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.selector.register(self._wake_read, selectors.EVENT_READ, "wake")
        self.wake_socket = WakeSocket(wake_path)
        self.selector.register(self.wake_socket.listener, selectors.EVENT_READ, "notification")
        self.early_answer: str | None = None
        """Outcome of the claim for a notification whose task has not connected yet."""

        offer_preemption = partial(self.store.request_preemption, who=identity, kinds=self.kinds)
        self.heartbeat = Heartbeat(
            self.store,
            self.workers,
            settings,
            self._on_lease_event,
            offer_preemption,
            self._stop_on_error,
            self.metrics,
            self._on_drain_request,
            lambda: self.recovery.reaper.live,
        )
        self.runner = RunnerProcess(settings, self.selector)
        self.volume_monitor = VolumeMonitor(settings, self.selector)
        self.retention = Retention(self.store, self.queries, self.volume_monitor.delete)
        self.held = HeldLease(
            settings,
            self.runner,
            self.heartbeat,
            drain_expired=self._drain_expired,
            on_schema_mismatch=self._stop_on_error,
            metrics=self.metrics,
        )
        self.recovery = Recovery(
            self.database,
            settings,
            self.workers,
            _notify_through_parent,
            self._wake,
            self._stop_on_error,
            self.metrics,
        )
        self.status_socket = StatusSocket(self, status_socket_path(wake_path))

    @property
    def lease(self) -> Lease | None:
        return self.held.lease

    # --- the main loop --------------------------------------------------------------------

    def run(self) -> int:
        """Run until SIGTERM; return the exit code."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self._on_sigterm)
        self._register_name()
        self.volume_monitor.ensure()
        self._ensure_runner()
        for thread in (self.heartbeat, self.recovery, self.status_socket):
            until_started(
                thread.start, f"the thread {thread.name}", log, lambda: self.terminated_at is not None
            )
        self.metrics.start()
        log.info("worker %s is ready on %s", self.identity.name, self.identity.device)
        try:
            while not (self.draining and self.lease is None):
                self._iterate()
        finally:
            self._close()
        if isinstance(self.fatal_error, WorkerNameTakenError):
            return NAME_TAKEN_EXIT
        if self.fatal_error:
            return FATAL_EXIT
        if self.exits_drained:
            return DRAIN_EXIT
        return IDLE_EXIT if self.exits_idle else 0

    def _register_name(self) -> None:
        self.workers.report("starting")
        before = self.workers.before
        if before is None or before.boot_id != self.identity.boot_id or not self.identity.boot_id:
            return
        if has_died(before.pid or 0, before.start_ticks or 0):
            self.workers.confirm_name()

    def _iterate(self) -> None:
        """Process what has arrived, then what is due."""
        self.heartbeat.mark_iteration()
        self.status_socket.mark_iteration()
        self.volume_monitor.ensure()
        ready = self.selector.select(self._timeout_s())
        # Before anything is concluded from the volume's silence.
        if any(key.data == "volume" for key, _ in ready):
            self._receive_from_volume()
        for key, _ in ready:
            if key.data == "wake":
                with suppress(BlockingIOError):
                    while os.read(self._wake_read, 4096):
                        pass
            elif key.data == "notification":
                self._answer_notification()
            elif key.data == "runner":
                self._receive_from_runner()
        while not self.lease_events.empty():
            event, lease = self.lease_events.get()
            if lease is self.lease:
                self._handle_lease_event(event)
        if self.terminated_at is not None and not self.draining:
            self._drain()
        self._check_deadlines()
        self.retention.delete_due()
        if self.runner.channel is None and not self.draining:
            self._ensure_runner()
        self._report_fault()
        if self.lease is None and not self.draining and time.monotonic() >= self.next_poll:
            self._claim()

    def _stop_on_error(self, exc: GanqError) -> None:
        """Drain and exit: the schema has changed, or another worker has this name (from any thread)."""
        if self.fatal_error is None:
            self.fatal_error = exc
            log.error("this worker returns its job and stops: %s → %s", exc.message, exc.hint)
            self._on_sigterm()
            self._wake()

    def _on_drain_request(self) -> None:
        """Drain and exit as after SIGTERM: `ganq drain` has asked for it (from the heartbeat thread)."""
        if self.terminated_at is None:
            log.info("ganq drain: this worker returns its job and exits")
            self.exits_drained = True
            self._on_sigterm()
            self._wake()

    def _timeout_s(self) -> float:
        now = time.monotonic()
        # An idle loop iterates, too, three times before the heartbeat would take it for stuck.
        most_s = min(60.0, self.settings.stuck_seconds / 3, self.volume_monitor.next_check_s)
        if self.lease is not None:
            return min(self.held.watchdog.next_check_s, most_s)
        if self.runner.channel is not None:
            runner_s = most_s
        else:
            runner_s = STUCK_POLL_S if self.runner.stuck_pid is not None else self.runner.start_at - now
        return max(0.0, min(self.next_poll - now, runner_s, most_s))

    def _wake(self) -> None:
        """Poll the job table now (from any thread)."""
        self.next_poll = 0.0
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    def _on_lease_event(self, event: LeaseEvent, lease: Lease) -> None:
        """Pass an event from the heartbeat thread to the main loop."""
        self.lease_events.put((event, lease))
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    # --- notifications --------------------------------------------------------------------

    def _answer_notification(self) -> None:
        task = self.wake_socket.accept()
        if task is None:
            self.early_answer = self._claim_for_notification()
            return
        answer, self.early_answer = self.early_answer or self._claim_for_notification(), None
        if self.lease is not None or answer == "busy":
            self.wake_socket.hold(task, answer)
        else:
            self.wake_socket.answer(task, answer)

    def _claim_for_notification(self) -> str:
        """Claim a job if this worker is free; return the answer for Celery's task."""
        if self.lease is not None:
            self.heartbeat.poll_now()  # the new job may preempt the running one
            return "busy"
        if self._fault() is not None:
            return "busy"  # Celery passes the notification on to another worker
        if not self._claim():
            # Another transaction may have locked the row just then: poll once more.
            self.next_poll = min(self.next_poll, time.monotonic() + SHORT_POLL_S)
            return "nothing"
        assert self.lease is not None
        return f"claimed {self.lease.job_id}"

    # --- claim and assign -----------------------------------------------------------------

    def _claim(self) -> bool:
        """Claim the best job of the table and assign it to the runner; return whether a job was assigned."""
        while True:
            self.heartbeat.mark_iteration()
            self._receive_from_volume()
            self.next_poll = time.monotonic() + self.poll_s * random.uniform(0.8, 1.2)
            lease, self.held.next_lease = self.held.next_lease, None
            if lease is None and self.terminated_at is not None:
                break  # a lease that is already held is begun, and then drained like any other
            if lease is None and self.workers.name_disputed:
                self.next_poll = time.monotonic() + SHORT_POLL_S
                break
            if lease is None and self._fault() is not None:
                return False  # tasks stay held, so that no notification is fetched until the fault ends
            if lease is None and not self.volume_monitor.answers:
                break  # not yet: _receive_from_volume() polls again
            if lease is None and not self._ensure_runner():
                self.next_poll = self.runner.start_at
                break  # another worker may have a runner
            try:
                if lease is None:
                    with self.metrics.request("claim"):
                        lease = self.store.claim(self.identity, kinds=self.kinds, spec_version=SPEC_VERSION)
                due_s = self.store.due_in() if lease is None else None
            except SchemaMismatchError as exc:
                self._stop_on_error(exc)
                break
            except Exception as exc:  # also for a row that ganq did not write: this worker must not stop
                log.warning("cannot claim: %s", one_line(exc))
                log.debug("the claim that failed", exc_info=True)
                break
            if lease is None:
                if due_s is not None:
                    self.next_poll = min(self.next_poll, time.monotonic() + due_s + 0.05)
                self._exit_if_idle()
                break
            log.info("job %s: attempt %s", lease.job_id, lease.attempt)
            failpoint("supervisor.claimed")
            self.held.begin(lease)
            try:
                if self.held.watchdog.time_limit_reached:
                    raise self._time_limit_error(lease)
                assignment = make_assignment(lease, self.store, self.queries)
                assignment["see_volume"] = self._volume_check_due()
                self.held.shards = assignment["shards"]
                if assignment["ends_in_s"] is not None:
                    self.held.watchdog.time_up_at = time.monotonic() + assignment["ends_in_s"]
                self.runner.ensure()
                assert self.runner.channel is not None
                self.held.watchdog.mark_progress("starting")
                self.runner.channel.send("run", order=assignment)
                return True
            except LeaseLostError:
                self.held.release("lost before it began")
            except GanqError as exc:
                self.held.finish(exc.code, self.store.fail, lease, exc)
            except OSError:
                self.held.finish("crashed", self.store.crashed, lease, "the runner died as the job began")
        self.wake_socket.release()
        return False

    def _exit_if_idle(self) -> None:
        """Drain if the table has had no job for this worker for --exit-when-idle."""
        if self.exit_when_idle_s is None:
            return
        left_s = self.idle_since + self.exit_when_idle_s - time.monotonic()
        if left_s > 0:
            self.next_poll = min(self.next_poll, time.monotonic() + left_s)
        elif self.terminated_at is None:
            log.info("no job for %g s: this worker exits", self.exit_when_idle_s)
            self.exits_idle = True
            self._on_sigterm()
            self._wake()

    def _volume_check_due(self) -> bool:
        """
        Return whether the runner must check that the volume can be written before it begins.

        It does not for each of many small jobs: if the volume has failed since, the job itself fails, and a
        file system that has just deleted many files (those of the checks) is slow to create new ones.
        """
        due = time.monotonic() >= self.next_volume_check
        if due:
            self.next_volume_check = time.monotonic() + VOLUME_CHECK_S
        return due

    def _ensure_runner(self) -> bool:
        """Start a runner if there is none and one is due; return whether there is one."""
        if self.runner.stuck_pid is not None:
            return False
        if self.runner.channel is None and time.monotonic() < self.runner.start_at:
            return False
        try:
            self.runner.ensure()
        except ProcessUnavailableError as exc:
            log.warning("%s; trying again in %.0f s", exc.message, self.runner.back_off())
            return False
        return True

    # --- the volume: this process makes no file call on it --------------------------------

    def _receive_from_volume(self) -> None:
        """Read the volume's answers; poll the job table once it answers again."""
        answered_before = self.volume_monitor.answers
        self.volume_monitor.receive()
        if self.volume_monitor.answers and not answered_before:
            self.next_poll = 0.0

    def _fault(self) -> Fault | None:
        """Return what keeps this worker from taking jobs."""
        if self.volume_monitor.is_silent:
            return "volume hung"
        return "runner stuck" if self.runner.stuck_pid is not None else None

    def _report_fault(self) -> None:
        fault = self._fault()
        if fault != self.heartbeat.fault:
            if fault == "volume hung":
                root, silent_s = self.volume.root, self.volume_monitor.silent_s
                log.error("the volume %s has not answered for %.0f s: claiming no job", root, silent_s)
            self.heartbeat.set_fault(fault)
            self.next_poll = 0.0

    def _requeue_on_hung_volume(self, lease: Lease) -> None:
        """Requeue the job for another worker: the volume may hang on this machine alone."""
        silent_s = self.volume_monitor.silent_s
        self.runner.kill()
        if self.held.watchdog.stop_reason is not None:
            self._finish_stopped(lease, self.held.watchdog.stop_reason)
            return
        error = VolumeError(
            f"the volume {self.volume.root} has not answered for {silent_s:.0f} s on {self.identity.name}",
            hint=HINT,
        )
        self.held.finish(f"{error.code}: {error.message}", self.store.fail, lease, error)
        self._after_job()

    # --- messages of the runner -----------------------------------------------------------

    def _receive_from_runner(self) -> None:
        messages = self.runner.receive()
        if messages is None:
            how = self.runner.reap()
            if self.lease is not None:
                self._on_runner_death(how)
            elif not self.draining:
                log.warning("the idle runner was %s; another starts in %.0f s", how, self.runner.back_off())
            return
        for message in messages:
            if message.get("job_id") not in (None, self.lease.job_id if self.lease else None):
                continue  # a late message of an attempt that has ended
            self.held.watchdog.observe(message)
            self._on_message(message)

    def _on_message(self, message: Message) -> None:
        op, lease = message["op"], self.lease
        if op == "ready":
            self.runner.failed_starts, self.runner.ready = 0, True
        if op == "ready" or lease is None:
            return
        self.metrics.message(lease, message)
        if op == "progress":
            self.heartbeat.set_progress(message["progress"])
        elif op == "inputs":
            inputs = {**(lease.job.inputs or {}), **message["inputs"]}
            self.held.commit(self.store.pin_inputs, lease, inputs)
        elif op == "event":
            self.held.commit(self.store.add_event, lease, message["type"], message["detail"])
        elif op == "checkpoint":
            self._register_checkpoint(lease, message)
        elif op == "done":
            failpoint("supervisor.before_finish")
            claim = Claim(self.identity, self.kinds, SPEC_VERSION)
            shards = self.held.shards
            succeeded = self.held.finish("succeeded", self._succeed, lease, message["result"], claim)
            failpoint("supervisor.finished")
            # Unless the commit was acknowledged, the next attempt needs the images of the shards.
            if succeeded:
                self.volume_monitor.delete(lease.job_id, shard_folders(shards, self.volume))
            self._after_job()
        elif op == "stopped":
            self._finish_stopped(lease, message["reason"])
        elif op == "failed":
            error = error_of(message["code"], message["message"], message.get("hint"))
            self.next_volume_check = 0.0
            if message.get("replace"):
                self.runner.kill()
            self.held.finish(f"{error.code}: {error.message}", self.store.fail, lease, error)
            self._after_job()
        elif op == "crashed":
            self.runner.kill()
            self.held.finish("crashed", self.store.crashed, lease, message["message"])
            self._after_job()

    def _register_checkpoint(self, lease: Lease, message: Message) -> None:
        """Insert the row of a checkpoint, acknowledge it, and delete older checkpoints."""
        register = partial(
            self.store.register_checkpoint,
            lease,
            kind=message["kind"],
            epoch=message["epoch"],
            step=message["step"],
            path=message["path"],
            manifest_sha256=message["manifest_sha256"],
            size=message["bytes"],
            metric=message.get("metric"),
        )
        failpoint("supervisor.before_register")
        if not self.held.commit(register):
            return
        failpoint("supervisor.registered")
        self.runner.send("ack", ok=True)
        try:
            if deleted := self.retention.prune(lease):
                self.runner.send("forgotten", paths=deleted)
        except GanqError as exc:
            log.warning("job %s: old checkpoints are kept for now: %s", lease.job_id, exc)

    def _succeed(self, lease: Lease, result: dict[str, Any], claim: Claim) -> None:
        """Publish, and claim the next job in the same commit; it begins in _after_job()."""
        claim_next = self.terminated_at is None
        self.held.next_lease = self.store.succeed_and_claim(lease, result, claim, claim_next=claim_next)

    def _finish_stopped(self, lease: Lease, reason: str) -> None:
        """Commit the end of a job that was stopped for this reason."""
        if reason == StopReason.CANCEL:
            self.held.finish("cancelled", self.store.cancel_done, lease)
        elif reason == StopReason.TIME_LIMIT:
            error = self._time_limit_error(lease)
            self.held.finish(f"{error.code}: {error.message}", self.store.fail, lease, error)
        else:
            self.held.finish(f"requeued ({reason})", self.store.release, lease, reason)
        self._after_job()

    def _on_runner_death(self, how: str) -> None:
        lease = self.lease
        assert lease is not None
        if self.held.watchdog.stop_reason is not None:
            self._finish_stopped(lease, self.held.watchdog.stop_reason)
            return
        if not self.runner.ready:
            self.runner.back_off()
            self._requeue_unstarted(lease, f"the runner did not start: it was {how}")
        elif not self._ensure_runner():
            self._requeue_unstarted(lease, f"the runner was {how}, and no other can be started")
        else:
            self.held.finish("crashed", self.store.crashed, lease, f"the runner was {how}")
        self._after_job()

    def _requeue_unstarted(self, lease: Lease, reason: str) -> None:
        """Requeue a job that had no runner; the machine is at fault, so it does not count as a crash."""
        error = ProcessUnavailableError(reason, hint=f"see the log of the worker {self.identity.name}")
        self.held.finish(f"{error.code}: {reason}", self.store.fail, lease, error)

    def _time_limit_error(self, lease: Lease) -> GanqError:
        try:
            has_checkpoint = bool(self.queries.checkpoints(lease.job_id))
        except DatabaseUnavailableError:  # only the hint depends on it
            has_checkpoint = False
        return time_limit_error(lease.job, has_checkpoint=has_checkpoint)

    # --- stopping -------------------------------------------------------------------------

    def _handle_lease_event(self, event: LeaseEvent) -> None:
        if event == "lost":
            self.held.abandon("another worker has the lease")
            self._after_job()
        elif event in ("preempt", "pause"):
            if self.held.watchdog.stop_reason is None:
                self._request_stop(StopReason(event), self.settings.drain_seconds)
        elif self.held.watchdog.stop_reason is not StopReason.CANCEL:
            self._request_stop(StopReason.CANCEL, CANCEL_GRACE_S)

    def _on_sigterm(self, *_: Any) -> None:
        """Record the signal only: the main loop may be in the middle of a commit."""
        now = time.monotonic()
        if self.terminated_at is None:
            self.terminated_at = now
        elif now - self.terminated_at > SAME_SIGNAL_S:
            self.second_signal = True

    def _drain_expired(self) -> bool:
        """Return whether SIGTERM was more than drain_seconds ago, so that nothing may be waited for."""
        at = self.terminated_at
        return at is not None and time.monotonic() - at > self.settings.drain_seconds

    def _drain(self) -> None:
        """Handle SIGTERM: claim nothing more, save the running job and requeue it."""
        log.info("draining")
        self.draining = True
        self.heartbeat.drain()
        if self.lease is not None:
            if self.held.watchdog.stop_reason is None:
                self._request_stop(StopReason.DRAIN, self.settings.drain_seconds)
            else:
                self.held.watchdog.shorten_deadline(self.settings.drain_seconds)

    def _request_stop(self, reason: StopReason, grace_s: float) -> None:
        """Request that the job stops; after the grace period its runner is killed."""
        self.held.watchdog.request_stop(reason, grace_s)
        self.runner.send("stop", reason=str(reason))

    def _check_deadlines(self) -> None:
        self.held.watchdog.discount_own_pause()
        lease = self.lease
        if lease is None:
            return
        self._receive_from_volume()  # its answers may have waited for this loop
        if self.volume_monitor.is_hung:
            self._requeue_on_hung_volume(lease)
            return
        if self.second_signal:
            self.held.watchdog.shorten_deadline(SECOND_SIGNAL_GRACE_S)
        verdict = self.held.watchdog.check()
        if verdict == "time limit":
            log.info("job %s has reached its time limit", lease.job_id)
            self._request_stop(StopReason.TIME_LIMIT, self.settings.drain_seconds)
        elif verdict == "time is up":
            log.info("job %s has run for the time of --stop-after", lease.job_id)
            self.runner.send("stop", reason=str(StopReason.STOP_AFTER))  # its last evaluation takes its time
        elif verdict == "overdue":
            log.warning("job %s did not stop in time: killing its runner", lease.job_id)
            self.runner.kill()
            self._on_runner_death("killed")
        elif verdict == "stalled":
            self._end_stalled(lease)

    def _end_stalled(self, lease: Lease) -> None:
        """Save the stacks of a runner that makes no progress, then replace it."""
        stalled_s = self.held.watchdog.stalled_s
        log_file = self.volume.attempt(lease.job_id, lease.attempt) / "log.txt"
        reason = f"no progress for {stalled_s:.0f} s: stalled"
        pid = self.runner.pid
        stacks = self.volume_monitor.dump(pid, log_file, reason) if pid is not None else "its process is gone"
        self.runner.kill()
        message = f"{reason}; {stacks}"
        self.held.finish("stalled", partial(self.store.crashed, hung=True), lease, message)
        self._after_job()

    def _after_job(self) -> None:
        """Ensure a warm runner, and claim the next job at once."""
        if self.lease is not None:
            return
        self.idle_since = time.monotonic()
        if self.held.next_lease is None and not self.draining:
            self._ensure_runner()
        self._claim()

    def _close(self) -> None:
        self.heartbeat.stop()
        self.recovery.stop()
        self.wake_socket.close()
        self.runner.kill()
        self.volume_monitor.close()
        with suppress(GanqError):
            self.workers.report("stopped")
        self.status_socket.stop()
        self.database.dispose()
        log.info("worker %s has stopped", self.identity.name)


def _notify_through_parent(queue_name: str, job_id: int) -> None:
    """Ask the Celery process that started this one to send a notification: importing Celery costs 30 MB."""
    # If the pipe is full because Redis hangs, drop the notification rather than block the recovery thread.
    # A line is far shorter than PIPE_BUF, so it is written whole or not at all.
    with suppress(OSError):
        os.write(1, f"notify {queue_name} {job_id}\n".encode())


def make_identity(settings: Settings, name: str, device: str, queues: tuple[str, ...]) -> WorkerIdentity:
    """Return the identity of this process, as attempt rows record it."""
    from storage.version import version

    pid = os.getpid()
    return WorkerIdentity(
        name=name,
        host=socket.gethostname(),
        device=device,
        boot_id=boot_id(),
        pid=pid,
        start_ticks=start_ticks(pid),
        queues=queues,
        version=version(),
    )


def main() -> int:
    """Run the supervisor; worker/host/launcher.py starts this process."""
    die_with_parent(int(os.environ["GANQ_PARENT"]), signal.SIGTERM)
    settings = Settings.load()
    logs.configure(settings)
    os.set_blocking(1, False)  # see _notify_through_parent()
    identity = make_identity(
        settings,
        os.environ["GANQ_WORKER_NAME"],
        os.environ["GANQ_WORKER_DEVICE"],
        tuple(os.environ["GANQ_WORKER_QUEUES"].split(",")),
    )
    try:
        runtime_folder(settings)  # a program that cleans /tmp may have deleted it
        idle = os.environ.get("GANQ_WORKER_EXIT_WHEN_IDLE")
        exit_when_idle_s = float(idle) if idle else None
        wake_path = Path(os.environ[WAKE_ENV])
        return Supervisor(settings, identity, wake_path, exit_when_idle_s=exit_when_idle_s).run()
    except (DatabaseUnavailableError, OSError) as exc:
        log.error("%s", one_line(exc))
        return 1
    except GanqError as exc:
        log.error("%s → %s", exc.message, exc.hint)
        return FATAL_EXIT


if __name__ == "__main__":
    sys.exit(main())
