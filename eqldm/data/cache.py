"""What this machine keeps of shard folders that lie elsewhere (`remote.py`): whole tars, and indices.

The cache is a folder on a fast disk of each machine, by webdataset's environment variables: WDS_CACHE, and WDS_CACHE_SIZE, the most
bytes of tars in it (by default no limit). A tar's name there is the SHA-256 that its manifest states: what came damaged is never kept,
a set that has changed is fetched anew, two addresses of one set share. So do the processes of a machine: one fetches, the others wait.

Commands are started by readers only, never by a thread of a process that forks readers: a fork would inherit half-open pipes and locks.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from eqldm.atomic import DISK_FULL
from eqldm.data import remote

NUM_SLOTS = 16  # files that a machine fetches at once
TAR = re.compile(r"[0-9a-f]{64}\.(tar|partial)")  # what is ours in the cache
INDEX_FILE = re.compile(r"index/(starts|keys|places/\w[\w.+@-]*)\.npy")


class CacheFull(OSError):
    """The disk of the cache is full (and not that of what is being made)."""


def cache_folder(address: str) -> Path:
    """Our folder under WDS_CACHE. Raises ValueError where that is not set."""
    folder = os.environ.get("WDS_CACHE")
    if not folder:
        raise ValueError(
            f"shards at '{address}' are kept on this machine while they are read: say where by the environment variable WDS_CACHE (a "
            "folder on a fast local disk), and how many bytes at most by WDS_CACHE_SIZE"
        )
    return Path(folder) / "eqldm"


def cache_bytes() -> float:
    """WDS_CACHE_SIZE. Raises ValueError where it is no positive number."""
    text = os.environ.get("WDS_CACHE_SIZE", "inf")
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not size > 0:
        raise ValueError(f"WDS_CACHE_SIZE={text!r} must be a number of bytes, such as 5e11, or not be set")
    return size


def check_cache(address: str, shards: list[dict], num_tars: int) -> None:
    """Raises ValueError where the cache cannot hold the largest `num_tars` tars at once."""
    cache_folder(address)
    wanted, size = sum(sorted((entry["bytes"] for entry in shards), reverse=True)[:num_tars]), cache_bytes()
    if size < wanted:
        raise ValueError(
            f"WDS_CACHE_SIZE={size:.4g} is too small for '{address}': {min(num_tars, len(shards))} tars are read or fetched at once, "
            f"{wanted:.4g} bytes. Give it more, or in training set data.shuffle_shards lower"
        )


def open_tar(address: str, entry: dict) -> BinaryIO:
    """A tar of a manifest, opened in the cache; fetched where it is not there. Raises OSError where it does not come whole."""
    path = _place(address, entry)
    while True:
        with suppress(FileNotFoundError):
            file = open(path, "rb")
            if os.fstat(file.fileno()).st_size == entry["bytes"]:
                os.utime(file.fileno())  # the least recently used go first
                return file
            file.close()
            path.unlink(missing_ok=True)  # cut short by the machine's end
        _fetch_tar(address, entry)  # where another process has just removed it, it comes again


def fetch_ahead(address: str, shards: list[dict]) -> None:
    """Has tars fetched in the background, those that no other process is fetching; to be called by a reader process, which forks no
    others. A failure is left to the reader that will need the tar."""

    def work() -> None:
        try:
            for entry in shards:
                path = _place(address, entry)
                try:
                    os.utime(path)  # needed soon: others go first
                except FileNotFoundError:
                    _fetch_tar(address, entry, wait=False)
        except OSError as error:
            warnings.warn(f"not fetched ahead: {error}", stacklevel=1)

    threading.Thread(target=work, name="fetch-ahead", daemon=True).start()


def fetch_index(address: str, files: dict[str, str]) -> Path:
    """The index of a remote folder, in the cache: a folder with `files`, {their names: SHA-256}, fetched where it is not there."""
    strange = [name for name in files if not INDEX_FILE.fullmatch(name)]
    if strange:
        raise ValueError(f"the index of '{address}' lists {strange[0]!r}, which is no file of an index")
    cache = cache_folder(address)
    name = "index-" + hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()
    folder, partial = cache / name, cache / f"{name}.partial"
    with _locked(cache, name):
        if not all((folder / file).is_file() for file in files):
            for old in (folder, partial):
                shutil.rmtree(old, ignore_errors=True)
            for file, sha256 in files.items():
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                remote.patiently(remote.WAITS_SECONDS[:2], _fetch_file, address, file, sha256, partial / file)
            os.replace(partial, folder)
    return folder / "index"


def _place(address: str, entry: dict) -> Path:
    return cache_folder(address) / f"{entry['sha256']}.tar"


@contextmanager
def _locked(cache: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Holds a lock among the processes and threads of this machine; gives whether it does, where it does not wait."""
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    with open(cache / "locks" / name, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def _slot(cache: Path) -> Iterator[None]:
    """One of `NUM_SLOTS`, waited for where all are taken."""
    first = random.randrange(NUM_SLOTS)
    for k in range(NUM_SLOTS):
        with _locked(cache, f"slot-{(first + k) % NUM_SLOTS}", wait=False) as mine:
            if mine:
                yield
                return
    with _locked(cache, f"slot-{first}"):
        yield


def _fetch_tar(address: str, entry: dict, wait: bool = True) -> None:
    path = _place(address, entry)
    partial = path.with_suffix(".partial")
    with _locked(path.parent, path.stem, wait) as mine:
        if not mine or path.exists():  # another process fetches it, or has just done so
            return
        with _slot(path.parent):
            partial.unlink(missing_ok=True)  # of a process that was killed
            _make_room(partial, entry["bytes"])
            try:
                remote.patiently(remote.WAITS_SECONDS, _fetch_file, address, entry["name"], entry["sha256"], partial, entry["bytes"])
                with _locked(path.parent, "room"):  # where the files are counted
                    os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)


