"""
The two steps of a run: D learns to tell real from fake, G learns what D takes for real.

A batch has two passes, D's and G's, each of which ends with gradients, and a step of Adam after
each. All that chance decides is drawn before, on the CPU: a pass asks nothing but its tensors, so a
GPU can record it once and replay it (jobs/training/cuda_graphs.py).

Shapes in names: B pictures in a batch, Z latent numbers, H, W pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jobs import rng
from jobs.device import Named
from jobs.failpoints import failpoint
from jobs.specs import TrainSpec
from jobs.training import ada, augment, schedules
from jobs.training.cached_fakes import CachedFakes
from jobs.training.cuda_graphs import CudaGraphs
from jobs.training.data import Batches
from jobs.training.logger import TrainingLogger
from jobs.training.losses import LOSSES, Loss, RelativisticLoss, squared_gradient_norms
from jobs.training.precision import AutocastPasses, Precision
from jobs.training.rollback import Rollbacks
from jobs.training.schedules import ScheduleValues
from jobs.training.state import TrainState


@dataclass(frozen=True)
class Phase:
    """Who steps on a batch. Batches of one turn do the same work on other numbers."""

    d: bool
    g: bool
    penalty: bool
    """D's slope is held down this time."""


class TrainingSteps:
    """What one batch does to the state; all that it draws follows from the spec's seed and the step."""

    def __init__(
        self,
        spec: TrainSpec,
        state: TrainState,
        batches: Batches,
        logger: TrainingLogger,
        rollbacks: Rollbacks,
        total_steps: int,
        precision: Precision,
    ) -> None:
        self.spec = spec
        self.state = state
        self.batches = batches
        self.logger = logger
        self.rollbacks = rollbacks
        self.total_steps = total_steps
        self.loss = LOSSES[spec.loss]
        self.one_pass = spec.norm_d != "batch"
        self.policies, self.augment_p = ada.plan(spec.augment, spec.augment_p, len(batches.images))
        self.always = state.ada is None and self.augment_p == 1
        fixed_p = torch.tensor(self.augment_p, device=batches.device)
        self.fixed_chances = dict.fromkeys(self.policies, fixed_p)
        self.passes = AutocastPasses(precision, state, batches.device)
        self.cached_fakes = (
            CachedFakes(state.generator, self.passes.g) if spec.fake_reuse == "until-g-step" else None
        )
        self.graphs = CudaGraphs(batches.device, on=spec.cuda_graphs)
        self.fakes_B3HW = torch.empty(0)
        """Of this batch, with their graph, where one pass of G serves both."""
        self.real_B = torch.empty(0)
        """D's scores of this batch's real pictures, where G is judged beside them."""

    def batch(self, epoch: int, place: int) -> None:
        """One batch of real pictures: D first, then G. `place` is its index in the epoch, from 0."""
        if failpoint("train.out_of_memory"):
            raise torch.OutOfMemoryError("failpoint train.out_of_memory")
        done = self.state.step / self.total_steps
        now = schedules.schedule_values(self.spec, done, lr_scale=self.rollbacks.lr_scale)
        self.state.set_rates(now)
        turn = self._turn(place, now)
        x = self.graphs.give(turn, self._draw(turn, epoch, place, now))
        if turn.d:
            self._d_step(turn, x)
        failpoint("train.between_networks")
        if turn.g:
            self._g_step(turn, x)

    def _turn(self, place: int, now: ScheduleValues) -> Phase:
        d, g = place % self.spec.d_every == 0, place % self.spec.g_every == 0
        held = now.r1_gamma > 0 or now.r2_gamma > 0
        return Phase(d, g, penalty=d and held and self.d_steps % self.spec.penalty_every == 0)

    @property
    def g_steps(self) -> int:
        """How often G has stepped before this batch: on each place in the epoch that g_every divides."""
        return self._turns(self.spec.g_every)

    @property
    def d_steps(self) -> int:
        """How often D has stepped before this batch."""
        return self._turns(self.spec.d_every)

    def _turns(self, every: int) -> int:
        epochs, rest = divmod(self.state.step, self.batches.per_epoch)
        return epochs * -(-self.batches.per_epoch // every) + -(-rest // every)

    # ------------------------------------------------------------------ what chance decides

    def _draw(self, turn: Phase, epoch: int, place: int, now: ScheduleValues) -> dict[str, Tensor]:
        """All that the passes of a batch work on."""
        if not (turn.d or turn.g):
            return {}
        drawn = self.batches.draw(epoch, place)
        if self.spec.conditional:
            # Each fake is of the class of the real picture beside it.
            drawn["labels"] = self.batches.labels(epoch, place)
        # Fresh: one noise for this batch; when both step, G's pass serves both.
        # Stale, as in the tutorial: the noise is drawn before the loop and redrawn by each
        # step of G, which uses the new one; D then sees it until G steps again. It is known
        # by the number of G's steps, so it needs no place in a checkpoint.
        if self.cached_fakes is None:
            drawn["latents"] = self._latents(self.state.step)
        else:
            draw = self.g_steps
            if turn.d:
                drawn["fakes"] = self.cached_fakes.get(draw, lambda: self._latents(draw))
            if turn.g:
                drawn["latents"] = self._latents(draw + 1)
        if turn.penalty:
            drawn["gammas"] = torch.tensor([now.r1_gamma, now.r2_gamma])
        for stream in self._views(turn) if self.policies else ():
            B = self.spec.batch * (2 if stream == "augment-d" else 1)
            draws = rng.generator(self.spec.seed, stream, self.state.step)
            changes = augment.draw(
                self.policies, (B, 3, self.spec.size, self.spec.size), draws, always=self.always
            )
            drawn |= {f"{stream}.{name}": one for name, one in changes.items()}
        return drawn

    def _views(self, turn: Phase) -> Iterator[str]:
        """The times that D looks at pictures in a batch, each with changes of its own."""
        if turn.d:
            yield from ("augment-d",) if self.one_pass else ("augment-real", "augment-fake")
        if turn.g:
            yield "augment-g"
        if turn.g and not turn.d and isinstance(self.loss, RelativisticLoss):
            yield "augment-g-real"

    def _latents(self, draw: int) -> Tensor:
        return rng.noise(self.spec.seed, "noise", draw, shape=(self.spec.batch, self.spec.nz, 1, 1))

    # ------------------------------------------------------------------ the discriminator

    def _d_step(self, turn: Phase, x: Named) -> None:
        """The discriminator learns to tell them apart: both gradients, then one step."""
        state = self.state
        made = self.graphs.run("d", turn, lambda x: self._d_pass(turn, x), x, state.discriminator)
        measured = {name: made[name] for name in ("loss_d", "d_real", "d_fake")}
        if turn.penalty:
            measured |= {name: made[name] for name in ("r1", "r2")}
        if state.ada is not None:
            measured |= {"augment_p": state.ada.p, "d_sign": made["sign"]}
        self.logger.running_means.add(measured)
        if state.ada is not None:
            state.ada.see(made["sign"], self.spec.batch, d_steps=self.d_steps, most=self.augment_p)
        if failpoint(f"train.nan.{state.step}x{self.rollbacks.lr_scale:g}"):
            nn.utils.clip_grad_value_(state.discriminator.parameters(), float("nan"))
        state.opt_d.step()

    def _d_pass(self, turn: Phase, x: Named) -> dict[str, Tensor]:
        """D's gradients, and what is told of them."""
        net, loss = self.passes.d, self.loss
        reals_B3HW = self.batches.pictures(x)
        if self.cached_fakes is not None:
            fakes_B3HW = x["fakes"]
        else:
            with torch.set_grad_enabled(turn.g):
                self.fakes_B3HW = self.passes.g(x["latents"], *self._labels(x))
            fakes_B3HW = self.fakes_B3HW.detach()
        self.state.opt_d.zero_grad()
        more: dict[str, Tensor] = {}
        if self.one_pass:
            loss_d, real_B, fake_B, more = self._both_at_once(turn, reals_B3HW, fakes_B3HW, x)
            torch.autograd.backward(loss_d)
        else:
            assert isinstance(loss, Loss)
            real_B = net(self._seen_by_d(reals_B3HW, "augment-real", x), *self._labels(x))
            loss_real = loss.d_real(real_B)
            torch.autograd.backward(loss_real)
            fake_B = net(self._seen_by_d(fakes_B3HW, "augment-fake", x), *self._labels(x))
            loss_fake = loss.d_fake(fake_B)
            torch.autograd.backward(loss_fake)
            loss_d = loss_real.detach() + loss_fake.detach()
        real_B, fake_B = real_B.detach(), fake_B.detach()
        self.real_B = real_B
        told = {"loss_d": loss_d.detach(), "d_real": real_B.mean(), "d_fake": fake_B.mean(), **more}
        if self.state.ada is not None:
            told["sign"] = self._verdict(real_B, fake_B)
        return told

    def _both_at_once(
        self, turn: Phase, reals_B3HW: Tensor, fakes_B3HW: Tensor, x: Named
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """
        Without BatchNorm a picture's score does not depend on its neighbours: one pass for both.

        Returns:
            D's loss with the penalties that are due, the scores of real and of fake, the penalties.
        """
        both = self._seen_by_d(torch.cat([reals_B3HW, fakes_B3HW]), "augment-d", x)
        both.requires_grad_(turn.penalty)
        labels = [torch.cat([labels_B, labels_B]) for labels_B in self._labels(x)]
        scores = (self.state.discriminator if turn.penalty else self.passes.d)(both, *labels)
        real_B, fake_B = scores.chunk(2)
        if isinstance(self.loss, RelativisticLoss):
            loss_d = self.loss.d(real_B, fake_B)
        else:
            loss_d = self.loss.d_real(real_B) + self.loss.d_fake(fake_B)
        if not turn.penalty:
            return loss_d, real_B, fake_B, {}
        r1, r2 = (slopes_B.mean() for slopes_B in squared_gradient_norms(both, scores).chunk(2))
        r1_gamma, r2_gamma = x["gammas"]
        # Lazily: every N-th time, N times as strong (Karras et al. 2020, arXiv:1912.04958, B).
        penalty = self.spec.penalty_every / 2 * (r1_gamma * r1 + r2_gamma * r2)
        return loss_d + penalty, real_B, fake_B, {"r1": r1.detach(), "r2": r2.detach()}

    def _verdict(self, real_B: Tensor, fake_B: Tensor) -> Tensor:
        """How surely D knows the training pictures: the mean sign that steers the chance of a change."""
        # 'Real' is more than a half of a probability, more than 0 of a logit; of pairs only the
        # difference means anything.
        border = fake_B if isinstance(self.loss, RelativisticLoss) else 0.0 if self.one_pass else 0.5
        return (real_B - border).sign().mean()

    # ------------------------------------------------------------------ the generator

    def _g_step(self, turn: Phase, x: Named) -> None:
        """The generator learns what the discriminator takes for real."""
        state, batch = self.state, self.spec.batch
        made = self.graphs.run("g", turn, lambda x: self._g_pass(turn, x), x, state.generator)
        state.opt_g.step()
        if state.ema is not None:
            state.ema.update(pictures=batch, seen=(self.g_steps + 1) * batch)
        self.logger.running_means.add(made)

    def _g_pass(self, turn: Phase, x: Named) -> dict[str, Tensor]:
        """G's gradients, and its loss."""
        state, net = self.state, self.passes.d
        if self.cached_fakes is not None or not turn.d:
            self.fakes_B3HW = self.passes.g(x["latents"], *self._labels(x))
        state.opt_g.zero_grad()
        # D's own gradients would be a third of its backward pass, for nothing.
        state.let_d_learn(False)
        fake_B = net(self._seen_by_d(self.fakes_B3HW, "augment-g", x), *self._labels(x))
        if isinstance(self.loss, RelativisticLoss):
            # What D said of them a moment ago, before its step: asking again would cost a tenth of the batch.
            real_B = self.real_B if turn.d else self._real_scores(x)
            loss_g = self.loss.g(real_B, fake_B)
        else:
            loss_g = self.loss.g(fake_B)
        torch.autograd.backward(loss_g)
        state.let_d_learn(True)
        self.fakes_B3HW = torch.empty(0)
        return {"loss_g": loss_g.detach()}

    @torch.no_grad()
    def _real_scores(self, x: Named) -> Tensor:
        """What D says of the real pictures on a batch on which it does not step."""
        reals_B3HW = self.batches.pictures(x)
        return self.passes.d(self._seen_by_d(reals_B3HW, "augment-g-real", x), *self._labels(x))

    # ------------------------------------------------------------------ for both

    def _labels(self, x: Named) -> tuple[Tensor, ...]:
        """The classes of this batch, for networks that take them: (int64 (B,),) or nothing."""
        return (x["labels"],) if self.spec.conditional else ()

    def _seen_by_d(self, images_B3HW: Tensor, stream: str, x: Named) -> Tensor:
        if not self.policies:
            return images_B3HW
        own = f"{stream}."
        changes = {name.removeprefix(own): one for name, one in x.items() if name.startswith(own)}
        return augment.change(images_B3HW, self.policies, changes, self._chances())

    def _chances(self) -> dict[str, Tensor] | None:
        """How often each policy changes a picture; None: always."""
        if self.state.ada is not None:
            return self.state.ada.chances(self.policies)
        return None if self.always else self.fixed_chances
