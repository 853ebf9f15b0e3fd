"""Training on a GPU: CUDA graphs compared with eager steps, deterministic and not."""

import time
from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.in_process import VolumeContext
from benchmarks.measure import Ratio, alternate, compare
from benchmarks.neighbours import Watch
from jobs.specs import TrainSpec

DESCRIPTION = """\
Images per second in the loop over batches, in one process, without the queue: each piece runs batches
for two seconds, after the first ones, in which cuDNN chooses kernels and graphs are captured. `recorded`
is --cuda-graphs, the default; `plain` is --no-cuda-graphs; `free` is --no-deterministic. Captured steps
are bit-exact (tests/gpu)."""

SECONDS = 2.0
FIRST = 20
"""Warm-up batches, not measured."""
RUNS: dict[str, dict[str, Any]] = {
    "dcgan, ngf 64, batch 256": {"recipe": "dcgan"},
    "sngan, ngf 64, batch 32": {"recipe": "sngan"},
    "rpgan, ngf 64, batch 32": {"recipe": "rpgan"},
    "rpgan, ngf 32, batch 32": {"recipe": "rpgan", "ngf": 32, "ndf": 32},
    "r3gan, ngf 64, batch 64": {"recipe": "r3gan"},
}


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Run the benchmark.

    Returns:
        The table's lines, and all values by configuration, piece and round; nothing without a GPU.
    """
    import torch

    if not torch.cuda.is_available():
        print("  no GPU that PyTorch can use: nothing measured")
        return [], {}
    data = stack.faces(work)
    ratios: list[Ratio] = []
    raw: dict[str, Any] = {"gpu": torch.cuda.get_device_name()}
    for label, options in RUNS.items():
        pieces = {}
        for exactness in ("deterministic", "free"):
            for way in ("plain", "recorded"):
                loop = Loop(
                    work / "gpu",
                    TrainSpec.create(
                        data=str(data),
                        metric="none",
                        epochs=1_000_000,
                        device="cuda",
                        deterministic=exactness == "deterministic",
                        cuda_graphs=way == "recorded",
                        **options,
                    ),
                )
                pieces[f"{way}, {exactness}"] = loop.measure
        series = alternate(pieces, rounds or 5, watch=watch)
        raw[label] = series.values
        for exactness in ("deterministic", "free"):
            mine, peer = f"recorded, {exactness}", f"plain, {exactness}"
            ratios.append(
                compare(
                    f"train on a GPU, {label}: {mine}",
                    peer,
                    "pictures/s",
                    series.of(mine, "rate"),
                    series.of(peer, "rate"),
                )
            )
    return ratios, raw


class Loop:
    """A training that is run in pieces."""

    def __init__(self, folder: Path, spec: TrainSpec) -> None:
        import jobs.training.train

        self.training = jobs.training.train.Training(spec, VolumeContext(folder))
        self.begun = False

    def measure(self) -> dict[str, float]:
        """Run batches for a few seconds; return rate: images of the data set per second."""
        from jobs import device

        training = self.training
        device.set_exactness(training.device, deterministic=training.spec.deterministic)
        if not self.begun:
            self._advance(FIRST)
            self.begun = True
        began, batches = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            batches += self._advance(FIRST)
        return {"rate": batches * training.spec.batch / (time.perf_counter() - began)}

    def _advance(self, batches: int) -> int:
        """Run so many batches, and synchronise with the GPU."""
        import torch

        training = self.training
        for _ in range(batches):
            training.train_batch()
            training.state.step += 1
        torch.cuda.synchronize()
        return batches
