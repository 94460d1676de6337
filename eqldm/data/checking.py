"""Looks whether tars of any origin can be trained on, and writes their manifest: `make_shards.py --index`.

What would stop a training is an error here, by name. What training skips is counted, and listed in the manifest.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eqldm.data.contents import MAX_SKIPS, PICTURE_EXTENSIONS, array_of, caption_of, label_of, picture_extension
from eqldm.data.making import console
from eqldm.data.pictures import UnfitPicture, read_picture
from eqldm.data.shards import MANIFEST, MANY, file_sha256, read_index, read_manifest, write_index, write_manifest
from eqldm.data.tars import read_tar
from eqldm.data.workers import run_jobs

ARRAYS = {"npy", "npz", "safetensors", "pt", "pth"}  # what latents come as
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
SHOWN = 10  # by name


def index_folder(folder: str | Path, overwrite: bool = False, *, quick: bool = False, workers: int = 1) -> dict:
    """Check all samples of a folder of tars, and write its manifest; `kind` and `image_size` are told from the samples. Where there is a
    manifest and no index of its tars, write the index, and check nothing. Returns the manifest.

    `image_size` is the pictures' side where these are squares, else None; `unreadable` lists the pictures that training will skip.
    quick: look into the first sample of each tar alone. What names and sizes tell is checked of all.
    Raises: FileNotFoundError where there is no tar; ValueError where a manifest exists, a tar is broken, kinds mix, or samples would stop
    a training.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file() and not overwrite:
        manifest = read_manifest(folder)
        if read_index(folder, manifest["shards"]) is None:
            write_index(folder, manifest["shards"])
            about = f"{manifest['count']} samples in {len(manifest['shards'])} shards"
            _say(f"{folder}: index of {about}; what they hold is not checked (with --overwrite it is)")
            return manifest
    tars = find_tars(folder)
    if (folder / MANIFEST).exists() and not overwrite:
        raise ValueError(f"'{folder}' has a {MANIFEST} already: use --overwrite to write it anew")
    heads = each(read_tar, {tar.name: tar for tar in tars}, workers if len(tars) >= MANY else 1, f"{folder}, names")
    found = {name: samples for name, (samples, _) in heads.items() if samples}
    _say_ignored(folder, heads)
    kind = find_kind(folder, found)
    counts = Counter(ending for samples in found.values() for sample in samples for ending in sample)
    extension = picture_extension(counts) if kind == "pictures" else None
    jobs = {name: (folder / name, samples) for name, samples in found.items()}
    look = partial(check_tar, extension=extension, quick=quick)
    reports = each(look, jobs, workers, f"{folder}, {'first samples' if quick else 'samples'}")
    size = check_reports(folder, reports, counts["__key__"])
    unreadable = [{"file": f"{name}/{key}", "reason": why} for name in reports for _, key, why in reports[name]["unreadable"]]
    stated: dict[str, Any] = {"kind": kind, "generator": {"name": "index"}, "unreadable": unreadable}
    if kind == "pictures":
        stated["image_size"] = size[0] if len(set(size)) == 1 else None
    manifest = write_manifest(folder, [reports[name]["entry"] for name in found], list(found.values()), **stated)
    _say_found(folder, manifest, counts, reports, extension, size, quick)
    return manifest


def find_tars(folder: Path) -> list[Path]:
    """The tars that lie in a folder, by name; what is left out is said. Raises FileNotFoundError where there is none."""
    tars = sorted(folder.glob("*.tar"))
    hidden = [tar.name for tar in tars if tar.name.startswith(".")]  # macOS puts ._NAME.tar beside NAME.tar
    packed = sorted(path.name for path in folder.glob("*") if path.name.endswith(COMPRESSED))
    tars = [tar for tar in tars if tar.name not in hidden and tar.is_file()]
    if not tars:
        deeper = "" if not any(folder.glob("*/*.tar")) else "; its subfolders do: give one of these"
        unpack = f"; {len(packed)} are compressed, such as {packed[0]}: unpack them" if packed else ""
        raise FileNotFoundError(f"'{folder}' holds no tars, wanted files that end in .tar{deeper}{unpack}")
    for names, why in ((hidden, "hidden files"), (packed, "compressed: unpack them to have them read")):
        if names:
            _say(f"{folder}: left out {len(names)} tars ({why}): {_listed(names)}")
    return tars


