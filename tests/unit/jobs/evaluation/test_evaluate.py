"""An evaluation says how good images are and whether they are copies, and no nonsense about bad input."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from unit.jobs.generation.test_generate import SNAPSHOT, WHOLE
from unit.jobs.local_context import LocalContext

import jobs.evaluation.evaluate
from jobs.context import Images
from jobs.errors import DatasetError, NotMeasurableError, SpecError, StopRequested
from jobs.metrics import features, swd
from jobs.specs import EvaluateSpec
from jobs.states import StopReason

SIZE = 16


def images(count: Any, seed: Any = 0, *, of: Any = None) -> Any:
    """Different images with structure, or those that are given as (N, H, W, 3)."""
    if of is None:
        random = np.random.default_rng(seed)
        small = random.integers(0, 256, (count, 3, 4, 4), dtype=np.uint8)
        arrays = small.repeat(SIZE // 4, axis=2).repeat(SIZE // 4, axis=3)
    else:
        arrays = np.ascontiguousarray(of.transpose(0, 3, 1, 2))
    return Images(arrays, f"fingerprint-{seed}")


def evaluate(data: Any, made: Any = None, **given: Any) -> Any:
    ctx = LocalContext(folder=Path("/nowhere"), data=data, source=SNAPSHOT, **given.pop("ctx", {}))
    if made is not None:
        ctx.made = list(made.images_N3HW.transpose(0, 2, 3, 1))
    options = {"source": 1, "data": "/data", "size": SIZE, "feature_network": "random", "micro_batch": 8}
    return jobs.evaluation.evaluate.run(EvaluateSpec.create(**{**options, **given}), ctx), ctx


DATA = images(300)


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[Any]:
    """Fewer features and directions: what is tested here is what becomes of the numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "RANDOM_CHANNELS", (8, 16))
        patch.setattr(swd, "REPEATS", 1)
        patch.setattr(swd, "DIRECTIONS", 16)
        patch.setattr(swd, "PATCHES", 16)
        yield


@pytest.fixture(scope="module")
def good(small: Any) -> Any:
    return evaluate(DATA, images(250, seed=1))


def test_as_good_as_real_is_near_the_floor_and_no_copy(good: Any) -> None:
    for key in ("kid/random", "fid/random", "swd"):
        one = good[0]["metrics"][key]
        assert abs(one["value"]) < abs(one["baseline"]) * 2 + 0.05, key
    assert good[0]["precision"]["value"] > good[0]["precision"]["baseline"] - 0.1
    assert good[0]["recall"]["value"] > good[0]["recall"]["baseline"] - 0.1
    assert good[0]["diversity"] == pytest.approx(1, abs=0.1)
    assert good[0]["copying"]["verdict"] == "none"
    swd_by_side, real = (good[0]["metrics"]["swd"][key] for key in ("by_side", "baseline_by_side"))
    assert swd_by_side.keys() == real.keys() == {"16"}
    assert good[0]["grain"]["value"] == pytest.approx(good[0]["grain"]["baseline"], rel=0.1)
    assert good[0]["outlines"] == pytest.approx(1, abs=0.1)
    assert set(good[0]["copying"]["all"]) == {"thumbnails", "random"}
    assert (good[0]["image_count"], good[0]["data"]["image_count"], good[0]["feature_network"]) == (
        250,
        300,
        "random",
    )


def test_the_report_is_a_file_with_what_the_row_says_and_pairs_are_an_image(good: Any) -> None:
    assert [one["name"] for one in good[0]["files"]] == ["neighbours.png", "evaluation.json"]
    report = json.loads(good[1].files["evaluation.json"])
    assert report == {name: value for name, value in good[0].items() if name != "files"}
    assert json.dumps(good[0], allow_nan=False)
    assert good[1].files["neighbours.png"].shape == (8 * 18 + 2, 56 + 8 * 18 + 2, 3)


def test_copies_are_flagged_and_shown_beside_what_they_copy() -> None:
    copies = images(250, seed=1)
    copies.images_N3HW[100:130] = np.clip(DATA.images_N3HW[40:70].astype(int) + 3, 0, 255)
    report, ctx = evaluate(DATA, copies)
    assert report["copying"]["verdict"] == "copies"
    assert 0.1 < report["copying"]["share"] < 0.2
    assert "copies training images" in report["copying"]["summary"]
    page = ctx.files["neighbours.png"]
    made, real = page[2:18, 58:74], page[2:18, 76:92]
    assert np.abs(made.astype(int) - real).max() <= 3
    assert any(np.array_equal(real, one.transpose(1, 2, 0)) for one in DATA.images_N3HW[40:70])


