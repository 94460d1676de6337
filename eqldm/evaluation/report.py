"""The report of an evaluation: `report.md`, and `report.html`, one file that opens offline."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.table import Column, Table

from eqldm.evaluation.compare import NOTE, Difference, Measured, comparison_headings, comparison_rows, differences
from eqldm.evaluation.fit import NUM_BINS, Level, Verdict
from eqldm.evaluation.judges import judges_range, of_one_judge
from eqldm.evaluation.naming import QUESTION_TITLES, direction, number
from eqldm.markdown import markdown

COLOURS = ("#3778bf", "#d1603d", "#3a9a5b", "#9b59b6", "#b08a1e", "#c2417f")  # of models in plots, on light and on dark


@dataclass(frozen=True)
class Model:
    """A model's part of a report. verdict: of its fit, or None.  sheets: picture files by title, under the report's folder."""

    measured: Measured
    verdict: Verdict | None
    sheets: dict[str, Path]


@dataclass(frozen=True)
class Report:
    """All models (the first is what the others are held against), what was not computed, and what else a reader must know.

    shared: pictures of all models together, by title.  failed: what could not be measured, and why.
    """

    models: Sequence[Model]
    missing: Sequence[str]
    notes: Sequence[str]
    shared: dict[str, Path]
    failed: Sequence[str] = ()

    def questions(self) -> list[str]:
        """Those that were answered, in order."""
        answered = {name.split("/", 1)[0] for model in self.models for name in model.measured.metrics}
        return [name for name in (*QUESTION_TITLES, *sorted(answered - QUESTION_TITLES.keys())) if name in answered]

    def metrics(self, question: str) -> list[str]:
        """The names of a question's metrics; those of a single bin are in the plots and in `metrics.json` alone."""
        names = dict.fromkeys(name for model in self.models for name in model.measured.metrics)
        return [name for name in names if name.split("/", 1)[0] == question and "/bin_" not in name]

    def means_and_details(self, question: str) -> tuple[list[str], list[str]]:
        """The names of a question's metrics, and of those of single views, or judges, that there is a mean of."""
        names = self.metrics(question)
        single = [
            name for name in names if of_one_judge(name) or (question == "equivariance" and name.count("/") == 2 and "/mean/" not in name)
        ]
        return [name for name in names if name not in single], single

    def against_first(self) -> list[dict[str, Difference]]:
        """What each model but the first has more than that."""
        first, *others = [model.measured for model in self.models]
        return [differences(other, first) for other in others]


def value_cell(measured: Measured, name: str) -> str:
    """A metric's value, with its interval where it has one, and the least and the most of several judges."""
    value, interval = measured.metrics.get(name), measured.intervals.get(name)
    text = number(value)
    if value is not None and interval is not None:
        text += f" ({number(interval.low)} to {number(interval.high)})"
    if ends := judges_range(measured.metrics, name):
        text += ", judges {} to {}".format(*map(number, ends))
    return text


