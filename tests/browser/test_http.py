"""The server without a browser: who is let in, what it says to bad requests, and that it changes nothing."""

import http.client
import json
import os
import re
import socket
import tarfile
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser.serving import Server, environment
from browser.world import World, table_bytes

from web.security import HEADERS

if TYPE_CHECKING:
    from storage.db.engine import Database
    from storage.db.rows import Job
    from storage.settings import Settings


def cookie_of(server: Server) -> str:
    answer = server.get(f"/?token={server.token}", logged_in=False)
    assert answer.status == 200
    assert "0;url=/" in answer.text
    assert server.token not in answer.text
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    assert server.token not in cookie
    return cookie.partition(";")[0]


def test_only_the_link_logs_in(server: Server) -> None:
    for path in ("/", "/live", "/jobs/1", "/static/0/page.css", "/?format=json"):
        assert server.get(path, logged_in=False).status == 401, path
    for query in ("token=wrong", "token=", f"token={server.token}&token={server.token}"):
        assert server.get(f"/?{query}", logged_in=False).status == 401, query
    cookie = cookie_of(server)
    assert server.get("/", logged_in=False, Cookie=cookie).status == 200
    assert server.get("/", logged_in=False, Cookie=cookie + "x").status == 401


def test_another_host_name_is_refused(server: Server) -> None:
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example", "", "["):
        assert server.get("/", Host=host).status == 421, host
    assert server.get("/", Host=f"localhost:{server.port}").status == 200


def test_every_answer_carries_the_headers(world: World, server: Server) -> None:
    for path in ("/", "/jobs/4711", "/static/0/page.css", f"/jobs/{world.ids['faces']}/thumb", "/nope"):
        answer = server.get(path)
        for name, value in HEADERS.items():
            assert answer.headers[name.lower()] == value, (path, name)
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "private" in answer.headers["cache-control"], path
        assert "server" not in answer.headers
        assert "access-control-allow-origin" not in answer.headers


def test_a_change_comes_from_the_page_itself_and_only_where_allowed(
    own_world: World, own_server: Server, server: Server, world: World
) -> None:
    job = own_world.submit("t")
    page = own_server.get("/").text
    token = re.search(r'ganq-change" content="([0-9a-f]{64})"', page)
    assert token is not None
    path = f"/jobs/{job}/hold"
    for headers in (
        {},
        {"X_Ganq_Token": "0" * 64, "Sec_Fetch_Site": "same-origin"},
        {"X_Ganq_Token": token[1], "Sec_Fetch_Site": "cross-site"},
        {"X_Ganq_Token": token[1], "Origin": "http://evil.example"},
        {"X_Ganq_Token": token[1]},
    ):
        assert own_server.get(path, method="POST", body={}, **headers).status == 403, headers
    fine: dict[str, Any] = {"X_Ganq_Token": token[1], "Sec_Fetch_Site": "same-origin"}
    assert own_server.get(path, method="POST", body={}, **fine).json["done"] == "held"
    assert own_server.get(path, method="POST", body={}, logged_in=False, **fine).status == 401
    other = own_world.submit("p")
    said = own_server.get(f"/jobs/{other}/pause", method="POST", body={}, **fine).json
    assert (said["done"], said["state"]) == (f"held; ganq resume {other} lets it start", "queued")
    assert own_server.get(f"/jobs/{other}/resume", method="POST", body={}, **fine).json["done"] == "released"
    assert own_server.get(f"/jobs/{job}/explode", method="POST", body={}, **fine).status == 404
    assert own_server.get(f"/jobs/{job}/star", method="POST", body={"image": "x"}, **fine).status in (
        400,
        404,
    )
    for method in ("PUT", "DELETE", "OPTIONS"):
        assert own_server.get(path, method=method, **fine).status == 405
    assert 'ganq-change" content=""' in server.get("/").text  # read-only: the page has no token
    # The read-only server's own token is the same secret as with changes allowed, and does not help.
    assert server.get(f"/jobs/{world.ids['held']}/release", method="POST", body={}, **fine).status == 403


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("href", "src", "data-url") and value]


