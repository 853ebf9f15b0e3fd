"""`--sweep`: what is typed becomes one job for each combination, and what cannot be is said in one line."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.submit.sweep import combinations, describe
from ganq.submission.sweep import job_names
from jobs.errors import SpecError
from jobs.specs import GenerateSpec, TrainSpec
from storage.db.queries import Filter

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.db.queries import Queries

NEVER = ("data", "augment")


def swept(*texts: Any, **given: Any) -> Any:
    return combinations(TrainSpec, texts, given, never=NEVER)


def test_each_combination_comes_once_the_last_field_fastest() -> None:
    assert swept("lr-g=1e-4,2e-4", "seed=0-1") == [
        {"lr_g": 1e-4, "seed": 0},
        {"lr_g": 1e-4, "seed": 1},
        {"lr_g": 2e-4, "seed": 0},
        {"lr_g": 2e-4, "seed": 1},
    ]


@given(st.sets(st.integers(0, 10**6), min_size=1, max_size=20), st.sets(st.integers(1, 99), min_size=1))
def test_the_number_of_jobs_is_the_product_of_the_numbers_of_values(seeds: Any, epochs: Any) -> None:
    texts = [f"seed={','.join(map(str, seeds))}", f"epochs={','.join(map(str, epochs))}"]
    found = swept(*texts)
    assert len(found) == len(seeds) * len(epochs)
    assert {(one["seed"], one["epochs"]) for one in found} == {(s, e) for s in seeds for e in epochs}


@pytest.mark.parametrize(
    ("texts", "typed", "said"),
    [
        (["seed=0-1000000"], {}, "1,000,001 jobs"),
        (["seed=0-999999999999"], {}, "the maximum is 10,000"),
        (["seed=0-999", "epochs=1-11"], {}, "11,000 jobs"),
        (["sed=1"], {}, "no such field"),
        (["data=a,b"], {}, "cannot be swept"),
        (["seed"], {}, "has no values"),
        (["seed="], {}, "has no values"),
        (["seed=a"], {}, "not a valid integer"),
        (["seed=1,,2"], {}, "not a valid integer"),
        (["loss=foo"], {}, "not one of"),
        (["seed=1,1"], {}, "repeats a value"),
        (["seed=9-1"], {}, "is descending"),
        (["seed=1", "seed=2"], {}, "in two --sweep options"),
        (["seed=1"], {"seed": 3}, "as an option and in --sweep"),
    ],
)
def test_what_cannot_be_is_reported_in_one_line(texts: list[str], typed: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said) as refused:
        swept(*texts, **typed)
    assert "\n" not in refused.value.message
    assert refused.value.hint


def test_a_field_is_called_as_its_option_is() -> None:
    def of_generation(*texts: Any) -> Any:
        return combinations(GenerateSpec, texts, {}, never=())

    assert of_generation("class=cats,dogs") == [{"class_name": "cats"}, {"class_name": "dogs"}]
    assert describe(of_generation("class=cats,dogs")) == "2 jobs: class (2 values)"
    with pytest.raises(SpecError) as refused:
        of_generation("clas=cats")
    assert "Did you mean 'class'?" in refused.value.message
    with pytest.raises(SpecError, match=r"^--class: "):
        GenerateSpec.create(source=1, count=1, class_name="")


def test_the_names_of_a_sweep_contain_its_values_and_are_numbered_where_they_do_not_fit() -> None:
    assert job_names("seeds", swept("seed=1-3")) == ["seeds-seed-1", "seeds-seed-2", "seeds-seed-3"]
    assert job_names("m", [{"mirror": True}, {"mirror": False}]) == ["m-mirror", "m-no-mirror"]
    assert job_names("c", [{"class_name": "a b"}]) == ["c-class-a_b"]
    assert job_names("x" * 60, swept("seed=1-2")) == [f"{'x' * 60}-0", f"{'x' * 60}-1"]


class TestCommand:
    @pytest.fixture
    def image_folder(self, tmp_path: Path) -> Any:
        from PIL import Image

        folder = tmp_path / "pictures"
        folder.mkdir()
        for place in range(16):
            Image.new("RGB", (16, 16)).save(folder / f"{place}.png")
        return ["--data", str(folder), "--batch", "8", "--size", "16"]

    def test_a_sweep_is_submitted_listed_and_cancelled(
        self, ganq: "Ganq", image_folder: Any, queries: "Queries"
    ) -> None:
        done = ganq("submit", "train", *image_folder, "--sweep", "seed=0-4", "--name", "rates", "--json")
        answer = json.loads(done.out)
        assert len(answer["jobs"]) == 5
        assert [one.spec["seed"] for one in queries.get_many(answer["jobs"])] == [0, 1, 2, 3, 4]

        listed = ganq("status", "--sweep", "rates").out
        assert "0 of 5 ended: 5 queued" in listed
        assert "rates-seed-4" in listed
        cancelled = json.loads(ganq("cancel", "--sweep", "rates", "--json").out)
        assert {one["state"] for one in cancelled} == {"cancelled"}
        assert ganq("wait", "--sweep", "rates").code == 1

    def test_dry_run_counts_the_jobs_and_submits_none(
        self, ganq: "Ganq", image_folder: Any, queries: "Queries"
    ) -> None:
        done = ganq(
            "submit", "train", *image_folder, "--sweep", "seed=0-4", "--sweep", "nz=8,16", "--dry-run"
        )
        assert "sweep of 10 jobs: seed (5 values) × nz (2 values)" in done.out
        assert queries.page(Filter(), limit=1) == []

    def test_one_bad_value_refuses_all(self, ganq: "Ganq", image_folder: Any, queries: "Queries") -> None:
        done = ganq("submit", "train", *image_folder, "--sweep", "size=16,17")
        assert done.code == 2
        assert queries.page(Filter(), limit=1) == []
