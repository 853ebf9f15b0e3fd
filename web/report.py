"""One self-contained HTML file of a job, which opens from disk: `ganq report`."""

import base64
import io
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from jobs.errors import GanqError, NotFoundError
from storage.db.rows import Job
from storage.results.attempts import Metrics
from web import curves, html, sheets
from web.gallery import gallery_facts, has_scores
from web.manifest import index_of
from web.pages.run import head, job_facts, run_facts
from web.samples import Sample, open_image, path_of, samples_of
from web.site import Site

MAX_REPORT_BYTES = 13_000_000
"""Limit for the images, which base64 enlarges by a third: the file stays under 20 MB."""
QUALITY = 82
MAX_IMAGES = 2048
STATIC = html.WEB_FOLDER / "static"


def report(site: Site, job: Job) -> bytes:
    """
    Return the HTML file of a job.

    Raises:
        NotFoundError: the job has nothing to show yet.
        VolumeError: its files cannot be read.
    """
    from web.files import require_volume

    require_volume(site)
    if not job.attempt:
        raise NotFoundError(f"job {job.id} has not begun", hint=f"ganq status {job.id}")
    if job.kind == "train":
        return _training(site, job)
    facts = job_facts(site, job)
    shown = [_sheet(site, job, order) for order in (("best",) if has_scores(job) else ("index",))]
    return _render("report_job.html", site, {**facts, "sheets": [one for one in shown if one]})


def _training(site: Site, job: Job) -> bytes:
    run = run_facts(site, job)
    drawn = samples_of(site.volume, job)
    images = _images(site, job, drawn, (run["best"] or {}).get("epoch"))
    kept = [one for one in drawn if one.url(job.id) in images]
    run["samples"] = [{"epoch": one.epoch, "url": one.url(job.id), "at": one.at} for one in kept]
    data = {
        "facts": {"run": run, "with": []},
        "curves": curves.columns(site.volume, job, Metrics(), 1500),
        "images": images,
    }
    left_out = len(drawn) - len(kept)
    return _render("report.html", site, {**head(site, job), "data": _inline_json(data), "left_out": left_out})


def _images(site: Site, job: Job, drawn: Sequence[Sample], best: int | None) -> dict[str, str]:
    """Return grids as data URLs: all, or evenly chosen ones and the best, as many as fit."""
    found: dict[str, str] = {}
    spent = 0
    for stride in _strides(len(drawn)):
        for place, one in enumerate(drawn):
            wanted = place % stride == 0 or place == len(drawn) - 1 or one.epoch == best
            if not wanted or one.url(job.id) in found:
                continue
            try:
                grid = open_image(path_of(site.volume, job.id, one.attempt, one.epoch))
            except OSError:  # torn or deleted: the others are shown
                continue
            out = io.BytesIO()
            grid.save(out, "WEBP", quality=QUALITY, method=4)
            spent += len(out.getvalue())
            if spent > MAX_REPORT_BYTES:
                return found
            found[one.url(job.id)] = _data_url(out.getvalue())
    return found


def _strides(count: int) -> list[int]:
    """Return strides from few grids to all, so that the grids that fit are spread over the run."""
    strides = [1]
    while count // strides[-1] > 40:
        strides.append(2 * strides[-1])
    return strides[::-1]


def _data_url(data: bytes, kind: str = "image/webp") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _sheet(site: Site, job: Job, order: str) -> dict[str, Any] | None:
    facts = gallery_facts(site, job)
    if not facts or not facts["count"]:
        return None
    try:
        index = index_of(site, job)
        numbers = index.ordered(order, 0, MAX_IMAGES)
        side = facts["side"]
        parts = [
            _data_url(sheets.draw(index, numbers[start : start + 256], 16, side))
            for start in range(0, len(numbers), 256)
        ]
    except GanqError:
        return None
    return {"order": order, "count": len(numbers), "of": index.count, "parts": parts, "width": 16 * side}


def _inline_json(value: Any) -> Markup:
    """Return JSON that cannot end its <script> element."""
    return Markup(html.as_json(value).decode().replace("<", "\\u003c"))


def _render(template: str, site: Site, values: dict[str, Any]) -> bytes:
    def asset(name: str) -> Markup:
        return Markup((STATIC / name).read_text(encoding="utf-8").replace("</script", "<\\/script"))

    return html.render(template, **values, site=site, asset=asset)
