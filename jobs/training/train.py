"""
One training run, from the pictures to the last checkpoint, in the order it happens.

Nothing random is carried from step to step (jobs/rng.py), so a run that was
stopped anywhere and taken up again makes the same steps as one that was not.

Shapes in names: N pictures in the data set, B in a batch, Z latent numbers, H, W pixels.
"""

import time
from typing import Any

from torch import Tensor

from jobs import device as devices
from jobs import rng
from jobs.context import CheckpointKind, Images, JobContext, Snapshot
from jobs.errors import CollapsedError, DatasetError, SpecError, StopRequested, TrainingDivergedError
from jobs.failpoints import failpoint
from jobs.networks.classes import grid_labels, require_classes
from jobs.networks.dcgan import Architecture
from jobs.specs import TrainSpec, check_same_run
from jobs.states import KEEPS_WORK
from jobs.training.checkpointer import AsyncCheckpointer
from jobs.training.data import Batches
from jobs.training.evaluation import Evaluations
from jobs.training.logger import METRICS, TrainingLogger
from jobs.training.precision import build_facts
from jobs.training.rollback import Rollbacks
from jobs.training.samples import Samples
from jobs.training.staging_buffers import StagingBuffers
from jobs.training.state import TrainState
from jobs.training.steps import TrainingSteps


def run(spec: TrainSpec, ctx: JobContext) -> dict[str, Any]:
    """
    Train until spec.epochs are complete.

    Returns:
        Facts for the job's result: steps, epochs, images, last losses, speed, exactness.

    Raises:
        DatasetError: too few pictures, or others than the run began with.
        SpecError: the checkpoint was trained with other options.
        TrainingDivergedError: a loss or weight is not finite, and going back did not help;
            no such checkpoint is saved.
        DiskFullError: no room for the last checkpoint, or for several in a row.
        OutOfMemoryError: --batch or the networks are too large for the device.
        StopRequested: somebody wants the run to stop; it can be taken up again.
    """
    with devices.memory_errors(f"--batch {max(2, spec.batch // 2)}, or a smaller --ngf and --ndf"):
        return Training(spec, ctx).run()


