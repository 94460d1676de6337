"""Captions of pictures: any text as lines that a font at hand can draw. Pages keep the text itself."""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

DEFAULT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"  # Latin, Greek, Cyrillic, Arabic, Hebrew, symbols; with matplotlib
MOST_SHOWN = 3  # code points of a run of characters that no font has
# Scripts that are written from the right, or whose letters change with their neighbours
SHAPED = re.compile("[\u0590-\u0dff\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff]")


def caption(text: str, size: int, width: float | None = None, most_lines: int = 1) -> tuple[list[str], ImageFont.FreeTypeFont]:
    """The lines of a text, and the font of `size` pixels that draws them.

    width: in pixels; what does not fit goes on in the next of at most `most_lines` lines, and ends with an ellipsis where they do not
    suffice. Line breaks become spaces, control characters the sign for what cannot be shown; characters that no font here has become
    code points, [U+732B], which is said once on stderr.
    """
    lines, path, size = _laid_out(text, size, width, most_lines)
    return list(lines), _font(path, size)


@lru_cache(maxsize=1024)
def _laid_out(text: str, size: int, width: float | None, most_lines: int) -> tuple[tuple[str, ...], str, int]:
    text = one_line(text)
    path = font_path(text)
    text = substituted(text, path)
    if _font(path, size).layout_engine != ImageFont.Layout.RAQM and SHAPED.search(text):
        _note("Pillow has no Raqm here: letters of Arabic, Devanagari and the like stand unconnected, from the left, in sheets and films")
    return tuple(_wrapped(text, _font(path, size), width, most_lines)), path, size


def one_line(text: str) -> str:
    """The text with spaces for line breaks, a sign for control characters, and nothing of what turns the direction of writing."""
    shown = []
    for character in unicodedata.normalize("NFC", text):
        if character.isspace():
            character = " "
        elif unicodedata.category(character) == "Cc":
            character = "\ufffd"
        elif unicodedata.category(character) == "Cf" and character not in "\u200c\u200d":
            continue
        shown.append(character)
    return re.sub(" +", " ", "".join(shown)).strip()


@lru_cache(maxsize=1024)
def font_path(text: str) -> str:
    """The first font that has all characters of a text, else the one that lacks the fewest; our own comes first."""
    needed = _needed(text)
    if needed <= _characters(DEFAULT):
        return DEFAULT
    best = DEFAULT
    for path in (DEFAULT, *_system_fonts()):
        lacking = len(needed - _characters(path))
        if not lacking:
            return path
        if lacking < len(needed - _characters(best)):
            best = path
    return best


def substituted(text: str, path: str) -> str:
    """The text with code points for the characters that a font lacks; joiners and the like that it lacks are left out."""
    known, needed = _characters(path), _needed(text)
    if lacking := "".join(sorted(needed - known)):
        _note(
            f"no font here has all of {lacking}: sheets and films show their code points ({_code_points(lacking)}), pages the text itself; "
            "install fonts-noto-cjk (Chinese, Japanese, Korean), fonts-noto-core (other scripts) or fonts-symbola (emoji)"
        )
    kept = (character for character in text if character in needed or ord(character) in _ignored(known))
    runs = ((has, "".join(run)) for has, run in groupby(kept, lambda character: character not in needed or character in known))
    return "".join(run if has else f"[{_code_points(run)}]" for has, run in runs)


def _code_points(run: str) -> str:
    return " ".join(f"U+{ord(character):04X}" for character in run[:MOST_SHOWN]) + "…" * (len(run) > MOST_SHOWN)


def _needed(text: str) -> frozenset[str]:
    """The characters that show."""
    return frozenset(character for character in text if not character.isspace() and not _is_silent(character))


def _is_silent(character: str) -> bool:
    """Whether a character only changes others: a joiner, or a selector of variants."""
    return character in "\u200c\u200d" or "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"


def _ignored(known: frozenset[str]) -> set[int]:
    """Numbers of spaces and of the silent characters that a font knows."""
    return {32} | {ord(character) for character in known if _is_silent(character)}


@lru_cache(maxsize=4096)
def _characters(path: str) -> frozenset[str]:
    """Those that a font draws as outlines; none of one that cannot be read."""
    try:
        font = FT2Font(path)
    except (RuntimeError, OSError):  # damaged, or of pictures alone
        return frozenset()
    return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()


@lru_cache(maxsize=1)
def _system_fonts() -> tuple[str, ...]:
    """Plain faces first, then by name, so that the choice is always the same."""

    def rank(path: str) -> tuple[bool, str, str]:
        name = Path(path).stem.lower()
        return bool(re.search("bold|italic|oblique|condensed|light|thin|black|mono", name)), name, path

    return tuple(sorted((path for path in findSystemFonts() if "lastresort" not in path.lower()), key=rank))  # that one draws boxes


@lru_cache(maxsize=64)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: float | None, most_lines: int) -> list[str]:
    """Lines that are as wide at most, broken at spaces where there are some."""
    if width is None or font.getlength(text) <= width:
        return [text]
    lines: list[str] = []
    while text and len(lines) < most_lines - 1 and font.getlength(text) > width:
        end = _fitting(text, font, width)
        at_space = text.rfind(" ", 0, end + 1)
        end = at_space if at_space > 0 else end
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    if font.getlength(text) > width:
        text = text[: _fitting(text, font, width - font.getlength("…"))].rstrip() + "…"
    return [*lines, text]


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """How many characters fit, at least one; none is parted from the marks that follow it."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    while 1 < low < len(text) and (unicodedata.category(text[low])[0] == "M" or text[low] == "\u200d" or text[low - 1] == "\u200d"):
        low -= 1
    return low


@lru_cache(maxsize=256)
def _note(text: str) -> None:
    """Said once."""
    print(f"note: {text}", file=sys.stderr)