def _fetch_file(address: str, name: str, sha256: str, path: Path, wanted: int | None = None) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "r+b" if path.exists() else "wb") as file:
            for block in remote.fetch(address, name, wanted):
                digest.update(block)
                size += file.write(block)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        message = f"no space left for '{name}' in the cache '{path.parent}': free some, or set WDS_CACHE_SIZE below what the disk has"
        raise CacheFull(error.errno, message) from error
    found = digest.hexdigest()
    if found != sha256 or wanted not in (None, size):
        said = f"{wanted} bytes, {sha256[:16]}..." if wanted else f"{sha256[:16]}..."
        raise OSError(f"'{name}' of '{address}' came damaged: {size} bytes of SHA-256 {found[:16]}..., its manifest says {said}")


def _make_room(partial: Path, wanted: int) -> None:
    """Makes the file `partial` of `wanted` bytes, when the tars that were least recently read have made room for it in WDS_CACHE_SIZE;
    waits for those that are just coming."""
    cache = partial.parent
    if wanted > cache_bytes():
        raise OSError(f"a tar of {wanted} bytes does not fit into WDS_CACHE_SIZE={cache_bytes():.4g}: give it more")
    while True:
        with _locked(cache, "room"):
            found = []
            for path in cache.iterdir():
                if TAR.fullmatch(path.name):
                    with suppress(FileNotFoundError):
                        found.append((path, path.stat()))
            excess = sum(stat.st_size for _, stat in found) + wanted - cache_bytes()
            for path, stat in sorted(found, key=lambda pair: pair[1].st_mtime):
                if excess <= 0:
                    break
                with _locked(cache, path.stem, wait=False) as idle:
                    if idle:
                        path.unlink(missing_ok=True)
                        excess -= stat.st_size
            if excess <= 0:
                with open(partial, "wb") as file:
                    file.truncate(wanted)  # counted by the others as long as it comes
                return
        time.sleep(0.1)
