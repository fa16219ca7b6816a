"""One process at a time in the folder of unfinished work.

The lock is the kernel's, so it ends with the process, however that ends. Where there is no
``fcntl`` (Windows), nothing is locked.
"""

import os
from pathlib import Path

from evdit_opt.errors import CalibrationError

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

__all__ = ["lock_folder", "unlock_folder"]

LOCK = "lock"

_held: dict[Path, int] = {}
"""File descriptors by folder: a process that has a lock has it until it lets go or ends."""


def lock_folder(folder: Path) -> None:
    """Keep other processes out; again by the same process is no matter.

    Args:
        folder: there already.

    Raises:
        CalibrationError: if another process is in it.
    """
    if fcntl is None:
        return
    path = folder.resolve() / LOCK
    known = _held.get(folder.resolve())
    if known is not None:
        if path.exists() and os.path.samestat(os.fstat(known), path.stat()):
            return
        unlock_folder(folder)  # of a folder that was removed since
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        who = os.pread(file, 20, 0).decode(errors="replace").strip()
        os.close(file)
        if not isinstance(error, BlockingIOError):
            raise CalibrationError(
                f"expected {folder} on a file system that can lock files: {error}; give another "
                "place"
            ) from error
        raise CalibrationError(
            f"expected {folder} to be in the hands of one process, {who or 'another'} is "
            "at work there; wait for it, end it, or give another place"
        ) from error
    os.ftruncate(file, 0)
    os.pwrite(file, f"process {os.getpid()}".encode(), 0)
    _held[folder.resolve()] = file


def unlock_folder(folder: Path) -> None:
    """Let other processes in, if this one kept them out."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        os.close(file)
