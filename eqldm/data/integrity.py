"""Whether the tars of a folder are still those that were written: by the SHA-256 that the manifest states of each.

All of them with `make_shards.py --check`; the index and a few whenever a set is opened to train on, to encode or to evaluate. What was
fetched from elsewhere is checked as it comes (`cache.py`).
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

from eqldm.data.cache import INDEX_FILE
from eqldm.data.checking import each
from eqldm.data.listing import reading, shown
from eqldm.data.manifest import MANIFEST, digest_of, load_manifest
from eqldm.data.shards import INDEX, MAX_ENDINGS, file_sha256

NUM_DRAWN = 4  # tars that are read when a set is opened
BYTES_DRAWN = 1 << 28  # of them in all, and of the index: about a second's work; larger files are for --check alone


def check_folder(folder: str | Path, workers: int = 1) -> tuple[list[str], int]:
    """What is wrong with the tars and the index of a folder, a line each, none where all is well; and the number of files that were read.

    Raises: FileNotFoundError, ValueError where there is no manifest, or it is none.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"'{shown(folder)}' has no {MANIFEST}: there is nothing to check it by (--index writes one)")
    shards = load_manifest(folder / MANIFEST)["shards"]
    wanted = {entry["name"]: entry["sha256"] for entry in shards}
    about, wrong = _index_files(folder, shards)
    found = each(look, {name: folder / name for name in (*wanted, *about)}, workers, f"{folder}, SHA-256")
    sizes = {entry["name"]: entry["bytes"] for entry in shards}
    for name, (size, sha256) in found.items():
        if sha256 == (wanted | about)[name]:
            continue
        if size is None:
            wrong.append(f"{shown(name)}: {sha256}")
        elif other := next((other for other in wanted if wanted[other] == sha256), None):
            wrong.append(f"{shown(name)}: holds what {shown(other)} should")
        elif name in sizes and size != sizes[name]:
            wrong.append(f"{shown(name)}: has {size} bytes, the manifest says {sizes[name]}")
        else:
            wrong.append(f"{shown(name)}: damaged, SHA-256 {sha256[:16]}..., wanted {(wanted | about)[name][:16]}...")
    wrong += [f"{shown(tar.name)}: not in the manifest" for tar in sorted(folder.glob("*.tar")) if tar.name not in wanted]
    return wrong, len(found)


def look(path: Path) -> tuple[int | None, str]:
    """Size, bytes, and SHA-256 of a file; None, and why, where it cannot be read."""
    try:
        with reading(path):
            return path.stat().st_size, file_sha256(path)
    except OSError as error:
        return None, "missing" if isinstance(error.__cause__, FileNotFoundError) else str(error)


def _index_files(folder: Path, shards: list[dict]) -> tuple[dict[str, str], list[str]]:
    """{file of the index: SHA-256}, and what is wrong with its list of them. A folder may be without an index."""
    path = folder / INDEX / "about.json"
    try:
        about = json.loads(path.read_text())
    except FileNotFoundError:
        return {}, []
    except ValueError as error:
        return {}, [f"{INDEX}/about.json: no JSON ({error})"]
    files = about.get("files") if isinstance(about, dict) else None
    if not isinstance(files, dict) or not all(map(INDEX_FILE.fullmatch, files)) or not all(isinstance(x, str) for x in files.values()):
        return {}, [f"{INDEX}/about.json: lists no files"]
    if about.get("shards") != digest_of(shards):
        return {}, [f"{INDEX}: is of other tars than the manifest"]
    return files, []


@cache
def check_some(folder: Path, digest: str) -> int:
    """Reads the index of a folder and up to `NUM_DRAWN` of its tars, drawn by its digest, of each at most `BYTES_DRAWN` in all; returns how
    many files. Once a process.

    Raises: ValueError where one is not what is stated of it; OSError where it cannot be read.
    """
    shards = load_manifest(folder / MANIFEST)["shards"]
    index = _within(list(_index_files(folder, shards)[0].items()), folder, 2 + MAX_ENDINGS)
    tars = [(entry["name"], entry["sha256"]) for entry in random.Random(digest).sample(shards, len(shards))]
    drawn = _within(tars, folder, NUM_DRAWN)
    for name, wanted in (*index, *drawn):
        with reading(folder / name):
            sha256 = file_sha256(folder / name)
        if sha256 != wanted:
            what = "shard" if (name, wanted) in drawn else "the index's"
            raise ValueError(
                f"{what} '{folder / name}' is damaged or was replaced: its SHA-256 is {sha256[:16]}..., wanted {wanted[:16]}... (of "
                f"{len(shards)} shards {len(drawn)} are looked at when a set is opened). Have all of them checked by python "
                f"data/make_shards.py --check '{folder}', which says what to do"
            )
    return len(index) + len(drawn)


def _within(files: list[tuple[str, str]], folder: Path, count: int) -> list[tuple[str, str]]:
    """The first files, at most `count`, that fit into `BYTES_DRAWN`."""
    taken: list[tuple[str, str]] = []
    room = BYTES_DRAWN
    for name, sha256 in files:
        if len(taken) == count:
            break
        with reading(folder / name):
            size = (folder / name).stat().st_size
        if size <= room:
            taken.append((name, sha256))
            room -= size
    return taken