def test_one_spec_gives_one_report(good: Any) -> None:
    again, _ = evaluate(DATA, images(250, seed=1))
    assert {**again, "seconds": 0} == {**good[0], "seconds": 0}


def test_images_of_a_model_are_those_that_generate_draws() -> None:
    report, ctx = evaluate(images(60, of=WHOLE[:60]), seed=3, count=64)
    assert report["image_count"] == 64
    assert report["copying"]["verdict"] == "copies", "the data are the model's own images"
    assert ctx.reports[-1]["done"] == ctx.reports[-1]["total"] == 124


def test_images_at_a_path_are_read_under_a_fingerprint_of_their_own(good: Any) -> None:
    spec = {"source": None, "path": "/made"}
    report, _ = evaluate(DATA, ctx={"other_data": images(250, seed=1)}, **spec)
    assert report["metrics"] == good[0]["metrics"]


def test_a_model_that_repeats_itself_is_reported() -> None:
    few = images(250, seed=1)
    few.images_N3HW[:] = few.images_N3HW[:1]
    few.images_N3HW[:, 0, 0, 0] = np.arange(250)
    report, _ = evaluate(DATA, few)
    assert report["diversity"] < 0.1
    assert any("has collapsed" in note for note in report["notes"])
    assert report["recall"]["value"] < 0.1


def all_of(count: Any, value: Any) -> Any:
    return Images(np.full((count, 3, SIZE, SIZE), value, np.uint8), "flat")


def test_black_images_get_what_can_be_said_and_no_nonsense(good: Any) -> None:
    report, ctx = evaluate(DATA, all_of(100, 0))
    assert json.dumps(report, allow_nan=False)
    assert report["metrics"]["kid/random"]["value"] > 10 * good[0]["metrics"]["kid/random"]["baseline"]
    assert "swd" not in report["metrics"]
    assert any("no contrast" in note for note in report["notes"])
    assert any("exact duplicates" in note for note in report["notes"])
    assert "evaluation.json" in ctx.files


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (images(10), "10 images"),
        (all_of(300, 7), "1 different images"),
        (all_of(300, 0), "1 different images"),
    ],
    ids=["ten images", "all the same", "all black"],
)
def test_real_images_that_nothing_can_be_measured_against_are_refused(data: Any, says: str) -> None:
    with pytest.raises(DatasetError, match=says):
        evaluate(data, images(100, seed=1))


def test_made_images_that_are_too_few_or_of_another_size_are_refused() -> None:
    with pytest.raises(NotMeasurableError, match="10 images are too few"):
        evaluate(DATA, images(10))
    with pytest.raises(SpecError, match="16×16, the evaluation is of 32×32"):
        evaluate(DATA, images(100), size=32)
    mixed = images(100)
    with pytest.raises(DatasetError, match="different sizes"):
        evaluate(DATA, ctx={"made": [mixed.images_N3HW[0].transpose(1, 2, 0), WHOLE[0][:8]] * 50})


def test_twins_in_the_data_count_once_and_are_reported(good: Any) -> None:
    twins = replace(DATA, images_N3HW=np.concatenate([DATA.images_N3HW, DATA.images_N3HW[:40]]))
    report, _ = evaluate(twins, images(250, seed=1))
    assert report["metrics"] == good[0]["metrics"]
    assert any("40 training images are exact duplicates" in note for note in report["notes"])


def test_a_large_data_set_is_looked_at_in_part_and_says_so() -> None:
    report, _ = evaluate(DATA, images(100, seed=1), search=100)
    assert report["data"]["compared"] == 100
    assert "100 of the 300 training images were compared" in report["notes"]


@pytest.mark.parametrize("asked", [0, 2, 6])
def test_a_stop_publishes_nothing(asked: int) -> None:
    stop = {"stop_at": lambda number: StopReason.CANCEL if number == asked else None}
    with pytest.raises(StopRequested):
        evaluate(DATA, images(100, seed=1), ctx=stop)
