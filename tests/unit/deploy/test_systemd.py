"""The systemd units parse, are hardened, and fit ganq's own limits."""

import configparser
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storage.settings import Settings

UNITS = sorted((Path(__file__).parents[3] / "deploy" / "systemd").glob("*.service"))
EXPOSURE = 25  # tenths; systemd calls less than 50 OK
needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
by_name = pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)


def read(unit: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(unit)
    return parser


def here(unit: Path, folder: Path) -> Path:
    """Copy a unit with a program that exists on this machine."""
    text = unit.read_text().replace("/opt/ganq/bin/ganq", sys.executable)
    copy = folder / unit.name
    copy.write_text(text)
    return copy


def test_there_is_a_unit_for_workers_and_one_for_a_single_machine() -> None:
    assert [unit.name for unit in UNITS] == ["ganq-up@.service", "ganq-worker.service"]


@needs_analyze
@by_name
def test_systemd_finds_no_fault_in_a_unit(unit: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", str(here(unit, tmp_path))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_analyze
@by_name
def test_a_unit_is_hardened(unit: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            "systemd-analyze",
            "security",
            "--offline=true",
            f"--threshold={EXPOSURE}",
            str(here(unit, tmp_path)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-400:] + done.stderr


@by_name
def test_a_unit_can_be_enabled_and_runs_a_command_of_ganq(unit: Path) -> None:
    from test_docs import parse

    parsed = read(unit)
    assert parsed["Install"]["WantedBy"] == "multi-user.target"
    program, *words = parsed["Service"]["ExecStart"].split()
    assert program == "/opt/ganq/bin/ganq"
    parse(["ganq", *words])


@by_name
def test_a_unit_leaves_time_to_drain_and_does_not_restart_on_a_wrong_setting(unit: Path) -> None:
    service = read(unit)["Service"]
    assert int(service["TimeoutStopSec"]) > Settings.drain_seconds + 30  # as long as the launcher waits
    assert int(service["WatchdogSec"]) >= Settings.stuck_seconds
    assert service["Type"] == "notify"
    assert service["KillMode"] == "mixed"
    assert service["RestartPreventExitStatus"] == "2"


@pytest.mark.parametrize("needed", ["seccomp", "landlock_create_ruleset", "landlock_restrict_self"])
@by_name
def test_the_sandbox_of_ganq_works_within_the_unit(unit: Path, needed: str) -> None:
    service = read(unit)["Service"]
    assert needed in service["SystemCallFilter"].split()
    assert "AF_UNIX" in service["RestrictAddressFamilies"].split()
