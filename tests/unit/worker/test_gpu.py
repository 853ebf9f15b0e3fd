"""GPUs are found through nvidia-smi's own words; these tests put a program of that name on the path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.errors import GpuBusyError, GpuUnavailableError
from worker import gpu

EIGHT = [f"{n}, GPU-{n:08d}-aaaa-bbbb-cccc-dddddddddddd, NVIDIA H100 80GB HBM3, 81559" for n in range(8)]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs an nvidia-smi that answers these lines with this exit code."""

    def install(lines: list[str], code: int = 0) -> None:
        answer = tmp_path / "answer.txt"
        answer.write_text("".join(line + "\n" for line in lines))
        program = tmp_path / "nvidia-smi"
        # It answers only the very question that the real one understands.
        program.write_text(
            "#!/bin/sh\n"
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
def test_every_gpu_that_the_driver_names_is_found(nvidia_smi, lines: list[str], count: int) -> None:
    nvidia_smi(lines, code=6 if count == 0 else 0)
    found = gpu.choose("auto")
    assert [one.index for one in found] == list(range(count))
    assert len({one.uuid for one in found}) == count
    assert all(one.name == "NVIDIA H100 80GB HBM3" and one.memory_mib == 81559 for one in found)


def test_gpus_are_chosen_by_index_and_by_uuid(nvidia_smi) -> None:
    nvidia_smi(EIGHT)
    chosen = gpu.choose("3,GPU-00000005-aaaa-bbbb-cccc-dddddddddddd,3")
    assert [one.index for one in chosen] == [3, 5]


def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(nvidia_smi) -> None:
    nvidia_smi(EIGHT[:2])
    with pytest.raises(GpuUnavailableError) as caught:
        gpu.choose("0,2")
    assert "'2'" in caught.value.message
    assert "0 (NVIDIA H100 80GB HBM3), 1" in caught.value.hint


@pytest.mark.parametrize(
    ("lines", "code"), [(["Failed to initialize NVML: Driver/library version mismatch"], 18), (["?"], 0)]
)
def test_a_driver_that_does_not_answer_is_an_error_and_not_a_cpu_worker(nvidia_smi, lines, code) -> None:
    nvidia_smi(lines, code)
    with pytest.raises(GpuUnavailableError):
        gpu.choose("auto")
    assert gpu.choose("none") == []


def test_memory_that_the_driver_does_not_know_is_zero(nvidia_smi) -> None:
    nvidia_smi(["0, GPU-1, NVIDIA GB10, [N/A]"])
    assert gpu.discover()[0].memory_mib == 0


def test_a_worker_is_pinned_by_uuid_before_torch_is_imported() -> None:
    one = gpu.Gpu(3, "GPU-abc", "H100", 1)
    assert gpu.pin(one)["CUDA_VISIBLE_DEVICES"] == "GPU-abc"
    assert gpu.pin(one)["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert gpu.pin(None)["CUDA_VISIBLE_DEVICES"] == ""


def test_a_second_worker_on_one_gpu_is_refused_until_the_first_has_gone(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from worker import gpu\n"
        "held = gpu.lock('GPU-1', Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(GpuBusyError):
            gpu.lock("GPU-1", tmp_path)
        gpu.lock("GPU-2", tmp_path).close()
        other.kill()
    gpu.lock("GPU-1", tmp_path).close()


def test_finding_gpus_imports_no_torch() -> None:
    code = "import sys, worker.gpu as g; g.choose('auto'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PATH": "/nonexistent"})
