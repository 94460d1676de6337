"""WebDataset shards: tars, their manifest, and an index that makes every sample addressable.

A shard folder holds `NAME-000000.tar`, `NAME-000001.tar`, ..., a `manifest.json`, and under `index/` where each file of each sample lies.
Inside a tar, the files of one sample share a key: `000000007.png`, `000000007.txt` (the caption), `000000007.json` (labels). Any
WebDataset reader opens them. Ours addresses samples by number, which is what makes exact resume possible (see `order.py`).

The index is mapped into memory: millions of samples open at once, and all processes of a machine share its pages. Without one (or with one
of other tars) the tars' headers are read, which gives the same and takes minutes for thousands of tars.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset as wds

from eqldm.atomic import lock_of, whole, whole_folder, write_whole
from eqldm.data import cache, remote
from eqldm.data.contents import NO_ARRAY, UnfitSample
from eqldm.data.manifest import MANIFEST, digest_of, load_manifest
from eqldm.data.remote import is_remote
from eqldm.data.tars import check_key, read_tar
from eqldm.data.workers import run_jobs
from eqldm.lock import held

INDEX = "index"  # folder: about.json, starts.npy, keys.npy, places/EXTENSION.npy
MAX_ENDINGS = 100  # of the files of all samples: each is a file of the index
MANY = 64  # tars, from which on their headers are read by several processes


def write_shard(path: str | Path, samples: Iterable[dict]) -> dict:
    """Write one tar and return its manifest entry `{name, count, bytes, sha256}`.

    A sample is `{"__key__": str, extension: value}`; values are bytes, or what webdataset encodes by extension
    (str for `txt`, dict for `json`, array for `npy`). The tar is written beside its name and renamed when whole, so
    a killed process leaves no half shard. Equal samples give equal bytes: owner and time stamps are fixed.
    Raises ValueError as `check_key`.
    """
    path = Path(path)
    count = 0
    with whole(path, durable=True) as partial:
        with open(partial, "wb") as file, wds.TarWriter(file, mtime=0, user="eqldm", group="eqldm") as tar:
            for sample in samples:
                check_key(sample["__key__"], f"'{path}'")
                tar.write(sample)
                count += 1
        size, sha256 = partial.stat().st_size, file_sha256(partial)
    return {"name": path.name, "count": count, "bytes": size, "sha256": sha256}


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    hash_file(digest, path)
    return digest.hexdigest()


def hash_file(digest: hashlib._Hash, path: Path, skip: int = 0) -> None:
    """Adds a file's bytes, without the first `skip`, to a digest (hashlib.file_digest, but for Python 3.10 and for several files)."""
    with open(path, "rb") as file:
        file.seek(skip)
        while block := file.read(1 << 20):
            digest.update(block)


