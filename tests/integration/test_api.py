"""The REST API: a real `ganq web` over real sockets, on SQLite and Postgres."""

import http.client
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser.serving import Answer, Server, environment
from receiver import Receiver, wait_until
from tables import event_types, set_columns

from storage.db.queries import Filter
from storage.db.tokens import Role, Tokens
from storage.db.webhooks import Filters, Webhooks
from storage.db.workers import WorkerStore

if TYPE_CHECKING:
    from tables import Claimer

    from storage.db.engine import Database
    from storage.db.queries import Queries
    from storage.db.rows import Job, WorkerIdentity
    from storage.db.store import JobStore
    from storage.settings import Settings

Ask = Callable[..., Answer]


@pytest.fixture
def tokens(database: "Database") -> Tokens:
    database.require_schema()
    return Tokens(database)


@pytest.fixture
def server(settings: "Settings", tokens: Tokens) -> Iterator[Server]:
    started = Server(environment(settings), ("--port", "0", "--allow-changes")).start()
    yield started
    started.stop()


@pytest.fixture
def token_of(tokens: Tokens) -> Callable[[str, str], str]:
    """Creates a token: token_of("ada", "submitter")."""
    return lambda user, role: tokens.create(user, Role(role), 3600.0)[1]


@pytest.fixture
def ask(server: Server, token_of: Callable[[str, str], str]) -> Callable[[str, str], Ask]:
    """A client of one person: ask("ada", "submitter")("GET", "/jobs")."""

    def of(user: str, role: str) -> Ask:
        token = token_of(user, role)

        def send(method: str, path: str, body: Any = None, **headers: str) -> Answer:
            given = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", **headers}
            return server.get(f"/api/v1{path}", method=method, body=body, logged_in=False, **given)

        return send

    return of


@pytest.fixture
def trained(job_factory: "Callable[..., Job]", claim: "Claimer", store: "JobStore") -> int:
    """A training with a checkpoint, from which images can be generated."""
    from jobs.specs import TrainSpec

    spec = TrainSpec.create(data="/images", recipe="sngan", epochs=4, size=24)
    made = job_factory(spec=spec.to_json(), name="faces", user="ada", priority=1000)
    lease = claim()
    store.register_checkpoint(
        lease,
        kind="final",
        epoch=4,
        step=40,
        path="jobs/1/a1/checkpoints/x",
        manifest_sha256="a" * 64,
        size=9,
    )
    store.succeed(lease, {"images": 4, "epoch": 4})
    return made.id


def code(answer: Answer) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    return answer.status, answer.json["code"]


# --- who may ----------------------------------------------------------------------------------


def test_a_token_that_is_not_valid_says_why(
    server: Server, tokens: Tokens, database: "Database", token_of: Callable[[str, str], str]
) -> None:
    expired = tokens.create("ada", Role.ADMIN, 0.01)[1]
    revoked, text = tokens.create("ada", Role.ADMIN, None)
    tokens.revoke(revoked.id)
    time.sleep(0.05)
    unknown = f"ganq_{database.installation}_{'x' * 43}"
    said = {
        "Bearer " + expired: "is expired",
        "Bearer " + text: "is revoked",
        "Bearer " + f"ganq_{'0' * 8}_{'x' * 43}": "another installation",
        "Bearer " + unknown: "no such token",
        "Bearer nonsense": "not a token of ganq",
        "Bearer ": "not a token of ganq",
        "Basic YTpi": "has no token",
        "": "has no token",
    }
    for header, reason in said.items():
        answer = server.get("/api/v1/jobs", logged_in=False, Authorization=header)
        assert code(answer) == (401, "UNAUTHENTICATED"), header
        assert reason in answer.json["detail"]
        assert "www-authenticate" in answer.headers
    valid = token_of("ada", "viewer")
    assert server.get("/api/v1/jobs", logged_in=False, Authorization=f"bearer {valid}").status == 200
    assert server.get(f"/api/v1/jobs?token={valid}", logged_in=False).status == 401  # never in an address


def test_a_revoked_token_ends_within_two_seconds_and_its_use_is_shown(server: Server, tokens: Tokens) -> None:
    made, text = tokens.create("ada", Role.VIEWER, None)
    bearer = {"Authorization": f"Bearer {text}"}
    assert server.get("/api/v1", logged_in=False, **bearer).json["user"] == "ada"
    used = next(one for one in tokens.all() if one.id == made.id).used_at
    assert used is not None
    cookie = server.get(f"/?token={text}", logged_in=False).headers["set-cookie"].partition(";")[0]
    assert server.get("/", logged_in=False, Cookie=cookie).status == 200
    tokens.revoke(made.id)
    time.sleep(1.5)
    assert server.get("/api/v1", logged_in=False, **bearer).status == 401
    assert server.get("/", logged_in=False, Cookie=cookie).status == 401


