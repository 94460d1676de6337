"""Part 4 of benchmarks/gpu.py, *learn*: trains a config on shards for the time that is left, and brings home what it has learnt.

A short run first tells how many steps fit, so that the schedule of the learning rate ends with the time. What is learnt is exported in
float16 and laid into OUT as pieces of a tar, each small enough to be sent: `cat learnt.tar.* | tar x`. Without --config nothing is trained.
With --then both are trained, one after the other (gpu_chain.py).
"""

from __future__ import annotations

import argparse
import csv
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from eqldm.config import load_config
from gpu_parts import Item, Time, run_part
from steps import ROOT, last, shards

PIECE_BYTES = 15_000_000  # a file of OUT may be sent where 16 MB are the most
EXPORT_SECONDS = 40.0  # for the export and the pieces, and for a run that is told to end
PILOT_STEPS, PILOT_SHARE = 40, 0.35  # of the first run: its steps, and the share of the time that it may take
MARGIN = 0.9  # of the steps that would fit
REHEARSAL_STEPS = 20
GLYPHS = "configs/glyphs/scratch_vae_plain.yaml"  # of the rehearsal


def start(*words: object) -> subprocess.Popen:
    print("$ python " + shlex.join(map(str, words)), flush=True)
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)


def wait(process: subprocess.Popen, limit: Time) -> int | None:
    """The exit status; None where the time is up and the process goes on."""
    while process.poll() is None and limit.left() > 0:
        time.sleep(0.1)
    return process.poll()


def end(process: subprocess.Popen, seconds: float = 10.0) -> None:
    """Tells a training to end after the step at hand, with a checkpoint; kills it where it does not."""
    process.send_signal(signal.SIGUSR1)
    if wait(process, Time.of(seconds)) is None:
        process.kill()
        process.wait()


def finish(words: Sequence[object], limit: Time) -> None:
    """Runs a command to its end. Raises RuntimeError where it fails or the time is up."""
    process = start(*words)
    if status := wait(process, limit):
        raise RuntimeError(f"python {shlex.join(map(str, words))} failed ({status})")
    if process.poll() is None:
        process.kill()
        process.wait()
        raise RuntimeError(f"python {shlex.join(map(str, words))} took longer than there was time")


def rates(run: Path) -> list[float]:
    """Samples/s of the lines of a run's log."""
    table = run / "logs" / "metrics.csv"
    if not table.is_file():
        return []
    with open(table, newline="") as file:
        return [float(row["train/samples_per_second"]) for row in csv.DictReader(file) if row.get("train/samples_per_second")]


def options(args: argparse.Namespace, run: Path, num_steps: int, *more: str) -> list[str]:
    """train.py's, for so many steps."""
    steps = [f"run.num_steps={num_steps}", f"run.val_every={num_steps}", f"run.log_every={max(1, num_steps // 40)}"]
    device = [f"run.accelerator={'gpu' if args.device == 'cuda' else 'cpu'}"]
    found = [f"run.dir={run}", *shards(args.shards), *steps, f"run.checkpoint_every={max(1, num_steps // 4)}", *device]
    return last([*found, *args.set, *more])


