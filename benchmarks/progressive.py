"""
Progressive resolution, the full-resolution layer and a warm start beside the default recipe, at equal
processor time.

`python -m benchmarks.progressive --work DIR` trains each variant on one thread for the same processor time,
which other processes on the machine do not change, and evaluates 1,000 images. The same command again
continues where it stopped. `--write` writes benchmarks/results/progressive-<date>.json and a page with grids.
"""

import argparse
import copy
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import RESULTS, circumstances

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

BASE: dict[str, Any] = {"recipe": "rpgan", "size": 96, "ngf": 32, "ndf": 32, "metric": "none"}
PROGRESSIVE = (8_000, 24_000)
FACES = Path(__file__).parents[1] / "ganq" / "builtin" / "faces" / "model.safetensors"
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "progressive": {"progressive": PROGRESSIVE},
    "progressive, full-res-conv": {"progressive": PROGRESSIVE, "full_res_conv": True},
    "full-res-conv": {"full_res_conv": True},
    "skips": {"skips": True},
    "builtin:faces": {"init_netg": f"{FACES}", "init_netd": f"{FACES}"},
}
MARKS = (10, 20, 40, 80)
"""Seconds of processor time after which a grid is drawn."""
SHOWN, COLUMNS = 16, 6
SAMPLES = 1000


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.progressive", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder of the study; kept")
    parser.add_argument("--style", default="adventurer")
    parser.add_argument("--seconds", type=float, default=140.0, help="processor time of a training")
    parser.add_argument("--variants", default=";".join(list(VARIANTS)[:3]), help="separated by ';'")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--write", action="store_true", help="write the results of all runs in the folder")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    options.work.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        for variant in filter(None, options.variants.split(";")):
            path = (
                options.work / f"{options.style}-{options.seconds:g}-{variant.replace(' ', '')}-{seed}.json"
            )
            if not path.exists():
                facts = measure(options.work, options.style, variant, seed, options.seconds)
                path.write_text(json.dumps(facts, indent=1))
            print(path.read_text(), flush=True)
    if options.write:
        write([json.loads(path.read_text()) for path in sorted(options.work.glob("*.json"))], options.work)
    return 0


