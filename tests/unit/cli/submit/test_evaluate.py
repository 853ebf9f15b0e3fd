"""`ganq submit evaluate` and `ganq compare`: what can be evaluated, against what, and what is shown."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

if TYPE_CHECKING:
    from tables import Claimer
    from unit.conftest import Ganq

    from storage.db.queries import Queries
    from storage.db.rows import Lease
    from storage.db.store import JobStore

REPORT = {
    "image_count": 250,
    "metrics": {
        "kid/random": {"value": 0.0123, "spread": 0.001, "baseline": 0.0002, "note": None},
        "swd": {"value": 12.5, "spread": None, "baseline": 3.25, "note": None},
    },
    "precision": {"value": 0.8, "baseline": 0.9},
    "recall": {"value": 0.4, "baseline": 0.9},
    "diversity": 0.75,
    "copying": {"verdict": "none", "share": 0.008, "summary": "no sign of copying: 0.8 %"},
    "notes": ["40 training images are exact twins of others and count once"],
    "data": {"fingerprint": "f"},
}


@pytest.fixture
def real(tmp_path: Path) -> Any:
    folder = tmp_path / "real"
    folder.mkdir()
    for number in range(60):
        Image.new("RGB", (40, 32), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def generated(store: "JobStore", running_job_factory: "Callable[..., Lease]") -> Any:
    def make(source: Any, end: Any = "succeed", **asked: Any) -> Any:
        spec = {"source": source, "checkpoint": "best", **(asked or {"count": 64})}
        lease = running_job_factory(kind="generate", spec=spec)
        if end == "succeed":
            store.succeed(lease, {"image_count": 64, "manifest_sha256": "0" * 64})
        elif end == "fail":
            from jobs.errors import DatasetError

            store.fail(lease, DatasetError("no images"))
        return lease.job_id

    return make


@pytest.fixture
def evaluated(store: "JobStore", running_job_factory: "Callable[..., Lease]") -> Any:
    def make(source: Any, **changes: Any) -> Any:
        spec = {"source": source, "path": None, "checkpoint": "best", "data": "/d", "size": 24}
        lease = running_job_factory(kind="evaluate", spec=spec)
        store.succeed(lease, {**REPORT, **changes})
        return lease.job_id

    return make


def plan(ganq: "Ganq", *typed: Any) -> Any:
    said = ganq("submit", "evaluate", *typed, "--dry-run", "--json")
    assert said.code == 0, said.err
    return said.json()["spec"]


def test_a_training_is_evaluated_against_what_it_was_trained_on_at_its_size(
    ganq: "Ganq", trained: Callable[..., int], queries: "Queries"
) -> None:
    source = trained(name="faces")
    spec = plan(ganq, "faces", "--count", 100)
    assert (spec["source"], spec["path"], spec["data"]) == (source, None, "/pictures")
    assert (spec["size"], spec["count"], spec["checkpoint"]) == (24, 100, "best")
    assert ganq("submit", "evaluate", source).code == 0
    job = queries.get(source + 1)
    assert (job.kind, job.priority, job.preemptible) == ("evaluate", 5, False)


def test_a_generation_is_evaluated_against_what_its_model_was_trained_on(
    ganq: "Ganq", trained: Callable[..., int], generated: Any, real: Any
) -> None:
    image_folder = generated(trained())
    spec = plan(ganq, image_folder)
    assert (spec["source"], spec["data"], spec["size"]) == (image_folder, "/pictures", 24)
    assert plan(ganq, image_folder, "--data", real)["data"] == str(real)
    said = ganq("submit", "evaluate", image_folder, "--checkpoint", "last")
    assert (said.code, "cannot be used with" in said.err) == (2, True)


def test_images_at_a_path_are_evaluated_at_their_own_size_unless_set(
    bare_ganq: "Ganq", real: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = plan(bare_ganq, real, "--data", real)
    assert (spec["source"], spec["path"], spec["size"]) == (None, str(real), 32)
    assert plan(bare_ganq, real, "--data", real, "--size", 64)["size"] == 64
    monkeypatch.chdir(real.parent)
    assert plan(bare_ganq, "real", "--data", "real")["path"] == str(real)


def test_a_weight_file_needs_its_checksum(ganq: "Ganq", trained: Callable[..., int], tmp_path: Path) -> None:
    source = trained()
    file = tmp_path / "net.pth"
    file.write_bytes(b"weights")
    said = ganq("submit", "evaluate", source, "--feature-network", file)
    assert (said.code, "--feature-sha256" in said.err) == (2, True)
    typed = ("--feature-network", file, "--feature-sha256", "A" * 64)
    spec = plan(ganq, source, *typed)
    assert (spec["feature_network"], spec["feature_sha256"]) == (str(file), "a" * 64)


BAD = {
    "no such thing": (("nobody",), 3, "no job and no folder 'nobody'"),
    "no such path": (("no/where",), 3, "does not exist"),
    "neither a built-in network": ((1, "--feature-network", "vgg"), 3, "neither a built-in network"),
    "a checksum of a name": ((1, "--feature-sha256", "0" * 64), 2, "--feature-sha256 applies to a file"),
    "too few to draw": ((1, "--count", 10), 2, "--count"),
    "another checkpoint": ((1, "--checkpoint", "3"), 3, "no checkpoint of epoch 3"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_evaluation_is_one_line_and_no_row(
    ganq: "Ganq", trained: Callable[..., int], queries: "Queries", case: Any
) -> None:
    trained()
    typed, code, message = BAD[case]
    said = ganq("submit", "evaluate", *typed)
    assert said.code == code, said.err
    assert message in said.err.splitlines()[0]
    assert sum(queries.counts().values()) == 1


def test_ten_images_and_what_was_never_made_are_refused(
    ganq: "Ganq", trained: Callable[..., int], generated: Any, evaluated: Any, real: Any
) -> None:
    source = trained()
    for number in range(10, 60):
        (real / f"{number}.png").unlink()
    for typed in ((source, "--data", real), (real, "--data", real)):
        said = ganq("submit", "evaluate", *typed)
        assert (said.code, "contains 10 images, too few" in said.err) == (1, True), said.err
    shutil.rmtree(real)
    assert ganq("submit", "evaluate", source, "--data", real).code == 3
    said = ganq("submit", "evaluate", generated(source, end="fail"))
    assert (said.code, "do not exist" in said.err) == (3, True)
    said = ganq("submit", "evaluate", evaluated(source))
    assert (said.code, "has no images" in said.err) == (2, True)


def test_an_evaluation_can_be_retried_whether_of_a_job_or_of_a_path(
    ganq: "Ganq", trained: Callable[..., int], evaluated: Any, real: Any, queries: "Queries"
) -> None:
    again = evaluated(trained())
    assert ganq("retry", again).code == 0
    assert ganq("submit", "evaluate", real, "--data", real).code == 0
    assert ganq("cancel", again + 2).code == 0
    said = ganq("retry", again + 2)
    assert said.code == 0, said.err
    assert queries.get(again + 3).spec["path"] == str(real)


# --- what is shown --------------------------------------------------------------------------


def test_status_shows_what_was_found(ganq: "Ganq", trained: Callable[..., int], evaluated: Any) -> None:
    one = evaluated(trained())
    page = ganq("status", one).out
    assert "kid/random  0.0123 ± 0.001   (baseline, real against real images: 0.0002)" in page
    assert "precision  0.80   (baseline: 0.9; fraction of generated images that look real)" in page
    assert "no sign of copying" in page
    assert "40 training images are exact twins" in page
    assert "kid 0.0123, no copies" in ganq("status").out


def test_status_of_a_generation_or_an_evaluation_says_of_what(
    ganq: "Ganq", trained: Callable[..., int], generated: Any, evaluated: Any
) -> None:
    one = trained(name="faces")
    drawn = generated(one)
    assert f"from       job {one} (faces), checkpoint best" in ganq("status", drawn).out
    assert f"job {one} (faces), checkpoint best" in ganq("status", evaluated(one)).out
    assert f"job {drawn}" in ganq("status", evaluated(drawn)).out


def test_compare_puts_the_best_first_and_takes_jobs_for_their_newest_evaluation(
    ganq: "Ganq", trained: Callable[..., int], evaluated: Any
) -> None:
    one, other = trained(name="one"), trained(name="other")
    old = evaluated(one)
    worse = evaluated(
        one, metrics={"kid/random": {"value": 0.5}}, copying={"verdict": "copies", "share": 0.2}
    )
    better = evaluated(other)
    ids = [row["id"] for row in ganq("compare", "one", "other", "--json").json()]
    assert ids == [better, worse]
    assert [row["id"] for row in ganq("compare", old, worse, "--json").json()] == [old, worse]
    assert {row["id"] for row in ganq("compare", "--json").json()} == {old, worse, better}
    table = ganq("compare").out
    assert table.splitlines()[0].split() == [
        "ID",
        "OF",
        "IMAGES",
        "KID",
        "SWD",
        "PRECISION",
        "RECALL",
        "DIVERSITY",
        "COPIES",
    ]
    assert "best kid/random first; lower is better · features of random" in table
    assert "20.0% !" in table
    assert f"job {one}" in table


def test_compare_warns_of_other_real_images_and_of_what_is_not_there(
    ganq: "Ganq", trained: Callable[..., int], evaluated: Any
) -> None:
    source = trained()
    assert "no evaluation has finished yet" in ganq("compare").out
    said = ganq("compare", source)
    assert (said.code, "has not been evaluated" in said.err) == (3, True)
    evaluated(source)
    evaluated(source, data={"fingerprint": "other"})
    assert "cannot be compared" in ganq("compare").err


def test_a_network_is_named_in_a_column_only_where_there_are_several(
    ganq: "Ganq", trained: Callable[..., int], evaluated: Any
) -> None:
    source = trained()
    evaluated(source)
    evaluated(source, metrics={"kid/effnet-lite0": {"value": 0.5}})
    head = ganq("compare").out.splitlines()[0]
    assert "KID/RANDOM" in head
    assert "KID/EFFNET-LITE0" in head


@pytest.fixture
def sweep_of_rates(ganq: "Ganq", real: Any, store: "JobStore", claim: "Claimer") -> None:
    """Four trainings, two rates by two seeds; the first three have ended, with metrics; the last waits."""
    typed = ("--data", real, "--size", 32, "--batch", 8, "--sweep", "lr-g=1e-4,2e-4", "--sweep", "seed=0-1")
    assert ganq("submit", "train", *typed, "--name", "rates").code == 0
    for value in (0.7, 0.3, None):
        measured = {"key": "kid/effnet-lite0", "last": 0.9} | (
            {"best": value, "best_epoch": 4} if value else {}
        )
        store.succeed(claim(), {"metric": measured})


def test_compare_shows_which_training_of_a_sweep_was_best_and_what_it_had(
    ganq: "Ganq", sweep_of_rates: None
) -> None:
    said = ganq("compare", "--sweep", "rates")
    assert said.code == 0, said.err
    head, *rows = (line.split() for line in said.out.splitlines()[:-1])
    assert head == ["ID", "NAME", "lr-g", "seed", "STATE", "EPOCH", "KID"]
    assert [row[1] for row in rows] == [
        "rates-lr-g-0.0001-seed-1",
        "rates-lr-g-0.0001-seed-0",
        "rates-lr-g-0.0002-seed-0",
        "rates-lr-g-0.0002-seed-1",
    ]
    assert rows[0][2:] == ["0.0001", "1", "succeeded", "4", "0.3"]
    assert "kid/effnet-lite0" in said.out.splitlines()[-1]
    first = ganq("compare", 1, 2, "--json").json()[0]
    assert first["options"] == {"seed": 1}
    assert first["metric"] == {"key": "kid/effnet-lite0", "best": 0.3, "best_epoch": 4}


def test_a_training_that_was_evaluated_is_compared_by_that(
    ganq: "Ganq", sweep_of_rates: None, evaluated: Any
) -> None:
    one = evaluated(1)
    assert [row["id"] for row in ganq("compare", 1, "--json").json()] == [one]


def test_trainings_of_which_one_has_no_evaluation_are_compared_by_their_own_metric(
    ganq: "Ganq", sweep_of_rates: None, evaluated: Any
) -> None:
    evaluated(1)
    said = ganq("compare", 1, 2)
    assert said.code == 0, said.err
    assert "job 2 has not been evaluated: comparing by the metric measured during training" in said.err
    assert [row["id"] for row in ganq("compare", 1, 2, "--json").json()] == [2, 1]


def test_what_has_measured_nothing_cannot_be_compared(
    ganq: "Ganq", real: Any, trained: Callable[..., int], sweep_of_rates: None
) -> None:
    said = ganq("compare", 3, 4)
    assert (said.code, "none of these 2 trainings has a metric" in said.err) == (3, True)
    assert (ganq("compare", 3, "--sweep", "rates").code, ganq("compare", "--sweep", "no").code) == (
        2,
        3,
    )
    trained(name="model")
    assert (
        ganq(
            "submit", "generate", "--from", "model", "--count", 8, "--sweep", "seed=0,1", "--name", "drawn"
        ).code
        == 0
    )
    said = ganq("compare", "--sweep", "drawn")
    assert (said.code, "of kind generate" in said.err) == (2, True)


def test_a_sweep_of_evaluations_is_a_job_for_each_value(
    ganq: "Ganq", trained: Callable[..., int], queries: "Queries"
) -> None:
    source = trained(name="faces")
    said = ganq("submit", "evaluate", "faces", "--sweep", "seed=0,1", "--name", "looks")
    assert said.code == 0, said.err
    assert [queries.get(source + place).spec["seed"] for place in (1, 2)] == [0, 1]
    assert queries.get(source + 2).name == "looks-seed-1"
    for typed in ("foo=3", "source=1,2", "checkpoint=best,99"):
        assert ganq("submit", "evaluate", "faces", "--sweep", typed).code in (2, 3)
    assert sum(queries.counts().values()) == 3


@pytest.mark.parametrize("asked", [{"count": 49}, {"keep": 49, "of": 500}, {"seeds": [[0, 47], [90, 90]]}])
def test_a_generation_of_too_few_images_is_refused_before_the_job(
    ganq: "Ganq", trained: Callable[..., int], generated: Any, real: Any, asked: Any
) -> None:
    made = generated(trained(), **asked)
    said = ganq("submit", "evaluate", made, "--data", real)
    assert said.code == 2
    assert f"job {made} generates 49 images, too few to evaluate" in said.err
    assert "use at least 50" in said.err


def test_images_of_a_job_have_its_size_and_no_other(
    ganq: "Ganq", trained: Callable[..., int], generated: Any, real: Any
) -> None:
    model = trained()
    for source in (model, generated(model)):
        said = ganq("submit", "evaluate", source, "--data", real, "--size", 48)
        assert said.code == 2
        assert f"--size 48: the images of job {source} are 24×24" in said.err
        assert ganq("submit", "evaluate", source, "--data", real, "--size", 24).code == 0


def test_an_epoch_that_is_there_is_looked_at_while_the_training_continues(
    ganq: "Ganq",
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    real: Any,
) -> None:
    lease = running_job_factory(spec={"data": "/p", "size": 24, "epochs": 9})
    store.register_checkpoint(
        lease, kind="epoch", epoch=4, step=8, path="c", manifest_sha256="0" * 64, size=1, metric=None
    )
    for epoch, awaited in ((4, False), (9, True)):
        for asked in (("evaluate", lease.job_id, "--data", real), ("generate", "--from", lease.job_id)):
            said = ganq("submit", *asked, "--count", 64, "--checkpoint", epoch, "--json")
            assert said.code == 0, said.err
            assert bool(queries.needs(said.json()["id"])) == awaited


@pytest.mark.parametrize("epochs", ["4,9", "9,4"])
def test_a_sweep_over_epochs_waits_where_one_of_them_is_not_there_yet(
    ganq: "Ganq",
    store: "JobStore",
    queries: "Queries",
    running_job_factory: "Callable[..., Lease]",
    real: Any,
    epochs: str,
) -> None:
    lease = running_job_factory(spec={"data": "/p", "size": 24, "epochs": 9})
    store.register_checkpoint(
        lease, kind="epoch", epoch=4, step=8, path="c", manifest_sha256="0" * 64, size=1, metric=None
    )
    for asked in (("evaluate", lease.job_id, "--data", real), ("generate", "--from", lease.job_id)):
        before = sum(queries.counts().values())
        said = ganq("submit", *asked, "--count", 64, "--sweep", f"checkpoint={epochs}")
        assert said.code == 0, said.err
        assert all(queries.needs(before + place) for place in (1, 2))
