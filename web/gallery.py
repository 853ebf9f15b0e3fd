"""Facts of a gallery of generated images, and of one image."""

import hashlib
import shlex
from typing import Any

from jobs.errors import GanqError, StorageError
from jobs.states import JobState
from storage.db.rows import Job
from storage.results.formats import bytes_of
from storage.volume.stars import read_stars
from web import html, sheets
from web.manifest import ManifestIndex, index_of
from web.site import Site

OPTIONS = {
    "seed": (0, "--seed"),
    "class_name": (None, "--class"),
    "truncation": (None, "--truncation"),
    "reject": (None, "--reject"),
    "noise_mean": (0.0, "--noise-mean"),
    "noise_std": (1.0, "--noise-std"),
    "micro_batch": (64, "--micro-batch"),
}
"""Fields of a spec on which an image depends: their default, and their option."""


def manifest_sha256(job: Job) -> str:
    return str((job.result or {}).get("manifest_sha256"))


def stars_of(site: Site, job: Job) -> list[int]:
    return read_stars(site.volume, job.id, manifest_sha256(job))


def gallery_facts(site: Site, job: Job) -> html.Facts | None:
    """Return what the browser needs to show sheets; None for a job that publishes no images."""
    if job.kind != "generate":
        return None
    waiting = job.state is not JobState.SUCCEEDED
    if waiting or site.volume_trouble() is not None or "deleted_at" in (job.result or {}):
        return {"count": 0, "waiting": waiting, "error": None}
    try:
        index = index_of(site, job)
        key = ("side", job.id, manifest_sha256(job))
        side = site.indexes.get_or_make(key, lambda: sheets.side_of(index), lambda _: 64)
    except GanqError as exc:
        return {"count": 0, "waiting": False, "error": html.cut(exc.message)}
    stars = stars_of(site, job)
    return {
        "count": index.count,
        "waiting": False,
        "error": None,
        "side": side,
        "rows": sheets.ROWS,
        "widths": list(sheets.WIDTHS),
        "scored": has_scores(job),
        "version": manifest_sha256(job)[:16],
        "stars": [one for one in stars if one < index.count],
        "url": f"/jobs/{job.id}",
    }


def has_scores(job: Job) -> bool:
    return job.spec.get("keep") is not None or job.spec.get("reject") is not None


def image_facts(site: Site, job: Job, index: ManifestIndex, number: int) -> html.Facts:
    """Return everything that is needed to make an image again."""
    line = index.line(number)
    problem = None
    try:
        data = bytes_of(index.made(number))
        if hashlib.sha256(data).hexdigest() != line["sha256"]:
            problem = "the file has changed since it was published"
    except (OSError, StorageError) as exc:
        problem = f"the file is missing or torn: {html.cut(exc, 200)}"
    pinned: dict[str, Any] = (job.inputs or {}).get("checkpoint") or {}
    source = job.spec.get("source")
    return {
        "index": number,
        "draw": line.get("draw"),
        "seed": line.get("seed"),
        "score": line.get("score"),
        "class": html.cut(line["class"], 120) if line.get("class") is not None else None,
        "sha256": str(line["sha256"])[:64],
        "bytes": line["bytes"],
        "file": html.cut(line.get("member") or line["file"], 200),
        "problem": problem,
        "source": source if isinstance(source, int) else None,
        "epoch": pinned.get("epoch"),
        "checkpoint_sha256": pinned.get("manifest_sha256", pinned.get("sha256")),
        "command": command(job, line),
        "url": f"/jobs/{job.id}/images/{number}.png?v={str(line['sha256'])[:16]}",
        "starred": number in stars_of(site, job),
    }


def command(job: Job, line: dict[str, Any]) -> str:
    """Return the command that makes one image again."""
    pinned: dict[str, Any] = (job.inputs or {}).get("checkpoint") or {}
    checkpoint = pinned.get("epoch", job.spec.get("checkpoint", "best"))
    words = ["ganq", "submit", "generate", "--from", str(job.spec.get("source"))]
    words += ["--checkpoint", str(checkpoint)]
    if job.spec.get("interpolate"):
        words += ["--interpolate", ",".join(map(str, job.spec["interpolate"]))]
        words += ["--frames", str(job.spec.get("frames") or 60 * (len(job.spec["interpolate"]) - 1))]
    else:
        words += ["--seeds", str(line.get("draw"))]
    for name, (usual, option) in OPTIONS.items():
        if (value := job.spec.get(name, usual)) != usual:
            words += [option, str(value)]
    return shlex.join(words)
