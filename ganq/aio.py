"""
The asynchronous client: the verbs of ganq.Client and ganq.Job as coroutines, over a server's REST API.

Requests run on httpx's asynchronous client. What reads or writes files (uploads, downloads, decoding) runs on
a thread.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union
from urllib.parse import quote

from ganq.client import options_of_spec, settings_of, with_template
from ganq.job import JobAttributes
from ganq.notices import report
from ganq.polling import poll_delay_s
from ganq.references import reference_text
from ganq.remote.api import PREFIX, RETRIED_AFTER_S, Api
from ganq.remote.files import GIVE_UP_S, PAUSE_S, EventParser, RemoteImage, image_of
from ganq.remote.rows import checkpoint_row, event_row, job_row
from ganq.remote.session import RemoteSession, open_remote
from jobs.errors import ConfigError, ServerUnavailableError, SpecError

if TYPE_CHECKING:
    from os import PathLike
    from types import TracebackType
    from typing import Self

    import httpx
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image as PILImage

    from ganq.generator import Generator
    from jobs.specs import Spec
    from storage.db.rows import Checkpoint, Event
    from storage.settings import Settings

AsyncReference = Union["AsyncJob", int, str, "PathLike[str]"]
"""A job, its id or its name; of an evaluation also the path of images."""


def aconnect(where: "Settings | str | None" = None, *, token: str | None = None) -> "AsyncClient":
    """
    Return an asynchronous client of a server; nothing is sent yet.

    Args:
        where: URL of the server ('https://ganq.lab.example'), or settings; None: GANQ_API_URL.
        token: for the server; None: that of GANQ_API_TOKEN_FILE.

    Raises:
        ConfigError: a setting is invalid, or names no server.
        UnauthenticatedError: there is no token.
    """
    return AsyncClient(settings_of(where, token))


class AsyncApi:
    """
    Requests to a server on httpx's asynchronous client, with its errors as ganq's own.

    Args:
        api: has the address, the token, and the reading of errors.
    """

    def __init__(self, api: Api) -> None:
        self.api = api
        self._client: httpx.AsyncClient | None = None

    @property
    def client(self) -> "httpx.AsyncClient":
        if self._client is None:
            import httpx

            self._client = httpx.AsyncClient(**self.api.options())
        return self._client

    async def get(self, path: str, **params: Any) -> Any:
        """Return the JSON of an address; see ganq.remote.api.Api.get()."""
        given = {name: value for name, value in params.items() if value is not None}
        return self.api.object_of(await self.repeated("GET", path, params=given))

    async def post(self, path: str, body: Mapping[str, Any], *, key: str | None = None) -> Any:
        """Send JSON and return the answer; see ganq.remote.api.Api.post()."""
        if key is None:
            return self.api.object_of(await self.send("POST", path, json=dict(body)))
        headers = {"Idempotency-Key": key}
        return self.api.object_of(await self.repeated("POST", path, json=dict(body), headers=headers))

    async def send(self, method: str, path: str, **options: Any) -> "httpx.Response":
        """
        Send one request.

        Raises:
            GanqError: that of the server.
            ServerUnavailableError: it does not answer.
        """
        with self.api.unavailable():
            answer = await self.client.request(method, self.api.url + PREFIX + path, **options)
        self.api.require_success(answer)
        return answer

    async def repeated(self, method: str, path: str, **options: Any) -> "httpx.Response":
        """Send a request that may be repeated; try a few times if the server does not answer."""
        for pause in RETRIED_AFTER_S:
            try:
                return await self.send(method, path, **options)
            except ServerUnavailableError:
                await asyncio.sleep(pause)
        return await self.send(method, path, **options)

    @asynccontextmanager
    async def stream(self, path: str, headers: Mapping[str, str]) -> "AsyncIterator[httpx.Response]":
        """Open an answer that is read piece by piece; see ganq.remote.api.Api.stream()."""
        with self.api.unavailable():
            url = self.api.url + PREFIX + path
            async with self.client.stream("GET", url, headers=dict(headers)) as answer:
                if answer.is_error or answer.is_redirect:
                    await answer.aread()
                self.api.require_success(answer)
                yield answer

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()
        self._client = None
        self.api.close()


@dataclass(frozen=True)
class AsyncSweep:
    """Jobs that were submitted in one transaction."""

    id: str
    name: str
    jobs: "tuple[AsyncJob, ...]"

    async def wait(self, timeout: float | None = None, *, check: bool = True) -> "AsyncSweep":
        """Wait until all jobs have ended; see ganq.Sweep.wait()."""
        await wait_for(self.jobs, timeout)
        for job in self.jobs if check else ():
            job.check()
        return self


class AsyncClient:
    """
    Access to a server from a coroutine. aconnect() creates it.

    It belongs to one event loop. It is an asynchronous context manager that closes its connections.

    Args:
        settings: with the address of a server.
    """

    def __init__(self, settings: "Settings") -> None:
        if not settings.api_url:
            raise ConfigError(
                "the asynchronous client needs a server",
                hint="ganq.aconnect('https://…', token=…), or GANQ_API_URL; ganq web is one",
            )
        self.settings = settings
        self._remote: RemoteSession = open_remote(settings, "python")
        self._api = AsyncApi(self._remote.api)

    # --- submit -------------------------------------------------------------------------------

    async def train(self, **options: Any) -> "AsyncJob":
        """Submit a training; local data sets are uploaded. See ganq.Client.train()."""
        return await self._submit("train", options)

    async def generate(self, model: "AsyncReference | None" = None, **options: Any) -> "AsyncJob":
        """Submit a generation of images; see ganq.Client.generate()."""
        return await self._submit("generate", {"source": model, **options} if model is not None else options)

    async def evaluate(self, subject: "AsyncReference", **options: Any) -> "AsyncJob":
        """Submit an evaluation; see ganq.Client.evaluate()."""
        return await self._submit("evaluate", {"subject": subject, **options})

    async def submit(self, spec: "Spec", **options: Any) -> "AsyncJob":
        """Submit a spec; see ganq.Client.submit()."""
        return await self._submit(spec.kind, options_of_spec(spec) | options)

    async def sweep(self, kind: str, over: Mapping[str, Iterable[Any]], **options: Any) -> AsyncSweep:
        """Submit a job for each combination of values in one transaction; see ganq.Client.sweep()."""
        from ganq.submission.options import read_axes

        body, key, given = await self._body(kind, options)
        axes = {name: list(values) for name, values in over.items()}
        read_axes(kind, axes, given)
        answer = await self._api.post("/sweeps", {**body, "over": axes}, key=key)
        self._report(answer["notices"])
        return AsyncSweep(answer["sweep"], answer["name"], tuple(await self._many(answer["jobs"])))

    async def submit_file(self, path: "str | PathLike[str]") -> "list[AsyncJob]":
        """Submit the jobs of a job file in one transaction; see ganq.Client.submit_file()."""
        from ganq.submission.jobfile import read_file

        jobs = await asyncio.to_thread(lambda: read_file(Path(path).read_bytes(), Path(path).name))
        made, notices = await asyncio.to_thread(self._remote.submit_file, jobs)
        report(notices)
        return await self._many([one for ids in made for one in ids])

    async def _submit(self, kind: str, options: Mapping[str, Any]) -> "AsyncJob":
        body, key, _ = await self._body(kind, options)
        answer = await self._api.post("/jobs", body, key=key)
        self._report(answer["notices"])
        return AsyncJob(self, answer["job"])

    async def _body(
        self, kind: str, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], str, dict[str, Any]]:
        """Check a request, upload what is local, and return the body, its key and the options of the spec."""
        from ganq.submission.requests import read_request

        def prepare() -> tuple[dict[str, Any], str, dict[str, Any]]:
            request = read_request(kind, with_template(self.settings, kind, options))
            return *self._remote.body(kind, request.given, request.job), request.given

        return await asyncio.to_thread(prepare)

    def _report(self, notices: Iterable[str]) -> None:
        report([*self._remote.take_notices(), *notices])

    # --- find ---------------------------------------------------------------------------------

    async def job(self, reference: "AsyncReference") -> "AsyncJob":
        """
        Return a job.

        Raises:
            JobNotFoundError: there is none.
        """
        return AsyncJob(self, await self._api.get(_path(reference_text(reference))))

    async def jobs(
        self,
        *,
        state: str | Sequence[str] | None = None,
        kind: str | None = None,
        user: str | None = None,
        name: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        sweep: str | None = None,
        since: float | str | None = None,
        limit: int | None = None,
    ) -> "AsyncIterator[AsyncJob]":
        """Yield jobs, newest first, read in pages; see ganq.Client.jobs()."""
        texts = [key if value is None else f"{key}={value}" for key, value in (labels or {}).items()]
        params = {
            "state": state if state is None or isinstance(state, str) else ",".join(state),
            "kind": kind,
            "user": user,
            "name": name,
            "label": ",".join(texts) or None,
            "sweep": sweep,
            "since": f"{since:g}s" if isinstance(since, int | float) else since,
        }
        left, before = limit, None
        while left is None or left > 0:
            page = await self._api.get("/jobs", **params, before=before, limit=min(500, left or 500))
            for one in page["jobs"]:
                yield AsyncJob(self, one)
            if not page["next"]:
                return
            before = page["jobs"][-1]["id"]
            left = None if left is None else left - len(page["jobs"])

    async def _many(self, ids: Sequence[int]) -> "list[AsyncJob]":
        found: list[AsyncJob] = []
        for start in range(0, len(ids), 500):
            page = await self._api.get("/jobs", ids=",".join(map(str, ids[start : start + 500])))
            found += [AsyncJob(self, one) for one in page["jobs"]]
        return found

    async def drain(self, *names: str, host: str | None = None, wait: float | None = None) -> list[str]:
        """
        Have workers return their jobs and exit; see ganq.Client.drain().

        Raises:
            SpecError: neither names nor a host is given.
            NotFoundError: there is no such worker.
            TimeoutError: not all have exited in time; the request stays.
        """
        if not names and host is None:
            raise SpecError("drain takes names of workers, or a host")
        there = (await self._api.get("/workers"))["workers"]
        chosen = names or [one["name"] for one in there if one["host"] == host and one["state"] != "stopped"]
        for one in chosen:
            await self._api.post(f"/workers/{quote(one, safe='')}/drain", {})
        started, started_at = time.monotonic(), {one["name"]: one["started_at"] for one in there}
        while wait is not None:
            there = (await self._api.get("/workers"))["workers"]
            left = [
                one["name"]
                for one in there
                if one["name"] in chosen
                and one["state"] != "stopped"
                and one["started_at"] == started_at[one["name"]]  # else another process has its name
            ]
            if not left:
                break
            if time.monotonic() - started >= wait:
                raise TimeoutError(f"not exited within {wait:g} s: {', '.join(left)}; the request stays")
            await asyncio.sleep(0.5)
        return list(chosen)

    async def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        await self._api.close()

    async def __aenter__(self) -> "Self":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        await self.close()


class AsyncJob(JobAttributes):
    """One job of a server. Its attributes are as of the last read: refresh(), wait() and the requests."""

    def __init__(self, client: AsyncClient, data: dict[str, Any]) -> None:
        self._client: AsyncClient = client
        self._read(data)

    def _read(self, data: dict[str, Any]) -> "AsyncJob":
        self._data, self._row = data, job_row(data)
        return self

    # --- what it is ---------------------------------------------------------------------------

    @property
    def status(self) -> str:
        """The state with its reason, e.g. 'waiting on 12' or 'retry in 9 s'."""
        return str(self._data["status"])

    @property
    def labels(self) -> dict[str, str]:
        """Labels that a user has given the job."""
        return dict(self._data.get("labels") or {})

    @property
    def progress(self) -> dict[str, Any]:
        """Progress as of the last heartbeat: `done`, `total`, `unit`, `rate`, of a training `epoch`."""
        return dict(self._data.get("progress") or {})

    async def refresh(self) -> "AsyncJob":
        """
        Read the job again.

        Raises:
            ServerUnavailableError: the server does not answer.
        """
        return self._read(await self._client._api.get(self._path()))

    async def wait(self, timeout: float | None = None, *, check: bool = True) -> "AsyncJob":
        """Wait until the job has ended, also while the server is away; see ganq.Job.wait()."""
        await wait_for([self], timeout)
        if check:
            self.check()
        return self

    async def events(self) -> "list[Event]":
        """Return the history of the job, oldest event first."""
        found: list[Event] = []
        after: int | None = 0
        while after is not None:
            page = await self._client._api.get(self._path("/events"), after=after, limit=1000)
            found += [event_row(one) for one in page["events"]]
            after = page["next_after"]
        return found

    async def logs(self, *, follow: bool = False, all_attempts: bool = False) -> AsyncIterator[str]:
        """
        Yield the lines of the log.

        Args:
            follow: wait for new lines, and for later attempts, until the job has ended; a connection that
                breaks off is opened again behind the last line.
            all_attempts: include the attempts before the newest.

        Raises:
            ServerUnavailableError: the server was away for ten minutes.
        """
        await self.refresh()
        newest = self._row.attempt
        whole = range(1 if all_attempts else max(newest, 1), newest + (0 if follow else 1))
        for attempt in whole:
            params = {"attempt": attempt}
            text = (await self._client._api.repeated("GET", self._path("/log"), params=params)).content
            for line in text.decode(errors="replace").splitlines():
                yield line
        if follow:
            async for line in self._followed():
                yield line

    async def _followed(self) -> AsyncIterator[str]:
        last, pause, since = "", PAUSE_S[0], time.monotonic()
        while True:
            headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last} if last else {})}
            try:
                async with self._client._api.stream(self._path("/log"), headers) as answer:
                    events = EventParser()
                    async for line in answer.aiter_lines():
                        if (event := events.line(line)) is None:
                            continue
                        kind, data, event_id = event
                        pause, since = PAUSE_S[0], time.monotonic()
                        if kind == "end":
                            return
                        if kind == "line":
                            last = event_id
                            yield data["text"]
            except ServerUnavailableError:
                if time.monotonic() - since > GIVE_UP_S:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_S[1])

    # --- its files ----------------------------------------------------------------------------

    async def images(self) -> "AsyncIterator[AsyncImage]":
        """Yield the images of a generation that has succeeded, in order; each is fetched when it is used."""
        after: int | None = -1
        while after is not None:
            page = await self._client._api.get(
                self._path("/images"), after=None if after < 0 else after, limit=1000
            )
            for one in page["images"]:
                yield AsyncImage(self._client._api, self._path(f"/images/{one['sha256']}"), image_of(one))
            after = page["next_after"]

    async def checkpoints(self) -> "list[Checkpoint]":
        """Return the checkpoints, oldest first: `epoch`, `step`, `metric`."""
        found = await self._client._api.get(self._path("/checkpoints"))
        return [checkpoint_row(one) for one in found["checkpoints"]]

    async def generator(self, checkpoint: str | int = "best", *, device: str = "auto") -> "Generator":
        """Load the generator of a training or an import into this process; see ganq.Job.generator()."""
        from ganq.client import Client

        client = Client(self.settings)
        return await asyncio.to_thread(lambda: client.job(self.id).generator(checkpoint, device=device))

    async def download(self, out: "str | PathLike[str]", *, only: str | None = None) -> Path:
        """
        Copy the images to a folder: resumable, each compared with its SHA-256.

        Args:
            only: 'images', 'grids' or 'best'; None: all.

        Returns:
            The folder, or with 'best' the file.
        """
        await self.refresh()
        target = Path(out).expanduser().absolute()
        return await asyncio.to_thread(self._client._remote.download, self._row, target, only)

    # --- requests -----------------------------------------------------------------------------

    async def cancel(self) -> "AsyncJob":
        """Cancel the job: a queued one at once, a running one at its next step."""
        return await self._verb("cancel")

    async def hold(self) -> "AsyncJob":
        """Prevent the queued job from starting until release()."""
        return await self._verb("hold")

    async def release(self) -> "AsyncJob":
        """Allow the held or paused job to start."""
        return await self._verb("release")

    async def pause(self, *, reason: str | None = None, wait: float | None = None) -> "AsyncJob":
        """Stop the running job with its work saved and hold it until resume(); see ganq.Job.pause()."""
        await self._verb("pause", {} if reason is None else {"reason": reason})
        started = time.monotonic()
        while wait is not None and self.state == "running":
            waited_s = time.monotonic() - started
            if waited_s >= wait:
                raise TimeoutError(f"job {self.id} has not stopped within {wait:g} s; the request stays")
            await asyncio.sleep(min(poll_delay_s(waited_s), wait - waited_s))
            with suppress(ServerUnavailableError):
                await self.refresh()
        return self

    async def resume(self) -> "AsyncJob":
        """Continue the paused job: the same as release()."""
        return await self._verb("resume")

    async def move(self, *, before: "AsyncReference") -> "AsyncJob":
        """Move the queued job before another one of the same user and queue."""
        return await self._verb("move", {"before": reference_text(before)})

    async def keep(self, *, undo: bool = False) -> "AsyncJob":
        """Protect the results from `ganq gc` and `ganq rm`; `undo` ends that."""
        return await self._verb("keep", {"undo": True} if undo else {})

    async def retry(self, *, with_waiting: bool = False) -> "AsyncJob":
        """Submit the ended job again and return the new job; see ganq.Job.retry()."""
        answer = await self._client._api.post(self._path("/retry"), {"with_waiting": with_waiting})
        report(answer["notices"])
        return AsyncJob(self._client, answer["job"])

    async def set(
        self,
        *,
        priority: int | None = None,
        name: str | None = None,
        note: str | None = None,
        labels: Mapping[str, str | None] | None = None,
    ) -> "AsyncJob":
        """Change priority, name, note or labels; see ganq.Job.set()."""
        given = {"priority": priority, "name": name, "note": note, "labels": labels and dict(labels)}
        body = {key: value for key, value in given.items() if value is not None}
        return self._read((await self._client._api.send("PATCH", self._path(), json=body)).json()["job"])

    async def _verb(self, verb: str, body: Mapping[str, Any] | None = None) -> "AsyncJob":
        answer = await self._client._api.post(self._path(f"/{verb}"), body or {})
        report(answer.get("notices", []))
        return self._read(answer["job"])

    def _path(self, rest: str = "") -> str:
        return _path(str(self.id)) + rest

    @property
    def settings(self) -> "Settings":
        """The settings of its client."""
        return self._client.settings


class AsyncImage:
    """One image of a server; its bytes are fetched when they are asked for."""

    def __init__(self, api: AsyncApi, path: str, image: RemoteImage) -> None:
        self._api, self._address, self._image = api, path, image
        self.index = image.index
        """Place in the result; with `keep` the rank."""
        self.seed = image.seed
        self.sample_index = image.sample_index
        self.score = image.score
        self.sha256 = image.sha256
        self.class_name = image.class_name

    def __repr__(self) -> str:
        return f"<ganq.AsyncImage {self.index}: sha256 {self.sha256[:12]}>"

    async def _fetched(self) -> RemoteImage:
        data = (await self._api.repeated("GET", self._address)).content
        return replace(self._image, _fetch=lambda: data)

    async def to_bytes(self) -> bytes:
        """Return the PNG unchanged, compared with its SHA-256; see ganq.Image.to_bytes()."""
        return (await self._fetched()).to_bytes()

    async def to_numpy(self) -> "NDArray[np.uint8]":
        """Return the pixels: uint8, shape (height, width, 3)."""
        return await asyncio.to_thread((await self._fetched()).to_numpy)

    async def to_pil(self) -> "PILImage":
        """Return the image as a PIL image, mode RGB."""
        return await asyncio.to_thread((await self._fetched()).to_pil)


async def wait_for(jobs: Sequence[AsyncJob], timeout: float | None = None) -> None:
    """
    Wait until all jobs have ended, also while the server is away.

    Raises:
        TimeoutError: they have not ended in time, in seconds.
    """
    started = time.monotonic()
    left = [job for job in jobs if not job._row.state.terminal]
    while left:
        polled = time.monotonic()
        try:
            for start in range(0, len(left), 500):
                some = {job.id: job for job in left[start : start + 500]}
                page = await left[0]._client._api.get("/jobs", ids=",".join(map(str, some)))
                for one in page["jobs"]:
                    some[one["id"]]._read(one)
        except ServerUnavailableError:
            pass  # it waits for the server as a command does
        left = [job for job in left if not job._row.state.terminal]
        now = time.monotonic()
        if left and timeout is not None and now - started >= timeout:
            ids = ", ".join(str(job.id) for job in left[:10])
            raise TimeoutError(f"not ended within {timeout:g} s: job {ids}; it continues")
        if left:
            pause = poll_delay_s(now - started, query_s=now - polled)
            await asyncio.sleep(pause if timeout is None else min(pause, max(0.0, started + timeout - now)))


def _path(reference: str) -> str:
    return f"/jobs/{quote(reference, safe='')}"
