"""
Convert a .pth from outside to safetensors, in a process that is confined to that file and its answer.

    python -P storage/weights/unpickle.py < foreign.pth > answer

Imports nothing of ganq, so that it can be started by its path with an empty environment. The
file comes as standard input, and the answer goes to standard output: a line of JSON, then the
weights as safetensors. torch.load runs with weights_only=True and nothing is tried after it
fails. In case it has another hole (CVE-2025-32434, CVE-2026-24747), the operating system
refuses everything but reading, computing and answering (storage/sandbox.py). An audit hook
before that gives a clear error for what Python code tries, and is the only wall on a kernel
that has neither Landlock nor seccomp.
"""

import importlib.util
import io
import json
import os
import re
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

MAX_BYTES = 2 * 1024**3
EXTRA_MEMORY_BYTES = 1024**3  # address space beyond what torch itself and the file's tensors take
CPU_SECONDS = 60
WRAPPED = ("state_dict", "model_state_dict", "model")
MAX_LEVELS = 4
"""Dictionaries in dictionaries, of which the innermost hold tensors."""

# Everything through which Python code leaves its process; 'open' is handled below.
FORBIDDEN = (
    "ctypes.dlopen",
    "ctypes.dlsym",
    "os.exec",
    "os.fork",
    "os.kill",
    "os.link",
    "os.mkdir",
    "os.posix_spawn",
    "os.putenv",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.spawn",
    "os.startfile",
    "os.symlink",
    "os.system",
    "os.truncate",
    "pty.spawn",
    "shutil.",
    "socket.",
    "subprocess.Popen",
)

WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class RefusedError(Exception):
    """The reason why the file was not converted; `reason` is a key of storage.weights.load.REASONS."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def lock_down(file_bytes: int) -> dict[str, str]:
    """
    Confine this process for ever; every module that is needed must have been imported.

    Returns:
        The walls that this kernel does not have.
    """

    def refuse(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITE_FLAGS
        if writes or event.startswith(FORBIDDEN):
            raise PermissionError(f"blocked: {event}")

    missing: dict[str, str] = load_sandbox().confine(
        memory_bytes=4 * file_bytes + EXTRA_MEMORY_BYTES,
        cpu_seconds=CPU_SECONDS,
        file_bytes=MAX_BYTES + 16 * 1024**2,
    )
    sys.addaudithook(refuse)
    return missing


def load_sandbox() -> Any:
    """Load the module by its path: this process finds nothing of ganq by name."""
    spec = importlib.util.spec_from_file_location("ganq_sandbox", Path(__file__).parents[1] / "sandbox.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def warm_up() -> None:
    """Read a good file once, so that what torch imports late is there before the process is confined."""
    import torch
    from safetensors.torch import save

    for zipped in (True, False):
        file = io.BytesIO()
        torch.save({"a": torch.zeros(1, dtype=torch.float64)}, file, _use_new_zipfile_serialization=zipped)
        save(flat_tensors(read(file)))
    for bad in (b"\x80\x02garbage", b"\x80\x02cposix\nsystem\n."):
        with suppress(RefusedError):
            read(io.BytesIO(bad))
    "".encode("cp437")  # of names in a zip


def read(file: Any) -> Any:
    """Load a file with torch.load, and sort its many errors into a few reasons."""
    import torch

    file.seek(0)  # the parent has read the beginning through the same descriptor
    is_zip = file.read(2) == b"PK"
    if is_zip:
        if not zipfile.is_zipfile(file):  # a zip's table of contents is its end
            raise RefusedError("damaged", "its end is missing")
        if not any(name.endswith("data.pkl") for name in zipfile.ZipFile(file).namelist()):
            raise RefusedError("format")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError as exc:
        raise RefusedError("memory") from exc
    except Exception as exc:
        said = str(exc)
        named = re.search(r"GLOBAL\s+(\S+)", said) or re.search(r"unrecognized function (.+)", said)
        if named:
            raise RefusedError("code", named[1][:80]) from exc
        if isinstance(exc, PermissionError):
            raise RefusedError("code", said[:80]) from exc
        if "allocate memory" in said:
            raise RefusedError("memory") from exc
        if type(exc).__name__ == "UnpicklingError":
            broken = re.search(r"WeightsUnpickler error:\s*(.+)", said)
            detail = broken[1][:80] if broken else "its pickle is none"
            raise RefusedError("damaged" if is_zip else "format", detail) from exc
        raise RefusedError("damaged", first_line(said)) from exc


def first_line(said: str) -> str:
    """Return what an exception of torch says, without the place in its C++ source."""
    return re.sub(r"^\[enforce fail at [^\]]*\] \. ", "", said.strip()).split("\n")[0][:120]


def flat_tensors(loaded: Any) -> dict[str, Any]:
    """
    Return the float tensors of a state dict as float32, owning their memory; counters as int64.

    Of a checkpoint that holds state dicts of several networks, the keys begin with the name of the network:
    {'netG': {'main.0.weight': …}} gives 'netG.main.0.weight'. What else it holds is left out.

    Raises:
        RefusedError: it is something else, or holds a value that is not finite.
    """
    import torch

    if not isinstance(loaded, dict):
        raise RefusedError("not_weights", f"a {type(loaded).__name__}")
    for name in WRAPPED:
        if isinstance(loaded.get(name), dict):
            loaded = loaded[name]
    if not loaded:
        raise RefusedError("not_weights", "an empty dictionary")
    state = loaded
    if not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        state = {}
        for name, network in _state_dicts(loaded):
            state |= {f"{name}.{key}": value for key, value in network.items()}
    tensors: dict[str, Any] = {}
    total = 0
    for key, value in (state or loaded).items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            names = ", ".join(str(name)[:40] for name in list(loaded)[:4])
            raise RefusedError("not_weights", f"a dictionary of other things ({names})")
        counter = _counts(key, value)
        plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
        if not plain or not (counter or value.is_floating_point()):
            raise RefusedError("not_floats", f"{key[:60]} is {value.dtype}".replace("torch.", ""))
        # A view of one number can claim any shape: count before copying.
        total += value.numel() * max(value.element_size(), 4)
        if total > MAX_BYTES:
            raise RefusedError("too_big")
        kept = value.detach().to(torch.int64 if counter else torch.float32).contiguous().clone()
        if not counter and not bool(torch.isfinite(kept).all()):
            raise RefusedError("not_finite", key[:60])
        tensors[key] = kept
    return tensors


def _state_dicts(loaded: dict[Any, Any], levels: int = MAX_LEVELS) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the dictionaries of float tensors in a checkpoint, each with its name; optimisers are none."""
    import torch

    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, dict) or not value:
            continue
        if all(
            isinstance(key, str)
            and isinstance(one, torch.Tensor)
            and (one.is_floating_point() or _counts(key, one))
            for key, one in value.items()
        ):
            yield name, value
        elif levels > 1:
            for inner, network in _state_dicts(value, levels - 1):
                yield (name if inner in WRAPPED else f"{name}.{inner}"), network


def _counts(key: str, value: Any) -> bool:
    return key.endswith("num_batches_tracked") and not value.is_floating_point()


def main() -> None:
    warnings.simplefilter("ignore")  # stderr is read by a program, for the reason of a crash
    import torch
    from safetensors.torch import save

    torch.set_num_threads(1)
    warm_up()
    answer: dict[str, Any]
    weights = b""
    with os.fdopen(1, "wb") as out, os.fdopen(0, "rb") as file:
        lock_down(os.fstat(0).st_size)
        try:
            tensors = flat_tensors(read(file))
            weights = save(tensors)
            answer = {"ok": True, "tensors": len(tensors)}
        except RefusedError as exc:
            answer = {"ok": False, "reason": exc.reason, "detail": exc.detail}
        except MemoryError:
            answer = {"ok": False, "reason": "memory", "detail": ""}
        except RuntimeError as exc:
            reason = "memory" if "allocate memory" in str(exc) else "damaged"
            answer = {"ok": False, "reason": reason, "detail": first_line(str(exc))}
        out.write(json.dumps(answer).encode() + b"\n")
        out.write(weights)


if __name__ == "__main__":
    main()
