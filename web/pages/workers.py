"""All workers in the job table."""

from starlette.requests import Request
from starlette.responses import Response

from web import html, rows
from web.site import Site


def page(request: Request) -> Response:
    site: Site = request.app.state.site
    return html.answer(
        request, "workers.html", lambda: {"workers": rows.worker_cards(site, site.queries.workers())}
    )