def find_kind(folder: Path, found: dict[str, list[dict]]) -> str:
    """`pictures` or `latents`. Raises ValueError where tars hold neither, or both occur."""
    kinds: dict[str, str] = {}
    for name, samples in found.items():
        held = {ending for sample in samples for ending in sample} - {"__key__"}
        if not (pictures := held.intersection(PICTURE_EXTENSIONS)) and not any(ending.rpartition(".")[2] in ARRAYS for ending in held):
            raise ValueError(f"shard '{folder / name}' holds neither pictures nor latents: its files end in {sorted(held)}")
        kinds.setdefault("pictures" if pictures else "latents", name)
    if len(kinds) != 1:
        raise ValueError(f"'{folder}' must hold one kind of samples, got {kinds or 'none'}: one folder for each kind is wanted")
    return next(iter(kinds))


def check_tar(job: tuple[Path, list[dict]], extension: str | None, quick: bool) -> dict:
    """Look into the samples of one tar, `job = (path, what read_tar found)`.

    extension: of the pictures; None for latents. Gives `entry` (for the manifest); `problems` [(key, what)]; `unreadable` [(number of
    the sample, key, why)]; `sizes` {(width, height), or shape of the latents: keys}; `counts` of what is merely said.
    """
    path, samples = job
    entry = {"name": path.name, "count": len(samples), "bytes": path.stat().st_size, "sha256": file_sha256(path)}
    report: dict[str, Any] = {"entry": entry, "problems": [], "unreadable": [], "sizes": {}, "counts": Counter()}
    with open(path, "rb") as file:
        for number, sample in enumerate(samples):
            key = sample["__key__"]
            if extension and extension not in sample:
                held = ", ".join(sorted(sample.keys() - {"__key__"}))
                report["problems"].append((key, f"it has no .{extension} picture, only: {held}"))
            elif not quick or number == 0:
                report["counts"]["looked at"] += 1
                _check_sample(file, sample, number, extension, report)
    return report


def _check_sample(file: io.BufferedReader, sample: dict, number: int, extension: str | None, report: dict) -> None:
    def content(ending: str) -> bytes:
        file.seek(sample[ending][0])
        return file.read(sample[ending][1])

    key = sample["__key__"]
    parses = {"txt": caption_of} | ({"json": label_of} if extension else {})
    for ending, parse in parses.items():
        if ending in sample:
            try:
                report["counts"]["empty captions"] += parse(content(ending)) == ""
            except ValueError as error:
                report["problems"].append((key, str(error)))
    if not extension and "moments.npy" not in sample:
        return
    held = content(extension or "moments.npy")  # outside: an error of the disk is no sample's fault
    try:
        if extension:
            picture = read_picture(held)
            report["counts"]["notes"] += "note" in picture.info
            size = picture.size
        else:
            size = array_of(held, "moments.npy").shape
    except UnfitPicture as error:
        report["unreadable"].append((number, key, str(error)))
    except ValueError as error:
        report["problems"].append((key, str(error)))
    else:
        report["sizes"].setdefault(size, []).append(key)


