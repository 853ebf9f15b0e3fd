"""
Run the study: `python -m benchmarks.quality`. The same command again goes on where it stopped.

Every training gets the same wall time on the same machine, one after the other, through
ganq's own queue; nothing else should run meanwhile. The defaults are the whole study,
most of a week on two cores; `--quick` takes an hour: 2,000 images, one seed, two recipes. With
`--rates` a training has a number of images instead of a time, and `--at-once` runs several.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import Cell, ablation, cells
from benchmarks.quality.report import MINUTES, joined, write
from benchmarks.quality.study import Study, shown
from benchmarks.stack import Queue
from jobs.recipes import DEFAULT_RECIPE

STYLES = ("adventurer", "big-smile")
SIZES = (2000, 500, 8000)
RECIPES = ("dcgan", "sngan", "rpgan", "r3gan")
SEEDS = (0, 1, 2)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--work", type=Path, required=True, help="folder of the study; kept")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="wall time of each training (default 10)"
    )
    parser.add_argument("--styles", default=",".join(STYLES), help="(default %(default)s)")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="images (default %(default)s)")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="(default %(default)s)")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="(default %(default)s)")
    parser.add_argument("--samples", type=int, default=2000, help="generated images that are evaluated")
    parser.add_argument("--ablate", action="store_true", help=f"also {DEFAULT_RECIPE} without each part")
    parser.add_argument("--quick", "--must", action="store_true", help="2,000 images, one seed, two recipes")
    parser.add_argument(
        "--choose", action="store_true", help=f"also what ways of choosing do to {DEFAULT_RECIPE}'s samples"
    )
    parser.add_argument(
        "--join",
        type=Path,
        action="append",
        default=[],
        metavar="JSON",
        help="cells of an earlier run as well",
    )
    parser.add_argument(
        "--rates",
        default="",
        metavar="RECIPE=N,…",
        help="images a second of another machine, for as many epochs as it had (default: measured here)",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        default=1,
        help="trainings side by side, on a share of the cores each; with --rates",
    )
    parser.add_argument("--name", default="", help="of the file in benchmarks/results, behind the date")
    parser.add_argument("--no-write", action="store_true", help="print only; no file in benchmarks/results")
    options = parser.parse_args()
    plan = _plan(options)
    given = {
        name: float(rate) for name, _, rate in (one.partition("=") for one in options.rates.split(",") if one)
    }
    if options.at_once > 1 and (unknown := {one.variant for one in plan} - given.keys()):
        parser.error(f"--at-once: how fast is {', '.join(sorted(unknown))} on all cores? --rates says it")
    print(
        f"{len(plan)} trainings of {options.minutes:g} min: about {_hours(plan, options.minutes)}", flush=True
    )
    work = options.work.absolute()
    workers = ("--cpu-workers", str(options.at_once)) if options.at_once > 1 else ("--gpus", "none")
    with Queue(work / "home", workers=workers) as queue:
        study = Study(work, queue, minutes=options.minutes, samples=options.samples)
        study.take_rates(given)
        for cell in {one.variant: one for one in plan}.values():  # first, so that nothing need be quiet after
            print(f"{cell.variant}: {study.rate(cell):.0f} images/s here", flush=True)
        if options.at_once > 1:
            for cell in plan:
                study.begin(cell)
        done: list[dict[str, Any]] = []
        for cell in plan:
            print(f"{time.strftime('%H:%M')} {cell.key} …", flush=True)
            facts = study.measure(cell)
            done.append(facts)
            print(shown(cell, facts), flush=True)
            (work / "facts.json").write_text(json.dumps(done, indent=1))
        chosen: list[dict[str, Any]] = []
        for cell in plan if options.choose else ():
            if cell.variant == DEFAULT_RECIPE:
                print(f"{time.strftime('%H:%M')} choosing from {cell.key} …", flush=True)
                chosen += study.choices(cell)
        if not options.no_write:
            for path in options.join:
                cells_there, choices_there = joined(path, done)
                done += cells_there
                chosen += choices_there
            about = {"minutes": options.minutes, "name": options.name, "choices": chosen, "rates": given}
            print(f"written: {write(done, **about).name}")
    return 0


def _plan(options: argparse.Namespace) -> list[Cell]:
    styles, seeds = options.styles.split(","), [int(one) for one in options.seeds.split(",")]
    sizes, recipes = [int(one) for one in options.sizes.split(",")], options.recipes.split(",")
    if options.quick:
        sizes, recipes, seeds = [2000], ["dcgan", DEFAULT_RECIPE], [0]
    plan = list(cells(styles, sizes, recipes, seeds))
    if options.ablate:
        whole = DEFAULT_RECIPE in recipes
        plan += [one for one in ablation(styles[0], sizes[0], seeds) if one.without or not whole]
    return plan


def _hours(plan: Sequence[Cell], minutes: float) -> str:
    whole = len(plan) * (minutes + 1)
    return f"{whole / 60:.1f} h" if whole >= 90 else f"{whole:.0f} min"


if __name__ == "__main__":
    sys.exit(main())
