"""Log records of workers."""

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from storage.settings import Settings
from worker.host import logs


@pytest.fixture(params=["text", "json"])
def written(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Log an error with its traceback, and return the log."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    logs.configure(Settings.load({"GANQ_HOME": str(tmp_path), "GANQ_LOG_FORMAT": request.param}))

    def log(name: str, error: Exception) -> str:
        try:
            raise error
        except Exception:
            logging.getLogger(name).critical("cannot ack %r", "7", exc_info=True)
        return stderr.getvalue()

    yield log
    root.handlers[:], root.level = before


@pytest.mark.parametrize("error", [redis.ConnectionError("Connection refused"), ConnectionResetError("gone")])
def test_an_unavailable_broker_is_logged_in_one_line(written: Any, error: Any) -> None:
    result = written("kombu.message", error)
    assert result.count("\n") == 1, result
    assert f"cannot ack '7' ({type(error).__name__}: {error})" in result


@pytest.mark.parametrize("name", ["kombu.message", "ganq.supervisor"])
@pytest.mark.parametrize("error", [ValueError("a defect"), FileNotFoundError("x"), OSError(24, "too many")])
def test_a_defect_keeps_its_traceback(written: Any, name: str, error: Any) -> None:
    assert "test_logs.py" in written(name, error)


def test_an_error_of_ours_keeps_its_traceback_whatever_it_is(written: Any) -> None:
    assert "test_logs.py" in written("ganq.supervisor", redis.ConnectionError("Connection refused"))
