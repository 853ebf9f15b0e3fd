"""
All errors that ganq raises.

    GanqError
      SpecError (also ValueError)          a request that cannot work; exit 2
        SubmitKeyReusedError               the key belongs to another request
      NotFoundError                        exit 3
        JobNotFoundError
        CheckpointNotFoundError
      AccessError                          the server does not allow the request
        UnauthenticatedError               no token, or one that is not valid
        ForbiddenError                     the role does not allow it
      ConfigError                          a setting or the set-up is wrong
      JobError
        InvalidTransitionError
        LeaseLostError                     another attempt holds the lease
        TimeLimitError                     the job has used up its time limit
      DatasetError                         no images, too few, or too many unreadable
      NotMeasurableError                   images for which a metric is meaningless
      StorageError
        DatabaseUnavailableError
          ServerUnavailableError           the server of the REST API cannot be reached
        SchemaMismatchError
        CheckpointCorruptError
        ForeignFileError                   an unsafe or malformed weight file
        DiskFullError
        DirectoryFullError                 one folder can hold no more entries
        VolumeError                        read-only, missing, not a directory, or with I/O errors
      QueueUnavailableError                Redis cannot be reached
      WorkerError
        GpuUnavailableError
        GpuBusyError                       another worker holds this GPU
        WorkerNameTakenError               another live worker has this name
        ProcessUnavailableError            no process or thread can be started
        OutOfMemoryError                   of the device
      TrainingDivergedError
        CollapsedError                     the generator produces few distinct images
    StopRequested (BaseException)          `except Exception` cannot swallow it

Each class has a machine-readable `code`, which is stored in the job table,
an exit code for the command line, and a retry policy for the supervisor.
"""

from enum import StrEnum
from typing import Any, ClassVar


class Retry(StrEnum):
    """How a supervisor retries a job that failed with this error."""

    NEVER = "never"  # it would fail again
    FRESH = "fresh"  # once, in a new process
    LATER = "later"  # the environment failed: with backoff, not counted as a failure
    SOME = "some"  # with backoff, a few times in a row: it may be transient or permanent


class GanqError(Exception):
    """
    Base of all errors that are shown to users.

    Args:
        message: what is wrong, in one line without a full stop.
        hint: what to do, as a command or a sentence.
        facts: become attributes, so that callers need not parse the message.
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
    """The request is invalid: a size, a count, a combination of options."""

    code = "BAD_SPEC"
    exit_code = 2


class SubmitKeyReusedError(SpecError):
    """The submit key belongs to another request."""

    code = "SUBMIT_KEY_REUSED"


class NotFoundError(GanqError):
    """What the user named does not exist."""

    code = "NOT_FOUND"
    exit_code = 3


class JobNotFoundError(NotFoundError):
    """No job has this id or name."""

    code = "JOB_NOT_FOUND"


class CheckpointNotFoundError(NotFoundError):
    """The job has no such checkpoint."""

    code = "CHECKPOINT_NOT_FOUND"


class AccessError(GanqError):
    """The server does not allow the request."""

    code = "ACCESS_ERROR"


class UnauthenticatedError(AccessError):
    """The request has no token, or one that is unknown, expired or revoked."""

    code = "UNAUTHENTICATED"


class ForbiddenError(AccessError):
    """The role of the token does not allow the request."""

    code = "FORBIDDEN"


class ConfigError(GanqError):
    """A setting is invalid, or the machine lacks something."""

    code = "BAD_CONFIG"
    exit_code = 2


class JobError(GanqError):
    """The job table refused a change."""

    code = "JOB_ERROR"


class InvalidTransitionError(JobError):
    """A job cannot change from its state to that one."""

    code = "INVALID_TRANSITION"


class LeaseLostError(JobError):
    """The caller no longer holds the lease, and must change nothing."""

    code = "LEASE_LOST"


class TimeLimitError(JobError):
    """The attempts of the job have used up its time limit."""

    code = "TIME_LIMIT"


class DatasetError(GanqError):
    """The data set cannot be used."""

    code = "BAD_DATASET"


class NotMeasurableError(GanqError):
    """A metric is meaningless for these images."""

    code = "NOT_MEASURABLE"


class StorageError(GanqError):
    """A file is missing or has unexpected contents; waiting does not help."""

    code = "STORAGE_ERROR"
    retry = Retry.SOME


class DatabaseUnavailableError(StorageError):
    """The job table cannot be reached."""

    code = "DATABASE_UNAVAILABLE"
    retry = Retry.LATER


class ServerUnavailableError(DatabaseUnavailableError):
    """The server of the REST API cannot be reached."""

    code = "SERVER_UNAVAILABLE"


class SchemaMismatchError(StorageError):
    """The database schema is older or newer than this version."""

    code = "SCHEMA_MISMATCH"
    retry = Retry.NEVER


class CheckpointCorruptError(StorageError):
    """A checkpoint differs from what was registered."""

    code = "CHECKPOINT_CORRUPT"
    retry = Retry.NEVER


class ForeignFileError(StorageError):
    """A weight file of the user is unsafe or malformed."""

    code = "UNSAFE_WEIGHTS"
    retry = Retry.NEVER


class DiskFullError(StorageError):
    """The volume has no free space."""

    code = "DISK_FULL"
    retry = Retry.LATER


class DirectoryFullError(StorageError):
    """A folder has as many entries as its file system allows, while the volume has free space."""

    code = "DIRECTORY_FULL"


class VolumeError(StorageError):
    """The volume is missing, read-only, not a directory, or has I/O errors."""

    code = "VOLUME_UNAVAILABLE"
    retry = Retry.LATER


class QueueUnavailableError(GanqError):
    """Redis cannot be reached; jobs are still accepted, and workers find them by polling."""

    code = "REDIS_UNAVAILABLE"
    retry = Retry.LATER


class WorkerError(GanqError):
    """A worker cannot do its work."""

    code = "WORKER_ERROR"


class GpuUnavailableError(WorkerError):
    """The requested GPU does not exist."""

    code = "GPU_UNAVAILABLE"


class GpuBusyError(WorkerError):
    """Another worker of this machine already holds the GPU."""

    code = "GPU_BUSY"


class WorkerNameTakenError(WorkerError):
    """Another live worker has the same name."""

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
    """The generator has collapsed to few distinct images."""

    code = "COLLAPSED"


class StopRequested(BaseException):
    """
    The job stops on request, with its work saved.

    Args:
        reason: a jobs.states.StopReason value.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def all_errors(base: type[GanqError] = GanqError) -> list[type[GanqError]]:
    """Return a class of errors and all its imported subclasses."""
    return [base, *(one for child in base.__subclasses__() for one in all_errors(child))]


def one_line(exc: BaseException) -> str:
    """Return an error as one line for a log, without its traceback."""
    said = str(exc).strip().splitlines()
    if isinstance(exc, GanqError):
        return said[0] if said else exc.code
    return f"{type(exc).__name__}: {said[0]}" if said else type(exc).__name__


def error_of(code: str, message: str, hint: str | None, **facts: Any) -> GanqError:
    """Return an error that another process has reported, with the class that has this code."""
    cls = {one.code: one for one in reversed(all_errors())}.get(code, GanqError)  # a class before its heirs
    error = cls(message, hint=hint, **facts)
    if error.code != code:  # of another version
        setattr(error, "code", code)  # noqa: B010 - a constant of the class
    return error
