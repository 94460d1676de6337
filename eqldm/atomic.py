"""Files and folders that appear whole: written beside their name, then renamed, so that a reader never opens half of one."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)  # of an OSError


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write(partial)`, then renamed to `path`, whose folder is made. Several processes may do so at once: each writes its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{platform.node()}-{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def replace_folder(folder: Path, partial: Path) -> None:
    """Puts a folder that was written beside it in `folder`'s place; what stood there goes only when that is done."""
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Puts back what `replace_folder` had set aside when its process was killed between its two renames. Several processes may do so."""
    old = folder.with_name(folder.name + ".old")
    if old.exists() and not folder.exists():
        try:
            os.replace(old, folder)
        except OSError:
            if not folder.exists():  # else another process has just put it back
                raise
