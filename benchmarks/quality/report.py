"""What the study found: a JSON file with every figure, a page with the tables, and grids side by side."""

import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import DCGAN_BATCH
from benchmarks.report import RESULTS, circumstances
from jobs.renamed import renamed

PAGE = RESULTS / "quality.md"
COLUMNS = ROWS = 6
"""Of each recipe's samples in an image of the page."""
GAP = 16
MINUTES = 10.0
"""Of a training, unless --minutes says otherwise."""

Facts = dict[str, Any]


def joined(path: Path, done: Sequence[Facts]) -> tuple[list[Facts], list[Facts]]:
    """
    Add cells and choices of an earlier run, which showed as many images as those of this one: what a
    training makes follows from that, not from how long it took.

    Raises:
        ValueError: another number of images than a cell of this run that differs in its seed alone.
    """
    earlier = json.loads(path.read_text())
    cells = [renamed({"minutes": earlier["minutes"], **one}) for one in earlier["cells"]]
    alike = ("style", "pictures", "minutes", "recipe")
    for one, here in product(cells, done):
        if all(one[key] == here[key] for key in alike) and one["images"] != here["images"]:
            raise ValueError(f"{path.name}: {one['recipe']} showed {one['images']:,}, not {here['images']:,}")
    keys = (*alike, "seed")
    there = {tuple(one[key] for key in keys) for one in done}
    more = [{"from": path.name, **one} for one in cells if tuple(one[key] for key in keys) not in there]
    return more, earlier.get("choices", [])


def write(
    done: Sequence[Facts],
    *,
    minutes: float,
    name: str = "",
    choices: Sequence[Facts] = (),
    rates: Mapping[str, float] | None = None,
) -> Path:
    """
    Write results/quality-<date>[-name].json, the page, and its images.

    Args:
        done: facts of each cell.
        minutes: of the trainings of this run; those of an earlier one have theirs in their facts.
        choices: facts of each way of choosing.
        rates: images a second of each recipe, if they were given and not measured.

    Returns:
        The JSON file.
    """
    now = datetime.now(UTC)
    path = RESULTS / f"quality-{now:%Y-%m-%d}{'-' * bool(name)}{name}.json"
    about = {"at": f"{now:%Y-%m-%dT%H:%M:%SZ}", "minutes": minutes, **circumstances()}
    about["rates_given"] = dict(rates or {})
    path.write_text(
        json.dumps(
            {
                **about,
                "cells": [{key: one[key] for key in one if key != "grid"} for one in done],
                "choices": list(choices),
            },
            indent=1,
        )
        + "\n"
    )
    _side_by_side(done)
    PAGE.write_text("\n".join([*_head(about), *_tables(done), *_choosing(choices)]).rstrip() + "\n")
    return path


def ratio_table(done: Sequence[Facts]) -> list[Facts]:
    """Return medians over the seeds of each combination, and their ratio to the KID of dcgan."""
    groups: dict[tuple[str, int, float, str], list[Facts]] = defaultdict(list)
    for one in done:
        groups[one["style"], one["pictures"], one["minutes"], one["recipe"]].append(one)
    rows = []
    for (style, images, minutes, recipe), members in groups.items():
        peers = groups.get((style, images, minutes, "dcgan"), ())
        baseline = {one["seed"]: one["best"]["kid"] for one in peers}
        kids = [one["best"]["kid"] for one in members]
        ratios = [one["best"]["kid"] / baseline[one["seed"]] for one in members if one["seed"] in baseline]
        rows.append(
            {
                "style": style,
                "pictures": images,
                "recipe": recipe,
                "seeds": len(members),
                "kid": statistics.median(kids),
                "kid_spread": (min(kids), max(kids)),
                "kid_last": statistics.median(one["last"]["kid"] for one in members),
                "ratio": statistics.median(ratios) if ratios else None,
                "swd": statistics.median(one["best"]["swd"] for one in members),
                "floor": statistics.median(one["best"]["kid_floor"] for one in members),
                "precision": statistics.median(one["best"]["precision"] for one in members),
                "recall": statistics.median(one["best"]["recall"] for one in members),
                "copying": [one["best"]["copying"] for one in members],
                "grid": next((one["grid"] for one in members if "grid" in one), None),
                "minutes": minutes,
                "took_min": statistics.median(one["seconds"] for one in members) / 60,
                "images": statistics.median(one["images"] for one in members),
            }
        )
    return sorted(rows, key=lambda row: (row["style"], row["pictures"], -row["minutes"], row["kid"]))