def test_the_table_contains_no_token_but_its_hash(tokens: Tokens, database: "Database") -> None:
    text = tokens.create("ada", Role.ADMIN, None)[1]
    rows = database.read(lambda conn: conn.exec_driver_sql("SELECT * FROM token").all())
    assert text not in str(rows)
    assert text.rpartition("_")[2] not in str(rows)


def test_each_role_includes_the_one_before_and_no_more(
    ask: Callable[[str, str], Ask], job_factory: "Callable[..., Job]", trained: int
) -> None:
    hers, his = job_factory(user="ada").id, job_factory(user="bob").id
    generate = {"kind": "generate", "source": trained, "count": 4}
    viewer, submitter = ask("ada", "viewer"), ask("ada", "submitter")
    operator, admin = ask("olga", "operator"), ask("root", "admin")
    assert viewer("GET", "/jobs").status == 200
    assert code(viewer("POST", "/jobs", generate)) == (403, "FORBIDDEN")
    assert code(viewer("POST", f"/jobs/{hers}/hold")) == (403, "FORBIDDEN")
    assert code(viewer("PATCH", f"/jobs/{hers}", {"priority": 5})) == (403, "FORBIDDEN")
    made = submitter("POST", "/jobs", generate)
    assert (made.status, made.json["job"]["user"]) == (201, "ada")
    assert submitter("POST", f"/jobs/{hers}/hold").json["job"]["held"] is True
    for verb in ("hold", "cancel", "release", "keep"):
        answer = submitter("POST", f"/jobs/{his}/{verb}")
        assert code(answer) == (403, "FORBIDDEN"), verb
        assert "belongs to bob" in answer.json["detail"]
    assert code(submitter("PATCH", f"/jobs/{his}", {"priority": 5})) == (403, "FORBIDDEN")
    assert code(submitter("POST", "/jobs", {**generate, "user": "bob"})) == (403, "FORBIDDEN")
    assert operator("POST", f"/jobs/{his}/hold").json["job"]["held"] is True
    assert code(operator("POST", "/jobs", {**generate, "user": "bob"})) == (403, "FORBIDDEN")
    assert admin("POST", "/jobs", {**generate, "user": "bob"}).json["job"]["user"] == "bob"


def test_the_page_knows_the_same_roles(
    server: Server, tokens: Tokens, job_factory: "Callable[..., Job]", queries: "Queries"
) -> None:
    import re

    hers, his = job_factory(user="ada").id, job_factory(user="bob").id
    seen = {}
    for role in (Role.VIEWER, Role.SUBMITTER):
        text = tokens.create("ada", role, None)[1]
        cookie = server.get(f"/?token={text}", logged_in=False).headers["set-cookie"].partition(";")[0]
        page = server.get("/", logged_in=False, Cookie=cookie).text
        found = re.search(r'ganq-change" content="([0-9a-f]*)"', page)
        assert found is not None
        assert ">ada<" in page
        seen[role] = cookie, found[1]
    assert seen[Role.VIEWER][1] == ""
    cookie, change = seen[Role.SUBMITTER]
    sent: dict[str, Any] = {"X_Ganq_Token": change, "Sec_Fetch_Site": "same-origin", "Cookie": cookie}

    def hold(job: int, **headers: str) -> int:
        return server.get(f"/jobs/{job}/hold", method="POST", body={}, logged_in=False, **headers).status

    assert hold(hers, **sent) == 200
    assert hold(his, **sent) == 403
    assert hold(hers, **{**sent, "Cookie": seen[Role.VIEWER][0]}) == 403
    detail = queries.events(hers)[-1].detail or {}
    assert (detail["by"], detail["via"]) == ("ada", "page")


