"""
All that a training run is at one moment, and its way into a checkpoint and back.

The step is the only cursor: epoch, order, noise and augmentation follow from it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from jobs import rng
from jobs.class_checks import other_classes
from jobs.context import Snapshot
from jobs.errors import CheckpointCorruptError, SpecError, TrainingDivergedError
from jobs.networks.dcgan import AnyDiscriminator, AnyGenerator, Architecture
from jobs.networks.layout import check_frozen
from jobs.networks.weights import Which, select
from jobs.specs import TrainSpec, difference
from jobs.training.ada import Ada
from jobs.training.ema import Ema
from jobs.training.schedules import ScheduleValues

MEASURES = ("size", "nz", "ngf", "ndf", "norm_d", "arch")
"""Of an architecture, those that are options; the number of classes is the data set's."""
OF_D = ("ndf", "norm_d")
"""Those of the discriminator alone: an import without one leaves them open."""


@dataclass
class TrainState:
    """Networks, their averages, their optimisers, and how far they are."""

    generator: AnyGenerator
    discriminator: AnyDiscriminator
    opt_g: Adam
    opt_d: Adam
    ema: Ema | None
    ada: Ada | None = None
    frozen_d: frozenset[str] = frozenset()
    """Names of D's weights that never change."""
    step: int = 0
    """Batches of real pictures that are done."""

    @classmethod
    def fresh(cls, spec: TrainSpec, device: torch.device, classes: int = 0) -> "TrainState":
        """Networks with initial weights of the spec's seed, in train mode, channels last."""
        arch = Architecture.of_spec(spec, classes)
        # Channels last is the layout of oneDNN's and cuDNN's fast kernels: a quarter off a
        # step on a CPU. Fused Adam is a third of the loop over parameters.
        generator = arch.build_generator(rng.derive(spec.seed, "init-g"))
        generator.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        discriminator = arch.build_discriminator(rng.derive(spec.seed, "init-d"))
        discriminator.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        betas = (spec.beta1, spec.beta2)
        freeze(generator, "Gene", spec.freeze_g, "--freeze-g")
        freeze(discriminator, "Discrim", spec.freeze_d, "--freeze-d")
        return cls(
            frozen_d=frozenset(
                name for name, one in discriminator.named_parameters() if not one.requires_grad
            ),
            generator=generator,
            discriminator=discriminator,
            opt_g=Adam(generator.parameters(), lr=spec.lr_g, betas=betas, fused=True),
            opt_d=Adam(discriminator.parameters(), lr=spec.lr_d, betas=betas, fused=True),
            ema=Ema(generator, spec.ema_half_life_kimg * 1000) if spec.ema_half_life_kimg else None,
            ada=Ada(spec.ada_target, spec.ada_kimg * 1000, device) if spec.ada_target else None,
        )

    def start_from(self, netg: Mapping[str, Tensor] | None, netd: Mapping[str, Tensor] | None) -> None:
        """
        Take over starting weights.

        Raises:
            SpecError: a file does not fit the network that the options describe.
        """
        if netg is not None:
            _load_start(self.generator, _one_of(netg, "G"), "--init-netg")
            if self.ema is not None:
                self.ema.net.load_state_dict(self.generator.state_dict())
        if netd is not None:
            _load_start(self.discriminator, _one_of(netd, "D"), "--init-netd")

    def start_from_model(self, snapshot: Snapshot, arch: Architecture) -> bool:
        """
        Take over both networks of another job.

        Returns:
            Whether it had a discriminator.

        Raises:
            SpecError: its networks are not of this form; names each option that differs.
        """
        its, mine = asdict(Architecture.from_json(snapshot.meta["arch"])), asdict(arch)
        has_d = any(key.startswith("D.") for key in snapshot.tensors)
        differ = [
            difference(name, mine[name], its[name])
            for name in MEASURES
            if its[name] != mine[name] and (has_d or name not in OF_D)
        ]
        if differ:
            raise SpecError(
                f"job {snapshot.job_id} has other networks than were asked for: {', '.join(differ)}",
                hint="leave these options away, or start from another job",
            )
        if its["classes"] != mine["classes"]:
            raise other_classes(snapshot.job_id, its["classes"], mine["classes"])
        self.start_from(snapshot.tensors, snapshot.tensors if has_d else None)
        return has_d

    def let_d_learn(self, learns: bool) -> None:
        """Whether a backward pass computes D's own gradients; frozen layers never have any."""
        for name, one in self.discriminator.named_parameters():
            one.requires_grad_(learns and name not in self.frozen_d)

    def tensors(self) -> dict[str, Tensor]:
        """All that load() needs: the very tensors that the next step changes."""
        return {
            **_over("g.", self.generator.state_dict()),
            **_over("d.", self.discriminator.state_dict()),
            **_over("ema.", self.ema.net.state_dict() if self.ema else {}),
            **({"ada.numbers": self.ada.numbers_3} if self.ada else {}),
            **_over("opt_g.", _flat(self.opt_g)),
            **_over("opt_d.", _flat(self.opt_d)),
        }

    def generator_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        All that generation needs, keys 'G.…' (the average, where there is one) and 'D.…'.

        Args:
            tensors: what tensors() gave, or copies of it.
        """
        shown = _under("ema." if self.ema else "g.", tensors)
        return {
            **{f"G.{key}": value for key, value in shown.items()},
            **{f"D.{key}": value for key, value in _under("d.", tensors).items()},
        }

    def set_rates(self, now: ScheduleValues) -> None:
        """Rates and beta2 from now on; no part of load(), because they belong to the run's plan."""
        for optimizer, rate in ((self.opt_g, now.lr_g), (self.opt_d, now.lr_d)):
            for group in optimizer.param_groups:
                group["lr"] = rate
                group["betas"] = (group["betas"][0], now.beta2)

    @property
    def sampler(self) -> AnyGenerator:
        """The generator that is shown and kept."""
        return self.ema.net if self.ema else self.generator

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """
        Go back to the state that tensors() gave at `step`.

        Raises:
            CheckpointCorruptError: it holds other tensors than this run has; the state is a
                mixture then, and needs another load().
        """
        mine = self.tensors()
        # A fresh optimiser has no moments to compare with.
        wanted = set(mine) | {key for key in tensors if key.startswith("opt_")}
        if wanted != set(tensors):
            odd = sorted(wanted.symmetric_difference(tensors))
            raise CheckpointCorruptError(
                f"this checkpoint does not fit the run: {', '.join(odd[:3])}",
                hint="an older checkpoint may: ganq checkpoints JOB",
            )
        try:
            self.generator.load_state_dict(_under("g.", tensors))
            self.discriminator.load_state_dict(_under("d.", tensors))
            if self.ema is not None:
                self.ema.net.load_state_dict(_under("ema.", tensors))
            if self.ada is not None:
                self.ada.numbers_3 = tensors["ada.numbers"].to(self.ada.numbers_3.device, copy=True)
            _unflatten(self.opt_g, _under("opt_g.", tensors))
            _unflatten(self.opt_d, _under("opt_d.", tensors))
        except (RuntimeError, IndexError, ValueError) as exc:  # other shapes than these networks have
            raise CheckpointCorruptError(
                f"this checkpoint does not fit the run: {(str(exc).splitlines() or [''])[-1].strip()[:160]}",
                hint="an older checkpoint may: ganq checkpoints JOB",
            ) from exc
        self.step = step

    def check_finite(self) -> None:
        """
        Raises:
            TrainingDivergedError: a weight, statistic or moment is NaN or infinite.
        """
        if not all_finite(self.tensors().values()):
            raise diverged("a weight is no finite number", self.step)


