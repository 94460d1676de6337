"""Sheets: pictures side by side, labelled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import matplotlib
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eqldm.data.samples import tensor_to_picture

PAPER, INK = (255, 255, 255), (40, 40, 40)


def picture_sheet(rows: Sequence[Sequence[Tensor]], row_labels: Sequence[str], column_labels: Sequence[str], scale: int = 1) -> Image.Image:
    """A labelled grid of pictures [3, H, W] in [-1, 1], enlarged `scale` times without smoothing."""
    height, width = (side * scale for side in rows[0][0].shape[-2:])
    font = caption_font(12)
    gap, line = 6, 16
    left = int(max([font.getlength(label) for label in row_labels], default=0)) + 2 * gap
    wide = max(width, int(max([font.getlength(label) for label in column_labels], default=0)))
    sheet = Image.new("RGB", (left + len(column_labels) * (wide + gap), line + gap + len(rows) * (height + gap)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for j, label in enumerate(column_labels):
        draw.text((left + j * (wide + gap), gap // 2), label, INK, font)
    for i, (row, label) in enumerate(zip(rows, row_labels, strict=True)):
        top = line + gap + i * (height + gap)
        draw.text((gap, top + height // 2 - 6), label, INK, font)
        for j, x in enumerate(row):
            picture = tensor_to_picture(x).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (left + j * (wide + gap), top))
    return sheet


@lru_cache(maxsize=8)
def caption_font(size: int) -> ImageFont.FreeTypeFont:
    """Of captions, `size` pixels high; it knows most scripts, and is at hand with matplotlib."""
    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
