"""What the parts of benchmarks/gpu.py share: the time that is left to them, and results that are written as they come.

A part is a process of its own, and a list of items in order of worth. Before each item the part looks whether there is time for it. What an
item finds is a line of OUT/results.jsonl at once, so that whatever ends the part, what it has found stays. A part that is started again
goes on after the item that ended it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqldm.command import Parser, real, whole
from eqldm.paths import path_option
from eqldm.ranges import Range

RESULTS = "results.jsonl"
BEGUN, DONE, FAILED, SKIPPED, STOPPED = "begun", "done", "failed", "skipped", "stopped"
FAULTS = (RuntimeError, ValueError, OSError, ArithmeticError, AssertionError, TypeError, LookupError, AttributeError, ImportError)
"""What of an item is its own failure: the part goes on with the next."""
OUT_OF_MEMORY = "out of memory"
BROKEN = 3  # exit status of a part whose process is of no more use, after an error of the device: to be started again


@dataclass(frozen=True)
class Time:
    """Until when something may run. now: seconds of any clock."""

    end: float
    now: Callable[[], float] = time.monotonic

    @classmethod
    def of(cls, seconds: float, now: Callable[[], float] = time.monotonic) -> Time:
        """From now on, so many seconds."""
        return cls(now() + seconds, now)

    def left(self) -> float:
        """Seconds; below 0 once it is up."""
        return self.end - self.now()

    def at_most(self, seconds: float) -> Time:
        """From now on, so many seconds, but no more than are left."""
        return Time(min(self.end, self.now() + seconds), self.now)


@dataclass(frozen=True)
class Item:
    """Something that is found out. seconds: what it takes, about.  find: gives what goes into the results, within the time."""

    name: str
    seconds: float
    find: Callable[[Time], dict[str, Any]]


def note(out: Path, part: str, name: str, state: str, **found: Any) -> None:
    """Adds a line to the results, whole or not at all: processes may write at once."""
    line = json.dumps({"part": part, "name": name, "state": state, **found}) + "\n"
    with open(out / RESULTS, "a") as file:
        file.write(line)


def results(out: Path) -> list[dict[str, Any]]:
    """The lines so far; a last one that is cut off, of a machine that went away, is left out."""
    if not (out / RESULTS).is_file():
        return []
    return [json.loads(line) for line in (out / RESULTS).read_text().splitlines(keepends=True) if line.endswith("\n")]


def do(part: str, items: Sequence[Item], limit: Time, out: Path) -> None:
    """Finds out the items, in order, for which there is time, those left out that were begun before; notes each.

    Raises SystemExit with BROKEN where the device's process is of no more use."""
    before = {row["name"] for row in results(out) if row["part"] == part}
    for item in (item for item in items if item.name not in before):
        if limit.left() < item.seconds:
            note(out, part, item.name, SKIPPED, why=f"takes about {item.seconds:.0f} s, {max(0.0, limit.left()):.0f} s were left")
            continue
        note(out, part, item.name, BEGUN)
        print(f"{part}: {item.name} ...", flush=True)
        begun = limit.now()
        try:
            found = item.find(limit)
        except FAULTS as error:
            why = _first_line(error)  # too large for this device is no failure of ours
            note(out, part, item.name, SKIPPED if why == OUT_OF_MEMORY else FAILED, seconds=limit.now() - begun, why=why)
            print(f"{part}: {item.name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            if broke_the_device(error):
                sys.exit(BROKEN)
        else:
            note(out, part, item.name, DONE, seconds=limit.now() - begun, **found)


def broke_the_device(error: BaseException) -> bool:
    """Whether a process that has had this error can do no more on its GPU."""
    return "CUDA error" in str(error) or "AcceleratorError" in type(error).__name__


def _first_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:300]
    return OUT_OF_MEMORY if OUT_OF_MEMORY in text else f"{type(error).__name__}: {text}"


def place(text: str) -> Path:
    """The `type` of an option that is a path, made absolute: parts run in the repository, the user may not."""
    return path_option(text).resolve()


def part_parser(about: str | None) -> argparse.ArgumentParser:
    """The options that every part takes; `about` is its docstring."""
    parser = Parser(about)
    parser.add_argument("--out", type=place, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--scratch", type=place, metavar="DIR", help="folder for what is made on the way (default: DIR/scratch)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: the shipped small models, and few steps")
    parser.add_argument("--config", type=place, metavar="CONFIG", help="what the part `learn` trains")
    parser.add_argument(
        "--shards", type=place, metavar="FOLDER", help="its shards, train and val; with --then also a folder of packages of drawings"
    )
    parser.add_argument(
        "--then", type=place, metavar="CONFIG", help="a UNet's, which is trained next, on the latents of --config's autoencoder"
    )
    parser.add_argument("--num-pictures", type=whole(1), default=80000, help="of packages of drawings, for training (default: 80000)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further options of that training")
    return parser


def run_part(about: str | None, part: str, items: Callable[[argparse.Namespace], Sequence[Item]]) -> None:
    """A part's own command: finds out its items in --seconds."""
    parser = part_parser(about)
    parser.add_argument("--seconds", type=real(Range(1, 1e6)), default=600.0, help="until the part ends (default: 600)")
    parser.add_argument("--end", type=float, help="when it ends, of time.monotonic(), which all processes of a machine share")
    args = parser.parse_args()
    limit = Time(args.end) if args.end else Time.of(args.seconds)
    args.scratch = args.scratch or args.out / "scratch"
    try:
        for folder in (args.out, args.scratch):
            folder.mkdir(parents=True, exist_ok=True)
        do(part, items(args), limit, args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
