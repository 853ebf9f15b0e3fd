"""Requests at random from the OpenAPI document, by schemathesis: no 500, no answer that it does not say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser.serving import Server, environment
from browser.world import World, build

from storage.db.tokens import Role, Tokens

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance"
)


def fuzz(world: World, tmp_path: Path, *, examples: int, phases: str, seed: int = 1) -> str:
    """Run schemathesis against a server of this world; return what it printed."""
    world.database.require_schema()
    token = Tokens(world.database).create("ada", Role.ADMIN, None)[1]
    server = Server(environment(world.settings), ("--port", "0", "--allow-changes")).start()
    assert server.get("/api/v1/openapi.json").status == 200  # made once; schemathesis waits ten seconds
    # Half of the jobs in addresses exist: else nearly every answer is a 404.
    known = ", ".join(f'"{job}"' for job in [*world.ids.values(), "faces", "nope", "x/y", "0"])
    config = tmp_path / "schemathesis.toml"
    config.write_text(
        f'[parameters]\n"path.job" = [{known}]\n'
        # A data set of a billion gigabytes may be declared, and is refused for want of room.
        '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "507"]\n'
    )
    command = [
        *(sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()"),
        *("--config-file", str(config), "run", f"{server.base}/api/v1/openapi.json"),
        *("--header", f"Authorization: Bearer {token}", "--checks", CHECKS, "--phases", phases),
        # One thread: Hypothesis sets the recursion limit, which disturbs another's parser in Python 3.11.
        *("--max-examples", str(examples), "--seed", str(seed), "--workers", "1"),
        *("--exclude-operation-id", "putBlobs"),  # it does not make tar archives
        *("--generation-database", "none", "--no-color", "--continue-on-failure"),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=3000)
        assert server.get("/healthz").status == 200
    finally:
        server.stop()
    print(done.stdout[-6000:])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_a_few_requests_at_random(own_world: World, tmp_path: Path) -> None:
    own_world.begin(own_world.submit("faces"), state="succeeded", result={})
    own_world.images("images", 1, count=5, format="png")
    said = fuzz(own_world, tmp_path, examples=2, phases="fuzzing")
    assert int(re.findall(r"(\d+) generated", said)[-1]) > 30


@pytest.mark.tier2
@pytest.mark.timeout(3600)
def test_many_requests_at_random(own_world: World, tmp_path: Path) -> None:
    world = build(own_world.settings)
    try:
        fuzz(world, tmp_path, examples=200, phases="examples,coverage,fuzzing,stateful")
    finally:
        world.close()
