"""`ganq token`: made, listed, revoked."""

import pytest
from unit.conftest import Ganq

from storage.db.engine import Database
from storage.db.tokens import FORM


def test_a_token_is_printed_once_and_nothing_else_on_stdout(ganq: Ganq, database: Database) -> None:
    made = ganq("token", "create", "--user", "ada", "--role", "submitter", "--expires", "2d")
    text = made.out.strip()
    assert FORM.fullmatch(text)
    assert "not shown again" in made.err
    assert text not in made.err
    listed = ganq("token", "list")
    assert "submitter" in listed.out
    assert text.rpartition("_")[2] not in listed.out
    (one,) = ganq("token", "list", "--json").json()
    assert (one["user"], one["role"], one["state"], one["used_at"]) == ("ada", "submitter", "valid", None)
    assert one["expires_at"] - one["created_at"] == pytest.approx(2 * 86400, abs=5)
    never = ganq("token", "create", "--user", "b", "--role", "viewer", "--expires", "never", "--json").json()
    assert never["expires_at"] is None
    assert FORM.fullmatch(never["token"])


def test_a_revoked_token_stays_listed_and_may_be_revoked_again(ganq: Ganq, database: Database) -> None:
    ganq("token", "create", "--user", "ada", "--role", "viewer")
    assert ganq("token", "revoke", "1").out == "token 1 of ada is revoked\n"
    assert ganq("token", "revoke", "1").code == 0
    assert ganq("token", "list", "--json").json()[0]["state"] == "revoked"
    assert ganq("token", "revoke", "7").code == 3


VIEWER = ("--user", "a", "--role", "viewer")


@pytest.mark.parametrize(
    "args",
    [
        ("--user", "ada"),
        ("--role", "viewer"),
        ("--user", "*", "--role", "viewer"),
        ("--user", "a", "--role", "root"),
        (*VIEWER, "--expires", "soon"),
        (*VIEWER, "--expires", "0d"),
    ],
)
def test_a_token_that_cannot_be_is_refused(ganq: Ganq, database: Database, args: tuple[str, ...]) -> None:
    assert ganq("token", "create", *args).code == 2
    assert ganq("token", "list").out == "no tokens: ganq token create --user USER --role ROLE\n"
