"""GPUs are found through nvidia-smi; these tests put a program of that name on the path."""

import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import GpuBusyError, GpuUnavailableError
from worker.host import gpu

EIGHT = [f"{n}, GPU-{n:08d}-aaaa-bbbb-cccc-dddddddddddd, NVIDIA H100 80GB HBM3, 81559" for n in range(8)]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install an nvidia-smi that prints these lines and exits with this code."""

    def install(lines: list[str], code: int = 0, mig: str = "") -> None:
        listing = tmp_path / "listing.txt"
        listing.write_text(mig)
        answer = tmp_path / "answer.txt"
        answer.write_text("".join(line + "\n" for line in lines))
        program = tmp_path / "nvidia-smi"
        # It answers only the query that the real program supports.
        program.write_text(
            "#!/bin/sh\n"
            f'test "$1" = "-L" && exec cat {listing}\n'
            'test "$1" = "--query-gpu=index,uuid,name,memory.total" || exit 9\n'
            'test "$2" = "--format=csv,noheader,nounits" || exit 9\n'
            f"cat {answer}\nexit {code}\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    return install


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.choose("auto") == []


@pytest.mark.parametrize(
    ("lines", "count"), [(["No devices were found"], 0), (EIGHT[:1], 1), (EIGHT, 8)], ids=["0", "1", "8"]
)
def test_every_gpu_that_the_driver_names_is_found(nvidia_smi: Any, lines: list[str], count: int) -> None:
    nvidia_smi(lines, code=6 if count == 0 else 0)
    found = gpu.choose("auto")
    assert [one.index for one in found] == list(range(count))
    assert len({one.uuid for one in found}) == count
    assert all(one.name == "NVIDIA H100 80GB HBM3" and one.memory_mib == 81559 for one in found)


def test_gpus_are_chosen_by_index_and_by_uuid(nvidia_smi: Any) -> None:
    nvidia_smi(EIGHT)
    chosen = gpu.choose("3,GPU-00000005-aaaa-bbbb-cccc-dddddddddddd,3")
    assert [one.index for one in chosen] == [3, 5]


@pytest.mark.parametrize(
    ("given", "indices"),
    [
        (None, list(range(8))),
        ("", []),
        ("-1", []),
        ("-1,0", []),
        ("NoDevFiles", []),
        ("2", [2]),
        ("5,1", [5, 1]),
        (" 5 , 1 ", [5, 1]),
        ("3,3", [3]),
        ("0,9,1", [0]),  # the list ends at the first entry that is invalid
        ("0,-1,1", [0]),
        ("1,,2", [1]),
        ("GPU-00000005-aaaa-bbbb-cccc-dddddddddddd,GPU-00000002", [5, 2]),  # as many digits as are needed
        ("GPU-00000001,GPU-0", [1]),  # too few
    ],
)
def test_only_the_gpus_of_cuda_visible_devices_are_used(
    nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch, given: Any, indices: Any
) -> None:
    nvidia_smi(EIGHT)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert [one.index for one in gpu.choose("all")] == indices
    assert [one.index for one in gpu.choose("auto")] == indices


@pytest.mark.parametrize("given", ["9", "9,0", "GPU-0", "GPU-ffff", "gpu0", "MIG-1"])
def test_a_list_that_names_no_gpu_here_is_an_error_and_not_a_cpu_worker(
    nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    nvidia_smi(EIGHT[:2])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    with pytest.raises(GpuUnavailableError) as caught:
        gpu.choose("auto")
    assert f"CUDA_VISIBLE_DEVICES={given}" in caught.value.message
    assert "0 (NVIDIA H100 80GB HBM3), 1" in (caught.value.hint or "")
    assert gpu.choose("none") == []


def test_gpus_are_chosen_among_the_visible_ones_by_the_numbers_of_nvidia_smi(
    nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(EIGHT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert [one.index for one in gpu.choose("6")] == [6]
    assert [one.index for one in gpu.choose("GPU-00000004-aaaa-bbbb-cccc-dddddddddddd")] == [4]
    for wanted in ("0", "GPU-00000000-aaaa-bbbb-cccc-dddddddddddd", "GPU-0000000"):
        with pytest.raises(GpuUnavailableError) as caught:
            gpu.choose(wanted)
        assert "among those of CUDA_VISIBLE_DEVICES=4,6" in caught.value.message
        assert "4 (NVIDIA H100 80GB HBM3), 6" in (caught.value.hint or "")


def test_numbers_that_cuda_and_nvidia_smi_count_differently_are_refused(
    nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi([EIGHT[0].replace("H100 80GB HBM3", "T400 4GB"), *EIGHT[1:3]])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(GpuUnavailableError) as caught:
        gpu.choose("all")
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in (caught.value.hint or "")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert [one.index for one in gpu.choose("all")] == [0]
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,1,0")  # all of them, in whatever order
    assert [one.index for one in gpu.choose("all")] == [2, 1, 0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-00000002")
    assert [one.index for one in gpu.choose("all")] == [2]


MIG_UUIDS = [f"MIG-{n}fbd1fdf-aaaa-bbbb-cccc-dddddddddddd" for n in range(3)]
MIG = f"""GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-aaaa-bbbb-cccc-dddddddddddd)
  MIG 1g.10gb     Device  0: (UUID: {MIG_UUIDS[0]})
  MIG 1g.10gb+me  Device  1: (UUID: {MIG_UUIDS[1]})
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-00000001-aaaa-bbbb-cccc-dddddddddddd)
  MIG 3g.40gb     Device  0: (UUID: {MIG_UUIDS[2]})
