"""The gallery of a run: one page with its pictures, that turn from view to view under the pointer. Opens from the file system, offline."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from eqldm.data.samples import tensor_to_picture
from eqldm.views import View
from eqldm.views.components import Component
from eqldm.views.motion import extent, motion

TEMPLATE = Path(__file__).with_name("gallery.html")


@dataclass(frozen=True)
class Shown:
    """A picture [3, H, W] in [-1, 1], what it is called, and what makes it again, as text to copy."""

    x: Tensor
    name: str
    settings: str


def write_gallery(path: Path, pictures: Sequence[Shown], views: Sequence[View], prompts: Sequence[str]) -> None:
    """Writes the page of pictures that read as prompt i in view i: they move from view to view. Raises OSError."""
    motions = [motion(view @ views[0].inverse) for view in views]
    side = min(1.5, max(map(extent, motions)) + 0.04)
    data = {
        "motions": [
            {
                "cells": way.cells,
                "spreads": way.spreads,
                "sign": way.sign,
                "pieces": [
                    {"runs": piece.runs, "element": piece.element, "start": _rounded(piece.start), "end": _rounded(piece.end)}
                    for piece in way.pieces
                ],
            }
            for way in motions
        ],
        "negates": any(way.sign < 0 for way in motions),
        "extent": round(side, 4),
        "pictures": [{"alt": shown.name, "settings": shown.settings} for shown in pictures],
    }
    firsts = [replace(shown, x=views[0](shown.x)) for shown in pictures]
    _write(path, firsts, data, [view.name for view in views], prompts)


def write_gallery_of_parts(path: Path, pictures: Sequence[Shown], components: Sequence[Component], prompts: Sequence[str]) -> None:
    """Writes the page of pictures whose component i reads as prompt i: they fade to each of them. Raises OSError."""
    data = {
        "motions": None,
        "negates": False,
        "extent": 1,
        "pictures": [
            {"alt": shown.name, "settings": shown.settings, "faces": [_source(shown.x), *(_source(part(shown.x)) for part in components)]}
            for shown in pictures
        ],
    }
    _write(path, pictures, data, ["whole", *(part.name for part in components)], [" + ".join(prompts), *prompts])


def _write(path: Path, pictures: Sequence[Shown], data: dict, faces: Sequence[str], prompts: Sequence[str]) -> None:
    """Fills the template. faces: what the views, or parts, are called, the first of them shown at first."""
    data |= {"views": list(faces), "prompts": list(prompts)}
    parts = {
        "title": html.escape(" / ".join(prompts[1:] if data["motions"] is None else prompts)),
        "margin": f"{50 * (1 - 1 / data['extent']):.2f}",  # percent: the picture as large as the script draws it
        "figures": "\n".join(_figure(shown, faces, prompts) for shown in pictures),
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], TEMPLATE.read_text(encoding="utf-8"))
    path.write_text(page, encoding="utf-8")


def _rounded(place: tuple[float, float]) -> list[float]:
    return [round(each, 6) for each in place]


def _source(x: Tensor) -> str:
    """A picture [3, H, W] in [-1, 1] as an address that holds it."""
    buffer = io.BytesIO()
    tensor_to_picture(x).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(shown: Shown, faces: Sequence[str], prompts: Sequence[str]) -> str:
    """A picture, its prompt, and what one can do with it; without the script it does not turn."""
    source, name = _source(shown.x), html.escape(shown.name)
    label = html.escape(f"{shown.name}, shown: {faces[0]}, {prompts[0]}")
    dots = "".join(f'<i title="{html.escape(face)}"{" class=on" if not k else ""}></i>' for k, face in enumerate(faces))
    return (
        f'<figure><button class="picture" aria-label="{label}"><img alt="{name}: {html.escape(prompts[0])}" src="{source}"></button>'
        f'<figcaption><div class="prompt">{html.escape(prompts[0])}</div><div class="dots" aria-hidden="true">{dots}</div>'
        f'<div class="actions">{name} <button class="copy">copy settings</button> '
        f'<a href="{source}" download="{name.replace(" ", "-")}.png">download</a></div></figcaption></figure>'
    )
