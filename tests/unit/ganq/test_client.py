"""`import ganq`: what it loads, what it accepts, and what it says of jobs."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ganq
from jobs.errors import InvalidTransitionError, JobError, JobNotFoundError, SpecError, TrainingDivergedError
from jobs.recipes import DEFAULT_RECIPE
from jobs.specs import GenerateSpec, TrainSpec

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.rows import Lease
    from storage.db.store import JobStore
    from storage.settings import Settings


@pytest.fixture
def client(settings_env: dict[str, str]) -> Iterator[ganq.Client]:
    with ganq.connect() as client:
        yield client


# --- the package ----------------------------------------------------------------------------------


def test_all_holds_each_public_name_and_each_has_a_docstring() -> None:
    assert sorted(ganq._MODULES) == sorted(ganq.__all__) == ganq.__all__
    for name in ganq.__all__:
        thing = getattr(ganq, name)
        assert thing.__doc__, name
        for member, value in vars(thing).items():
            if callable(value) and not member.startswith("_") and thing.__module__.startswith("ganq."):
                assert value.__doc__, f"{name}.{member}"


def loaded_after(code: Any) -> Any:
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_the_import_loads_nothing_heavy_and_submitting_no_torch(
    settings_env: dict[str, str], image_folder: Path
) -> None:
    heavy = {"torch", "celery", "sqlalchemy", "redis", "numpy", "pydantic", "PIL", "click"}
    assert loaded_after("import ganq").isdisjoint(heavy)
    assert loaded_after("import ganq; ganq.connect()").isdisjoint(heavy)
    submitted = loaded_after(f"import ganq; ganq.connect().train(data={str(image_folder)!r}, hold=True)")
    assert submitted.isdisjoint({"torch", "click", "rich"})


def seconds_to_import(module: Any) -> Any:
    program = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_the_import_takes_at_most_as_long_as_that_of_sqlalchemy() -> None:
    ours = min(seconds_to_import("ganq") for _ in range(3))
    assert ours <= 1.3 * min(seconds_to_import("sqlalchemy") for _ in range(3))


def test_without_a_job_table_a_submission_creates_it_and_a_question_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_folder: Path
) -> None:
    monkeypatch.setenv("GANQ_HOME", str(tmp_path / "new"))
    monkeypatch.setenv("GANQ_REDIS_URL", "redis://127.0.0.1:1/0")
    with ganq.connect() as client:
        with pytest.raises(JobNotFoundError, match="no jobs yet"):
            list(client.jobs())
        job = client.train(data=image_folder)
        assert [one.id for one in client.jobs()] == [job.id]


# --- submit -----------------------------------------------------------------------------------


def test_a_training_equals_that_of_the_command_line(
    client: ganq.Client, ganq: "Ganq", image_folder: Path
) -> None:
    ganq("submit", "train", "--data", image_folder, "--lr-g", "1e-3", "--augment", "none", "--name", "a")
    job = client.train(data=image_folder, lr_g=1e-3, augment="none", name="b", time_limit="2h", hold=True)
    typed = client.job("a")
    assert job.spec == typed.spec
    assert job.spec["recipe"] == DEFAULT_RECIPE
    assert (job.status, job.name, job._row.time_limit_s) == ("held", "b", 7200.0)
    assert job._row.priority == typed._row.priority


def test_a_spec_is_submitted_as_it_is(
    client: ganq.Client, trained: Callable[..., int], image_folder: Path
) -> None:
    spec = TrainSpec.create(data=str(image_folder), recipe="sngan", epochs=3)
    assert client.submit(spec).spec == spec.to_json()
    drawn = GenerateSpec.create(source=trained(), seeds=((0, 3), (7, 7)), format="webp")
    assert client.submit(drawn).spec == drawn.to_json()


@pytest.mark.parametrize("seeds", ["0-3,7", [(0, 3), 7], [[0, 3], [7, 7]]])
def test_seeds_have_several_forms(client: ganq.Client, trained: Callable[..., int], seeds: Any) -> None:
    assert client.generate(trained(), seeds=seeds).spec["seeds"] == [[0, 3], [7, 7]]


def test_a_range_of_seeds_and_a_number_for_a_checkpoint(
    client: ganq.Client, trained: Callable[..., int]
) -> None:
    job = client.generate(trained(), seeds=range(4), checkpoint=4)
    assert (job.spec["seeds"], job.spec["checkpoint"]) == ([[0, 3]], "4")


def test_an_unknown_option_names_the_nearest(client: ganq.Client, image_folder: Path) -> None:
    with pytest.raises(SpecError, match="no option 'epoch'") as caught:
        client.train(data=image_folder, epoch=3)
    assert "epochs" in (caught.value.hint or "")
    assert "time_limit" in _hint(client, image_folder, time_limits=3)


def _hint(client: ganq.Client, image_folder: Any, **options: Any) -> Any:
    with pytest.raises(SpecError) as caught:
        client.train(data=image_folder, **options)
    return caught.value.hint


@pytest.mark.parametrize(
    "wrong",
    [
        {"priority": "high"},
        {"priority": 5000},
        {"hold": "yes"},
        {"name": "a b"},
        {"time_limit": "soon"},
        {"time_limit": -1},
        {"queue": "a b"},
        {"epochs": 0},
        {"reader": 9},
    ],
)
def test_a_wrong_value_is_refused_and_nothing_is_submitted(
    client: ganq.Client, image_folder: Path, wrong: Any
) -> None:
    with pytest.raises(SpecError):
        client.train(data=image_folder, **wrong)
    client.train(data=image_folder)
    assert len(list(client.jobs())) == 1


def test_a_submit_key_gives_one_job(client: ganq.Client, image_folder: Path) -> None:
    jobs = {client.train(data=image_folder, submit_key="night").id for _ in range(3)}
    assert len(jobs) == 1


def test_a_generation_waits_for_its_training_and_for_those_of_after(
    client: ganq.Client, image_folder: Path
) -> None:
    training, other = client.train(data=image_folder), client.train(data=image_folder, seed=1)
    job = client.generate(training, count=4, after=other)
    assert job.status == f"waiting on {training.id}, {other.id}"


def test_a_training_continues_and_fine_tunes_other_jobs(
    client: ganq.Client, trained: Callable[..., int], image_folder: Path
) -> None:
    first = client.train(data=image_folder, epochs=2)
    more = client.train(continue_from=first, epochs=4)
    assert (more.spec["continue_from"], more.spec["epochs"]) == (first.id, 4)
    tuned = client.train(data=image_folder, init_from=str(first.id), freeze_d=1)
    assert tuned.spec["init_from"] == first.id


def test_a_sweep_is_one_transaction_with_names(client: ganq.Client, image_folder: Path) -> None:
    sweep = client.sweep("train", {"lr_g": [1e-4, 2e-4], "seed": range(2)}, data=image_folder, name="rates")
    assert [job.name for job in sweep.jobs] == [
        f"rates-lr-g-{rate}-seed-{seed}" for rate in (0.0001, 0.0002) for seed in (0, 1)
    ]
    assert {job.id for job in client.jobs(sweep="rates")} == {job.id for job in sweep.jobs}


@pytest.mark.parametrize(
    "over",
    [{}, {"seed": []}, {"seed": [1, 1]}, {"seeds": ["0-3"]}, {"sead": [1]}, {"seed": 3}, {"batch": [4]}],
)
def test_a_sweep_that_cannot_work_is_refused(client: ganq.Client, image_folder: Path, over: Any) -> None:
    with pytest.raises(SpecError):
        client.sweep("train", over, data=image_folder, batch=8)


def test_notices_are_logged(
    client: ganq.Client, image_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client.train(data=image_folder)
    assert "no worker is running" in caplog.text
    assert {record.name for record in caplog.records} == {"ganq"}


# --- a job --------------------------------------------------------------------------------------


def test_jobs_are_filtered(client: ganq.Client, trained: Callable[..., int], image_folder: Path) -> None:
    done = trained(name="faces")
    queued = client.train(data=image_folder, name="later")
    assert [job.id for job in client.jobs()] == [queued.id, done]
    assert [job.id for job in client.jobs(state="succeeded")] == [done]
    assert [job.id for job in client.jobs(state=["queued", "running"], kind="train")] == [queued.id]
    assert [job.id for job in client.jobs(name="ace", since="1d")] == [done]
    assert [job.id for job in client.jobs(limit=1)] == [queued.id]
    unknown: list[dict[str, Any]] = [{"state": "done"}, {"kind": "paint"}, {"since": "soon"}]
    for wrong in unknown:
        with pytest.raises(SpecError):
            client.jobs(**wrong)


def test_a_job_is_held_released_cancelled_kept_and_retried(client: ganq.Client, image_folder: Path) -> None:
    job = client.train(data=image_folder, name="faces")
    assert job.hold().status == "held"
    assert job.release().status == "queued"
    assert job.cancel().state == "cancelled"
    with pytest.raises(InvalidTransitionError):
        job.cancel()
    with pytest.raises(JobError, match="cancelled"):
        job.wait()
    assert job.wait(check=False) is job
    again = job.retry()
    assert (again.spec, again.name, again._row.retry_of) == (job.spec, "faces", job.id)
    assert job.keep()._row.kept
    assert not job.keep(undo=True)._row.kept
    assert [event.type for event in job.events()][:2] == ["submitted", "held"]


def test_a_retry_takes_those_along_that_waited(client: ganq.Client, image_folder: Path) -> None:
    training = client.train(data=image_folder)
    waiting = client.generate(training, count=4)
    training.cancel()
    again = training.retry(with_waiting=True)
    (images,) = client.jobs(kind="generate", state="queued")
    assert (images._row.retry_of, images.spec["source"]) == (waiting.id, again.id)


def test_wait_raises_the_error_of_the_job_by_its_class(
    client: ganq.Client, store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    job = client.job(lease.job_id)
    store.fail(lease, TrainingDivergedError("the loss is not finite", hint="--lr-g 1e-4"))
    with pytest.raises(TrainingDivergedError, match="not finite") as caught:
        job.wait()
    assert caught.value.hint == "--lr-g 1e-4"


def test_wait_ends_after_its_timeout_and_when_the_job_ends(
    client: ganq.Client, store: "JobStore", running_job_factory: "Callable[..., Lease]"
) -> None:
    lease = running_job_factory()
    job = client.job(lease.job_id)
    with pytest.raises(TimeoutError, match=f"job {job.id}"):
        job.wait(0.05)
    other = threading.Timer(0.2, store.succeed, (lease, {"epochs": 1}))
    other.start()
    started = time.monotonic()
    assert job.wait(20).state == "succeeded"
    assert time.monotonic() - started < 10
    other.join()


def test_wait_outlasts_an_unavailable_job_table(
    client: ganq.Client,
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jobs.errors import DatabaseUnavailableError
    from storage.db.queries import Queries

    lease = running_job_factory()
    job, answer, calls = client.job(lease.job_id), Queries.get_many, []

    def unavailable_twice(self: Queries, ids: Any) -> Any:
        calls.append(ids)
        if len(calls) <= 2:
            raise DatabaseUnavailableError("away")
        return answer(self, ids)

    monkeypatch.setattr(Queries, "get_many", unavailable_twice)
    store.succeed(lease, {})
    assert job.wait(20).state == "succeeded"


def test_a_log_is_followed_to_its_end(
    client: ganq.Client,
    store: "JobStore",
    running_job_factory: "Callable[..., Lease]",
    settings: "Settings",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from storage.volume.layout import Volume

    monkeypatch.setattr("ganq.logs.POLL_S", 0.02)
    lease = running_job_factory()
    folder = Volume(settings.volume).attempt(lease.job_id, 1)
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("begun\nhalf a ")

    def work() -> None:
        with open(folder / "log.txt", "a") as file:
            file.write("line\nlast words")
        store.succeed(lease, {})

    job = client.job(lease.job_id)
    assert list(job.logs()) == ["begun", "half a "]
    other = threading.Timer(0.2, work)
    other.start()
    assert list(job.logs(follow=True)) == ["begun", "half a line", "last words"]
    other.join()


def test_what_a_job_lacks_is_reported(
    client: ganq.Client, trained: Callable[..., int], image_folder: Path
) -> None:
    queued = client.train(data=image_folder)
    with pytest.raises(ganq.GanqError, match="no published images"):
        queued.images()
    with pytest.raises(ganq.GanqError, match="no checkpoint yet"):
        queued.generator()
    images = client.generate(trained(), count=4)
    with pytest.raises(ganq.GanqError, match="it is queued"):
        images.images()
    with pytest.raises(ganq.GanqError, match="has no generator"):
        images.generator()
    with pytest.raises(JobNotFoundError):
        client.job("nobody")