def freeze(net: nn.Module, sequential: str, count: int, option: str) -> None:
    """
    Let the first layers of a network keep their weights.

    Args:
        count: of the layers with a convolution; what stands between them freezes along.

    Raises:
        SpecError: nothing would be left to learn.

    Source: Mo et al. 2020, arXiv:2002.10964 (FreezeD).
    """
    layers = list(net.get_submodule(sequential).children())
    with_kernel = [any(one.dim() == 4 for one in layer.parameters()) for layer in layers]
    check_frozen(option, count, sum(with_kernel))
    seen = 0
    for layer, has_kernel in zip(layers, with_kernel, strict=True):
        seen += has_kernel
        if seen > count:
            return
        layer.requires_grad_(False)


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no element is NaN or infinite; waits for a GPU once, not once a tensor."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    # A sum is finite only if all its terms are: 8 ms for 90 MB, where the largest magnitudes
    # took 160. Large terms may add up to infinity, and only then is each of them looked at.
    if torch.stack([tensor.sum() for tensor in floats]).isfinite().all():
        return True
    return all(bool(tensor.isfinite().all()) for tensor in floats)


def diverged(what: str, step: int) -> TrainingDivergedError:
    """The error of a run whose numbers have left the rails."""
    return TrainingDivergedError(
        f"training diverged at step {step}: {what}",
        hint="checkpoints from before are whole (ganq checkpoints JOB); "
        "start again with a lower --lr-g and --lr-d, or with --recipe plus",
        step=step,
    )


def _over(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor.detach() for key, tensor in tensors.items()}


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _one_of(tensors: Mapping[str, Tensor], which: Which) -> Mapping[str, Tensor]:
    """Return one network's weights out of a file that may hold both, with ganq's prefixes or without."""
    return _under(f"{which}.", tensors) or select(tensors, which) or tensors


def _flat(optimizer: Optimizer) -> dict[str, Tensor]:
    """'<parameter>.<name>' → tensor: Adam's step, exp_avg and exp_avg_sq."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def _unflatten(optimizer: Optimizer, flat: Mapping[str, Tensor]) -> None:
    """
    Put the moments back in the memory layout of their parameter.

    Adam's fused kernel walks parameter and moments in memory order: contiguous
    moments beside a channels-last parameter would be wrong, not just slow.
    """
    optimizer.state.clear()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, value in flat.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if name == "step":
            restored = value.to(device=parameter.device, dtype=torch.float32, copy=True)
        else:
            restored = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(value)
        optimizer.state[parameter][name] = restored.detach()


def _load_start(net: nn.Module, weights: Mapping[str, Tensor], option: str) -> None:
    try:
        net.load_state_dict(dict(weights))
    except RuntimeError as exc:
        first = str(exc).splitlines()[1].strip() if "\n" in str(exc) else str(exc)
        raise SpecError(
            f"{option}: the weights do not fit the network: {first[:160]}",
            hint="--size, --nz, --ngf, --ndf, --arch and --norm-d must be those it was trained with; "
            "for the tutorial's weights: --recipe dcgan or sngan",
        ) from exc
