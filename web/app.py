"""The ASGI application: routes, error pages, background tasks."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import anyio.to_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Match, Route, Router
from starlette.types import Receive, Scope, Send

from jobs.errors import (
    DatabaseUnavailableError,
    ForbiddenError,
    GanqError,
    NotFoundError,
    SpecError,
    VolumeError,
)
from storage.db.engine import Database
from storage.db.tokens import Tokens
from storage.settings import Settings
from web import files, html
from web.files import on_volume
from web.live import Revisions
from web.pages import datasets, images, log, metrics, queue, run, sweep, workers
from web.problems import Problem, problem
from web.security import API, Access, Gate
from web.site import Site

THREADS = 16
"""Threads that serve requests."""


def create_app(
    settings: Settings, database: Database, access: Access, *, allow_changes: bool = False
) -> Gate:
    """
    Create the ASGI application.

    Args:
        database: open; its schema has been checked.
        allow_changes: whether jobs can be cancelled, retried and so on from the page.
    """
    site = Site(settings, database, allow_changes=allow_changes)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        revisions = Revisions(site.queries)
        site.revision = lambda: revisions.current
        app.state.revisions = revisions
        polling = asyncio.create_task(revisions.poll())
        yield
        polling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await polling
        database.dispose()

    app = Starlette(
        routes=[
            Route("/", queue.page),
            Route("/jobs/{job:str}", on_volume(run.page)),
            Route("/jobs/{job:str}/curves", on_volume(run.curves)),
            Route("/jobs/{job:str}/samples/{attempt:int}/{epoch:int}.png", on_volume(files.sample)),
            Route("/jobs/{job:str}/thumb", on_volume(files.thumbnail)),
            Route("/jobs/{job:str}/grid", on_volume(files.last_grid)),
            Route("/jobs/{job:str}/files/{name:str}", on_volume(files.result_file)),
            Route("/jobs/{job:str}/images", on_volume(images.page)),
            Route("/jobs/{job:str}/images/{index:int}", on_volume(images.facts_of_one)),
            Route("/jobs/{job:str}/images/{index:int}.png", on_volume(images.picture)),
            Route("/jobs/{job:str}/sheets/{sheet:int}", on_volume(images.sheet)),
            Route("/jobs/{job:str}/stars.zip", on_volume(images.starred_zip)),
            Route("/jobs/{job:str}/log", on_volume(log.page)),
            Route("/jobs/{job:str}/events", on_volume(log.events)),
            Route("/jobs/{job:str}/{action:str}", _act, methods=["POST"]),
            Route("/sweeps/{sweep:str}", sweep.page),
            Route("/workers", workers.page),
            Route("/datasets", on_volume(datasets.page)),
            Route("/datasets/{fingerprint:str}", on_volume(datasets.one)),
            Route("/live", _live),
            Route("/healthz", _health),
            Route("/metrics", metrics.page),
            Route("/static/{version:str}/{name:path}", files.static),
            _Api(),
            Route("/favicon.ico", lambda request: RedirectResponse("/static/0/icon.svg")),
        ],
        exception_handlers={GanqError: _ganq_error, HTTPException: _http_error, Exception: _unexpected_error},
        lifespan=lifespan,
    )
    app.state.site = site
    app.state.access = access
    return Gate(app, access, Tokens(database), settings.user)  # outermost, so that errors pass it, too


class _Api(BaseRoute):
    """The REST API, imported by its first request: with pydantic it takes a third of the server's start."""

    def __init__(self) -> None:
        self.router: Router | None = None

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        ours = scope["type"] == "http" and scope["path"].startswith(API)
        return (Match.FULL if ours else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.router is None:
            self.router = Router(await run_in_threadpool(self._routes), redirect_slashes=False)
        await self.router(scope, receive, send)

    def _routes(self) -> list[BaseRoute]:
        from web.api.routes import routes

        return list(routes())


def _act(request: Request) -> Response:
    from web import actions  # with the store and Celery: not at the start

    return actions.act(request)


async def _live(request: Request) -> Response:
    revisions: Revisions = request.app.state.revisions
    return await revisions.stream(request)


async def _health(request: Request) -> Response:
    away = request.app.state.revisions.away
    return PlainTextResponse(
        "ok\n" if away is None else "the job table does not answer\n", 503 if away else 200
    )


def _error(request: Request, status: int, message: str, hint: str | None, code: str) -> Response:
    if request.url.path.startswith(API):
        return problem(Problem(status, code, message, hint))
    if html.wants_json(request) or request.method == "POST":
        error = {"code": code, "message": message, "hint": hint}
        return html.json_answer({"error": error}, status)
    body = html.render(
        "error.html",
        status=status,
        message=message,
        hint=hint,
        code=code,
        request=request,
        site=request.app.state.site,
        revision="",
        part=html.FRAGMENT in request.headers,
        user=None,
        may_change=False,
        change_token="",
    )
    return Response(body, status, media_type="text/html")


def _ganq_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, GanqError)
    if isinstance(exc, NotFoundError):
        status = 404
    elif isinstance(exc, DatabaseUnavailableError | VolumeError):
        status = 503
    else:
        status = 403 if isinstance(exc, ForbiddenError) else 400 if isinstance(exc, SpecError) else 409
    return _error(request, status, html.cut(exc.message), html.cut(exc.hint or ""), exc.code)


def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    what = "there is no such page" if exc.status_code == 404 else str(exc.detail)
    return _error(request, exc.status_code, what, "the queue lists all jobs", "NOT_FOUND")


def _unexpected_error(request: Request, exc: Exception) -> Response:
    """Return one line for an unexpected error; uvicorn logs the traceback."""
    return _error(
        request,
        500,
        f"this page failed ({type(exc).__name__})",
        "the server's log says where",
        "INTERNAL_ERROR",
    )
