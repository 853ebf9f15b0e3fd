"""
Augmentation of D's input: DiffAugment, and ADA, which adapts its probability.

Real images and fakes are translated, recoloured or cut out before D sees them, and G gets its gradient
through the augmentation. A discriminator that sees 2,000 images a hundred times overfits; augmentation
prevents that. With ADA, the probability p grows while D's scores show overfitting and shrinks while they do
not. p stays on the device: no step waits for it.

Shapes in names: B images, C channels, H, W pixels.

Source: DiffAugment: Zhao et al. 2020, arXiv:2006.10738, with its strengths: translation up to an eighth of
the side, cutout of half the side, brightness ±0.5, saturation 0 to 2, contrast 0.5 to 1.5. ADA: Karras et al.
2020, arXiv:2006.06676, section 3 (heuristic r_t).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jobs.device import NamedTensors

SHIFT = 1 / 8
CUTOUT_SHARE = 1 / 2
LOWEST_31111 = torch.tensor([-0.5, 0.0, 0.5]).view(3, 1, 1, 1, 1)
RANGES_31111 = torch.tensor([1.0, 2.0, 1.0]).view(3, 1, 1, 1, 1)
"""Of brightness, saturation and contrast."""

ADA_INTERVAL = 4
"""Steps of D between two changes of p."""
FULL_BELOW_IMAGES, NONE_ABOVE_IMAGES = 20_000, 100_000
"""Images in a data set up to which 'auto' augments fully, and from which it augments nothing."""
AUTO_POLICIES = ("translation", "color")
"""The policies of 'auto' alone."""
MAX_COLOR_P = 0.3
"""Limit of ADA's p for 'color': with more, the colours leak into samples (docs/quality.md)."""


def plan(policies: tuple[str, ...], max_p: float, image_count: int) -> tuple[tuple[str, ...], float]:
    """
    Resolve the spec's augmentation options.

    Args:
        policies: of the spec; with 'auto' the probability depends on the size of the data set.
        max_p: the spec's probability, at most.
        image_count: images in the data set.

    Returns:
        The policies, () if nothing is ever augmented, and the maximum probability of each.
    """
    if "auto" in policies:
        policies = tuple(one for one in policies if one != "auto") or AUTO_POLICIES
        max_p = max_p * min(
            1.0, max(0.0, (NONE_ABOVE_IMAGES - image_count) / (NONE_ABOVE_IMAGES - FULL_BELOW_IMAGES))
        )
    return (policies, max_p) if max_p > 0 else ((), 0.0)


class Ada:
    """
    The augmentation probability p and its controller.

    Args:
        target: mean sign of D's output at real images that the controller aims at.
        speed: images in which p can go from 0 to 1.
    """

    def __init__(self, target: float, speed: float, device: torch.device) -> None:
        self.target = target
        self.speed = speed
        # p, sum of mean signs since its last change, number of signs in the sum.
        self.state_3 = torch.zeros(3, device=device)

    @property
    def p(self) -> Tensor:
        """Return the current p: a view, which update() changes."""
        return self.state_3[0]

    def probabilities(self, policies: Collection[str]) -> dict[str, Tensor]:
        """Return p of each policy."""
        return {one: self.p.clamp(max=MAX_COLOR_P) if one == "color" else self.p for one in policies}

    @torch.no_grad()
    def update(self, sign: Tensor, images: int, *, d_steps: int, max_p: float) -> None:
        """
        Add one step of D, and adjust p every ADA_INTERVAL steps.

        Args:
            sign: mean sign of D's output at real images, a scalar.
            images: real images in the step.
            d_steps: steps of D before this one.
            max_p: upper limit of p.
        """
        p, total, count = self.state_3
        total, count = total + sign, count + 1
        if d_steps % ADA_INTERVAL == ADA_INTERVAL - 1:
            step = ADA_INTERVAL * images / self.speed
            p = (p + step * (total / count - self.target).sign()).clamp(0, max_p)
            total, count = torch.zeros_like(p), torch.zeros_like(p)
        self.state_3.copy_(torch.stack([p, total, count]))


def draw(
    policies: Collection[str], shape: Sequence[int], draws: torch.Generator, *, always: bool
) -> dict[str, Tensor]:
    """
    Draw the augmentation parameters of one batch.

    Args:
        shape: of the images: B, 3, H, W.
        always: augment every image; no number is drawn for that.

    Returns:
        Tensors on the CPU, for apply().
    """
    B, _, H, W = shape
    drawn = {}
    for policy in ("color", "translation", "cutout"):
        if policy not in policies:
            continue
        if not always:
            drawn[f"{policy}.chance"] = torch.rand(B, generator=draws)
        if policy == "color":
            strengths_3B111 = torch.rand((3, B, 1, 1, 1), generator=draws)
            strengths_3B111 = strengths_3B111 * RANGES_31111 + LOWEST_31111
            drawn["color.strengths"] = strengths_3B111
        elif policy == "translation":
            reaches = [int(side * SHIFT + 0.5) for side in (H, W)]
            drawn["translation.shifts"] = torch.stack(
                [torch.randint(-reach, reach + 1, (B,), generator=draws) for reach in reaches]
            )
        else:
            holes = [int(side * CUTOUT_SHARE + 0.5) for side in (H, W)]
            drawn["cutout.middles"] = torch.stack(
                [
                    torch.randint(0, side + (1 - hole % 2), (B,), generator=draws)
                    for side, hole in zip((H, W), holes, strict=True)
                ]
            )
    return drawn