def check_reports(folder: Path, reports: dict[str, dict], count: int) -> tuple[int, ...]:
    """The one size of all samples. Raises ValueError where samples would stop a training, with the first of them by name."""
    sizes: Counter = Counter()
    for report in reports.values():
        sizes.update({size: len(keys) for size, keys in report["sizes"].items()})
    size = max(sizes, key=sizes.__getitem__, default=())
    problems = [(f"{name}/{key}", what) for name, report in reports.items() for key, what in report["problems"]]
    for name, report in reports.items():
        for other, keys in report["sizes"].items():
            if other != size:
                problems += [(f"{name}/{key}", f"it is {_shape(other)}, most are {_shape(size)}") for key in keys]
    if problems:
        named = "; ".join(f"{name}: {what}" for name, what in problems[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(
            f"'{folder}': {len(dict(problems))} of {count} samples would stop a training: {named}{more}. Mend them, or make new shards, "
            f"which leave out what cannot be used: python data/make_shards.py --tars '{folder}' --out OUT --size SIDE"
        )
    _check_runs(folder, reports, bool(sizes))
    return size


def _check_runs(folder: Path, reports: dict[str, dict], any_readable: bool) -> None:
    """Raises ValueError where so many pictures in turn cannot be read that training would stop at them."""
    numbers, first = [], 0
    for name, report in reports.items():
        numbers += [(first + number, f"{name}/{key}: {why}") for number, key, why in report["unreadable"]]
        first += report["entry"]["count"]
    starts = [i for i in range(len(numbers)) if i == 0 or numbers[i][0] != numbers[i - 1][0] + 1]
    longest = max((end - start for start, end in zip(starts, [*starts[1:], len(numbers)])), default=0)
    if numbers and (not any_readable or longest >= MAX_SKIPS):
        many = f"{longest} in turn" if any_readable else "all that were looked at"
        raise ValueError(f"'{folder}': {len(numbers)} pictures cannot be read, {many}; the first is {numbers[0][1]}")


def each(function: Callable, jobs: dict[str, Any], workers: int, about: str) -> dict[str, Any]:
    """{name: what the function gives of its job}, by several processes, in the order of the jobs."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("tars"), TimeRemainingColumn()
    done = {}
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(about, total=len(jobs))
            with closing(run_jobs(jobs, function, workers)) as finished:
                for name, result in finished:
                    done[name] = result
                    progress.advance(task)
    except BrokenProcessPool as error:
        raise OSError(f"a worker at {about} was killed (out of memory?): run the same command again, with fewer --workers") from error
    return {name: done[name] for name in jobs}


def _say_ignored(folder: Path, heads: dict[str, tuple[list[dict], dict[str, list[str]]]]) -> None:
    ignored: dict[str, list[str]] = {}
    for name, (samples, left_out) in heads.items():
        for reason, names in left_out.items():
            ignored.setdefault(reason, []).extend(f"{name}/{member}" for member in names)
        if not samples:
            ignored.setdefault("tars without samples", []).append(name)
    for reason, names in ignored.items():
        _say(f"{folder}: ignored {len(names)} ({reason}): {_listed(names)}")


def _say_found(
    folder: Path, manifest: dict, counts: Counter, reports: dict[str, dict], extension: str | None, size: tuple, quick: bool
) -> None:
    said: Counter = Counter()
    for report in reports.values():
        said.update(report["counts"])
    total, what = manifest["count"], f"kind {manifest['kind']}"
    if extension:
        what += f", .{extension} of {_shape(size)}"
    captions = f"{counts['txt']} of {total}" + (", and training on text needs all" if counts["txt"] < total else "")
    _say(f"{folder}: {total} samples in {len(reports)} shards, {what}; captions (.txt): {captions}")
    others = [ending for ending in PICTURE_EXTENSIONS if counts[ending] and ending != extension]
    if extension and others:
        _say(f"  not read: the pictures .{', .'.join(others)} that lie beside .{extension}")
    if extension and counts["json"] and counts["txt"] < total:
        _say("  a caption in a .json is not read: data/make_shards.py --tars makes shards with it")
    read = {"__key__", "txt", *((extension, "json") if extension else ("moments.npy", "prompt_embeds.npy")), *others}
    if unread := sorted(counts.keys() - read):
        _say(f"  not read: {', '.join(f'{counts[ending]} .{ending}' for ending in unread)}")
    if said["empty captions"]:
        _say(f"  empty captions: {said['empty captions']}")
    if said["notes"]:
        _say(f"  metadata that cannot be read: of {said['notes']} pictures, which are taken without it (as they lie)")
    if unreadable := manifest["unreadable"]:
        reasons = Counter(item["reason"].split(":")[0] for item in unreadable)
        _say(f"  unreadable: {len(unreadable)} pictures, which training skips {dict(reasons)}; all are listed in {MANIFEST}")
        for item in unreadable[:SHOWN]:
            _say(f"    {item['file']}: {item['reason']}")
    if not extension:
        _say("  nothing tells which VAE made these latents: training takes those that data/encode_latents.py wrote, with their manifest")
    if quick:
        _say(f"  not checked: the pictures, labels and captions of the other {total - said['looked at']} samples (--quick)")


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _shape(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size)) + (" px" if len(size) == 2 else "")
