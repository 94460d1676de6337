"""Faults that are injected: each test that carries `fault` is one kind, tried with several seeds; the end of the report is their table.

    @pytest.mark.fault("training killed at a random moment", tries=4)
    def test_kill(tmp_path, seed): ...

A test that tries many faults for one seed says how many by `tried(count)`.

`pytest tests/faults -m '' --times 10` tries each kind ten times as often, with other seeds: what docs/reliability.md states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest


def pytest_generate_tests(metafunc):
    if mark := metafunc.definition.get_closest_marker("fault"):
        tries = mark.kwargs.get("tries", 3) * metafunc.config.getoption("--times")
        metafunc.parametrize("seed", range(tries))


@pytest.fixture
def tried(request) -> Callable[[int], None]:
    """`tried(count)`: the faults that this test has tried, some at least."""

    def call(count: int) -> None:
        assert count, "no fault was tried"
        request.node.user_properties.append(("tried", count))

    return call


def pytest_collection_modifyitems(items):
    for item in items:
        if mark := item.get_closest_marker("fault"):
            item.user_properties.append(("fault", mark.args[0]))
            item.user_properties.append(("file", item.path.name))


def pytest_terminal_summary(terminalreporter):
    counts: Counter[tuple[str, str, str]] = Counter()
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            about = dict(report.user_properties) if hasattr(report, "user_properties") else {}
            if "fault" in about and (report.when == "call" or outcome != "passed"):
                counts[about["file"], about["fault"], outcome] += about.get("tried", 1)
    if not counts:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line("| what is broken | tried | survived | lost | skipped | file |\n|---|---|---|---|---|---|")
    for file, kind in sorted({key[:2] for key in counts}):
        survived, lost = counts[file, kind, "passed"], counts[file, kind, "failed"] + counts[file, kind, "error"]
        terminalreporter.write_line(f"| {kind} | {survived + lost} | {survived} | {lost} | {counts[file, kind, 'skipped']} | {file} |")
