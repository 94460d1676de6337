"""What there is to know of this code on a GPU, in so many minutes: python benchmarks/gpu.py --minutes 9 --out DIR

In order of worth, each part for its share of the time and for what the ones before it left over:

right     is it right: the tests marked `gpu`, which hold the GPU against the CPU
fast      training steps at the size of Stable Diffusion 1.5: pictures/s, share of the peak, memory, beside what eqldm.budget predicts
sampling  seconds a picture at that size, in latents, blended in pixels, and with one call of the UNet for each view
learn     trains --config on --shards for the time that is left, and brings home the weights in float16

DIR/results.jsonl gets each result as it comes and DIR/report.md the tables of them, so that a run that is interrupted keeps what it has.
`--device cpu --tiny` rehearses all of it with small models on a machine without a GPU. Exit status 1: something failed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eqldm.atomic import write_whole
from eqldm.command import real
from eqldm.ranges import Range
from gpu_parts import BEGUN, BROKEN, DONE, FAILED, RESULTS, SKIPPED, STOPPED, Time, note, part_parser, results
from gpu_report import about, report

HERE = Path(__file__).resolve().parent
PARTS = {"right": 150.0, "fast": 210.0, "sampling": 80.0, "learn": 100.0}  # in order of worth, and the shares of the time
PREDICTED = "predicted"  # runs beside the parts, on the CPU
TICK_SECONDS = 0.25
EARLIER_SECONDS = 2.0
GRACE_SECONDS = 5.0  # for a part that is told to end
AGAIN_SECONDS = 20.0  # that must be left for a part to be started again
WHOLE = "(the part)"


def parts_of(args: Any) -> list[str]:
    """Those that are asked for and can be run; the time of the others is theirs. Raises ValueError for a training without shards."""
    if bool(args.config) != bool(args.shards):
        raise ValueError("--config and --shards: give both, what to train and on what, or neither")
    if args.then and not args.config:
        raise ValueError("--then trains a UNet on the latents of another config's autoencoder: give that one as --config")
    return [part for part in PARTS if part in args.only and (part != "learn" or args.tiny or args.config)]


def limit_of(part: str, parts: Sequence[str], limit: Time) -> Time:
    """Until when a part may run, if it begins now: what is left, less the shares of the parts after it."""
    shares = {name: PARTS[name] for name in parts[parts.index(part) :]}
    return limit.at_most(limit.left() * shares[part] / sum(shares.values()))


def watch(process: subprocess.Popen, limit: Time, tick: Callable[[], None] = lambda: None, sleep: Callable = time.sleep) -> int | None:
    """The exit status of a process, which is looked at until the time is up; None where it was ended then, with all that it started."""
    try:
        while process.poll() is None and limit.left() > 0:
            tick()
            sleep(TICK_SECONDS)
        return process.poll()
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Ends a process that leads a group, and what is left of the group."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except (ProcessLookupError, PermissionError):
            break
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def start(part: str, args: Any, limit: Time, log, **environment: str) -> subprocess.Popen:
    """A part's process, which leads a group of its own. It is told to be done a little earlier than it is ended."""
    words = ["--out", args.out, "--scratch", args.scratch, "--device", args.device, "--end", f"{limit.end - EARLIER_SECONDS:.2f}"]
    words += ["--tiny"] if args.tiny else []
    words += [word for name in ("config", "shards", "then", "num_pictures") if (value := getattr(args, name))
              for word in (f"--{name.replace('_', '-')}", value)]  # fmt: skip
    words += ["--set", *args.set] if args.set else []
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, str(HERE / f"gpu_{part}.py"), *map(str, words)],
        cwd=HERE.parent, env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run_part(part: str, args: Any, limit: Time, log, tick: Callable[[], None]) -> None:
    """Runs a part until its time is up, started again where an item ended it; notes how it ended where that was early."""
    while True:
        known = len(results(args.out))
        status = watch(start(part, args, limit, log), limit, tick)
        if status == 0:
            return
        if status is None:
            note(args.out, part, WHOLE, STOPPED, why="its time was up")
            return
        if status != BROKEN:
            note(args.out, part, WHOLE, FAILED, why=f"it ended with status {status}: see log.txt")
        if limit.left() < AGAIN_SECONDS or len(results(args.out)) <= known + (status != BROKEN):
            return


class Shown:
    """Prints each result once, and keeps the report up to date."""

    def __init__(self, out: Path):
        self.out, self.count = out, 0

    def __call__(self) -> None:
        rows = results(self.out)
        for row in rows[self.count :]:
            if row["state"] != BEGUN and row["part"] != "about":
                found = ", ".join(f"{name} {_short(value)}" for name, value in row.items() if name not in ("part", "name", "state"))
                print(f"{row['part']}: {row['state']:7} {row['name']}  {found}", flush=True)
        if len(rows) > self.count:
            self.count = len(rows)
            write_whole(self.out / "report.md", lambda path: path.write_text(report(rows)))


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    counts = {state: sum(row["state"] == state for row in rows) for state in (DONE, FAILED, SKIPPED, STOPPED)}
    return ", ".join(f"{count} {state}" for state, count in counts.items() if count)


def run(args: Any) -> int:
    """Runs the parts. Raises ValueError where --out holds results, or there is no such device."""
    limit, parts = Time.of(60 * args.minutes), parts_of(args)
    if (args.out / RESULTS).exists():
        raise ValueError(f"--out '{args.out}' holds the results of another run: give another folder")
    found = about(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    note(args.out, "about", "machine", DONE, minutes=args.minutes, parts=parts, tiny=args.tiny, **found)
    if "learn" in args.only and "learn" not in parts:
        note(args.out, "learn", WHOLE, SKIPPED, why="no --config and --shards were given")
    shown = Shown(args.out)
    with open(args.out / "log.txt", "a") as log:
        beside = start(PREDICTED, args, limit, log, CUDA_VISIBLE_DEVICES="") if "fast" in parts else None
        try:
            for part in parts:
                run_part(part, args, limit_of(part, parts, limit), log, shown)
            if beside and watch(beside, limit, shown) is None:
                note(args.out, PREDICTED, WHOLE, STOPPED, why="its time was up")
        finally:
            if beside:
                end(beside)
            shown()
    print(f"{summary(results(args.out))}; {args.out / 'report.md'}")
    return int(any(row["state"] == FAILED for row in results(args.out)))


def _stop(number: int, frame) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    parser = part_parser(__doc__)
    parser.add_argument("--minutes", type=real(Range(0.1, 600)), default=9.0, help="in all (default: 9)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _stop)  # so that no part is left behind
    try:
        if args.scratch:
            args.scratch.mkdir(parents=True, exist_ok=True)
            status = run(args)
        else:
            with tempfile.TemporaryDirectory(prefix="eqldm-gpu-") as folder:
                args.scratch = Path(folder)
                status = run(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status)


if __name__ == "__main__":
    main()
