"""Channel widths and number of layers of every architecture."""

from jobs.errors import SpecError
from jobs.specs import check_quarter, size_plan

WIDEST = 8
"""Channels never exceed 8·ngf or 8·ndf, as at 96 pixels: doubling further quadruples a layer's weights."""


def widths(size: int, patch_size: int = 0) -> list[int]:
    """
    Return the channel factors of the hidden layers of G, from 4×4 upwards.

    Args:
        patch_size: as in size_plan().

    Returns:
        For 96: [8, 4, 2, 1]; D has them reversed.

    Raises:
        SpecError: no stack of layers has this size.
    """
    doublings, _ = size_plan(size, patch_size)
    return [min(WIDEST, 2**k) for k in range(doublings, -1, -1)]


def balanced_widths(size: int, patch_size: int = 0) -> list[int]:
    """
    Return widths() with the wide layers halved and the narrow ones doubled.

    Returns:
        For 96: [4, 4, 2, 2].
    """
    return [min(WIDEST // 2, max(2, factor)) for factor in widths(size, patch_size)]


def skip_sides(size: int, patch_size: int = 0) -> tuple[int, int, int]:
    """
    Return a quarter, half and the whole of the side: where networks with skip connections have an image.

    Raises:
        SpecError: a quarter of the side is less than the smallest side.
    """
    check_quarter("--skips", size, patch_size)
    return size // 4, size // 2, size


def edge_layer(size: int, patch_size: int = 0) -> tuple[int, int, int]:
    """
    Return (kernel, stride, padding) of the layer next to the pixels.

    Returns:
        For 96: (5, 3, 1), for 64: (4, 2, 1). The stride is the patch size.
    """
    _, patch_size = size_plan(size, patch_size)
    return patch_size + 2, patch_size, 1


def layers(arch: str, size: int, patch_size: int = 0) -> tuple[int, int]:
    """
    Return the number of convolution layers of G and D for --freeze-g and --freeze-d; a residual block is one.

    Returns:
        For dcgan and 96: (5, 5).
    """
    deep = len(widths(size, patch_size))
    return (2 * deep + 1, 2 * deep + 2) if arch == "resnet" else (deep + 1, deep + 1)


def check_frozen(option: str, count: int, layers: int) -> None:
    """
    Check that not all layers are frozen.

    Args:
        option: --freeze-g or --freeze-d.
        layers: of that network.

    Raises:
        SpecError: no layer would be trained.
    """
    if count >= layers:
        raise SpecError(
            f"{option} {count} leaves nothing to learn: the network has {layers} layers",
            hint=f"{option} {layers - 1} at most; half of them is a good start",
        )
