"""`ganq doctor` reports problems and what to do about them: this machine, its GPUs and torch."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from jobs.errors import ConfigError
from storage import sandbox
from worker.doctor import examine, gpu
from worker.doctor.machine import check_files, check_runtime, check_sandbox
from worker.host.embedded_redis import runtime_folder

if TYPE_CHECKING:
    from unit.conftest import Ganq

    from storage.settings import Settings


@pytest.fixture
def torch_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a distribution of that name before all others: torch_installed('2.9.1', cuda='12.8')."""

    def install(version: str, cuda: str | None = None) -> None:
        about = tmp_path / f"torch-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(
            f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\nhip: Optional[str] = None\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_a_torch_that_is_too_old_fails(torch_installed: Any) -> None:
    torch_installed("2.9.1")
    reported = gpu.check_torch(0)
    assert reported.level == "error"
    assert "torch>=2.10" in (reported.hint or "")


def test_a_torch_for_the_cpu_fails_where_there_is_a_gpu_and_only_there(torch_installed: Any) -> None:
    torch_installed("2.14.1+cpu")
    assert gpu.check_torch(0).level == "ok"
    reported = gpu.check_torch(2)
    assert reported.level == "error"
    assert "built for the CPU alone" in reported.message


@pytest.mark.parametrize(("driver", "level"), [("570.86.15", "error"), ("580.65.06", "ok")])
def test_a_driver_that_is_too_old_for_torchs_cuda_fails(
    torch_installed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str, level: str
) -> None:
    torch_installed("2.14.1", cuda="13.0")
    result = tmp_path / "driver"
    result.write_text(
        f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build  (dvs-builder)\n"
        "GCC version:  gcc version 12.3.0\n"
    )
    monkeypatch.setattr(gpu, "DRIVER", result)
    assert gpu.check_torch(1).level == level


