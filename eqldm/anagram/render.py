"""Sheets: pictures side by side, labelled."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eqldm.anagram.captions import caption
from eqldm.data.samples import tensor_to_picture

PAPER, INK = (255, 255, 255), (40, 40, 40)
WIDEST = 260  # pixels of a label beside a row, and at least of one above a column
MOST_LINES = 4  # of a label


def picture_sheet(
    rows: Sequence[Sequence[Tensor] | Tensor], row_labels: Sequence[str], column_labels: Sequence[str], scale: int = 1
) -> Image.Image:
    """A labelled grid of pictures [3, H, W] in [-1, 1], enlarged `scale` times without smoothing. Long labels are wrapped, then cut with
    an ellipsis."""
    height, width = (side * scale for side in rows[0][0].shape[-2:])
    gap, line = 6, 16
    beside = [caption(label, 12, WIDEST, max(1, min(MOST_LINES, height // line))) for label in row_labels]
    above = [caption(label, 12, max(width, WIDEST), MOST_LINES) for label in column_labels]
    left, wide = max(map(_width, beside), default=0) + 2 * gap, max([width, *map(_width, above)])
    head = line * max((len(lines) for lines, _ in above), default=1)
    sheet = Image.new("RGB", (left + len(column_labels) * (wide + gap), head + gap + len(rows) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for j, (lines, font) in enumerate(above):
        for k, text in enumerate(lines):
            draw.text((left + j * (wide + gap), gap // 2 + k * line), text, INK, font)
    for i, (row, (lines, font)) in enumerate(zip(rows, beside, strict=True)):
        top = head + gap + i * (height + gap)
        for k, text in enumerate(lines):
            draw.text((gap, top + height // 2 - 6 + line * k - line * (len(lines) - 1) // 2), text, INK, font)
        for j, x in enumerate(row):
            picture = tensor_to_picture(x).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + j * (wide + gap), top))
    return sheet


def _width(label: tuple[list[str], ImageFont.FreeTypeFont]) -> int:
    """In pixels."""
    lines, font = label
    return int(max(font.getlength(text) for text in lines))
