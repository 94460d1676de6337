"""What an evaluation found, kept and put together: `metrics.json` and the like for each model, and one report on all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image
from rich.console import Console
from safetensors.torch import save
from torch import Tensor

from eqldm.atomic import write_whole
from eqldm.evaluation.anagram import Reading
from eqldm.evaluation.bootstrap import Findings, Interval
from eqldm.evaluation.compare import Measured
from eqldm.evaluation.entries import RESERVED, Entry
from eqldm.evaluation.fit import Verdict
from eqldm.evaluation.report import Model, Report, console_table, write_report
from eqldm.evaluation.sheets import equivariance_sheet, models_sheet
from eqldm.training.run_folder import git_commit, versions
from eqldm.views import View
from eqldm.views.components import Component


@dataclass
class Result:
    """What was found of one model.

    about: how it was evaluated.  metrics: by name.  intervals, resampled: as in `Findings`.  sheets: pictures, by the path under the
    report's folder.  samples: by question, what its pictures were: two results are paired where it is equal.
    """

    entry: Entry
    about: dict
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    resampled: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, dict] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    sheets: dict[str, Path] = field(default_factory=dict)
    decodings: dict[str, Tensor] = field(default_factory=dict)
    readings: dict[str, tuple[Sequence[View | Component], Reading]] = field(default_factory=dict)
    verdict: Verdict | None = None

    def add(self, findings: Findings, question: str, samples: dict, shown: Result) -> None:
        """What one question found. shown: its sheets, and what is shown of several models together."""
        self.metrics |= findings.metrics
        self.intervals |= findings.intervals
        self.resampled |= findings.resampled
        self.samples[question] = samples | {"clusters": findings.num_clusters}
        self.sheets |= shown.sheets
        self.decodings |= shown.decodings
        self.readings |= shown.readings
        self.verdict = shown.verdict or self.verdict


def check_own(out: Path) -> None:
    """Raises ValueError where the folder of a report holds files under its names, and nothing that tells that an evaluation wrote them."""
    if (out / "data.safetensors").exists() or next(out.glob("*/about.json"), None):
        return
    if foreign := [name for name in RESERVED if (out / name).exists()]:
        raise ValueError(f"--out '{out}' holds {foreign[0]}, which was not written by this command, and would be replaced: give another")


def keep(out: Path, result: Result, command: str) -> None:
    """Writes `metrics.json`, `intervals.json`, `resampled.safetensors` and `about.json` of a model, which `compare` reads."""
    folder = out / result.entry.name
    about = {"model": result.entry.text, "hashes": result.hashes, "samples": result.samples, **result.about, "command": command}
    about |= {"verdict": result.verdict and result.verdict.text, "commit": git_commit(), "versions": versions()}
    intervals = {name: asdict(each) for name, each in result.intervals.items()}
    resampled = {name: values.float() for name, values in result.resampled.items()}
    write_whole(folder / "metrics.json", lambda path: path.write_text(json.dumps(result.metrics, indent=2) + "\n"))
    write_whole(folder / "intervals.json", lambda path: path.write_text(json.dumps(intervals, indent=2) + "\n"))
    write_whole(folder / "resampled.safetensors", lambda path: path.write_bytes(save(resampled)))
    write_whole(folder / "about.json", lambda path: path.write_text(json.dumps(about, indent=2, default=str) + "\n"))


def write_results(
    out: Path, results: Sequence[Result], missing: Sequence[str], notes: Sequence[str], title: str, failed: Sequence[str] = ()
) -> Path:
    """Writes the report on results that `keep` has kept, and what they share; prints the table. Returns the path of the page.

    missing, notes: see `Instruments`.  title: of the table.  failed: see `Evaluation`.
    """
    shared: dict[str, Path] = {}
    decodings = {result.entry.name: result.decodings for result in results if result.decodings}
    readings = {result.entry.name: result.readings for result in results if result.readings}

    def share(name: str, sheet: Image.Image) -> None:
        shared[name] = Path(f"{name}.png")
        write_whole(out / shared[name], lambda path: sheet.save(path, "PNG"))

    if decodings:
        share("equivariance", equivariance_sheet(decodings))
    if readings:
        share("models", models_sheet(readings))
    measured = [Measured.open(out / result.entry.name) for result in results]
    models = [Model(m, r.verdict, r.sheets) for m, r in zip(measured, results)]
    text, page = write_report(out, Report(models, missing, notes, shared, failed))
    write_whole(out / "report.md", lambda path: path.write_text(text))
    write_whole(out / "report.html", lambda path: path.write_text(page))
    Console().print(console_table(measured, title))
    for model in models:
        if model.verdict:
            print(f"{model.measured.name}: {model.verdict.text}")
    for text in missing:
        print(f"not computed: {text}")
    return out / "report.html"