def test_a_driver_that_does_not_answer_fails(
    ganq: "Ganq", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result = ganq("doctor")
    assert result.code == 1
    assert "Driver/library version mismatch" in result.out


@pytest.mark.parametrize(
    ("arches", "capability", "runs"),
    [
        (["sm_80", "sm_90"], [9, 0], True),
        (["sm_80", "sm_90"], [8, 6], True),  # the same major version, a newer minor
        (["sm_86"], [8, 0], False),
        (["sm_90"], [12, 0], False),
        (["sm_90", "compute_90"], [12, 0], True),  # compiled by the driver
        (["sm_120"], [12, 0], True),
        (["sm_90a"], [9, 0], True),
        (["gfx942"], [9, 4], False),
    ],
)
def test_a_build_of_torch_runs_on_what_it_has_code_for(
    arches: list[str], capability: list[int], runs: bool
) -> None:
    assert gpu.runs_on(arches, capability) is runs


def printing(reported: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        f"import sys; print({reported!r}); print('CUDA error 803', file=sys.stderr)",
    ]


@pytest.mark.parametrize(
    ("reported", "level", "word"),
    [
        ('{"available": true, "arches": ["sm_90"], "gpus": [["H100", [9, 0]]]}', "ok", "can use 1 GPU"),
        (
            '{"available": true, "arches": ["sm_80"], "gpus": [["B200", [10, 0]]]}',
            "error",
            "no code for B200",
        ),
        ('{"available": false, "arches": [], "gpus": []}', "error", "CUDA error 803"),
        ("Illegal instruction", "error", "cannot be started"),
    ],
)
def test_what_torch_itself_makes_of_the_gpus_decides(reported: str, level: str, word: str) -> None:
    found = gpu.check_torch_on_gpus(printing(reported))
    assert found.level == level
    assert word in found.message


def test_the_question_to_torch_is_one_that_it_answers() -> None:
    reported = gpu.check_torch_on_gpus([sys.executable, "-P", "-c", gpu.ASK_TORCH])
    assert "cannot be started" not in reported.message


def test_a_torch_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TORCH_S", 0.2)
    assert "within" in gpu.check_torch_on_gpus(["sleep", "30"]).message


# --- files and folders --------------------------------------------------------------------


def worst(found: Any) -> Any:
    return {one.level for one in found}


def test_a_configuration_that_anyone_can_write_fails_in_one_line(ganq: "Ganq", settings: "Settings") -> None:
    config = settings.home / "ganq.toml"
    config.write_text("log_format = 'json'")
    config.chmod(0o666)
    result = ganq("doctor")
    assert result.code == 1
    assert f"→ chmod o-w {config}" in result.out
    reported = ganq("doctor", "--json").json()
    assert (reported["ok"], reported["settings"], [one["check"] for one in reported["findings"]]) == (
        False,
        None,
        ["settings"],
    )


@pytest.mark.parametrize(("mode", "level"), [(0o600, "ok"), (0o644, "warn"), (0o622, "error")])
def test_a_file_with_a_password_is_for_its_owner_alone(
    settings: "Settings", tmp_path: Path, mode: int, level: str
) -> None:
    secret = tmp_path / "redis_url"
    secret.write_text("redis://ada:s3cret@127.0.0.1/0")
    secret.chmod(mode)
    found = list(check_files(settings, {"GANQ_REDIS_URL_FILE": str(secret)}))
    assert worst(found) == {level}
    assert "s3cret" not in str(found)


def test_a_configuration_with_a_password_that_anyone_can_read_is_a_warning(settings: "Settings") -> None:
    config = settings.home / "ganq.toml"
    config.write_text("redis_url = 'redis://127.0.0.1/0'\n")
    config.chmod(0o644)
    assert worst(check_files(settings, {})) == {"ok"}
    config.write_text("redis_url = 'redis://ada:s3cret@127.0.0.1/0'\n")
    assert worst(check_files(settings, {})) == {"warn"}


def test_a_home_in_which_anyone_can_put_files_fails(settings: "Settings") -> None:
    settings.home.chmod(0o777)
    assert worst(check_files(settings, {})) == {"error"}
    settings.home.chmod(0o1777)
    assert worst(check_files(settings, {})) == {"ok"}


def test_a_secret_that_never_ends_is_not_waited_for(
    ganq: "Ganq", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.doctor.SETTINGS_TIMEOUT_S", 0.3)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setenv("GANQ_REDIS_URL_FILE", str(pipe))
    result = ganq("doctor")
    assert result.code == 1
    assert "cannot be read completely" in result.out
    with open(pipe, "w"):  # ends the thread that reads it
        pass


def test_a_temporary_folder_too_long_for_sockets_is_named_with_the_one_that_is_used(
    settings: "Settings", monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worst(check_runtime(settings)) == {"ok"}
    monkeypatch.delenv("TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/" + "x" * 90)
    first, second = check_runtime(settings)
    assert "too long for sockets" in first.message
    assert (second.level, second.message.split("/")[1]) == ("ok", "tmp")


@pytest.fixture
def own_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A temporary folder of the test's own."""
    folder = tmp_path / "t"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_a_runtime_folder_that_is_open_to_others_or_theirs_fails(settings: "Settings", own_tmp: Any) -> None:
    settings.runtime.mkdir(mode=0o700)
    assert worst(check_runtime(settings)) == {"ok"}
    settings.runtime.chmod(0o755)
    (reported,) = check_runtime(settings)
    assert reported.level == "error"
    assert "mode 755" in reported.message
    assert reported.hint == f"remove it: rm -r {settings.runtime}"
    settings.runtime.rmdir()
    ours = own_tmp / "ours"
    ours.mkdir(mode=0o700)
    settings.runtime.symlink_to(ours)
    assert worst(check_runtime(settings)) == {"error"}
    with pytest.raises(ConfigError, match="is not private"):
        runtime_folder(settings)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives a folder away")
def test_a_runtime_folder_of_another_user_fails(
    settings: "Settings", own_tmp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.runtime.mkdir(mode=0o700)
    os.chown(settings.runtime, 65534, 65534)
    (reported,) = check_runtime(settings)
    assert "uid 65534" in reported.message
    monkeypatch.setattr("os.getuid", lambda: 65533)
    folder = settings.runtime
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with pytest.raises(ConfigError) as caught:
        runtime_folder(settings)
    assert "TMPDIR" in (caught.value.hint or ""), "only its owner and root may remove it from a sticky folder"


def test_a_temporary_folder_without_the_sticky_bit_fails(settings: "Settings", own_tmp: Any) -> None:
    own_tmp.chmod(0o777)
    assert "error" in worst(check_runtime(settings))


def test_a_tmpdir_that_does_not_exist_is_named_with_the_folder_that_is_used(
    settings: "Settings", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", "/nonexistent/tmp")
    assert "/nonexistent/tmp is not writable" in next(check_runtime(settings)).message


# --- extras -------------------------------------------------------------------------------


def test_the_extras_are_those_of_the_package_and_each_has_its_use() -> None:
    assert set(examine.extras()) == set(examine.USES)
    assert all(examine.extras().values())


def test_an_extra_that_is_missing_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "_installed", lambda name: name != "onnxscript")
    reported = {one.message.split()[0]: one for one in examine.check_extras()}
    assert "pip install 'ganq[onnx]'" in reported["onnx"].message
    assert reported["onnx"].level == "ok"
    assert "is installed" in reported["faces"].message


# --- the sandbox ------------------------------------------------------------------------------


def test_each_part_of_the_sandbox_is_tried() -> None:
    (found,) = check_sandbox()
    assert found.level == "ok", found.message


@pytest.mark.parametrize(
    ("line", "instead", "result"),
    [
        (
            "LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446",
            "= 9999, 446",
            "landlock (function not",
        ),
        ('SECCOMP_NUMBER = {"x86_64": 317, "aarch64": 277}', "= {}", "seccomp (not known for"),
    ],
)
def test_a_part_that_the_kernel_lacks_is_a_warning_that_names_it(
    tmp_path: Path, line: str, instead: str, result: str
) -> None:
    text = Path(sandbox.__file__).read_text()
    assert line in text
    name = line.split(" = ")[0]
    (tmp_path / "sandbox.py").write_text(text.replace(line, f"{name} {instead}"))
    (found,) = check_sandbox(tmp_path / "sandbox.py")
    assert found.level == "warn"
    assert result in found.message
    assert found.hint


def test_a_sandboxed_process_that_does_not_start_fails(tmp_path: Path) -> None:
    (tmp_path / "sandbox.py").write_text("raise SystemExit('no memory')")
    (found,) = check_sandbox(tmp_path / "sandbox.py")
    assert found.level == "error"
    assert "no memory" in found.message
