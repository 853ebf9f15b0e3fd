"""
Owns the lease of one job at a time: claim, order, watch, settle, and the next.

A process of its own, in its own session: neither Redis nor Celery can stop it from
beating. Only this process of a worker touches the database. One thread runs the
loop below; Heart beats beside it, Recovery reaps and rings.
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
from worker.supervisor.heartbeat import Heartbeat, LeaseEvent, Trouble
from worker.supervisor.lease import HeldLease
from worker.supervisor.metrics import make_metrics
from worker.supervisor.reaper import Recovery
from worker.supervisor.retention import Retention, shard_folders
from worker.supervisor.runner_process import RunnerProcess
from worker.supervisor.status_socket import StatusSocket, status_socket_path
from worker.supervisor.volume_watch import VolumeWatch
from worker.supervisor.watchdog import CANCEL_GRACE_S, HASTE_S, SAME_SIGNAL_S, time_limit_error

log = logging.getLogger("ganq.supervisor")

LOOK_AGAIN_S = 0.3
STUCK_LOOK_S = 1.0
"""How often it is looked whether a runner that does not die has died."""
VOLUME_SEEN_S = 10.0
NAME_TAKEN_EXIT = 5
IDLE_EXIT = 6
FATAL_EXIT = 4
"""Something is wrong that another supervisor would find wrong, too: see worker/host/launcher.py."""


class Supervisor:
    """One worker: one GPU or the CPU, one job at a time."""

    def __init__(
        self,
        settings: Settings,
        who: WorkerIdentity,
        wake_socket: Path,
        *,
        exit_when_idle_s: float | None = None,
    ) -> None:
        self.settings = settings
        self.exit_when_idle_s = exit_when_idle_s
        self.idle_since = time.monotonic()
        self.left_idle = False
        self.who = who
        self.volume = Volume(settings.volume)
        self.metrics = make_metrics(settings, who)
        self.database = open_database(settings)
        self.store = JobStore(self.database)
        self.queries = Queries(self.database)
        self.workers = WorkerStore(
            self.database,
            who,
            lease_seconds=settings.lease_seconds,
            heartbeat_seconds=settings.heartbeat_seconds,
        )
        # A look at a local file costs next to nothing, so a bell that was lost costs little too.
        self.poll_s = min(settings.poll_seconds, 3.0 if settings.is_sqlite else settings.poll_seconds)
        self.kinds = tuple(name for name, kind in KINDS.items() if kind.runner is not None)

        self.terminated_at: float | None = None
        self.hastened = False
        self.schema_mismatch: GanqError | None = None
        self.draining = False
        self.next_poll = 0.0
        self.volume_due = 0.0

        self.news: queue.SimpleQueue[tuple[LeaseEvent, Lease]] = queue.SimpleQueue()
        self.selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self.selector.register(self._wake_read, selectors.EVENT_READ, "wake")
        self.wake_socket = WakeSocket(wake_socket)
        self.selector.register(self.wake_socket.listener, selectors.EVENT_READ, "notification")
        self.early_answer: str | None = None
        """Outcome of the claim for a notification whose task has not connected yet."""

        offer = partial(self.store.request_preemption, who=who, kinds=self.kinds)
        self.heartbeat = Heartbeat(
            self.store, self.workers, settings, self._tell, offer, self._on_schema_mismatch, self.metrics
        )
        self.runner = RunnerProcess(settings, self.selector)
        self.volume_watch = VolumeWatch(settings, self.selector)
        self.retention = Retention(self.store, self.queries, self.volume_watch.delete)
        self.holder = HeldLease(
            settings,
            self.runner,
            self.heartbeat,
            must_go=self._must_go,
            on_schema_mismatch=self._on_schema_mismatch,
            metrics=self.metrics,
        )
        self.recovery = Recovery(
            self.database,
            settings,
            self.workers,
            _ring_through_parent,
            self._wake,
            self._on_schema_mismatch,
            self.metrics,
        )
        self.status_socket = StatusSocket(self, status_socket_path(wake_socket))

    @property
    def lease(self) -> Lease | None:
        """Of the job in hand."""
        return self.holder.lease

    # --- the loop -------------------------------------------------------------------------

    def run(self) -> int:
        """Work until SIGTERM; returns the exit code."""
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for sig in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sig, self._on_sigterm)
        self._take_name()
        self.volume_watch.ensure()
        self._warm_up()
        for thread in (self.heartbeat, self.recovery, self.status_socket):
            until_started(
                thread.start, f"the thread {thread.name}", log, lambda: self.terminated_at is not None
            )
        self.metrics.start()
        log.info("worker %s is ready on %s", self.who.name, self.who.device)
        try:
            while not (self.draining and self.lease is None):
                self._turn()
        finally:
            self._close()
        if isinstance(self.schema_mismatch, WorkerNameTakenError):
            return NAME_TAKEN_EXIT
        if self.schema_mismatch:
            return FATAL_EXIT
        return IDLE_EXIT if self.left_idle else 0

    def _take_name(self) -> None:
        self.workers.report("starting")
        before = self.workers.before
        if before is None or before.boot_id != self.who.boot_id or not self.who.boot_id:
            return
        if has_died(before.pid or 0, before.start_ticks or 0):
            self.workers.confirm_name()

    def _turn(self) -> None:
        """One round: what has arrived, then what is due."""
        self.heartbeat.turned()
        self.status_socket.turned()
        self.volume_watch.ensure()
        ready = self.selector.select(self._timeout())
        self._hear_volume()
        for key, _ in ready:
            if key.data == "wake":
                with suppress(BlockingIOError):
                    while os.read(self._wake_read, 4096):
                        pass
            elif key.data == "notification":
                self._answer_notification()
            elif key.data == "runner":
                self._receive_from_runner()
        while not self.news.empty():
            what, lease = self.news.get()
            if lease is self.lease:
                self._on_news(what)
        if self.terminated_at is not None and not self.draining:
            self._drain()
        self._check_deadlines()
        self.retention.delete_due()
        if self.runner.channel is None and not self.draining:
            self._warm_up()
        self._mark_trouble()
        if self.lease is None and not self.draining and time.monotonic() >= self.next_poll:
            self._claim()

    def _on_schema_mismatch(self, exc: GanqError) -> None:
        """The schema was changed, or the name is another worker's (from any thread): drain and leave."""
        if self.schema_mismatch is None:
            self.schema_mismatch = exc
            log.error("this worker gives its job back and stops: %s → %s", exc.message, exc.hint)
            self._on_sigterm()
            self._wake()

    def _timeout(self) -> float:
        now = time.monotonic()
        # A third of what makes the heart fall silent: an idle loop turns, too.
        most_s = min(60.0, self.settings.stuck_seconds / 3, self.volume_watch.next_s)
        if self.lease is not None:
            return min(self.holder.watch.next_s, most_s)
        if self.runner.channel is not None:
            runner_s = most_s
        else:
            runner_s = STUCK_LOOK_S if self.runner.stuck is not None else self.runner.due - now
        return max(0.0, min(self.next_poll - now, runner_s, most_s))

    def _wake(self) -> None:
        """Look at the table now (from any thread)."""
        self.next_poll = 0.0
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    def _tell(self, news: LeaseEvent, lease: Lease) -> None:
        self.news.put((news, lease))
        with suppress(BlockingIOError):
            os.write(self._wake_write, b"!")

    # --- notifications --------------------------------------------------------------------

    def _answer_notification(self) -> None:
        task = self.wake_socket.accept()
        if task is None:
            self.early_answer = self._look()
            return
        answer, self.early_answer = self.early_answer or self._look(), None
        if self.lease is not None or answer == "busy":
            self.wake_socket.hold(task, answer)
        else:
            self.wake_socket.answer(task, answer)

    def _look(self) -> str:
        """Something waits: claim it, if this worker is free."""
        if self.lease is not None:
            self.heartbeat.poll_now()  # what was rung for may be worth yielding to
            return "busy"
        if self._trouble() is not None:
            return "busy"  # Celery passes the notification on to another worker
        if not self._claim():
            # Another transaction may have had the row in its hands just then: look once more.
            self.next_poll = min(self.next_poll, time.monotonic() + LOOK_AGAIN_S)
            return "nothing"
        assert self.lease is not None
        return f"claimed {self.lease.job_id}"

    # --- claim and order ------------------------------------------------------------------

    def _claim(self) -> bool:
        """Take the best job of the table, if there is one, and hand it to the runner."""
        while True:
            self.heartbeat.turned()
            self._hear_volume()
            self.next_poll = time.monotonic() + self.poll_s * random.uniform(0.8, 1.2)
            lease, self.holder.taken = self.holder.taken, None
            if lease is None and self.terminated_at is not None:
                break  # what is taken is begun, and then drained as any other
            if lease is None and self.workers.name_disputed:
                self.next_poll = time.monotonic() + LOOK_AGAIN_S
                break
            if lease is None and self._trouble() is not None:
                return False  # and no notification is fetched until it has passed
            if lease is None and not self.volume_watch.answers:
                break  # not yet: _hear_volume() looks again
            if lease is None and not self._warm_up():
                self.next_poll = self.runner.due
                break  # another worker can do what this one cannot
            try:
                if lease is None:
                    with self.metrics.request("claim"):
                        lease = self.store.claim(self.who, kinds=self.kinds, spec_version=SPEC_VERSION)
                due_s = self.store.due_in() if lease is None else None
            except SchemaMismatchError as exc:
                self._on_schema_mismatch(exc)
                break
            except Exception as exc:  # a row that no ganq wrote, too: this worker must go on
                log.warning("cannot claim: %s", one_line(exc))
                log.debug("the claim that failed", exc_info=True)
                break
            if lease is None:
                if due_s is not None:
                    self.next_poll = min(self.next_poll, time.monotonic() + due_s + 0.05)
                self._leave_if_idle()
                break
            log.info("job %s: attempt %s", lease.job_id, lease.attempt)
            failpoint("supervisor.claimed")
            self.holder.begin(lease)
            try:
                if self.holder.watch.time_is_up:
                    raise self._time_limit_error(lease)
                order = make_assignment(lease, self.store, self.queries)
                order["see_volume"] = self._should_see_volume()
                self.holder.parts = order["parts"]
                self.runner.ensure()
                assert self.runner.channel is not None
                self.holder.watch.moved("starting")
                self.runner.channel.send("run", order=order)
                return True
            except LeaseLostError:
                self.holder.release("lost before it began")
            except GanqError as exc:
                self.holder.settle(exc.code, self.store.fail, lease, exc)
            except OSError:
                self.holder.settle("crashed", self.store.crashed, lease, "the runner died as the job began")
        self.wake_socket.release()
        return False

    def _leave_if_idle(self) -> None:
        """The table has no job for this worker: drain if that has been so for --exit-when-idle."""
        if self.exit_when_idle_s is None:
            return
        left_s = self.idle_since + self.exit_when_idle_s - time.monotonic()
        if left_s > 0:
            self.next_poll = min(self.next_poll, time.monotonic() + left_s)
        elif self.terminated_at is None:
            log.info("no job for %g s: this worker exits", self.exit_when_idle_s)
            self.left_idle = True
            self._on_sigterm()
            self._wake()

    def _should_see_volume(self) -> bool:
        """
        Return whether the runner must show that the volume can be written, before it begins.

        Not for each of many small jobs: the work itself fails on a volume that broke since, and
        a file system that has just deleted many files (the probes) is slow to make new ones.
        """
        due = time.monotonic() >= self.volume_due
        if due:
            self.volume_due = time.monotonic() + VOLUME_SEEN_S
        return due

    # --- the volume: no file call of it is made in this process ---------------------------

    def _hear_volume(self) -> None:
        """Take in whether the volume answers, before anything is concluded from its silence."""
        before = self.volume_watch.answers
        self.volume_watch.receive()
        if self.volume_watch.answers and not before:
            self.next_poll = 0.0

    def _trouble(self) -> Trouble | None:
        """Return what keeps this worker from taking a job, until it passes."""
        if self.volume_watch.is_silent:
            return "volume hung"
        return "runner stuck" if self.runner.stuck is not None else None

    def _mark_trouble(self) -> None:
        trouble = self._trouble()
        if trouble != self.heartbeat.trouble:
            if trouble == "volume hung":
                root, silent_s = self.volume.root, self.volume_watch.silent_s
                log.error("the volume %s has not answered for %.0f s: no job until it does", root, silent_s)
            self.heartbeat.mark(trouble)
            self.next_poll = 0.0

    def _end_on_silence(self, lease: Lease) -> None:
        """The volume hangs, perhaps on this machine alone: another worker takes the job."""
        silent_s = self.volume_watch.silent_s
        self.runner.kill()
        if self.holder.watch.asked is not None:
            self._on_stopped(lease, self.holder.watch.asked)
            return
        error = VolumeError(
            f"the volume {self.volume.root} has not answered for {silent_s:.0f} s on {self.who.name}",
            hint=HINT,
        )
        self.holder.settle(f"{error.code}: {error.message}", self.store.fail, lease, error)
        self._after_job()

    # --- what the runner says -------------------------------------------------------------

    def _receive_from_runner(self) -> None:
        messages = self.runner.receive()
        if messages is None:
            how = self.runner.ended()
            if self.lease is not None:
                self._on_runner_death(how)
            elif not self.draining:
                log.warning("the idle runner was %s; another starts in %.0f s", how, self.runner.pause())
            return
        for message in messages:
            if message.get("job_id") not in (None, self.lease.job_id if self.lease else None):
                continue  # a late word about a job that is settled
            self.holder.watch.heard(message)
            self._on_message(message)

    def _on_message(self, message: Message) -> None:
        op, lease = message["op"], self.lease
        if op == "ready":
            self.runner.deaths, self.runner.ready = 0, True
        if op == "ready" or lease is None:
            return
        self.metrics.message(lease, message)
        if op == "progress":
            self.heartbeat.progress(message["progress"])
        elif op == "inputs":
            inputs = {**(lease.job.inputs or {}), **message["inputs"]}
            self.holder.commit(self.store.pin_inputs, lease, inputs)
        elif op == "event":
            self.holder.commit(self.store.add_event, lease, message["type"], message["detail"])
        elif op == "checkpoint":
            self._register(lease, message)
        elif op == "done":
            failpoint("supervisor.before_finish")
            claim = Claim(self.who, self.kinds, SPEC_VERSION)
            parts = self.holder.parts
            succeeded = self.holder.settle("succeeded", self._succeed, lease, message["result"], claim)
            failpoint("supervisor.finished")
            # Without a commit that was acknowledged the next attempt needs what the shards have made.
            if succeeded:
                self.volume_watch.delete(lease.job_id, shard_folders(parts, self.volume))
            self._after_job()
        elif op == "stopped":
            self._on_stopped(lease, message["reason"])
        elif op == "failed":
            error = error_of(message["code"], message["message"], message.get("hint"))
            self.volume_due = 0.0
            if message.get("replace"):
                self.runner.kill()
            self.holder.settle(f"{error.code}: {error.message}", self.store.fail, lease, error)
            self._after_job()
        elif op == "crashed":
            self.runner.kill()
            self.holder.settle("crashed", self.store.crashed, lease, message["message"])
            self._after_job()

    def _register(self, lease: Lease, message: Message) -> None:
        """Make a checkpoint real, tell the runner, and let older ones go."""

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
        if not self.holder.commit(register):
            return
        failpoint("supervisor.registered")
        self.runner.send("ack", ok=True)
        try:
            if gone := self.retention.prune(lease):
                self.runner.send("forgotten", paths=gone)
        except GanqError as exc:
            log.warning("job %s: old checkpoints stay for now: %s", lease.job_id, exc)

    def _succeed(self, lease: Lease, result: dict[str, Any], claim: Claim) -> None:
        """Publish, and take the next job with the same commit; it begins in _after_job()."""
        claim_next = self.terminated_at is None
        self.holder.taken = self.store.succeed_and_claim(lease, result, claim, claim_next=claim_next)

    def _on_stopped(self, lease: Lease, reason: str) -> None:
        if reason == StopReason.CANCEL:
            self.holder.settle("cancelled", self.store.cancel_done, lease)
        elif reason == StopReason.TIME_LIMIT:
            error = self._time_limit_error(lease)
            self.holder.settle(f"{error.code}: {error.message}", self.store.fail, lease, error)
        else:
            self.holder.settle(f"released ({reason})", self.store.release, lease, reason)
        self._after_job()

    def _on_runner_death(self, how: str) -> None:
        lease = self.lease
        assert lease is not None
        if self.holder.watch.asked is not None:
            self._on_stopped(lease, self.holder.watch.asked)
            return
        if not self.runner.ready:
            self.runner.pause()
            self._settle_unstarted(lease, f"the runner did not start: it was {how}")
        elif not self._warm_up():
            self._settle_unstarted(lease, f"the runner was {how}, and no other can be started")
        else:
            self.holder.settle("crashed", self.store.crashed, lease, f"the runner was {how}")
        self._after_job()

    def _settle_unstarted(self, lease: Lease, why: str) -> None:
        """Put a job back that had no runner to work in: that is this machine's fault, and not counted."""
        error = ProcessUnavailableError(why, hint=f"the log of the worker {self.who.name} says more")
        self.holder.settle(f"{error.code}: {why}", self.store.fail, lease, error)

    def _warm_up(self) -> bool:
        """Have a runner, if one is due; returns False where there is none and none can be started now."""
        if self.runner.stuck is not None:
            return False
        if self.runner.channel is None and time.monotonic() < self.runner.due:
            return False
        try:
            self.runner.ensure()
        except ProcessUnavailableError as exc:
            log.warning("%s; trying again in %.0f s", exc.message, self.runner.pause())
            return False
        return True

    def _time_limit_error(self, lease: Lease) -> GanqError:
        try:
            has_checkpoint = bool(self.queries.checkpoints(lease.job_id))
        except DatabaseUnavailableError:  # only the hint depends on it
            has_checkpoint = False
        return time_limit_error(lease.job, has_checkpoint=has_checkpoint)

    # --- stopping -------------------------------------------------------------------------

    def _on_news(self, what: LeaseEvent) -> None:
        if what == "lost":
            self.holder.lost("its lease has passed on")
            self._after_job()
        elif what == "yield":
            if self.holder.watch.asked is None:
                self._ask_to_stop(StopReason.PREEMPT, self.settings.drain_seconds)
        elif self.holder.watch.asked is not StopReason.CANCEL:
            self._ask_to_stop(StopReason.CANCEL, CANCEL_GRACE_S)

    def _on_sigterm(self, *_: Any) -> None:
        """Only a mark: the loop may be in the middle of a commit."""
        now = time.monotonic()
        if self.terminated_at is None:
            self.terminated_at = now
        elif now - self.terminated_at > SAME_SIGNAL_S:
            self.hastened = True

    def _must_go(self) -> bool:
        """Whether SIGTERM was long enough ago that nothing may be waited for."""
        at = self.terminated_at
        return at is not None and time.monotonic() - at > self.settings.drain_seconds

    def _drain(self) -> None:
        """SIGTERM: claim no more, bring the running job into order, give it back."""
        log.info("draining")
        self.draining = True
        self.heartbeat.drain()
        if self.lease is not None:
            if self.holder.watch.asked is None:
                self._ask_to_stop(StopReason.DRAIN, self.settings.drain_seconds)
            else:
                self.holder.watch.hasten(self.settings.drain_seconds)

    def _ask_to_stop(self, reason: StopReason, grace_s: float) -> None:
        self.holder.watch.ask(reason, grace_s)
        self.runner.send("stop", reason=str(reason))

    def _check_deadlines(self) -> None:
        self.holder.watch.excuse_own_pause()
        lease = self.lease
        if lease is None:
            return
        self._hear_volume()  # its answers may have waited for us
        if self.volume_watch.is_hung:
            self._end_on_silence(lease)
            return
        if self.hastened:
            self.holder.watch.hasten(HASTE_S)
        verdict = self.holder.watch.verdict()
        if verdict == "time is up":
            log.info("job %s has run for as long as it may", lease.job_id)
            self._ask_to_stop(StopReason.TIME_LIMIT, self.settings.drain_seconds)
        elif verdict == "overdue":
            log.warning("job %s did not stop in time: killing its runner", lease.job_id)
            self.runner.kill()
            self._on_runner_death("killed")
        elif verdict == "hung":
            self._end_hung(lease)

    def _end_hung(self, lease: Lease) -> None:
        """The process lives, and its work does not move: keep its stacks, then replace it."""
        still_s = self.holder.watch.still_s
        log_file = self.volume.attempt(lease.job_id, lease.attempt) / "log.txt"
        why = f"no progress for {still_s:.0f} s: taken as hung"
        pid = self.runner.pid
        told = self.volume_watch.dump(pid, log_file, why) if pid is not None else "its process is gone"
        self.runner.kill()
        message = f"no progress for {still_s:.0f} s: taken as hung; {told}"
        self.holder.settle("stalled", partial(self.store.crashed, hung=True), lease, message)
        self._after_job()

    def _after_job(self) -> None:
        """A warm runner for the next job, and the next job at once."""
        if self.lease is not None:
            return
        self.idle_since = time.monotonic()
        if self.holder.taken is None and not self.draining:
            self._warm_up()
        self._claim()

    def _close(self) -> None:
        self.heartbeat.stop()
        self.recovery.stop()
        self.wake_socket.close()
        self.runner.kill()
        self.volume_watch.close()
        with suppress(GanqError):
            self.workers.report("stopped")
        self.status_socket.stop()
        self.database.dispose()
        log.info("worker %s has stopped", self.who.name)


