"""Training: through the queue, in-process, and by a plain script; cost of a checkpoint."""

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.measure import Ratio, Series, alternate, compare, limit
from benchmarks.neighbours import Watch
from jobs.specs import TrainSpec
from worker.supervisor.runner_process import memory_policy, thread_policy

DESCRIPTION = """\
A piece is a job in a warm process: networks are built, images are seen twice (ngf 64) or four times
(ngf 32), a grid and the weights are saved at the end. `loop` is images/s over the batches only, the limit of
long runs; `whole` includes set-up and saving, and for the queue the time from submit to success by the
database's clock. The plain script decodes in its loop with 4 loader processes; ganq reads images that were
decoded once, before the first round. `own loop` is ganq's training called directly, with threads that sleep
while they wait, as in the runner (OMP_WAIT_POLICY=PASSIVE), so that the difference to the queue is the queue;
`own loop, libgomp's spin` spins 300,000 times, which is faster on an idle machine and slows other processes
on a busy one. A stall is the time that a checkpoint blocks training: the longest of a run, median over the
runs; training waits for the final one by design. The tutorial's grids, every --save-every epochs of dcgan,
need a pass of G over a whole batch in the loop, because it changes the statistics that are saved next: that
pass is part of the stall of the line without a bar."""

STALL_MS = 50.0
BY_EPOCHS = {"batch": 64, "epochs": 2, "save_every": 1, "g_every": 5}
STALLS: dict[str, dict[str, Any]] = {
    "ngf 64, batch 256, by the clock": {"recipe": "dcgan", "epochs": 1, "checkpoint_seconds": 2},
    "sngan, ngf 64, with its grid": {"recipe": "sngan", **BY_EPOCHS},
    "dcgan, ngf 64, with the tutorial's pass": {"recipe": "dcgan", **BY_EPOCHS},
}
"""Trainings whose stalls are measured, with their options."""

SIZES = (
    {"ngf": 64, "ndf": 64, "batch": 256, "epochs": 2},
    {"ngf": 32, "ndf": 32, "batch": 64, "epochs": 4},
)
"""Trainings whose rates are measured: ten seconds or more on two cores, because first steps are slower."""


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """Run the benchmark; return the table's lines, and all values by configuration, piece and round."""
    data = stack.faces(work)
    ratios: list[Ratio] = []
    raw: dict[str, Any] = {}
    with (
        stack.Queue(work / "train-queue") as queue,
        stack.Child("benchmarks.plain_dcgan", "serve") as plain,
        stack.Child("benchmarks.in_process", env={**thread_policy({}), **memory_policy({})}) as own,
        stack.Child("benchmarks.in_process", env=memory_policy({})) as spinning,
    ):
        for options in SIZES:
            label = f"ngf {options['ngf']}, batch {options['batch']}"
            spec = TrainSpec.create(
                data=str(data),
                recipe="dcgan",
                size=96,
                save_every=options["epochs"],
                device="cpu",
                **options,
            )
            series = _alternate(work, queue, plain, own, spinning, spec, rounds or 5, watch)
            raw[label] = series.values
            ratios += _ratios(series, label)
        for label, given in STALLS.items():
            spec = TrainSpec.create(data=str(data), size=96, ngf=64, ndf=64, device="cpu", **given)
            longest = [queue.train(spec)["stall_s"] * 1000 for _ in range(min(rounds or 3, 3))]
            raw[f"stall, {label}"] = {"stall_ms": longest}
            ratios.append(_stall(label, statistics.median(longest), judged="tutorial" not in label))
    return ratios, raw


def _alternate(
    work: Path,
    queue: stack.Queue,
    plain: stack.Child,
    own: stack.Child,
    spinning: stack.Child,
    spec: TrainSpec,
    rounds: int,
    watch: Watch,
) -> Series:
    options = {
        key: getattr(spec, key) for key in ("data", "size", "batch", "epochs", "save_every", "ngf", "ndf")
    }

    def of_plain() -> dict[str, float]:
        return plain("train", out=str(work / "plain"), **options)

    def in_process(child: stack.Child) -> dict[str, float]:
        return child("train", folder=str(work / "local"), spec=spec.to_json())

    def queued() -> dict[str, float]:
        return queue.train(spec)

    pieces = {
        "plain": lambda: stack.with_rates(of_plain()),
        "own loop": lambda: stack.with_rates(in_process(own)),
        "own loop, libgomp's spin": lambda: stack.with_rates(in_process(spinning)),
        "queue": lambda: stack.with_rates(queued()),
    }
    return alternate(pieces, rounds, watch=watch)


def _ratios(series: Series, label: str) -> list[Ratio]:
    def one(what: str, against: str, metric: str, at_least: float | None) -> Ratio:
        mine, peer = series.of(what, metric), series.of(against, metric)
        name = metric.removesuffix("_rate")
        return compare(f"train {label}: {what}", against, f"{name}, images/s", mine, peer, at_least=at_least)

    return [
        one("queue", "plain", "loop_rate", 1.2),
        one("queue", "plain", "whole_rate", None),
        one("queue", "own loop", "loop_rate", 0.98),
        one("queue", "own loop", "whole_rate", None),
        one("queue", "own loop, libgomp's spin", "loop_rate", None),
        one("own loop", "plain", "loop_rate", 1.2),
    ]


def _stall(label: str, milliseconds: float, *, judged: bool) -> Ratio:
    line = limit(f"checkpoint stall: {label}", f"{STALL_MS:g} ms", "ms", milliseconds, STALL_MS)
    return line if judged else replace(line, bar="", met=None)
