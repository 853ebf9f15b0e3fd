"""Directories (Active Directory, LDAP) have account names that are no words; each command works for them."""

import os
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tables import Claimer
    from unit.conftest import Ganq

    from storage.db.queries import Queries

NAMES = {
    "address": "ada@corp.example",
    "domain": "CORP\\ada",
    "spaces": "Ada King Lovelace",
    "umlauts": "jürgen.größe",
    "japanese": "山田太郎",
    "shell": "$(id)'\"; DROP TABLE job",
    "dash": "-ada",
    "long": "ada.lovelace.of.the.analytical.engine.department@research.corp.example.org",
}


@pytest.fixture(params=["sqlite", "postgres"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def no_name_from_outside(ganq: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the account by LOGNAME alone, which login sets from the directory."""
    for name in ("GANQ_USER", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def image_folder(small: list[str]) -> list[str]:
    return [*small, "--epochs", "1"]


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_an_account_of_any_name_submits_and_is_found_limited_and_shown_by_it(
    ganq: "Ganq",
    monkeypatch: pytest.MonkeyPatch,
    image_folder: list[str],
    name: str,
    claim: "Claimer",
    queries: "Queries",
) -> None:
    monkeypatch.setenv("LOGNAME", name)
    first = ganq("submit", "train", *image_folder, "--json").json()["id"]
    second = ganq("submit", "train", *image_folder, "--user", name, "--json").json()["id"]
    shown = ganq("status", first, "--json").json()["user"]
    assert shown == queries.get(first).user == queries.get(second).user
    assert shown == name or (len(name) > 64 and len(shown) == 64 and shown.startswith(name[:50]))
    assert f"by {shown}" in ganq("status", first).out
    found = ganq("status", "--user", name, "--json").json()
    assert {job["id"] for job in found} == {first, second}
    assert ganq("status", "--user", "nobody", "--json").json() == []

    assert ganq("limit", "--user", name, "1").code == 0
    assert shown in ganq("limit").out
    lease = claim()
    assert lease.job_id == first
    assert claim.or_none() is None, "the limit counts its jobs under one name"
    assert f"user {shown}: 1 running, limit 1" in ganq("status", second).out
    ganq("limit", "--user", name, "none")
    assert ganq("limit", "--json").json() == []
    ganq("cancel", "--all", "--state", "queued", "--user", name, "--yes")
    assert queries.get(second).state == "cancelled"


def test_users_with_such_names_take_turns(
    ganq: "Ganq",
    monkeypatch: pytest.MonkeyPatch,
    image_folder: list[str],
    claim: "Claimer",
    queries: "Queries",
) -> None:
    for name in ("CORP\\ada", "CORP\\ada", "CORP\\bob", "ada@corp.example"):
        monkeypatch.setenv("LOGNAME", name)
        ganq("submit", "train", *image_folder)
    order = [queries.get(claim().job_id).user for _ in range(4)]
    assert len(set(order[:3])) == 3
    assert order[3] == "CORP\\ada"


def test_one_account_is_one_user_whatever_the_locale_and_the_unicode_form() -> None:
    name = "jürgen"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for env in ({"LOGNAME": unicodedata.normalize("NFD", name)}, {"LOGNAME": name, **plain}):
        done = subprocess.run(
            [sys.executable, "-c", "from storage.users import this_account; print(ascii(this_account()))"],
            env={"PATH": os.environ["PATH"], **env},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"{name!a}\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="a passwd of its own needs root")
def test_the_accounts_of_the_system_are_asked_where_the_environment_names_none(tmp_path: Path) -> None:
    passwd = tmp_path / "passwd"
    passwd.write_text(f"root:x:0:0::/root:/bin/sh\n{NAMES['domain']}:x:{54321}:{54321}::/:/bin/sh\n")
    for uid, user in ((54321, NAMES["domain"]), (54322, "uid54322")):
        done = subprocess.run(
            [
                *("unshare", "--mount", "sh", "-c"),
                f'mount --bind {passwd} /etc/passwd && exec "$@"',
                *("sh", sys.executable, "-P", "-c", WHO, str(uid)),
            ],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == f"{user}\n", done.stderr


WHO = """
import getpass, hashlib, os, pwd, platformdirs, sys, tomllib, unicodedata  # the user may not read them
from storage.settings import Settings
from jobs.errors import ConfigError
os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
print(Settings.load({"GANQ_HOME": "/"}).user)
try:
    Settings.load({})  # there may be no home either
except ConfigError as exc:
    assert "GANQ_HOME" in exc.hint
"""


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_name_that_no_table_can_show_is_refused_or_replaced(
    ganq: "Ganq", monkeypatch: pytest.MonkeyPatch, queries: "Queries", image_folder: list[str], backend: str
) -> None:
    for bad in ("a\nb", " ada", "*", "\u202eada"):
        said = ganq("submit", "train", *image_folder, "--user", bad)
        assert (said.code, "--user" in said.err) == (2, True), bad
        assert ganq("limit", "--user", bad, "1").code == (0 if bad == "*" else 2), bad
    for name, shown in (("a\nb", "a_b"), ("\u202eada", "_ada")):
        monkeypatch.setenv("LOGNAME", name)
        job = ganq("submit", "train", *image_folder, "--json").json()["id"]
        assert queries.get(job).user == shown
