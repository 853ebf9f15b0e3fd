"""`ganq show`: what it prints, submitted again, gives an equal spec."""

import io
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ganq as api
from ganq.submission.describe import FORMATS, describe
from jobs.errors import SpecError
from jobs.kinds import SPEC_VERSION
from jobs.recipes import RECIPES
from jobs.specs import EvaluateSpec, GenerateSpec, Spec, TrainSpec
from jobs.specs.train import NEW_FIELDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from unit.conftest import Ganq

    from storage.db.queries import Queries
    from storage.db.store import JobStore

RATES = st.floats(1e-6, 1, exclude_min=True)
TRAINING = {
    "recipe": st.sampled_from([*RECIPES]),
    "epochs": st.integers(1, 10**6),
    "batch": st.integers(2, 60),
    "size": st.sampled_from([16, 24, 64, 96, 256]),
    "patch_size": st.sampled_from([0, 2, 3, 4]),
    "antialias": st.booleans(),
    "lr_g": RATES,
    "lr_d": RATES,
    "beta1": st.floats(0, 0.99),
    "seed": st.integers(0, 2**63 - 1),
    "augment": st.sampled_from([(), ("translation",), ("color", "cutout"), ("auto",)]),
    "mirror": st.booleans(),
    "deterministic": st.booleans(),
    "keep_duplicates": st.booleans(),
    "metric": st.sampled_from(["kid", "fid", "swd", "none"]),
    "checkpoint_seconds": st.floats(0.5, 1e9),
    "white_level": st.floats(0, 2**32),
    "device": st.sampled_from(["auto", "cpu"]),
    "keep_every": st.integers(0, 100),
}
RANGES = st.sampled_from([((0, 3), (7, 7)), ((5, 5),), ((10, 12), (2, 3))])
GENERATION = {
    "seed": st.integers(0, 2**63 - 1),
    "checkpoint": st.sampled_from(["best", "last", "4"]),
    "noise_std": st.floats(0, 100),
    "noise_mean": st.floats(-100, 100),
    "truncation": st.floats(0.01, 10),
    "format": st.sampled_from(["png", "webp", "jpeg", "tar", "npz"]),
    "grid": st.integers(0, 4096),
    "grid_epochs": st.booleans(),
    "passport": st.booleans(),
    "micro_batch": st.integers(1, 4096),
    "deterministic": st.booleans(),
}
HOW_MANY: st.SearchStrategy[Any] = st.one_of(
    st.builds(dict, count=st.integers(1, 8000)),
    st.builds(dict, seeds=RANGES),
    st.builds(dict, keep=st.just(4), of=st.integers(4, 100)),
    st.builds(dict, interpolate=st.just((3, 17, 3)), frames=st.integers(3, 99)),
)
EVALUATION = {
    "checkpoint": st.sampled_from(["best", "last"]),
    "count": st.integers(50, 100_000),
    "search": st.integers(50, 10**6),
    "max_skip": st.floats(0, 1),
    "seed": st.integers(0, 2**63 - 1),
    "keep_duplicates": st.booleans(),
}


def valid(cls: type[Spec], options: dict[str, Any]) -> Spec | None:
    try:
        return cls.create(**options)
    except SpecError:
        return None


def chosen(table: dict[str, Any]) -> Any:
    return st.fixed_dictionaries({}, optional=table)


