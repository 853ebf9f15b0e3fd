"""
Time to publish a split generation, and the memory of a worker that writes a million images.

    python -m benchmarks.publish [--shards N] [--images N] [--out FILE]

`merge` takes over each image of the archives, as for jobs that ganq 0.2 has submitted; `link` makes hard
links to the archives. Shards are of few images, so that their number is the measured one.
"""

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jobs.context import GeneratedImage, ShardFiles
from jobs.generation import merge_shards
from jobs.specs import GenerateSpec
from storage.results.reader import PublishedImages, are_there
from storage.results.writer import ImageFiles

SIDE = 16
IMAGES_PER_SHARD = 10
MICRO_BATCH = 64


def generated(first: int, count: int) -> Iterator[GeneratedImage]:
    rng = np.random.default_rng(first)
    pixels_NHW3 = rng.integers(0, 255, (count, SIDE, SIDE, 3), dtype=np.uint8)
    for number, pixels_HW3 in enumerate(pixels_NHW3, first):
        yield GeneratedImage(pixels_HW3, {"seed": 0, "draw": number, "score": None}, output_index=number)


def make_shards(folder: Path, count: int) -> list[ShardFiles]:
    """Write one shard, and copies of it whose archives have the names of the others."""
    first = ImageFiles(folder / "0", format="tar", total=IMAGES_PER_SHARD)
    first.add(generated(0, IMAGES_PER_SHARD))
    first.publish()
    model, found = first.shard_files(), []
    (archive,) = model.archives
    for place in range(count):
        here, name = folder / f"shards/{place:05d}", f"shard-{place:05d}.tar"
        here.mkdir(parents=True)
        shutil.copyfile(model.folder / "manifest.jsonl", here / "manifest.jsonl")
        shutil.copyfile(model.folder / archive["archive"], here / name)
        if name != archive["archive"]:  # the name in the manifest, which `merge` reads
            os.link(here / name, here / archive["archive"])
        found.append(
            ShardFiles(
                here,
                model.images,
                model.bytes,
                model.manifest_bytes,
                model.manifest_sha256,
                [{**archive, "archive": name}],
            )
        )
    return found


def link(folder: Path, shards: list[ShardFiles]) -> None:
    assert all(map(are_there, shards))
    sink = ImageFiles(folder, format="tar", of_shards=True)
    for one in shards:
        sink.link(one)
    sink.publish()


def merge(folder: Path, shards: list[ShardFiles]) -> None:
    sink = ImageFiles(folder, format="tar")
    images = [PublishedImages(one.folder, one.manifest_sha256) for one in shards]
    for number, placed in enumerate(merge_shards._all(images)):
        sink.adopt(placed.image, output_index=number)
    sink.publish()


def seconds(work: Callable[[Path, list[ShardFiles]], None], folder: Path, shards: list[ShardFiles]) -> float:
    began = time.monotonic()
    work(folder, shards)
    return round(time.monotonic() - began, 2)


def peak_mb() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def write(folder: Path, images: int) -> dict[str, Any]:
    """Write archives as one worker does; return the time and the peak memory after each tenth."""
    spec = GenerateSpec.create(source=1, count=images, shard_size=images, format="tar")
    sink = ImageFiles(folder, format=spec.format, total=images, names=spec.names)
    memory: list[float] = []
    began = time.monotonic()
    for first in range(0, images, MICRO_BATCH):
        sink.add(generated(first, min(MICRO_BATCH, images - first)))
        if first * 10 // images >= len(memory):
            memory.append(peak_mb())
    sink.publish()
    return {
        "images": images,
        "seconds": round(time.monotonic() - began, 1),
        "peak_mb_by_tenth": [*memory, peak_mb()],
        "archives": len(list(folder.glob("*.tar"))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.publish", description=__doc__)
    parser.add_argument("--shards", type=int, default=9_900)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="ganq-publish-"))
    try:
        found: dict[str, Any] = {"load": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
        if options.shards:
            shards = make_shards(work, options.shards)
            found |= {"shards": options.shards, "images_per_shard": IMAGES_PER_SHARD}
            found["link_s"] = seconds(link, work / "link", shards)
            found["merge_s"] = seconds(merge, work / "merge", shards)
        if options.images:
            found["write"] = write(work / "write", options.images)
    finally:
        shutil.rmtree(work)
    print(json.dumps(found, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
