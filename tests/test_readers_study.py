"""The blind reading of anagrams: what is drawn, that nothing tells the reader, and the scores of answers that are known."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import readers
import reading_scores as scores
import reading_sheets as sheets
from eqldm.data.samples import PictureSamples
from eqldm.evaluation.anagram import every_pair, letter_tuples
from eqldm.evaluation.drawn import as_png, prompts_hash
from eqldm.evaluation.generation import letter_prompts
from eqldm.evaluation.judge import LETTERS, NO_LETTER
from eqldm.evaluation.lookalikes import READS_AS
from eqldm.views import IDENTITY, parse_view


@pytest.fixture
def methods() -> dict[str, sheets.Method]:
    """Two methods of 60 pictures, whose judges read 20 % and 40 % right in both views."""
    found = {}
    wanted = letter_tuples(60, 2, views=[IDENTITY, parse_view("rotate_180", 8)])
    for name, share in {"a": 0.2, "b": 0.4}.items():
        generator = torch.Generator().manual_seed(len(found))
        read = wanted.T[:, :, None].repeat(1, 1, 3)
        read[torch.rand(60, 1, 3, generator=generator).expand(60, 2, 3) > share**0.5] = NO_LETTER
        read[int(share * 60) :, 1] = NO_LETTER
        pictures = torch.randint(256, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
        found[name] = sheets.Method(pictures, wanted, read, torch.arange(100, 160))
    return found


def test_a_study_is_stratified_hidden_and_scored(methods, tmp_path, monkeypatch, capsys):
    sheets.draw(methods, 24, tmp_path, seed=0)
    items = sheets.read_key(tmp_path)
    assert [item.item for item in items] == list(range(1, 49))
    for name, method in methods.items():
        weights = {item.picture: item.weight for item in items if item.method == name}
        assert len(weights) == 12 and sum(weights.values()) == pytest.approx(60)  # they stand for all of the method's
        hits = [int(method.hits[number - 100]) for number in weights]
        assert 0 in hits and 3 in hits and any(0 < hit < 3 for hit in hits)
    assert sum(a.method == b.method and a.picture == b.picture for a, b in zip(items, items[1:])) < 8  # the views are apart
    files = sorted((tmp_path / "sheets").iterdir())
    assert [file.name for file in files] == ["01.png", "02.png"] and Image.open(files[0]).width == 6 * (48 + 12) + 12

    def answered(name: str, wrong: int) -> str:
        """A reader who reads what judge 1 reads, but for every so many-th item."""
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows(
                [["item", "letter"], *([item.item, "-" if item.item % wrong == 0 else item.judges[0].lower()] for item in items)]
            )
        return str(tmp_path / name)

    words = [answered("one.csv", 1000), answered("two.csv", 1000), answered("three.csv", 5)]
    monkeypatch.setattr(sys, "argv", ["readers.py", "score", str(tmp_path), "--answers", *words])
    readers.main()
    text = capsys.readouterr().out
    assert "| one with two | 100% | 1.00 | 1.00 |" in text and "| judge 1 with the majority | 100% | 1.00 | 1.00 |" in text
    assert "| judge with judge, the least of 3 pairs | " in text and "| judge with judge, the most of 3 pairs | " in text
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith(("| a |", "| b |"))]
    expected = {name: float((m.read[:, :, 0] == m.wanted.T).all(1).float().mean()) for name, m in methods.items()}
    for (_, kinds, most, *_), name in zip(rows, expected):
        assert sum(map(int, kinds.split("/"))) == 12 and abs(float(most.split("%")[0]) / 100 - expected[name]) < 0.15


def test_the_weighted_rate_is_that_of_all_pictures(methods):
    """Over many draws: strata are not what a reader's rate is of."""
    method, found = methods["a"], []
    right = (method.read[:, :, 0] == method.wanted.T).all(1).double()
    for seed in range(400):
        weights = sheets.chosen(method, 15, torch.Generator().manual_seed(seed))
        found.append(sum(weight * float(right[number]) for number, weight in weights.items()) / sum(weights.values()))
    assert sum(found) / len(found) == pytest.approx(float(right.mean()), abs=0.01)


