"""Commands: every option that is a number has a finite range, and an error is one line that names the option."""

from __future__ import annotations

import ast
import math

import pytest

from eqldm.atomic import NotWritten
from eqldm.command import Parser, error_line, real, whole
from eqldm.ranges import SAMPLING, Range
from test_paths import ENTRY_POINTS, options_of

NUMBERS = [(path.name, *option) for path in ENTRY_POINTS for option in options_of(path)]


@pytest.fixture
def parse(capsys):
    """`parse(*words)`: the options of a parser, or the line of its error."""

    def call(*words: str):
        parser = Parser("What it does.")
        parser.add_argument("--count", type=whole(1, 10))
        parser.add_argument("--share", type=real(Range(0, 1)), nargs="+")
        parser.add_argument("--more", action="extend", nargs="+", default=[])
        parser.add_argument("rest", nargs="*")
        try:
            return parser.parse_args(words)
        except SystemExit as error:
            assert error.code == 2
            line = capsys.readouterr().err
            assert line.startswith("error: ") and line.count("\n") == 1 and len(line) < 200
            return line

    return call


def test_every_number_has_a_range():
    """One without would take -1, 10^20 or nan."""
    found = 0
    for file, name, keywords, _ in NUMBERS:
        kind, default = keywords.get("type"), keywords.get("default", "None")
        assert kind not in ("int", "float"), f"{file} {name}: type=whole(...) or real(...)"
        number = isinstance(ast.literal_eval(default), int | float) if default.replace(".", "").isdecimal() else False
        assert not number or (kind or "").startswith(("whole(", "real(")), f"{file} {name}: type=whole(...) or real(...)"
        assert kind or not name.startswith("--num-"), f"{file} {name}: a count of any text"
        found += (kind or "").startswith(("whole(", "real("))
    assert found > 30, "the options are looked for in the wrong way"
    assert all(math.isfinite(end) for wanted in SAMPLING.values() for end in (wanted.low, wanted.high))


@pytest.mark.parametrize("word", [
    *("0", "11", "-1", "1.5", "1e1", "nan", "inf", "-inf", "1e308", "99999999999999999999", "9" * 9999, "", " ", "foo", "[]", "{}", "null"),
    *("\u0663", "\uff13", "1_0", " 3", "0x3", "3\n", "a" * 9999, "\u0000"),
])  # fmt: skip
def test_what_is_no_such_number(parse, word):
    assert "--count: got " in parse(f"--count={word}")
    if word not in ("0", "1.5"):
        parse(f"--share={word}")


def test_numbers(parse):
    found = parse("--count", "+3", "--share", "1e-3", "1")
    assert found.count == 3 and found.share == [1e-3, 1]
    assert "--share: got 1.5, wanted 0 or more, up to 1" in parse("--share", "0", "1.5")
    assert "--share: got 'foo', wanted a number" in parse("--share", "foo")


def test_an_option_given_twice(parse, capsys):
    assert parse("--count", "3", "x", "--count=4").count == 4
    assert capsys.readouterr().err == "note: --count is given twice, 3 and 4: the last one holds\n"
    assert "--share: given twice" in parse("--share", "1", "--share", "0", "0")
    assert parse("--count", "3", "--count", "3").count == 3 and not capsys.readouterr().err
    assert all("got '--', wanted a value" in parse(f"{option}=--") for option in ("--count", "--share", "--more"))
    assert parse("--more", "a", "--more", "b").more == ["a", "b"]


def test_unknown_options(parse):
    assert "there is no option '--cuont'. Did you mean --count?" in parse("--cuont=3")
    assert "there is no option '--coun'" in parse("--coun", "3")
    assert "there is no option '--xyzzy' (--help lists the options)" in parse("--xyzzy")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--a: got 1,\nwanted 2"), "error: --a: got 1, wanted 2"),
        (FileNotFoundError(2, "No such file or directory", "a"), "error: [Errno 2] No such file or directory: 'a'"),
        (
            OSError(28, "No space left on device"),
            "error: what this command writes could not be written (No space left",
        ),
        (OSError(122, "Disk quota exceeded", "logs/a"), "error: 'logs/a' could not be written (Disk quota exceeded): make room"),
        (NotWritten("'b'", OSError(28, "No space left on device")), "error: 'b' could not be written (No space left on device): make room"),
        (OSError(28, "no space left in 'c': free some"), "error: [Errno 28] no space left in 'c': free some"),
    ],
)
def test_an_error_says_the_way_out_of_a_full_disk(error, line):
    assert error_line(error).startswith(line)
