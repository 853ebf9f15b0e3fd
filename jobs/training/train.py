"""
Train a GAN: set up, then run batches (D phase, G phase, EMA) with logging, checkpoints and evaluation.

Every random draw follows from the seed and the step (jobs/rng.py), so a run that is stopped at any step and
resumed takes the same steps as an uninterrupted one. What recipe `dcgan` does differently, to match the
tutorial bit for bit, is in jobs/training/dcgan_steps.py.

Shapes in names: N images in the data set, B in a batch, Z latent dimensions, H, W pixels.
"""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from jobs import device as devices
from jobs import rng
from jobs.context import CheckpointKind, Images, JobContext, Snapshot
from jobs.device import NamedTensors
from jobs.errors import (
    CollapsedError,
    DatasetError,
    DiskFullError,
    SpecError,
    StopRequested,
    TrainingDivergedError,
)
from jobs.failpoints import failpoint
from jobs.networks.classes import grid_labels, require_classes
from jobs.specs import TrainSpec, check_same_run
from jobs.states import SAVING_STOP_REASONS, StopReason
from jobs.training import augment, stability
from jobs.training.checkpointer import AsyncCheckpointer
from jobs.training.cuda_graphs import CudaGraphs
from jobs.training.data import Batches
from jobs.training.dcgan_steps import CachedFakes
from jobs.training.evaluation import Evaluations
from jobs.training.logger import METRICS, TrainingLogger
from jobs.training.losses import LOSSES, Loss, RelativisticLoss, squared_gradient_norms
from jobs.training.precision import AutocastPasses, precision_facts
from jobs.training.rollback import Rollbacks
from jobs.training.samples import Samples
from jobs.training.schedules import (
    Phase,
    ScheduleValues,
    phase_at,
    schedule_values,
    side_at,
    side_began,
    steps_before,
)
from jobs.training.state import TrainState


def run(spec: TrainSpec, ctx: JobContext) -> dict[str, Any]:
    """
    Train until spec.epochs are complete, or what --stop-after gives is used up.

    Returns:
        The job's result: steps, epochs, images, last losses, speed, exactness.

    Raises:
        DatasetError: too few images, or not those that the run began with.
        SpecError: the checkpoint was trained with other options.
        TrainingDivergedError: a loss or weight is not finite, and a rollback did not help;
            no such checkpoint is saved.
        DiskFullError: no space for the final checkpoint, or for several in a row.
        OutOfMemoryError: --batch or the networks are too large for the device.
        StopRequested: the job was asked to stop; it can be resumed.
    """
    with devices.memory_errors(f"--batch {max(2, spec.batch // 2)}, or a smaller --ngf and --ndf"):
        return Training(spec, ctx).run()


