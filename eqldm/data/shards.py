"""WebDataset shards on disk: tars, their manifest, and an index that makes every sample addressable.

A shard folder holds `NAME-000000.tar`, `NAME-000001.tar`, ... and a `manifest.json`. Inside a tar, the files of one
sample share a key: `000000007.png`, `000000007.txt` (the caption), `000000007.json` (labels). Any WebDataset reader
opens them. Ours addresses samples by number, which is what makes exact resume possible (see `order.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset as wds

MANIFEST = "manifest.json"


def write_shard(path: str | Path, samples: Iterable[dict]) -> dict:
    """Write one tar and return its manifest entry `{name, count, bytes, sha256}`.

    A sample is `{"__key__": str, extension: value}`; values are bytes, or what webdataset encodes by extension
    (str for `txt`, dict for `json`, array for `npy`). The tar is written beside its name and renamed when whole, so
    a killed process leaves no half shard. Equal samples give equal bytes: owner and time stamps are fixed.
    """
    path = Path(path)
    partial = path.with_suffix(".tar.partial")
    count = 0
    with open(partial, "wb") as file:
        with wds.TarWriter(file, mtime=0, user="eqldm", group="eqldm") as tar:
            for sample in samples:
                tar.write(sample)
                count += 1
        file.flush()
        os.fsync(file.fileno())
    digest = hashlib.sha256()
    hash_file(digest, partial)
    os.replace(partial, path)
    return {"name": path.name, "count": count, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def hash_file(digest: hashlib._Hash, path: Path) -> None:
    """Adds a file's bytes to a digest (hashlib.file_digest, but for Python 3.10 and for several files)."""
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)


def write_json(path: str | Path, content: dict) -> None:
    """Write JSON beside its name and rename it, so that a reader never sees half a file."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


def write_manifest(folder: str | Path, shards: list[dict], **about) -> dict:
    """Write `manifest.json`: the shards' entries, the total `count`, and whatever `about` states of their making."""
    manifest = {**about, "count": sum(entry["count"] for entry in shards), "shards": shards}
    write_json(Path(folder) / MANIFEST, manifest)
    return manifest


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a shard folder.

    Raises: FileNotFoundError where the folder, its manifest or one of the tars is missing; ValueError where a tar's
    size differs from the manifest's (truncated or replaced), or the set is empty.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no manifest.json" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(
            f"shard folder '{folder}' {what}. Make shards with data/glyphs.py or data/make_shards.py "
            f"(for tars of other origin: python data/make_shards.py --index '{folder}')"
        )
    manifest = json.loads(path.read_text())
    for entry in manifest["shards"]:
        tar = folder / entry["name"]
        if not tar.is_file():
            raise FileNotFoundError(f"shard '{tar}' is named in {path} but missing: copy it back, or make the shards anew")
        if tar.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"shard '{tar}' is truncated or was replaced: got {tar.stat().st_size} bytes, the manifest says "
                f"{entry['bytes']}. Copy it again, or make the shards anew"
            )
    if manifest["count"] == 0:
        raise ValueError(f"data set '{folder}' is empty: its manifest counts 0 samples")
    return manifest


def index_tar(path: str | Path) -> list[dict]:
    """Where each sample's files lie in a tar: `[{"__key__": str, extension: (offset, size), ...}, ...]`, in order.

    Raises: ValueError that names the tar where it is truncated or no tar at all.
    """
    samples: list[dict] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                # As webdataset splits names: at the first dot of the last part ("./v1.0/0001.seg.png")
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = folder + slash + stem
                if not samples or samples[-1]["__key__"] != key:
                    samples.append({"__key__": key})
                samples[-1][extension.lower()] = (member.offset_data, member.size)
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"shard '{path}' cannot be read as a tar ({error}): copy it again, or make it anew") from error
    with open(path, "rb") as file:  # tarfile also stops, silently, at the file's end or at a damaged header
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise ValueError(f"shard '{path}' is truncated or damaged: no end mark at byte {end}. Copy it again, or make it anew")
    return samples


@dataclass(frozen=True)
class ShardSet:
    """The samples of a shard folder, addressed by number, with each file's place in its tar.

    `shard_of`, `keys`: [N]. `places[extension]`: [N, 2] of (offset, size), size -1 where a sample lacks that file.
    `starts`: [num_shards + 1], the number of the first sample of each shard.
    """

    folder: Path
    manifest: dict
    shard_of: np.ndarray
    keys: np.ndarray
    places: dict[str, np.ndarray]
    starts: np.ndarray

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Open a shard folder; reads the tars' headers, not their contents. Raises as `read_manifest`, `index_tar`."""
        folder, manifest = Path(folder), read_manifest(folder)
        samples, shard_of, starts = [], [], [0]
        for number, entry in enumerate(manifest["shards"]):
            found = index_tar(folder / entry["name"])
            if len(found) != entry["count"]:
                raise ValueError(f"shard '{folder / entry['name']}' holds {len(found)} samples, the manifest says {entry['count']}")
            samples += found
            shard_of += [number] * len(found)
            starts.append(len(samples))
        extensions = sorted({name for sample in samples for name in sample} - {"__key__"})
        places = {name: np.array([s.get(name, (0, -1)) for s in samples], np.int64) for name in extensions}
        keys = np.array([s["__key__"] for s in samples])
        return cls(folder, manifest, np.array(shard_of, np.int32), keys, places, np.array(starts, np.int64))

    def __len__(self) -> int:
        return len(self.keys)

    def has(self, extension: str) -> np.ndarray:
        """[N] bool: which samples hold a file of this extension."""
        return self.places[extension][:, 1] >= 0 if extension in self.places else np.zeros(len(self), bool)

    def read(self, number: int, extension: str) -> bytes:
        """The bytes of one file of one sample. Raises ValueError that names the tar where it ends too early."""
        offset, size = self.places[extension][number]
        path = self.folder / self.manifest["shards"][self.shard_of[number]]["name"]
        with open(path, "rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise ValueError(f"shard '{path}' ended while reading sample '{self.keys[number]}': it was truncated after the start")
        return content
