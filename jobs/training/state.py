"""
The state of a training run at one step, and its conversion to and from a checkpoint's tensors.

The step is the only counter: epoch, order, latents and augmentation are derived from it.
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
from jobs.networks.weights import NETWORK, NETWORKS, NetworkRole, kind_of, select
from jobs.specs import NETWORK_OPTIONS, TrainSpec, difference
from jobs.training.augment import Ada
from jobs.training.ema import Ema
from jobs.training.schedules import ScheduleValues

D_OPTIONS = ("ndf", "norm_d")
"""Those of the discriminator; they are unknown for an import without one."""


@dataclass
class TrainState:
    """Networks, moving average, optimisers, ADA and the step."""

    arch: Architecture
    generator: AnyGenerator
    discriminator: AnyDiscriminator
    opt_g: Adam
    opt_d: Adam
    ema: Ema | None
    ada: Ada | None = None
    frozen_d: frozenset[str] = frozenset()
    """Names of D's frozen parameters."""
    step: int = 0
    """Completed batches of real images."""

    @classmethod
    def fresh(
        cls, spec: TrainSpec, device: torch.device, classes: int = 0, *, side: int | None = None
    ) -> "TrainState":
        """
        Return initialised networks, from the spec's seed, in train mode, channels last.

        Args:
            side: of the images that they are trained on; None: the spec's size.
        """
        arch = Architecture.of_spec(spec, classes).at(side or spec.size)
        # Channels last is the layout of oneDNN's and cuDNN's fast kernels: it saves a quarter of a step on a
        # CPU. Fused Adam takes a third of the time of the loop over parameters.
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
            arch=arch,
            generator=generator,
            discriminator=discriminator,
            opt_g=Adam(generator.parameters(), lr=spec.lr_g, betas=betas, fused=True),
            opt_d=Adam(discriminator.parameters(), lr=spec.lr_d, betas=betas, fused=True),
            ema=Ema(generator, spec.ema_half_life_kimg * 1000) if spec.ema_half_life_kimg else None,
            ada=Ada(spec.ada_target, spec.ada_kimg * 1000, device) if spec.ada_target else None,
        )

    def load_weights(self, netg: Mapping[str, Tensor] | None, netd: Mapping[str, Tensor] | None) -> None:
        """
        Load initial weights.

        Args:
            netg, netd: keys of the tutorial's files, or of a checkpoint ('G.…', 'D.…').

        Raises:
            SpecError: weights do not fit the network that the options describe.
        """
        if netg is not None:
            given = self.generator.state_dict()
            # It is not learned, so weights of a generator without it fit, too.
            low_pass = {key: given[key] for key in given if key.endswith(".kernel")}
            _load(self.generator, {**low_pass, **_network(netg, "G", "--init-netg")}, "--init-netg")
            if self.ema is not None:
                self.ema.net.load_state_dict(self.generator.state_dict())
        if netd is not None:
            _load(self.discriminator, _network(netd, "D", "--init-netd"), "--init-netd")

    def load_model(self, snapshot: Snapshot, arch: Architecture) -> bool:
        """
        Load both networks of another job.

        Returns:
            Whether it has a discriminator.

        Raises:
            SpecError: its architecture differs; the message names each option that does.
        """
        theirs, ours = asdict(Architecture.from_json(snapshot.meta["arch"])), asdict(arch)
        if theirs["grown"]:
            raise SpecError(
                f"the checkpoint of job {snapshot.job_id} is of {theirs['grown']} pixels: "
                "--progressive had not reached full size",
                hint="start from a job that has",
            )
        has_d = any(key.startswith("D.") for key in snapshot.tensors)
        differ = [
            difference(name, ours[name], theirs[name])
            for name in NETWORK_OPTIONS
            if theirs[name] != ours[name] and (has_d or name not in D_OPTIONS)
        ]
        if differ:
            raise SpecError(
                f"the networks of job {snapshot.job_id} differ from those requested: {', '.join(differ)}",
                hint="omit these options, or start from another job",
            )
        if theirs["classes"] != ours["classes"]:
            raise other_classes(snapshot.job_id, theirs["classes"], ours["classes"])
        self.load_weights(snapshot.tensors, snapshot.tensors if has_d else None)
        return has_d

    def grow(self, spec: TrainSpec, device: torch.device, side: int) -> None:
        """
        Replace the networks by those for images of the next side, with the weights of the layers that remain.

        New layers are initialised from the spec's seed. Moments start again, as in Karras et al. 2018: those
        of the old layers belong to another image.
        """
        grown = self.fresh(spec, device, self.arch.classes, side=side)
        pairs: list[tuple[nn.Module, nn.Module]] = [
            (self.generator, grown.generator),
            (self.discriminator, grown.discriminator),
        ]
        if self.ema is not None and grown.ema is not None:
            pairs.append((self.ema.net, grown.ema.net))
        for old, new in pairs:
            new.load_state_dict({**new.state_dict(), **old.state_dict()})
        self.arch, self.generator, self.discriminator = grown.arch, grown.generator, grown.discriminator
        self.opt_g, self.opt_d, self.ema = grown.opt_g, grown.opt_d, grown.ema

    def set_d_requires_grad(self, requires_grad: bool) -> None:
        """Set whether a backward pass computes D's own gradients; frozen layers never have any."""
        for name, parameter in self.discriminator.named_parameters():
            parameter.requires_grad_(requires_grad and name not in self.frozen_d)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that load() needs. They are not copies: the next step changes them."""
        return {
            **_with_prefix("g.", self.generator.state_dict()),
            **_with_prefix("d.", self.discriminator.state_dict()),
            **_with_prefix("ema.", self.ema.net.state_dict() if self.ema else {}),
            **({"ada.numbers": self.ada.state_3} if self.ada else {}),
            **_with_prefix("opt_g.", _flat(self.opt_g)),
            **_with_prefix("opt_d.", _flat(self.opt_d)),
        }

    def generator_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Return what generation needs: keys 'G.…' (the moving average, if there is one) and 'D.…'.

        Args:
            tensors: the result of tensors(), or copies of it.
        """
        sampled = _without_prefix("ema." if self.ema else "g.", tensors)
        return {
            **{f"G.{key}": value for key, value in sampled.items()},
            **{f"D.{key}": value for key, value in _without_prefix("d.", tensors).items()},
        }

    def set_schedule_values(self, values: ScheduleValues) -> None:
        """Set learning rates and beta2. They are derived from the step and not part of a checkpoint."""
        for optimizer, rate in ((self.opt_g, values.lr_g), (self.opt_d, values.lr_d)):
            for group in optimizer.param_groups:
                group["lr"] = rate
                group["betas"] = (group["betas"][0], values.beta2)

    @property
    def sampler(self) -> AnyGenerator:
        """Return the generator that is evaluated and saved: the moving average, if there is one."""
        return self.ema.net if self.ema else self.generator

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """
        Restore the state that tensors() returned at `step`.

        Raises:
            CheckpointCorruptError: the tensors are not those of this run. The state may then be partly
                loaded; load() must be called again.
        """
        # A fresh optimiser has no moments to compare with.
        expected = set(self.tensors()) | {key for key in tensors if key.startswith("opt_")}
        if expected != set(tensors):
            unexpected = sorted(expected.symmetric_difference(tensors))
            raise CheckpointCorruptError(
                f"this checkpoint does not fit the run: {', '.join(unexpected[:3])}",
                hint="an older checkpoint may fit: ganq checkpoints JOB",
            )
        try:
            self.generator.load_state_dict(_without_prefix("g.", tensors))
            self.discriminator.load_state_dict(_without_prefix("d.", tensors))
            if self.ema is not None:
                self.ema.net.load_state_dict(_without_prefix("ema.", tensors))
            if self.ada is not None:
                self.ada.state_3 = tensors["ada.numbers"].to(self.ada.state_3.device, copy=True)
            _unflatten(self.opt_g, _without_prefix("opt_g.", tensors))
            _unflatten(self.opt_d, _without_prefix("opt_d.", tensors))
        except (RuntimeError, IndexError, ValueError) as exc:  # shapes differ
            raise CheckpointCorruptError(
                f"this checkpoint does not fit the run: {(str(exc).splitlines() or [''])[-1].strip()[:160]}",
                hint="an older checkpoint may fit: ganq checkpoints JOB",
            ) from exc
        self.step = step

    def check_finite(self) -> None:
        """
        Check the whole state.

        Raises:
            TrainingDivergedError: a parameter, running statistic or moment is NaN or infinite.
        """
        if not all_finite(self.tensors().values()):
            raise diverged("a weight is not finite", self.step)