def steps_that_fit(args: argparse.Namespace, limit: Time) -> int:
    """The optimizer steps that fit into the time, by a short run. Raises RuntimeError where that takes no step in its share of it."""
    pilot, begun = args.scratch / "pilot", time.monotonic()
    process = start("train.py", args.config, *options(args, pilot, PILOT_STEPS, "run.val_every=1000000", "run.checkpoint_every=1000000"))
    try:
        status = wait(process, limit.at_most(PILOT_SHARE * limit.left()))
    finally:
        process.kill()
        process.wait()
    if status:
        raise RuntimeError(f"the training failed ({status}): see the log")
    found = rates(pilot)
    if not found:
        raise RuntimeError(f"no step of the training was logged in {time.monotonic() - begun:.0f} s")
    batch_size = load_config(ROOT / args.config, options(args, pilot, 1)).data.batch_size
    steps_a_second = statistics.median(found[len(found) // 3 :]) / batch_size
    starting = time.monotonic() - begun - len(found) / steps_a_second  # a line of its log for each step
    shutil.rmtree(pilot)
    return int(MARGIN * (limit.left() - starting - EXPORT_SECONDS) * steps_a_second)


def learn(args: argparse.Namespace, limit: Time, most_steps: int = 10**9) -> dict[str, Any]:
    """Trains, exports, and writes the pieces. Raises RuntimeError where a command fails."""
    planned, run = min(most_steps, steps_that_fit(args, limit)), args.scratch / "learn"
    if planned < 2:
        raise RuntimeError(f"{planned} steps of the training fit into the time: give it more")
    process = start("train.py", args.config, *options(args, run, planned))
    try:
        wait(process, limit.at_most(limit.left() - EXPORT_SECONDS))
    finally:
        if stopped := process.poll() is None:
            end(process)
    if process.returncode and not stopped:
        raise RuntimeError(f"the training failed ({process.returncode}): see the log")
    model = run / "model"
    if stopped := not (run / "done.json").is_file():  # its last checkpoint's model
        model = args.scratch / "stopped"
        finish(["-m", "eqldm.export", run, "--out", model], limit)
    if (model / "vae").is_dir() or (model / "unet").is_dir():  # a judge is in float16 already
        finish(["-m", "eqldm.export", model, "--out", args.scratch / "learnt", "--dtype", "float16"], limit)
        model = args.scratch / "learnt"
    pieces = write_pieces({"model": model, "metrics.csv": run / "logs" / "metrics.csv", "config.yaml": run / "config.yaml"}, args.out)
    rate = statistics.median(rates(run) or [0.0])
    return {"planned_steps": planned, "stopped": stopped, "samples_per_second": rate, "pieces": [path.name for path in pieces]}


def write_pieces(contents: dict[str, Path], out: Path, size: int = PIECE_BYTES) -> list[Path]:
    """A tar of files and folders, by their names in it, as OUT/learnt.tar.00, .01, ..., each of at most `size` bytes."""
    for old in out.glob("learnt.tar.*"):
        old.unlink()
    whole = out / "learnt.tar"
    pieces: list[Path] = []
    with tarfile.open(whole, "w") as tar:
        for name, path in contents.items():
            tar.add(path, name)
    with open(whole, "rb") as file:
        while part := file.read(size):
            pieces.append(out / f"learnt.tar.{len(pieces):02d}")
            pieces[-1].write_bytes(part)
    whole.unlink()
    return pieces


def rehearse(args: argparse.Namespace, limit: Time) -> dict[str, Any]:
    """The same with an autoencoder of letters, on some that are made here."""
    words = ["--num-train", 64, "--num-val", 16, "--split", "train", "val", "--shard-size", 32, "--workers", 1, "--overwrite"]
    args.config, args.shards = Path(GLYPHS), args.scratch / "glyphs"
    args.set = ["data.batch_size=8", "data.num_workers=0", "data.val_samples=16", *args.set]
    finish(["data/glyphs.py", "--out", args.shards, *words], limit)
    return learn(args, limit, REHEARSAL_STEPS)


def chain(args: argparse.Namespace, limit: Time) -> dict[str, Any]:
    from gpu_chain import learn_both  # takes seconds to import

    return learn_both(args, limit)


def items(args: argparse.Namespace) -> Sequence[Item]:
    if args.config is None or args.shards is None:
        return [Item(f"{GLYPHS}, rehearsed", 30, partial(rehearse, args))] if args.tiny else []
    if args.then is not None:
        return [Item(f"{args.config.name}, then {args.then.name}", 75, partial(chain, args))]
    return [Item(args.config.name, 75, partial(learn, args))]


if __name__ == "__main__":
    run_part(__doc__, "learn", items)
