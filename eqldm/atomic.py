"""Files and folders that appear whole: written beside their name, then renamed, so that a reader never opens half of one.

A process that is killed or finds the disk full leaves what stood there. What it wrote beside bears its number, so that two never write
one file, and the next that writes in that folder removes it.
"""

from __future__ import annotations

import errno
import itertools
import os
import platform
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from safetensors import SafetensorError

from eqldm.lock import DISK_FULL, held

NO_MODES = (errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of file systems that keep none, such as FAT
_counter = itertools.count()
_swept: set[Path] = set()


class NotWritten(OSError):
    """A file or folder could not be written; what stood there still does. reason: the system's words.  full: the disk is."""

    def __init__(self, what: str, error: BaseException, kept: str = "", then: str = "the same command goes on"):
        cause = next((found for found in _chain(error) if isinstance(found, OSError)), error)  # libraries put their own before or behind
        number = re.search(r"\(os error (\d+)\)", str(cause))  # safetensors says it in words
        code = cause.errno if isinstance(cause, OSError) else int(number[1]) if number else None
        self.full = code in DISK_FULL
        self.reason = os.strerror(code) if code else (str(cause).splitlines() or [type(cause).__name__])[0]
        way_out = f"make room, and {then}" if self.full else f"when that is mended, {then}"
        super().__init__(f"{what} could not be written ({self.reason}){kept}: {way_out}")
        self.errno, self.strerror = code, self.reason

    def __str__(self) -> str:
        return str(self.args[0])


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def told(what: str, kept: str = "", then: str = "the same command goes on") -> Iterator[None]:
    """Turns what libraries raise of a failed write into NotWritten, which says what it was of; what ends the process stays what it is."""
    before = sys.exc_info()[1]  # is being handled, and not of this write
    try:
        yield
    except NotWritten:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a failed write as RuntimeError
        for found in takewhile(lambda found: found is not before, _chain(error)):
            if isinstance(found, KeyboardInterrupt | SystemExit):  # torch puts its own before it
                raise found from None
        raise NotWritten(what, error, kept, then) from error


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A free name beside `path`, whose folder is made; what is written there is gone at the end, or when this process has been killed
    and another writes in that folder."""
    path = Path(os.path.abspath(path))  # `.` has no name to be beside
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.parent not in _swept:  # once a process: it may be a large folder
        _swept.add(path.parent)
        sweep(path.parent)
    partial = _partial(path)
    try:
        yield partial
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _partial(path: Path) -> Path:
    name = path.name.encode(errors="surrogateescape")[:100].decode(errors="ignore")  # file systems count bytes
    return path.with_name(f".{name}-{_machine()}-{os.getpid()}-{next(_counter)}.partial")


def _machine() -> str:
    """This machine, and on Linux among which of its processes this one's number counts: containers may share the machine's name."""
    try:
        return f"{platform.node()}-{re.sub('[^0-9]', '', os.readlink('/proc/self/ns/pid'))}"
    except OSError:
        return platform.node()


@contextmanager
def whole(path: Path, durable: bool = False) -> Iterator[Path]:
    """What the block writes at the name that this gives is renamed to `path`. durable: it is on the disk before, come what may."""
    with beside(path) as partial:
        yield partial
        if durable:
            to_disk(partial)
        _usual_modes(partial)
        os.replace(partial, path)


def to_disk(path: Path) -> None:
    """Waits until a file is on the disk, and not in the system's memory alone."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write(partial)`, then renamed to `path`. Several processes may do so at once: the last one stays. Raises NotWritten."""
    with told(f"'{path}'"), whole(path) as partial:
        write(partial)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The folder that the block makes at the name that this gives takes `folder`'s place; what stood there goes only then. A link to a
    folder stays, and what it leads to is replaced.

    Raises Held where another process is writing it.
    """
    folder, given = folder.resolve(), folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with held(lock_of(folder), f"'{given}' is being written"), beside(folder) as partial:
        recover_folder(folder)
        yield partial
        _usual_modes(partial)
        replace_folder(folder, partial)


def _usual_modes(path: Path) -> None:
    """Gives a new file, or those of a new folder, the mode that open() gives: safetensors 0.8 lets nobody but their owner read its own."""
    mask = os.umask(0o077)  # there is no other way to ask
    os.umask(mask)
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and not file.is_symlink():
            mode = stat.S_IMODE(file.stat().st_mode)
            if lacking := 0o666 & ~mask & ~mode:
                try:
                    file.chmod(mode | lacking)
                except OSError as error:
                    if error.errno not in NO_MODES:
                        raise


def lock_of(folder: Path) -> Path:
    """The lock file of a folder that is replaced as a whole, one whatever the path that leads there."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.lock")


def replace_folder(folder: Path, partial: Path) -> None:
    """Puts a folder that was written beside it in `folder`'s place; what stood there goes only when that is done."""
    old = _old(folder)
    _remove(old)
    try:
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
    except BaseException:  # Ctrl-C between the two, too
        recover_folder(folder)
        raise
    _remove(old)


def _remove(folder: Path) -> None:
    """Removes a folder, or moves it to a name that the next process sweeps: NFS keeps what others have open until they close it."""
    if folder.is_symlink():
        folder.unlink()
        return
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        os.replace(folder, _partial(folder))


def recover_folder(folder: Path) -> None:
    """Puts back what `replace_folder` had set aside when its process was killed between its two renames. Several processes may do so."""
    old = _old(folder)
    if old.exists() and not folder.exists():
        try:
            os.replace(old, folder)
        except OSError:
            if not folder.exists():  # else another process has just put it back
                raise


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.eqldm.old")  # `.NAME.old` may be somebody's copy


def sweep(folder: Path) -> None:
    """Removes what killed processes of this machine have left beside their names in a folder."""
    ours = re.compile(rf"\..+-{re.escape(_machine())}-(\d+)-\d+\.partial", re.DOTALL)
    for entry in os.scandir(folder):
        match = ours.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with suppress(FileNotFoundError, PermissionError):  # another user's, or another process has just done so
                    os.unlink(entry)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        pass
    return True
