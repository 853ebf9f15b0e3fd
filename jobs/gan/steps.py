"""
The two steps of a run: D learns to tell real from fake, G learns what D takes for real.

Shapes in names: B pictures in a batch, Z latent numbers, H, W pixels.
"""

import torch
from torch import Tensor, nn

from jobs.failpoints import failpoint
from jobs.gan import ada, schedules, seeds
from jobs.gan import device as devices
from jobs.gan.augment import diff_augment
from jobs.gan.data import Batches
from jobs.gan.fakes import StaleFakes
from jobs.gan.journal import Journal
from jobs.gan.losses import LOSSES, Loss, Pairing, squared_slopes
from jobs.gan.passes import Passes
from jobs.gan.rollback import Rollbacks
from jobs.gan.schedules import Moment
from jobs.gan.state import TrainState
from jobs.specs import TrainSpec


class Steps:
    """What one batch does to the state; all that it draws follows from the spec's seed and the step."""

    def __init__(
        self,
        spec: TrainSpec,
        state: TrainState,
        batches: Batches,
        journal: Journal,
        rollbacks: Rollbacks,
        total_steps: int,
    ) -> None:
        self.spec = spec
        self.state = state
        self.batches = batches
        self.journal = journal
        self.rollbacks = rollbacks
        self.total_steps = total_steps
        self.loss = LOSSES[spec.loss]
        self.one_pass = spec.norm_d != "batch"
        self.policies, self.augment_p = ada.plan(spec.augment, spec.augment_p, len(batches.images))
        always = self.augment_p == 1
        self.fixed_p = None if always else torch.tensor(self.augment_p, device=batches.device)
        self.conditional = spec.conditional
        self.labels: tuple[Tensor, ...] = ()
        """The classes of this batch, for networks that take them: (int64 (B,),) or nothing."""
        self.passes = Passes(spec, state, batches.device)
        self.stale_fakes = StaleFakes(state.generator, self.passes.g) if spec.noise == "stale" else None

    def batch(self, epoch: int, place: int) -> None:
        """One batch of real pictures: D first, then G. `place` is its index in the epoch, from 0."""
        d_turn = place % self.spec.d_every == 0
        g_turn = place % self.spec.g_every == 0
        net = self.passes.g
        if failpoint("train.out_of_memory"):
            raise torch.OutOfMemoryError("failpoint train.out_of_memory")
        done = self.state.step / self.total_steps
        now = schedules.moment(self.spec, done, lr_scale=self.rollbacks.lr_scale)
        self.state.set_rates(now)
        if self.conditional and (d_turn or g_turn):
            # Each fake is of the class of the real picture beside it.
            self.labels = (self.batches.labels(epoch, place),)

        if self.stale_fakes is None and (d_turn or g_turn):
            # Fresh: one noise for this batch; when both step, G's pass serves both.
            with torch.set_grad_enabled(g_turn):
                fakes_B3HW = net(self._latents(self.state.step), *self.labels)
            reals_B3HW = self.batches.get(epoch, place)
            if d_turn:
                self._d_step(reals_B3HW, fakes_B3HW.detach(), now)
            failpoint("train.between_networks")
            if g_turn:
                self._g_step(fakes_B3HW, reals_B3HW)

        # Stale, as in the tutorial: the noise is drawn before the loop and redrawn by each
        # step of G, which uses the new one; D then sees it until G steps again. It is known
        # by the number of G's steps, so it needs no place in a checkpoint.
        if self.stale_fakes is not None and (d_turn or g_turn):
            reals_B3HW = self.batches.get(epoch, place)
            if d_turn:
                stale_B3HW = self.stale_fakes.get(self.g_steps, self._latents(self.g_steps))
                self._d_step(reals_B3HW, stale_B3HW, now)
            failpoint("train.between_networks")
            if g_turn:
                self._g_step(net(self._latents(self.g_steps + 1)), reals_B3HW)

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

    def _latents(self, draw: int) -> Tensor:
        shape = (self.spec.batch, self.spec.nz, 1, 1)
        return devices.send(seeds.noise(self.spec.seed, "noise", draw, shape=shape), self.batches.device)

    def _d_step(self, reals_B3HW: Tensor, fakes_B3HW: Tensor, now: Moment) -> None:
        """The discriminator learns to tell them apart: both gradients, then one step."""
        net, loss = self.passes.d, self.loss
        self.state.opt_d.zero_grad()
        if self.one_pass:
            loss_d, real_B, fake_B = self._both_at_once(reals_B3HW, fakes_B3HW, now)
            torch.autograd.backward(loss_d)
        else:
            assert isinstance(loss, Loss)
            real_B = net(self._seen_by_d(reals_B3HW, "augment-real"), *self.labels)
            loss_real = loss.d_real(real_B)
            torch.autograd.backward(loss_real)
            fake_B = net(self._seen_by_d(fakes_B3HW, "augment-fake"), *self.labels)
            loss_fake = loss.d_fake(fake_B)
            torch.autograd.backward(loss_fake)
            loss_d = loss_real.detach() + loss_fake.detach()
        self._steer(real_B, fake_B)
        if failpoint(f"train.nan.{self.state.step}x{self.rollbacks.lr_scale:g}"):
            nn.utils.clip_grad_value_(self.state.discriminator.parameters(), float("nan"))
        self.state.opt_d.step()
        self.journal.meter.add({"loss_d": loss_d, "d_real": real_B.mean(), "d_fake": fake_B.mean()})

    def _both_at_once(
        self, reals_B3HW: Tensor, fakes_B3HW: Tensor, now: Moment
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Without BatchNorm a picture's score does not depend on its neighbours: one pass for both.

        Returns:
            D's loss with the penalties that are due, the scores of real and of fake.
        """
        both = self._seen_by_d(torch.cat([reals_B3HW, fakes_B3HW]), "augment-d")
        every = self.spec.penalty_every
        due = (now.r1_gamma > 0 or now.r2_gamma > 0) and self.d_steps % every == 0
        both.requires_grad_(due)
        labels = [torch.cat([labels_B, labels_B]) for labels_B in self.labels]
        scores = (self.state.discriminator if due else self.passes.d)(both, *labels)
        real_B, fake_B = scores.chunk(2)
        if isinstance(self.loss, Pairing):
            loss_d = self.loss.d(real_B, fake_B)
        else:
            loss_d = self.loss.d_real(real_B) + self.loss.d_fake(fake_B)
        if due:
            r1, r2 = (slopes_B.mean() for slopes_B in squared_slopes(both, scores).chunk(2))
            # Lazily: every N-th time, N times as strong (Karras et al. 2020, arXiv:1912.04958, B).
            penalty = every / 2 * (now.r1_gamma * r1 + now.r2_gamma * r2)
            self.journal.meter.add({"r1": r1, "r2": r2})
            loss_d = loss_d + penalty
        return loss_d, real_B, fake_B

    def _g_step(self, fakes_B3HW: Tensor, reals_B3HW: Tensor) -> None:
        """The generator learns what the discriminator takes for real."""
        state, net = self.state, self.passes.d
        state.opt_g.zero_grad()
        # D's own gradients would be a third of its backward pass, for nothing.
        state.let_d_learn(False)
        fake_B = net(self._seen_by_d(fakes_B3HW, "augment-g"), *self.labels)
        if isinstance(self.loss, Pairing):
            real_B = net(self._seen_by_d(reals_B3HW, "augment-g-real"), *self.labels)
            loss_g = self.loss.g(real_B, fake_B)
        else:
            loss_g = self.loss.g(fake_B)
        torch.autograd.backward(loss_g)
        state.let_d_learn(True)
        state.opt_g.step()
        if state.ema is not None:
            batch = self.spec.batch
            state.ema.update(state.generator, pictures=batch, seen=(self.g_steps + 1) * batch)
        self.journal.meter.add({"loss_g": loss_g})

    def _steer(self, real_B: Tensor, fake_B: Tensor) -> None:
        """Let the chance of a change follow how surely D knows the training pictures."""
        if self.state.ada is None:
            return
        # 'Real' is more than a half of a probability, more than 0 of a logit; of pairs only the
        # difference means anything.
        border = fake_B.detach() if isinstance(self.loss, Pairing) else 0.0 if self.one_pass else 0.5
        verdicts_B = real_B.detach() - border
        self.journal.meter.add({"augment_p": self.state.ada.p, "d_sign": verdicts_B.sign().mean()})
        self.state.ada.see(verdicts_B, d_steps=self.d_steps, most=self.augment_p)

    def _seen_by_d(self, pictures_B3HW: Tensor, stream: str) -> Tensor:
        if not self.policies:
            return pictures_B3HW
        draws = seeds.generator(self.spec.seed, stream, self.state.step)
        p = self.state.ada.p if self.state.ada else self.fixed_p
        return diff_augment(pictures_B3HW, self.policies, draws, p)
