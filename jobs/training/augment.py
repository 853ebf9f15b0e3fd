"""
DiffAugment: what D sees, real or fake, is shifted, recoloured or cut, and G feels it through the gradient.

A discriminator that sees 2,000 pictures a hundred times learns them by heart; one
that sees each of them a little different every time does not.

Source: Zhao et al. 2020, arXiv:2006.10738, with its strengths: shifts up to an
eighth of the side, a hole of half the side, brightness ±0.5, saturation 0 to 2,
contrast 0.5 to 1.5. All draws come from the generator that is passed in.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jobs.device import Named, send_all

SHIFT = 1 / 8
HOLE = 1 / 2
LOWEST_31111 = torch.tensor([-0.5, 0.0, 0.5]).view(3, 1, 1, 1, 1)
RANGES_31111 = torch.tensor([1.0, 2.0, 1.0]).view(3, 1, 1, 1, 1)
"""Of brightness, saturation and contrast."""


def diff_augment(
    images_B3HW: Tensor, policies: Collection[str], draws: torch.Generator, p: Tensor | None = None
) -> Tensor:
    """
    Args:
        pictures_B3HW: in [-1, 1].
        policies: of 'color', 'translation', 'cutout'; applied in this order, as in the paper's code.
        draws: a CPU generator, used up for this one call.
        p: chance of each policy for each picture, one number on the pictures' device; None: always.

    Returns:
        The same shape; differentiable, twice too. Values may leave [-1, 1]. Where a
        picture was moved away or cut stands 0, a mid grey.
    """
    drawn = draw(policies, images_B3HW.shape, draws, always=p is None)
    chances = None if p is None else dict.fromkeys(policies, p)
    return change(images_B3HW, policies, send_all(drawn, images_B3HW.device), chances)


def draw(
    policies: Collection[str], shape: Sequence[int], draws: torch.Generator, *, always: bool
) -> dict[str, Tensor]:
    """
    All that chance decides about one batch, before anything is computed.

    Args:
        shape: of the pictures: B, 3, H, W.
        always: every picture is changed, and nothing is drawn about that.

    Returns:
        Tensors on the CPU, for change().
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
            holes = [int(side * HOLE + 0.5) for side in (H, W)]
            drawn["cutout.middles"] = torch.stack(
                [
                    torch.randint(0, side + (1 - hole % 2), (B,), generator=draws)
                    for side, hole in zip((H, W), holes, strict=True)
                ]
            )
    return drawn


def change(
    images_B3HW: Tensor,
    policies: Collection[str],
    drawn: Named,
    chances: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """
    diff_augment() with what draw() gave, on the pictures' device: nothing here asks chance or the CPU.

    Args:
        chances: p of each policy; None if draw() was told `always`.
    """

    def chosen(policy: str) -> Tensor | None:
        return None if chances is None else drawn[f"{policy}.chance"] < chances[policy]

    if "color" in policies:
        images_B3HW = _color(images_B3HW, drawn["color.strengths"], chosen("color"))
    if "translation" in policies:
        images_B3HW = _translation(images_B3HW, drawn["translation.shifts"], chosen("translation"))
    if "cutout" in policies:
        images_B3HW = _cutout(images_B3HW, drawn["cutout.middles"], chosen("cutout"))
    return images_B3HW


def _color(images_B3HW: Tensor, strengths_3B111: Tensor, chosen_B: Tensor | None) -> Tensor:
    # Brightness, then saturation, then contrast, multiplied out: three passes over
    # the pictures would be six otherwise, and on a CPU they are what this costs.
    b, s, c = strengths_3B111
    if chosen_B is not None:
        mine_B111 = chosen_B.view(-1, 1, 1, 1)
        b, s, c = b * mine_B111, torch.where(mine_B111, s, 1.0), torch.where(mine_B111, c, 1.0)
    grey_B1HW: Tensor = images_B3HW.mean(dim=1, keepdim=True)
    level_B111 = grey_B1HW.mean(dim=(2, 3), keepdim=True)
    recoloured_B3HW: Tensor = images_B3HW * (c * s) + (grey_B1HW * (c * (1 - s)) + (level_B111 * (1 - c) + b))
    return recoloured_B3HW


class _Shift(torch.autograd.Function):
    """
    Move each picture by its own (dy, dx), zeros coming in.

    The gradient of a shift is the opposite shift. Autograd would scatter it with
    index_put instead, which is slow on a CPU and slower in deterministic mode.
    """

    @staticmethod
    def forward(ctx: Any, pictures_BCHW: Tensor, shifts_2B: Tensor) -> Tensor:
        ctx.save_for_backward(shifts_2B)
        B, C, H, W = pictures_BCHW.shape
        device = pictures_BCHW.device
        dy_B11, dx_B11 = shifts_2B.view(2, B, 1, 1)
        from_y_BH1 = torch.arange(H, device=device).view(1, H, 1) - dy_B11
        from_x_B1W = torch.arange(W, device=device).view(1, 1, W) - dx_B11
        y_there_BH1 = (from_y_BH1 >= 0) & (from_y_BH1 < H)
        x_there_B1W = (from_x_B1W >= 0) & (from_x_B1W < W)
        # One flat index for the pixel of each place: twice as fast as three indices.
        row_B11 = torch.arange(B, device=device).view(B, 1, 1) * H
        pixel_BHW = (row_B11 + from_y_BH1.clamp(0, H - 1)) * W + from_x_B1W.clamp(0, W - 1)
        pixels_NC = pictures_BCHW.permute(0, 2, 3, 1).reshape(-1, C)
        moved_BHWC = pixels_NC.index_select(0, pixel_BHW.flatten()).view(B, H, W, C)
        moved_BHWC = moved_BHWC * (y_there_BH1 & x_there_B1W).unsqueeze(3)
        moved_BCHW: Tensor = moved_BHWC.permute(0, 3, 1, 2)
        return moved_BCHW

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (shifts_2B,) = ctx.saved_tensors
        return shift(grads[0], -shifts_2B), None


def shift(pictures_BCHW: Tensor, shifts_2B: Tensor) -> Tensor:
    """
    Args:
        shifts_2B: int64 pixels, down and to the right, on the pictures' device.
    """
    moved: Tensor = _Shift.apply(pictures_BCHW, shifts_2B)
    return moved


def _translation(images_B3HW: Tensor, shifts_2B: Tensor, chosen_B: Tensor | None) -> Tensor:
    return shift(images_B3HW, shifts_2B if chosen_B is None else shifts_2B * chosen_B)


def _cutout(images_B3HW: Tensor, middles_2B: Tensor, chosen_B: Tensor | None) -> Tensor:
    _, _, H, W = images_B3HW.shape
    outside = []
    for side, middle_B in zip((H, W), middles_2B, strict=True):
        hole = int(side * HOLE + 0.5)
        first_B1 = (middle_B - hole // 2).view(-1, 1)
        place_BS = torch.arange(side, device=middle_B.device).view(1, side) - first_B1
        outside.append((place_BS < 0) | (place_BS >= hole))
    rows_BH, columns_BW = outside
    stays_B1HW = rows_BH.view(-1, 1, H, 1) | columns_BW.view(-1, 1, 1, W)
    if chosen_B is not None:
        stays_B1HW = stays_B1HW | ~chosen_B.view(-1, 1, 1, 1)
    left_B3HW: Tensor = images_B3HW * stays_B1HW
    return left_B3HW
