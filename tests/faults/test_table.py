"""docs/reliability.md has a row for each kind of fault, and no others."""

from __future__ import annotations

import importlib
import re
from pathlib import Path


def test_each_kind_has_its_row():
    here = Path(__file__)
    kinds = set()
    for path in sorted(here.parent.glob("test_*.py")):
        for name, value in vars(importlib.import_module(path.stem)).items():
            for mark in getattr(value, "pytestmark", []) if name.startswith("test_") else []:
                if mark.name == "fault":
                    kinds.add((mark.args[0], path.name))
    text = (here.parents[2] / "docs" / "reliability.md").read_text()
    rows = {(row[1], row[2]) for row in re.finditer(r"^\| (.+?) \| \d.*\| (test_\w+\.py) \|$", text, re.MULTILINE)}
    assert len(kinds) > 10 and rows == kinds