def metric_table(report: Report, names: Sequence[str], against: Sequence[dict[str, Difference]]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of these metrics: their values with intervals, and differences from the first model's."""
    models = [model.measured for model in report.models]
    return comparison_headings(models), comparison_rows(models, names, against, value_cell)


def console_table(models: Sequence[Measured], title: str) -> Table:
    """The values of all models for the terminal, without those of single views and bins where there are means."""
    table = Table(Column("metric", no_wrap=True), "", *(model.name for model in models), title=title)
    names = dict.fromkeys(name for model in models for name in model.metrics if not of_one_judge(name))
    for name in sorted(names, key=lambda name: list(QUESTION_TITLES).index(name.split("/", 1)[0])):
        if name.startswith(("reconstruction/", "generation/", "anagram/", "components/", "equivariance/mean/", "equivariance/eqvae")) or (
            name.startswith("fit/") and "/bin_" not in name
        ):
            table.add_row(name, direction(name), *(number(model.metrics.get(name)) for model in models))
    return table


def write_report(out: Path, report: Report) -> tuple[str, str]:
    """(Markdown, HTML) of the report, whose pictures lie under `out`."""
    against = report.against_first()
    return _markdown(report, against), _page(out, report, against)


def _markdown(report: Report, against: Sequence[dict[str, Difference]]) -> str:
    parts = ["# Evaluation\n"]
    if report.failed:
        parts.append("## Failed\n\n" + "".join(f"- {text}\n" for text in report.failed))
    parts += [f"**{model.measured.name}**: {model.verdict.text}\n" for model in report.models if model.verdict]
    for question in report.questions():
        parts.append(f"## {QUESTION_TITLES.get(question, question.capitalize())}\n")
        parts += [markdown(*metric_table(report, names, against)) for names in report.means_and_details(question) if names]
    parts.append(NOTE + "\n")
    if report.missing:
        parts.append("## Not computed\n\n" + "".join(f"- {text}\n" for text in report.missing))
    parts += [f"{note}\n" for note in report.notes]
    parts.append("## Where the figures are from\n\n" + markdown(["", *(m.measured.name for m in report.models)], provenance(report)))
    return "\n".join(parts)


def provenance(report: Report) -> list[list[str]]:
    """Rows of what each model's figures are from: command, hashes of models and data, seeds, counts, versions."""
    rows = []
    for name in ("command", "model", "hashes", "data", "samples", "seed", "sampling", "sampling precision", "device", "commit", "versions"):
        first, *others = (_plainly(model.measured.about.get(name)) for model in report.models)
        rows.append([name, first, *("the same" if other == first else other for other in others)])
    return rows


def _plainly(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name}: {_plainly(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plainly, value))
    return f"{value[:16]}…" if isinstance(value, str) and len(value) == 64 and " " not in value else str(value)


# The page


def _page(out: Path, report: Report, against: Sequence[dict[str, Difference]]) -> str:
    names = [model.measured.name for model in report.models]
    sections = []
    side_by_side = next((name for name in ("generation", "anagram", "components") if name in report.questions()), None)
    for question in report.questions():
        main, single = report.means_and_details(question)
        body = [_plot(question, report), _html_table(*metric_table(report, main, against))]
        if single:
            table = _html_table(*metric_table(report, single, against))
            body.append(f"<details><summary>{'by view' if question == 'equivariance' else 'by judge'}</summary>{table}</details>")
        body += [
            _picture(out, CAPTIONS.get(title, title), path)
            for title, path in report.shared.items()
            if _belongs(title, question) or (title == "models" and question == side_by_side)
        ]
        body += [
            _picture(out, f"{model.measured.name}: {CAPTIONS.get(title.split('_')[0], title.replace('_', ' '))}", path)
            for model in report.models
            for title, path in model.sheets.items()
            if _belongs(title, question)
        ]
        sections.append((question, QUESTION_TITLES.get(question, question.capitalize()), "\n".join(filter(None, body))))
    verdicts = [
        f'<p class="verdict {VERDICTS[model.verdict.level]}"><b>{html.escape(model.measured.name)}</b>: '
        f"{html.escape(model.verdict.text)}</p>"
        for model in report.models
        if model.verdict
    ]
    missing, failed = ("".join(f"<li>{html.escape(text)}</li>" for text in texts) for texts in (report.missing, report.failed))
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in report.notes)
    links = " ".join(f'<a href="#{name}">{html.escape(title.split(":")[0])}</a>' for name, title, _ in sections)
    parts = [
        f"<h1>Evaluation of {html.escape(', '.join(names))}</h1>",
        f"<nav>{links} <a href='#provenance'>Where the figures are from</a></nav>",
        f'<div class="missing"><h2>Failed</h2><ul>{failed}</ul></div>' if failed else "",
        *verdicts,
        f'<div class="missing"><h2>Not computed</h2><ul>{missing}</ul></div>' if missing else "",
        notes,
        *(f'<section id="{name}"><h2>{html.escape(title)}</h2>{text}</section>' for name, title, text in sections),
        f"<p>{html.escape(NOTE)}</p>",
        f'<section id="provenance"><h2>Where the figures are from</h2>{_html_table(["", *names], provenance(report))}</section>',
    ]
    title = f"<title>eqldm: {html.escape(', '.join(names))}</title>"
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{title}<style>{STYLE}</style>'
    content = "\n".join(filter(None, parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body><main>\n{content}\n</main></body></html>\n'


def _belongs(title: str, question: str) -> bool:
    """Whether a sheet is shown with a question."""
    owners = {
        "reconstruction": ("reconstruction",),
        "equivariance": ("equivariance", "latents"),
        "generation": ("letters", "generation"),
        "anagram": ("anagrams", "letter_matrix"),
        "components": ("components",),
    }
    return title.startswith(owners.get(question, ("-",)))


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    body = "".join("<tr>" + "".join(f"<td{_mark(text)}>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _mark(text: str) -> str:
    return ' class="real"' if ") *" in text else ""


def _picture(out: Path, title: str, path: Path) -> str:
    data = base64.b64encode((out / path).read_bytes()).decode()
    caption = html.escape(title)
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}" loading="lazy">'
    return f'<details open><summary>{caption}</summary><div class="wide">{image}</div></details>'


def _plot(question: str, report: Report) -> str:
    """An SVG of the question's figures over views or timesteps, or nothing."""
    draw = {"fit": _fit_plot, "equivariance": _equivariance_plot}.get(question)
    figure = draw(report) if draw else None
    if figure is None:
        return ""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return '<div class="wide plot">' + buffer.getvalue()[buffer.getvalue().index("<svg") :] + "</div>"


def _axes(width: float, height: float):
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_color("#888")
    axes.tick_params(colors="#888")
    return figure, axes


def _fit_plot(report: Report) -> Figure | None:
    """The loss over that of the filter that knows the spectrum alone, by tenths of the timesteps."""
    curves = []
    for model in report.models:
        points = [(k, model.measured.metrics.get(f"fit/loss_ratio/bin_{k}")) for k in range(NUM_BINS)]
        curves.append([(k, value) for k, value in points if value is not None])
    if not any(curves):
        return None
    figure, axes = _axes(8, 3.4)
    for colour, model, curve in zip(_colours(report), report.models, curves):
        axes.plot([100 * k + 50 for k, _ in curve], [v for _, v in curve], "o-", color=colour, label=model.measured.name)
    axes.axhline(1, color="#888", linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.set_yticks(ticks := (0.1, 0.2, 0.5, 1, 2, 5, 10), [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("timestep (of 1000; 0: no noise)", color="#888")
    axes.set_ylabel("loss / spectral loss", color="#888")
    axes.legend(labelcolor="#888", frameon=False)
    return figure


def _equivariance_plot(report: Report) -> Figure | None:
    """dB of D(T z) against T x by view, with that of D(z) against x as a line."""
    suffix = "/psnr"
    views = list(
        dict.fromkeys(
            name.split("/")[1]
            for model in report.models
            for name in model.measured.metrics
            if name.startswith("equivariance/") and name.endswith(suffix) and "/mean/" not in name
        )
    )
    if not views:
        return None
    figure, axes = _axes(max(6, 0.9 * len(views)), 3.4)
    width = 0.8 / len(report.models)
    for k, (colour, model) in enumerate(zip(_colours(report), report.models)):
        metrics = model.measured.metrics
        heights = [metrics.get(f"equivariance/{view}{suffix}", 0.0) for view in views]
        axes.bar(
            [i + (k - len(report.models) / 2 + 0.5) * width for i in range(len(views))],
            heights,
            width,
            color=colour,
            label=model.measured.name,
        )
        if (plain := metrics.get("reconstruction/psnr")) is not None:
            axes.axhline(plain, color=colour, linewidth=1, linestyle="--")
    axes.set_xticks(range(len(views)), views, rotation=30, ha="right")
    axes.set_ylabel("dB of D(T z) (dashed: D(z))", color="#888")
    axes.legend(labelcolor="#888", frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(report.models), borderaxespad=0.2)
    return figure


def _colours(report: Report) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(len(report.models))]


CAPTIONS = {  # of sheets, by the first word of their names; the others' names say it
    "letters": "letters, wanted → read (-: no letter)",
    "reconstruction": "the worst reconstructions",
    "models": "the same prompts and seeds by each model",
    "latents": "latents, their three principal components as colours: where they turn with the picture, all are alike",
}

VERDICTS: dict[Level, str] = {"fits": "good", "may fit": "unsure", "does not fit": "bad"}  # classes of the style

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; --good: #3a9a5b; --unsure: #c9a227; --bad: #d1603d; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 1400px; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
nav a { margin-right: 1rem; }
.verdict { border-left: .3rem solid var(--line); padding: .5rem 1rem; background: var(--soft); }
.verdict.good { border-color: var(--good); } .verdict.unsure { border-color: var(--unsure); } .verdict.bad { border-color: var(--bad); }
.missing { border-left: .3rem solid var(--bad); padding: .1rem 1rem; background: var(--soft); }
.missing h2 { border: 0; margin: .5rem 0 0; }
.wide { overflow-x: auto; } .plot svg { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td:not(:first-child) { white-space: nowrap; } #provenance td { white-space: normal; overflow-wrap: anywhere; min-width: 12rem; }
td.real { font-weight: 600; }
details { margin: 1rem 0; } summary { cursor: pointer; } img { image-rendering: pixelated; max-width: none; }
"""
