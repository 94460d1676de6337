"""One writer at a time: locks of output folders, which say who holds them, and end with their process however that ends.

Record locks of the system: a process that is killed leaves none, and forked ones, such as readers of data, do not inherit them. Over a
network they are as good as the file system's (NFS has them; Lustre when mounted with `flock`); where there are none, that is said.
"""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

LOCK = ".lock"  # the file in a folder that is held as a whole
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
HELD = (errno.EACCES, errno.EAGAIN)  # by another process
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError


@dataclass
class _Lock:
    file: TextIO
    count: int = 1  # times that this process holds it


_locks: dict[Path, _Lock] = {}
os.register_at_fork(after_in_child=_locks.clear)  # which holds none of them


class Held(ValueError):
    """Another process holds the lock."""


def hold(folder: Path, what: str, way_out: str, group: str = "") -> None:
    """Keeps a folder, which is made, for this process until that ends. Arguments and errors: see `held`."""
    folder.mkdir(parents=True, exist_ok=True)
    if (path := (folder / LOCK).resolve()) not in _locks:
        _take(path, what, way_out, group, wait=False)


@contextmanager
def held(path: Path, what: str, way_out: str = "", group: str = "", wait: bool = False) -> Iterator[None]:
    """Holds the lock file `path`, whose folder exists, for the block; it is removed at the end. A process may do so within itself.

    what: begins the error, such as "'runs/latents' is being encoded".  way_out: ends it, such as "give another --out".
    group: of processes that share the lock, such as those of one launch; none share it where it is empty.
    wait: for the holder's end, instead of the error.
    Raises Held that names the process which holds it; OSError where the disk is full.
    """
    path = path.resolve()
    if path in _locks:
        _locks[path].count += 1
    else:
        _take(path, what, way_out, group, wait)
    try:
        yield
    finally:
        lock = _locks[path]
        lock.count -= 1
        if not lock.count:
            del _locks[path]
            _release(path, lock.file)


def _take(path: Path, what: str, way_out: str, group: str, wait: bool) -> None:
    while True:
        try:
            file = open(path, "a+")
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            raise PermissionError(
                f"'{path.parent}' cannot be written to ({error.strerror}): {way_out or 'choose another folder'}"
            ) from error
        try:
            _lock(file, group, wait)
        except Held as error:
            file.close()
            raise Held(f"{what} by {error}: wait for its end or stop it{f', or {way_out}' if way_out else ''}") from None
        except OSError as error:
            if error.errno in DISK_FULL:  # it is held, and nobody could tell by whom
                path.unlink(missing_ok=True)
                file.close()
                raise OSError(error.errno, error.strerror, str(path)) from error
            print(f"'{path}' cannot be locked ({error.strerror}): see to it that no other process writes there", file=sys.stderr)
        if os.fstat(file.fileno()).st_nlink:  # else its holder has just removed it, and others make a new one
            _locks[path] = _Lock(file)
            return
        file.close()


def _release(path: Path, file: TextIO) -> None:
    with suppress(OSError):  # others of the group hold it still, or there are no locks here
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    file.close()


def _lock(file: TextIO, group: str, wait: bool) -> None:
    """Raises Held with the holder's name."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait and not group else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in HELD:
                raise
            if _shared(file, group):
                return
            if not wait:
                raise Held(_holder(file)[0]) from None
            time.sleep(0.1)
            continue
        os.ftruncate(file.fileno(), 0)  # not by `file`, which would keep what finds no room, and raise again as it is closed
        os.write(file.fileno(), f"process {os.getpid()} on {platform.node()} since {since}\n{group}\n".encode())
        if group:
            fcntl.lockf(file, fcntl.LOCK_SH)  # the others of the group may come in
        return


def _shared(file: TextIO, group: str) -> bool:
    """Whether this process holds it together with others of its group."""
    for _ in range(50 if group else 0):
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in HELD:
                raise
            time.sleep(0.02)  # the first of them is just writing its name
            continue
        if _holder(file)[1] == group:
            return True
        fcntl.lockf(file, fcntl.LOCK_UN)
        return False
    return False


def _holder(file: TextIO) -> tuple[str, str]:
    """Who holds it, and of which group."""
    file.seek(0)
    name, _, group = file.read().partition("\n")
    return name.strip() or "another process", group.strip()
