"""What tests read off a run: its exported weights and its log."""

from __future__ import annotations

import csv
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor


def weights(folder: Path, part: str = "unet") -> dict[str, Tensor]:
    """The weights of a part of a model folder."""
    return load_file(next((folder / part).glob("*.safetensors")))


def logged(run: Path, name: str) -> list[float]:
    """The values of a metric in a run's log."""
    with open(run / "logs" / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]
