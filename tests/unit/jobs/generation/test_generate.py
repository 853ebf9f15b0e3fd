"""Generation: image i is its own, the best are the best, and stopping publishes nothing."""

import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.jobs.local_context import LocalContext

import jobs.generation.generate
from jobs import grids, rng
from jobs.context import Snapshot, StoredImage
from jobs.errors import CheckpointCorruptError, SpecError, StopRequested
from jobs.generation import model_cache, shard_builds
from jobs.networks.dcgan import Architecture
from jobs.specs import GenerateSpec
from jobs.states import StopReason

ARCH = Architecture(size=16, nz=6, ngf=4, ndf=4)


def snapshot_of(seed: Any = 0, *, scorer: Any = True, sha256: Any = None) -> Any:
    netg, netd = ARCH.build_generator(seed), ARCH.build_discriminator(seed)
    with torch.no_grad():
        for _ in range(3):
            netd(netg(torch.randn(16, 6, 1, 1, generator=rng.generator(seed, "test"))))
    tensors = {f"G.{k}": v for k, v in netg.state_dict().items()}
    if scorer:
        tensors |= {f"D.{k}": v for k, v in netd.state_dict().items()}
    return Snapshot(1, 1, tensors, {"arch": ARCH.to_json()}, sha256 or f"{seed}-{scorer}")


SNAPSHOT = snapshot_of()


def generate(snapshot: Any = SNAPSHOT, **given: Any) -> Any:
    ctx = LocalContext(folder=Path("/nowhere"), source=snapshot)
    options = {"source": 1, "seed": 3, "micro_batch": 8, **given}
    return jobs.generation.generate.run(GenerateSpec.create(**options), ctx), ctx


def pixels(ctx: Any) -> Any:
    return np.stack([one.pixels_HW3 for one in ctx.sink.stored_images])


@contextmanager
def threads_of_torch(number: Any) -> Iterator[Any]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


WHOLE = pixels(generate(count=64)[1])


def test_images_are_the_generators_in_eval_mode_from_their_own_latents() -> None:
    net = ARCH.build_generator()
    net.load_state_dict({k[2:]: v for k, v in SNAPSHOT.tensors.items() if k.startswith("G.")})
    with torch.no_grad():
        expected = net.eval()(rng.latents(3, range(64), 6)[:, :, None, None])
    assert np.abs(WHOLE.astype(int) - grids.to_uint8(expected)).max() <= 1
    assert len({one.tobytes() for one in WHOLE}) == 64


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    # An even number of different cuts, taken in pairs, are ranges that do not overlap.
    st.lists(st.integers(0, 63), min_size=2, max_size=8, unique=True)
    .map(sorted)
    .map(lambda cuts: list(zip(cuts[::2], cuts[1::2], strict=False)))
)
def test_an_image_is_the_same_in_whatever_range_it_is_asked_for(ranges: Any) -> None:
    result, ctx = generate(seeds=tuple(ranges))
    draws = [draw for first, last in ranges for draw in range(first, last + 1)]
    assert np.array_equal(pixels(ctx), WHOLE[draws])
    assert [one.record["draw"] for one in ctx.sink.stored_images] == draws
    assert result["image_count"] == len(draws)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chosen", [{"count": 60}, {"keep": 10, "of": 60}, {"count": 60, "reject": 0.3}])
def test_images_scores_and_their_order_are_the_same_on_one_core_and_on_several(
    threads: int, chosen: Any
) -> None:
    results = []
    for number in (1, threads):
        with threads_of_torch(number):
            ctx = generate(**chosen)[1]
        results.append((pixels(ctx).tobytes(), [one.record for one in ctx.sink.stored_images]))
    assert results[0] == results[1]


def test_on_two_cores_two_micro_batches_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together, forward = threading.Barrier(2), jobs.generation.generate.Generation._forward

    def meets_the_other(self: jobs.generation.generate.Generation, *inputs: Any) -> Any:
        together.wait(10)
        return forward(self, *inputs)

    monkeypatch.setattr(jobs.generation.generate.Generation, "_forward", meets_the_other)
    with threads_of_torch(2):
        assert np.array_equal(pixels(generate(count=64)[1]), WHOLE)


def test_records_say_where_an_image_comes_from_and_are_scored_only_when_asked() -> None:
    _, ctx = generate(count=3)
    assert [one.record for one in ctx.sink.stored_images] == [
        {"seed": 3, "draw": i, "score": None} for i in range(3)
    ]
    assert ctx.sink.published
    assert ctx.reports[-1]["done"] == 3