def test_a_crawl_of_all_links_changes_no_byte_of_the_table(world: World, server: Server) -> None:
    before = table_bytes(world.settings.home)
    seen: set[str] = set()
    todo = [
        *["/", f"/jobs/{world.ids['folder']}/images/1", f"/jobs/{world.ids['npz']}/images/2.png"],
    ]
    todo += [f"/jobs/{world.ids[name]}/sheets/0?columns=8&order=index" for name in ("folder", "tar", "npz")]
    while todo:
        path = todo.pop()
        if path in seen or len(seen) > 300:
            continue
        seen.add(path)
        answer = server.get(path)
        assert answer.status < 500, (path, answer.text[:300])
        assert answer.status in (200, 303, 307), path
        if answer.headers.get("content-type", "").startswith("text/html"):
            links = Links()
            links.feed(answer.text)
            todo += [
                path.partition("?")[0] + one if one.startswith("?") else one
                for one in links.found
                if one[0] in "/?"
            ]
    assert len(seen) > 60
    assert table_bytes(world.settings.home) == before


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/jobs/abc", 404),
        (f"/jobs/{'9' * 30}", 404),
        ("/jobs/-1", 404),
        ("/jobs/%3Cscript%3E", 404),
        ("/jobs/1/samples/1/99999.png", 404),
        ("/jobs/1/samples/99/1.png", 404),
        ("/jobs/1/samples/1/..%2f..%2fspec.png", 404),
        ("/jobs/1/images/0.png", 404),
        ("/jobs/3/images/999999999999.png", 404),
        ("/jobs/3/images/3.png", 404),  # torn
        ("/jobs/3/images/4.png", 404),  # deleted
        ("/jobs/3/sheets/99", 404),
        ("/jobs/3/sheets/0?columns=5", 400),
        ("/jobs/3/sheets/0?order=evil", 400),
        ("/jobs/3/stars.zip", 404),
        ("/jobs/1/files/..%2f..%2fspec.json", 404),
        ("/jobs/1/curves?points=x", 400),
        ("/jobs/1?with=1,2,3,4,5", 400),
        ("/jobs/1?with=3", 400),
        ("/jobs/1?with=77", 404),
        ("/jobs/1/log?attempt=9", 400),
        ("/jobs/1/log?before=-1", 400),
        ("/?state=dreaming", 400),
        ("/?before=x", 400),
        ("/?sweep=nope", 404),
        ("/sweeps/nope", 404),
        ("/datasets/nope", 404),
        (f"/datasets/{'0' * 64}", 404),
        ("/static/0/../app.py", 404),
        ("/static/0/%2e%2e/app.py", 404),
    ],
)
def test_a_bad_request_gets_one_line_and_no_traceback(server: Server, path: str, status: int) -> None:
    answer = server.get(path)
    assert answer.status == status
    assert "Traceback" not in answer.text
    assert "<h1>" in answer.text
    error = server.get(path, Accept="application/json").json["error"]
    assert error["code"]
    assert error["message"]


@pytest.mark.parametrize(
    "path",
    ["/", "/jobs/1", "/jobs/1?with=2", "/jobs/3", "/jobs/1/log", "/jobs/6/log", "/jobs/1/events", "/workers",
     "/datasets", "/sweeps/sweep-1", "/jobs/8", "/jobs/9"],
)  # fmt: skip
def test_every_page_is_json_too(server: Server, path: str) -> None:
    joined = "&" if "?" in path else "?"
    found = server.get(f"{path}{joined}format=json")
    assert found.status == 200
    assert found.headers["content-type"] == "application/json"
    assert found.json.keys() == server.get(path, Accept="application/json").json.keys()


def test_what_has_not_changed_is_not_sent_again(server: Server) -> None:
    for _ in range(3):  # a tick may fall between
        first = server.get("/")
        if server.get("/", If_None_Match=first.headers["etag"]).status == 304:
            return
    raise AssertionError("no 304")


def test_a_log_of_endless_lines_and_odd_bytes_is_shown_in_part(world: World, server: Server) -> None:
    answer = server.get(f"/jobs/{world.ids['hostile']}/log")
    assert answer.status == 200
    assert len(answer.body) < 300_000
    assert "last line" in answer.text
    earlier = re.search(r"before=(\d+)", answer.text)
    whole = server.get(f"/jobs/{world.ids['hostile']}/log?before=40").text
    assert "&lt;b&gt;bold" in whole
    assert "\x1b" not in whole
    assert "[31m" not in whole
    assert earlier is not None


