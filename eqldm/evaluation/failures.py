"""What one of several processes could not measure, told to the others: on the disk, which is all that they share.

Without it they would wait for its share for good, and no report would be written of what they did measure.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from eqldm.atomic import write_whole
from eqldm.processes import launch
from eqldm.weights import read_json


def forget_failures(out: Path, rank: int | None = None) -> None:
    """Removes what is noted, of one process or of all: it is to be tried again, or has been reported."""
    for path in out.glob(f".failed-*-{'*' if rank is None else rank}.json"):
        path.unlink(missing_ok=True)


def note_failure(out: Path, rank: int, model: str, question: str, text: str) -> None:
    """Notes that this process will have no share of a question of a model, or, where that is empty, of any. text: why.

    Raises NotWritten."""
    path = out / f".failed-{_launch()}-{rank}.json"
    noted = read_json(path) if path.exists() else {}
    noted.setdefault(model, {}).setdefault(question, text)
    write_whole(path, lambda partial: partial.write_text(json.dumps(noted)))


def noted_failure(out: Path, model: str, question: str) -> str | None:
    """What a process of this launch has noted of a question of a model, or of all of it; None for nothing."""
    for path in sorted(out.glob(f".failed-{_launch()}-*.json")):
        try:
            noted = read_json(path).get(model, {})
        except FileNotFoundError:  # just reported
            continue
        if text := noted.get(question) or noted.get(""):
            return text
    return None


def _launch() -> str:
    return hashlib.sha256(launch().encode()).hexdigest()[:8]
