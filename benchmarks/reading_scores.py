"""What the answers of the readers of `readers.py` say: how they agree with each other and with the judges, and the rates of the methods."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from eqldm.evaluation.bootstrap import rate_interval
from eqldm.evaluation.judge import ANSWERS, LETTERS
from eqldm.evaluation.judges import kappa as judges_kappa
from eqldm.markdown import markdown
from reading_sheets import REAL, Item, read_key

STRATA = (True, None, False)  # `Picture.stratum`: all judges read it, some, none


def kappa(a: Sequence[str], b: Sequence[str]) -> float:
    """Cohen's kappa of two readers' answers (`judges.kappa`), 1 where they always agree, also where both always answer the same."""
    numbers = {answer: number for number, answer in enumerate({*a, *b})}
    found = float(judges_kappa(*(torch.tensor([numbers[answer] for answer in each]) for each in (a, b))))
    return 1.0 if math.isnan(found) else found


def majority(answers: Sequence[str]) -> str:
    """The answer of more than half of the readers; - where there is none."""
    most = max(set(answers), key=answers.count)
    return most if answers.count(most) * 2 > len(answers) else "-"


def read_answers(file: Path, items: Sequence[int]) -> list[str]:
    """A reader's answers, in the order of `items`. Raises ValueError for items that are missing, unknown or answered twice, and for answers
    that are none of A to Z and -."""
    with open(file, newline="", encoding="utf-8-sig") as opened:  # as spreadsheets write it
        table = csv.DictReader(opened)
        if lacking := {"item", "letter"} - set(table.fieldnames or ()):
            raise ValueError(f"'{file}' has no column {min(lacking)}: wanted a first line 'item,letter'")
        rows = [((row["item"] or "").strip(), (row["letter"] or "").strip().upper()) for row in table]
    given: dict[int, str] = {}
    for item, letter in rows:
        if not item.isdecimal() or int(item) not in items or int(item) in given:
            raise ValueError(f"'{file}': item {item} is unknown or answered twice")
        if letter not in ANSWERS or len(letter) != 1:
            raise ValueError(f"'{file}': item {item}: got '{letter}', wanted a letter from A to Z, or - for none")
        given[int(item)] = letter
    if missing := [item for item in items if item not in given]:
        raise ValueError(f"'{file}': {len(missing)} items have no answer, such as {missing[0]}")
    return [given[item] for item in items]


def agreement(names: Sequence[str], answers: Sequence[Sequence[str]], judges: Sequence[Sequence[str]]) -> str:
    """A table of kappa between readers, of each judge with the readers' majority, and of the judges with each other, least and most."""
    rows = [[f"{a} with {b}", *_agreement(x, y)] for (a, x), (b, y) in combinations(zip(names, answers), 2)]
    agreed = [majority(each) for each in zip(*answers)]
    rows += [[f"judge {k + 1} with the majority", *_agreement(judge, agreed)] for k, judge in enumerate(judges)]
    between = [_agreement(*pair) for pair in combinations(judges, 2)]
    for name, end in (("least", min), ("most", max)):
        rows += [[f"judge with judge, the {name} of {len(between)} pairs", *(end(cells) for cells in zip(*between))]] if between else []
    return markdown(["", "the same answer", "kappa", "kappa of letter or none"], rows)


def _agreement(a: Sequence[str], b: Sequence[str]) -> list[str]:
    letters = [["letter" if answer in LETTERS else "none" for answer in each] for each in (a, b)]
    return [f"{sum(x == y for x, y in zip(a, b)) / len(a):.0%}", f"{kappa(a, b):.2f}", f"{kappa(*letters):.2f}"]


def calibration(items: Sequence[Item], agreed: Sequence[str]) -> str:
    """A table: of the items that so many judges read as wanted, the share that the readers' majority does, weighted back to all pictures
    (a view that all judges read is drawn more often where they read the other view too)."""
    rows = []
    for count in range(len(items[0].judges) + 1):
        found = [(item.weight, answer == item.wanted) for item, answer in zip(items, agreed) if item.judges.count(item.wanted) == count]
        total, right = sum(weight for weight, _ in found), sum(weight for weight, hit in found if hit)
        rows.append([str(count), str(len(found)), f"{right / total:.0%}" if found else "-"])
    return markdown(["judges that read it as wanted", "items", "readers do"], rows)


@dataclass(frozen=True)
class Picture:
    """A picture of a method, all of whose views were shown. letters: wanted, in order of the views.  stratum: how many judges read all
    views as wanted, as `chosen` parts them: all, some (None) or none.  right: whether the readers did."""

    letters: str
    stratum: bool | None
    weight: float
    right: bool


def both_read(items: Sequence[Item], answers: Sequence[str]) -> dict[str, list[Picture]]:
    """By method, in order of their names, its pictures."""
    views: dict[tuple[str, int], list[tuple[Item, bool]]] = {}
    for item, answer in zip(items, answers):
        views.setdefault((item.method, item.picture), []).append((item, answer == item.wanted))
    found: dict[str, list[Picture]] = {}
    for (method, _), shown in sorted(views.items()):
        shown.sort(key=lambda each: each[0].view)
        hits = [all(item.judges[k] == item.wanted for item, _ in shown) for k in range(len(shown[0][0].judges))]
        stratum = None if any(hits) != all(hits) else all(hits)
        letters = "".join(item.wanted for item, _ in shown)
        found.setdefault(method, []).append(Picture(letters, stratum, shown[0][0].weight, all(right for _, right in shown)))
    return found


def weighted_rate(pictures: Sequence[Picture]) -> float:
    """The share read right of all of a method's pictures."""
    return sum(each.weight for each in pictures if each.right) / sum(each.weight for each in pictures)


