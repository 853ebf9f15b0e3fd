"""
The nearest of many features, exactly, a block at a time.

Shapes in names: M asked for, N looked among, D features, k neighbours.
"""

import torch
from torch import Tensor

BLOCK = 512
"""Rows of the distance matrix that are held at once."""


def nearest(asked_MD: Tensor, among_ND: Tensor, k: int, *, themselves: bool = False) -> tuple[Tensor, Tensor]:
    """
    Return the k rows of `among_ND` that are nearest to each of `asked_MD`, nearest first.

    In float64: an image and its copy differ by so little that float32 would round it away.

    Args:
        themselves: both are the same rows, and none counts as its own neighbour.

    Returns:
        Euclidean distances, float64 (M, k), and row numbers, int64 (M, k).
    """
    among_ND = among_ND.double()
    squares_N = among_ND.square().sum(1)
    distances, rows = [], []
    for start in range(0, len(asked_MD), BLOCK):
        part_BD = asked_MD[start : start + BLOCK].double()
        apart_BN = part_BD.square().sum(1, keepdim=True) + squares_N - 2 * part_BD @ among_ND.T
        if themselves:
            here = torch.arange(len(part_BD))
            apart_BN[here, here + start] = torch.inf
        found = apart_BN.topk(k, dim=1, largest=False)
        distances.append(found.values.clamp_min_(0).sqrt_())
        rows.append(found.indices)
    return torch.cat(distances), torch.cat(rows)
