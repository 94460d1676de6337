"""Shard folders that lie elsewhere: behind http(s), in a bucket, or wherever a command reads them.

An address stands wherever a shard folder may:

    https://host/shards/train                        by curl (with ~/.netrc)
    s3://bucket/shards/train  gs://...               by `aws s3 cp`, `gsutil cat`
    pipe:ssh -n host cat /shards/train/{name}        by any command that prints the file {name}

Files come through webdataset's gopen; tars are kept on a disk of this machine (`cache.py`).
"""

from __future__ import annotations

import json
import os
import random
import re
import select
import shlex
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeGuard, TypeVar

import webdataset as wds

from eqldm.atomic import DISK_FULL
from eqldm.paths import ADDRESS

WAITS_SECONDS = (1, 5, 20, 60, 120)  # before a tar is asked for again: a server's restart must not end a run
STALL_SECONDS = 120  # without a byte, after which a command is given up
CLOSE_SECONDS = 10  # for a command to end after its last byte
BLOCK = 1 << 20
COMMANDS = {
    "http": "curl -fsSL --netrc-optional --connect-timeout 20 --retry 4 --retry-connrefused --speed-limit 1 --speed-time 120 {url}",
    "s3": "aws s3 cp --only-show-errors {url} -",
    "gs": "gsutil -q cat {url}",
}
COMMANDS["https"] = COMMANDS["http"]
MEANINGS = {22: " (refused by the server: is the address right?)", 127: " (not installed)"}
T = TypeVar("T")


def is_remote(folder: object) -> TypeGuard[str]:
    """Whether a shard folder is an address, and not a folder of this machine."""
    return isinstance(folder, str) and bool(ADDRESS.match(folder))


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
    content = patiently(WAITS_SECONDS[:2], lambda: b"".join(fetch(address, name, most=1 << 30)))
    try:
        found = json.loads(content)
        if not isinstance(found, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise ValueError(f"'{name}' of '{address}' is no JSON object, it begins with {content[:60]!r}: is the address right?") from error
    return found


def patiently(waits: Iterable[float], work: Callable[..., T], *args) -> T:
    """What `work(*args)` gives, tried again after each of these seconds (or fewer) where it raises OSError, but for a full disk."""
    for seconds in waits:
        try:
            return work(*args)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            warnings.warn(f"{error}; again in {seconds} s", stacklevel=2)
            time.sleep(seconds * random.uniform(0.5, 1))
    return work(*args)


def check_manifest(address: str, manifest: dict) -> None:
    """Raises ValueError where a manifest from elsewhere is none, or names what must not be fetched: other folders' files, shell's words."""
    wanted = {"name": (str, lambda x: re.fullmatch(r"\w[\w.+=@-]*\.tar", x)), "sha256": (str, lambda x: re.fullmatch(r"[0-9a-f]{64}", x)),
              "bytes": (int, lambda x: 0 < x < 1 << 43), "count": (int, lambda x: x >= 0)}  # fmt: skip
    shards = manifest.get("shards")
    if not isinstance(shards, list) or not isinstance(manifest.get("count"), int):
        raise ValueError(f"manifest.json of '{address}' lists no shards, it holds {sorted(manifest)[:5]}: is the address right?")
    for entry in shards:
        for name, (kind, check) in wanted.items():
            value = entry.get(name) if isinstance(entry, dict) else None
            if type(value) is not kind or not check(value):
                raise ValueError(
                    f"manifest.json of '{address}': a tar's {name} is {value!r}. Wanted are plain names that end in .tar, SHA-256, bytes "
                    "and count, as make_shards.py writes them (--index where the tars lie)"
                )
