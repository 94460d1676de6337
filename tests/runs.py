"""What tests read off a run, or off another folder: all files, the exported weights, the log."""

from __future__ import annotations

import csv
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weights(folder: Path, part: str = "unet") -> dict[str, Tensor]:
    """The weights of a part of a model folder."""
    return load_file(next((folder / part).glob("*.safetensors")))


def logged(run: Path, name: str) -> list[float]:
    """The values of a metric in a run's log."""
    with open(run / "logs" / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
