"""
The passes of a batch as CUDA graphs: recorded once, replayed ever after.

A small network's kernels take less time than Python needs to start them, so a GPU would wait
most of the time. A graph starts all of them at once, and they are the same kernels on the same
numbers in the same order: the bits are those of the passes that it was recorded from.

Source: PyTorch, "CUDA semantics", section CUDA Graphs.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jobs.device import Named, send_all

WARM_UP = 3
"""Batches of a turn that run as they are before it is recorded: cuDNN chooses its kernels in them."""

Pass = Callable[[Named], Named]


@dataclass(frozen=True)
class CapturedGraph:
    """A graph, and what it writes."""

    graph: "torch.cuda.CUDAGraph"
    made: Named
    gradients: list[tuple[nn.Parameter, Tensor]]


class CudaGraphs:
    """
    Runs passes: as they are, or on a GPU as graphs.

    Args:
        on: record them, where the device can.
    """

    def __init__(self, device: torch.device, *, on: bool) -> None:
        self.device = device
        self.on = on and device.type == "cuda"
        self._seen: dict[Hashable, int] = {}
        self._given: dict[Hashable, Named] = {}
        self._recorded: dict[tuple[str, Hashable], CapturedGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.on else None

    def give(self, turn: Hashable, drawn: Named) -> Named:
        """
        Bring to the device what the passes of one batch work on.

        Args:
            turn: of what the passes do: batches of one turn differ in their tensors' values alone.
            drawn: on the CPU or the device.
        """
        self._seen[turn] = self._seen.get(turn, 0) + 1
        if not self._is_recorded(turn):
            return send_all(drawn, self.device)
        if turn not in self._given:
            there = send_all(drawn, self.device)
            self._given[turn] = {name: one.clone() for name, one in there.items()}
            return self._given[turn]
        for name, mine in self._given[turn].items():
            one = drawn[name]
            mine.copy_(one if one.is_cuda else one.pin_memory(), non_blocking=True)
        return self._given[turn]

    def run(self, name: str, turn: Hashable, work: Pass, x: Named, net: nn.Module) -> Named:
        """
        Args:
            name: of the pass.
            work: the pass. It must neither draw nor wait, and read nothing but `x`, the networks'
                own tensors, and what an earlier pass of the same batch has left for it: all turns
                share memory, so that what one batch leaves is gone in the next.
            x: what give() returned for this batch.
            net: whose gradients it leaves behind.

        Returns:
            What the pass returned. The next run of this pass and turn may write over it.
        """
        if not self._is_recorded(turn):
            return work(x)
        if (name, turn) not in self._recorded:
            try:
                self._recorded[name, turn] = self._record(work, x, net)
            except torch.OutOfMemoryError:
                self.on = False
        if not self.on:
            # A graph holds memory of its own: what does not fit twice may fit once. Only now, because an
            # error that is in hand holds all that the failed recording had made.
            self._recorded.clear()
            self._given.clear()
            return work(x)
        recorded = self._recorded[name, turn]
        recorded.graph.replay()
        for parameter, gradient in recorded.gradients:
            parameter.grad = gradient
        return recorded.made

    def _is_recorded(self, turn: Hashable) -> bool:
        return self.on and self._seen[turn] > WARM_UP

    def _record(self, work: Pass, x: Named, net: nn.Module) -> CapturedGraph:
        """Nothing is computed yet: that is the first replay's."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: checkpoints are copied in one.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = work(x)
        gradients = [(one, one.grad) for one in net.parameters() if one.grad is not None]
        return CapturedGraph(graph, made, gradients)
