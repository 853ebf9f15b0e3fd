"""
Every error that ganq raises on purpose.

    GanqError
      SpecError (also ValueError)          a request that cannot work; exit 2
      NotFoundError                        exit 3
        JobNotFoundError
        CheckpointNotFoundError
      ConfigError                          a setting or the set-up is wrong
      JobError
        InvalidTransitionError
        LeaseLostError                     another attempt owns the job now
        TimeLimitError                     the job has run for as long as it may
      DatasetError                         no pictures, too few, too many broken
      NotMeasurableError                   pictures that a metric says nothing about
      StorageError
        DatabaseUnavailableError
        SchemaMismatchError
        CheckpointCorruptError
        ForeignFileError                   a weight file that is not what it says
        DiskFullError
        VolumeError                        read-only, missing, not a directory, or it answers with errors
      QueueUnavailableError                Redis is not there
      WorkerError
        GpuUnavailableError
        GpuBusyError                       another worker holds this GPU
        WorkerNameTakenError               another live worker has this name
        ProcessUnavailableError            no process or thread can be started
        OutOfMemoryError                   of the device
      TrainingDivergedError
        CollapsedError                     the generator repeats itself
    StopRequested (BaseException)          `except Exception` cannot swallow it

Each class carries a machine-readable `code`, which stands in the job table,
an exit code for the command line, and a retry policy for the supervisor.
"""

from enum import StrEnum
from typing import Any, ClassVar


class Retry(StrEnum):
    """What a supervisor does with a job that ended in this error."""

    NEVER = "never"  # the next try would end the same way
    FRESH = "fresh"  # once, in a new process
    LATER = "later"  # the surroundings are at fault: with backoff, not counted
    SOME = "some"  # with backoff, but only a few times in a row: it may pass, or be there for good


class GanqError(Exception):
    """
    Base of all errors meant for a person: one line of what was wrong, one of what to do.

    Args:
        message: what was wrong, without a full stop at the end.
        hint: the way out, as a command or a sentence.
        facts: kept as attributes, so that callers need not parse the message.
    """

    code: ClassVar[str] = "ERROR"
    exit_code: ClassVar[int] = 1
    retry: ClassVar[Retry] = Retry.NEVER

    def __init__(self, message: str, *, hint: str | None = None, **facts: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = facts

    def __getattr__(self, name: str) -> Any:
        facts = self.__dict__.get("facts", {})
        if name in facts:
            return facts[name]
        raise AttributeError(name)


class SpecError(GanqError, ValueError):
    """The request itself cannot work: a size, a count, a combination of options."""

    code = "BAD_SPEC"
    exit_code = 2


class NotFoundError(GanqError):
    """Something the user named does not exist."""

    code = "NOT_FOUND"
    exit_code = 3


class JobNotFoundError(NotFoundError):
    """No job has this id or name."""

    code = "JOB_NOT_FOUND"


class CheckpointNotFoundError(NotFoundError):
    """The job has no such checkpoint, or none yet."""

    code = "CHECKPOINT_NOT_FOUND"


class ConfigError(GanqError):
    """A setting has a value that cannot work, or the machine lacks something."""

    code = "BAD_CONFIG"
    exit_code = 2


class JobError(GanqError):
    """The job table refused a step."""

    code = "JOB_ERROR"


class InvalidTransitionError(JobError):
    """A job cannot go from its state to that one."""

    code = "INVALID_TRANSITION"


class LeaseLostError(JobError):
    """The (attempt, token) of the caller is not the job's any more: touch nothing."""

    code = "LEASE_LOST"


class TimeLimitError(JobError):
    """The job has run, over all its attempts, for as long as it may."""

    code = "TIME_LIMIT"


class DatasetError(GanqError):
    """A folder of pictures that cannot be trained on."""

    code = "BAD_DATASET"


class NotMeasurableError(GanqError):
    """A metric would give a number without a meaning for these pictures."""

    code = "NOT_MEASURABLE"


class StorageError(GanqError):
    """A file is missing, or is not what it should be; waiting does not mend that."""

    code = "STORAGE_ERROR"
    retry = Retry.SOME


class DatabaseUnavailableError(StorageError):
    """The job table cannot be reached."""

    code = "DATABASE_UNAVAILABLE"
    retry = Retry.LATER


class SchemaMismatchError(StorageError):
    """The database is older or newer than this code."""

    code = "SCHEMA_MISMATCH"
    retry = Retry.NEVER


class CheckpointCorruptError(StorageError):
    """A checkpoint's bytes are not those that were registered."""

    code = "CHECKPOINT_CORRUPT"
    retry = Retry.NEVER


class ForeignFileError(StorageError):
    """A weight file from outside that is not what it says, or not safe."""

    code = "UNSAFE_WEIGHTS"
    retry = Retry.NEVER


class DiskFullError(StorageError):
    """No room on the volume."""

    code = "DISK_FULL"
    retry = Retry.LATER


class VolumeError(StorageError):
    """The volume is missing, read-only or not a directory, or it answers with errors."""

    code = "VOLUME_UNAVAILABLE"
    retry = Retry.LATER


class QueueUnavailableError(GanqError):
    """Redis cannot be reached: jobs are still accepted and found by polling."""

    code = "REDIS_UNAVAILABLE"
    retry = Retry.LATER


class WorkerError(GanqError):
    """A worker cannot do its work."""

    code = "WORKER_ERROR"


class GpuUnavailableError(WorkerError):
    """The GPU that was asked for is not there."""

    code = "GPU_UNAVAILABLE"


class GpuBusyError(WorkerError):
    """Another worker of this machine already holds the GPU."""

    code = "GPU_BUSY"


class WorkerNameTakenError(WorkerError):
    """Another live worker has the same name, and had it first."""

    code = "WORKER_NAME_TAKEN"


class ProcessUnavailableError(WorkerError):
    """A process or thread that a job needs cannot be started."""

    code = "PROCESS_UNAVAILABLE"
    retry = Retry.LATER


class OutOfMemoryError(WorkerError):
    """The device ran out of memory."""

    code = "OUT_OF_MEMORY"
    retry = Retry.FRESH


class TrainingDivergedError(GanqError):
    """A loss or a weight is not finite."""

    code = "NAN_LOSS"


class CollapsedError(TrainingDivergedError):
    """The generator makes a few pictures over and over, and once made many."""

    code = "COLLAPSED"


class StopRequested(BaseException):
    """
    The job was asked to stop and has put its work in order.

    Args:
        reason: a jobs.states.StopReason value.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def all_errors(base: type[GanqError] = GanqError) -> list[type[GanqError]]:
    """A class of errors and all below it, as far as they are imported."""
    return [base, *(one for child in base.__subclasses__() for one in all_errors(child))]


def one_line(exc: BaseException) -> str:
    """Return what an error says, without its traceback and in one line, for a log."""
    said = str(exc).strip().splitlines()
    if isinstance(exc, GanqError):
        return said[0] if said else exc.code
    return f"{type(exc).__name__}: {said[0]}" if said else type(exc).__name__


def error_of(code: str, message: str, hint: str | None) -> GanqError:
    """An error that another process has told of, of the class that its code names: its policy holds."""
    cls = {one.code: one for one in all_errors()}.get(code, GanqError)
    return cls(message, hint=hint)
