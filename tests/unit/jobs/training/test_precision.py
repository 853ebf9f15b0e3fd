"""Plain passes in bfloat16: what they may change, and what they may not."""

import platform
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn
from unit.jobs.local_context import LocalContext, noise_images, sha256_of

import jobs.training.train
from jobs import device as devices
from jobs.errors import SpecError, StopRequested
from jobs.specs import TrainSpec
from jobs.states import StopReason
from jobs.training import precision
from jobs.training.cuda_graphs import CudaGraphs
from jobs.training.precision import AutocastPasses, precision_of
from jobs.training.schedules import phase_at, schedule_values
from jobs.training.state import TrainState

IMAGES = noise_images(21, 16)
CPU = torch.device("cpu")


def spec_of(recipe: Any = "dcgan", **given: Any) -> Any:
    small = {"size": 16, "nz": 4, "ngf": 3, "ndf": 3, "batch": 4, "epochs": 3, "save_every": 2, "seed": 5}
    return TrainSpec.create(**{"data": "/faces", "recipe": recipe, **small, **given})


def train(folder: Any, spec: Any, **given: Any) -> Any:
    ctx = LocalContext(folder, data=IMAGES, **given)
    return jobs.training.train.run(spec, ctx), ctx


@pytest.mark.parametrize("recipe", ["dcgan", "sngan", "rpgan"])
def test_a_run_in_bf16_is_finite_resumes_to_the_last_bit_and_keeps_weights_of_32_bits(
    tmp_path: Path, recipe: str
) -> None:
    spec = spec_of(recipe, precision="bf16")
    result, straight = train(tmp_path, spec)
    assert all(value is not None for key, value in result.items() if key.startswith("loss"))
    final = straight.saved[-1]
    assert {one.dtype for one in final.state.values()} <= {torch.float32, torch.int64}
    assert final.meta["build"]["precision"] == "bf16"
    stopped = LocalContext(
        tmp_path, data=IMAGES, stop_at=lambda asked: StopReason.DRAIN if asked == 7 else None
    )
    with pytest.raises(StopRequested):
        jobs.training.train.run(spec, stopped)
    resumed, ctx = train(tmp_path, spec, resume_from=stopped.saved[-1].for_resume())
    assert resumed["bit_exact"] is True
    assert sha256_of(ctx.saved[-1].state) == sha256_of(final.state)
    in_fp32 = train(tmp_path, spec_of(recipe, precision="fp32"))[1].saved[-1]
    assert sha256_of(in_fp32.state) != sha256_of(final.state), "bf16 was asked for, and nothing was rounded"


def test_bf16_rounds_convolutions_and_neither_scores_nor_images(tmp_path: Path) -> None:
    seen = {}

    def remember(layer: Any, given: Any, made: Any) -> None:
        seen[type(layer).__name__] = made.dtype

    state = TrainState.fresh(spec_of(), CPU)
    run = AutocastPasses("bf16", state, CPU)
    for net in (state.generator, state.discriminator):
        for layer in net.modules():
            layer.register_forward_hook(remember)
    scores = run.d(run.g(torch.randn(4, 4, 1, 1)))
    assert scores.dtype == torch.float32
    assert seen["Conv2d"] == seen["ConvTranspose2d"] == torch.bfloat16
    assert seen["Sigmoid"] == seen["Tanh"] == torch.float32


