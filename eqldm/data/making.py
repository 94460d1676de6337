"""Make a shard folder with many processes, and resume it when it was interrupted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eqldm.atomic import DISK_FULL, sweep
from eqldm.data.manifest import MANIFEST, load_manifest
from eqldm.data.shards import read_manifest, write_json, write_manifest
from eqldm.data.workers import run_jobs
from eqldm.lock import LOCK, held

UNFINISHED = "unfinished.json"  # beside the tars while they are being made: what a resumed run need not redo

console = Console(stderr=True)


def num_cores() -> int:
    """The cores that this process may use: fewer than the machine has, under Slurm or in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prepare(folder: Path, generator: dict, names: list[str], overwrite: bool) -> dict[str, dict]:
    """The entries of the shards that an interrupted run finished; clears the folder under `overwrite`."""
    record = folder / UNFINISHED
    old = None
    if (folder / MANIFEST).is_file():
        old = load_manifest(folder / MANIFEST)
    elif record.is_file():
        old = load_manifest(record)
    if old is not None and not overwrite and old.get("generator") != generator:
        was = old.get("generator") or {}
        keys = sorted(key for key in {*was, *generator} if was.get(key) != generator.get(key))
        shown = ", ".join(f"{key} (there {_short(was.get(key))}, now {_short(generator.get(key))})" for key in keys)
        raise ValueError(f"'{folder}' holds shards made with other options: {shown}. Use the same options, another folder, or --overwrite")
    known = {entry["name"] for entry in old["shards"]} | set(old.get("names", [])) if old else set()
    foreign = sorted(tar.name for tar in folder.glob("*.tar") if tar.name not in known)
    if foreign:
        raise ValueError(f"'{folder}' holds tars that this script did not make: {', '.join(foreign[:3])}. Use another folder")
    if overwrite:
        for name in [*known, MANIFEST, UNFINISHED]:
            (folder / name).unlink(missing_ok=True)
        return {}
    entries = {entry["name"]: entry for entry in old["shards"]} if old else {}
    whole = {name for name, entry in entries.items() if (folder / name).is_file() and (folder / name).stat().st_size == entry["bytes"]}
    whole -= {name for name, entry in entries.items() if any(map(_disk_failed, entry.get("skipped", [])))}
    return {name: entry for name, entry in entries.items() if name in whole and name in names}


def _disk_failed(skipped: dict) -> bool:
    """Whether a picture was skipped for an error of the disk or the network, as early versions did."""
    return "[Errno " in skipped.get("reason", "")


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def make_folder(
    folder: str | Path,
    jobs: dict,
    write: Callable,
    about: dict,
    *,
    workers: int = 1,
    overwrite: bool = False,
    finish: Callable[[list[dict]], dict] | None = None,
) -> dict:
    """Write one shard per job, and the manifest; returns the manifest.

    `jobs`: {tar name: argument of `write`}, in the order of the manifest. `write(job)` writes that tar and returns its
    entry, which may carry `skipped`, a list that is moved to the manifest. It must be picklable.
    `about["generator"]` holds all that the bytes depend on. A folder made with an equal generator is left as it is; if its
    making was interrupted, only the missing shards are made.
    `finish(entries)` is called when all shards are written: what it takes out of their entries for the manifest. Where it raises, the
    shards are kept as finished ones.
    Raises: ValueError where the folder holds other shards, or another process is making it; OSError where the disk is full or a source
    cannot be read (finished shards are kept).
    """
    folder = Path(folder)
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    about = json.loads(json.dumps(about))  # tuples become lists, as they will be when read back
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder / LOCK, f"'{folder}' is being made", "use another folder"):
        return _make(folder, jobs, write, about, workers, overwrite, finish)


def _make(
    folder: Path, jobs: dict, write: Callable, about: dict, workers: int, overwrite: bool, finish: Callable[[list[dict]], dict] | None
) -> dict:
    done = _prepare(folder, about["generator"], list(jobs), overwrite)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        lost = [item for item in manifest.get("skipped", []) if _disk_failed(item)]
        if lost:
            raise ValueError(
                f"'{folder}' was made by an early version while files of its source could not be read: {len(lost)} pictures are missing, "
                f"such as {lost[0]['file']} ({lost[0]['reason']}). Make it anew with --overwrite"
            )
        console.print(f"{folder}: made already with the same options, nothing to do", markup=False, soft_wrap=True)
        return manifest
    if done:
        console.print(f"{folder}: resuming, {len(done)} of {len(jobs)} shards are there", markup=False, soft_wrap=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn("shards"), TimeRemainingColumn()
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(str(folder), total=len(jobs), completed=len(done))
            state = {"generator": about["generator"], "names": list(jobs)}
            write_json(folder / UNFINISHED, {**state, "shards": list(done.values())})
            # closing: should this loop fail, the workers have stopped before their half shards are removed
            with closing(run_jobs({name: job for name, job in jobs.items() if name not in done}, write, workers)) as finished:
                for name, entry in finished:
                    done[name] = entry
                    write_json(folder / UNFINISHED, {**state, "shards": list(done.values())})
                    progress.advance(task)
    except BrokenProcessPool as error:
        sweep(folder)
        raise OSError(
            f"a worker writing '{folder}' was killed (out of memory, or a file that it read went away?). Finished shards are kept: "
            f"run the same command again, with fewer --workers"
        ) from error
    except OSError as error:
        after = f"after {len(done)} of {len(jobs)} shards. Finished shards are kept"
        if error.errno in DISK_FULL:
            raise OSError(f"no space left in '{folder}', {after}: free some space and run the same command again") from error
        raise OSError(f"{error}: stopped {after}, run the same command again when that is mended") from error
    entries = [done[name] for name in jobs]
    about |= finish(entries) if finish else {}
    skipped = [item for entry in entries for item in entry.pop("skipped", [])]
    for entry in entries:
        if entry["count"] == 0:
            (folder / entry["name"]).unlink()
    about["skipped"] = about.get("skipped", []) + skipped
    manifest = write_manifest(folder, [entry for entry in entries if entry["count"]], **about)
    (folder / UNFINISHED).unlink()
    return manifest