"""


def test_mig_devices_are_used_by_name_each_with_a_label_of_its_own(
    nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(EIGHT[:2], mig=MIG)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"{MIG_UUIDS[1]},MIG-2fbd")
    first, second = gpu.choose("all")
    assert (first.uuid, first.label, first.memory_mib) == (MIG_UUIDS[1], "gpu0-mig1", 10240)
    assert (second.uuid, second.label, second.memory_mib) == (MIG_UUIDS[2], "gpu1-mig0", 40960)
    assert gpu.pin(first)["CUDA_VISIBLE_DEVICES"] == MIG_UUIDS[1]
    assert gpu.choose(MIG_UUIDS[2]) == [second]
    with pytest.raises(GpuUnavailableError):
        gpu.choose(MIG_UUIDS[0])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [one.label for one in gpu.choose(MIG_UUIDS[0])] == ["gpu0-mig0"]
    assert [one.label for one in gpu.choose("all")] == ["gpu0", "gpu1"]


def test_mig_devices_are_used_by_the_names_of_older_drivers(
    nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(EIGHT[:2], mig=MIG)
    name = "MIG-GPU-00000001-aaaa-bbbb-cccc-dddddddddddd/2/0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
    (one,) = gpu.choose("all")
    assert (one.uuid, one.label) == (name, "gpu1-mig2.0")
    assert gpu.choose(name) == [one]


def test_in_a_privileged_container_only_its_own_gpus_are_used(
    nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(EIGHT[:4])
    for given, indices in (
        ("GPU-00000002-aaaa-bbbb-cccc-dddddddddddd", [2]),
        ("GPU-00000009-aaaa-bbbb-cccc-dddddddddddd", [0, 1, 2, 3]),  # none of this machine
        ("3", [0, 1, 2, 3]),  # the host's index
        ("all", [0, 1, 2, 3]),
        ("void", [0, 1, 2, 3]),  # of device plugins that give GPUs in another way
    ):
        monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", given)
        assert [one.index for one in gpu.choose("all")] == indices, given
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "GPU-00000002,GPU-00000003")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert [one.index for one in gpu.choose("all")] == [3]


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(nvidia_smi: Any) -> None:
    nvidia_smi(EIGHT[:2])
    with pytest.raises(GpuUnavailableError) as caught:
        gpu.choose("0,2")
    assert "'2'" in caught.value.message
    assert "0 (NVIDIA H100 80GB HBM3), 1" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("lines", "code"), [(["Failed to initialize NVML: Driver/library version mismatch"], 18), (["?"], 0)]
)
def test_a_driver_that_does_not_answer_is_an_error_and_not_a_cpu_worker(
    nvidia_smi: Any, lines: list[str], code: int
) -> None:
    nvidia_smi(lines, code)
    with pytest.raises(GpuUnavailableError):
        gpu.choose("auto")
    assert gpu.choose("none") == []


def test_memory_that_the_driver_does_not_know_is_zero(nvidia_smi: Any) -> None:
    nvidia_smi(["0, GPU-1, NVIDIA GB10, [N/A]"])
    assert gpu.discover()[0].memory_mib == 0


def test_a_worker_is_pinned_by_uuid_before_torch_is_imported() -> None:
    one = gpu.Gpu(3, "GPU-abc", "H100", 1)
    assert gpu.pin(one)["CUDA_VISIBLE_DEVICES"] == "GPU-abc"
    assert gpu.pin(one)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert gpu.pin(None)["CUDA_VISIBLE_DEVICES"] == ""


HOLD = """
import os, sys
from pathlib import Path
from worker.host import gpu
if sys.argv[3:]:
    os.setgroups([]); os.setgid(int(sys.argv[3])); os.setuid(int(sys.argv[3])); os.umask(0o077)
