"""The test for copies flags who copies and clears who does not; neighbours and shares are exact."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs import rng
from jobs.errors import NotMeasurableError
from jobs.metrics import copying as copies
from jobs.metrics import features, neighbours, prdc
from storage.datasets import synthetic


def normal(count: Any, dims: Any = 8, seed: Any = 0) -> Any:
    return rng.noise(seed, "test", count, shape=(count, dims))


# --- neighbours -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 40), st.integers(4, 40), st.integers(1, 3), st.booleans())
def test_neighbours_are_those_of_the_whole_distance_matrix(
    asked: Any, among: Any, k: Any, themselves: Any
) -> None:
    base = normal(among, seed=1)
    query = base if themselves else normal(asked, seed=2)
    apart = torch.cdist(query.double(), base.double())
    if themselves:
        apart.fill_diagonal_(torch.inf)
    expected = apart.sort(dim=1)
    distance, row = neighbours.nearest(query, base, k, themselves=themselves)
    assert torch.allclose(distance, expected.values[:, :k], atol=1e-6)
    assert torch.equal(row, expected.indices[:, :k])


def test_blocks_change_nothing_and_a_copy_is_at_no_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    base = normal(50) * 100
    whole = neighbours.nearest(base, base, 2, themselves=True)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    for one, other in zip(whole, neighbours.nearest(base, base, 2, themselves=True), strict=True):
        assert torch.allclose(one.double(), other.double())
    assert neighbours.nearest(base[:9], base, 1)[0].max() < 1e-4


# --- precision and recall -------------------------------------------------------------------


def test_precision_falls_for_images_far_off_and_recall_for_modes_that_are_missing() -> None:
    one, other = normal(300), normal(300) + 100
    both = torch.cat([one[:150], other[:150]])
    fresh = normal(300, seed=5)
    assert min(prdc.precision_recall(one, fresh)) > 0.8
    assert prdc.precision_recall(one, other) == (0.0, 0.0)
    half = prdc.precision_recall(both, fresh)
    assert half.precision > 0.7
    assert half.recall == pytest.approx(0.5, abs=0.1)
    collapsed = prdc.precision_recall(one, one[:1] + normal(300, seed=6) * 1e-3)
    assert collapsed.precision == 1.0
    assert collapsed.recall < 0.05


def test_precision_and_recall_of_next_to_nothing_are_refused() -> None:
    with pytest.raises(NotMeasurableError, match="more than 3"):
        prdc.precision_recall(normal(3), normal(30))


# --- copies ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_independent_draws_are_cleared_and_copies_flagged_however_dense_the_crowd(seed: Any) -> None:
    """A tenth of the crowd lies a hundred times as dense as the rest; neighbours there are no copies."""
    scale = torch.where(torch.arange(600)[:, None] % 10 == 0, 0.01, 1.0)
    real, fresh = normal(600, seed=seed) * scale, normal(600, seed=100 + seed) * scale
    assert copies.copying(real, fresh).verdict == "none"
    assert copies.copying(real, fresh[::10].repeat(5, 1) + normal(300) * 1e-4).verdict != "copies"
    noisy = real + normal(600, seed=7) * 0.05 * scale
    assert copies.copying(real, noisy).verdict == "copies"
    some = fresh.clone()
    some[:60] = noisy[:60]
    found = copies.copying(real, some)
    assert found.verdict == "copies", "one in ten"
    assert set(found.ratio_M.argsort()[:50].tolist()) <= set(range(60))
    assert found.neighbour_M[:60].tolist() == list(range(60))


def test_the_line_is_where_one_real_image_in_a_hundred_is() -> None:
    found = copies.copying(normal(1000), normal(4000, seed=1))
    assert found.share == pytest.approx(copies.EXPECTED_SHARE, abs=0.012)
    assert "no sign of copying" in found.summary()


def test_of_few_images_nothing_is_reported_but_a_crowd_of_copies() -> None:
    real = normal(100)
    assert copies.copying(real, normal(100, seed=1)).verdict == "unsure"
    assert copies.copying(real, real + 1e-3).verdict == "copies"
    with pytest.raises(NotMeasurableError):
        copies.copying(normal(2), normal(100))


def test_a_twin_among_the_real_ones_breaks_nothing() -> None:
    real = normal(300)
    real[1] = real[0]
    found = copies.copying(real, normal(300, seed=1))
    assert math.isfinite(found.threshold)
    assert torch.isfinite(found.ratio_M).all()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Faces that a model might be trained on, and others by the same artist."""
    folder = tmp_path_factory.mktemp("faces")
    sets = []
    for seed, count in ((0, 300), (1, 200)):
        synthetic.make_faces(folder / str(seed), style="adventurer", count=count, size=32, seed=seed)
        paths = sorted((folder / str(seed)).glob("*.png"))
        sets.append(np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]))
    return sets


def test_of_drawn_faces_new_ones_are_cleared_and_changed_copies_flagged(drawn: Any) -> None:
    train, others = drawn

    def verdict(pictures_NHW3: Any, look: Any) -> Any:
        seen = [torch.from_numpy(one.transpose(0, 3, 1, 2).copy()) for one in (train, pictures_NHW3)]
        return copies.copying(*map(look, seen)).verdict

    noise = np.random.default_rng(0).normal(0, 12, train[:200].shape)
    noisy = np.clip(train[:200] + noise, 0, 255).astype(np.uint8)
    some = others.copy()
    some[:20] = noisy[:20]
    mixed = ((train[:200].astype(int) + train[100:300]) // 2).astype(np.uint8)
    for look in (copies.thumbnails, features.load("random")):
        assert verdict(others, look) == "none"
        assert verdict(train[:200], look) == "copies"
    assert verdict(noisy, copies.thumbnails) == "copies"
    assert verdict(some, copies.thumbnails) == "copies", "one in ten"
    assert verdict(mixed, copies.thumbnails) == "none", "blurred into each other, as from a poor model"
