"""A volume that hangs (a hard NFS mount without its server) holds up no page."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from browser.serving import Server, environment
from browser.world import World
from mounts import HangingMount, missing

pytestmark = [pytest.mark.tier2, pytest.mark.skipif(missing() is not None, reason=str(missing()))]


def test_pages_are_served_from_the_table_while_the_volume_hangs(own_world: World, tmp_path: Path) -> None:
    job = own_world.submit("t")
    own_world.begin(job, state="succeeded", result={})
    own_world.train_files(job, range(1, 5))
    made = own_world.images("g", job, count=20, format="png")
    with HangingMount(own_world.settings.volume, tmp_path / "mounted") as mount:
        env = environment(own_world.settings) | {"GANQ_VOLUME": str(mount.place)}
        server = Server(env, ("--port", "0")).start()
        try:
            assert len(server.get(f"/jobs/{job}?format=json").json["run"]["samples"]) == 4
            mount.hang()
            paths = [f"/jobs/{job}", f"/jobs/{made}", f"/jobs/{job}/thumb", "/datasets", f"/jobs/{job}/log"]
            began = time.monotonic()
            with ThreadPoolExecutor(20) as pool:
                answers = list(pool.map(server.get, paths * 4))
            failed = [
                (path, answer.text)
                for path, answer in zip(paths * 4, answers, strict=True)
                if answer.status != 200
            ]
            assert not failed
            assert time.monotonic() - began < 19
            assert "does not answer" in server.get(f"/jobs/{job}").text
            assert "faces" not in server.get("/").text  # the queue is quick all along
            mount.go_on()
            deadline = time.monotonic() + 15
            while "does not answer" in server.get(f"/jobs/{job}").text:
                assert time.monotonic() < deadline
                time.sleep(0.3)
            assert len(server.get(f"/jobs/{job}?format=json").json["run"]["samples"]) == 4
        finally:
            mount.go_on()
            server.stop()
