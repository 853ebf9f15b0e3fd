"""Draw images with numpy instead of a network; all else of a generation is ganq's."""

import os
import sys
from typing import Any

import numpy as np

from jobs.context import GeneratedImage, JobContext
from jobs.errors import StopRequested
from jobs.specs import GenerateSpec

SIDE = 16


def run(spec: GenerateSpec, ctx: JobContext) -> dict[str, Any]:
    """Draw a shard; publish the job of all shards as ganq does."""
    if ctx.shards():
        del sys.modules["torch"]  # the stand-in
        from jobs.generation.generate import run as generate

        return generate(spec, ctx)
    ctx.model_sha256()
    sink = ctx.image_sink(format=spec.format, quality=spec.quality, total=spec.image_count, names=spec.names)
    drawn = os.open(os.environ["DRAWN"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    written = 0
    for first, last in spec.ranges:
        for start in range(first, last + 1, spec.micro_batch):
            reason = ctx.stop_reason()
            if reason is not None:
                raise StopRequested(reason)
            indices = range(start, min(start + spec.micro_batch, last + 1))
            generator = np.random.Generator(np.random.Philox(key=[spec.seed, start]))
            pixels_BHW3 = generator.integers(0, 256, (len(indices), SIDE, SIDE, 3), dtype=np.uint8)
            os.write(drawn, b"." * len(indices))  # a byte for each image, by all attempts of all workers
            sink.add(
                GeneratedImage(
                    pixels_HW3, {"seed": spec.seed, "draw": index, "score": None}, output_index=index
                )
                for index, pixels_HW3 in zip(indices, pixels_BHW3, strict=True)
            )
            written += len(indices)
            ctx.report(written, spec.image_count, "images")
    os.close(drawn)
    return {
        "image_count": written,
        "drawn": written,
        "grids": [],
        "seed": spec.seed,
        "build": {},
        **sink.publish(),
    }