@pytest.fixture
def submitted_as(
    ganq: "Ganq", queries: "Queries", settings_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> "Callable[[int, str], Any]":
    """Print a job in a form and submit what was printed; return the new job's row."""

    def run(job_id: int, form: str) -> Any:
        text = describe(queries.get(job_id), queries, form)
        if form == "command":
            words = shlex.split(text.replace("\\\n", " "), comments=True)
            assert words.pop(0) == "ganq"
            said = ganq(*words)
            assert said.code == 0, said.err
        elif form == "python":
            names: dict[str, Any] = {}
            exec(compile(text, "shown", "exec"), names)
            names["job"]._client.close()
        else:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
            said = ganq("submit", "-f", "-")
            assert said.code == 0, said.err
        return queries.page(_all(), limit=1)[0]

    return run


def _all() -> Any:
    from storage.db.queries import Filter

    return Filter()


@pytest.fixture
def store_spec(store: "JobStore") -> "Callable[[Spec], int]":
    import secrets

    def run(spec: Spec) -> int:
        return store.submit(
            kind=spec.kind,
            spec=spec.to_json(),
            spec_version=SPEC_VERSION,
            submit_key=secrets.token_hex(16),
            user="tester",
        ).id

    return run


MANY = settings(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@MANY
@given(options=chosen(TRAINING), form=st.sampled_from(FORMATS))
def test_a_training_that_is_shown_and_submitted_again_has_an_equal_spec(
    submitted_as: Any, store_spec: Any, image_folder: Path, options: dict[str, Any], form: str
) -> None:
    spec = valid(TrainSpec, {"data": str(image_folder), "batch": 16, **options})
    if spec is None or spec.to_json()["batch"] > 60:
        return
    assert submitted_as(store_spec(spec), form).spec == spec.to_json()


@pytest.mark.parametrize("size", [96, 256])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("form", FORMATS)
def test_a_training_of_an_earlier_version_is_shown_with_what_its_recipe_did_then(
    submitted_as: Any, store: "JobStore", image_folder: Path, recipe: str, form: str, size: int
) -> None:
    today = TrainSpec.create(data=str(image_folder), recipe=recipe, batch=16, size=size).to_json()
    then = {name: value for name, value in today.items() if name not in NEW_FIELDS}
    stored = store.submit(
        kind="train", spec=then, spec_version=SPEC_VERSION, submit_key="then", user="tester"
    )
    assert submitted_as(stored.id, form).spec == TrainSpec.from_json(then).to_json()


@MANY
@given(options=chosen(GENERATION), number=HOW_MANY, form=st.sampled_from(FORMATS))
def test_so_has_a_generation(
    submitted_as: Any, store_spec: Any, trained: Any, options: dict[str, Any], number: Any, form: str
) -> None:
    spec = valid(GenerateSpec, {"source": trained(), **number, **options})
    if spec is not None:
        assert submitted_as(store_spec(spec), form).spec == spec.to_json()


@MANY
@given(options=chosen(EVALUATION), form=st.sampled_from(FORMATS))
def test_so_has_an_evaluation(
    submitted_as: Any, store_spec: Any, trained: Any, image_folder: Path, options: dict[str, Any], form: str
) -> None:
    spec = valid(EvaluateSpec, {"source": trained(), "data": str(image_folder), "size": 24, **options})
    assert spec is not None
    assert submitted_as(store_spec(spec), form).spec == spec.to_json()


@pytest.mark.parametrize("form", FORMATS)
def test_so_have_a_continued_and_a_fine_tuned_training(
    submitted_as: Any, queries: "Queries", image_folder: Path, form: str
) -> None:
    with api.connect() as client:
        first = client.train(data=image_folder, epochs=2, batch=16, size=24, recipe="sngan", lr_g=1e-3)
        more = client.train(continue_from=first, epochs=9, patience=3)
        tuned = client.train(init_from=first, data=image_folder, batch=8, freeze_d=1)
        for job in (more, tuned):
            assert submitted_as(job.id, form).spec == job.spec


def test_only_what_differs_from_the_recipe_is_printed_beside_name_and_facts(
    ganq: "Ganq", image_folder: Path
) -> None:
    options = ["--lr-g", "1e-3", "--name", "a", "--priority", 3, "--queue", "q"]
    ganq("submit", "train", "--data", image_folder, *options)
    said = ganq("show", "a")
    lines = said.out.splitlines()
    assert lines[0].startswith("# job 1, queued")
    words = shlex.split(said.out.replace("\\\n", " "), comments=True)
    assert {word.split("=")[0] for word in words[3:]} == {
        *("--data", "--recipe", "--lr-g", "--name", "--priority", "--queue")
    }
    assert json.loads(ganq("show", "a", "--as", "json").out)["job"][0]["lr-g"] == 1e-3


def test_the_build_of_a_job_that_ran_is_a_comment(
    ganq: "Ganq", store: "JobStore", running_job_factory: Any
) -> None:
    lease = running_job_factory()
    store.succeed(lease, {"build": {"torch": "2.10", "device": "cpu"}})
    said = ganq("show", lease.job_id, "--as", "toml").out
    assert "# build: device cpu, torch 2.10" in said


def test_a_job_of_ganq_0_2_says_what_a_command_cannot(
    submitted_as: Any, store_spec: Any, ganq: "Ganq", image_folder: Path
) -> None:
    spec = TrainSpec.from_json({"data": str(image_folder), "batch": 16})
    assert spec.reader == 1
    job_id = store_spec(spec)
    assert "# reader 1" in ganq("show", job_id).out
    assert submitted_as(job_id, "toml").spec == spec.to_json()


def test_shards_and_imports_are_not_shown(ganq: "Ganq", trained: Any, image_folder: Path) -> None:
    ganq("submit", "generate", "--from", trained(), "--count", 100, "--shard-size", 64)
    said = ganq("show", 3)
    assert (said.code, "is a shard of job 2" in said.err) == (2, True)
    assert ganq("show", "nobody").code == 3
