"""Job files: what is accepted together, and what is refused as a whole."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import ganq as api
from ganq.submission.schema import job_file_schema
from jobs.specs import TrainSpec

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.queries import Queries

Submit = Callable[..., Any]
PAGE = Path(__file__).parents[3] / "docs" / "jobfiles.md"


@pytest.fixture
def submit(ganq: "Ganq", tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Submit:
    """Write a job file and submit it; the data set is faces/ in the current folder."""
    monkeypatch.chdir(tmp_path)

    def run(text: str, *options: str) -> Any:
        (tmp_path / "jobs.toml").write_text(text)
        return ganq("submit", "-f", "jobs.toml", *options)

    return run


def job(**options: Any) -> str:
    lines = [f"{name.replace('_', '-')} = {json.dumps(value)}" for name, value in options.items()]
    return "\n".join(["[[job]]", *lines, ""])


TRAIN: dict[str, Any] = {"kind": "train", "data": "faces"}


def test_the_example_of_the_manual_is_accepted_as_it_is_described(submit: Submit, queries: "Queries") -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    dry = submit(example, "--dry-run")
    assert (dry.code, list(queries.stream(api_filter()))) == (0, [])
    said = submit(example)
    assert said.code == 0, said.err
    base = queries.find("base")
    sweep = queries.page(api_filter(sweep=queries.find_sweep("rates")), limit=9)
    images = queries.find("images")
    (measured,) = queries.page(api_filter(kind="evaluate"), limit=9)
    assert base.spec["epochs"] == 200
    assert {(one.spec["lr_g"], one.spec["seed"]) for one in sweep} == {
        (rate, seed) for rate in (1e-4, 2e-4) for seed in (0, 1)
    }
    assert {one.spec["init_from"] for one in sweep} == {base.id}
    assert [needed for needed, _ in queries.needs(images.id)] == [base.id]
    assert images.spec["source"] == base.id
    needed = {needed for needed, _ in queries.needs(measured.id)}
    assert needed == {images.id, *(one.id for one in sweep)}
    assert "no worker is running" in said.err


def api_filter(**wanted: Any) -> Any:
    from storage.db.queries import Filter

    return Filter(**wanted)


def test_a_job_equals_that_of_the_command_line(submit: Submit, ganq: "Ganq", queries: "Queries") -> None:
    options = {"lr_g": 1e-3, "augment": "none", "mirror": True, "time_limit": "2h", "priority": 7}
    assert submit(job(**TRAIN, **options, no_preempt=True, hold=True)).code == 0
    typed = ["--lr-g", "1e-3", "--augment", "none", "--mirror", "--time-limit", "2h", "--priority", 7]
    assert ganq("submit", "train", "--data", "faces", *typed, "--no-preempt", "--hold").code == 0
    one, other = queries.get(1), queries.get(2)
    for column in ("spec", "priority", "preemptible", "held", "time_limit_s", "user", "queue", "kind"):
        assert getattr(one, column) == getattr(other, column), column


def test_shards_of_a_planned_generation_refer_to_its_model(submit: Submit, queries: "Queries") -> None:
    said = submit(
        job(kind="generate", count=100, shard_size=64, name="many", **{"from": "a"}) + job(**TRAIN, name="a")
    )
    assert said.code == 0, said.err
    model, parent = queries.find("a"), queries.find("many")
    shards = queries.shards(parent.id)
    assert [shard.spec["source"] for shard in shards] == [model.id] * 2
    assert all(model.id in [needed for needed, _ in queries.needs(shard.id)] for shard in shards)


def test_a_name_in_the_file_comes_before_one_in_the_table(submit: Submit, queries: "Queries") -> None:
    assert submit(job(**TRAIN, name="a")).code == 0
    assert submit(job(kind="generate", count=4, **{"from": "a"})).code == 0
    assert submit(job(kind="generate", count=4, **{"from": "a"}) + job(**TRAIN, name="a")).code == 0
    assert [queries.get(one).spec.get("source") for one in (2, 4)] == [1, 3]


def test_stdin_and_json_are_read_too(ganq: "Ganq", submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    text = json.dumps({"job": [{"kind": "train", "data": "faces"}]})
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    said = ganq("submit", "-f", "-", "--json")
    assert said.code == 0, said.err
    assert said.json()[0]["state"] == "queued"


def test_hold_holds_all_jobs_and_a_submit_key_gives_one(submit: Submit, queries: "Queries") -> None:
    text = job(**TRAIN, submit_key="k") + job(**TRAIN, name="s", submit_key="l", sweep={}).replace(
        "sweep = {}", "sweep = { seed = [1, 2] }"
    )
    assert submit(text, "--hold").code == 0
    assert submit(text, "--hold").code == 0
    assert [one.held for one in queries.stream(api_filter())] == [True] * 3


SEEDS, BATCHES = ",".join(map(str, range(2000))), ",".join(map(str, range(2, 502)))
TOO_MANY = f"[[job]]\nkind='train'\nname='a'\ndata='faces'\nsweep={{seed=[{SEEDS}],batch=[{BATCHES}]}}"
CYCLE = job(**TRAIN, name="a", after="b") + job(**TRAIN, name="b", after="a")
NO_MORE_EPOCHS = job(**TRAIN, name="a", epochs=4) + job(**TRAIN, **{"continue": "a"}, epochs=2)
NOW = job(**TRAIN, name="a") + job(kind="generate", count=4, now=True, **{"from": "a"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[job]\nkind = 'train'", "jobs.toml, line 1, column 6"),
        ("[[job]]\nkind = ", "jobs.toml, end of document"),
        ("[[job]]\nkind = 'train'\nepochs = 3 4", "jobs.toml, line 3, column 12"),
        ("", "has no [[job]] table"),
        ("job = 3", "has no [[job]] table"),
        ("[jobs]\nkind = 'train'", "there is no table 'jobs'"),
        ("\n[[job]]\nkind = 'paint'", "jobs.toml, line 2: the job has kind 'paint'"),
        ("[[job]]\ndata = 'faces'", "the job has no kind"),
        (job(**TRAIN, epoch=3), "line 1: train has no option 'epoch'"),
        (job(**TRAIN, lr_g=1e-3) + "lr_g = 1e-3", "is given twice"),
        ("[defaults]\ncuont = 3\n" + job(**TRAIN), "[defaults]: there is no option 'cuont'"),
        ("[defaults.train]\nepoch = 3\n" + job(**TRAIN), "[defaults.train]: there is no option 'epoch'"),
        (job(**TRAIN, name="a") * 2, "line 5: the name 'a' is already that of jobs.toml, line 1"),
        (
            job(**TRAIN, name="a", after="b") + job(**TRAIN, name="b", after="a"),
            "wait for each other: a → b → a",
        ),
        (job(**TRAIN, name="a", after="a"), "wait for each other: a → a"),
        (job(**TRAIN, after="nobody"), "there is no job named 'nobody'"),
        (job(**TRAIN) + job(kind="generate", count=0), "line 4: --count"),
        (job(**TRAIN) + job(**{**TRAIN, "data": "gone"}), "line 4: there is no data set"),
        (
            job(**TRAIN, name="a", epochs=4) + job(**TRAIN, **{"continue": "a"}, epochs=2),
            "job a already has 4",
        ),
        (
            job(**TRAIN, name="a") + job(kind="generate", count=4, now=True, **{"from": "a"}),
            "no checkpoint yet",
        ),
        (job(**TRAIN, name="a", sweep={"seed": 3}).replace(":", " ="), "TOML|line|column"),
        ("[[job]]\nkind='train'\ndata='faces'\nsweep={seed=[1,2]}", "a sweep needs a name"),
        ("[[job]]\nkind='train'\ndata='faces'\nname='a'\nsweep=3", "sweep is not a table"),
        (
            "[[job]]\nkind='train'\ndata='faces'\nname='a'\nsweep={seed=[1,2]}\n"
            + job(kind="generate", count=4, **{"from": "a"}),
            "'a' is a sweep of 2 jobs",
        ),
        (TOO_MANY, "1,000,000 jobs"),
    ],
)
def test_one_job_that_cannot_work_refuses_the_whole_file(
    submit: Submit, queries: "Queries", text: str, said: str
) -> None:
    answer = submit(text)
    assert answer.code in (1, 2, 3), answer.out
    assert re.search(said, answer.err) if "|" in said else said in answer.err
    assert answer.err.count("\n") <= 2
    assert list(queries.stream(api_filter())) == []


def test_a_failure_within_the_transaction_leaves_nothing(
    submit: Submit, queries: "Queries", monkeypatch: pytest.MonkeyPatch
) -> None:
    import storage.db.store.sweeps as sweeps
    from jobs.errors import SpecError

    insert: Any = vars(sweeps)["insert_job"]
    calls: list[Any] = []

    def fail_at_second(*args: Any, **columns: Any) -> Any:
        calls.append(columns)
        if len(calls) == 2:
            raise SpecError("the second one fails")
        return insert(*args, **columns)

    monkeypatch.setattr(sweeps, "insert_job", fail_at_second)
    assert submit(job(**TRAIN) * 2).code == 2
    assert list(queries.stream(api_filter())) == []


def test_the_schema_accepts_what_is_accepted_and_names_every_option() -> None:
    import jsonschema

    schema = job_file_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).is_valid
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    import tomllib

    assert check(tomllib.loads(example))
    assert not check({"job": [{"kind": "train", "epoch": 3}]})
    assert not check({"job": [{"kind": "train", "epochs": 0}]})
    assert not check({"job": []})
    train = schema["properties"]["job"]["items"]["oneOf"][0]["properties"]
    assert {name.replace("_", "-") for name in TrainSpec.model_fields} - set(train) == {"continue-from"}


def test_python_submits_a_file(
    settings_env: dict[str, str], tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "jobs.toml").write_text(job(**TRAIN, name="a") + job(kind="generate", count=4))
    with api.connect() as client:
        training, images = client.submit_file("jobs.toml")
        assert (training.name, images.spec["source"]) == ("a", training.id)
