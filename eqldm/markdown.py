"""Markdown tables, of reports, cards and studies."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join("| " + " | ".join(line) + " |\n" for line in (heading, ["---"] * len(heading), *rows))
