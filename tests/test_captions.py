"""Captions: what a font at hand can draw, whatever is in a prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from eqldm.anagram import captions
from eqldm.anagram.captions import DEFAULT, caption, one_line
from eqldm.anagram.render import picture_sheet
from eqldm.evaluation.sheets import letter_matrix


@pytest.fixture
def fonts(monkeypatch):
    """Sets which fonts there are on this machine, and forgets what was found, and said, before."""

    def there_are(*paths):
        monkeypatch.setattr(captions, "findSystemFonts", lambda: [str(path) for path in paths])
        for cached in ("_laid_out", "font_path", "_system_fonts", "_note"):
            getattr(captions, cached).cache_clear()

    there_are()
    yield there_are
    monkeypatch.undo()
    there_are()


def make_font(path, characters: str):
    """A font in which each of these characters is a full square."""
    names = [".notdef", *(f"c{number}" for number in range(len(characters)))]
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, 800)), pen.lineTo((800, 800)), pen.lineTo((800, 0)), pen.closePath()
    builder, square = FontBuilder(1000), pen.glyph()
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(character): name for character, name in zip(characters, names[1:])})
    builder.setupGlyf(dict.fromkeys(names, square))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (900, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2(), builder.setupPost()
    builder.save(path)
    return path


def test_a_font_that_has_all_characters_is_found(fonts, tmp_path, capsys):
    broken = tmp_path / "A.ttf"
    broken.write_bytes(b"no font")
    some, bold, all_of_them = (make_font(tmp_path / f"{n}.ttf", text) for n, text in (("B", "猫"), ("C-Bold", "猫と犬"), ("D", "猫と犬")))
    last_resort = make_font(tmp_path / "0LastResort.ttf", "猫と犬")
    fonts(last_resort, bold, all_of_them, some, broken)
    for text, wanted in (("a cat", DEFAULT), ("猫", some), ("猫 と犬", all_of_them)):
        lines, font = caption(text, 20)
        assert lines == [text] and font.path == str(wanted)
    assert not capsys.readouterr().err
    lines, font = caption("猫狼", 20)  # the first of those that lack the fewest
    assert lines == ["猫[U+72FC]"] and font.path == str(some)


def test_what_no_font_has_is_told_once_and_shown_as_code_points(fonts, capsys):
    for _ in range(2):
        assert caption("a 猫 and 吾輩は猫, कि, 🐈", 20)[0] == ["a [U+732B] and [U+543E U+8F29 U+306F…], [U+0915 U+093F], [U+1F408]"]
        assert caption("a 猫", 12)[0] == ["a [U+732B]"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.startswith("note: no font here has all of ") for line in said) and "fonts-noto-cjk" in said[0]


@pytest.mark.parametrize(("text", "shown"), [
    ("one\ntwo\r\n\tthree\u2028four ", "one two three four"),
    ("a\x00b\x1b[31mc\x7f", "a\ufffdb\ufffd[31mc\ufffd"),
    ("safe\u202eesrever\u2066", "safeesrever"),  # which would turn what stands after it
    ("cafe\u0301", "caf\u00e9"),
    ("", ""),
])  # fmt: skip
def test_a_line_is_a_line(text, shown):
    assert one_line(text) == shown and caption(text, 12)[0] == [shown]


def test_what_is_too_long_is_wrapped_then_cut_so_that_it_shows():
    text = "an oil painting of " * 20
    (alone,), font = caption(text, 12, 200)
    assert alone.endswith("…") and font.getlength(alone) <= 200 and len(alone) > 20
    lines, _ = caption(text, 12, 200, 3)
    assert len(lines) == 3 and lines[2].endswith("…") and all(font.getlength(line) <= 200 for line in lines)
    assert " ".join(lines)[:-1] == text[: len(" ".join(lines)) - 1]  # nothing is lost in between
    assert caption("short", 12, 200, 3)[0] == ["short"]
    assert len(caption("x" * 500, 12, 200, 2)[0]) == 2  # nowhere to break


def test_sheets_of_any_text_stay_of_a_size(fonts):
    """From the right, of many words, of many lines; the same each time."""
    x = torch.zeros(3, 64, 64)
    texts = ["the letter A", "word " * 200, "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627", "猫\n犬", ""]
    sheet, again = (picture_sheet([[x] * 5] * 2, [texts[1], texts[2]], texts) for _ in range(2))
    assert np.array_equal(np.asarray(sheet), np.asarray(again)) and sheet.width < 1800 and sheet.height < 250
    plain = picture_sheet([[x] * 2], ["seed 0"], ["a", "b"])
    assert plain.size == (plain.width, 16 + 6 + 64 + 6)


def test_a_figures_title_is_as_any_caption(fonts):
    name = "模型 $x"
    assert letter_matrix(torch.zeros(26, 26), name, ["identity", "rotate_180"]).size == (800, 750)
