"""Training: ganq through the queue, in-process, and the tutorial as a plain script."""

from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.measure import Ratio, Series, alternate, compare
from benchmarks.neighbours import Watch
from jobs.specs import TrainSpec

EXPLAINED = """\
A piece is one whole job in a warm process: networks made, pictures shown once, a grid and
the weights saved at the end. `loop` is pictures/s over the batches alone, which is what
a run of hours tends to; `whole` counts set-up and saving too, and for the queue all from
submit to success as the client sees it. The plain script decodes in its loop with 4
loader processes; ganq reads pictures that were decoded once, before the first round.
The runner's OpenMP threads sleep while they wait (OMP_WAIT_POLICY=PASSIVE), which costs on a
quiet machine and saves much on a busy one; `in-process, passive` has the same policy, so what
is left between it and the queue is the queue alone."""

SIZES = ({"ngf": 64, "ndf": 64, "batch": 256}, {"ngf": 32, "ndf": 32, "batch": 64})


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Returns:
        The table's lines, and all values by configuration, piece and round.
    """
    data = stack.faces(work)
    ratios: list[Ratio] = []
    raw: dict[str, Any] = {}
    with (
        stack.Queue(work / "train-queue") as queue,
        stack.Child("benchmarks.plain_dcgan", "serve") as plain,
        stack.Child("benchmarks.in_process") as local,
        stack.Child("benchmarks.in_process", OMP_WAIT_POLICY="PASSIVE") as patient,
    ):
        for options in SIZES:
            label = f"ngf {options['ngf']}, batch {options['batch']}"
            spec = TrainSpec.create(
                data=str(data), recipe="origin", size=96, epochs=1, save_every=1, device="cpu", **options
            )
            series = _alternate(work, queue, plain, local, patient, spec, rounds or 9, watch)
            raw[label] = series.values
            ratios += _ratios(series, label)
    return ratios, raw


def _alternate(
    work: Path,
    queue: stack.Queue,
    plain: stack.Child,
    local: stack.Child,
    patient: stack.Child,
    spec: TrainSpec,
    rounds: int,
    watch: Watch,
) -> Series:
    options = {key: getattr(spec, key) for key in ("data", "size", "batch", "epochs", "ngf", "ndf")}

    def of_plain() -> dict[str, float]:
        return plain("train", out=str(work / "plain"), save_every=1, **options)

    def in_process(child: stack.Child) -> dict[str, float]:
        return child("train", folder=str(work / "local"), spec=spec.to_json())

    def queued() -> dict[str, float]:
        return queue.train(spec)

    pieces = {
        "plain": lambda: stack.with_rates(of_plain()),
        "in-process": lambda: stack.with_rates(in_process(local)),
        "in-process, passive": lambda: stack.with_rates(in_process(patient)),
        "queue": lambda: stack.with_rates(queued()),
    }
    return alternate(pieces, rounds, watch=watch)


def _ratios(series: Series, label: str) -> list[Ratio]:
    def one(what: str, against: str, metric: str, at_least: float | None) -> Ratio:
        mine, peer = series.of(what, metric), series.of(against, metric)
        name = metric.removesuffix("_rate")
        return compare(
            f"train {label}: {what}", against, f"{name}, pictures/s", mine, peer, at_least=at_least
        )

    return [
        one("queue", "in-process", "loop_rate", 0.95),
        one("queue", "in-process", "whole_rate", None),
        one("queue", "in-process, passive", "loop_rate", None),
        one("queue", "in-process, passive", "whole_rate", None),
        one("queue", "plain", "loop_rate", 1.0),
        one("queue", "plain", "whole_rate", None),
        one("in-process", "plain", "loop_rate", 1.0),
        one("in-process", "plain", "whole_rate", None),
    ]