def test_kappa():
    assert scores.kappa(list("AABB"), list("AABB")) == 1 and scores.kappa(list("AABB"), list("ABAB")) == 0
    assert scores.kappa(list("AAAB"), list("AABB")) == pytest.approx((0.75 - 0.5) / 0.5)
    assert scores.majority("AAB") == "A" and scores.majority("ABC") == "-" and scores.majority("A--") == "-"


@pytest.mark.parametrize(("lines", "message"), [
    ("1,A\n2,B\n2,C", "item 2 is unknown or answered twice"), ("1,A\n7,B", "item 7 is unknown"), ("1,AB\n2,B", "got 'AB', wanted a letter"),
    ("1,A", "1 items have no answer, such as 2"), ("1,A\nx,B", "item x is unknown"), ("1,?\n2,A", r"got '\?', wanted a letter"),
])  # fmt: skip
def test_answers_that_are_none(tmp_path, lines, message):
    (tmp_path / "reader.csv").write_text(f"item,letter\n{lines}\n")
    with pytest.raises(ValueError, match=message):
        scores.read_answers(tmp_path / "reader.csv", [1, 2])


def evaluated(folder: Path, wanted: torch.Tensor, judges: Sequence[str] = ("a", "b")) -> Path:
    """What an evaluation leaves of anagrams: pictures that were drawn for letters wanted [2, N], read right by all judges."""
    name, count = "anagram_rotate_180", wanted.shape[1]
    (kept := folder / f"{name}_pictures-0123456789ab").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    drawn = as_png(torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator))
    key = json.dumps({"count": count, "prompts": prompts_hash(letter_prompts(wanted))})
    save_file(drawn, kept / "00000000.safetensors", {"key": key})
    read = {f"read/{judge}": wanted.T.contiguous().clone() for judge in judges}
    save_file({"shown": torch.zeros(1)} | read, folder / f"{name}.safetensors")
    return folder


def test_letters_are_those_that_the_pictures_were_drawn_for(tmp_path):
    """Of other seeds, letters would be taken for others, and all would be called read wrong."""
    views = [IDENTITY, parse_view("rotate_180", 8)]
    folder = evaluated(tmp_path / "pairs", letter_tuples(4, 2, views=views).repeat(1, 2), ("b", "a"))
    method = sheets.Method.open(folder, 2)
    assert method.judges == ("a", "b") and method.hits.tolist() == [2] * 8 and method.numbers.tolist() == list(range(8))
    with pytest.raises(ValueError, match=r"drawn for other prompts than those wanted .the evaluation must be of --num-seeds 1, as given"):
        sheets.Method.open(folder, 1)
    with pytest.raises(ValueError, match="8 pictures, which are no 3 of each pair"):
        sheets.Method.open(folder, 3)
    with pytest.raises(ValueError, match="was read by no judge: evaluate it with --judge"):
        sheets.Method.open(evaluated(tmp_path / "unread", letter_tuples(4, 2, views=views), ()), 1)


def test_of_a_whole_matrix_only_what_needs_an_anagram_is_shown(tmp_path, capsys):
    every = every_pair().T.repeat(1, 2)
    method = sheets.Method.open(evaluated(tmp_path / "all", every), 2)
    assert len(method.pictures) == 1296 and "56 of 1352 pictures need no anagram or want one letter twice" in capsys.readouterr().err
    assert torch.equal(method.wanted, every[:, method.numbers]) and method.hits.tolist() == [2] * 1296
    assert (method.wanted[0] != method.wanted[1]).all()