def test_a_cookie_alone_changes_nothing_through_the_api(
    server: Server, job_factory: "Callable[..., Job]"
) -> None:
    job = job_factory().id
    cookie = server.get(f"/?token={server.token}", logged_in=False).headers["set-cookie"].partition(";")[0]
    assert server.get(f"/api/v1/jobs/{job}", logged_in=False, Cookie=cookie).status == 200
    for headers in ({}, {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-origin"}):
        answer = server.get(
            f"/api/v1/jobs/{job}/hold", method="POST", body={}, logged_in=False, Cookie=cookie, **headers
        )
        assert code(answer) == (403, "FORBIDDEN")


def test_a_read_only_server_changes_nothing(settings: "Settings", job_factory: "Callable[..., Job]") -> None:
    job = job_factory().id
    server = Server(environment(settings)).start()
    try:
        assert server.get(f"/api/v1/jobs/{job}").status == 200
        answer = server.get(
            f"/api/v1/jobs/{job}/cancel", method="POST", body={}, Content_Type="application/json"
        )
        assert code(answer) == (403, "READ_ONLY")
    finally:
        server.stop()


# --- submit -----------------------------------------------------------------------------------


def test_a_submitted_job_is_that_of_the_command_and_its_event_names_who_and_how(
    ask: Callable[[str, str], Ask], trained: int, queries: "Queries"
) -> None:
    from jobs.specs import GenerateSpec

    answer = ask("ada", "submitter")(
        "POST", "/jobs", {"kind": "generate", "source": "faces", "count": 8, "name": "eight", "priority": 3}
    )
    assert answer.status == 201
    job = queries.get(answer.json["job"]["id"])
    assert answer.headers["location"] == f"/api/v1/jobs/{job.id}"
    assert job.spec == GenerateSpec.create(source=trained, count=8).to_json()
    assert (job.user, job.name, job.priority) == ("ada", "eight", 3)
    assert any("no worker is running" in line for line in answer.json["notices"])
    assert queries.events(job.id)[0].detail == {"by": "ada", "via": "api"}


def test_the_same_key_returns_the_same_job_and_another_request_shows_both(
    ask: Callable[[str, str], Ask], trained: int
) -> None:
    ada = ask("ada", "submitter")
    body = {"kind": "generate", "source": trained, "count": 8}
    first = ada("POST", "/jobs", body, Idempotency_Key="night-1")
    again = ada("POST", "/jobs", body, Idempotency_Key="night-1")
    assert (first.status, again.status) == (201, 200)
    assert first.json["job"]["id"] == again.json["job"]["id"]
    assert again.json["known"] is True
    other = ada("POST", "/jobs", {**body, "count": 9}, Idempotency_Key="night-1")
    assert code(other) == (409, "SUBMIT_KEY_REUSED")
    assert (other.json["known"]["spec"]["count"], other.json["given"]["spec"]["count"]) == (8, 9)
    assert other.json["job_id"] == first.json["job"]["id"]
    assert code(ada("POST", "/jobs", body, Idempotency_Key="no key!")) == (400, "BAD_SPEC")
    assert code(ada("POST", "/jobs", {**body, "submit_key": "b"}, Idempotency_Key="a")) == (400, "BAD_SPEC")


def test_a_training_of_a_folder_of_the_server_and_a_sweep(
    ask: Callable[[str, str], Ask], tmp_path: Path, queries: "Queries"
) -> None:
    folder = tmp_path / "faces"
    folder.mkdir()
    for number in range(70):
        (folder / f"{number:03d}.png").touch()
    ada = ask("ada", "admin")
    made = ada("POST", "/jobs", {"kind": "train", "data": str(folder), "epochs": 3, "hold": True})
    assert (made.status, made.json["job"]["status"]) == (201, "held")
    assert code(ada("POST", "/jobs", {"kind": "train", "data": "faces"})) == (400, "BAD_SPEC")
    assert code(ada("POST", "/jobs", {"kind": "train", "data": str(folder / "no")})) == (404, "NOT_FOUND")
    swept = ada(
        "POST", "/sweeps", {"kind": "train", "data": str(folder), "over": {"seed": [0, 1, 2]}, "name": "r"}
    )
    assert (swept.status, len(swept.json["jobs"])) == (201, 3)
    listed = ada("GET", f"/jobs?sweep={swept.json['sweep']}&fields=name").json["jobs"]
    assert [one["name"] for one in listed] == ["r-seed-2", "r-seed-1", "r-seed-0"]
    assert ada("GET", "/counts?sweep=r").json["queued"] == 3


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_only_an_admin_names_any_path_of_the_server(
    settings: "Settings", token_of: Callable[[str, str], str], trained: int, tmp_path: Path
) -> None:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    for folder in (allowed / "faces", secret):
        folder.mkdir(parents=True)
        for number in range(70):
            (folder / f"{number:03d}.png").touch()
    (allowed / "link").symlink_to(secret)
    tokens = {role: token_of("ada", role) for role in ("submitter", "operator", "admin")}
    env = environment(settings) | {"GANQ_API_PATHS": f"/nowhere:{allowed}"}
    server = Server(env, ("--port", "0", "--allow-changes")).start()

    def submit(role: str, path: str, **body: Any) -> Answer:
        bearer = {"Authorization": f"Bearer {tokens[role]}", "Content-Type": "application/json"}
        return server.get(f"/api/v1{path}", method="POST", body=body, logged_in=False, **bearer)

    try:
        for path in (secret, allowed / "link", allowed / ".." / "secret", "/"):
            for body in (
                {"kind": "train", "data": str(path)},
                {"kind": "train", "data": str(allowed / "faces"), "init-netg": str(path)},
                {"kind": "evaluate", "subject": str(path), "data": str(allowed / "faces")},
                {"kind": "evaluate", "source": f"{path}/", "data": str(allowed / "faces")},
                {"kind": "evaluate", "subject": trained, "feature_network": f"{path}/net.pt"},
            ):
                said = submit("submitter", "/jobs", **body)
                assert code(said) == (403, "FORBIDDEN"), body
                assert "dataset:ID" in said.json["hint"]
                assert "GANQ_API_PATHS" in said.json["hint"]
                assert code(submit("operator", "/jobs", **body)) == (403, "FORBIDDEN")
                assert code(submit("submitter", "/jobfiles", job=[body])) == (403, "FORBIDDEN")
        (settings.home / "last-data").write_text(f"{secret}\n")
        no_data = submit("submitter", "/jobs", kind="train")
        assert (code(no_data), no_data.json["detail"]) == ((400, "BAD_SPEC"), "the request has no data")
        assert code(submit("submitter", "/jobs", kind="evaluate", subject="tests"))[0] == 404
        assert submit("submitter", "/jobs", kind="train", data=str(allowed / "faces")).status == 201
        assert submit("submitter", "/jobs", kind="train", continue_from=trained, epochs=9).status != 403
        assert submit("admin", "/jobs", kind="train", data=str(secret)).status == 201
        assert submit("admin", "/jobs", kind="train").status == 201
    finally:
        server.stop()


def test_a_job_file_is_submitted_in_one_transaction_and_once(
    ask: Callable[[str, str], Ask], trained: int, queries: "Queries"
) -> None:
    ada = ask("ada", "submitter")
    first = {"kind": "generate", "from": trained, "count": 4, "name": "g"}
    swept = {"kind": "generate", "after": "g", "name": "s", "sweep": {"seed": [0, 1]}}
    body = {"defaults": {"generate": {"from": trained, "count": 8}}, "job": [swept, first]}
    made = ada("POST", "/jobfiles", body, Idempotency_Key="night")
    assert made.status == 201, made.text
    [[g], s] = made.json["jobs"]
    assert [queries.get(one).name for one in (g, *s)] == ["g", "s-seed-0", "s-seed-1"]
    assert [queries.needs(one)[0][0] for one in s] == [g, g]
    assert ada("POST", "/jobfiles", body, Idempotency_Key="night").json["jobs"] == [[g], s]
    jobs = [first | {"name": "h"}, {"kind": "generate", "cuont": 4}]
    wrong = {"job": jobs, "places": ["a.toml:1", "a.toml:9"]}
    said = ada("POST", "/jobfiles", wrong)
    assert code(said) == (400, "BAD_SPEC")
    assert said.json["detail"].startswith("a.toml:9: generate has no option")
    assert len(queries.ids(Filter())) == 4
    assert code(ada("POST", "/jobfiles", {"job": [first | {"user": "bob"}]})) == (403, "FORBIDDEN")
    assert code(ada("POST", "/jobfiles", {"job": []})) == (400, "BAD_SPEC")


def test_an_operator_drains_a_worker(
    ask: Callable[[str, str], Ask], worker_identity: "WorkerIdentity", database: "Database"
) -> None:
    WorkerStore(database, worker_identity).report("idle")
    name = worker_identity.name
    assert code(ask("ada", "submitter")("POST", f"/workers/{name}/drain")) == (403, "FORBIDDEN")
    drained = ask("ada", "operator")("POST", f"/workers/{name}/drain")
    assert (drained.status, drained.json["name"]) == (200, name)
    asked = database.read(lambda conn: conn.exec_driver_sql("SELECT drain_requested_at FROM worker").scalar())
    assert asked is not None
    assert code(ask("ada", "operator")("POST", "/workers/nope/drain")) == (404, "NOT_FOUND")


@pytest.mark.parametrize(
    ("body", "hint"),
    [
        ({"kind": "generate", "cuont": 4}, "count"),
        ({"kind": "generate", "count": 4, "out": "/tmp"}, "download"),
        ({"kind": "train", "data": 5}, None),
        ({"kind": "train", "data": "/", "init_netg": {"a": 1}}, None),
        ({"kind": "train", "data": "\x00"}, "upload"),
        ({"kind": "generate", "count": "many"}, None),
        ({"kind": "generate", "count": 4, "submit_key": 7}, None),
        ({"kind": "generate", "count": 4, "name": "a b"}, "letters"),
        ({"kind": "generate", "count": 4, "priority": True}, None),
        ({"kind": "generate", "seeds": 5}, None),
        ({"kind": "train", "augment": 5, "data": "/"}, None),
        ({"kind": "generate", "count": 4, "after": [{}]}, None),
        ({"kind": "import"}, "train"),
        ({"kind": 3}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_body_that_cannot_work_gets_a_code_and_a_hint(
    ask: Callable[[str, str], Ask], trained: int, body: Any, hint: str | None
) -> None:
    answer = ask("ada", "admin")("POST", "/jobs", body)
    assert answer.status in (400, 404), answer.text
    assert code(answer)[1] in ("BAD_SPEC", "JOB_NOT_FOUND")
    assert hint is None or hint in (answer.json["hint"] or "")


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_bombs_and_bodies_that_are_no_json_are_refused(
    server: Server, token_of: Callable[[str, str], str]
) -> None:
    token = token_of("ada", "submitter")

    def send(data: bytes, media: str = "application/json") -> tuple[int, str]:
        head = f"POST /api/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
        head += f"Content-Type: {media}\r\nContent-Length: {len(data)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
            line.sendall(head.encode() + data)
            return _answer_of(line)

    assert send(b"{") == (400, "BAD_SPEC")
    assert send(b"[]") == (400, "BAD_SPEC")
    assert send(b"\xff\xfe") == (400, "BAD_SPEC")
    assert send(b'{"kind": "train", "kind": "generate"}') == (400, "BAD_SPEC")
    assert send(b'{"kind": NaN}') == (400, "BAD_SPEC")
    assert send(b'{"kind": ' + b"[" * 100_000 + b"]" * 100_000 + b"}") == (400, "BAD_SPEC")
    assert send(b'{"count": ' + b"9" * 10_000 + b"}") == (400, "BAD_SPEC")
    assert send(b'{"count": ' + b"9" * 1000 + b', "kind": "generate"}')[0] in (400, 404)
    assert send(b"kind=train", "application/x-www-form-urlencoded") == (415, "UNSUPPORTED_MEDIA_TYPE")
    assert send(b"{" + b" " * 1_100_000 + b"}") == (413, "BODY_TOO_LARGE")


def _answer_of(line: socket.socket) -> tuple[int, str]:
    data = b""
    while b"\r\n\r\n" not in data or not data.endswith(b"}"):
        if not (more := line.recv(65536)):
            break
        data += more
    return int(data.split()[1]), json.loads(data.partition(b"\r\n\r\n")[2])["code"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_body_of_a_gigabyte_is_refused_before_it_is_read(
    server: Server, token_of: Callable[[str, str], str]
) -> None:
    import psutil

    token = token_of("ada", "submitter")
    head = f"POST /api/v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {token}\r\n"
    head += "Content-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        line.sendall(head.encode() + b"Content-Length: 1000000000\r\n\r\n{")
        assert _answer_of(line) == (413, "BODY_TOO_LARGE")
    before = psutil.Process(server.process.pid).memory_info().rss
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
        line.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n")
        piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        try:
            for _ in range(1000):
                line.sendall(piece)
        except OSError:
            pass  # it has closed the connection
        else:
            raise AssertionError("the server has read a gigabyte")
    assert psutil.Process(server.process.pid).memory_info().rss - before < 50 << 20


# --- read and change --------------------------------------------------------------------------


def test_a_list_is_read_in_pages_and_filtered(
    ask: Callable[[str, str], Ask], job_factory: "Callable[..., Job]"
) -> None:
    ids = [job_factory(name=f"job-{number}", user="ada" if number % 2 else "bob").id for number in range(7)]
    viewer = ask("vera", "viewer")
    seen: list[int] = []
    path = "/jobs?limit=3&fields=id,name"
    while path:
        page = viewer("GET", path).json
        seen += [one["id"] for one in page["jobs"]]
        assert all(set(one) == {"id", "name"} for one in page["jobs"])
        path = (page["next"] or "").removeprefix("/api/v1")
    assert seen == ids[::-1]
    assert len(viewer("GET", "/jobs?user=ada").json["jobs"]) == 3
    assert [one["id"] for one in viewer("GET", f"/jobs?ids={ids[2]},{ids[0]}").json["jobs"]] == [
        ids[0],
        ids[2],
    ]
    assert viewer("GET", "/jobs/job-3").json["id"] == ids[3]
    bad = ("stat=queued", "state=dreaming", "limit=0", "limit=x", "fields=nope", "before=-1", "user=%00")
    for query in (*bad, "user=a&user=b", "since=soon"):
        path = f"/jobs?{query}"
        assert code(viewer("GET", path)) == (400, "BAD_SPEC"), path
    assert "state" in viewer("GET", "/jobs?stat=queued").json["hint"]
    for path in (
        "/jobs/nope",
        "/jobs/999",
        "/jobs/%00",
        "/jobs/%F0%9F",
        f"/jobs/{'9' * 40}",
        "/jobs?sweep=nope",
    ):
        assert code(viewer("GET", path)) == (404, "JOB_NOT_FOUND"), path
    assert code(viewer("GET", "/nope")) == (404, "NOT_FOUND")
    assert code(viewer("DELETE", "/jobs")) == (405, "METHOD_NOT_ALLOWED")


def test_answers_on_a_kept_connection_do_not_wait_for_an_acknowledgement(
    server: Server, token_of: Callable[[str, str], str]
) -> None:
    """Without TCP_NODELAY each would take 40 ms."""
    kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    bearer = {"Authorization": f"Bearer {token_of('vera', 'viewer')}"}
    took = []
    for _ in range(21):
        began = time.monotonic()
        kept.request("GET", "/api/v1/jobs", headers=bearer)
        assert kept.getresponse().read()
        took.append(time.monotonic() - began)
    kept.close()
    assert sorted(took)[10] < 0.03


def test_a_change_by_another_process_is_read_at_once_on_sqlite_and_soon_on_postgres(
    ask: Callable[[str, str], Ask], job_factory: "Callable[..., Job]", store: "JobStore", backend: str
) -> None:
    job = job_factory().id
    viewer = ask("vera", "viewer")
    assert viewer("GET", f"/jobs/{job}").json["held"] is False
    store.hold(job, held=True)
    if backend == "postgres":
        assert viewer("GET", f"/jobs/{job}", Cache_Control="no-cache").json["held"] is True
        time.sleep(1.2)
    assert viewer("GET", f"/jobs/{job}").json["held"] is True


def test_a_job_is_changed_only_if_it_has_not_changed_since(
    ask: Callable[[str, str], Ask], job_factory: "Callable[..., Job]", store: "JobStore", queries: "Queries"
) -> None:
    job = job_factory(user="ada").id
    ada = ask("ada", "submitter")
    tag = ada("GET", f"/jobs/{job}").headers["etag"]
    changed = ada("PATCH", f"/jobs/{job}", {"priority": 7, "name": "new"}, If_Match=tag)
    assert (changed.json["job"]["priority"], changed.json["job"]["name"]) == (7, "new")
    assert code(ada("PATCH", f"/jobs/{job}", {"priority": 8}, If_Match=tag)) == (412, "PRECONDITION_FAILED")
    assert code(ada("POST", f"/jobs/{job}/cancel", {}, If_Match=tag)) == (412, "PRECONDITION_FAILED")
    assert queries.get(job).priority == 7
    assert ada("PATCH", f"/jobs/{job}", {"priority": 8}, If_Match=changed.headers["etag"]).status == 200
    assert ada("PATCH", f"/jobs/{job}", {"priority": 9}, If_Match="*").status == 200
    assert ada("PATCH", f"/jobs/{job}", {"priority": 9}).status == 200
    described = ada("PATCH", f"/jobs/{job}", {"note": "good", "labels": {"project": "faces", "x": "1"}})
    assert (described.json["job"]["note"], described.json["job"]["labels"]["project"]) == ("good", "faces")
    ada("PATCH", f"/jobs/{job}", {"labels": {"x": None}})
    assert ada("GET", "/jobs?label=project=faces").json["jobs"][0]["labels"] == {"project": "faces"}
    assert ada("GET", "/jobs?label=x").json["jobs"] == []
    assert code(ada("PATCH", f"/jobs/{job}", {"labels": {"a b": "1"}})) == (400, "BAD_SPEC")
    for body in (
        {},
        {"priority": "9"},
        {"priority": 1001},
        {"name": 5},
        {"name": "1"},
        {"name": "ok", "stat": 1},
    ):
        assert code(ada("PATCH", f"/jobs/{job}", body)) == (400, "BAD_SPEC"), body
    assert ada("PATCH", f"/jobs/{job}", {"prioriti": 1}).json["hint"] == "did you mean priority?"
    assert code(ada("PATCH", f"/jobs/{job}", {"name": "x"}, If_Match="nonsense")) == (400, "BAD_SPEC")
    store.request_cancel(job)
    assert code(ada("PATCH", f"/jobs/{job}", {"priority": 1})) == (409, "INVALID_TRANSITION")
    said = [(one.type, one.detail) for one in queries.events(job) if one.type == "priority_changed"]
    assert said[0] == ("priority_changed", {"priority": 7, "by": "ada", "via": "api"})


def test_the_verbs_are_those_of_the_command(
    ask: Callable[[str, str], Ask], job_factory: "Callable[..., Job]", database: "Database", trained: int
) -> None:
    ada = ask("ada", "submitter")
    job = job_factory(user="ada").id
    assert ada("POST", f"/jobs/{job}/hold").json["job"]["status"] == "held"
    assert ada("POST", f"/jobs/{job}/release").json["job"]["status"] == "queued"
    assert ada("POST", f"/jobs/{job}/pause", {"reason": "demo"}).json["job"]["status"] == "held"
    assert [one["id"] for one in ada("GET", "/jobs?held=true").json["jobs"]] == [job]
    assert ada("POST", f"/jobs/{job}/resume").json["job"]["status"] == "queued"
    assert code(ada("POST", f"/jobs/{job}/pause", {"reason": 5})) == (400, "BAD_SPEC")
    assert ada("POST", f"/jobs/{job}/keep", {}).json["job"]["kept"] is True
    assert ada("POST", f"/jobs/{job}/keep", {"undo": True}).json["job"]["kept"] is False
    assert ada("POST", f"/jobs/{job}/cancel").json["job"]["state"] == "cancelled"
    assert event_types(database, job)[-2:] == ["cancel_requested", "cancelled"]
    assert code(ada("POST", f"/jobs/{job}/cancel")) == (409, "INVALID_TRANSITION")
    assert code(ada("POST", f"/jobs/{job}/hold")) == (409, "INVALID_TRANSITION")
    again = ada("POST", f"/jobs/{job}/retry", {"with_waiting": False})
    assert again.status == 201
    assert (again.json["job"]["retry_of"], again.json["job"]["user"]) == (job, "ada")
    assert code(ada("POST", f"/jobs/{job}/retry", {"with_wating": True})) == (400, "BAD_SPEC")
    assert code(ada("POST", f"/jobs/{job}/explode")) == (404, "NOT_FOUND")


def test_what_is_around_a_job(
    ask: Callable[[str, str], Ask], job_factory: "Callable[..., Job]", trained: int, settings: "Settings"
) -> None:
    viewer = ask("vera", "viewer")
    first = job_factory(user="ada", queue="studio").id
    job_factory(user="ada", queue="studio", after=[first])
    assert viewer("GET", f"/jobs/{trained}/checkpoints").json["checkpoints"][0]["sha256"] == "a" * 64
    assert viewer("GET", f"/jobs/{trained}/attempts").json["attempts"][0]["outcome"] == "succeeded"
    assert viewer("GET", f"/jobs/{first}/relations").json["ahead_in_queue"] == 0
    studio = next(one for one in viewer("GET", "/queues").json["queues"] if one["queue"] == "studio")
    assert (studio["queued"], studio["claimable"], studio["workers"]) == (2, 1, 0)
    assert viewer("GET", "/workers").json["workers"] == []


# --- follow -----------------------------------------------------------------------------------


def streamed(server: Server, path: str, token: str, **headers: str) -> Iterator[dict[str, str]]:
    """The events of a stream until it ends."""
    import http.client

    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    line.request(
        "GET",
        f"/api/v1{path}",
        headers={"Authorization": f"Bearer {token}", "Accept": "text/event-stream", **given},
    )
    answer = line.getresponse()
    assert answer.status == 200
    found: dict[str, str] = {}
    while (text := answer.readline().decode()) != "":
        if text == "\n":
            if found:
                yield found
            found = {}
        elif not text.startswith(":"):
            name, _, value = text.rstrip("\n").partition(": ")
            found[name] = value
    line.close()


def test_events_are_followed_to_the_end_and_resumed(
    server: Server, token_of: Callable[[str, str], str], running_job_factory: Any, store: "JobStore"
) -> None:
    token = token_of("vera", "viewer")
    lease = running_job_factory()
    stream = streamed(server, f"/jobs/{lease.job_id}/events", token)
    first = next(stream)
    assert first["event"] == "submitted"
    assert next(stream)["event"] == "claimed"
    store.succeed(lease, {})
    rest = [one["event"] for one in stream]
    assert rest[-2:] == ["succeeded", "end"]
    resumed = [
        one["event"]
        for one in streamed(server, f"/jobs/{lease.job_id}/events", token, Last_Event_ID=first["id"])
    ]
    assert resumed == ["claimed", "succeeded", "end"]
    listed = server.get(f"/api/v1/jobs/{lease.job_id}/events?limit=1").json
    assert (len(listed["events"]), listed["next_after"]) == (1, listed["events"][0]["id"])


def test_a_log_is_read_in_parts_and_followed_over_attempts(
    server: Server, token_of: Callable[[str, str], str], running_job_factory: Any, store: "JobStore",
    settings: "Settings", database: "Database",
) -> None:  # fmt: skip
    from storage.volume.layout import Volume

    volume = Volume(settings.volume)
    volume.ensure()
    token = token_of("vera", "viewer")
    job = running_job_factory().job_id
    folder = volume.attempt(job, 1)
    folder.mkdir(parents=True)
    (folder / "log.txt").write_bytes(b"one\ntwo\nthr")
    path = f"/api/v1/jobs/{job}/log"
    assert server.get(path).body == b"one\ntwo\nthr"
    part = server.get(path, Range="bytes=4-6")
    assert (part.status, part.body, part.headers["content-range"]) == (206, b"two", "bytes 4-6/11")
    assert server.get(path, Range="bytes=-3").body == b"thr"
    nothing = server.get(path, Range="bytes=11-")
    assert code(nothing) == (416, "RANGE_NOT_SATISFIABLE")
    assert nothing.headers["content-range"] == "bytes */11"
    assert code(server.get(f"{path}?attempt=2")) == (404, "NOT_FOUND")
    assert server.get(path, method="HEAD").headers["content-length"] == "11"
    stream = streamed(server, f"/jobs/{job}/log", token)
    assert [json.loads(next(stream)["data"])["text"] for _ in range(2)] == ["one", "two"]
    with open(folder / "log.txt", "ab") as file:
        file.write(b"ee\r\n\n")
    assert [json.loads(next(stream)["data"])["text"] for _ in range(2)] == ["three\r", ""]
    volume.attempt(job, 2).mkdir()
    (volume.attempt(job, 2) / "log.txt").write_bytes(b"again\n\xff end")
    set_columns(database, job, attempt=2, state="failed", error_code="CRASH_LOOP")
    rest = [json.loads(one["data"]) for one in stream]
    assert rest == [{"attempt": 2, "text": "again"}, {"attempt": 2, "text": "� end"}, {"state": "failed"}]
    resumed = [
        json.loads(one["data"]) for one in streamed(server, f"/jobs/{job}/log", token, Last_Event_ID="1:8")
    ]
    assert [one.get("text") for one in resumed] == ["three\r", "", "again", "� end", None]


# --- the description --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_the_description_in_the_repository_is_what_the_server_says(server: Server) -> None:
    stored = json.loads((Path(__file__).parents[2] / "docs" / "openapi.json").read_text())
    assert server.get("/api/v1/openapi.json").json == stored, "run: make docs"
    page = server.get("/api/v1/docs")
    assert page.status == 200
    assert "submitSweep" in page.text
    assert "http://" not in page.text.replace("http://www.w3.org", "")


# --- webhooks -----------------------------------------------------------------------------------


def test_an_admin_adds_lists_and_removes_webhooks_and_nobody_else(
    ask: Callable[[str, str], Ask], job_factory: "Callable[..., Job]"
) -> None:
    job_factory(name="faces")
    admin, operator = ask("root", "admin"), ask("ada", "operator")
    body = {
        "url": "https://1.1.1.1/in?t=hidden",
        "events": ["failed"],
        "jobs": ["faces"],
        "labels": ["project"],
    }
    added = admin("POST", "/webhooks", body)
    assert (added.status, added.json["jobs"]) == (201, [1])
    assert added.json["secret"].startswith("whsec_")
    (listed,) = admin("GET", "/webhooks").json["webhooks"]
    assert (listed["url"], listed["events"], "secret" in listed) == ("https://1.1.1.1/in", ["failed"], False)
    assert admin("GET", "/webhooks/1/deliveries?state=pending").json == {"deliveries": []}
    assert admin("POST", "/webhooks/1/enable").json["state"] == "ok"
    for method, path in (("GET", "/webhooks"), ("POST", "/webhooks"), ("DELETE", "/webhooks/1")):
        assert operator(method, path, body if method == "POST" else None).status == 403
    for status, changes in (
        (400, {"url": "command"}),
        (400, {"url": 7}),
        (403, {"url": "http://127.0.0.1/"}),
        (400, {"events": ["fail"]}),
        (400, {"kinds": ["paint"]}),
        (400, {"users": "ada"}),
        (400, {"users": ["a\nb"]}),
        (404, {"jobs": ["nope"]}),
        (400, {"uri": "x"}),
    ):
        assert admin("POST", "/webhooks", {**body, **changes}).status == status, changes
    assert admin("DELETE", "/webhooks/1").status == 200
    assert admin("DELETE", "/webhooks/1").status == 404
    assert admin("DELETE", "/webhooks/x").status == 400


def test_the_server_of_the_page_delivers(
    settings: "Settings",
    tokens: Tokens,
    database: "Database",
    store: "JobStore",
    job_factory: "Callable[..., Job]",
) -> None:
    env = {**environment(settings), "GANQ_WEBHOOK_NETWORKS": "127.0.0.0/8"}
    with Receiver() as receiver:
        receiver.secret = Webhooks(database).create("http", receiver.url, Filters(), "ada").secret
        server = Server(env, ("--port", "0")).start()
        try:
            store.request_cancel(job_factory().id)
            wait_until(lambda: receiver.taken())
        finally:
            server.stop()
    (taken,) = receiver.taken()
    assert taken.message["type"] == "job.cancelled"
