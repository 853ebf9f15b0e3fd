"""
Run the phases of a batch as CUDA graphs: captured once, then replayed.

A small network's kernels take less time than Python needs to launch them, so a GPU would be idle most of
the time. A graph launches all of them at once. They are the same kernels on the same numbers in the same
order, so the bits do not change.

Source: PyTorch, "CUDA semantics", section CUDA Graphs.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from jobs.device import NamedTensors, send_all

WARM_UP = 3
"""Batches of a phase that run eagerly before it is captured; cuDNN selects its kernels in them."""

Work = Callable[[NamedTensors], NamedTensors]


@dataclass(frozen=True)
class CapturedGraph:
    """A graph and the tensors that it writes."""

    graph: "torch.cuda.CUDAGraph"
    outputs: NamedTensors
    gradients: list[tuple[nn.Parameter, Tensor]]


class CudaGraphs:
    """
    Runs work eagerly, or on a GPU as captured graphs.

    Args:
        enabled: capture graphs where the device supports them.
    """

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.device = device
        self.enabled = enabled and device.type == "cuda"
        self._batches: dict[Hashable, int] = {}
        self._inputs: dict[Hashable, NamedTensors] = {}
        self._captured: dict[tuple[str, Hashable], CapturedGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def set_inputs(self, phase: Hashable, drawn: NamedTensors) -> NamedTensors:
        """
        Copy the inputs of one batch to the device.

        Args:
            phase: batches of equal phase differ only in the values of their tensors.
            drawn: on the CPU or the device.

        Returns:
            The tensors on the device; for captured phases always the same ones.
        """
        self._batches[phase] = self._batches.get(phase, 0) + 1
        if not self._is_captured(phase):
            return send_all(drawn, self.device)
        if phase not in self._inputs:
            on_device = send_all(drawn, self.device)
            self._inputs[phase] = {name: one.clone() for name, one in on_device.items()}
            return self._inputs[phase]
        for name, static in self._inputs[phase].items():
            one = drawn[name]
            static.copy_(one if one.is_cuda else one.pin_memory(), non_blocking=True)
        return self._inputs[phase]

    def run(self, name: str, phase: Hashable, work: Work, x: NamedTensors, net: nn.Module) -> NamedTensors:
        """
        Run a piece of work of one batch.

        Args:
            name: of the work.
            work: must neither draw nor synchronise, and read only `x`, the networks' own tensors and what
                earlier work of the same batch has left: all phases share memory.
            x: what set_inputs() returned for this batch.
            net: the network whose gradients the work computes.

        Returns:
            The output of the work. The next run of this name and phase may overwrite it.
        """
        if not self._is_captured(phase):
            return work(x)
        if (name, phase) not in self._captured:
            try:
                self._captured[name, phase] = self._capture(work, x, net)
            except torch.OutOfMemoryError:
                self.enabled = False
        if not self.enabled:
            # A graph needs its own memory: what does not fit twice may fit once. Only here, after the
            # except block, because the exception references everything that the failed capture allocated.
            self._captured.clear()
            self._inputs.clear()
            return work(x)
        captured = self._captured[name, phase]
        captured.graph.replay()
        for parameter, gradient in captured.gradients:
            parameter.grad = gradient
        return captured.outputs

    def _is_captured(self, phase: Hashable) -> bool:
        return self.enabled and self._batches[phase] > WARM_UP

    def _capture(self, work: Work, x: NamedTensors, net: nn.Module) -> CapturedGraph:
        """Capture the work. Nothing is computed before the first replay."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: one of them copies checkpoints.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            outputs = work(x)
        gradients = [(one, one.grad) for one in net.parameters() if one.grad is not None]
        return CapturedGraph(graph, outputs, gradients)
