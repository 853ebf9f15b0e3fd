"""A run measures itself: what it costs, what it keeps, and when it stops; the same after any kill."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.jobs.local_context import LocalContext, noise_images, sha256_of

import jobs.training.train
from jobs.context import Images
from jobs.errors import SpecError, StopRequested
from jobs.metrics import features
from jobs.metrics.registry import Measure
from jobs.specs import TrainSpec
from jobs.training import evaluation
from jobs.training.evaluation import MIN_SAMPLES, SHARE, SLOWDOWN, Plan, plan

IMAGES = noise_images(21, 16)
SMALL = {"size": 16, "nz": 4, "ngf": 3, "ndf": 3, "batch": 4, "epochs": 6, "save_every": 1, "seed": 5}
MEASURED = {"eval_every": 1, "eval_samples": 8, "feature_network": "random"}


def spec_of(recipe: Any = "sngan", **given: Any) -> Any:
    return TrainSpec.create(**{"data": "/faces", "recipe": recipe, **SMALL, **MEASURED, **given})


def train(folder: Any, spec: Any, **given: Any) -> Any:
    ctx = LocalContext(**{"folder": folder, "data": IMAGES, **given})
    return jobs.training.train.run(spec, ctx), ctx


def values(ctx: Any) -> Any:
    return {one.epoch: one.meta["metric"] for one in ctx.saved if one.kind != "resume"}


class Script:
    """
    Values in the order in which new images come; the same images get the same value again.

    So a run that goes on after a kill sees what it saw before exactly if its bits are the same.
    """

    def __init__(self, *steps: Any) -> None:
        self.steps = list(steps)
        self.seen: dict[str, Any] = {}

    def of(self, made: Any) -> Any:
        mark = hashlib.sha256(made.tobytes()).hexdigest()
        if mark not in self.seen:
            self.seen[mark] = self.steps[len(self.seen)] if len(self.seen) < len(self.steps) else (9.0, 1.0)
        self.now = self.seen[mark]
        return self.now


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(*steps: Any) -> Any:
        script = Script(*steps)

        def compare(metric: Any, real: Any, made: Any) -> Any:
            return Measure("kid/random", script.of(made.images_N3HW.numpy())[0])

        def diversity(real: Any, made: Any) -> Any:
            return script.now[1]

        monkeypatch.setattr(evaluation, "compare", compare)
        monkeypatch.setattr(evaluation, "diversity", diversity)
        return script

    return use


# --- what is measured, and what it costs --------------------------------------------------------


@pytest.mark.parametrize("recipe", ["dcgan", "sngan", "rpgan"])
def test_measuring_moves_no_bit_of_the_training(tmp_path: Path, recipe: str) -> None:
    plain = train(tmp_path, spec_of(recipe, metric="none", patience=0))[1].saved[-1]
    measured = train(tmp_path, spec_of(recipe, patience=0))[1].saved[-1]
    assert sha256_of(measured.state) == sha256_of(plain.state)
    assert not plain.meta["evaluations"]
    assert measured.meta["evaluations"]


def test_a_value_is_in_the_checkpoint_the_log_and_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "COLLAPSED", 0.0)  # so young a generator repeats itself
    result, ctx = train(tmp_path, spec_of(eval_every=2, patience=0))
    found = values(ctx)
    assert [epoch for epoch, value in found.items() if value is not None] == [2, 4, 6]
    lines = [one for one in ctx.records if "metric" in one]
    assert [(one["epoch"], one["metric"]) for one in lines] == [(e, found[e]) for e in (2, 4, 6)]
    assert {one["key"] for one in lines} == {"kid/random"}
    assert result["metric"]["best"] == min(found[e] for e in (2, 4, 6))
    assert result["metric"]["baseline"] == lines[0]["baseline"] is not None
    assert result["stopped"] is None
    json.dumps(result, allow_nan=False)


def test_the_result_says_why_a_run_has_no_metric(tmp_path: Path) -> None:
    alike = Images(np.full_like(IMAGES.images_N3HW, 90), IMAGES.fingerprint)
    said = train(tmp_path, spec_of(patience=0), data=alike)[0]
    assert said["no_metric"] == "all 8 real images are equal, so no metric is defined"
    for spec in (spec_of(patience=0), spec_of(metric="none", patience=0)):
        assert "no_metric" not in train(tmp_path, spec)[0]


def test_a_metric_without_a_network_knows_repetition_by_thumbnails(tmp_path: Path) -> None:
    said, ctx = train(tmp_path, spec_of(metric="swd", patience=0))
    varied = [one["diversity"] for one in ctx.records if "metric" in one]
    assert len(varied) == 6
    assert max(varied) < 0.25, "so young a generator repeats itself"
    assert "best" not in said["metric"]
    twins = Images(np.concatenate([IMAGES.images_N3HW[:4]] * 5), IMAGES.fingerprint)
    said, ctx = train(tmp_path, spec_of(metric="swd", patience=0), data=twins)
    assert {one["diversity"] for one in ctx.records if "metric" in one} == {None}
    assert said["metric"]["best"] > 0


def test_a_users_network_measures_under_its_sum_and_the_record_outlives_a_kill(tmp_path: Path) -> None:
    file = {"feature_network": "/net.pth", "feature_sha256": "ab12cd34" * 8}
    spec = spec_of(**file, eval_every=3, eval_samples=4, patience=0)
    weights = {"/net.pth": features._wheel_weights("effnet-lite0")}
    first = train(tmp_path, spec, start_weights=weights)[1]
    at_three = next(one for one in first.saved if one.epoch == 3)
    record = train(tmp_path, spec, start_weights=weights, resume_from=at_three.for_resume())[1].saved[-1].meta
    assert record["evaluations"] == first.saved[-1].meta["evaluations"]
    assert [one["key"] for one in record["evaluations"]] == ["kid/effnet-lite0@ab12cd34"] * 2
    other = spec_of(**{**file, "feature_sha256": "00" * 32}, eval_every=3, eval_samples=4, patience=0)
    anew = train(tmp_path, other, start_weights=weights, resume_from=at_three.for_resume())[1].saved[-1].meta
    assert [one["key"] for one in anew["evaluations"]] == ["kid/effnet-lite0@00000000"]


@pytest.mark.parametrize("recipe", ["sngan", "rpgan", "r3gan"])
def test_a_run_with_classes_is_measured_on_as_many_of_each(tmp_path: Path, recipe: str) -> None:
    labels = np.arange(21, dtype=np.int64) % 3
    data = Images(IMAGES.images_N3HW, IMAGES.fingerprint, classes=("a", "b", "c"), labels_N=labels)
    result, ctx = train(tmp_path, spec_of(recipe, conditional=True, epochs=1, patience=0), data=data)
    assert list(values(ctx)) == [1]
    assert result["metric"]["evaluations"] == 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(64, 200_000),
    st.integers(1, 400),
    st.integers(1, 20),
    st.floats(1e6, 1e12),
    st.floats(1e5, 1e11),
)
def test_evaluations_take_a_twentieth_of_the_work_at_most(
    images: int, epochs: Any, save_every: Any, train_flops: Any, make_flops: Any
) -> None:
    spec = TrainSpec.create(data="/p", recipe="sngan", epochs=epochs, save_every=save_every)
    made = plan(spec, images, train_flops, make_flops)
    if made.every == epochs and made.samples == min(MIN_SAMPLES, images):
        return  # once, at the end
    assert made.every % save_every == 0
    assert min(MIN_SAMPLES, images) <= made.samples
    times = -(-epochs // made.every)
    work = epochs * (images // spec.batch * spec.batch) * train_flops
    each = SLOWDOWN * evaluation.LITE_GFLOP * 1e9 + make_flops
    assert (times + 1) * made.samples * each <= SHARE * work * 1.001


def test_a_run_too_short_for_a_twentieth_is_measured_at_its_end(tmp_path: Path) -> None:
    result, ctx = train(tmp_path, spec_of(eval_every=0))
    assert [one["epoch"] for one in ctx.records if "metric" in one] == [6]
    assert result["metric"]["evaluations"] == 1
    assert plan(spec_of(metric="none"), 1000, 1e12, 1.0) == Plan(0, 0)


def test_images_that_say_nothing_give_a_text_and_no_number(tmp_path: Path) -> None:
    same = noise_images(1, 16)
    one = type(same)(same.images_N3HW.repeat(21, axis=0), "x")
    result, ctx = train(tmp_path, spec_of(), data=one)
    assert set(values(ctx).values()) == {None}
    assert "metric" not in result
    assert any("real images are equal" in line for line in ctx.lines), ctx.lines


def test_one_image_is_no_set() -> None:
    with pytest.raises(SpecError, match="compares sets"):
        spec_of(eval_samples=1)


# --- early stop, the same after any kill --------------------------------------------------------


def killed_and_resumed(folder: Any, spec: Any, kill_at: Any) -> Any:
    """Drained after so many questions, then taken up from the last checkpoint."""
    first = LocalContext(
        folder=folder, data=IMAGES, stop_at=lambda asked: "drain" if asked == kill_at else None
    )
    with pytest.raises(StopRequested):
        jobs.training.train.run(spec, first)
    second = LocalContext(folder=folder, data=IMAGES, attempt=2)
    second.saved.extend(first.saved)
    return jobs.training.train.run(spec, second), second


def test_a_run_stops_after_its_patience_and_says_why(tmp_path: Path, scripted: Any) -> None:
    scripted((5.0, 1.0), (3.0, 1.0), (4.0, 1.0), (3.5, 1.0))
    result, ctx = train(tmp_path, spec_of(patience=2))
    assert (
        result["stopped"] == "stopped early at epoch 4, after 2 evaluations without a new best; best epoch 2"
    )
    assert ctx.saved[-1].kind == "final"
    assert ctx.saved[-1].epoch == result["epoch"] == 4
    assert [one["type"] for one in ctx.events] == ["stopped_early"]
    assert result["metric"]["best_epoch"] == 2


def test_who_repeats_itself_is_not_the_best_whatever_its_value(tmp_path: Path, scripted: Any) -> None:
    """Grey noise has a lower KID than bad faces; nobody wants to generate it."""
    scripted((5.0, 1.0), (2.0, 0.1), (4.0, 0.3), (4.5, 1.0))
    result, ctx = train(tmp_path, spec_of(patience=2, epochs=4))
    assert result["metric"]["best_epoch"] == 3
    assert values(ctx)[2] is None, "without a metric in its row, nothing takes it for the best"
    assert result["stopped"] is None


def test_where_all_repeat_themselves_none_is_the_best(tmp_path: Path, scripted: Any) -> None:
    scripted((5.0, 0.1), (2.0, 0.1))
    result, ctx = train(tmp_path, spec_of(patience=1, epochs=2))
    assert "best" not in result["metric"]
    assert result["metric"]["last"] == 2.0
    assert set(values(ctx).values()) == {None}
    assert result["stopped"] is None


def test_a_run_that_was_never_more_than_one_image_ends_after_twice_its_patience(
    tmp_path: Path, scripted: Any
) -> None:
    scripted((9.0, 0.0), (5.0, 0.0), (5.0, 0.0), (6.0, 0.1), (5.0, 0.0), (5.0, 0.0))
    result, ctx = train(tmp_path, spec_of(patience=1))
    assert result["stopped"] == ("stopped early at epoch 4: collapsed, without improvement for 2 evaluations")
    assert "best" not in result["metric"]
    assert ctx.saved[-1].kind == "final"


def test_a_young_generator_that_comes_nearer_is_given_time(tmp_path: Path, scripted: Any) -> None:
    scripted((9.0, 0.0), (8.0, 0.1), (7.0, 0.2), (6.0, 0.2), (5.0, 0.2), (4.0, 1.0))
    result, _ = train(tmp_path, spec_of(patience=1))
    assert (result["stopped"], result["metric"]["best_epoch"]) == (None, 6)


@pytest.mark.parametrize("kill_at", [7, 18, *(pytest.param(at, marks=pytest.mark.tier2) for at in (3, 12))])
def test_a_run_that_was_killed_stops_at_the_same_epoch_with_the_same_bits(
    tmp_path: Path, scripted: Any, kill_at: int
) -> None:
    scripted((5.0, 1.0), (3.0, 1.0), (4.0, 1.0), (3.5, 1.0))
    spec = spec_of(patience=2)
    whole_result, whole = train(tmp_path, spec)
    result, ctx = killed_and_resumed(tmp_path, spec, kill_at)
    assert result["stopped"] == whole_result["stopped"]
    assert sha256_of(ctx.saved[-1].state) == sha256_of(whole.saved[-1].state)
    assert ctx.saved[-1].meta["evaluations"] == whole.saved[-1].meta["evaluations"]


def test_a_run_that_continues_on_request_does_not_stop_for_what_was_before(
    tmp_path: Path, scripted: Any
) -> None:
    scripted((5.0, 1.0), (3.0, 1.0), (4.0, 1.0), (3.5, 1.0))
    stopped = train(tmp_path, spec_of(patience=2))[1].saved[-1]
    spec = spec_of(patience=2, continue_from=1)
    result, ctx = train(tmp_path, spec, resume_from=stopped.for_resume())
    assert stopped.epoch == 4
    assert result["epoch"] == 6
    assert [one["epoch"] for one in ctx.saved[-1].meta["evaluations"]] == [5, 6]


def test_without_early_stopping_it_runs_all_its_epochs(tmp_path: Path, scripted: Any) -> None:
    scripted((1.0, 1.0))
    assert train(tmp_path, spec_of("dcgan"))[0]["epoch"] == 6
    assert spec_of("dcgan").patience == 0


# --- collapse -------------------------------------------------------------------------------------


COLLAPSE = ((5.0, 1.0), (1.0, 1.0), (2.0, 1.0), (8.0, 0.05))


def test_a_collapsed_generator_is_rolled_back_to_the_best_with_lower_rates(
    tmp_path: Path, scripted: Any
) -> None:
    scripted(*COLLAPSE, (0.9, 1.0), (0.8, 1.0), (0.7, 1.0), (0.6, 1.0))
    result, ctx = train(tmp_path, spec_of())
    (back,) = [one for one in ctx.events if one["type"] == "rolled_back"]
    assert back["action"] == "lower rates"
    assert back["to_step"] == 10, "epoch 2, the best, not epoch 3, the newest"
    assert "collapsed at epoch 4" in back["reason"]
    assert result["lr_scale"] == 0.5
    assert result["epoch"] == 6
    assert result["stopped"] is None


def test_a_second_collapse_ends_the_run_where_it_was_best(tmp_path: Path, scripted: Any) -> None:
    scripted(*COLLAPSE, (1.5, 1.0), (8.0, 0.05))
    result, ctx = train(tmp_path, spec_of())
    assert [one["action"] for one in ctx.events if one["type"] == "rolled_back"] == [
        "lower rates",
        "to stop there",
    ]
    assert result["stopped"] == "stopped at epoch 2: the generator collapsed again; best epoch 2"
    assert ctx.saved[-1].kind == "final"
    assert ctx.saved[-1].meta["metric"] == 1.0


@pytest.mark.parametrize("kill_at", [13, 22, *(pytest.param(at, marks=pytest.mark.tier2) for at in (17, 27))])
def test_a_collapse_ends_the_same_when_the_run_is_killed_on_the_way(
    tmp_path: Path, scripted: Any, kill_at: int
) -> None:
    scripted(*COLLAPSE, (0.9, 1.0), (0.8, 1.0), (0.7, 1.0), (0.6, 1.0))
    whole = train(tmp_path, spec_of())[1]
    _, ctx = killed_and_resumed(tmp_path, spec_of(), kill_at)
    assert sha256_of(ctx.saved[-1].state) == sha256_of(whole.saved[-1].state)


def test_a_young_generator_without_diversity_has_not_collapsed(tmp_path: Path, scripted: Any) -> None:
    scripted((9.0, 0.0), (8.0, 0.0), (30.0, 0.0))
    _, ctx = train(tmp_path, spec_of(epochs=3))
    assert not [one for one in ctx.events if one["type"] == "rolled_back"]
