"""One training at a time in a run folder: a second one would overwrite the checkpoints and the log of the first."""

from __future__ import annotations

import errno
import fcntl
import os
import platform
import sys
from pathlib import Path
from typing import TextIO

LOCK = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)  # by another process
_locks: dict[Path, TextIO] = {}  # open until this process ends: closing one gives it up


def hold(folder: Path) -> None:
    """Keeps the run folder for this process until it ends, however it ends. Where the file system has no locks, that is said.

    A record lock, which processes that are forked, such as readers of data, do not inherit.
    Raises ValueError that names the process which holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = (folder / LOCK).resolve()
    if path in _locks:
        return
    file = open(path, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        if error.errno in HELD:
            raise ValueError(
                f"run folder '{folder}' is being trained by {holder}: wait for its end or stop it, or use another run.dir"
            ) from error
        print(f"'{path}' cannot be locked ({error.strerror}): see to it that no second training writes there", file=sys.stderr)
        return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    _locks[path] = file
