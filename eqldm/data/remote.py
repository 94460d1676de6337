"""Shard folders that lie elsewhere: behind http(s), in a bucket, or wherever a command reads them. Tars are kept on a disk of this machine.

An address stands wherever a shard folder may:

    https://host/shards/train                      by curl
    s3://bucket/shards/train                       by `aws s3 cp`; gs:// by gsutil, and what else webdataset's gopen opens
    pipe:ssh host cat /shards/train/{name}         by any command that prints the file {name}

The cache is webdataset's: environment variable WDS_CACHE, a folder on a fast disk of each machine, and WDS_CACHE_SIZE, its bytes (by
default as many as the shards have). A tar's name there is the SHA-256 that its manifest states: what came damaged is never kept, a set
that has changed is fetched anew, two addresses of one set share. So do the processes of a machine: one fetches, the others wait.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import select
import shlex
import threading
import time
import urllib.parse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import webdataset as wds
from webdataset.gopen import Pipe

WAITS_SECONDS = (1, 10)  # before a tar is asked for again
STALL_SECONDS = 120  # without a byte, after which a command is given up
BLOCK = 1 << 20


def is_remote(folder: str | os.PathLike) -> bool:
    """Whether a shard folder is an address, and not a folder of this machine."""
    return isinstance(folder, str) and bool(re.match(r"pipe:|[a-z][a-z0-9+.-]*://", folder))


def url_of(address: str, name: str) -> str:
    """What webdataset's gopen opens for a file of a remote folder. Raises ValueError where a pipe has no place for its name."""
    if address.startswith("pipe:"):
        if "{name}" not in address:
            raise ValueError(f"'{address}' must say where a file's name goes, as in pipe:ssh host cat /shards/train/{{name}}")
        return address.replace("{name}", shlex.quote(name))
    if address.startswith("s3://"):  # gopen knows no s3
        return f"pipe:aws s3 cp {shlex.quote(address.rstrip('/') + '/' + name)} -"
    return f"{address.rstrip('/')}/{urllib.parse.quote(name)}"


def fetch(address: str, name: str) -> Iterator[bytes]:
    """The bytes of a file of a remote folder, in blocks. Raises OSError that names it where they cannot be had, or stop coming."""
    url = url_of(address, name)
    try:
        stream = wds.gopen(url, bufsize=0)  # unbuffered, for select
    except (OSError, ValueError) as error:  # the command is not installed, the scheme is unknown
        raise OSError(f"cannot fetch '{name}' of '{address}': {error}") from error
    try:
        while True:
            if not select.select([getattr(stream, "stream", stream)], [], [], STALL_SECONDS)[0]:
                raise OSError(f"no byte for {STALL_SECONDS} s")
            block = stream.read(BLOCK)
            if not block:
                break
            yield block
        stream.close()  # tells of the command's failure
    except OSError as error:
        status = getattr(stream, "status", None)
        reason = f"exit status {status}{_meaning(stream)}" if status else str(error)
        raise OSError(f"cannot fetch '{name}' of '{address}': {reason}") from error
    finally:
        if isinstance(stream, Pipe):
            stream.proc.kill()  # where the reader stopped early; else it has ended
            stream.ignore_errors = True
        stream.close()


def fetch_json(address: str, name: str) -> dict:
    """A JSON file of a remote folder. Raises OSError as `fetch`; ValueError where it is something else."""
    content = b"".join(fetch(address, name))
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"'{name}' of '{address}' is no JSON, it begins with {content[:60]!r}: is the address right?") from error


def _meaning(stream) -> str:
    command = stream.args[0][0]
    if command[0] != "curl":
        return f" of {command}" if isinstance(command, str) else f" of {shlex.join(command)}"
    meanings = {6: "no such host", 7: "no connection", 22: "the server refuses it: is the address right?", 28: "it took too long"}
    return f" of curl ({meanings.get(stream.status, 'see its manual')})"


def cache_folder(address: str) -> Path:
    """WDS_CACHE, made if it is not there. Raises ValueError where it is not set."""
    folder = os.environ.get("WDS_CACHE")
    if not folder:
        raise ValueError(
            f"shards at '{address}' are kept on this machine while they are read: say where by the environment variable WDS_CACHE (a "
            "folder on a fast local disk), and how many bytes at most by WDS_CACHE_SIZE"
        )
    (Path(folder) / "locks").mkdir(parents=True, exist_ok=True)
    return Path(folder)


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


def check_cache(address: str, shards: list[dict], window: int) -> None:
    """Raises ValueError where the cache is too small to shuffle `window` tars while the next ones come."""
    cache_folder(address)
    largest = sorted((entry["bytes"] for entry in shards), reverse=True)
    wanted, size = sum(largest[: 2 * window]), cache_bytes()
    if size < wanted:
        raise ValueError(
            f"WDS_CACHE_SIZE={size:.4g} is too small to shuffle {window} tars of '{address}' while the next ones come: wanted are "
            f"{wanted:.4g} bytes. Give it more, or set data.shuffle_shards lower"
        )