def test_seed_mean_and_std_change_the_images() -> None:
    for other in ({"seed": 4}, {"noise_mean": 1.0}, {"noise_std": 0.5}):
        assert not np.array_equal(pixels(generate(count=8, **other)[1]), WHOLE[:8])
    assert len({p.tobytes() for p in pixels(generate(count=8, noise_std=0.0)[1])}) == 1


@pytest.mark.parametrize("micro_batch", [8, 16])
def test_kept_images_are_the_best_of_all_best_first(micro_batch: int) -> None:
    netd = ARCH.build_discriminator()
    netd.load_state_dict({k[2:]: v for k, v in SNAPSHOT.tensors.items() if k.startswith("D.")})
    netg = ARCH.build_generator()
    netg.load_state_dict({k[2:]: v for k, v in SNAPSHOT.tensors.items() if k.startswith("G.")})
    with torch.no_grad():
        scores = netd.eval()(netg.eval()(rng.latents(3, range(60), 6)[:, :, None, None]))
    result, ctx = generate(keep=10, of=60, micro_batch=micro_batch)
    kept = [one.record for one in ctx.sink.stored_images]
    assert [record["draw"] for record in kept] == scores.argsort(descending=True)[:10].tolist()
    assert [record["score"] for record in kept] == pytest.approx(
        scores.sort(descending=True)[0][:10].tolist(), abs=1e-5
    )
    assert [image.output_index for image in ctx.sink.stored_images] == [None] * 10
    assert np.abs(pixels(ctx).astype(int) - WHOLE[[record["draw"] for record in kept]]).max() <= 1
    assert (result["drawn"], result["image_count"]) == (60, 10)


def peak_bytes(work: Any) -> Any:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_the_best_of_many_take_memory_for_those_that_are_kept_however_many_are_drawn() -> None:
    def best_of(drawn: Any) -> Any:
        return peak_bytes(lambda: generate(keep=16, of=drawn, micro_batch=256))

    with threads_of_torch(1):  # lanes have more or less in hand, as it happens
        best_of(512)  # what is imported and built once
        few, many = best_of(2_000), best_of(20_000)
    a_picture = 16 * 16 * 3
    # 18,000 draws more: had each left but its score behind, it would show.
    assert many - few < 200 * a_picture


def test_ten_million_draws_are_cut_up_one_by_one() -> None:
    first = jobs.generation.generate._by_block(((0, 10**7 - 1),), 64)
    assert peak_bytes(lambda: [next(first) for _ in range(1000)]) < 500_000
    assert next(first) == (1000, [range(64_000, 64_064)])


def test_of_equal_scores_the_earlier_draw_is_kept_and_comes_first() -> None:
    tensors = dict(SNAPSHOT.tensors)
    last = [k for k in tensors if k.startswith("D.") and k.endswith("weight")][-1]
    tensors[last] = torch.zeros_like(tensors[last])  # every image now scores the same
    _, ctx = generate(Snapshot(1, 1, tensors, SNAPSHOT.meta, "ties"), keep=5, of=40)
    assert [one.record["draw"] for one in ctx.sink.stored_images] == [0, 1, 2, 3, 4]


def test_grids_hold_so_many_images_a_page_and_so_many_pages() -> None:
    result, ctx = generate(count=21, grid=8, grid_pages=16)
    assert list(ctx.sink.grids) == ["grid-0000", "grid-0001", "grid-0002"]
    assert np.array_equal(ctx.sink.grids["grid-0001"], grids.tile(WHOLE[8:16]))
    assert np.array_equal(ctx.sink.grids["grid-0002"], grids.tile(WHOLE[16:21]))
    assert result["grids"] == 3
    assert list(generate(count=40, grid=8, grid_pages=2)[1].sink.grids) == ["grid-0000", "grid-0001"]
    assert generate(count=9, grid=0)[1].sink.grids == {}
    assert list(generate(count=9, grid=8, grid_pages=0)[1].sink.grids) == []


def test_keeping_without_a_discriminator_is_refused_and_counting_is_not() -> None:
    blind = snapshot_of(scorer=False)
    with pytest.raises(SpecError, match="no discriminator"):
        generate(blind, keep=1, of=2)
    assert np.array_equal(pixels(generate(blind, count=64)[1]), WHOLE)


