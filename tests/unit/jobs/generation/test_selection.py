"""Ways through latent space, rejection, truncation, the grid of epochs: image i stays its own."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from unit.jobs.generation.test_generate import ARCH, SNAPSHOT, WHOLE, generate, pixels, snapshot_of
from unit.jobs.local_context import LocalContext

import jobs.generation.generate
from jobs import rng
from jobs.context import Sample, Snapshot
from jobs.generation import epoch_grid, latent_path, selection, video
from jobs.specs import GenerateSpec


def frames_of(image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1))


LATENTS = rng.Latents(3, 6)


# --- ways -----------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_slerp_goes_along_the_great_circle(seed: Any, share: Any) -> None:
    one, other = rng.Latents(seed, 100).rows([0, 1]).double()
    one, other = one / one.norm(), other / other.norm()
    there = latent_path.slerp(one, other, share)
    angle = math.acos(float(one @ other))
    assert float(there.norm()) == pytest.approx(1, abs=1e-9)
    assert math.acos(min(1.0, float(one @ there))) == pytest.approx(share * angle, abs=1e-5)


@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0])
def test_slerp_of_parallel_and_opposite_vectors_is_finite(factor: float) -> None:
    one = torch.ones(4, dtype=torch.float64)
    assert torch.isfinite(latent_path.slerp(one, one * factor, 0.5)).all()


def test_a_latent_path_begins_ends_and_passes_at_its_images() -> None:
    way = latent_path.Path(LATENTS, (3, 17, 42), 9)
    frames = way.rows(range(16))
    assert torch.equal(frames[[0, 4, 8]], LATENTS.rows([3, 17, 42]))
    assert torch.equal(frames[8:], frames[8:9].expand(8, -1)), "what comes after the end stays there"
    assert len({tuple(row.tolist()) for row in frames[:9]}) == 9
    assert torch.equal(way.rows([4], mean=1.0, std=0.5), LATENTS.rows([17], mean=1.0, std=0.5))


def test_a_video_has_its_frames_as_images_gif_and_mp4() -> None:
    av = pytest.importorskip("av")
    result, ctx = generate(interpolate=(3, 17, 42), frames=21)
    frames = pixels(ctx)
    assert result["image_count"] == len(frames) == 21
    for frame, image in ((0, 3), (10, 17), (20, 42)):
        assert np.abs(frames[frame].astype(int) - WHOLE[image]).max() <= 1
    assert ctx.sink.stored_images[5].record == {
        "seed": 3, "draw": 5, "score": None, "from": 3, "to": 17, "share": 0.5
    }  # fmt: skip
    with Image.open(io.BytesIO(ctx.sink.files["interpolation.gif"])) as gif:
        assert (frames_of(gif), gif.size, gif.info["duration"]) == (21, (16, 16), 40)
        gif.seek(10)
        assert np.abs(np.asarray(gif.convert("RGB")).astype(int) - frames[10]).mean() < 8
    with av.open(io.BytesIO(ctx.sink.files["interpolation.mp4"])) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 21
    assert np.abs(shown[10].astype(int) - frames[10]).mean() < 20


def test_a_frame_does_not_depend_on_what_else_was_asked_for() -> None:
    whole = pixels(generate(interpolate=(3, 17), frames=21)[1])
    again = pixels(generate(interpolate=(3, 17), frames=21, grid=0)[1])
    assert np.array_equal(whole, again)


def test_without_its_library_there_is_no_mp4_and_the_result_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    result, ctx = generate(interpolate=(3, 17), frames=5)
    assert list(ctx.sink.files) == ["interpolation.gif"]
    assert "pip install 'ganq[video]'" in result["note"]
    assert result["note"] in ctx.lines


def test_an_odd_side_loses_its_last_line_in_an_mp4() -> None:
    av = pytest.importorskip("av")
    made = video.mp4([np.full((17, 19, 3), 200, np.uint8)] * 3)
    with av.open(io.BytesIO(made)) as container:
        assert next(container.decode(video=0)).to_ndarray(format="rgb24").shape == (16, 18, 3)


# --- rejection ------------------------------------------------------------------------------


REJECTED, REJECTING = generate(count=64, reject=0.5)


def records(ctx: Any) -> Any:
    return [image.record for image in ctx.sink.stored_images]


def threshold(share: Any) -> Any:
    spec = GenerateSpec.create(source=1, count=1, reject=share)
    rows = selection.calibration_latents(spec, 6).rows(range(selection.CALIBRATION))
    return float(np.quantile(scores(rows).numpy(), share))


def scores(latents: Any) -> Any:
    netg, netd = ARCH.build_generator(), ARCH.build_discriminator()
    netg.load_state_dict({k[2:]: v for k, v in SNAPSHOT.tensors.items() if k.startswith("G.")})
    netd.load_state_dict({k[2:]: v for k, v in SNAPSHOT.tensors.items() if k.startswith("D.")})
    with torch.no_grad():
        return netd.eval()(netg.eval()(latents[:, :, None, None]))


def test_what_is_taken_scores_at_least_the_models_threshold() -> None:
    assert min(record["score"] for record in records(REJECTING)) >= threshold(0.5) - 1e-5
    assert {record["tries"] for record in records(REJECTING)} > {1, 2}


def test_an_image_that_is_good_enough_is_the_one_that_comes_without_rejection() -> None:
    good = scores(rng.latents(3, range(64), 6)) >= threshold(0.5)
    first = [record["tries"] == 1 for record in records(REJECTING)]
    assert first == good.tolist()
    assert np.array_equal(pixels(REJECTING)[first], WHOLE[first])
    assert not any(map(np.array_equal, pixels(REJECTING)[~good], WHOLE[~good]))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 63), st.integers(0, 63))
def test_an_image_is_the_same_in_whatever_range_it_is_asked_for(one: Any, other: Any) -> None:
    first, last = sorted((one, other))
    _, ctx = generate(seeds=((first, last),), reject=0.5)
    assert np.array_equal(pixels(ctx), pixels(REJECTING)[first : last + 1])
    assert [r["tries"] for r in records(ctx)] == [r["tries"] for r in records(REJECTING)[first : last + 1]]


def test_where_no_try_is_good_enough_the_best_of_them_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "MAX_DRAWS", 3)
    _, ctx = generate(count=8, reject=0.95)
    tried = torch.stack([scores(LATENTS.rows(range(8), retry=k)) for k in range(3)])
    assert [record["score"] for record in records(ctx)] == pytest.approx(
        [
            next((s for s in column if s >= threshold(0.95)), max(column))
            for column in tried.T.tolist()
        ],
        abs=1e-5,
    )  # fmt: skip
    assert max(record["tries"] for record in records(ctx)) == 3


def test_tries_of_one_image_are_no_other_images() -> None:
    rows = torch.cat([LATENTS.rows(range(50), retry=k) for k in range(4)])
    assert len({tuple(row.tolist()) for row in rows}) == 200
    assert torch.equal(rows[:50], LATENTS.rows(range(50)))


# --- truncation -----------------------------------------------------------------------------


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.floats(0.01, 10))
def test_truncated_numbers_lie_within_and_keep_their_order(limit: Any) -> None:
    plain = rng.Latents(1, 50).rows(range(40))
    within = selection.Truncated(rng.Latents(1, 50), limit).rows(range(40))
    assert within.abs().max() <= limit + 1e-6
    assert torch.isfinite(within).all()
    order = plain.flatten().argsort()
    assert (within.flatten()[order].diff() >= 0).all()


def test_truncated_numbers_are_distributed_as_if_drawn_again() -> None:
    plain = rng.Latents(1, 100).rows(range(4000)).flatten()
    again = plain[plain.abs() <= 0.7].sort().values
    within = selection.Truncated(rng.Latents(2, 100), 0.7).rows(range(4000)).flatten().sort().values
    shares = torch.arange(1, 20) / 20
    ours, theirs = (values[(shares * len(values)).long()] for values in (within, again))
    assert (ours - theirs).abs().max() < 0.01


def test_a_wide_truncation_changes_next_to_nothing_and_a_narrow_one_tames() -> None:
    assert np.abs(pixels(generate(count=64, truncation=10)[1]).astype(int) - WHOLE).max() <= 1
    assert pixels(generate(count=64, truncation=0.1)[1]).std(axis=0).mean() < WHOLE.std(axis=0).mean() / 2


# --- epochs ---------------------------------------------------------------------------------


def test_the_grid_of_epochs_has_a_row_of_the_same_seeds_for_each_checkpoint() -> None:
    kept = [snapshot_of(seed, sha256=f"kept-{seed}") for seed in (1, 2, 0)]
    kept = [Snapshot(n, 5 * n, one.tensors, one.meta, one.sha256) for n, one in enumerate(kept, 1)]
    ctx = LocalContext(folder=Path("/nowhere"), source=SNAPSHOT, kept=kept)
    spec = GenerateSpec.create(source=1, seed=3, micro_batch=8, seeds=((5, 5), (11, 30)), grid_epochs=True)
    result = jobs.generation.generate.run(spec, ctx)
    assert result["epochs"] == [5, 10, 15]
    assert any("epochs 5, 10, 15" in line for line in ctx.lines)
    grid = ctx.sink.grids["epochs"]
    high = wide = 18  # 16 pixels and 2 between
    assert grid.shape == (3 * high + 2, epoch_grid.MARGIN + 8 * wide + 2, 3)
    shown = [5, *range(11, 18)]
    for place, draw in enumerate(shown):
        left = epoch_grid.MARGIN + place * wide + 2
        assert np.array_equal(grid[2 * high + 2 :, left : left + 16][:16], WHOLE[draw])
        assert not np.array_equal(grid[2 : 2 + 16, left : left + 16], WHOLE[draw])
    with Image.open(io.BytesIO(ctx.sink.files["epochs.gif"])) as gif:
        assert frames_of(gif) == 3


def test_the_film_of_a_training_has_a_frame_for_each_sample_grid_that_can_be_read() -> None:
    av = pytest.importorskip("av")

    def sample(epoch: int) -> Sample:
        return Sample(f"epoch-{epoch:04d}", lambda: np.full((34, 34, 3), 20 * epoch, dtype=np.uint8))

    def gone() -> Any:
        raise FileNotFoundError

    kept = [Snapshot(n, 5 * n, SNAPSHOT.tensors, SNAPSHOT.meta, f"kept-{n}") for n in (1, 2)]
    samples = [*map(sample, range(1, 8)), Sample("epoch-0008", gone)]
    ctx = LocalContext(folder=Path("/nowhere"), source=SNAPSHOT, kept=kept, source_samples=samples)
    spec = GenerateSpec.create(source=1, count=8, micro_batch=8, grid_epochs=True)
    result = jobs.generation.generate.run(spec, ctx)
    assert (result["epochs"], result["frames"]) == ([5, 10], 7)
    with Image.open(io.BytesIO(ctx.sink.files["epochs.gif"])) as gif:
        assert frames_of(gif) == 7
    with av.open(io.BytesIO(ctx.sink.files["epochs.mp4"])) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert [round(float(frame.mean()) / 20) for frame in shown] == [1, 2, 3, 4, 5, 6, 7, 7]
