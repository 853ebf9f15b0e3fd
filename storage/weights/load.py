"""
Read weights from outside in a way that no code in them can run.

A .pth is a pickle, which is a program: storage/weights/unpickle.py opens it in a process that
is confined by the operating system, and returns safetensors. Those, and .safetensors that a user
gives, are numbers behind a JSON header of limited length and are read in this process.
"""

import errno
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from jobs.errors import ForeignFileError, NotFoundError

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 2 * 1024**3
MAX_HEADER_BYTES = 8 * 1024**2  # of safetensors; a pair of these networks needs 10 kB
SANDBOX = Path(__file__).with_name("unpickle.py")
SANDBOX_SECONDS = 180.0  # by the clock: torch's own start-up, then at most a minute of CPU
# What Python needs to find torch, until the process empties its environment.
ENVIRONMENT = ("HOME", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH")
# One thread: Landlock confines the thread that asks for it.
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
ANSWER_BYTES = 64 * 1024
ERROR_BYTES = 4096

RESAVE_HINT = "save the numbers alone where it was made: torch.save(net.state_dict(), PATH)"
COPY_AGAIN_HINT = "copy or download it again and compare the sizes"

CLASSES = ("GeneClasses.", "DiscrimClasses.", "G.GeneClasses.", "D.DiscrimClasses.")
REASONS: dict[str, tuple[str, str]] = {
    "code": ("names code to run ({detail}), and weights are numbers alone; nothing was run", RESAVE_HINT),
    "format": ("is no PyTorch weight file", "give a .pth written by torch.save, or a .safetensors"),
    "damaged": ("is damaged or cut short ({detail})", COPY_AGAIN_HINT),
    "memory": ("asks for more memory than weights of its size can need", RESAVE_HINT),
    "too_big": ("unfolds to more than 2 GiB of weights", RESAVE_HINT),
    "not_weights": ("holds {detail}, not the weights of one network", RESAVE_HINT),
    "classes": (
        "is of a class-conditional network, and a file does not name the classes",
        "draw from the job that trained it: ganq submit generate --from JOB --class NAME",
    ),
    "not_floats": ("holds numbers of a kind that weights are not: {detail}", RESAVE_HINT),
    "not_finite": (
        "holds a value that is not finite, in {detail}",
        "that training run had diverged; take a file from an earlier epoch",
    ),
}


def read_weights(path: Path) -> "dict[str, Tensor]":
    """
    Return the weights in a .pth or .safetensors, under the keys of jobs/networks/dcgan.py, on the CPU.

    A file that holds both networks gives the keys of both: jobs.networks.weights.select() takes one.

    Args:
        path: the format is recognised by the contents, not by the name.

    Returns:
        `Gene.…` or `Discrim.…` to float32 tensors (counters: int64). Keys that belong
        to neither are kept, for load_state_dict() to name.

    Raises:
        NotFoundError: there is nothing at `path`.
        ForeignFileError: what is there is not weights, or not whole, or not harmless.
    """
    from jobs.networks.weights import check_colours, network_keys

    weights = network_keys(read_tensors(Path(path)))
    check_colours(weights, str(path))
    return weights


def load_origin(netg: Path, netd: Path | None = None) -> "tuple[dict[str, Any], dict[str, Tensor]]":
    """
    Return the tutorial's pair of files as one checkpoint of ganq.

    Args:
        netg: the generator; a file with both networks gives the discriminator too, if it is one of ganq's
            family.
        netd: the discriminator, without which images cannot be scored.

    Returns:
        (Architecture as JSON, tensors `G.Gene.…` and `D.Discrim.…`).

    Raises:
        NotFoundError: a path leads nowhere.
        ForeignFileError: a file is not what it should be; the two do not belong together.
    """
    from jobs.networks.weights import check_colours, fit, infer_architecture, join, network_keys, select

    paths = [Path(netg)] if netd is None else [Path(netg), Path(netd)]
    with ThreadPoolExecutor(len(paths)) as pool:  # two sandboxes at once: each starts torch for 2 s
        files = [network_keys(tensors) for tensors in pool.map(read_tensors, paths)]
    for path, tensors in zip(paths, files, strict=True):
        if any(key.startswith(CLASSES) for key in tensors):
            raise _error(path, "classes")
        check_colours(tensors, str(path))
    names = (str(paths[0]), str(paths[-1]))
    if netd is None:
        d_weights = {key: tensor for key, tensor in files[0].items() if key.startswith("Discrim.")}
        g_weights = select(files[0], "G") if len(d_weights) < len(files[0]) else files[0]
    else:
        # Only a file that holds both is cut; a swapped pair stays for infer_architecture to see.
        g_weights = select(files[0], "G") or files[0]
        d_weights = select(files[1], "D") or files[1]
    try:
        arch = infer_architecture(g_weights, d_weights, names=names)
        fitted_d = fit(d_weights, arch, "D", name=names[1]) if d_weights else None
    except ForeignFileError:
        if netd is not None:
            raise
        # An unusable discriminator is no reason to refuse the generator.
        arch, fitted_d = infer_architecture(g_weights, names=names), None
    return arch.to_json(), join(fit(g_weights, arch, "G", name=names[0]), fitted_d)


# --- one file ---------------------------------------------------------------------------------


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """
    Return the tensors of a .pth or .safetensors under the file's own keys.

    Raises:
        NotFoundError, ForeignFileError: as read_weights().
    """
    with _opened(path) as file:
        head = file.read(512)
        file.seek(0)
        _refuse_look_alikes(head, path)
        if head[:2] == b"PK" or head[:1] == b"\x80":
            return _unpickled(file, path)
        if head[8:9] == b"{":
            return _safe_tensors(file, path)
    raise _error(path, "format")


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a plain file of limited size; a pipe or device would hang or never end."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise NotFoundError(f"there is no file {path}", hint="check the path", path=path) from exc
    except (OSError, ValueError) as exc:
        what = os.strerror(exc.errno or errno.EINVAL) if isinstance(exc, OSError) else str(exc)
        raise ForeignFileError(f"{path} cannot be read: {what.lower()}", hint="see its permissions") from exc
    try:
        _check_plain_file(os.fstat(fd), path)
        # Unbuffered, so that the position here is the position that the sandbox finds.
        with os.fdopen(fd, "rb", buffering=0, closefd=False) as file:
            yield file
    finally:
        os.close(fd)


def _check_plain_file(about: os.stat_result, path: Path) -> None:
    if stat.S_ISDIR(about.st_mode):
        raise ForeignFileError(f"{path} is a folder", hint="give one .pth or .safetensors file in it")
    if not stat.S_ISREG(about.st_mode):
        raise ForeignFileError(f"{path} is not a plain file", hint="give a .pth or .safetensors file")
    if about.st_size == 0:
        raise ForeignFileError(f"{path} is empty", hint=COPY_AGAIN_HINT)
    if about.st_size > MAX_BYTES:
        raise ForeignFileError(
            f"{path} is {about.st_size / 1e9:.1f} GB, and weights may be 2 GiB at most",
            hint="the tutorial's files are about 14 and 11 MB; is this another kind of file?",
        )


def _refuse_look_alikes(head: bytes, path: Path) -> None:
    """Refuse files that are mistaken for weights, by their first bytes."""
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ForeignFileError(
            f"{path} is a web page, not weights",
            hint="open it in a browser and use the download button on the page",
        )
    if text.startswith(b"version https://git-lfs"):
        raise ForeignFileError(f"{path} is a Git LFS pointer, not the weights", hint="run git lfs pull there")
    if head.startswith(b"\x1f\x8b"):
        raise ForeignFileError(f"{path} is packed with gzip", hint="unpack it first: gunzip FILE")


def _unpickled(file: IO[bytes], path: Path) -> "dict[str, Tensor]":
    """Convert the open file in the sandbox, then read the result."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    # Files without a name, not pipes: a limit of the operating system bounds what is written there.
    with tempfile.TemporaryFile() as made, tempfile.TemporaryFile() as errors:
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-B", str(SANDBOX.resolve())],
                cwd="/",
                env={**environment, **ONE_THREAD, "CUDA_VISIBLE_DEVICES": ""},
                stdin=file,
                stdout=made,
                stderr=errors,
                timeout=SANDBOX_SECONDS,
            )
        except subprocess.TimeoutExpired as exc:
            raise ForeignFileError(
                f"{path} was not read within {SANDBOX_SECONDS:.0f} seconds", hint="is its disk reachable?"
            ) from exc
        made.seek(0)
        line = made.readline(ANSWER_BYTES)
        errors.seek(-min(ERROR_BYTES, os.fstat(errors.fileno()).st_size), os.SEEK_END)
        answer = _answer(line, done.returncode, errors.read(ERROR_BYTES), path)
        if not answer["ok"]:
            raise _error(path, answer["reason"], str(answer.get("detail", "")))
        return _safe_tensors(made, path)


def _answer(line: bytes, code: int, errors: bytes, path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(line)
        if isinstance(answer, dict) and (answer.get("ok") is True or answer.get("reason") in REASONS):
            return answer
    except (ValueError, RecursionError):
        pass
    said = errors.decode(errors="replace").strip().rsplit("\n", 1)[-1]
    how = f"signal {-code}" if code < 0 else f"exit {code}"
    if -code in (signal.SIGXCPU, signal.SIGKILL):
        how += ": it took more time or memory than weights of its size can need"
    raise ForeignFileError(
        f"{path}: the process that opened it died ({how}: {_plain(said)})"
        if said
        else f"{path}: the process that opened it died ({how})",
        hint=RESAVE_HINT,
    )


def _safe_tensors(file: IO[bytes], path: Path) -> "dict[str, Tensor]":
    """Read safetensors from the file's position on: a limited header, checked numbers."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    start = file.tell()
    size = os.fstat(file.fileno()).st_size - start
    begin = file.read(8)
    if len(begin) < 8:
        raise _error(path, "damaged", "there is no header")
    (header,) = struct.unpack("<Q", begin)
    if header > min(MAX_HEADER_BYTES, size - 8):
        raise _error(path, "damaged", f"its header claims {header} bytes")
    file.seek(start)
    try:
        tensors = load(file.read())
    except (SafetensorError, ValueError, KeyError) as exc:
        raise _error(path, "damaged", str(exc)) from exc
    if not tensors:
        raise _error(path, "not_weights", "no tensor")
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            if not key.endswith("num_batches_tracked"):
                raise _error(path, "not_floats", f"{key} is {tensor.dtype}")
        elif not bool(torch.isfinite(tensor.float()).all()):
            raise _error(path, "not_finite", key)
    return tensors


def _error(path: Path, reason: str, detail: str = "") -> ForeignFileError:
    what, hint = REASONS[reason]
    return ForeignFileError(
        f"{path} {what.format(detail=_plain(detail))}", hint=hint, reason=reason, path=path
    )


def _plain(text: str) -> str:
    """Return text from a file that may be hostile, short and without control characters."""
    return ascii(text[:160])[1:-1].replace("\\\\", "\\")
