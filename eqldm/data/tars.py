"""Which members of a tar are files of a sample: by webdataset's rules, so that tars of any origin can be read.

A name is split at the first dot of its last part: `v1.0/0001.seg.png` is file `seg.png` of sample `v1.0/0001`. Members in turn with one key
are one sample. Nothing is ever extracted here; names that lead out of a folder are refused all the same, for they would be copied.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

# As a file of the index is named after it (see `cache.INDEX_FILE`); a longer one is the rest of a sentence with a dot in it
ENDING = re.compile(r"\w[\w.+@-]{0,99}")
METADATA = re.compile(r"__[^/]*__($|/)|(.*/)?(__MACOSX|PaxHeaders?[^/]*)/")  # the first as webdataset has it
ELSEWHERE = re.compile(r"/|[A-Za-z]:[/\\]|(.*[/\\])?\.\.([/\\]|$)", re.DOTALL)


def check_key(key: str, what: str) -> None:
    """Raises ValueError that begins with `what` for a sample's name that is none, or leads out of the folder it is unpacked in."""
    if "\0" in key:
        raise ValueError(f"{what}: sample {key!r} has a NUL in its name: the tar is damaged, or was made to do harm")
    if ELSEWHERE.match(key):
        raise ValueError(
            f"{what}: sample '{key}' has a name that leads out of its folder. Make the tar anew with names relative to it, such as by "
            "tar --transform, if you trust where it comes from"
        )


def read_tar(path: str | Path) -> tuple[list[dict], dict[str, list[str]]]:
    """Where each sample's files lie in a tar, `[{"__key__": str, extension: (offset, size), ...}, ...]`, in order; and the names of the
    members that are no sample's, by the reason why: these are ignored. Folders are not named.

    Raises: ValueError that names the tar where it is truncated or no tar at all, or a sample has two files of one ending, or lies in two
    places; as `check_key`.
    """
    samples: list[dict] = []
    ignored: dict[str, list[str]] = {}
    keys = set()
    for member in _members(path):
        name = member.name.encode(errors="surrogateescape").decode(errors="backslashreplace")  # some are of other encodings
        folder, slash, last = name.rpartition("/")
        stem, _, extension = last.partition(".")
        key, extension = folder + slash + stem, extension.lower()
        if reason := _why_ignored(member, name, extension):
            ignored.setdefault(reason, []).append(name)
            continue
        if not samples or samples[-1]["__key__"] != key:
            if key in keys:
                raise ValueError(
                    f"shard '{path}': sample '{key}' lies in two places ('{name}' comes late): its files must follow each other"
                )
            check_key(key, f"shard '{path}'")
            keys.add(key)
            samples.append({"__key__": key})
        if extension in samples[-1]:
            raise ValueError(f"shard '{path}': sample '{key}' has two files '.{extension}' (duplicate file name '{name}')")
        samples[-1][extension] = (member.offset_data, member.size)
    return samples, ignored


def _members(path: str | Path) -> Iterator[tarfile.TarInfo]:
    """All members but folders."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield from (member for member in tar if not member.isdir())
            end = tar.offset
    except (tarfile.TarError, ValueError, EOFError) as error:  # a damaged pax header is a ValueError
        raise ValueError(f"shard '{path}' cannot be read as a tar ({error}): copy it again, or make it anew") from error
    with open(path, "rb") as file:  # tarfile also stops, silently, at the file's end or at a damaged header
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"shard '{path}' is truncated or damaged: no end mark at byte {end}. Copy it again, or make it anew")
        if file.read(1 << 20).strip(b"\0"):
            raise ValueError(f"shard '{path}' goes on after its end mark at byte {end}: tars joined by cat? Give each as a file of its own")


def _why_ignored(member: tarfile.TarInfo, name: str, extension: str) -> str | None:
    if METADATA.match(name):
        return "metadata"
    if not member.isreg():
        return "links"
    if member.issparse():
        return "stored as sparse files"
    if name.rpartition("/")[2].startswith("."):
        return "hidden"
    return None if ENDING.fullmatch(extension) else "no ending"