def apply(
    images_B3HW: Tensor,
    policies: Collection[str],
    drawn: NamedTensors,
    probabilities: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """
    Augment images with drawn parameters. Draws nothing and does not synchronise with the CPU.

    Args:
        drawn: the result of draw(), on the images' device.
        probabilities: of each policy; None if draw() was called with `always`.
    """

    def chosen(policy: str) -> Tensor | None:
        return None if probabilities is None else drawn[f"{policy}.chance"] < probabilities[policy]

    if "color" in policies:
        images_B3HW = _color(images_B3HW, drawn["color.strengths"], chosen("color"))
    if "translation" in policies:
        images_B3HW = _translation(images_B3HW, drawn["translation.shifts"], chosen("translation"))
    if "cutout" in policies:
        images_B3HW = _cutout(images_B3HW, drawn["cutout.middles"], chosen("cutout"))
    return images_B3HW


def _color(images_B3HW: Tensor, strengths_3B111: Tensor, chosen_B: Tensor | None) -> Tensor:
    # Brightness, then saturation, then contrast, multiplied out: three passes over the images, not six.
    # On a CPU the passes determine the time.
    b, s, c = strengths_3B111
    if chosen_B is not None:
        chosen_B111 = chosen_B.view(-1, 1, 1, 1)
        b, s, c = b * chosen_B111, torch.where(chosen_B111, s, 1.0), torch.where(chosen_B111, c, 1.0)
    gray_B1HW: Tensor = images_B3HW.mean(dim=1, keepdim=True)
    mean_B111 = gray_B1HW.mean(dim=(2, 3), keepdim=True)
    recolored_B3HW: Tensor = images_B3HW * (c * s) + (gray_B1HW * (c * (1 - s)) + (mean_B111 * (1 - c) + b))
    return recolored_B3HW


class _Shift(torch.autograd.Function):
    """
    Translate each image by its own (dy, dx); zeros move in.

    The gradient of a translation is the opposite translation. Autograd would use index_put, which is slow on
    a CPU and slower in deterministic mode.
    """

    @staticmethod
    def forward(ctx: Any, images_BCHW: Tensor, shifts_2B: Tensor) -> Tensor:
        ctx.save_for_backward(shifts_2B)
        B, C, H, W = images_BCHW.shape
        device = images_BCHW.device
        dy_B11, dx_B11 = shifts_2B.view(2, B, 1, 1)
        from_y_BH1 = torch.arange(H, device=device).view(1, H, 1) - dy_B11
        from_x_B1W = torch.arange(W, device=device).view(1, 1, W) - dx_B11
        y_inside_BH1 = (from_y_BH1 >= 0) & (from_y_BH1 < H)
        x_inside_B1W = (from_x_B1W >= 0) & (from_x_B1W < W)
        # One flat index per pixel is twice as fast as three.
        row_B11 = torch.arange(B, device=device).view(B, 1, 1) * H
        pixel_BHW = (row_B11 + from_y_BH1.clamp(0, H - 1)) * W + from_x_B1W.clamp(0, W - 1)
        pixels_NC = images_BCHW.permute(0, 2, 3, 1).reshape(-1, C)
        moved_BHWC = pixels_NC.index_select(0, pixel_BHW.flatten()).view(B, H, W, C)
        moved_BHWC = moved_BHWC * (y_inside_BH1 & x_inside_B1W).unsqueeze(3)
        moved_BCHW: Tensor = moved_BHWC.permute(0, 3, 1, 2)
        return moved_BCHW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (shifts_2B,) = ctx.saved_tensors
        return shift(grads[0], -shifts_2B), None


def shift(images_BCHW: Tensor, shifts_2B: Tensor) -> Tensor:
    """
    Translate each image.

    Args:
        shifts_2B: int64 pixels, down and to the right, on the images' device.
    """
    moved: Tensor = _Shift.apply(images_BCHW, shifts_2B)
    return moved


def _translation(images_B3HW: Tensor, shifts_2B: Tensor, chosen_B: Tensor | None) -> Tensor:
    return shift(images_B3HW, shifts_2B if chosen_B is None else shifts_2B * chosen_B)


def _cutout(images_B3HW: Tensor, centers_2B: Tensor, chosen_B: Tensor | None) -> Tensor:
    _, _, H, W = images_B3HW.shape
    outside = []
    for side, center_B in zip((H, W), centers_2B, strict=True):
        hole = int(side * CUTOUT_SHARE + 0.5)
        first_B1 = (center_B - hole // 2).view(-1, 1)
        offset_BS = torch.arange(side, device=center_B.device).view(1, side) - first_B1
        outside.append((offset_BS < 0) | (offset_BS >= hole))
    rows_BH, columns_BW = outside
    kept_B1HW = rows_BH.view(-1, 1, H, 1) | columns_BW.view(-1, 1, 1, W)
    if chosen_B is not None:
        kept_B1HW = kept_B1HW | ~chosen_B.view(-1, 1, 1, 1)
    cut_B3HW: Tensor = images_B3HW * kept_B1HW
    return cut_B3HW
