"""The pictures of an evaluation: what was reconstructed, turned, drawn and read, side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from eqldm.anagram.captions import caption
from eqldm.anagram.render import picture_sheet
from eqldm.evaluation.anagram import Reading
from eqldm.evaluation.judge import ANSWERS, LETTERS
from eqldm.model_folder import decode, encode
from eqldm.views import View
from eqldm.views.components import Component


@torch.no_grad()
def turned_decodings(vae: AutoencoderKL, pictures: Tensor, views: Sequence[View]) -> dict[str, Tensor]:
    """Of pictures [N, 3, H, W], by heading: x, D(z), and for each view T of them D(T z), turned back so that errors show."""
    z = encode(vae, pictures)
    columns = {"x": pictures, "D(z)": decode(vae, z)} | {f"T = {view.name}": view.inverse(decode(vae, view(z))) for view in views}
    return {heading: column.float().cpu() for heading, column in columns.items()}


def equivariance_sheet(decodings: dict[str, dict[str, Tensor]]) -> Image.Image:
    """The `turned_decodings` of several models, of the same pictures: a row for each model of each picture."""
    first = next(iter(decodings.values()))
    count = len(first["x"])
    rows = [[columns[heading][i] for heading in first] for i in range(count) for columns in decodings.values()]
    return picture_sheet(rows, list(decodings) * count, list(first), scale=_scale(first["x"]))


def reading_sheet(reading: Reading, faces: Sequence[View | Component]) -> Image.Image:
    """Sampled letters in each view (or whole, and each part), a row each, labelled wanted -> read."""
    faces = _with_whole(faces)
    rows = [[face(picture) for face in faces] for picture in reading.pictures]
    labels = [
        "  ".join(f"{ANSWERS[w]}→{ANSWERS[r]}" for w, r in zip(reading.wanted[:, k].tolist(), reading.read[:, k].tolist()))
        for k in range(len(rows))
    ]
    return _side_by_side(rows, labels, [face.name for face in faces])


def _with_whole(faces: Sequence[View | Component]) -> Sequence[View | Component]:
    """Parts after the whole that they are of; views as they are."""
    return [Component("whole", lambda x: x), *faces] if isinstance(faces[0], Component) else faces


def models_sheet(readings: dict[str, dict[str, tuple[Sequence[View | Component], Reading]]], most: int = 6) -> Image.Image:
    """The same letters and seeds by each model: the first pictures of each kind that all have, a row for each view, or part, of each.

    readings: by model, by kind (plain letters, anagrams in these views).
    """
    sheets = []
    kinds = [kind for kind in next(iter(readings.values())) if all(kind in found for found in readings.values())]
    for kind in kinds:
        rows, labels = [], []
        faces, first = next(iter(readings.values()))[kind]
        for k in range(min(most, len(first.pictures))):
            for i, face in enumerate(faces):
                rows.append([face(found[kind][1].pictures[k]) for found in readings.values()])
                labels.append(f"{ANSWERS[first.wanted[i, k]]}  {face.name}")
        sheets.append(_side_by_side(rows, labels, list(readings), 1))
    return _joined(sheets)


def _side_by_side(rows: list[list[Tensor]], labels: list[str], headings: list[str], columns: int = 3) -> Image.Image:
    """The rows in several columns of sheets, so that a long list fits on a screen."""
    per = -(-len(rows) // columns)
    sheets = [picture_sheet(rows[i : i + per], labels[i : i + per], headings, scale=_scale(rows[0][0])) for i in range(0, len(rows), per)]
    return _joined(sheets)


def _joined(sheets: list[Image.Image]) -> Image.Image:
    """Sheets beside each other."""
    whole = Image.new("RGB", (sum(s.width for s in sheets), max(s.height for s in sheets)), "white")
    left = 0
    for sheet in sheets:
        whole.paste(sheet, (left, 0))
        left += sheet.width
    return whole


def prompt_sheet(pictures: Tensor, faces: Sequence[View | Component], prompts: Sequence[Sequence[str]]) -> Image.Image:
    """Sampled pictures [N, 3, H, W] in each view (or whole, and each part), a row each, labelled with their prompts."""
    faces = _with_whole(faces)
    rows = [[face(picture) for face in faces] for picture in pictures]
    labels = [" / ".join(_shortened(text) for text in texts) for texts in zip(*prompts)]
    return _side_by_side(rows, labels, [face.name for face in faces], 1 if pictures.shape[-1] > 128 else 3)


def _shortened(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def reconstruction_sheet(worst: Sequence[dict]) -> Image.Image:
    """`worst_reconstructions`: each picture, its reconstruction, and ten times their difference (grey: none)."""
    rows = [[found["x"], found["y"], (5 * (found["y"] - found["x"])).clamp(-1, 1)] for found in worst]
    labels = [f"{found['key']}: {found['psnr']:.1f} dB" for found in worst]
    return picture_sheet(rows, labels, ["x", "D(E(x))", "10 x the difference"], scale=_scale(worst[0]["x"]))


def latent_sheet(x: Tensor, columns: Sequence[dict[str, Tensor]]) -> Image.Image:
    """`latent_pictures` of pictures x [N, 3, H, W], enlarged to their size: a row each."""
    side = x.shape[-1]
    headings = ["x", "E(x)", *(f"T⁻¹E(T x), T = {name}" for name in columns[0] if name != "z")]
    rows = [[picture, *(_enlarged(z, side) for z in found.values())] for picture, found in zip(x, columns)]
    return picture_sheet(rows, [""] * len(rows), headings, scale=_scale(x[0]))


def _enlarged(z: Tensor, side: int) -> Tensor:
    return torch.nn.functional.interpolate(z[None], (side, side), mode="nearest")[0]


def error_map_sheet(maps: dict[str, Tensor]) -> Image.Image:
    """Heat maps [h, w] by view, on one scale: where turning the latents costs most. Seams and borders show here."""
    columns = min(4, len(maps))
    lines = -(-len(maps) // columns)
    figure = Figure(figsize=(2.6 * columns + 0.8, 2.8 * lines), dpi=100, layout="constrained")
    canvas, grid = FigureCanvasAgg(figure), figure.subplots(lines, columns, squeeze=False)
    highest = max(float(each.max()) for each in maps.values())
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, each) in zip(grid.flat, maps.items()):
        shown = axes.imshow(each.numpy(), cmap="magma", vmin=0, vmax=max(highest, 1e-6))
        axes.set_title(f"{name}: {float(each.mean()):.2g}", fontsize=9)
    figure.colorbar(shown, ax=grid, shrink=0.7, label="squared error added")
    return _drawn(canvas)


def _scale(x: Tensor) -> int:
    """How often small pictures are enlarged."""
    return max(1, 96 // x.shape[-1])


def _drawn(canvas: FigureCanvasAgg) -> Image.Image:
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def letter_matrix(rates: Tensor, title: str, views: Sequence[str], populations: dict[str, Tensor] | None = None) -> Image.Image:
    """A heat map of rates [26, 26] in [0, 1]: the letter of the first of two views down, of the second across.

    populations: [26, 26] each, as of `lookalikes`: the mean in the title is that of the headline, and those that are trivial are ringed.
    Framed for half a turn: A/V, which arXiv 2306.12049 calls easy (solid), and D/K, which it calls hard (dashed).
    """
    headline = torch.ones_like(rates, dtype=torch.bool) if populations is None else populations[""]
    figure = Figure(figsize=(8, 7.5), dpi=100, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    shown = axes.imshow(rates.numpy(), cmap="viridis", vmin=0, vmax=1)
    axes.set_xticks(range(len(LETTERS)), list(LETTERS))
    axes.set_yticks(range(len(LETTERS)), list(LETTERS))
    (text, *_), font = caption(f"{title}: {float(rates[headline].nanmean()):.1%}", 12)
    axes.set_title(text.replace("$", r"\$"), fontproperties=FontProperties(fname=str(font.path), size=12))
    axes.set_ylabel(views[0])
    axes.set_xlabel(views[1])
    for pair, style in (("AV", "-"), ("DK", "--")) if list(views) == ["identity", "rotate_180"] else ():
        i, j = map(LETTERS.index, pair)
        for row, column in ((i, j), (j, i)):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=2, linestyle=style))
    if populations is not None and len(ringed := populations["trivial/"].nonzero()):
        axes.plot(ringed[:, 1], ringed[:, 0], "o", fillstyle="none", color="white", markeredgecolor="black", markersize=7)
        axes.set_xlabel(f"{views[1]} (ringed: needs no anagram; the mean is of different letters that do)")
    figure.colorbar(shown, ax=axes, shrink=0.8)
    return _drawn(canvas)