def check_entries(address: str, shards: list[dict]) -> None:
    """Raises ValueError where a manifest from elsewhere names files that the cache cannot hold by their SHA-256."""
    for entry in shards:
        if not re.fullmatch(r"[0-9a-f]{64}", str(entry["sha256"])):
            raise ValueError(f"manifest of '{address}': '{entry['name']}' has no SHA-256, got {entry['sha256']!r}. Make it anew (--index)")


def open_tar(address: str, entry: dict) -> BinaryIO:
    """A tar of a manifest, opened in the cache; fetched where it is not there. Raises OSError where it does not come whole."""
    path = _place(address, entry)
    while True:
        try:
            file = open(path, "rb")
        except FileNotFoundError:
            _fetch_tar(address, entry)
            continue  # where another process has just removed it, it comes again
        os.utime(path)  # the least recently used go first
        return file


def fetch_ahead(address: str, shards: list[dict]) -> None:
    """Has tars fetched in the background, those that no other process is fetching; a failure is left to the one that will need them."""

    def work() -> None:
        for entry in shards:
            try:
                if not _place(address, entry).exists():
                    _fetch_tar(address, entry, wait=False)
            except OSError as error:
                warnings.warn(f"not fetched ahead: {error}", stacklevel=1)
                return

    threading.Thread(target=work, name="fetch-ahead", daemon=True).start()


def fetch_files(address: str, files: dict[str, str], name: str) -> Path:
    """The folder `name` of the cache with the files of a remote folder, `{their name: SHA-256}`, fetched where it is not there."""
    cache = cache_folder(address)
    folder = cache / name
    with _locked(cache, name):
        if not folder.is_dir():
            partial = folder.with_name(folder.name + ".partial")
            for file, sha256 in files.items():
                target = partial / Path(file).relative_to(Path(file).parts[0])
                target.parent.mkdir(parents=True, exist_ok=True)
                _fetch_file(address, file, sha256, target)
            os.replace(partial, folder)
    return folder


def _place(address: str, entry: dict) -> Path:
    return cache_folder(address) / f"{entry['sha256']}.tar"


@contextmanager
def _locked(cache: Path, name: str, wait: bool = True) -> Iterator[bool]:
    """Holds a lock among the processes and threads of this machine; gives whether it does, where it does not wait."""
    with open(cache / "locks" / name, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing does not: a reader process that was forked meanwhile holds the file too


def _fetch_tar(address: str, entry: dict, wait: bool = True) -> None:
    path = _place(address, entry)
    with _locked(path.parent, path.stem, wait) as mine:
        if not mine or path.exists():  # another process fetches it, or has just done so
            return
        partial = path.with_suffix(".partial")
        with _locked(path.parent, "room"):
            partial.unlink(missing_ok=True)  # of a process that was killed
            _make_room(path.parent, entry["bytes"])
            with open(partial, "wb") as file:
                file.truncate(entry["bytes"])  # counted as long as it comes
        for seconds in (*WAITS_SECONDS, None):
            try:
                _fetch_file(address, entry["name"], entry["sha256"], partial)
                os.replace(partial, path)
                return
            except OSError as error:
                if seconds is None or error.errno in (errno.ENOSPC, errno.EDQUOT):
                    partial.unlink(missing_ok=True)
                    raise
                warnings.warn(f"{error}; again in {seconds} s", stacklevel=2)
                time.sleep(seconds)


def _fetch_file(address: str, name: str, sha256: str, path: Path) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "r+b" if path.exists() else "wb") as file:
            for block in fetch(address, name):
                digest.update(block)
                size += file.write(block)
            file.truncate(size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = f"no space left for '{name}' in the cache '{path.parent}': free some, or set WDS_CACHE_SIZE below what the disk has"
        raise OSError(error.errno, message) from error
    found = digest.hexdigest()
    if found != sha256:
        raise OSError(f"'{name}' of '{address}' came damaged: {size} bytes of SHA-256 {found[:16]}..., its manifest says {sha256[:16]}...")


def _make_room(cache: Path, wanted: int) -> None:
    """Removes the tars that were least recently read until `wanted` bytes more fit into WDS_CACHE_SIZE."""
    found = []
    for path in (*cache.glob("*.partial"), *cache.glob("*.tar")):
        with suppress(FileNotFoundError):  # a tar that has just come whole changes its name
            found.append((path, path.stat()))
    excess = sum(stat.st_size for _, stat in found) + wanted - cache_bytes()
    for path, stat in sorted(found, key=lambda pair: pair[1].st_mtime):
        if excess <= 0:
            return
        with _locked(cache, path.stem, wait=False) as idle:
            if idle:  # else it is coming just now
                path.unlink(missing_ok=True)
                excess -= stat.st_size