held = gpu.lock(sys.argv[1], Path(sys.argv[2]) if sys.argv[2] else None)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(label: str, scope: "Path | str" = "", *, uid: int | None = None, **env: str) -> Iterator[Any]:
    """Start a process that holds a lock, as another user if need be; it is killed at the end."""
    user = [str(uid)] if uid is not None else []
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, label, str(scope), *user],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **env},
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip(), process
        finally:
            process.kill()


def label() -> str:
    """A GPU that no other test of this machine uses."""
    return f"GPU-{uuid.uuid4()}"


def test_a_second_worker_on_one_gpu_is_refused_until_the_first_has_exited(tmp_path: Path) -> None:
    mine, other_gpu = label(), label()
    with holder(mine, tmp_path) as (result, _):
        assert result == "held"
        with pytest.raises(GpuBusyError):
            gpu.lock(mine, tmp_path)
        gpu.lock(other_gpu, tmp_path).close()
        gpu.lock(mine, tmp_path.parent).close()  # another GANQ_HOME
    gpu.lock(mine, tmp_path).close()


def test_a_lock_lives_as_long_as_a_child_that_inherited_it() -> None:
    mine = label()
    held = gpu.lock(mine)
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        stdin=subprocess.PIPE,
        pass_fds=[held.fileno()],
    ) as child:
        held.close()
        with pytest.raises(GpuBusyError):
            gpu.lock(mine)
        child.kill()
    gpu.lock(mine).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_users_take_a_gpu_in_turn_whoever_was_first(shared_tmp: Path) -> None:
    mine = label()
    for uid in (1001, 1002, 1001):
        with holder(mine, uid=uid, TMPDIR=str(shared_tmp)) as (result, _):
            assert result == "held"
            with holder(mine, uid=1003, TMPDIR=str(shared_tmp)) as (result, process):
                assert result != "held"
                assert "GpuBusyError" in process.stdout.read()


def test_a_cleaner_of_the_temporary_folder_parts_no_lock_from_its_holder(
    shared_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(shared_tmp))
    mine = label()
    with holder(mine, TMPDIR=str(shared_tmp)), holder("up", shared_tmp):
        for path in shared_tmp.iterdir():
            path.unlink()
        for taken, scope in ((mine, None), ("up", shared_tmp)):
            with pytest.raises(GpuBusyError):
                gpu.lock(taken, scope)


def test_workers_with_different_temporary_folders_find_each_other(
    shared_tmp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = label()
    with holder(mine, TMPDIR=str(shared_tmp)), pytest.raises(GpuBusyError):
        gpu.lock(mine)


def test_a_long_name_and_a_home_that_is_not_there_can_be_locked(tmp_path: Path) -> None:
    names = [f"worker {'é' * 63}{letter}" for letter in "ab"]
    held = [gpu.lock(name, tmp_path / "missing") for name in names]
    with pytest.raises(GpuBusyError):
        gpu.lock(names[0], tmp_path / "missing")
    for one in held:
        one.close()


@pytest.fixture
def shared_tmp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary folder for all users, as /tmp is."""
    with tempfile.TemporaryDirectory(prefix="gq-") as folder:
        Path(folder).chmod(0o1777)
        yield Path(folder)


def test_finding_gpus_imports_no_torch() -> None:
    code = "import sys, worker.host.gpu as g; g.choose('auto'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PATH": "/nonexistent"})