def test_images_that_are_torn_leave_their_place_empty_and_the_rest_whole(
    world: World, server: Server
) -> None:
    job = world.ids["folder"]
    sheet = server.get(f"/jobs/{job}/sheets/0?columns=16&order=index")
    assert sheet.headers["content-type"] == "image/webp"
    assert "immutable" in sheet.headers["cache-control"]
    assert "torn" in server.get(f"/jobs/{job}/images/3").json["problem"]
    facts = server.get(f"/jobs/{job}/images/5").json
    assert facts["problem"] is None
    assert facts["command"] == "ganq submit generate --from 1 --checkpoint 16 --seeds 5 --seed 7"
    assert len(server.get(facts["url"]).body) == facts["bytes"]


def test_a_volume_that_is_away_is_reported_and_the_table_is_shown(
    own_world: World, own_server: Server
) -> None:
    job = own_world.submit("t")
    own_world.begin(job, state="succeeded", result={})
    made = own_world.images("g", job, count=3, format="png")
    root = own_world.settings.volume
    root.rename(root.with_name("elsewhere"))
    time.sleep(5.1)  # so long an answer of the volume holds
    for path in (
        "/",
        f"/jobs/{job}",
        f"/jobs/{made}",
        f"/jobs/{job}/log",
        f"/jobs/{job}/events",
        "/datasets",
    ):
        answer = own_server.get(path)
        assert answer.status == 200, path
        if path != "/":
            assert "there is no volume at" in answer.text, path
    assert own_server.get(f"/jobs/{made}/images/0.png").status == 503


def test_event_streams_are_bounded(server: Server) -> None:
    from web.live import MAX_STREAMS

    ask = f"GET /live HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {server.token}\r\n\r\n".encode()
    sockets = []
    statuses = []
    try:
        for _ in range(MAX_STREAMS + 5):
            one = socket.create_connection(("127.0.0.1", server.port), timeout=20)
            one.sendall(ask)
            sockets.append(one)
        for one in sockets:
            statuses.append(int(one.recv(16).split()[1]))
    finally:
        for one in sockets:
            one.close()
    assert statuses.count(200) <= MAX_STREAMS
    assert 503 in statuses
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:  # closed streams make room again
        one = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        one.sendall(ask)
        status = int(one.recv(16).split()[1])
        one.close()
        if status == 200:
            return
        time.sleep(0.3)
    raise AssertionError("the streams were not given back")


def test_a_taken_port_gives_way_and_two_servers_share_a_table(own_world: World, own_server: Server) -> None:
    second = Server(environment(own_world.settings), ("--port", str(own_server.port))).start()
    try:
        assert second.port != own_server.port
        assert f"port {own_server.port} is taken" in second.said[0]
        assert second.token == own_server.token
        job = own_world.submit("seen by both")
        for server in (own_server, second):
            assert "seen by both" in server.get(f"/jobs/{job}").text
    finally:
        second.stop()


