"""`ganq doctor` on a volume that several Unix accounts write to."""

import os
from pathlib import Path

import pytest

from worker.doctor.check import Finding
from worker.doctor.sharing import check_sharing


def findings(root: Path) -> list[Finding]:
    return list(check_sharing(root))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "shared" / "jobs" / "000001" / "a1").mkdir(parents=True)
    return tmp_path / "shared"


def test_a_volume_of_one_account_needs_no_group(root: Path) -> None:
    assert findings(root) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_several_owners_without_a_group_are_named_with_a_hint(root: Path) -> None:
    os.chown(root / "jobs" / "000001", 43001, 43001)
    (found,) = findings(root)
    assert (found.level, "uid 43001" in found.message) == ("warn", True)
    assert "setgid bit" in str(found.hint)


def test_folders_that_are_not_shared_with_the_group_are_counted(root: Path) -> None:
    root.chmod(0o2770)
    for folder in [root / "jobs", root / "jobs" / "000001", root / "jobs" / "000001" / "a1"]:
        folder.chmod(0o2770)
    assert [one.level for one in findings(root)] == ["ok"]
    (root / "jobs" / "000001").chmod(0o2700)
    (found,) = findings(root)
    assert found.level == "warn"
    assert "1 of its newest folders are not shared" in found.message


def test_a_volume_that_anyone_can_change_is_an_error(root: Path) -> None:
    root.chmod(0o777)
    (found,) = findings(root)
    assert found.level == "error"
    assert f"chmod o-w {root}" in str(found.hint)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_the_group_is_named_to_an_account_outside_it(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root.chmod(0o2770)
    os.chown(root, 43003, 43100)
    root.chmod(0o2770)
    monkeypatch.setattr(os, "geteuid", lambda: 43001)
    monkeypatch.setattr(os, "getegid", lambda: 43001)
    monkeypatch.setattr(os, "getgroups", list)
    (found,) = findings(root)
    assert "this account is not in the group 43100" in found.message
    assert "usermod --append --groups 43100 uid 43001" in str(found.hint)
