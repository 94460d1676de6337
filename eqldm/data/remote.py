"""Shard folders that lie elsewhere: behind http(s), in a bucket, or wherever a command reads them. Tars are kept on a disk of this machine.

An address stands wherever a shard folder may:

    https://host/shards/train                        by curl (with ~/.netrc)
    s3://bucket/shards/train  gs://...               by `aws s3 cp`, `gsutil cat`
    pipe:ssh -n host cat /shards/train/{name}        by any command that prints the file {name}

The cache is a folder on a fast disk of each machine, by webdataset's environment variables: WDS_CACHE, and WDS_CACHE_SIZE, the most
bytes of tars in it (by default no limit). A tar's name there is the SHA-256 that its manifest states: what came damaged is never kept,
a set that has changed is fetched anew, two addresses of one set share. So do the processes of a machine: one fetches, the others wait.

Commands are started by readers only, never by a thread of a process that forks readers: a fork would inherit half-open pipes and locks.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import select
import shlex
import shutil
import signal
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

import webdataset as wds

WAITS_SECONDS = (1, 5, 20, 60, 120)  # before a tar is asked for again: a server's restart must not end a run
STALL_SECONDS = 120  # without a byte, after which a command is given up
CLOSE_SECONDS = 10  # for a command to end after its last byte
NUM_SLOTS = 16  # files that a machine fetches at once
BLOCK = 1 << 20
T = TypeVar("T")
COMMANDS = {
    "http": "curl -fsSL --netrc-optional --connect-timeout 20 --retry 4 --retry-connrefused --speed-limit 1 --speed-time 120 {url}",
    "s3": "aws s3 cp --only-show-errors {url} -",
    "gs": "gsutil -q cat {url}",
}
COMMANDS["https"] = COMMANDS["http"]
MEANINGS = {22: " (refused by the server: is the address right?)", 127: " (not installed)"}
FULL = (errno.ENOSPC, errno.EDQUOT)
TAR = re.compile(r"[0-9a-f]{64}\.(tar|partial)")  # what is ours in the cache
INDEX_FILE = re.compile(r"index/(starts|keys|places/\w[\w.+@-]*)\.npy")


class CacheFull(OSError):
    """The disk of the cache is full (and not that of what is being made)."""


def is_remote(folder: str | os.PathLike) -> bool:
    """Whether a shard folder is an address, and not a folder of this machine."""
    return isinstance(folder, str) and bool(re.match(r"pipe:|[a-z][a-z0-9+.-]*://", folder, re.IGNORECASE))


def command_of(address: str, name: str) -> str:
    """The shell command that prints a file of a remote folder. Raises ValueError where the address cannot be read."""
    scheme = address.partition(":")[0].lower()
    if scheme == "pipe":
        if "{name}" not in address:
            raise ValueError(f"'{address}' must say where a file's name goes, as in pipe:ssh -n host cat /shards/train/{{name}}")
        return address.partition(":")[2].replace("{name}", name)
    if scheme not in COMMANDS:
        raise ValueError(f"'{address}': got {scheme}://, wanted {', '.join(f'{known}://' for known in COMMANDS)}, or pipe:COMMAND {{name}}")
    if re.match(r"[^/]*//[^/]*@", address):
        raise ValueError(f"an address at {scheme}:// must not hold a password, for it is written into models: put it into ~/.netrc")
    if "?" in address and "{name}" not in address:
        raise ValueError(f"'{address}' must say where a file's name goes, as in https://host/shards/{{name}}?query")
    url = address.replace("{name}", name) if "{name}" in address else f"{address.rstrip('/')}/{name}"
    return COMMANDS[scheme].replace("{url}", shlex.quote(url))


def fetch(address: str, name: str, most: int | None = None) -> Iterator[bytes]:
    """The bytes of a file of a remote folder, in blocks, at most `most` in all. Raises OSError that names it where they cannot be had, or
    stop coming."""
    command, size, ended = command_of(address, name), 0, False
    # A session of its own, to be killed whole; and the commands must not read what the user pipes into this program
    stream = wds.gopen(f"pipe:exec setsid sh -c {shlex.quote(command)} </dev/null", bufsize=0)
    stream.timeout = CLOSE_SECONDS
    poll = select.poll()
    poll.register(stream.stream, select.POLLIN)
    try:
        while True:
            if not poll.poll(1000 * STALL_SECONDS):
                raise OSError(f"no byte for {STALL_SECONDS} s")
            block = stream.read(BLOCK)
            if not block:
                ended = True
                break
            size += len(block)
            if most is not None and size > most:
                raise OSError(f"it is longer than its {most} bytes")
            yield block
        stream.close()  # tells of the command's failure
    except (OSError, subprocess.TimeoutExpired) as error:
        status = stream.status  # None where the command is still at work
        reason = f"{command.split()[0]} ended with status {status}" if status else str(error)  # and not with the command's secrets
        if isinstance(error, subprocess.TimeoutExpired):
            reason = f"the command did not end within {CLOSE_SECONDS} s of its last byte"
        raise OSError(f"cannot fetch '{name}' of '{address}': {reason}{MEANINGS.get(status, '')}") from None
    finally:
        stream.ignore_errors = True
        if not ended or stream.proc.poll() is None:
            stream.proc.kill()
            with suppress(ProcessLookupError):
                os.killpg(stream.proc.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that even a kill does not reach
            stream.close()
            stream.proc.wait(CLOSE_SECONDS)


def fetch_json(address: str, name: str) -> dict:
    """A JSON object of a remote folder. Raises OSError as `fetch`; ValueError where it is something else."""
    content = _patiently(WAITS_SECONDS[:2], lambda: b"".join(fetch(address, name, most=1 << 30)))
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ValueError(f"'{name}' of '{address}' is no JSON object, it begins with {content[:60]!r}: is the address right?") from error
    return found


def _patiently(waits: Iterable[float], work: Callable[..., T], *args) -> T:
    """What `work(*args)` gives, tried again after each of these seconds (or somewhat fewer) where it raises OSError, but for a full disk."""
    for seconds in waits:
        try:
            return work(*args)
        except OSError as error:
            if error.errno in FULL:
                raise
            warnings.warn(f"{error}; again in {seconds} s", stacklevel=2)
            time.sleep(seconds * random.uniform(0.5, 1))
    return work(*args)


def cache_folder(address: str) -> Path:
    """Our folder under WDS_CACHE, made if it is not there. Raises ValueError where that is not set."""
    folder = os.environ.get("WDS_CACHE")
    if not folder:
        raise ValueError(
            f"shards at '{address}' are kept on this machine while they are read: say where by the environment variable WDS_CACHE (a "
            "folder on a fast local disk), and how many bytes at most by WDS_CACHE_SIZE"
        )
    cache = Path(folder) / "eqldm"
    (cache / "locks").mkdir(parents=True, exist_ok=True)
    return cache


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


def check_manifest(address: str, manifest: dict) -> None:
    """Raises ValueError where a manifest from elsewhere is none, or names what must not be fetched: other folders' files, shell's words."""
    checks = {"name": lambda x: re.fullmatch(r"\w[\w.+=@-]*\.tar", x), "sha256": lambda x: re.fullmatch(r"[0-9a-f]{64}", x),
              "bytes": lambda x: 0 < x < 1 << 43, "count": lambda x: x >= 0}  # fmt: skip
    types = {"name": str, "sha256": str, "bytes": int, "count": int}
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not isinstance(manifest.get("count"), int):
        raise ValueError(f"manifest.json of '{address}' lists no shards, it holds {sorted(manifest)[:5]}: is the address right?")
    for entry in shards:
        for name, check in checks.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if type(value) is not types[name] or not check(value):
                raise ValueError(
                    f"manifest.json of '{address}': a tar's {name} is {value!r}. Wanted are plain names that end in .tar, SHA-256, bytes "
                    "and count, as make_shards.py writes them (--index where the tars lie)"
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
                _patiently(WAITS_SECONDS[:2], _fetch_file, address, file, sha256, partial / file)
            os.replace(partial, folder)
    return folder / "index"


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
                _patiently(WAITS_SECONDS, _fetch_file, address, entry["name"], entry["sha256"], partial, entry["bytes"])
                with _locked(path.parent, "room"):  # where the files are counted
                    os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)


def _fetch_file(address: str, name: str, sha256: str, path: Path, wanted: int | None = None) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        with open(path, "r+b" if path.exists() else "wb") as file:
            for block in fetch(address, name, wanted):
                digest.update(block)
                size += file.write(block)
            file.truncate(size)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in FULL:
            raise
        message = f"no space left for '{name}' in the cache '{path.parent}': free some, or set WDS_CACHE_SIZE below what the disk has"
        raise CacheFull(error.errno, message) from error
    found = digest.hexdigest()
    if found != sha256 or wanted not in (None, size):
        raise OSError(
            f"'{name}' of '{address}' came damaged: {size} bytes of SHA-256 {found[:16]}..., its manifest says {wanted or ''} {sha256[:16]}..."
        )


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