@pytest.mark.parametrize("reason", list(StopReason))
def test_a_stop_between_micro_batches_publishes_nothing_and_leaves_no_thread(reason: Any) -> None:
    before = set(threading.enumerate())
    ctx = LocalContext(
        folder=Path("/nowhere"), source=SNAPSHOT, stop_at=lambda asked: reason if asked == 2 else None
    )
    with pytest.raises(StopRequested) as caught:
        jobs.generation.generate.run(GenerateSpec.create(source=1, count=64, micro_batch=8), ctx)
    assert caught.value.reason == reason
    assert len(ctx.sink.stored_images) in (0, 8, 16), "what was drawn before, or what of it was in hand"
    assert not ctx.sink.published
    assert set(threading.enumerate()) == before


def test_broken_weights_are_named_and_publish_nothing() -> None:
    for tensors in (
        {
            **SNAPSHOT.tensors,
            "G.Gene.0.weight": torch.full_like(SNAPSHOT.tensors["G.Gene.0.weight"], torch.nan),
        },
        {k: v for k, v in SNAPSHOT.tensors.items() if k != "G.Gene.0.weight"},
    ):
        with pytest.raises(CheckpointCorruptError):
            generate(Snapshot(1, 1, tensors, SNAPSHOT.meta, f"broken-{len(tensors)}"), count=4)


def test_a_warm_process_does_not_read_the_checkpoint_it_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    model_cache._loaded.clear()
    read: list[int] = []
    model = LocalContext.model

    def noted(self: LocalContext) -> Any:
        read.append(1)
        return model(self)

    monkeypatch.setattr(LocalContext, "model", noted)
    for count in (1, 2, 3):
        generate(count=count)
    assert len(read) == 1
    generate(snapshot_of(5), count=1)
    assert len(read) == 2


def test_a_warm_process_keeps_its_last_four_models() -> None:
    model_cache._loaded.clear()
    for seed in range(6):
        generate(snapshot_of(seed), count=1)
    assert [sha for sha, _ in model_cache._loaded] == [f"{seed}-True" for seed in range(2, 6)]
    first = model_cache.load(snapshot_of(2), torch.device("cpu"))
    assert model_cache.load(snapshot_of(2), torch.device("cpu")) is first
    assert list(model_cache._loaded)[-1][0] == "2-True", "the one used last is dropped last"


# --- collapse, and the builds of shards ---------------------------------------------------------


def test_images_that_are_all_equal_are_an_event_and_a_warning() -> None:
    tensors = {key: torch.zeros_like(one) for key, one in SNAPSHOT.tensors.items()}
    dead = Snapshot(1, 1, tensors, {"arch": ARCH.to_json()}, "dead")
    result, ctx = generate(dead, count=20)
    assert result["warning"] == "collapsed: all 20 images are equal"
    assert [one["type"] for one in ctx.events] == ["collapsed"]
    assert "warning" not in generate(count=20)[0]
    assert "warning" not in generate(dead, count=1)[0]


SSE = {"torch": "2.10", "device": "Xeon (DEFAULT)", "threads": 2}
AVX = {**SSE, "device": "Xeon (AVX512)"}


@pytest.mark.parametrize(
    ("builds", "exact", "shards"),
    [
        ([AVX, AVX], True, [2]),
        ([AVX, SSE, AVX], False, [2, 1]),
        ([AVX, {**AVX, "torch": "2.11"}], False, [1, 1]),
        ([AVX, {**AVX, "threads": 8}], False, [1, 1]),
        ([AVX, None], True, [1]),
    ],
    ids=["equal", "processor", "torch", "threads", "a shard of an older worker"],
)
def test_shards_of_different_builds_are_not_bit_exact_and_named(
    builds: Any, exact: bool, shards: list[int]
) -> None:
    found = shard_builds.facts(builds)
    assert found["bit_exact"] is exact
    assert [one["shards"] for one in found["builds"]] == shards


def test_the_manifest_names_the_build_of_each_image() -> None:
    builds = shard_builds.distinct([AVX, SSE])
    _, number = shard_builds.numbers([AVX, SSE], builds)
    made = [StoredImage(Path("/a"), {"draw": 0}), StoredImage(Path("/a"), {"draw": 1})]
    marked = [one.record for one in shard_builds.marked(made, number)]
    assert marked == [{"draw": 0, "build": 1}, {"draw": 1, "build": 1}]
    assert shard_builds.difference(builds) == "device Xeon (AVX512) is now Xeon (DEFAULT)"