class Training:
    """What the chapters of one run share."""

    def __init__(self, spec: TrainSpec, ctx: JobContext) -> None:
        self.spec = spec
        self.ctx = ctx

        # The device, and all that the last bit depends on.
        self.device = devices.choose(spec.device)
        devices.set_exactness(self.device, deterministic=spec.deterministic)
        self.build = devices.build_fingerprint(self.device, deterministic=spec.deterministic)
        self.build |= build_facts(spec, self.device)

        # The pictures, decoded once for all runs.
        ctx.report(0, 1, "pictures", phase="reading pictures")
        self.images: Images = ctx.images(spec.data, spec.size)
        failpoint("train.data_open")
        self.batches = Batches(
            self.images, batch=spec.batch, seed=spec.seed, mirror=spec.mirror, device=self.device
        )
        self.classes = require_classes(self.images) if spec.conditional else ()
        self.arch = Architecture.of_spec(spec, len(self.classes))
        self.total_steps = spec.epochs * self.batches.per_epoch

        # What the steps need.
        grid = grid_labels(len(self.classes)).to(self.device) if self.classes else None
        shape = (spec.batch if grid is None else len(grid), spec.nz, 1, 1)
        self.grid_labels = grid
        self.fixed_latents_BZ11 = rng.noise(spec.seed, "fixed", shape=shape).to(self.device)
        self.logger = TrainingLogger(spec, ctx, self.batches.per_epoch, late=int(self.device.type == "cuda"))
        self.rollbacks = Rollbacks()
        self.saves = AsyncCheckpointer(ctx, self.logger, safe=lambda step: self.rollbacks.saved(step))
        self.stills = StagingBuffers()
        self.longest_stall_s = 0.0
        self.bit_exact = True

        # The networks: fresh, from the user's weights, or where the run stopped.
        self.resumed_from = self._begin()

    def _begin(self, *, whole_epoch: bool = False, best: int | None = None) -> int | None:
        """
        Be where the newest checkpoint was, or at the very start.

        Args:
            whole_epoch: only a checkpoint that every run of this spec makes will do, none by the clock.
            best: the step of the one that is wanted, if it is there.

        Returns:
            The checkpoint's step, None for a fresh start.
        """
        self.state = TrainState.fresh(self.spec, self.device, len(self.classes))
        self.samples = Samples(self.spec, self.state, self.fixed_latents_BZ11, self.grid_labels)
        self.evaluations = Evaluations(self.spec, self.ctx, self.images, self.state, self.device)
        snapshot = self.ctx.resume(self._take_up, whole_epoch=whole_epoch, step=best)
        if snapshot is None and self.spec.init_from is not None:
            start = self.ctx.model()
            self.ctx.log(f"starting from job {start.job_id}, epoch {start.epoch}")
            if not self.state.start_from_model(start, self.arch):
                self.ctx.log("it has no discriminator: a fresh one learns with it")
        elif snapshot is None:
            self.state.start_from(
                self.ctx.weights(self.spec.init_netg) if self.spec.init_netg else None,
                self.ctx.weights(self.spec.init_netd) if self.spec.init_netd else None,
            )
        self.steps = TrainingSteps(
            self.spec,
            self.state,
            self.batches,
            self.logger,
            self.rollbacks,
            self.total_steps,
            self.build["precision"],
        )
        self.saves.start_at(self.state.step)
        self.logger.start_at(self.state.step)
        return snapshot.step if snapshot else None

    def _take_up(self, snapshot: Snapshot) -> None:
        """
        Raises:
            CheckpointCorruptError: it does not fit these networks.
            DatasetError, SpecError: it belongs to another run.
        """
        meta = snapshot.meta
        check_same_run(meta.get("spec", {}), self.spec)
        if meta.get("fingerprint") != self.images.fingerprint:
            raise DatasetError(
                f"the pictures at {self.spec.data} are not those that this run began with",
                hint="bring them back, or start a new run (--init-netg takes over its generator)",
                began_with=meta.get("fingerprint"),
                found=self.images.fingerprint,
            )
        if snapshot.step > self.total_steps:
            age = snapshot.step // self.batches.per_epoch
            raise SpecError(
                f"--epochs {self.spec.epochs}: the run is {age} epochs old",
                hint="--epochs counts from the very start: give more than it has",
            )
        self.state.load(snapshot.tensors, snapshot.step)
        self.samples.step = snapshot.step if meta.get("sampled") else -1
        self.evaluations.restore(meta)
        if self.rollbacks.seen_at is not None:
            return  # going back: what was tried is in memory, and newer than what stands here
        self.rollbacks = Rollbacks.from_json(meta)
        self.ctx.log(f"going on from step {snapshot.step} of {self.total_steps}")
        began = meta.get("build") or {}
        self.build |= build_facts(self.spec, self.device, began=began)
        changed = devices.differences(began, self.build)
        self.bit_exact = bool(meta.get("bit_exact", True)) and not changed
        if changed:
            told = "; ".join(changed)
            self.ctx.log(f"another build or device, so the result will differ in its last bits: {told}")
            self.ctx.event("not_bit_exact", step=snapshot.step, changed=told)

    def _go_back(self, diverged: TrainingDivergedError) -> None:
        """
        Try once more from a checkpoint, when there is something left to try.

        Raises:
            TrainingDivergedError: there is not.
        """
        self.saves.settle()
        way = self.rollbacks.rollback_target(diverged)
        # Lower rates begin where every run of this spec has a checkpoint, so that where they
        # begin does not depend on the clock, nor on how often the run was stopped.
        best = self.evaluations.best if isinstance(diverged, CollapsedError) else None
        self._begin(whole_epoch=way != "the same again", best=best.step if best else None)
        self.rollbacks.rolled_back(self.state.step)
        self.ctx.log(f"{diverged.message}: back to step {self.state.step}, {way}")
        self.ctx.event(
            "rolled_back",
            step=diverged.step,
            to_step=self.state.step,
            action=way,
            reason=diverged.message,
        )

    # ------------------------------------------------------------------ the loop

    def run(self) -> dict[str, Any]:
        spec, per_epoch = self.spec, self.batches.per_epoch
        started, first_step = time.monotonic(), self.state.step
        failpoint("train.built")
        while True:
            try:
                self._train()
                break
            except TrainingDivergedError as diverged:
                self._go_back(diverged)
        seconds, step = time.monotonic() - started, self.state.step
        stopped = self._is_over() if step < self.total_steps else None
        if stopped:
            self.ctx.log(stopped)
            self.ctx.event("stopped_early", step=step, reason=stopped)
        return {
            **self.evaluations.facts(),
            "stopped": stopped,
            "step": step,
            "epoch": step // per_epoch,
            "g_steps": self.steps.g_steps,
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
        }

    def _train(self) -> None:
        """
        From where the state is to the end of the last epoch.

        Raises:
            TrainingDivergedError: a loss or weight is not finite; nothing of it was kept.
        """
        spec, state, per_epoch = self.spec, self.state, self.batches.per_epoch
        while state.step < self.total_steps and not self._is_over():
            self._obey_stop()

            # One batch: D first, then G, each when its turn comes in the epoch.
            epoch, place = divmod(state.step, per_epoch)
            self.steps.batch(epoch, place)
            state.step += 1
            failpoint("train.stepped")
            self.stills.prepare(state.tensors)
            self.saves.look()
            self.logger.stepped(state.step)

            # Whole epochs: a grid and a checkpoint every save_every, and at the end.
            epochs_done, rest = divmod(state.step, per_epoch)
            if rest == 0 and state.step == self.total_steps:
                break
            if rest == 0 and (
                epochs_done % spec.save_every == 0 or self.evaluations.due(epochs_done, final=False)
            ):
                self._keep("epoch")
            elif time.monotonic() - self.saves.handed_at >= spec.checkpoint_seconds:
                self._keep("resume")
        self._keep("final")

    def _is_over(self) -> str | None:
        """Why the run ends before its last epoch, if it does: by what its checkpoints say, not by a clock."""
        best, epoch = self.evaluations.best, self.state.step // self.batches.per_epoch
        if best is not None and self.rollbacks.given_up:
            return f"stopped at epoch {epoch}: the generator collapsed again; best epoch {best.epoch}"
        if not self.evaluations.is_over():
            return None
        tries = f"{self.evaluations.patience()} evaluations"
        if best is None:
            return f"stopped early at epoch {epoch}: all alike, and no nearer to real pictures for {tries}"
        return f"stopped early at epoch {epoch}, after {tries} without a new best; best epoch {best.epoch}"

    # ------------------------------------------------------------------ telling and keeping

    def _obey_stop(self) -> None:
        """
        Raises:
            StopRequested: drained or preempted, with a checkpoint; cancelled or lost, at once.
        """
        reason = self.ctx.stop_reason()
        if reason is None:
            return
        if reason in KEEPS_WORK:
            self.saves.settle()
            if self.state.step > self.saves.step:
                self._keep("resume")
                self.saves.settle()
        raise StopRequested(reason)

    def _keep(self, kind: CheckpointKind) -> None:
        """
        Save all that the run is; a whole epoch's with its grid.

        Raises:
            TrainingDivergedError: something is not finite; nothing was saved.
            DiskFullError: no room for the last checkpoint of all, or too often in a row.
        """
        began = time.monotonic()
        self.logger.write(self.state.step)
        self.state.check_finite()
        epoch = self.state.step // self.batches.per_epoch
        shown = self.samples.pass_of_the_tutorial(epoch) if kind != "resume" else None
        measured = self._measure(epoch) if kind != "resume" else None
        self.saves.hand_over(kind, self.state.step, lambda: self._save(kind, shown, measured))
        if kind != "final":
            self.longest_stall_s = max(self.longest_stall_s, time.monotonic() - began)

    def _measure(self, epoch: int) -> float | None:
        """
        The metric of what is saved now, None where it is not measured.

        Raises:
            CollapsedError: the generator repeats itself; nothing was saved.
        """
        evaluations, step = self.evaluations, self.state.step
        if not evaluations.due(epoch, final=step == self.total_steps or self._is_over() is not None):
            return None
        one = evaluations.measure(step, epoch, self.state.sampler)
        if one is not None and evaluations.has_collapsed():
            raise CollapsedError(
                f"the generator has collapsed at epoch {epoch}: its pictures differ by {one.diversity:.0%} "
                "of what real ones do",
                step=step,
            )
        return one.value if one and one.can_be_best else None

    def _save(self, kind: CheckpointKind, shown: Tensor | None, metric: float | None) -> None:
        """Copy what a checkpoint holds; all that takes longer happens beside the training."""
        state, epoch = self.state, self.state.step // self.batches.per_epoch
        tensors = self.stills.take(state.tensors())
        generator = state.generator_tensors(tensors)
        self.ctx.save_checkpoint(
            kind=kind,
            epoch=epoch,
            step=state.step,
            state=tensors,
            generator=generator,
            sample=self.samples.sample(epoch, shown, generator) if kind != "resume" else None,
            meta={
                "arch": self.arch.to_json(),
                "classes": list(self.classes),
                "recipe": self.spec.recipe,
                "spec": self.spec.to_json(),
                "seed": self.spec.seed,
                "step": state.step,
                "epoch": epoch,
                "g_steps": self.steps.g_steps,
                "images": state.step * self.spec.batch,
                "fingerprint": self.images.fingerprint,
                "build": self.build,
                "bit_exact": self.bit_exact,
                "sampled": self.samples.step == state.step,
                "metric": metric,
                **self.evaluations.to_json(),
                **self.rollbacks.to_json(),
            },
        )
