"""Generation of 10,000 image files: through the queue, in-process, and by a plain script."""

from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.measure import Ratio, Series, alternate, compare
from benchmarks.models import trained
from benchmarks.neighbours import Watch
from jobs.specs import GenerateSpec
from worker.supervisor.runner_process import memory_policy, thread_policy

DESCRIPTION = """\
The plain script forwards batches of 64 and calls torchvision's save_image for each image; the network
is in memory in all three cases. ganq's files are synced to the disk, with a manifest of their SHA-256
and grids; the script's are not. The queue is measured from submit to success, by the database's clock,
with one worker on all cores and an unsplit job. `forward` is the script's network only, without
encoding and writing: the limit of PyTorch. No round deletes the files of the previous one, because ext4
creates new files slowly after that. At ngf 64, where the forward dominates, with 1,000 images."""

COUNTS = {32: 10_000, 64: 1000}


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """Run the benchmark; return the table's lines, and all values by configuration, piece and round."""
    ratios: list[Ratio] = []
    raw: dict[str, Any] = {}
    with (
        stack.Queue(work / "generate-queue") as queue,
        stack.Child("benchmarks.plain_dcgan", "serve") as plain,
        stack.Child("benchmarks.in_process", env={**thread_policy({}), **memory_policy({})}) as local,
    ):
        for ngf, count in COUNTS.items():
            label = f"generate {count:,}, ngf {ngf}"
            series = _alternate(work, queue, plain, local, ngf, rounds or 5, watch)
            raw[label] = series.values
            ratios += _ratios(series, label)
    return ratios, raw


def _alternate(
    work: Path,
    queue: stack.Queue,
    plain: stack.Child,
    local: stack.Child,
    ngf: int,
    rounds: int,
    watch: Watch,
) -> Series:
    model = trained(work, queue, ngf)
    source, volume = queue.pointer(model), str(queue.settings.volume)
    netg = work / f"netg-{ngf}.pth"
    local("export", source=source, source_volume=volume, netg=str(netg))
    plain("load", netg=str(netg), ngf=ngf)
    count = COUNTS[ngf]
    spec = GenerateSpec.create(source=model.id, count=count, shard_size=count, device="cpu")

    def of_plain() -> dict[str, float]:
        stack.quarantine(work / "plain-pictures")
        return plain("generate", count=count, out=str(work / "plain-pictures"))

    def in_process() -> dict[str, float]:
        stack.quarantine(work / "local-pictures")
        folder = str(work / "local-pictures")
        return local("generate", folder=folder, spec=spec.to_json(), source=source, source_volume=volume)

    pieces = {
        "plain": lambda: stack.with_rates(of_plain()),
        "in-process": lambda: stack.with_rates(in_process()),
        "queue": lambda: stack.with_rates(queue.generate(spec)),
        "forward": lambda: stack.with_rates(plain("forward", count=count)),
        "ganq's forward": lambda: stack.with_rates(
            local("forward", count=count, source=source, source_volume=volume)
        ),
    }
    return alternate(pieces, rounds, watch=watch)


def _ratios(series: Series, label: str) -> list[Ratio]:
    def one(what: str, against: str, at_least: float | None = None) -> Ratio:
        mine, peer = series.of(what, "whole_rate"), series.of(against, "whole_rate")
        return compare(f"{label}: {what}", against, "pictures/s", mine, peer, at_least=at_least)

    return [
        one("queue", "plain", 4.0 if "ngf 32" in label else 2.0),
        one("in-process", "plain"),
        one("queue", "in-process"),
        one("queue", "forward", 0.9),
        one("ganq's forward", "forward"),
    ]
