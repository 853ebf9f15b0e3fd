"""The asynchronous client against a real server, on SQLite and Postgres."""

import asyncio
import inspect
import os
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser.serving import Server, environment
from browser.world import World
from chaos.proxy import Proxy
from sqlalchemy import update

import ganq
from jobs.errors import (
    ConfigError,
    ForbiddenError,
    InvalidTransitionError,
    JobError,
    JobNotFoundError,
    SpecError,
    SubmitKeyReusedError,
)
from storage.db.tables import job as job_table
from storage.db.tables import worker
from storage.db.tokens import Role, Tokens
from storage.db.workers import WorkerStore

if TYPE_CHECKING:
    from storage.db.rows import WorkerIdentity
    from storage.settings import Settings


@pytest.fixture
def world(settings: "Settings") -> Iterator[World]:
    made = World(settings)
    made.database.require_schema()
    yield made
    made.close()


@pytest.fixture
def server(world: World) -> Iterator[Server]:
    started = Server(environment(world.settings), ("--port", "0", "--allow-changes")).start()
    yield started
    started.stop()


@pytest.fixture
def token(world: World) -> str:
    return Tokens(world.database).create("ada", Role.OPERATOR, None)[1]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 60))


def model_of(world: World) -> int:
    job = world.submit("model")
    world.begin(job, state="succeeded", result={"epoch": 24})
    world.add_checkpoint(job, 24, 0.5)
    return job


def test_the_verbs_are_those_of_the_client(
    server: Server, token: str, world: World, tmp_path: Path, worker_identity: "WorkerIdentity"
) -> None:
    model = model_of(world)
    WorkerStore(world.database, worker_identity).report("idle")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(70):
        (pictures / f"{number}.png").write_bytes(f"image {number}".encode())
    file = tmp_path / "jobs.toml"
    file.write_text(f'[[job]]\nkind = "generate"\nfrom = {model}\ncount = 4\nname = "of-a-file"\n')

    async def work() -> None:
        async with ganq.aconnect(server.base, token=token) as client:
            training = await client.train(
                data=pictures, name="faces", hold=True, epochs=3, labels={"project": "a"}, note="first"
            )
            assert (training.state, training.status, training.spec["epochs"]) == ("queued", "held", 3)
            assert Path(training.spec["data"]).is_relative_to(world.volume.uploads)
            assert (training.labels, training.note) == ({"project": "a"}, "first")
            first, second = await asyncio.gather(
                *(client.generate(model, count=8, submit_key="night") for _ in range(2))
            )
            assert first == second
            with pytest.raises(SubmitKeyReusedError, match="count is 8, not 9"):
                await client.generate(model, count=9, submit_key="night")
            spec = ganq.GenerateSpec.create(source=model, count=12, seed=7)
            assert (await client.submit(spec, name="seven")).spec == spec.to_json()
            swept = await client.sweep("generate", {"seed": range(3)}, source=model, count=4, name="s")
            assert [one.name for one in swept.jobs] == ["s-seed-0", "s-seed-1", "s-seed-2"]
            evaluation = await client.evaluate(training, count=64, hold=True)
            assert evaluation.kind == "evaluate"
            [of_file] = await client.submit_file(file)
            assert of_file.name == "of-a-file"
            assert [one.id async for one in client.jobs(kind="generate", limit=2)] == [
                of_file.id,
                swept.jobs[2].id,
            ]
            labelled = client.jobs(labels={"project": None}, since=3600)
            assert [one async for one in labelled] == [training]
            assert (await training.release()).status == "queued"
            assert (await training.set(priority=5, name="other", labels={"x": "y"})).name == "other"
            assert (await client.job("other")) == training
            assert (await training.hold()).status == "held"
            assert (await training.resume()).status == "queued"
            assert (await training.pause(reason="lunch")).status == "held"
            assert (await training.keep()).state == "queued"
            assert (await swept.jobs[2].move(before=swept.jobs[0])).state == "queued"
            assert (await training.cancel()).state == "cancelled"
            again = await training.retry()
            assert (again.state, again.name) == ("queued", "other")
            assert [event.type for event in await again.events()] == ["submitted"]
            assert (await (await client.job(model)).checkpoints())[0].epoch == 24
            with pytest.raises(TimeoutError):
                await again.wait(0.1)
            with pytest.raises(JobError, match="was cancelled"):
                await training.wait()
            with pytest.raises(InvalidTransitionError):
                await training.hold()
            with pytest.raises(JobNotFoundError):
                await client.job("nope")
            with pytest.raises(SpecError, match="cuont"):
                await client.generate(model, cuont=4)
            with pytest.raises(ForbiddenError, match="a path of the server"):
                await client.train(data="server:/etc")
            assert await client.drain(worker_identity.name) == [worker_identity.name]
            ended = asyncio.create_task(again.wait(30))
            await asyncio.sleep(0.2)
            await (await client.job(again.id)).cancel()
            with pytest.raises(JobError):
                await ended
            assert again.state == "cancelled"

    run(work())


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_images_and_logs_arrive_also_over_a_network_that_breaks_off(
    server: Server, token: str, world: World, tmp_path: Path
) -> None:
    made = world.images("made", model_of(world), count=12, format="png", scored=True)
    folder = world.volume.attempt(made, 1) / "images"
    job = world.submit("t")
    world.begin(job)
    world.log(job, b"one\ntwo\n")
    twice = world.submit("twice")
    world.begin(twice, attempts=2, state="succeeded", result={})
    for number, text in ((1, b"first\n"), (2, b"second\n")):
        world.log(twice, text, attempt_number=number)

    async def work(proxy: Proxy) -> None:
        async with ganq.aconnect(f"http://127.0.0.1:{proxy.port}", token=token) as client:
            images = [image async for image in (await client.job(made)).images()]
            assert [image.index for image in images] == list(range(12))
            assert images[3].score is not None
            data = await asyncio.gather(*(image.to_bytes() for image in images))
            assert data == [(folder / f"{number:06d}.png").read_bytes() for number in range(12)]
            assert (await images[0].to_numpy()).shape == (*(await images[0].to_pil()).size[::-1], 3)
            out = await (await client.job("made")).download(tmp_path / "out", only="images")
            assert sorted(os.listdir(out / "images")) == sorted(os.listdir(folder))
            running = await client.job(job)
            assert [line async for line in running.logs()] == ["one", "two"]
            lines = running.logs(follow=True)
            assert [await anext(lines), await anext(lines)] == ["one", "two"]
            proxy.reset()
            with open(world.volume.attempt(job, 1) / "log.txt", "ab") as file:
                file.write(b"three\n")
            assert await anext(lines) == "three"
            world.set(job, state="failed", error_code="CRASH_LOOP", lease_token=None)
            assert [line async for line in lines] == []
            with pytest.raises(ganq.GanqError) as caught:
                await running.wait()
            assert caught.value.code == "CRASH_LOOP"
            again = await client.job(twice)
            for follow in (False, True):
                assert [line async for line in again.logs(follow=follow)] == ["second"]
                whole = [line async for line in again.logs(follow=follow, all_attempts=True)]
                assert whole == ["first", "second"], follow

    with Proxy(server.port) as proxy:
        run(work(proxy))