def test_real_letters_are_the_controls(methods, tmp_path, make_picture_shards):
    """They are shown upright and turned, and are no part of the agreement, of the calibration and of the rates."""
    real = PictureSamples(make_picture_shards(tmp_path / "letters", caption="the letter {}"))
    things = PictureSamples(make_picture_shards(tmp_path / "things"))
    with pytest.raises(ValueError, match="labelled and captioned as no letter"):
        sheets.draw(methods, 24, tmp_path / "things-study", 0, things, 4)
    with pytest.raises(ValueError, match=r"--num-real 9999: the data hold \d+ pictures"):
        sheets.draw(methods, 24, tmp_path / "few", 0, real, 9999)
    small = {name: dataclasses.replace(m, pictures=torch.zeros(60, 3, *real.image_size, dtype=torch.uint8)) for name, m in methods.items()}
    sheets.draw(small, 24, tmp_path, 0, real, 16)
    items = sheets.read_key(tmp_path)
    shown = [item for item in items if item.method == sheets.REAL]
    assert len(items) == 48 + 32 and len(shown) == 32
    upright = {item.picture: item.wanted for item in shown if item.view == 0}
    for item in shown:
        letter = LETTERS[real[item.picture]["label"]]
        assert upright[item.picture] == letter and item.judges == "" and item.weight == 1
        assert item.view == 0 or item.wanted == READS_AS["rotate_180"].get(letter, "-")

    (tmp_path / "good.csv").write_text("item,letter\n" + "".join(f"{item.item},{item.wanted}\n" for item in items))
    (tmp_path / "bad.csv").write_text("item,letter\n" + "".join(f"{item.item},-\n" for item in items))
    table, agreement, *_, rates, _ = scores.score(tmp_path, [tmp_path / name for name in ("good.csv", "bad.csv")]).split("\n\n")
    assert f"| real letters, upright | {len(upright)} | 0% | 0% to 100% |" in table  # no majority of two who disagree
    nothing = sum(item.view == 1 and item.wanted == "-" for item in shown)
    assert f"| real letters, turned, which is none | {nothing} | 100% | 100% to 100% |" in table
    assert "| good with bad | 0% | 0.00 |" in agreement and "real" not in rates


def test_methods_are_read_by_the_same_judges(methods, tmp_path):
    other = methods | {"b": dataclasses.replace(methods["b"], judges=("x", "y", "z"))}
    with pytest.raises(ValueError, match="read by other judges: a by .* and b by x, y, z"):
        sheets.draw(other, 24, tmp_path, 0)


def test_too_few_pictures_are_told(methods, tmp_path):
    few = {name: dataclasses.replace(method, pictures=method.pictures[:3]) for name, method in methods.items()}
    with pytest.raises(ValueError, match="a has 3 pictures, wanted 10 of it: evaluate more pairs"):
        sheets.draw(few, 20, tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="holds 0 sets of pictures"):
        sheets.Method.open(tmp_path, 1)


def drawn(method: sheets.Method, right: torch.Tensor, count: int, generator: torch.Generator) -> list[scores.Picture]:
    """A method's pictures, some chosen, as a reader sees them who reads those right of which `right` [N] says so."""
    strata = {3: True, 0: False}
    return [
        scores.Picture(f"{number:03d}", strata.get(int(method.hits[number])), weight, bool(right[number]))
        for number, weight in sheets.chosen(method, count, generator).items()
    ]


@pytest.mark.parametrize(("rate", "judges"), [(0.04, (0.1, 0.1)), (0.01, (0.6, 0.02)), (0.15, (0.5, 0.05)), (0.5, (0.9, 0.2))])
def test_intervals_of_a_stratified_draw_hold_the_rate(rate, judges):
    """judges: how often each reads a picture right that readers do, and one that they do not. Of judges who know nothing (the first), the
    plain bootstrap held the rate in 74 % of draws, and said 0 to 0 in 24 %."""
    generator, held, tries = torch.Generator().manual_seed(7), 0, 150
    for _ in range(tries):
        right = torch.rand(600, generator=generator) < rate
        hits = torch.rand(600, 3, generator=generator) < torch.where(right, *map(torch.tensor, judges))[:, None]
        read = hits.long()[:, None].repeat(1, 2, 1)
        method = sheets.Method(torch.zeros(600, 1), torch.ones(2, 600, dtype=torch.long), read, torch.arange(600))
        low, high = scores.stratified_interval(drawn(method, right, 33, generator))
        held += low <= float(right.double().mean()) <= high and low < high
    assert held / tries >= 0.94


