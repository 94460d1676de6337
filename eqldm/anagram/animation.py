"""A picture that goes from view to view and back again, as MP4, GIF or WebP: it turns, folds over, or its pieces fly."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from eqldm.anagram.captions import caption
from eqldm.data.samples import tensor_to_picture
from eqldm.views import View
from eqldm.views.components import Component
from eqldm.views.motion import Motion, Piece, extent, motion

FORMATS = ("mp4", "gif", "webp")
FPS = 30
HOLD_SECONDS, MOVE_SECONDS = 1.2, 1.4  # in a view, and on the way to the next
SHORTEST_SIDE = 384  # pixels; smaller pictures are enlarged
PAPER, INK = (250, 250, 248), (35, 35, 35)


@dataclass(frozen=True)
class Frame:
    """A picture that is shown for so many frames of 1 / FPS seconds."""

    picture: Image.Image
    count: int = 1


def animate(x: Tensor, views: Sequence[View], prompts: Sequence[str]) -> Iterator[Frame]:
    """The frames of a picture x [3, H, W] in [-1, 1] as it goes through its views, each under its prompt, and back to the first."""
    shown = [_enlarged(tensor_to_picture(view(x))) for view in views]
    ways = [motion(after @ before.inverse) for before, after in zip(views, [*views[1:], views[0]])]
    width, height = shown[0].size
    side = math.ceil(max(width, height) * min(1.5, max(map(extent, ways)) + 0.06) / 2) * 2
    still, moving = round(HOLD_SECONDS * FPS), round(MOVE_SECONDS * FPS)
    for i, (way, picture) in enumerate(zip(ways, shown)):
        yield Frame(_with_prompt(_centred(picture, side), prompts[i], 1.0), still)
        if len(views) == 1:
            return
        cut = cut_out(picture, way)
        for k in range(1, moving):
            s, then = _eased(k / moving), prompts[(i + 1) % len(views)]
            yield Frame(_with_prompt(draw(cut, way, s, picture.size, side), *_faded(prompts[i], then, s)))


def animate_parts(x: Tensor, components: Sequence[Component], prompts: Sequence[str]) -> Iterator[Frame]:
    """The frames of a picture x [3, H, W] in [-1, 1] that fades to each of its parts, under its prompt, and back to the whole."""
    faces = [_enlarged(tensor_to_picture(face)) for face in (x, *(part(x) for part in components))]
    texts, still, moving = [" + ".join(prompts), *prompts], round(HOLD_SECONDS * FPS), round(MOVE_SECONDS * FPS / 2)
    side = max(faces[0].size) + max(faces[0].size) % 2
    for i, face in enumerate(faces):
        then = (i + 1) % len(faces)
        yield Frame(_with_prompt(_centred(face, side), texts[i], 1.0), still)
        for k in range(1, moving):
            s = _eased(k / moving)
            yield Frame(_with_prompt(_centred(Image.blend(face, faces[then], s), side), *_faded(texts[i], texts[then], s)))


def _faded(before: str, after: str, s: float) -> tuple[str, float]:
    """(the prompt that shows at time s, how strongly): one goes, then the other comes."""
    return (before, 1 - 2 * s) if s < 0.5 else (after, 2 * s - 1)


def _eased(s: float) -> float:
    """Slow at both ends."""
    return s * s * s * (s * (6 * s - 15) + 10)


def _enlarged(picture: Image.Image) -> Image.Image:
    factor = math.ceil(SHORTEST_SIDE / min(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.BICUBIC) if factor > 1 else picture


Cut = list[tuple[Piece, Image.Image, tuple[float, float]]]
"""Pieces with their pictures (RGBA), and where the middle lies in each, (down, right) in pixels."""


def cut_out(picture: Image.Image, way: Motion) -> Cut:
    """The pieces of a picture, each in a frame of clear pixels so that its edges are smooth when it turns."""
    high, wide = picture.height / way.cells, picture.width / way.cells
    pixels, cut = np.asarray(picture.convert("RGB")), []
    for piece in way.pieces:
        top, bottom = min(run[0] for run in piece.runs), max(run[0] for run in piece.runs) + 1
        left, right = min(run[1] for run in piece.runs), max(run[2] for run in piece.runs)
        box = [round(edge) for edge in (top * high, bottom * high, left * wide, right * wide)]
        colours = np.zeros((box[1] - box[0] + 2, box[3] - box[2] + 2, 4), np.uint8)
        colours[1:-1, 1:-1, :3] = pixels[box[0] : box[1], box[2] : box[3]]
        for row, first, last in piece.runs:
            rows = slice(round(row * high) - box[0] + 1, round((row + 1) * high) - box[0] + 1)
            colours[rows, round(first * wide) - box[2] + 1 : round(last * wide) - box[2] + 1, 3] = 255
        middle = piece.start[0] * picture.height - box[0] + 1, piece.start[1] * picture.width - box[2] + 1
        cut.append((piece, Image.fromarray(colours), middle))
    return cut


def draw(cut: Cut, way: Motion, s: float, size: tuple[int, int], side: int) -> Image.Image:
    """The pieces at time s in [0, 1], in the middle of a square of `side` pixels. size: of the picture, (width, height)."""
    paper = Image.new("RGBA", (side, side), (*PAPER, 255))
    for piece, picture, (down, right) in cut:
        (a, b), (c, d) = piece.matrix(s)
        determinant = a * d - b * c
        if abs(determinant) < 0.01:  # seen from its edge
            continue
        if way.sign < 0:
            picture = _towards_negative(picture, s)
        middle = piece.middle(s, way.spreads)
        y, x = side / 2 + (middle[0] - 0.5) * size[1], side / 2 + (middle[1] - 0.5) * size[0]
        edges = [(v - down, h - right) for v in (0, picture.height) for h in (0, picture.width)]
        ys, xs = [y + a * v + b * h for v, h in edges], [x + c * v + d * h for v, h in edges]
        top, left = math.floor(min(ys)), math.floor(min(xs))
        box = max(1, math.ceil(max(xs)) - left), max(1, math.ceil(max(ys)) - top)
        # what each pixel of the box takes: the inverse, PIL's order (right, down)
        e, f, g, h = d / determinant, -b / determinant, -c / determinant, a / determinant
        v, w = top - y, left - x
        coefficients = (h, g, h * w + g * v + right, f, e, f * w + e * v + down)
        turned = picture.transform(box, Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
        paper.alpha_composite(*_inside(turned, left, top, side))
    return paper.convert("RGB")


def _inside(picture: Image.Image, left: int, top: int, side: int) -> tuple[Image.Image, tuple[int, int]]:
    """What of a picture at (left, top) lies on the paper, and where."""
    picture = picture.crop((max(0, -left), max(0, -top), max(min(picture.width, side - left), 1), max(min(picture.height, side - top), 1)))
    return picture, (max(0, left), max(0, top))


def _towards_negative(picture: Image.Image, s: float) -> Image.Image:
    """The colours times 1 - 2 s, grey in between."""
    *colours, alpha = picture.split()
    colours = [channel.point(lambda value: round(127.5 + (1 - 2 * s) * (value - 127.5))) for channel in colours]
    return Image.merge("RGBA", (*colours, alpha))


def _centred(picture: Image.Image, side: int) -> Image.Image:
    paper = Image.new("RGB", (side, side), PAPER)
    paper.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return paper


def _with_prompt(picture: Image.Image, prompt: str, strength: float) -> Image.Image:
    """The picture above a line of text, which fades."""
    size = max(14, picture.width // 22)
    whole = Image.new("RGB", (picture.width, picture.height + 2 * size), PAPER)
    whole.paste(picture)
    (text,), font = caption(prompt, size, picture.width - size)
    colour = tuple(round(paper + strength * (ink - paper)) for paper, ink in zip(PAPER, INK))
    draw = ImageDraw.Draw(whole)
    draw.text((picture.width / 2, picture.height + 0.8 * size), text, colour, font, anchor="mm")
    return whole


def check_writable(kind: str) -> None:
    """Raises ValueError for what is none of `FORMATS`, or needs a library that is not installed."""
    if kind not in FORMATS:
        raise ValueError(f"animation '{kind}': wanted one of {', '.join(FORMATS)}")
    if kind == "mp4":
        _pyav()


def write_animation(frames: Sequence[Frame], path: Path, kind: str) -> None:
    """Writes frames as one of `FORMATS`, looping for ever. Raises ValueError as `check_writable`; OSError."""
    check_writable(kind)
    _WRITERS[kind](frames, path)


def _pyav():
    """The library, imported where a film is written: all else works without."""
    try:
        return importlib.import_module("av")
    except ModuleNotFoundError as error:
        raise ValueError("animation 'mp4' needs PyAV, which is not installed: pip install av, or take gif or webp") from error


def _write_mp4(frames: Sequence[Frame], path: Path) -> None:
    av = _pyav()
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "medium"})
        stream.width, stream.height = frames[0].picture.size
        stream.pix_fmt, stream.time_base = "yuv420p", Fraction(1, FPS)
        for frame in frames:
            for _ in range(frame.count):
                file.mux(stream.encode(av.VideoFrame.from_image(frame.picture)))
        file.mux(stream.encode())


def _write_gif(frames: Sequence[Frame], path: Path) -> None:
    """GIF knows hundredths of seconds: a frame of 1/30 s takes 3 or 4 of them, so that the whole is as long as it should be."""
    ends = np.cumsum([frame.count for frame in frames]) * 100 / FPS
    durations = (np.diff(np.round(ends), prepend=0) * 10).astype(int).tolist()
    first, *others = [frame.picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE) for frame in frames]
    first.save(path, "GIF", save_all=True, append_images=others, duration=durations, loop=0, disposal=1)


def _write_webp(frames: Sequence[Frame], path: Path) -> None:
    first, *others = [frame.picture for frame in frames]
    durations = [round(1000 * frame.count / FPS) for frame in frames]
    first.save(path, "WEBP", save_all=True, append_images=others, duration=durations, loop=0, quality=85, method=3)


_WRITERS: dict[str, Callable[[Sequence[Frame], Path], None]] = {"mp4": _write_mp4, "gif": _write_gif, "webp": _write_webp}
