"""
The random mode in small: row F6 of docs/fault-matrix.md.

`make random` runs it for longer and with any seed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.tier2, pytest.mark.timeout(600)]


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_f06_half_a_minute_of_faults_at_random_violates_nothing(tmp_path: Path, database: str) -> None:
    command = [sys.executable, "-m", "chaos.random_mode", "--seed", "6", "--seconds", "30"]
    done = subprocess.run(
        [*command, "--database", database, "--json", str(tmp_path / "facts.json")],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["violations"] == 0
    assert facts["kills"] + facts["stops"] > 0, "nothing was done to them"
    assert facts["states"]["succeeded"] > 0
