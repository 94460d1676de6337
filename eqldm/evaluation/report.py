"""What an evaluation writes: `metrics.json`, a Markdown table over all models, and picture sheets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from rich.table import Table
from torch import Tensor

from eqldm.anagram.render import picture_sheet
from eqldm.evaluation.anagram import Reading
from eqldm.evaluation.judge import ANSWERS, LETTERS
from eqldm.markdown import markdown
from eqldm.model_folder import decode, encode
from eqldm.views import View

HIGHER_IS_BETTER = {"psnr", "ssim", "decoder_psnr", "read_right", "ambigramability", "upright", "turned", "accuracy"}
HIGHER_IS_BETTER |= {"round_trip_psnr", "round_trip_psnr_upright", "round_trip_psnr_turned"}
ONE_IS_BEST = {"texture", "texture_upright", "texture_turned"}  # the energy of real pictures


def number(value: float | None) -> str:
    """Three significant figures, or a dash for what was not computed."""
    return "-" if value is None else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


def metric_rows(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """One row a metric: its name with an arrow towards better, or the best value, and each model's value."""
    names = list(dict.fromkeys(name for metrics in results.values() for name in metrics))
    rows = []
    for name in names:
        last = name.rsplit("/", 1)[-1]
        arrow = "→1" if last in ONE_IS_BEST else "↑" if last in HIGHER_IS_BETTER else "↓"
        rows.append([f"{name} {arrow}", *(number(metrics.get(name)) for metrics in results.values())])
    return rows


def markdown_table(results: dict[str, dict[str, float]]) -> str:
    """The metrics of all models as a Markdown table."""
    return markdown(["metric", *results], metric_rows(results))


def console_table(results: dict[str, dict[str, float]], title: str) -> Table:
    """The same for the terminal."""
    table = Table("metric", *results, title=title)
    for row in metric_rows(results):
        table.add_row(*row)
    return table


@torch.no_grad()
def turned_decodings(vae: AutoencoderKL, pictures: Tensor, views: Sequence[View]) -> dict[str, Tensor]:
    """Of pictures [N, 3, H, W], by heading: x, D(z), and for each view T of them D(T z), turned back so that errors show."""
    z = encode(vae, pictures)
    columns = {"x": pictures, "D(z)": decode(vae, z)} | {f"T = {view.name}": view.inverse(decode(vae, view(z))) for view in views}
    return {heading: column.float().cpu() for heading, column in columns.items()}


def equivariance_sheet(decodings: dict[str, dict[str, Tensor]]) -> Image.Image:
    """The `turned_decodings` of several models, of the same pictures: a row for each model of each picture."""
    first = next(iter(decodings.values()))
    count, _, _, width = first["x"].shape
    rows = [[columns[heading][i] for heading in first] for i in range(count) for columns in decodings.values()]
    return picture_sheet(rows, list(decodings) * count, list(first), scale=max(1, 96 // width))


def reading_sheet(reading: Reading, views: Sequence[View], most: int = 24) -> Image.Image:
    """Sampled letters in each view, a row each, labelled wanted -> read."""
    count = min(most, len(reading.pictures))
    rows = [[view(picture) for view in views] for picture in reading.pictures[:count]]
    labels = [
        "  ".join(f"{ANSWERS[w]}→{ANSWERS[r]}" for w, r in zip(reading.wanted[:, k].tolist(), reading.read[:, k].tolist()))
        for k in range(count)
    ]
    return _side_by_side(rows, labels, [view.name for view in views])


def models_sheet(readings: dict[str, list[tuple[Sequence[View], Reading]]], most: int = 6, columns: int | None = None) -> Image.Image:
    """The same letters and seeds by each model: the first pictures of each kind, a row for each view of each.

    readings: by model, of each kind (plain letters, anagrams in these views), in one order.
    columns: how many the list of rows is broken into; None gives each kind its own.
    """
    rows, labels = [], []
    kinds = list(zip(*readings.values()))
    for kind in kinds:
        views, first = kind[0]
        for k in range(min(most, len(first.pictures))):
            for i, view in enumerate(views):
                rows.append([view(reading.pictures[k]) for _, reading in kind])
                labels.append(f"{ANSWERS[first.wanted[i, k]]}  {view.name}")
    return _side_by_side(rows, labels, list(readings), columns or len(kinds))


def _side_by_side(rows: list[list[Tensor]], labels: list[str], headings: list[str], columns: int = 3) -> Image.Image:
    """The rows in several columns of sheets, so that a long list fits on a screen."""
    per = -(-len(rows) // columns)
    sheets = [
        picture_sheet(rows[i : i + per], labels[i : i + per], headings, scale=max(1, 96 // rows[0][0].shape[-1]))
        for i in range(0, len(rows), per)
    ]
    whole = Image.new("RGB", (sum(s.width for s in sheets), max(s.height for s in sheets)), "white")
    left = 0
    for sheet in sheets:
        whole.paste(sheet, (left, 0))
        left += sheet.width
    return whole


def letter_matrix(rates: Tensor, title: str, views: Sequence[str]) -> Image.Image:
    """A heat map of rates [26, 26] in [0, 1]: the letter of the first of two views down, of the second across.

    Framed for half a turn: A/V, which arXiv 2306.12049 calls easy (solid), and D/K, which it calls hard (dashed).
    """
    figure = Figure(figsize=(8, 7.5), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    shown = axes.imshow(rates, cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(LETTERS)), list(LETTERS))
    axes.set_yticks(range(len(LETTERS)), list(LETTERS))
    axes.set_title(f"{title}: {float(rates.mean()):.1%}")
    axes.set_ylabel(views[0])
    axes.set_xlabel(views[1])
    for pair, style in (("AV", "-"), ("DK", "--")) if list(views) == ["identity", "rotate_180"] else ():
        i, j = map(LETTERS.index, pair)
        for row, column in ((i, j), (j, i)):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2, linestyle=style))
    figure.colorbar(shown, ax=axes, shrink=0.8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def write_report(out: Path, results: dict[str, dict[str, float]], notes: list[str]) -> Path:
    """Writes `report.md`: the table, what was not computed and why, and the command."""
    text = "# Evaluation\n\n" + markdown_table(results) + "".join(f"\n{note}\n" for note in notes)
    path = out / "report.md"
    path.write_text(text)
    return path