def test_the_difference_of_two_methods(methods, tmp_path):
    """Of a method that a reader reads right as the judges do, and of one of which they read all: its bounds hold the true difference."""
    sheets.draw(methods, 60, tmp_path, seed=0)
    items = sheets.read_key(tmp_path)
    answers = [item.wanted if item.method == "b" or item.judges[0] == item.wanted else "-" for item in items]
    (line,) = scores.differences(items, answers).splitlines()[2:]
    value, low, high = (float(word.strip("(%)")) / 100 for word in line.split("|")[2].split() if word != "to")
    true = float((methods["a"].read[:, :, 0] == methods["a"].wanted.T).all(1).float().mean()) - 1
    assert line.startswith("| a minus b | ") and value == pytest.approx(true, abs=0.1) and low - 1e-3 < true < high < 0


def test_a_stratum_is_what_the_judges_read_in_both_views():
    items = [
        sheets.Item(1, "a", 7, 1, "B", 2.0, "BB"), sheets.Item(2, "a", 7, 0, "A", 2.0, "AA"),
        sheets.Item(3, "a", 8, 0, "A", 5.0, "A-"), sheets.Item(4, "a", 8, 1, "B", 5.0, "-B"),
        sheets.Item(5, "a", 9, 0, "C", 3.0, "CC"), sheets.Item(6, "a", 9, 1, "D", 3.0, "D-"),
    ]  # fmt: skip
    found = scores.both_read(items, list("BAABCX"))["a"]
    wanted = [("AB", True, 2.0, True), ("AB", False, 5.0, True), ("CD", None, 3.0, False)]
    assert [(each.letters, each.stratum, each.weight, each.right) for each in found] == wanted
    assert scores.weighted_rate(found) == pytest.approx(0.7)
    low, high = scores.stratified_interval(found)  # one picture says nothing of the half, or the four fifths, that were not drawn
    assert low == pytest.approx(0.7 - (0.2**2 / 2 + 0.5**2 * 4 / 5) ** 0.5) and high == pytest.approx(0.7 + 0.3 * (2 / 3) ** 0.5)
    rows = scores.calibration(items, list("BAABCX")).splitlines()[2:]
    assert rows == ["| 0 | 0 | - |", "| 1 | 3 | 77% |", "| 2 | 3 | 100% |"]


def test_nothing_is_left_out_in_silence(methods, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="num-pictures 25 is no multiple of 2 methods"):
        sheets.draw(methods, 25, tmp_path, 0)
    with pytest.raises(ValueError, match="2 pictures of a method are too few for one of each kind"):
        sheets.draw(methods, 4, tmp_path, 0)
    sheets.draw(methods, 24, tmp_path, 0)
    key = (tmp_path / "key.csv").read_bytes()
    with pytest.raises(ValueError, match="holds a study"):
        sheets.draw(methods, 24, tmp_path, 1)
    assert (tmp_path / "key.csv").read_bytes() == key
    (tmp_path / "reader.csv").write_text("number,letter\n1,A\n")
    with pytest.raises(ValueError, match="has no column item: wanted a first line 'item,letter'"):
        scores.read_answers(tmp_path / "reader.csv", [1])
    (tmp_path / "reader.csv").write_text("item,letter\n1\n")
    with pytest.raises(ValueError, match="item 1: got '', wanted a letter"):
        scores.read_answers(tmp_path / "reader.csv", [1])
    monkeypatch.setattr(sys, "argv", ["readers.py", "draw", "a=x", "a=y", "--data", "data", "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="2 methods have 1 names"):
        readers.main()