def _head(about: Facts) -> list[str]:
    hardware = about["hardware"]
    told = ", ".join(f"{name} {rate:g}" for name, rate in about["rates_given"].items())
    by = (
        f"at rates that were measured elsewhere ({told} images a second)" if told else "by a short run before"
    )
    return [
        "# Quality at equal time",
        "",
        f"Made by `python -m benchmarks.quality`, {about['at']}, commit {about['commit']}, on",
        f"{hardware['cpu']} ({hardware['cores']} cores):",
        f"as many epochs as {about['minutes']:g} minutes hold {by};",
        f"96×96 images, ngf = ndf = 32, dcgan in batches of {DCGAN_BATCH}; one after",
        "the other through ganq's own queue. KID and FID are taken on EfficientNet-Lite0 (ImageNet), of",
        "2,000 samples of the best checkpoint beside the images that it was trained on.",
        "Less is better; the floor is that of one half of the training images against the other.",
        "",
    ]


def _tables(done: Sequence[Facts]) -> list[str]:
    lines: list[str] = []
    for row in ratio_table(done):
        title = f"## {row['style']}, {row['pictures']:,} images, {row['minutes']:g} min"
        if title not in lines:
            lines += ["", title, ""]
            name = _picture(row)
            if (RESULTS / name).exists():
                lines += [f"![samples of each recipe, in the order of the table]({name})", ""]
            lines += [
                "| recipe | KID best (spread over seeds) | to dcgan | KID last | floor | SWD | precision "
                "| recall | copies? | seeds | images seen | min |",
                "|---|---|---|---|---|---|---|---|---|---|---|---|",
            ]
        low, high = row["kid_spread"]
        ratio = "–" if row["ratio"] is None else f"**{row['ratio']:.2f}**"
        lines.append(
            f"| {row['recipe']} | {row['kid']:.4f} ({low:.4f}–{high:.4f}) | {ratio} | {row['kid_last']:.4f} "
            f"| {row['floor']:.4f} | {row['swd']:.1f} | {row['precision']:.2f} | {row['recall']:.2f} "
            f"| {', '.join(sorted(set(row['copying'])))} | {row['seeds']} | {row['images']:,.0f} "
            f"| {row['took_min']:.1f} |"
        )
    return lines


def _choosing(choices: Sequence[Facts]) -> list[str]:
    """Return the results of each selection method, as medians over the models of a style."""
    groups: dict[tuple[str, str], list[Facts]] = defaultdict(list)
    for one in choices:
        groups[one["style"], one["choice"]].append(one)
    if not groups:
        return []
    lines = [
        "",
        "## Choosing among samples",
        "",
        "2,000 images of each model of the default recipe, asked for",
    ]
    lines += ["in several ways; medians over the seeds.", ""]
    lines += ["| style | asked for | KID | SWD | variety | models |", "|---|---|---|---|---|---|"]
    for (style, choice), members in groups.items():
        kid, swd, variety = (
            statistics.median(one[name] for one in members) for name in ("kid", "swd", "variety")
        )
        lines.append(f"| {style} | `{choice}` | {kid:.3f} | {swd:.1f} | {variety:.2f} | {len(members)} |")
    return lines


def _picture(row: Facts) -> str:
    minutes = "" if row["minutes"] == MINUTES else f"-{row['minutes']:g}min"
    return f"quality-{row['style']}-{row['pictures']}{minutes}.png"


def _side_by_side(done: Sequence[Facts]) -> None:
    """Draw one image for each table: a part of each recipe's grid, in its order."""
    from PIL import Image

    groups: dict[str, list[Path]] = defaultdict(list)
    for row in ratio_table(done):
        if "without" not in row["recipe"] and row["grid"] is not None:
            groups[_picture(row)].append(Path(row["grid"]))
    for name, paths in groups.items():
        parts = [Image.open(path).convert("RGB") for path in paths]
        side = (parts[0].width - 2) * COLUMNS // 8 + 2
        whole = Image.new("RGB", (side * len(parts) + GAP * (len(parts) - 1), side), "white")
        for place, part in enumerate(parts):
            whole.paste(part.crop((0, 0, side, side)), (place * (side + GAP), 0))
        whole.save(RESULTS / name, optimize=True)
