"""Class-conditional training: what is asked for is what is drawn."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from unit.jobs.local_context import LocalContext, sha256_of

import jobs.generation.generate
import jobs.training.train
from jobs.context import Images
from jobs.errors import DatasetError, SpecError, StopRequested
from jobs.generation.inference import for_inference
from jobs.networks.classes import grid_labels
from jobs.networks.dcgan import Architecture
from jobs.specs import GenerateSpec, TrainSpec
from jobs.states import StopReason

NAMES = ("black", "grey", "white")
ARCHS = [
    Architecture(size=16, nz=4, ngf=2, ndf=2, classes=3),
    Architecture(size=16, nz=4, ngf=2, ndf=2, norm_d="spectral", classes=3),
    Architecture(size=16, nz=4, ngf=2, ndf=2, norm_d="none", arch="balanced", classes=3),
    Architecture(size=16, nz=4, ngf=2, ndf=2, norm_d="none", arch="resnet", classes=3),
]


def shaded(counts: Any = (12, 12, 12), size: Any = 16) -> Any:
    """Three classes of noise: dark, middle and bright images."""
    labels = np.repeat(np.arange(len(counts)), counts)
    noise = np.random.default_rng(0).integers(-20, 21, (len(labels), 3, size, size))
    levels = np.array([25, 128, 230])[labels].reshape(-1, 1, 1, 1)
    images = (levels + noise).astype(np.uint8)
    return Images(images, "f" * 64, NAMES, labels.astype(np.int64))


def spec_of(**given: Any) -> Any:
    small = {"size": 16, "nz": 4, "ngf": 4, "ndf": 4, "batch": 12, "epochs": 2, "save_every": 1, "seed": 5}
    return TrainSpec.create(**{"data": "/x", "recipe": "sngan", "conditional": True, **small, **given})


def train(folder: Any, spec: Any, **given: Any) -> Any:
    ctx = LocalContext(**{"folder": Path(folder), "data": shaded(), **given})
    return jobs.training.train.run(spec, ctx), ctx


def generate(folder: Any, model: Any, **given: Any) -> Any:
    ctx = LocalContext(Path(folder), source=model)
    jobs.generation.generate.run(GenerateSpec.create(**{"source": 1, "micro_batch": 4, **given}), ctx)
    return ctx.sink.stored_images


# --- networks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_a_class_changes_the_image_and_its_score_and_reaches_the_tables(arch: Any) -> None:
    netg, netd = arch.build_generator(0).eval(), arch.build_discriminator(0).eval()
    latents = torch.randn(1, 4, 1, 1).expand(3, -1, -1, -1)
    labels = torch.tensor([0, 1, 2])
    images = netg(latents, labels)
    assert len({sha256_of({"p": one.detach()}) for one in images}) == 3
    one = images[:1].detach().expand(3, -1, -1, -1)
    scores = netd(one, labels)
    assert len(set(scores.tolist())) == 3
    torch.testing.assert_close(netg(latents), images, msg="without labels: the classes in turn")
    netd(images, labels).sum().backward()
    for net in (netg, netd):
        tables = [one for name, one in net.named_parameters() if "Classes" in name]
        assert len(tables) == 1
        assert tables[0].grad.abs().sum() > 0


@pytest.mark.parametrize("arch", ARCHS)
def test_a_conditional_generator_is_the_same_when_folded(arch: Any) -> None:
    net = arch.build_generator(0).train()
    latents, labels = torch.randn(6, 4, 1, 1), torch.tensor([2, 0, 1, 1, 2, 0])
    with torch.no_grad():
        net(latents, labels)
        quick = for_inference(net.eval(), torch.device("cpu"))
        torch.testing.assert_close(quick(latents, labels), net(latents, labels), rtol=1e-4, atol=1e-5)


# --- training ---------------------------------------------------------------------------------


@pytest.mark.tier2
@pytest.mark.parametrize("recipe", ["sngan", "rpgan"])
def test_after_some_training_dark_and_bright_classes_are_dark_and_bright(tmp_path: Path, recipe: str) -> None:
    spec = spec_of(recipe=recipe, epochs=100, save_every=100, lr_g=2e-3, lr_d=2e-3, augment=())
    result, ctx = train(tmp_path, spec)
    assert result["classes"] == list(NAMES)
    model = ctx.saved[-1].for_generate()
    means = [
        np.mean([one.pixels_HW3.mean() for one in generate(tmp_path, model, count=32, class_name=name)])
        for name in NAMES
    ]
    assert means[0] + 40 < means[2]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("recipe", ["dcgan", "sngan", "rpgan", "r3gan"])
def test_a_conditional_run_resumes_to_the_last_bit(tmp_path: Path, recipe: str) -> None:
    spec = spec_of(recipe=recipe, fake_reuse="none", g_every=2)
    straight = train(tmp_path, spec)[1]
    assert straight.samples["epoch-0002"].shape[0] == 8 * (16 + 2) + 2, "a row for each class, at least 8"
    at = lambda asked: StopReason.DRAIN if asked == 4 else None  # noqa: E731
    stopped = LocalContext(Path(tmp_path), shaded(), stop_at=at)
    with suppress(StopRequested):
        jobs.training.train.run(spec, stopped)
    again = train(tmp_path, spec, resume_from=stopped.saved[-1].for_resume())[1]
    assert sha256_of(again.saved[-1].state) == sha256_of(straight.saved[-1].state)
    assert np.array_equal(again.samples["epoch-0002"], straight.samples["epoch-0002"])


def test_a_grid_has_a_class_in_each_row() -> None:
    assert grid_labels(3).view(-1, 8).tolist() == [[row % 3] * 8 for row in range(8)]
    assert len(grid_labels(1000)) == 32 * 8


def test_labels_stay_with_their_images(tmp_path: Path) -> None:
    training = jobs.training.train.Training(spec_of(), LocalContext(Path(tmp_path), shaded()))
    for epoch, place in ((0, 0), (0, 2), (3, 1)):
        levels = training.batches.get(epoch, place).mean((1, 2, 3))
        expected = torch.bucketize(levels, torch.tensor([-0.5, 0.5]))
        assert torch.equal(training.batches.labels(epoch, place), expected)


def test_images_without_classes_and_a_class_of_one_are_refused(tmp_path: Path) -> None:
    plain = Images(shaded().images_N3HW, "f" * 64)
    with pytest.raises(DatasetError, match="these images have none"):
        train(tmp_path, spec_of(), data=plain)
    with pytest.raises(DatasetError, match="the class 'grey' has 1 image"):
        train(tmp_path, spec_of(), data=shaded((12, 1, 12)))


# --- generation -------------------------------------------------------------------------------


def test_classes_come_in_turn_by_image_number_or_as_asked_whatever_the_range(tmp_path: Path) -> None:
    model = train(tmp_path, spec_of(epochs=1))[1].saved[-1].for_generate()
    some = generate(tmp_path, model, count=10)
    assert [one.record["class"] for one in some] == [NAMES[i % 3] for i in range(10)]
    (alone,) = generate(tmp_path, model, seeds=((7, 7),))
    assert np.array_equal(alone.pixels_HW3, some[7].pixels_HW3)
    grey = generate(tmp_path, model, count=10, class_name="grey")
    assert {one.record["class"] for one in grey} == {"grey"}
    assert np.array_equal(grey[7].pixels_HW3, some[7].pixels_HW3), "image 7 is grey either way"
    assert not np.array_equal(grey[6].pixels_HW3, some[6].pixels_HW3)
    best = generate(tmp_path, model, keep=2, of=8, class_name="white")
    assert [one.record["class"] for one in best] == ["white"] * 2


def test_a_class_that_the_model_does_not_know_is_refused_with_those_that_it_does(tmp_path: Path) -> None:
    model = train(tmp_path, spec_of(epochs=1))[1].saved[-1].for_generate()
    with pytest.raises(SpecError) as caught:
        generate(tmp_path, model, count=1, class_name="red")
    assert "'red'" in caught.value.message
    assert "black, grey, white" in (caught.value.hint or "")
    plain = train(tmp_path, spec_of(epochs=1, conditional=False))[1].saved[-1].for_generate()
    with pytest.raises(SpecError, match="needs a model that was trained with classes"):
        generate(tmp_path, plain, count=1, class_name="grey")