def write_json(path: str | Path, content: dict) -> None:
    """Write JSON that appears whole. Raises as `write_whole`."""
    write_whole(Path(path), lambda partial: partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n"))


def write_manifest(folder: str | Path, shards: list[dict], found: list[list[dict]] | None = None, **about) -> dict:
    """Write the index, and `manifest.json`: the shards' entries, the total `count`, and whatever `about` states of their making.

    found: what `index_tars` gave for them, where it was read already.
    """
    write_index(folder, shards, found)
    manifest = {**about, "count": sum(entry["count"] for entry in shards), "shards": shards}
    write_json(Path(folder) / MANIFEST, manifest)
    return manifest


def holds_shards(folder: str | Path) -> bool:
    """Whether shards are to be read there: a folder with a manifest, or an address."""
    return is_remote(folder) or (Path(folder) / MANIFEST).is_file()


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a shard folder, or of an address (see `remote`).

    Raises: FileNotFoundError where the folder, its manifest or one of the tars is missing; ValueError where a tar's
    size differs from the manifest's (truncated or replaced), or the set is empty; OSError where an address gives no manifest.
    """
    if is_remote(folder):
        manifest = remote.fetch_json(folder, MANIFEST)
        remote.check_manifest(folder, manifest)
    else:
        manifest = _local_manifest(Path(folder))
    if manifest["count"] == 0:
        raise ValueError(f"data set '{folder}' is empty: its manifest counts 0 samples")
    return manifest


def _local_manifest(folder: Path) -> dict:
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no manifest.json" if folder.is_dir() else "is not a folder"
        raise FileNotFoundError(
            f"shard folder '{folder}' {what}. Make shards with data/glyphs.py or data/make_shards.py "
            f"(for tars of other origin: python data/make_shards.py --index '{folder}')"
        )
    manifest = load_manifest(path)
    for entry in manifest["shards"]:
        tar = folder / entry["name"]
        if not tar.is_file():
            raise FileNotFoundError(f"shard '{tar}' is named in {path} but missing: copy it back, or make the shards anew")
        if tar.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"shard '{tar}' is truncated or was replaced: got {tar.stat().st_size} bytes, the manifest says "
                f"{entry['bytes']}. Copy it again, or make the shards anew"
            )
    return manifest


def index_tar(path: str | Path) -> list[dict]:
    """Where each sample's files lie in a tar: `[{"__key__": str, extension: (offset, size), ...}, ...]`, in order.

    Raises as `read_tar`.
    """
    return read_tar(path)[0]


def index_tars(tars: list[Path]) -> list[list[dict]]:
    """`index_tar` of each, many of them by several processes."""
    workers = min(32, len(os.sched_getaffinity(0))) if len(tars) >= MANY else 1
    try:
        found = dict(run_jobs({str(tar): tar for tar in tars}, index_tar, workers))
    except BrokenProcessPool as error:
        raise OSError(f"a process that read the tars' headers in '{tars[0].parent}' was killed (out of memory?): try again") from error
    return [found[str(tar)] for tar in tars]


def make_index(folder: Path, shards: list[dict], found: list[list[dict]] | None = None) -> dict:
    """The index of a folder's tars, by their manifest entries: `{starts, keys, places: {extension: ...}}` as `ShardSet` has them.

    Raises ValueError as `index_tar`, where a tar holds another number of samples than its entry says, and where their files have more than
    `MAX_ENDINGS` endings.
    """
    tars = [folder / entry["name"] for entry in shards]
    found = index_tars(tars) if found is None else found
    for tar, samples, entry in zip(tars, found, shards):
        if len(samples) != entry["count"]:
            raise ValueError(f"shard '{tar}' holds {len(samples)} samples, the manifest says {entry['count']}")
    samples = [sample for part in found for sample in part]
    extensions = sorted({name for sample in samples for name in sample} - {"__key__"})
    if len(extensions) > MAX_ENDINGS:
        raise ValueError(
            f"the samples of '{folder}' have files of {len(extensions)} endings, such as {', '.join(extensions[:3])}: all that follows the "
            "first dot of a name is its ending, as in webdataset. Take the dots out of the names"
        )
    return {
        "starts": np.cumsum([0, *map(len, found)], dtype=np.int64),
        "keys": np.array([sample["__key__"] for sample in samples]),
        "places": {name: np.array([sample.get(name, (0, -1)) for sample in samples], np.int64) for name in extensions},
    }


def write_index(folder: str | Path, shards: list[dict], found: list[list[dict]] | None = None) -> None:
    """Write the index of a folder's tars, in the place of one that is there. Several processes may do so. Raises as `make_index`."""
    index = Path(folder) / INDEX
    made = make_index(Path(folder), shards, found)
    with held(lock_of(index), f"'{index}' is being written", wait=True), whole_folder(index) as partial:
        (partial / "places").mkdir(parents=True)
        for name in ("starts", "keys"):
            np.save(partial / f"{name}.npy", made[name])
        for name, places in made["places"].items():
            np.save(partial / "places" / f"{name}.npy", places)
        files = {f"{INDEX}/{path.relative_to(partial).as_posix()}": file_sha256(path) for path in sorted(partial.rglob("*.npy"))}
        write_json(partial / "about.json", {"shards": digest_of(shards), "files": files})


def read_index(folder: Path, shards: list[dict]) -> dict | None:
    """The index that was written, mapped into memory; None where there is none of these tars, or a file of it is lost.

    Raises: ValueError where a file of it is damaged.
    """
    path = folder / INDEX / "about.json"
    try:
        about = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"'{path}' is no JSON ({error}): remove '{path.parent}', and have the index written anew") from error
    files = about.get("files") if isinstance(about, dict) else None  # early versions did not list them: none would be missed
    if not isinstance(files, dict) or about.get("shards") != digest_of(shards) or not all((folder / name).is_file() for name in files):
        return None
    return _map(path.parent, files, shards)


def _map(index: Path, files: Iterable[str], shards: list[dict]) -> dict:
    """The arrays of an index, by its list of files: `index/starts.npy`, ... Raises: ValueError where they are damaged, or of other tars."""
    anew = f"remove '{index}', and have the index written anew"

    def read(path: Path) -> np.ndarray:
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except NO_ARRAY as error:
            raise ValueError(f"'{path}' is no array of numbers ({error}): {anew}") from error

    paths = [index.parent / name for name in sorted(files) if name.startswith(f"{INDEX}/places/")]
    found = {path: read(path) for path in (index / "starts.npy", index / "keys.npy", *paths)}
    starts, keys, *places = found.values()
    ends = np.cumsum([0, *(entry["count"] for entry in shards)])
    for path, array in found.items():
        shape, kind = ((ends[-1],), "U") if array is keys else ((ends[-1], 2), "i")
        if not (np.array_equal(array, ends) if array is starts else array.shape == shape and array.dtype.kind == kind):
            raise ValueError(f"'{path}' does not fit the {ends[-1]} samples that the manifest counts: {anew}")
    return {"starts": starts, "keys": keys, "places": {path.name.removesuffix(".npy"): array for path, array in zip(paths, places)}}


