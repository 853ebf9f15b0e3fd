"""Decoded data sets, and the files that were left out of each, with reasons."""

import json
import re
from collections import Counter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jobs.errors import NotFoundError
from storage.volume.layout import FINGERPRINT
from web import html
from web.files import require_volume
from web.site import Site

MAX_SKIPPED = 500
MAX_REPORT_BYTES = 64 << 20


def page(request: Request) -> Response:
    site: Site = request.app.state.site
    return html.answer(request, "datasets.html", lambda: _listed(site))


def _listed(site: Site) -> html.Facts:
    from storage.datasets.cache import list_datasets  # with all that decodes images: not at the start

    trouble = site.volume_trouble()
    found = list_datasets(site.volume) if trouble is None else []
    return {
        "volume_trouble": trouble,
        "datasets": [{**one, "source": html.cut(one["source"], 300)} for one in reversed(found)],
    }


def one(request: Request) -> Response:
    site: Site = request.app.state.site
    fingerprint = request.path_params["fingerprint"]
    if not FINGERPRINT.fullmatch(fingerprint):
        raise NotFoundError("there is no such data set", hint="/datasets lists them")
    return html.answer(request, "dataset.html", lambda: _facts(site, fingerprint))


def _facts(site: Site, fingerprint: str) -> html.Facts:
    from storage.datasets.cache import list_datasets

    require_volume(site)
    known = {one["fingerprint"]: one for one in list_datasets(site.volume)}
    if fingerprint not in known:
        raise NotFoundError("there is no such data set", hint="/datasets lists them")
    report = _report(site, fingerprint)
    skipped = [one for one in report.get("skipped") or [] if isinstance(one, dict)]
    reasons = Counter(html.cut(one.get("reason"), 100) for one in skipped)
    return {
        "dataset": {**known[fingerprint], "source": html.cut(known[fingerprint]["source"], 300)},
        "classes": [html.cut(name, 80) for name in known[fingerprint].get("classes") or []][:200],
        "reasons": [{"reason": reason, "count": number} for reason, number in reasons.most_common()],
        "skipped": [
            {key: html.cut(one.get(key), 300) for key in ("name", "reason", "detail")}
            for one in skipped[:MAX_SKIPPED]
        ],
        "skipped_more": max(0, len(skipped) - MAX_SKIPPED),
        "ignored": [
            {"suffix": html.cut(suffix, 40), "count": number}
            for suffix, number in (report.get("ignored") or {}).items()
        ],
        "used": report.get("used"),
    }


def _report(site: Site, fingerprint: str) -> dict[str, Any]:
    path = site.volume.dataset(fingerprint) / "report.json"
    try:
        if path.stat().st_size > MAX_REPORT_BYTES:
            return {}
        found = json.loads(re.sub(rb"\bNaN\b", b"null", path.read_bytes()))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
