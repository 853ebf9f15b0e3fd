"""Prometheus metrics of the job table, for a scrape with the login token: see docs/deploy/monitoring.md."""

from importlib.util import find_spec
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response


def page(request: Request) -> Response:
    """Return the metrics; the collector keeps its answer for 15 s."""
    if find_spec("prometheus_client") is None:
        return PlainTextResponse("metrics need: pip install 'ganq[metrics]'\n", 501)
    from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

    state = request.app.state
    if not hasattr(state, "metrics"):
        from worker.table_metrics import TableMetrics

        registry = CollectorRegistry()
        registry.register(cast(Any, TableMetrics(state.site.database, state.site.settings)))
        state.metrics = registry
    return Response(generate_latest(state.metrics), media_type=CONTENT_TYPE_LATEST)
