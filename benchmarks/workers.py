"""Sharding: one generation by two workers with a core each, compared with one worker on one core."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import stack
from benchmarks.measure import Ratio, alternate, compare
from benchmarks.models import copied, trained
from benchmarks.neighbours import Watch
from jobs.specs import GenerateSpec
from storage.db.rows import Job
from storage.results.reader import names_of_result

DESCRIPTION = """\
One job of 8,192 images at ngf 32 in shards of 1,024, PNG files, from submit to success, including the
merge. `ganq up --cpu-workers 2` on two cores is compared with `ganq up` whose processes are all bound to
one core. The two results of each round are compared byte by byte. `forward` is only the network, without
encoding and writing, by one bare process on each core compared with one on one core: the gain of the
machine's second core."""

COUNT, SHARD = 8192, 1024


def run(work: Path, rounds: int | None, watch: Watch) -> tuple[list[Ratio], dict[str, Any]]:
    """
    Run the benchmark.

    Raises:
        RuntimeError: the machine has a single core, or the results differ.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise RuntimeError("this benchmark needs two cores")
    two = stack.Queue(work / "workers-two", workers=("--cpu-workers", "2"), cores=cores)
    one = stack.Queue(work / "workers-one", cores=cores[:1])
    first, second = (stack.Child("benchmarks.in_process", cores=[core]) for core in cores)
    with two, one, first, second, ThreadPoolExecutor(2) as pool:
        model = trained(work, two, 32)
        common = {"count": COUNT, "shard_size": SHARD, "device": "cpu"}
        specs = {
            two: GenerateSpec.create(source=model.id, **common),
            one: GenerateSpec.create(source=copied(model, two, one).id, **common),
        }
        last: dict[str, tuple[stack.Queue, Job]] = {}

        def piece(name: str, queue: stack.Queue) -> dict[str, float]:
            measured, job = queue.generate_job(specs[queue])
            last[name] = queue, job
            if len(last) == 2:
                _require_equal(*last.values())
                last.clear()
            return stack.with_rates(measured)

        source = {"source": two.pointer(model), "source_volume": str(two.settings.volume)}

        def forwards(*children: stack.Child) -> dict[str, float]:
            began = time.perf_counter()
            each = COUNT // len(children)
            list(pool.map(lambda child: child("forward", count=each, **source), children))
            return stack.with_rates({"images": COUNT, "whole_s": time.perf_counter() - began})

        pieces = {
            "two workers": lambda: piece("two workers", two),
            "one worker": lambda: piece("one worker", one),
            "forward, two cores": lambda: forwards(first, second),
            "forward, one core": lambda: forwards(first),
        }
        series = alternate(pieces, rounds or 7, watch=watch)
    mine, peer = series.of("two workers", "whole_rate"), series.of("one worker", "whole_rate")
    label = f"generate {COUNT:,} in parts: two workers, two cores"
    bare, alone = series.of("forward, two cores", "whole_rate"), series.of("forward, one core", "whole_rate")
    return [
        compare(label, "one worker, one core", "pictures/s", mine, peer, at_least=1.8),
        compare("forward, two cores", "forward, one core", "pictures/s", bare, alone),
    ], series.values


def _require_equal(one: tuple[stack.Queue, Job], other: tuple[stack.Queue, Job]) -> None:
    folders = [queue.attempt(job) for queue, job in (one, other)]
    files = [_files(folder) for folder in folders]
    if files[0] != files[1]:
        raise RuntimeError("the results of two workers and of one differ")
    if any((folders[0] / name).read_bytes() != (folders[1] / name).read_bytes() for name in files[0]):
        raise RuntimeError("the results of two workers and of one differ in their bytes")
    for folder in folders:
        stack.quarantine(folder)


def _files(folder: Path) -> list[str]:
    """Return all files of a result, by name."""
    tops = [folder / name for name in names_of_result(folder)]
    found = [path for top in tops for path in (top, *top.rglob("*")) if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in found)