def test_a_penalty_on_the_network_itself_has_a_second_derivative_in_32_bits() -> None:
    state = TrainState.fresh(spec_of("sngan"), CPU)
    AutocastPasses("bf16", state, CPU)
    images = torch.randn(4, 3, 16, 16, requires_grad=True)
    scores = state.discriminator(images)
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    assert gradient.dtype == torch.float32
    gradient.square().sum().backward()  # type: ignore[no-untyped-call]  # torch's
    convolutions = [layer for layer in state.discriminator.modules() if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        original = layer.get_parameter("parametrizations.weight.original")
        assert original.grad is not None
        assert original.grad.abs().sum() > 0


def processor(monkeypatch: pytest.MonkeyPatch, *, has_bf16: Any) -> None:
    """What the processor says of itself; that alone is made up: one without bf16 imitates it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})


@pytest.mark.parametrize("has_bf16", [True, False])
def test_without_an_option_a_cpu_computes_in_32_bits(monkeypatch: pytest.MonkeyPatch, has_bf16: bool) -> None:
    processor(monkeypatch, has_bf16=has_bf16)
    for recipe in ("dcgan", "sngan", "rpgan"):
        assert precision_of(spec_of(recipe), CPU) == "fp32"
        assert precision.precision_facts(spec_of(recipe), CPU) == {"precision": "fp32"}
    assert precision_of(spec_of("rpgan", precision="bf16"), CPU) == "bf16"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the processor says it in other words")
def test_what_the_cpu_has_is_what_its_kernel_says() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert precision.supports_bf16(CPU) is ("avx512_bf16" in flags)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_run_that_began_in_bf16_on_a_gpu_stays_with_it_where_the_cpu_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    in_bf16 = spec_of("rpgan", precision="bf16", epochs=1)
    snapshot = train(tmp_path, in_bf16)[1].saved[-1].for_resume()
    snapshot.meta["spec"]["precision"] = "auto"  # which a GPU had read as bf16
    processor(monkeypatch, has_bf16=has_bf16)
    result, ctx = train(tmp_path, spec_of("rpgan", precision="auto"), resume_from=snapshot)
    assert result["bit_exact"] is has_bf16
    assert any("precision bf16 is now fp32" in line for line in ctx.lines) is not has_bf16
    assert ctx.saved[-1].meta["build"]["precision"] == ("bf16" if has_bf16 else "fp32")


def test_a_checkpoint_from_before_precision_had_a_name_resumes_bit_exactly(tmp_path: Path) -> None:
    snapshot = train(tmp_path, spec_of(epochs=1))[1].saved[-1].for_resume()
    for part in ("build", "spec"):
        del snapshot.meta[part]["precision"]
    assert train(tmp_path, spec_of(epochs=2), resume_from=snapshot)[0]["bit_exact"] is True


def test_a_run_does_not_change_its_precision_on_the_way(tmp_path: Path) -> None:
    snapshot = train(tmp_path, spec_of(epochs=1))[1].saved[-1].for_resume()
    with pytest.raises(SpecError, match=r"--precision bf16 \(it has auto\)"):
        train(tmp_path, spec_of(epochs=2, precision="bf16"), resume_from=snapshot)


def test_what_goes_to_the_device_is_left_alone_on_a_cpu() -> None:
    numbers = torch.randn(3)
    assert devices.send(numbers, CPU) is numbers


# --- graphs ------------------------------------------------------------------------------------


class Crowded(CudaGraphs):
    """A GPU's memory, full as a pass is recorded."""

    def __init__(self) -> None:
        super().__init__(CPU, enabled=True)
        self.enabled = True
        self.tried: list[str] = []

    def _capture(self, work: Any, x: Any, net: Any) -> NoReturn:
        self.tried.append(net.__class__.__name__)
        raise torch.OutOfMemoryError("half way")


def test_passes_that_cannot_be_recorded_for_want_of_memory_run_as_they_are(tmp_path: Path) -> None:
    """Only the memory is made up: that of a GPU that is nearly full."""
    spec = spec_of("rpgan")
    straight, short = (LocalContext(tmp_path, data=IMAGES) for _ in range(2))
    jobs.training.train.Training(spec, straight).run()
    crowded = jobs.training.train.Training(spec, short)
    graphs = crowded.cuda_graphs = Crowded()
    crowded.run()
    assert graphs.tried == ["Discriminator"]
    assert not graphs.enabled
    assert sha256_of(short.saved[-1].state) == sha256_of(straight.saved[-1].state)


def test_a_run_may_continue_without_graphs_and_with_the_same_bits(tmp_path: Path) -> None:
    _, straight = train(tmp_path, spec_of("rpgan"))
    stopped = LocalContext(
        tmp_path, data=IMAGES, stop_at=lambda asked: StopReason.DRAIN if asked == 7 else None
    )
    with pytest.raises(StopRequested):
        jobs.training.train.run(spec_of("rpgan"), stopped)
    newest = stopped.saved[-1].for_resume()
    resumed, ctx = train(tmp_path, spec_of("rpgan", cuda_graphs=False), resume_from=newest)
    assert resumed["resumed_from"] == newest.step
    assert sha256_of(ctx.saved[-1].state) == sha256_of(straight.saved[-1].state)


def test_gs_pass_may_run_again_after_a_recording_of_it_has_failed(tmp_path: Path) -> None:
    training = jobs.training.train.Training(spec_of("rpgan"), LocalContext(tmp_path, data=IMAGES))
    now = schedule_values(training.spec, 0.0)
    phase = phase_at(training.spec, 0, training.d_steps, now)
    x = training._draw(phase, 0, 0, now)
    training._d_gradients(phase, x)
    fakes, judge = training.fakes_B3HW, training.passes.d

    def full(*given: Any) -> NoReturn:
        raise torch.OutOfMemoryError("half way")

    training.passes.d = full  # type: ignore[method-assign, assignment]
    with pytest.raises(torch.OutOfMemoryError):
        training._g_gradients(phase, x)
    training.passes.d = judge  # type: ignore[method-assign]
    assert training.fakes_B3HW is fakes
    assert training._g_gradients(phase, x)["loss_g"].isfinite()
