"""Part 1 of benchmarks/gpu.py, *right*: the tests marked `gpu`, each a line of the results as it ends.

They hold training steps, bfloat16, resuming, sampling, less memory and DeepSpeed's ZeRO on the GPU against the CPU. With --device cpu the
same tests run on the CPU against itself, as far as they can.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gpu_parts import DONE, FAILED, SKIPPED, Item, Time, note, run_part

TESTS = Path(__file__).resolve().parents[1] / "tests"
FILES = ("test_devices.py", "test_precision.py", "test_zero.py", "test_fold.py")  # that hold tests marked gpu, in order of worth
NEEDED = ("pytest", "hypothesis", "matplotlib", "packaging")  # by the tests, beside what eqldm needs; xdist makes them faster
REHEARSAL = ("-m", "not gpu and not slow", "-k", "ten_seeds or less_memory or those_of_the_cpu", FILES[0])
ENDING_SECONDS = 15.0  # more than xdist's own ten; for tests that are running elsewhere, and the report


class Recorder:
    """Notes the outcome of each test; ends the run when time is up. A plugin of pytest: under xdist it sees what the workers report."""

    def __init__(self, out: Path, limit: Time):
        self.out, self.limit, self.counts = out, limit, dict.fromkeys((DONE, FAILED, SKIPPED), 0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # an error of a fixture too
            self._note(report)
        if self.limit.left() < ENDING_SECONDS:
            pytest.exit("time is up: the tests that are left were not run")

    def _note(self, report: pytest.TestReport) -> None:
        state = {"passed": DONE, "failed": FAILED, "skipped": SKIPPED}[report.outcome]
        self.counts[state] += 1
        found: dict[str, Any] = {"seconds": report.duration, **dict(report.user_properties)}
        if state == FAILED:
            found["why"] = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))[:500]
        elif state == SKIPPED:
            found["why"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        note(self.out, "right", report.nodeid.rpartition("/")[2], state, **found)


def run_tests(args: argparse.Namespace, limit: Time) -> dict[str, Any]:
    """How many passed, failed and were skipped. Raises ValueError where a file of tests could not be read, or a package is missing."""
    if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
        raise ValueError(f"the tests need {', '.join(missing)}: pip install -e '.[test]'")
    recorder = Recorder(args.out, limit)
    chosen = ["-m", "gpu", *FILES] if args.device == "cuda" else [*REHEARSAL]
    words = [word if not word.endswith(".py") else str(TESTS / word) for word in chosen]
    workers = min(14, (os.cpu_count() or 1) - 2)  # most of their time they read libraries
    if args.device == "cuda" and workers > 1 and importlib.util.find_spec("xdist"):
        words += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "1"]  # the next test goes to whoever is free
    status = pytest.main(["-q", "-rfEs", "--tb=short", f"--rootdir={TESTS.parent}", "-p", "no:cacheprovider", *words], plugins=[recorder])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED):
        raise ValueError(f"pytest ended with {pytest.ExitCode(status).name}: see the log")
    counts = {"passed": recorder.counts[DONE], "failed": recorder.counts[FAILED], "skipped": recorder.counts[SKIPPED]}
    return {**counts, **({"why": "time was up: not all tests were run"} if status == pytest.ExitCode.INTERRUPTED else {})}


def items(args: argparse.Namespace) -> Sequence[Item]:
    return [Item("tests", 10, lambda limit: run_tests(args, limit))]


if __name__ == "__main__":
    run_part(__doc__, "right", items)