def freeze(net: nn.Module, sequential: str, count: int, option: str) -> None:
    """
    Freeze the first layers of a network.

    Args:
        sequential: name of the network's nn.Sequential.
        count: convolutional layers to freeze; the layers between them are frozen too.
        option: named in the error.

    Raises:
        SpecError: no layer would be left to train.

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
    """Return whether no element is NaN or infinite. A GPU is synchronised once, not once per tensor."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    # A sum is finite only if all its terms are: 8 ms for 90 MB, where the maximum took 160 ms. Large terms
    # may add up to infinity; only then is each element checked.
    if torch.stack([tensor.sum() for tensor in floats]).isfinite().all():
        return True
    return all(bool(tensor.isfinite().all()) for tensor in floats)


def diverged(what: str, step: int) -> TrainingDivergedError:
    """Return the error of a diverged run."""
    return TrainingDivergedError(
        f"training diverged at step {step}: {what}",
        hint="earlier checkpoints are intact (ganq checkpoints JOB); "
        "start again with a lower --lr-g and --lr-d, or with --recipe sngan",
        step=step,
    )


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: tensor.detach() for key, tensor in tensors.items()}


def _without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _network(tensors: Mapping[str, Tensor], which: NetworkRole, option: str) -> Mapping[str, Tensor]:
    """
    Return one network's weights out of a file that may contain both, with ganq's prefixes or without.

    Raises:
        SpecError: the file holds the other network alone.
    """
    found = _without_prefix(f"{which}.", tensors) or select(tensors, which)
    if not found and (other := kind_of(tensors)):
        raise SpecError(
            f"{option}: the file holds {other} instead of a {NETWORK[which]}",
            hint="--init-netg takes the generator, --init-netd the discriminator",
        )
    return found or tensors


def _flat(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return Adam's step, exp_avg and exp_avg_sq under '<parameter>.<name>'."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, values in state.items() for name, value in values.items()}


def _unflatten(optimizer: Optimizer, flat: Mapping[str, Tensor]) -> None:
    """
    Restore the moments in the memory layout of their parameter.

    Adam's fused kernel reads parameter and moments in memory order: contiguous moments beside a channels-last
    parameter would be wrong, not only slow.
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


def _load(net: nn.Module, weights: Mapping[str, Tensor], option: str) -> None:
    try:
        net.load_state_dict(dict(weights))
    except RuntimeError as exc:
        first = str(exc).splitlines()[1].strip() if "\n" in str(exc) else str(exc)
        other = kind_of(weights)
        what = first[:160] if other in (None, *NETWORKS.values()) else f"they are of {other}"
        raise SpecError(
            f"{option}: the weights do not fit the network: {what}",
            hint="--size, --nz, --ngf, --ndf, --arch, --norm-d, --full-res-conv, --skips and --antialias "
            "must be those it was trained with; for the tutorial's weights: --recipe dcgan or sngan",
        ) from exc
