"""The blind reading of anagrams: what is drawn, that nothing tells the reader, and the scores of answers that are known."""

from __future__ import annotations

import csv
import dataclasses
import sys

import pytest
import torch
from PIL import Image

import readers
from eqldm.evaluation.anagram import letter_tuples
from eqldm.evaluation.judge import NO_LETTER
from eqldm.views import IDENTITY, parse_view


@pytest.fixture
def methods() -> dict[str, readers.Method]:
    """Two methods of 60 pictures, whose judges read 20 % and 40 % right in both views."""
    found = {}
    wanted = letter_tuples(60, 2, views=[IDENTITY, parse_view("rotate_180", 8)])
    for name, share in {"a": 0.2, "b": 0.4}.items():
        generator = torch.Generator().manual_seed(len(found))
        read = wanted.T[:, :, None].repeat(1, 1, 3)
        read[torch.rand(60, 1, 3, generator=generator).expand(60, 2, 3) > share**0.5] = NO_LETTER
        read[int(share * 60) :, 1] = NO_LETTER
        pictures = torch.randint(256, (60, 3, 16, 16), generator=generator, dtype=torch.uint8)
        found[name] = readers.Method(pictures, wanted, read)
    return found


def test_a_study_is_stratified_hidden_and_scored(methods, tmp_path, monkeypatch, capsys):
    readers.draw(methods, 24, tmp_path, seed=0)
    items = readers.read_key(tmp_path)
    assert [item.item for item in items] == list(range(1, 49))
    for name, method in methods.items():
        weights = {item.picture: item.weight for item in items if item.method == name}
        assert len(weights) == 12 and sum(weights.values()) == pytest.approx(60)  # they stand for all of the method's
        hits = [int(method.hits[number]) for number in weights]
        assert 0 in hits and 3 in hits and any(0 < hit < 3 for hit in hits)
    assert sum(a.method == b.method and a.picture == b.picture for a, b in zip(items, items[1:])) < 8  # the views are apart
    sheets = sorted((tmp_path / "sheets").iterdir())
    assert [sheet.name for sheet in sheets] == ["01.png", "02.png"] and Image.open(sheets[0]).width == 6 * (48 + 12) + 12

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
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith(("| a |", "| b |"))]
    expected = {name: float((m.read[:, :, 0] == m.wanted.T).all(1).float().mean()) for name, m in methods.items()}
    for (_, count, most, *_), name in zip(rows, expected):
        assert count == "12" and abs(float(most.split("%")[0]) / 100 - expected[name]) < 0.15


def test_the_weighted_rate_is_that_of_all_pictures(methods):
    """Over many draws: strata are not what a reader's rate is of."""
    method, found = methods["a"], []
    right = (method.read[:, :, 0] == method.wanted.T).all(1).double()
    for seed in range(400):
        weights = readers.chosen(method, 15, torch.Generator().manual_seed(seed))
        found.append(sum(weight * float(right[number]) for number, weight in weights.items()) / sum(weights.values()))
    assert sum(found) / len(found) == pytest.approx(float(right.mean()), abs=0.01)


def test_kappa():
    assert readers.kappa(list("AABB"), list("AABB")) == 1 and readers.kappa(list("AABB"), list("ABAB")) == 0
    assert readers.kappa(list("AAAB"), list("AABB")) == pytest.approx((0.75 - 0.5) / 0.5)
    assert readers.majority("AAB") == "A" and readers.majority("ABC") == "-" and readers.majority("A--") == "-"


@pytest.mark.parametrize(("lines", "message"), [
    ("1,A\n2,B\n2,C", "item 2 is unknown or answered twice"), ("1,A\n7,B", "item 7 is unknown"), ("1,AB\n2,B", "got 'AB', wanted a letter"),
    ("1,A", "1 items have no answer, such as 2"), ("1,A\nx,B", "item x is unknown"), ("1,?\n2,A", r"got '\?', wanted a letter"),
])  # fmt: skip
def test_answers_that_are_none(tmp_path, lines, message):
    (tmp_path / "reader.csv").write_text(f"item,letter\n{lines}\n")
    with pytest.raises(ValueError, match=message):
        readers.read_answers(tmp_path / "reader.csv", [1, 2])


def test_too_few_pictures_are_told(methods, tmp_path):
    few = {name: dataclasses.replace(method, pictures=method.pictures[:3]) for name, method in methods.items()}
    with pytest.raises(ValueError, match="a has 3 pictures, wanted 10 of it: evaluate more pairs"):
        readers.draw(few, 20, tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="holds 0 sets of pictures"):
        readers.Method.open(tmp_path, 1)