def _ring_through_parent(queue_name: str, job_id: int) -> None:
    """Ring by way of the Celery process that started us: Celery's import costs 30 MB."""
    # A pipe that is full, because Redis hangs, must not stop the thread that reaps: a lost
    # bell costs seconds. A line is far shorter than PIPE_BUF, so it goes whole or not at all.
    with suppress(OSError):
        os.write(1, f"ring {queue_name} {job_id}\n".encode())


def identity(settings: Settings, name: str, device: str, queues: tuple[str, ...]) -> WorkerIdentity:
    """Who this process is, as the attempt rows record it."""
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
    """Entry point of the process that worker/host/launcher.py starts."""
    die_with_parent(int(os.environ["GANQ_PARENT"]), signal.SIGTERM)
    settings = Settings.load()
    logs.configure(settings)
    os.set_blocking(1, False)  # see _ring_through_parent()
    who = identity(
        settings,
        os.environ["GANQ_WORKER_NAME"],
        os.environ["GANQ_WORKER_DEVICE"],
        tuple(os.environ["GANQ_WORKER_QUEUES"].split(",")),
    )
    try:
        runtime_folder(settings)  # something that cleans /tmp may have deleted it
        idle = os.environ.get("GANQ_WORKER_EXIT_WHEN_IDLE")
        exit_when_idle_s = float(idle) if idle else None
        return Supervisor(settings, who, Path(os.environ[WAKE_ENV]), exit_when_idle_s=exit_when_idle_s).run()
    except (DatabaseUnavailableError, OSError) as exc:
        log.error("%s", one_line(exc))
        return 1
    except GanqError as exc:
        log.error("%s → %s", exc.message, exc.hint)
        return FATAL_EXIT


if __name__ == "__main__":
    sys.exit(main())