def test_the_token_file_is_the_owners_and_a_short_or_open_one_is_refused(own_world: World) -> None:
    from jobs.errors import ConfigError
    from web.security import read_token

    path = own_world.settings.home / "new" / "token"
    token = read_token(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(token) >= 43  # 256 bits
    assert read_token(path) == token
    os.chmod(path, 0o644)
    with pytest.raises(ConfigError):
        read_token(path)
    os.chmod(path, 0o600)
    path.write_text("short")
    with pytest.raises(ConfigError):
        read_token(path)


def test_a_server_that_is_stopped_leaves_no_address_behind(own_world: World, own_server: Server) -> None:
    address = own_world.settings.home / "web.json"
    assert json.loads(address.read_text())["url"] == own_server.base + "/"
    assert address.stat().st_mode & 0o777 == 0o600
    own_server.stop()
    assert own_server.process.returncode == 0
    assert not address.exists()


def test_the_address_of_an_earlier_server_stands_again_when_a_later_one_stops(
    own_world: World, own_server: Server
) -> None:
    address = own_world.settings.home / "web.json"
    later = Server(environment(own_world.settings)).start()
    assert json.loads(address.read_text())["url"] == later.base + "/"
    later.stop()
    assert json.loads(address.read_text())["url"] == own_server.base + "/"


def test_the_token_is_in_no_log(server: Server) -> None:
    assert server.said
    assert not any(server.token in line for line in server.said)


def test_another_address_needs_a_token_file_or_a_proxy(own_world: World) -> None:
    from jobs.errors import ConfigError
    from web.serve import Options, access_of

    with pytest.raises(ConfigError):
        access_of(own_world.settings, Options(host="0.0.0.0"))
    assert access_of(own_world.settings, Options(host="0.0.0.0", proxies=("10.0.0.0/8",))).token is None
    with pytest.raises(ConfigError):
        access_of(own_world.settings, Options(proxies=("no network",)))


def test_a_trusted_proxy_names_the_user(own_world: World) -> None:
    arguments = (
        "--port",
        "0",
        "--trust-proxy",
        "127.0.0.1/32",
        "--server-name",
        "ganq.lab",
        "--allow-changes",
    )
    server = Server(environment(own_world.settings), arguments).start()
    try:
        answer = server.get("/", logged_in=False, X_Forwarded_User="grace", Host="ganq.lab")
        assert answer.status == 200
        assert "grace" in answer.text
        assert server.get("/", logged_in=False).status == 401
        job = own_world.submit("t")
        own_world.begin(job, state="succeeded", result={})
        token = re.search(r'ganq-change" content="([0-9a-f]{64})"', answer.text)
        assert token is not None
        said = server.get(
            f"/jobs/{job}/retry",
            method="POST",
            body={},
            logged_in=False,
            X_Forwarded_User="grace",
            X_Ganq_Token=token[1],
            Sec_Fetch_Site="same-origin",
        ).json
        assert server.get(f"/jobs/{said['id']}?format=json").json["job"]["user"] == "grace"
    finally:
        server.stop()


def test_commits_are_noticed_on_both_databases(
    settings: "Settings", database: "Database", job_factory: "Callable[..., Job]"
) -> None:
    server = Server(environment(settings)).start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", "/live", headers={"Authorization": f"Bearer {server.token}"})
        stream = connection.getresponse()

        def revision() -> str:
            while not (line := stream.readline()).startswith(b"data: ") or line == b"data: \n":
                pass
            return line.decode().strip()

        first = revision()
        began = time.monotonic()
        job = job_factory(name="new one")
        second = revision()
        while second == first:
            second = revision()
        assert time.monotonic() - began < 2
        assert "new one" in server.get("/").text
        assert server.get(f"/jobs/{job.id}?format=json").json["job"]["state"] == "queued"
        connection.close()
    finally:
        server.stop()


def test_a_database_that_is_away_is_one_line(own_world: World, own_server: Server) -> None:
    path = Path(own_world.settings.home) / "ganq.db"
    path.rename(path.with_name("moved.db"))
    answer = own_server.get("/", Accept="application/json")
    assert answer.status == 503
    assert "deleted or moved" in json.loads(answer.body)["error"]["message"]
    path.with_name("moved.db").rename(path)
    assert own_server.get("/").status == 200


def test_jobs_of_ganq_0_2_have_their_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = Path(__file__).parents[1] / "compatibility" / "ganq-0.2-sqlite.tar.xz"
    with tarfile.open(archive) as stored:
        stored.extractall(tmp_path, filter="data")
    from storage.db.engine import Database
    from storage.db.schema import upgrade
    from storage.settings import Settings

    monkeypatch.setenv("GANQ_HOME", str(tmp_path))
    settings = Settings.load()
    database = Database(settings)
    upgrade(database)
    database.dispose()
    server = Server(environment(settings)).start()
    try:
        train = server.get("/jobs/1?format=json").json
        assert [one["epoch"] for one in train["run"]["samples"]] == [1, 2, 3]
        assert "loss_d" in server.get("/jobs/1/curves").json["series"]
        images = server.get("/jobs/3?format=json").json["gallery"]
        assert images["count"] == 8
        assert server.get("/jobs/3/images/7").json["problem"] is None
        for path in (
            "/",
            "/jobs/1",
            "/jobs/5/events",
            "/jobs/1/log",
            "/jobs/3/sheets/0",
            "/datasets",
            "/workers",
        ):
            assert server.get(path).status == 200, path
    finally:
        server.stop()