def _remote_index(address: str, shards: list[dict]) -> dict:
    """The index of a remote folder, in the cache. Raises OSError, ValueError where it is not there, or of other tars."""
    how = "write it where the tars lie (python data/make_shards.py --index FOLDER), and put its folder beside them"
    try:
        about = remote.fetch_json(address, f"{INDEX}/about.json")
    except OSError as error:
        raise OSError(f"{error}. Shards elsewhere are read by their index: {how}") from None
    if not isinstance(about.get("files"), dict):
        raise ValueError(f"the index of '{address}' was written by an early version, and does not list its files: {how}")
    if about.get("shards") != digest_of(shards):
        raise ValueError(f"the index of '{address}' is of other tars than its manifest: {how}")
    return _map(cache.fetch_index(address, about["files"]), about["files"], shards)


@dataclass(frozen=True)
class ShardSet:
    """The samples of a shard folder, addressed by number, with each file's place in its tar.

    `keys`: [N]. `places[extension]`: [N, 2] of (offset, size), size -1 where a sample lacks that file.
    `starts`: [num_shards + 1], the number of the first sample of each shard.
    """

    folder: Path | str
    manifest: dict
    keys: np.ndarray
    places: dict[str, np.ndarray]
    starts: np.ndarray

    @property
    def digest(self) -> str:
        """Of all contents: two sets are the same where it is."""
        return digest_of(self.manifest["shards"])

    @classmethod
    def open(cls, folder: str | Path) -> ShardSet:
        """Open a shard folder by its index, or by the tars' headers; or an address (see `remote`), by its index.

        Raises as `read_manifest`, `make_index`; OSError, ValueError where an address has no index, or there is no cache.
        """
        manifest = read_manifest(folder)
        if is_remote(folder):
            return cls(folder, manifest, **_remote_index(folder, manifest["shards"]))
        folder = Path(folder)
        index = read_index(folder, manifest["shards"])
        if index is None:
            if len(manifest["shards"]) >= MANY:
                warnings.warn(
                    f"'{folder}' has no index of its {len(manifest['shards'])} tars: each process now reads their headers. Write one: "
                    f"python data/make_shards.py --index '{folder}'",
                    stacklevel=2,
                )
            index = make_index(folder, manifest["shards"])
        return cls(folder, manifest, **index)

    def __len__(self) -> int:
        return len(self.keys)

    def has(self, extension: str) -> np.ndarray:
        """[N] bool: which samples hold a file of this extension."""
        return self.places[extension][:, 1] >= 0 if extension in self.places else np.zeros(len(self), bool)

    def holds(self, number: int, extension: str) -> bool:
        """Whether one sample holds a file of this extension."""
        return extension in self.places and bool(self.places[extension][number, 1] >= 0)

    def shard_of(self, number: int) -> int:
        """Which shard, of the manifest's, a sample lies in."""
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def read(self, number: int, extension: str) -> bytes:
        """The bytes of one file of one sample. Raises ValueError where the sample has none; that names the tar where it ends too early."""
        if not self.holds(number, extension):
            raise UnfitSample(f"sample '{self.keys[number]}' of '{self.folder}' has no file .{extension}")
        offset, size = map(int, self.places[extension][number])
        entry = self.manifest["shards"][self.shard_of(number)]
        if offset < 0 or offset + size > entry["bytes"]:  # else all memory would be asked for
            raise UnfitSample(
                f"the index of '{self.folder}' is damaged: .{extension} of sample '{self.keys[number]}' would lie at bytes {offset} to "
                f"{offset + size} of '{entry['name']}', which has {entry['bytes']}. Remove '{Path(self.folder) / INDEX}', and have it "
                "written anew by data/make_shards.py --index"
            )
        try:
            with cache.open_tar(self.folder, entry) if is_remote(self.folder) else open(Path(self.folder) / entry["name"], "rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            if error.errno is None or isinstance(error, cache.CacheFull):
                raise
            at = f"'{self.folder}/{entry['name']}'"
            raise OSError(error.errno, f"{error.strerror}, while reading sample '{self.keys[number]}' of {at}") from error
        if len(content) != size:
            raise UnfitSample(f"shard '{file.name}' ended while reading sample '{self.keys[number]}': it was truncated after the start")
        return content

    def fetch_ahead(self, numbers: Iterable[int]) -> None:
        """Has a remote folder's shards, by number, fetched in the background, in this order."""
        if is_remote(self.folder):
            cache.fetch_ahead(self.folder, [self.manifest["shards"][number] for number in numbers])