def test_without_a_server_the_asynchronous_client_says_what_it_needs(tmp_path: Path) -> None:
    settings = ganq.Settings.load({"GANQ_HOME": str(tmp_path)})
    with pytest.raises(ConfigError, match="needs a server"):
        ganq.aconnect(settings)


@pytest.mark.parametrize(
    ("plain", "coroutines"), [(ganq.Client, ganq.AsyncClient), (ganq.Job, ganq.AsyncJob)]
)
def test_both_clients_have_the_same_verbs_with_the_same_arguments(plain: type, coroutines: type) -> None:
    own = {"session", "volume", "volume_of"}  # of a machine that has the job table
    for name in {one for one in dir(plain) if not one.startswith("_")} - own:
        here, there = getattr(plain, name), getattr(coroutines, name)
        if callable(here) and callable(there):
            assert [*inspect.signature(here).parameters] == [*inspect.signature(there).parameters], name


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_waiting_for_a_pause_or_a_drain_ends_when_it_has_happened_or_in_time(
    server: Server, token: str, world: World
) -> None:
    world.worker("w1", state="idle")
    job = world.submit("faces")
    world.begin(job)

    async def later(change: Any) -> None:
        await asyncio.sleep(0.3)
        await asyncio.to_thread(world.database.write, lambda conn: conn.execute(change))

    async def work() -> None:
        async with ganq.aconnect(server.base, token=token) as client:
            with pytest.raises(TimeoutError, match="w1"):
                await client.drain("w1", wait=0.1)
            # A service has started another process under this name.
            restarted = update(worker).where(worker.c.name == "w1").values(started_at=time.time())
            asked, _ = await asyncio.gather(client.drain("w1", wait=20), later(restarted))
            assert asked == ["w1"]
            running = await client.job(job)
            with pytest.raises(TimeoutError, match="the request stays"):
                await running.pause(wait=0.1)
            stopped = update(job_table).where(job_table.c.id == job).values(state="queued", held=1)
            await asyncio.gather(running.pause(wait=20), later(stopped))
            assert running.status == "paused"

    run(work())
