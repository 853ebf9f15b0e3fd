"""
A real GPU: recorded steps have the bits of plain ones, a stopped run those of one that was not. By hand:

    pytest -m gpu
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from unit.jobs.local_context import LocalContext, noise_images, sha256_of

import jobs.generation.generate
import jobs.training.train
from jobs.errors import OutOfMemoryError, StopRequested
from jobs.specs import GenerateSpec, TrainSpec
from jobs.states import StopReason
from jobs.training import data

pytestmark = [
    pytest.mark.tier3,
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]

IMAGES = noise_images(72, 32)
RUNS: dict[str, dict[str, Any]] = {
    "dcgan": {"recipe": "dcgan"},
    "origin, D every other batch": {"recipe": "dcgan", "d_every": 2, "g_every": 3},
    "sngan": {"recipe": "sngan"},
    "plus in 32 bits": {"recipe": "sngan", "precision": "fp32"},
    "plus, all changes": {"recipe": "sngan", "augment": ("color", "translation", "cutout"), "mirror": True},
    "rpgan": {"recipe": "rpgan"},
    "r3gan": {"recipe": "r3gan"},
}


def spec_of(**given: Any) -> Any:
    small = {"size": 32, "nz": 8, "ngf": 16, "ndf": 16, "batch": 8, "epochs": 6, "save_every": 3, "seed": 5}
    return TrainSpec.create(
        **{"data": "/faces", "device": "cuda", "metric": "none", "deterministic": True, **small, **given}
    )


def train(folder: Any, spec: Any, images: Any = IMAGES, **given: Any) -> Any:
    ctx = LocalContext(folder, data=images, **given)
    return jobs.training.train.run(spec, ctx), ctx


@pytest.mark.parametrize("run", RUNS)
def test_recorded_steps_have_the_bits_of_plain_ones(tmp_path: Path, run: Any) -> None:
    _, plain = train(tmp_path, spec_of(cuda_graphs=False, **RUNS[run]))
    ctx = LocalContext(tmp_path, data=IMAGES)
    training = jobs.training.train.Training(spec_of(**RUNS[run]), ctx)
    training.run()
    captured: Any = training.cuda_graphs._captured
    recorded = {(name, phase.d, phase.g, phase.penalty) for name, phase in captured}
    assert {name for name, *_ in recorded} == {"d", "g"}, "a pass was not recorded"
    assert ({penalty for *_, penalty in recorded} == {True, False}) == (spec_of(**RUNS[run]).r1_gamma > 0)
    assert sha256_of(ctx.saved[-1].state) == sha256_of(plain.saved[-1].state)


@pytest.mark.parametrize("stop", [2, 11, 31])
@pytest.mark.parametrize("run", RUNS)
def test_a_run_that_was_stopped_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, run: Any, stop: int
) -> None:
    spec = spec_of(**RUNS[run])
    result, straight = train(tmp_path, spec)
    stopped = LocalContext(
        tmp_path, data=IMAGES, stop_at=lambda asked: StopReason.DRAIN if asked == stop else None
    )
    with pytest.raises(StopRequested):
        jobs.training.train.run(spec, stopped)
    resumed, ctx = train(tmp_path, spec, resume_from=stopped.saved[-1].for_resume())
    assert resumed["bit_exact"] is True
    assert sha256_of(ctx.saved[-1].state) == sha256_of(straight.saved[-1].state)
    assert all(value is not None for key, value in result.items() if key.startswith("loss"))


def test_images_that_do_not_fit_on_the_gpu_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, there = train(tmp_path, spec_of(recipe="sngan", mirror=True))
    monkeypatch.setattr(data, "SHARE_OF_FREE", 0.0)
    _, sent = train(tmp_path, spec_of(recipe="sngan", mirror=True))
    assert sha256_of(sent.saved[-1].state) == sha256_of(there.saved[-1].state)


def test_a_batch_too_large_for_the_gpu_is_an_error_with_a_hint(tmp_path: Path) -> None:
    spec = spec_of(batch=8192, ngf=256, ndf=256, size=128, epochs=1, cuda_graphs=False)
    with pytest.raises(OutOfMemoryError, match="not enough free memory") as caught:
        train(tmp_path, spec, noise_images(8192, 128))
    assert "--batch 4096" in str(caught.value.hint)
    torch.cuda.empty_cache()
    train(tmp_path, spec_of(epochs=1))


def test_an_image_has_the_same_bytes_however_many_are_made_with_it(tmp_path: Path) -> None:
    _, trained = train(tmp_path, spec_of(recipe="sngan"))

    def made(count: int) -> list[bytes]:
        spec = GenerateSpec.create(source=1, count=count, device="cuda", seed=3)
        ctx = LocalContext(tmp_path, source=trained.saved[-1].for_generate())
        jobs.generation.generate.run(spec, ctx)
        return [image.pixels_HW3.tobytes() for image in ctx.sink.stored_images]

    many = made(200)
    assert made(200) == many
    assert made(70) == many[:70]
    assert len(set(many)) == 200
