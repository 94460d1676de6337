"""The manifest of a shard folder: what it must state, and how its file is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

MANIFEST = "manifest.json"


def _is_tar_name(name: object) -> bool:
    return isinstance(name, str) and name.endswith(".tar") and not re.search(r"[/\0]", name)


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 60


ENTRY: dict[str, Callable[[object], bool]] = {  # what it states of each tar
    "name": _is_tar_name,
    "count": _is_number,
    "bytes": _is_number,
    "sha256": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
}


def load_manifest(path: Path) -> dict:
    """What the file of a manifest holds, or of the record of an unfinished one. Raises: ValueError where it is no such file."""
    way_out = "If it is of something else, move it or use another folder; if it is damaged, remove it and make the shards anew"
    manifest = read_object(path, way_out)
    what = what_is_wrong(manifest) or ("it states no count" if path.name == MANIFEST and "count" not in manifest else None)
    if what:
        raise ValueError(f"'{path}' is no manifest of shards: {what}. {way_out}")
    return manifest


def read_object(path: Path, way_out: str) -> dict:
    """The object that a file of JSON holds. Raises: ValueError that names the file, and the way out, where it is something else."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is no JSON ({error}). {way_out}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds {json.dumps(found)[:60]}, wanted an object. {way_out}")
    return found


def what_is_wrong(manifest: dict) -> str | None:
    """Why an object is no manifest; None where it is one."""
    shards, names, skipped = manifest.get("shards"), manifest.get("names", []), manifest.get("skipped", [])
    if not isinstance(shards, list):
        return f"it lists no shards, it holds {json.dumps(manifest)[:60]}"
    for entry in shards:
        if not isinstance(entry, dict):
            return f"a shard is {json.dumps(entry)[:60]}"
        for name, fits in ENTRY.items():
            if name not in entry or not fits(entry[name]):
                return f"{name} of a shard is {json.dumps(entry.get(name))[:60]}"
    if len({entry["name"] for entry in shards}) < len(shards):
        return "it lists a shard twice"
    if manifest.get("count", total := sum(entry["count"] for entry in shards)) != total:
        return f"its count is {json.dumps(manifest['count'])[:60]}, its shards have {total} samples"
    if not isinstance(manifest.get("generator") or {}, dict):
        return f"its generator is {json.dumps(manifest['generator'])[:60]}"
    if not isinstance(names, list) or not all(map(_is_tar_name, names)):
        return f"its names are {json.dumps(names)[:60]}"
    if not isinstance(skipped, list):
        return f"what it skipped is {json.dumps(skipped)[:60]}"
    return None


def digest_of(shards: list[dict]) -> str:
    """Of what a manifest states of the tars, and so of all their contents."""
    return hashlib.sha256(
        json.dumps([[entry[name] for name in ("name", "count", "bytes", "sha256")] for entry in shards]).encode()
    ).hexdigest()