def measure(work: Path, style: str, variant: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train and evaluate one variant; the grids are in the work folder."""
    from jobs.specs import TrainSpec
    from jobs.training.train import Training
    from storage.datasets.cache import open_images
    from storage.datasets.synthetic import make_faces
    from storage.results.codecs import write_png
    from storage.volume.layout import Volume
    from storage.weights.load import read_weights
    from tests.unit.jobs.local_context import LocalContext

    faces = work / "faces" / style
    if not faces.is_dir():
        make_faces(faces, style=style, count=2000, size=96, seed=0)
    volume = Volume(work / "volume")
    volume.ensure()
    images = open_images(volume, str(faces), 96)
    folder = work / f"{style}-{variant.replace(' ', '')}-{seed}"
    folder.mkdir(exist_ok=True)
    spec = TrainSpec.create(
        **BASE,
        **VARIANTS[variant],
        seed=seed,
        data=str(faces),
        epochs=400,
        save_every=400,
        checkpoint_seconds=1e9,
    )
    drawn: dict[str, float] = {}
    state: dict[str, Any] = {"excluded": 0.0, "began": None}

    def stop_at(asked: int) -> str | None:
        """Draw the grids that are due; their processor time does not count."""
        now = time.process_time()
        state["began"] = state["began"] or now
        used = now - state["began"] - state["excluded"]
        for mark in MARKS:
            if used >= mark and str(mark) not in drawn:
                drawn[str(mark)] = training.state.step * spec.batch
                write_png(
                    folder / f"{mark:03d}s.png", _grid(training.state.sampler, training.fixed_latents_BZ11)
                )
        state["excluded"] += time.process_time() - now
        return "stop_after" if used >= seconds else None

    ctx = LocalContext(folder, data=images, stop_at=stop_at)
    ctx.start_weights = {str(FACES): read_weights(FACES)}
    training = Training(spec, ctx)
    result = training.run()
    write_png(folder / f"{seconds:03.0f}s.png", _grid(training.state.sampler, training.fixed_latents_BZ11))
    return {
        "style": style,
        "variant": variant,
        "seed": seed,
        "seconds": seconds,
        "images": result["images"],
        "images_at": drawn,
        **judge(training.state.sampler, images.images_N3HW),
    }


def _grid(sampler: "nn.Module", latents_BZ11: "Tensor") -> "NDArray[np.uint8]":
    import torch

    from jobs import grids

    with torch.no_grad():
        images_B3HW = copy.deepcopy(sampler).eval()(latents_BZ11[:SHOWN])
    return grids.tile(grids.to_uint8(images_B3HW))


def judge(sampler: "nn.Module", real_N3HW: "NDArray[np.uint8]") -> dict[str, Any]:
    """Return every measure that needs no weights from outside, of SAMPLES images."""
    import numpy as np
    import torch

    from jobs import grids, rng
    from jobs.generation.inference import for_inference
    from jobs.metrics import features
    from jobs.metrics.detail import grain, outlines
    from jobs.metrics.diversity import diversity
    from jobs.metrics.prdc import precision_recall
    from jobs.metrics.registry import ImageSet, compare

    device = torch.device("cpu")
    net = for_inference(copy.deepcopy(sampler).eval(), device)  # type: ignore[arg-type]
    generated = []
    with torch.no_grad():
        for start in range(0, SAMPLES, 100):
            images_B3HW = net(rng.noise(1, "progressive", start, shape=(100, 100, 1, 1)))
            generated.append(torch.from_numpy(grids.to_uint8(images_B3HW)).permute(0, 3, 1, 2))
    generated_M3HW, real = torch.cat(generated).contiguous(), torch.from_numpy(np.array(real_N3HW))
    real = real[:: max(1, len(real) // SAMPLES)]
    facts: dict[str, Any] = {"grain": grain(generated_M3HW), "grain_real": grain(real)}
    facts["outlines"] = outlines(real, generated_M3HW)
    for name in ("effnet-lite0", "effnet-lite2", "random"):
        try:
            network = features.chosen(name, None, lambda path, sha256=None: {}, device)
        except Exception as exc:  # the extra ganq[judge] is not installed
            facts[f"kid/{name}"] = str(exc)
            continue
        sets = ImageSet.of(real, network), ImageSet.of(generated_M3HW, network)
        facts[f"kid/{name}"] = compare("kid", *sets).value
        if name == "effnet-lite0":
            pr = precision_recall(sets[0].features_ND, sets[1].features_ND)
            facts |= {"precision": pr.precision, "recall": pr.recall}
            facts["diversity"] = diversity(sets[0].features_ND, sets[1].features_ND)
            distance = compare("swd", *sets)
            facts |= {"swd": distance.value, "swd_by_side": distance.by_side}
    return facts


def write(runs: list[dict[str, Any]], work: Path) -> None:
    """Write all runs, print a table, and draw the grids: a row for each mark, a column for each variant."""
    from PIL import Image

    now = datetime.now(UTC)
    about = {"at": f"{now:%Y-%m-%dT%H:%M:%SZ}", **circumstances(), "progressive": PROGRESSIVE}
    path = RESULTS / f"progressive-{now:%Y-%m-%d}.json"
    path.write_text(json.dumps({**about, "runs": runs}, indent=1) + "\n")
    print(
        "| variant | images | KID lite0 | KID lite2 | SWD | by side | grain | outlines | diversity |\n"
        "|---|---|---|---|---|---|---|---|---|"
    )
    for run in runs:
        by_side = " / ".join(f"{value:.0f}" for value in run["swd_by_side"].values())
        kids = " | ".join(f"{run[f'kid/effnet-{name}']:.2f}" for name in ("lite0", "lite2"))
        print(
            f"| {run['variant']} | {run['images']:,} | {kids} | {run['swd']:.0f} | {by_side} "
            f"| {run['grain']:.1f} | {run['outlines']:.0%} | {run['diversity']:.0%} |"
        )
    first = [run for run in runs if run["seed"] == runs[0]["seed"]]
    marks = sorted({*MARKS, *(int(run["seconds"]) for run in first)})
    wide, high = COLUMNS * 98 + 2, 100
    whole = Image.new("RGB", (len(first) * (wide + 8) - 8, len(marks) * (high + 4) - 4), "white")
    for column, run in enumerate(first):
        folder = work / f"{run['style']}-{run['variant'].replace(' ', '')}-{run['seed']}"
        for row, mark in enumerate(marks):
            grid = Image.open(folder / f"{mark:03d}s.png").crop((0, 0, wide, high))
            whole.paste(grid, (column * (wide + 8), row * (high + 4)))
    whole.quantize(256).save(path.with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    sys.exit(main())