def stratified_interval(pictures: Sequence[Picture]) -> tuple[float, float]:
    """95 % bounds of the `weighted_rate` of all of a method's pictures, of which these are a part: each stratum has the interval of its own
    share (`rate_interval`, which counts pairs of letters in either order once), narrowed by the root of the part of the stratum that was
    not drawn (finite population: of one that was drawn as a whole the share is known), and their distances from it add up as squares, as
    those of independent errors. A stratum of a single pair says nothing: its bounds are 0 and 1.

    Source: Zou & Donner 2008, Statistics in Medicine 27, for sums of any estimates with intervals; Cochran, Sampling Techniques, 1977.
    """
    total, below, above = sum(each.weight for each in pictures), 0.0, 0.0
    for stratum in STRATA:
        held = [each for each in pictures if each.stratum == stratum]
        if not held:
            continue
        pairs = [sorted(each.letters) for each in held]
        right = torch.tensor([float(each.right) for each in held])
        clusters = torch.tensor([pairs.index(pair) for pair in pairs])
        low, high = 0.0, 1.0
        if len(clusters.unique()) > 1:
            found = rate_interval(right, torch.ones_like(right), clusters)
            low, high = found.low, found.high
        share, rate, left = sum(each.weight for each in held) / total, float(right.mean()), 1 - 1 / held[0].weight
        below, above = below + left * (share * (rate - low)) ** 2, above + left * (share * (high - rate)) ** 2
    rate = weighted_rate(pictures)
    return max(rate - below**0.5, 0.0), min(rate + above**0.5, 1.0)


def rates(items: Sequence[Item], answers: Sequence[Sequence[str]]) -> str:
    """A table of the share of each method's pictures that are read in both views: by the readers' majority, by each reader, by each judge,
    weighted back to all of the method's pictures."""
    judges = list(zip(*(item.judges for item in items)))
    columns = [[majority(each) for each in zip(*answers)], *answers, *judges]
    found = [both_read(items, column) for column in columns]
    rows = []
    for method, pictures in found[0].items():
        shares = [weighted_rate(each[method]) for each in found]
        low, high = stratified_interval(pictures)
        readers, of_judges = shares[1 : 1 + len(answers)], shares[1 + len(answers) :]
        cells = [f"{shares[0]:.1%} ({low:.1%} to {high:.1%})"]
        kinds = "/".join(str(sum(each.stratum is kind for each in pictures)) for kind in STRATA)
        rows.append([method, kinds, *cells, *(f"{min(each):.1%} to {max(each):.1%}" for each in (readers, of_judges))])
    return markdown(["method", "pictures that all/some/no judges read", "the majority reads both", "single readers", "judges"], rows)


def differences(items: Sequence[Item], agreed: Sequence[str]) -> str:
    """A table of how much more often the readers' majority reads both views of one method than of another, with 95 % bounds, as of methods
    that were drawn independently (they have the same pairs of letters, which makes the bounds too wide if anything).

    Source: Newcombe 1998, Statistics in Medicine 17; Zou & Donner 2008, Statistics in Medicine 27.
    """
    rows = []
    for (a, of_a), (b, of_b) in combinations(both_read(items, agreed).items(), 2):
        (rate_a, low_a, high_a), (rate_b, low_b, high_b) = ((weighted_rate(each), *stratified_interval(each)) for each in (of_a, of_b))
        low, high = math.hypot(rate_a - low_a, high_b - rate_b), math.hypot(high_a - rate_a, rate_b - low_b)
        value = rate_a - rate_b
        rows.append([f"{a} minus {b}", f"{value:+.1%} ({value - low:+.1%} to {value + high:+.1%})"])
    return markdown(["", "the majority reads both"], rows)


def of_controls(items: Sequence[Item], answers: Sequence[Sequence[str]]) -> str:
    """A table: the share of real letters that is read as wanted, upright and turned, by the readers' majority and by single readers."""
    rows = []
    agreed = [majority(each) for each in zip(*answers)]
    kinds = {
        "upright": lambda item: item.view == 0,
        "turned, which reads as a letter": lambda item: item.view == 1 and item.wanted in LETTERS,
        "turned, which is none": lambda item: item.view == 1 and item.wanted not in LETTERS,
    }
    for kind, belongs in kinds.items():
        places = [k for k, item in enumerate(items) if belongs(item)]
        if places:
            of_all, *single = [sum(each[k] == items[k].wanted for k in places) / len(places) for each in (agreed, *answers)]
            rows.append([f"{REAL}, {kind}", str(len(places)), f"{of_all:.0%}", f"{min(single):.0%} to {max(single):.0%}"])
    return markdown(["controls", "items", "read as wanted by the majority", "by single readers"], rows)


def score(folder: Path, files: Sequence[Path]) -> str:
    """The tables of a study. Raises ValueError, FileNotFoundError."""
    items = read_key(folder)
    every = [read_answers(file, [item.item for item in items]) for file in files]
    parts = []
    for real in (True, False):  # controls are left out of agreement: that they are easy to read says nothing of anagrams
        places = [k for k, item in enumerate(items) if (item.method == REAL) == real]
        held, answers = [items[k] for k in places], [[each[k] for k in places] for each in every]
        if real:
            parts += [of_controls(held, answers)] if held else []
            continue
        judges = [[item.judges[k] for item in held] for k in range(len(held[0].judges))]
        agreed = [majority(each) for each in zip(*answers)]
        parts += [agreement([file.stem for file in files], answers, judges), calibration(held, agreed), rates(held, answers)]
        parts += [differences(held, agreed)]
    return "\n".join(parts)
