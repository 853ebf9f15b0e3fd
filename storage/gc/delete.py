"""Delete by descriptors, not by paths, because the volume may contain hostile links."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from jobs.failpoints import failpoint


@contextmanager
def opened(root: Path, folder: PurePosixPath) -> Iterator[int]:
    """
    Open a folder of the volume without following links in any part of its path.

    Raises:
        OSError: a part of the path is missing, or is a link.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part in folder.parts:
            inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)


def delete_tree(parent: int, name: str) -> None:
    """
    Delete a file, a link or a folder with its contents, without following links.

    Args:
        parent: descriptor of the folder that contains it.

    Raises:
        OSError: the first failure; everything else was deleted as far as possible.
    """
    try:
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
    except FileNotFoundError:
        return  # another gc was faster
    except OSError as exc:
        if exc.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        failpoint("gc.deleting")
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        return
    first: OSError | None = None
    try:
        for inner in os.listdir(folder):
            try:
                delete_tree(folder, inner)
            except OSError as exc:
                first = first or exc
    finally:
        os.close(folder)
    if first is not None:
        raise first
    with suppress(FileNotFoundError):
        os.rmdir(name, dir_fd=parent)
