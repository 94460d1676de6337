"""What the studies share: commands of this repository, run once (a second call finds them done), and tables over seeds."""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def call(*words) -> None:
    """Runs `python WORDS` in the repository, showing the command. Raises SystemExit where it fails."""
    print("$ python " + shlex.join(map(str, words)), flush=True)
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"error: the command above failed ({done.returncode}); the same call goes on from there")


def train(config: str, folder: Path, *overrides: str) -> Path:
    """The model that a config's run leaves in `folder`; trained now, or resumed, unless it is there."""
    call("train.py", config, f"run.dir={folder}", *overrides)
    return folder / "model"


def encode(data: Path, vae: Path, out: Path) -> Path:
    """Latent shards `out/train` and `out/val` of a picture set's."""
    for split in ("train", "val"):
        call("data/encode_latents.py", "--data", data / split, "--model", vae, "--out", out / split)
    return out


def evaluate(out: Path, models: Sequence[Path], data: Path, *options) -> dict[str, dict[str, float]]:
    """The metrics of each model, in order, by its path; evaluated now unless the report is there."""
    if not (out / "report.md").exists():
        call("-m", "eqldm.evaluate", *models, "--data", data, "--out", out, *options)
    found = {}
    for path in sorted(out.glob("*/about.json")):
        about = json.loads(path.read_text())
        found[path.parent.name] = {"metrics": json.loads((path.parent / "metrics.json").read_text()), "about": about}
    return {name: item["metrics"] for name, item in found.items()}


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    mean = statistics.fmean(values)
    return f"{mean:.3g}" if len(values) == 1 else f"{mean:.3g} ± {statistics.stdev(values):.2g}"


def table(heading: str, columns: Sequence[str], rows: dict[str, Sequence[str]]) -> str:
    """A Markdown table, a row for each name."""
    lines = [[heading, *columns], ["---"] * (len(columns) + 1), *([name, *cells] for name, cells in rows.items())]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
