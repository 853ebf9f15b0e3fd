"""Generation: 1,000 pictures as files, through the queue, in-process, and by a plain script."""

from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.measure import Ratio, Series, alternate, compare
from benchmarks.neighbours import Watch
from jobs.specs import GenerateSpec, TrainSpec

EXPLAINED = """\
The plain script forwards batches of 64 and calls torchvision's save_image for each
picture; all three have the network in memory. ganq's files are synced to the disk, with a
manifest of their sha-256 and grids; the script's are not. Through the queue counts from
submit to success, as the client sees it. `forward` is the script's network alone, nothing
encoded or written: PyTorch's own limit."""

COUNT = 1000


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Returns:
        The table's lines, and all values by configuration, piece and round.
    """
    data = stack.faces(work)
    ratios: list[Ratio] = []
    raw: dict[str, Any] = {}
    with (
        stack.Queue(work / "generate-queue") as queue,
        stack.Child("benchmarks.plain_dcgan", "serve") as plain,
        stack.Child("benchmarks.in_process") as local,
    ):
        for ngf in (64, 32):
            label = f"ngf {ngf}"
            series = _alternate(work, data, queue, plain, local, ngf, rounds or 9, watch)
            raw[label] = series.values
            ratios += _ratios(series, label)
    return ratios, raw


def _alternate(
    work: Path,
    data: Path,
    queue: stack.Queue,
    plain: stack.Child,
    local: stack.Child,
    ngf: int,
    rounds: int,
    watch: Watch,
) -> Series:
    # A short training gives pictures that compress like pictures, not like noise.
    trained = queue.wait(
        queue.submit(
            TrainSpec.create(
                data=str(data), recipe="plus", size=96, ngf=ngf, ndf=16, epochs=2, save_every=2, device="cpu"
            )
        )
    )
    source, volume = queue.pointer(trained), str(queue.settings.volume)
    netg = work / f"netg-{ngf}.pth"
    local("export", source=source, source_volume=volume, netg=str(netg))
    plain("load", netg=str(netg), ngf=ngf)
    spec = GenerateSpec.create(source=trained.id, count=COUNT, device="cpu")

    def of_plain() -> dict[str, float]:
        stack.remove(work / "plain-pictures")
        return plain("generate", count=COUNT, out=str(work / "plain-pictures"))

    def in_process() -> dict[str, float]:
        stack.remove(work / "local-pictures")
        folder = str(work / "local-pictures")
        return local("generate", folder=folder, spec=spec.to_json(), source=source, source_volume=volume)

    pieces = {
        "plain": lambda: stack.with_rates(of_plain()),
        "in-process": lambda: stack.with_rates(in_process()),
        "queue": lambda: stack.with_rates(queue.generate(spec)),
        "forward": lambda: stack.with_rates(plain("forward", count=COUNT)),
        "ganq's forward": lambda: stack.with_rates(
            local("forward", count=COUNT, source=source, source_volume=volume)
        ),
    }
    return alternate(pieces, rounds, watch=watch)


def _ratios(series: Series, label: str) -> list[Ratio]:
    def one(what: str, against: str, at_least: float | None = None) -> Ratio:
        mine, peer = series.of(what, "whole_rate"), series.of(against, "whole_rate")
        return compare(
            f"generate {COUNT}, {label}: {what}", against, "pictures/s", mine, peer, at_least=at_least
        )

    return [
        one("queue", "plain", 2.0),
        one("in-process", "plain", 2.0),
        one("queue", "in-process"),
        one("queue", "forward"),
        one("ganq's forward", "forward"),
    ]
