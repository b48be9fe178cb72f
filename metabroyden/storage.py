"""Atomic writes: a file is there whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: there, what a killed save leaves behind stays
    fcntl = None  # type: ignore[assignment]

_MARK = 8  # characters that tell one temporary file of a target from another


def atomic_write(path: str | Path, data: bytes | str) -> Path:
    """Write data to path through a temporary file beside it and one rename; parent folders are made.

    A symbolic link stays: the file that it points to is replaced. An existing file keeps its mode, a new one has that of
    the umask. Temporary files of the same target that killed writers left behind are removed; those of writers that are
    still at work, in this process or another, are not.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    temporary, descriptor = _temporary(target)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
            with suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            if fcntl is not None:
                os.replace(temporary, target)  # before the lock goes with the descriptor
        if fcntl is None:
            os.replace(temporary, target)  # Windows renames no file that is open
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Path(path)


def remove_leftovers(target: Path) -> None:
    """Remove the temporary files of this target that nobody is writing any more."""
    if fcntl is None or not target.parent.is_dir():
        return
    head, tail = f".{target.name}.", ".tmp"
    for path in target.parent.iterdir():
        mark = path.name[len(head) : -len(tail)]
        if path.name == f"{head}{mark}{tail}" and len(mark) == _MARK:
            with suppress(OSError):  # locked by its writer, or gone already
                _remove_unlocked(path)


def _remove_unlocked(path: Path) -> None:
    """Remove a file; OSError where somebody has it locked. The kernel unlocks the files of a process that is killed."""
    descriptor = os.open(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    finally:
        os.close(descriptor)


def _temporary(target: Path) -> tuple[Path, int]:
    """(path, descriptor) of a new file beside the target, locked where the file system can do that."""
    while True:
        path = target.with_name(f".{target.name}.{secrets.token_hex(_MARK // 2)}.tmp")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        except FileExistsError:
            continue
        if fcntl is not None:
            with suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():  # else another writer took it for a leftover before it was locked
            return path, descriptor
        os.close(descriptor)