class Training:
    """One training run."""

    def __init__(self, spec: TrainSpec, ctx: JobContext) -> None:
        self.spec = spec
        self.ctx = ctx

        # Device, and everything that the last bit of the result depends on.
        self.device = devices.choose(spec.device)
        devices.set_exactness(self.device, deterministic=spec.deterministic)
        self.build = devices.build_fingerprint(self.device, deterministic=spec.deterministic)
        self.build |= precision_facts(spec, self.device)

        # Data set, decoded once for all runs.
        ctx.report(0, 1, "images", phase="reading images")
        self.images: Images = ctx.images(spec.data, spec.size)
        failpoint("train.data_open")
        self.batches = Batches(
            self.images, batch=spec.batch, seed=spec.seed, mirror=spec.mirror, device=self.device
        )
        self.classes = require_classes(self.images) if spec.conditional else ()
        spec.check_progressive(len(self.images))
        self.total_steps = spec.epochs * self.batches.per_epoch
        self.budget = spec.budget
        budget_steps = self.budget and self.budget.steps(per_epoch=self.batches.per_epoch, batch=spec.batch)
        self.end_step = min(self.total_steps, budget_steps or ctx.stop_step() or self.total_steps)
        """Where training ends: --stop-after may end it early; the schedules follow total_steps."""

        # Loss and augmentation.
        self.loss = LOSSES[spec.loss]
        self.policies, self.augment_p = augment.plan(spec.augment, spec.augment_p, len(self.images))
        fixed_p = torch.tensor(self.augment_p, device=self.device)
        self.fixed_augment_p = dict.fromkeys(self.policies, fixed_p)

        # Logging, checkpoints, rollbacks.
        self.grid_labels = grid_labels(len(self.classes)).to(self.device) if self.classes else None
        shape = (spec.batch if self.grid_labels is None else len(self.grid_labels), spec.nz, 1, 1)
        self.fixed_latents_BZ11 = rng.noise(spec.seed, "fixed", shape=shape).to(self.device)
        self.logger = TrainingLogger(spec, ctx, self.batches.per_epoch, delay=int(self.device.type == "cuda"))
        self.logger.end_step = self.end_step
        self.rollbacks = Rollbacks()
        self.checkpointer = AsyncCheckpointer(
            ctx, self.logger, on_saved=lambda step: self.rollbacks.saved(step)
        )
        self.longest_stall_s = 0.0
        self.bit_exact = True

        # Networks and optimisers: initialised, from given weights, or from the newest checkpoint.
        self.resumed_from = self._start()

    # ------------------------------------------------------------------ epochs

    def run(self) -> dict[str, Any]:
        """Train, roll back when training diverges, and return the job's result."""
        spec, per_epoch = self.spec, self.batches.per_epoch
        started, first_step = time.monotonic(), self.state.step
        failpoint("train.built")
        while True:
            try:
                self._train_epochs()
                break
            except TrainingDivergedError as diverged:
                self._roll_back(diverged)
        seconds, step = time.monotonic() - started, self.state.step
        stopped = self._early_stop() if step < self.total_steps else None
        if stopped:
            self.ctx.log(stopped)
            self.ctx.event("stopped_early", step=step, reason=stopped)
        elif step < self.total_steps:
            stopped = (
                f"stopped after {self.budget}, at epoch {step // per_epoch} of {spec.epochs}, step {step}"
            )
            self.ctx.log(stopped)
            self.ctx.event("budget_reached", step=step, budget=str(self.budget))
        return {
            **self.evaluations.facts(),
            "stopped": stopped,
            **({"stop_after": str(self.budget)} if stopped and not self._early_stop() else {}),
            "step": step,
            "epoch": step // per_epoch,
            "g_steps": self.g_steps,
            "images": step * spec.batch,
            "image_count": len(self.images),
            "classes": list(self.classes),
            **{name: self.logger.last.get(name) for name in METRICS},
            "images_per_s": round((step - first_step) * spec.batch / max(seconds, 1e-9), 2),
            "seconds": round(seconds, 3),
            "longest_stall_s": round(self.longest_stall_s, 4),
            "resumed_from": self.resumed_from,
            "bit_exact": self.bit_exact,
            **self.rollbacks.to_json(),
            "device": self.build["device"],
            **self._warning(),
        }

    def _warning(self) -> dict[str, str]:
        """Return the result's warning about a run that has diverged or collapsed with finite numbers."""
        if stability.all_equal(
            self.state.sampler, self.fixed_latents_BZ11, conditional=self.spec.conditional
        ):
            warning = "collapsed: all images are equal"
            self.ctx.event("collapsed", step=self.state.step, reason="all images are equal")
        elif (what := stability.diverged_loss(self.logger.last)) is not None:
            warning = f"diverged: {what} at the end"
        else:
            return {}
        if self.logger.diverged is not None:
            warning += f" ({self.logger.diverged})"
        self.ctx.log(warning)
        return {"warning": warning}

    def _train_epochs(self) -> None:
        """
        Train from the current step to the end of the last epoch.

        Raises:
            TrainingDivergedError: a loss or weight is not finite; no such state was saved.
        """
        spec, state, per_epoch = self.spec, self.state, self.batches.per_epoch
        while state.step < self.end_step and not self._early_stop():
            self._stop_if_requested()
            if state.step >= self.end_step:
                break

            self.train_batch()
            state.step += 1
            failpoint("train.stepped")

            # Logging; the state of the checkpoint that is being written.
            self.checkpointer.prepare(state.tensors)
            self.checkpointer.poll()
            self.logger.step(state.step)

            # Grids until the first checkpoint, after 500, 1,000, 2,000 … images.
            if self.samples.early_due(state.step, per_epoch) and state.step < self.end_step:
                self._early_grid()

            # Evaluation and checkpoint: every save_every epochs, by time in between, and at the end.
            epochs_done, batches_done = divmod(state.step, per_epoch)
            if state.step == self.end_step:
                break
            if batches_done == 0 and (
                epochs_done % spec.save_every == 0 or self.evaluations.due(epochs_done, final=False)
            ):
                self._checkpoint("epoch")
            elif self.checkpointer.seconds_since_last() >= spec.checkpoint_seconds:
                self._checkpoint("resume")
        self._checkpoint("final")

    # ------------------------------------------------------------------ one batch

    def train_batch(self) -> None:
        """Run one batch: D phase, G phase, EMA. The caller increments state.step."""
        spec, state = self.spec, self.state
        if failpoint("train.out_of_memory"):
            raise torch.OutOfMemoryError("failpoint train.out_of_memory")
        if (side := side_at(spec, state.step)) != state.arch.side:
            self._grow(side)

        # Inputs: schedule values, then every random draw of this batch.
        epoch, batch_index = divmod(state.step, self.batches.per_epoch)
        values = schedule_values(spec, state.step / self.total_steps, lr_scale=self.rollbacks.lr_scale)
        state.set_schedule_values(values)
        phase = phase_at(spec, batch_index, self.d_steps, values)
        x = self.cuda_graphs.set_inputs(phase, self._draw(phase, epoch, batch_index, values))

        # D phase: gradients of the loss and the gradient penalties, ADA, Adam.
        if phase.d:
            out = self.cuda_graphs.run("d", phase, partial(self._d_gradients, phase), x, state.discriminator)
            metrics = {name: out[name] for name in ("loss_d", "d_real", "d_fake")}
            if phase.penalty:
                metrics |= {name: out[name] for name in ("r1", "r2")}
            if state.ada is not None:
                metrics |= {"augment_p": state.ada.p, "d_sign": out["sign"]}
            self.logger.means.add(metrics)
            if state.ada is not None:
                state.ada.update(out["sign"], spec.batch, d_steps=self.d_steps, max_p=self.augment_p)
            if failpoint(f"train.nan.{state.step}x{self.rollbacks.lr_scale:g}"):
                nn.utils.clip_grad_value_(state.discriminator.parameters(), float("nan"))
            state.opt_d.step()
        failpoint("train.between_networks")

        # G phase: gradients of the loss, Adam, moving average of the weights.
        if phase.g:
            out = self.cuda_graphs.run("g", phase, partial(self._g_gradients, phase), x, state.generator)
            state.opt_g.step()
            if state.ema is not None:
                # New layers have no history that the average should keep: its half-life starts short again.
                began = steps_before(side_began(spec, state.step), self.batches.per_epoch, spec.g_every)
                seen = (self.g_steps + 1 - began) * spec.batch
                state.ema.update(images=spec.batch, images_seen=seen)
            self.logger.means.add(out)

    def _d_gradients(self, phase: Phase, x: NamedTensors) -> dict[str, Tensor]:
        """
        Compute D's gradients. Runs inside a CUDA graph: it draws nothing and reads only x and the state.

        Returns:
            Scalars: loss_d, d_real and d_fake (mean scores), r1 and r2 if due, sign if ADA is on.
        """
        real_B3HW = self.batches.images_of(x)
        if self.cached_fakes is not None:
            fakes_B3HW = x["fakes"]
        else:
            # If G steps on this batch too, one forward pass of G serves both phases.
            with torch.set_grad_enabled(phase.g):
                self.fakes_B3HW = self.passes.g(x["latents"], *self._labels(x))
            fakes_B3HW = self.fakes_B3HW.detach()
        self.state.opt_d.zero_grad()
        penalties: dict[str, Tensor] = {}
        if self.spec.norm_d != "batch":
            loss_d, real_B, fake_B, penalties = self._joint_d_loss(phase, real_B3HW, fakes_B3HW, x)
            torch.autograd.backward(loss_d)
        else:
            # BatchNorm: real images and fakes must not share a batch, so each has its own pass.
            assert isinstance(self.loss, Loss)
            real_B = self.passes.d(self._augmented(real_B3HW, "augment-real", x), *self._labels(x))
            loss_real = self.loss.d_real(real_B)
            torch.autograd.backward(loss_real)
            fake_B = self.passes.d(self._augmented(fakes_B3HW, "augment-fake", x), *self._labels(x))
            loss_fake = self.loss.d_fake(fake_B)
            torch.autograd.backward(loss_fake)
            loss_d = loss_real.detach() + loss_fake.detach()
        real_B, fake_B = real_B.detach(), fake_B.detach()
        self.real_scores_B = real_B
        out = {"loss_d": loss_d.detach(), "d_real": real_B.mean(), "d_fake": fake_B.mean(), **penalties}
        if self.state.ada is not None:
            out["sign"] = self._mean_sign(real_B, fake_B)
        return out

    def _joint_d_loss(
        self, phase: Phase, real_B3HW: Tensor, fakes_B3HW: Tensor, x: NamedTensors
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """
        Score real images and fakes in one pass; without BatchNorm they do not affect each other.

        Returns:
            Loss of D with the penalties that are due, scores (B,) of real images and of fakes, penalties.

        Source: R1, R2: Mescheder et al. 2018, arXiv:1801.04406, equations 9 and 10. Lazy regularisation
        (every n-th step, n times as strong): Karras et al. 2020, arXiv:1912.04958, appendix B.
        """
        images = self._augmented(torch.cat([real_B3HW, fakes_B3HW]), "augment-d", x)
        images.requires_grad_(phase.penalty)
        labels = [torch.cat([labels_B, labels_B]) for labels_B in self._labels(x)]
        # A penalty differentiates twice, in float32: without autocast.
        scores = (self.state.discriminator if phase.penalty else self.passes.d)(images, *labels)
        real_B, fake_B = scores.chunk(2)
        if isinstance(self.loss, RelativisticLoss):
            loss_d = self.loss.d(real_B, fake_B)
        else:
            loss_d = self.loss.d_real(real_B) + self.loss.d_fake(fake_B)
        if not phase.penalty:
            return loss_d, real_B, fake_B, {}
        r1, r2 = (norms_B.mean() for norms_B in squared_gradient_norms(images, scores).chunk(2))
        r1_gamma, r2_gamma = x["gammas"]
        penalty = self.spec.penalty_every / 2 * (r1_gamma * r1 + r2_gamma * r2)
        return loss_d + penalty, real_B, fake_B, {"r1": r1.detach(), "r2": r2.detach()}

    def _mean_sign(self, real_B: Tensor, fake_B: Tensor) -> Tensor:
        """Return the mean sign of D's output at real images: ADA's overfitting heuristic r_t."""
        # The decision boundary: 0.5 of a probability, 0 of a logit, the paired fake's score if relativistic.
        relativistic, probability = isinstance(self.loss, RelativisticLoss), self.spec.norm_d == "batch"
        boundary = fake_B if relativistic else 0.5 if probability else 0.0
        return (real_B - boundary).sign().mean()

    def _g_gradients(self, phase: Phase, x: NamedTensors) -> dict[str, Tensor]:
        """
        Compute G's gradients. Runs inside a CUDA graph: it draws nothing and reads only x and the state.

        Returns:
            The scalar loss_g.
        """
        state = self.state
        if self.cached_fakes is not None or not phase.d:
            self.fakes_B3HW = self.passes.g(x["latents"], *self._labels(x))
        state.opt_g.zero_grad()
        # D's own gradients would be a third of its backward pass and are not used.
        state.set_d_requires_grad(False)
        fake_B = self.passes.d(self._augmented(self.fakes_B3HW, "augment-g", x), *self._labels(x))
        if isinstance(self.loss, RelativisticLoss):
            # Scores from before D's step, if it stepped: computing them again costs a tenth of the batch.
            real_B = self.real_scores_B if phase.d else self._real_scores(x)
            loss_g = self.loss.g(real_B, fake_B)
        else:
            loss_g = self.loss.g(fake_B)
        torch.autograd.backward(loss_g)
        state.set_d_requires_grad(True)
        self.fakes_B3HW = torch.empty(0)
        return {"loss_g": loss_g.detach()}

    @torch.no_grad()
    def _real_scores(self, x: NamedTensors) -> Tensor:
        """Return D's scores (B,) of the real images on a batch on which D does not step."""
        real_B3HW = self.batches.images_of(x)
        return self.passes.d(self._augmented(real_B3HW, "augment-g-real", x), *self._labels(x))

    # ------------------------------------------------------------------ inputs of one batch

    @property
    def g_steps(self) -> int:
        """Return the number of G's steps before this batch."""
        return steps_before(self.state.step, self.batches.per_epoch, self.spec.g_every)

    @property
    def d_steps(self) -> int:
        """Return the number of D's steps before this batch."""
        return steps_before(self.state.step, self.batches.per_epoch, self.spec.d_every)

    def _draw(self, phase: Phase, epoch: int, batch_index: int, values: ScheduleValues) -> dict[str, Tensor]:
        """Draw everything random that the phases of one batch use; tensors on the CPU or the device."""
        if not (phase.d or phase.g):
            return {}
        inputs = self.batches.draw(epoch, batch_index)
        if self.spec.conditional:
            # Each fake has the class of the real image beside it.
            inputs["labels"] = self.batches.labels(epoch, batch_index)
        if self.cached_fakes is not None:
            inputs |= self.cached_fakes.draw(phase, self.g_steps, self._latents)
        else:
            inputs["latents"] = self._latents(self.state.step)
        if phase.penalty:
            inputs["gammas"] = torch.tensor([values.r1_gamma, values.r2_gamma])
        for stream in self._augment_streams(phase) if self.policies else ():
            B = self.spec.batch * (2 if stream == "augment-d" else 1)
            draws = rng.generator(self.spec.seed, stream, self.state.step)
            shape = (B, 3, self.state.arch.side, self.state.arch.side)
            drawn = augment.draw(self.policies, shape, draws, always=self._augments_always)
            inputs |= {f"{stream}.{name}": tensor for name, tensor in drawn.items()}
        return inputs

    def _augment_streams(self, phase: Phase) -> Iterator[str]:
        """Yield the random stream of each batch of images that D sees; each is augmented on its own."""
        if phase.d:
            yield from ("augment-d",) if self.spec.norm_d != "batch" else ("augment-real", "augment-fake")
        if phase.g:
            yield "augment-g"
        if phase.g and not phase.d and isinstance(self.loss, RelativisticLoss):
            yield "augment-g-real"

    def _latents(self, draw: int) -> Tensor:
        """Return latents (B, Z, 1, 1) on the CPU."""
        return rng.noise(self.spec.seed, "noise", draw, shape=(self.spec.batch, self.spec.nz, 1, 1))

    def _labels(self, x: NamedTensors) -> tuple[Tensor, ...]:
        """Return (class labels int64 (B,),) for conditional networks, else ()."""
        return (x["labels"],) if self.spec.conditional else ()

    def _augmented(self, images_B3HW: Tensor, stream: str, x: NamedTensors) -> Tensor:
        if not self.policies:
            return images_B3HW
        prefix = f"{stream}."
        drawn = {name.removeprefix(prefix): one for name, one in x.items() if name.startswith(prefix)}
        return augment.apply(images_B3HW, self.policies, drawn, self._augment_probabilities())

    @property
    def _augments_always(self) -> bool:
        return self.state.ada is None and self.augment_p == 1

    def _augment_probabilities(self) -> dict[str, Tensor] | None:
        """Return the probability of each policy; None: 1."""
        if self.state.ada is not None:
            return self.state.ada.probabilities(self.policies)
        return None if self._augments_always else self.fixed_augment_p

    # ------------------------------------------------------------------ checkpoint, evaluation, stop

    def _checkpoint(self, kind: CheckpointKind) -> None:
        """
        Save a checkpoint in the background; at the end of an epoch evaluate first and add a sample grid.

        Raises:
            TrainingDivergedError: a value is not finite; nothing was saved.
            DiskFullError: no space for the final checkpoint, or for several in a row.
        """
        began, spec, state = time.monotonic(), self.spec, self.state
        self.logger.flush(state.step)
        state.check_finite()
        epoch = state.step // self.batches.per_epoch
        whole_epoch = state.step % self.batches.per_epoch == 0
        images = self.samples.tutorial_pass(epoch) if kind != "resume" and whole_epoch else None
        metric = self._evaluate(epoch) if kind != "resume" else None
        meta = {
            "arch": state.arch.to_json(),
            "classes": list(self.classes),
            "recipe": spec.recipe,
            "spec": spec.to_json(),
            "seed": spec.seed,
            "step": state.step,
            "epoch": epoch,
            "g_steps": self.g_steps,
            "images": state.step * spec.batch,
            "fingerprint": self.images.fingerprint,
            "build": self.build,
            "bit_exact": self.bit_exact,
            "sampled": self.samples.step == state.step,
            "metric": metric,
            **self.evaluations.to_json(),
            **self.rollbacks.to_json(),
        }
        # The grid of a run that ends within an epoch has the number of that epoch.
        number = epoch if whole_epoch else epoch + 1
        sample = partial(self.samples.sample, number, images) if kind != "resume" else None
        self.checkpointer.save(kind, state, epoch=epoch, meta=meta, sample=sample)
        if kind != "final":
            self.longest_stall_s = max(self.longest_stall_s, time.monotonic() - began)

    def _early_grid(self) -> None:
        """Draw a grid of samples under the number of this epoch, until a later one of it replaces it."""
        began, epoch = time.monotonic(), -(-self.state.step // self.batches.per_epoch)
        try:
            self.ctx.save_sample(f"epoch-{epoch:04d}", self.samples.early_grid())
        except DiskFullError as full:
            self.ctx.log(f"no sample grid: {full.message}")
        self.logger.exclude(time.monotonic() - began)

    def _evaluate(self, epoch: int) -> float | None:
        """
        Return the metric of the current generator; None where no evaluation is due.

        Raises:
            CollapsedError: the generator collapsed; nothing was saved.
        """
        step = self.state.step
        final = step == self.end_step or self._early_stop() is not None
        if not self.evaluations.due(epoch, final=final):
            return None
        evaluation = self.evaluations.measure(step, epoch, self.state.sampler)
        self.logger.report(step)  # the evaluation has reported its own progress
        if evaluation is not None and self.evaluations.has_collapsed():
            raise CollapsedError(
                f"the generator has collapsed at epoch {epoch}: the diversity of its images is "
                f"{evaluation.diversity:.0%} of that of real images",
                step=step,
            )
        return evaluation.value if evaluation and evaluation.can_be_best else None

    def _early_stop(self) -> str | None:
        """Return why training ends before its last epoch: derived from the checkpoints, not a clock."""
        best, epoch = self.evaluations.best, self.state.step // self.batches.per_epoch
        if best is not None and self.rollbacks.exhausted:
            return f"stopped at epoch {epoch}: the generator collapsed again; best epoch {best.epoch}"
        if not self.evaluations.patience_exceeded():
            return None
        count = f"{self.evaluations.patience()} evaluations"
        if best is None:
            return f"stopped early at epoch {epoch}: collapsed, without improvement for {count}"
        return f"stopped early at epoch {epoch}, after {count} without a new best; best epoch {best.epoch}"

    def _stop_if_requested(self) -> None:
        """
        Stop if the job was asked to; save a checkpoint first if the work is to be kept.

        When the time of --stop-after has passed, the run ends at this step, or at its first.

        Raises:
            StopRequested: the job was asked to stop.
        """
        reason = self.ctx.stop_reason()
        if reason is None:
            return
        if reason == StopReason.STOP_AFTER:
            if self.ctx.stop_step() is None and self.end_step == self.total_steps:
                self.end_step = self.logger.end_step = max(1, self.state.step)
                self.ctx.pin_stop_step(self.end_step)
            return
        if reason in SAVING_STOP_REASONS:
            self.checkpointer.wait()
            if self.state.step > self.checkpointer.saved_step:
                self._checkpoint("resume")
                self.checkpointer.wait()
        raise StopRequested(reason)

    # ------------------------------------------------------------------ start, resume, roll back

    def _start(self, *, epoch_checkpoint: bool = False, step: int | None = None) -> int | None:
        """
        Load the newest checkpoint, or initialise.

        Args:
            epoch_checkpoint: ignore checkpoints that were saved by time.
            step: prefer the checkpoint of this step.

        Returns:
            The checkpoint's step; None for a fresh start.
        """
        self._build(step=0)
        self.evaluations = Evaluations(self.spec, self.ctx, self.images, self.state, self.device)
        snapshot = self.ctx.resume(self._restore, whole_epoch=epoch_checkpoint, step=step)
        if snapshot is None and self.spec.init_from is not None:
            source = self.ctx.model()
            self.ctx.log(f"starting from job {source.job_id}, epoch {source.epoch}")
            if not self.state.load_model(source, self.state.arch):
                self.ctx.log("it has no discriminator: the discriminator is initialised")
        elif snapshot is None:
            self.state.load_weights(
                self.ctx.weights(self.spec.init_netg) if self.spec.init_netg else None,
                self.ctx.weights(self.spec.init_netd) if self.spec.init_netd else None,
            )
        self._prepare_passes()
        self.checkpointer.start_at(self.state.step)
        self.logger.start_at(self.state.step)
        return snapshot.step if snapshot else None

    def _build(self, *, step: int) -> None:
        """Initialise the networks of a step, which load() or load_weights() may overwrite."""
        self.batches.side = side_at(self.spec, step)
        classes = len(self.classes)
        self.state = TrainState.fresh(self.spec, self.device, classes, side=self.batches.side)
        self.samples = Samples(self.spec, self.state, self.fixed_latents_BZ11, self.grid_labels)

    def _grow(self, side: int) -> None:
        """
        Go on with images of the next side.

        A checkpoint at the step of a switch is of the smaller networks; a resumed run grows them likewise.
        """
        self.ctx.log(f"training on images of {side}×{side} from step {self.state.step} on")
        self.state.grow(self.spec, self.device, side)
        self.batches.side = side
        # The thread that writes the last checkpoint may still use the old one.
        sampled = self.samples.step
        self.samples = Samples(self.spec, self.state, self.fixed_latents_BZ11, self.grid_labels)
        self.samples.step = sampled
        self._prepare_passes()

    def _prepare_passes(self) -> None:
        """Set up what runs the networks of the current state."""
        self.passes = AutocastPasses(self.build["precision"], self.state, self.device)
        self.cached_fakes = (
            CachedFakes(self.state.generator, self.passes.g)
            if self.spec.fake_reuse == "until-g-step"
            else None
        )
        self.cuda_graphs = CudaGraphs(self.device, enabled=self.spec.cuda_graphs)
        # From the D phase to the G phase of a batch: fakes with their autograd graph, scores of real images.
        self.fakes_B3HW = self.real_scores_B = torch.empty(0)

    def _restore(self, snapshot: Snapshot) -> None:
        """
        Load a checkpoint of this run.

        Raises:
            CheckpointCorruptError: it does not fit these networks.
            DatasetError, SpecError: it belongs to another run.
        """
        meta = snapshot.meta
        check_same_run(meta.get("spec", {}), self.spec)
        if meta.get("fingerprint") != self.images.fingerprint:
            raise DatasetError(
                f"the images at {self.spec.data} are not those that this run began with",
                hint="restore them, or start a new run (--init-netg loads the generator of this one)",
                began_with=meta.get("fingerprint"),
                found=self.images.fingerprint,
            )
        if snapshot.step > self.total_steps:
            epochs = snapshot.step // self.batches.per_epoch
            raise SpecError(
                f"--epochs {self.spec.epochs}: the run has completed {epochs} epochs",
                hint="--epochs counts from the start of the run: give more than it has completed",
            )
        # The networks of the last step before the checkpoint: a switch at this step is still to come.
        if side_at(self.spec, max(snapshot.step - 1, 0)) != self.state.arch.side:
            self._build(step=snapshot.step - 1)
        self.state.load(snapshot.tensors, snapshot.step)
        self.samples.step = snapshot.step if meta.get("sampled") else -1
        self.evaluations.restore(meta)
        if self.rollbacks.diverged_at is not None:
            return  # a rollback: the record in memory is newer than the one in the checkpoint
        self.rollbacks = Rollbacks.from_json(meta)
        self.ctx.log(f"resuming at step {snapshot.step} of {self.total_steps}")
        began = meta.get("build") or {}
        self.build |= precision_facts(self.spec, self.device, began=began)
        changed = devices.differences(began, self.build)
        self.bit_exact = bool(meta.get("bit_exact", True)) and not changed
        if changed:
            changes = "; ".join(changed)
            self.ctx.log(f"another build or device, so the result will differ in its last bits: {changes}")
            self.ctx.event("not_bit_exact", step=snapshot.step, changed=changes)

    def _roll_back(self, diverged: TrainingDivergedError) -> None:
        """
        Return to a checkpoint, with lower learning rates if repeating the steps did not help.

        Raises:
            TrainingDivergedError: nothing is left to try.
        """
        self.checkpointer.wait()
        action = self.rollbacks.next_action(diverged)
        # Lower rates begin at a checkpoint that every run of this spec has, so that their start depends
        # neither on the clock nor on how often the run was stopped.
        best = self.evaluations.best if isinstance(diverged, CollapsedError) else None
        self._start(epoch_checkpoint=action != "the same again", step=best.step if best else None)
        self.rollbacks.add(self.state.step)
        self.ctx.log(f"{diverged.message}: back to step {self.state.step}, {action}")
        self.ctx.event(
            "rolled_back",
            step=diverged.step,
            to_step=self.state.step,
            action=action,
            reason=diverged.message,
        )
