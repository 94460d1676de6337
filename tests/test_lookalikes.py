"""Which letters read as others when turned, and which prompts therefore need no anagram."""

from __future__ import annotations

import pytest
import torch

from eqldm.evaluation.anagram import every_pair
from eqldm.evaluation.judge import LETTERS
from eqldm.evaluation.lookalikes import READS_AS, UNCERTAIN, disc_symmetry, population_note, populations, trivial
from eqldm.views import D4, D4_NAMES, IDENTITY, View, parse_view

PAIRS = every_pair().T
OF_HALF_A_TURN = "HH II MW NN OO SS WM XX ZZ"


def easy(*names: str) -> str:
    """The trivial pairs, or tuples that begin with one, under views."""
    found = PAIRS[:, trivial(PAIRS, [IDENTITY, *map(parse_view, names)])]
    return " ".join(LETTERS[a] + LETTERS[b] for a, b in found.T.tolist())


def labels(*words: str) -> torch.Tensor:
    """[faces, N] of words, one a picture."""
    return torch.tensor([[LETTERS.index(letter) for letter in word] for word in words]).T


@pytest.mark.parametrize("name", ["rotate_180", "rotate_90@rotate_90", "flip@mirror", "negate@rotate_180", "inner_circle:8"])
def test_nine_pairs_need_no_anagram_under_half_a_turn(name):
    """However it is written, in any colours, and where the corners stay."""
    assert easy(name) == OF_HALF_A_TURN


@pytest.mark.parametrize(
    "name, different, count",
    [
        ("rotate_90", "CU HI IH LJ NZ ZN", 8),
        ("rotate_180", "MW WM", 9),
        ("rotate_270", "HI IH JL NZ UC ZN", 8),
        ("mirror", "JL LJ", 13),
        ("transpose", "HI IH", 4),
        ("flip", "MW WM", 12),
        ("anti_transpose", "CU HI IH UC", 7),
        ("negate", "", 26),
    ],
)
def test_the_trivial_pairs_of_each_symmetry(name, different, count):
    found = easy(name).split()
    assert len(found) == count and " ".join(pair for pair in found if pair[0] != pair[1]) == different
    back = parse_view(name).inverse.name  # what is A upright and B turned is, seen from there, B and A
    assert sorted(pair[::-1] for pair in found) == easy(back).split()


@pytest.mark.parametrize("name", ["patch_permute:2", "square_hinge:4", "jigsaw:2:0:8", "skew:1.5:8", "pixel_permute:8"])
def test_a_view_that_cuts_letters_up_leaves_none(name):
    assert easy(name) == "" and disc_symmetry(parse_view(name)) is None
    parts = populations(PAIRS, [IDENTITY, parse_view(name)])
    assert [int(mask.sum()) for mask in parts.values()] == [650, 26, 0]


def test_of_three_views_one_letter_must_read_right_in_each():
    views = [IDENTITY, parse_view("rotate_90"), parse_view("rotate_180")]
    wanted = labels("NZN", "ZNZ", "OOO", "XXX", "NZZ", "MWM", "HHH", "HIH", "CUC", "AVE")
    assert trivial(wanted, views).tolist() == [True] * 4 + [False] * 3 + [True, False, False]
    assert not trivial(wanted, [*views[:2], parse_view("jigsaw:2:0:8")]).any()


def test_populations_part_all_pictures():
    wanted = labels("MW", "NN", "AA", "AV")
    found = populations(wanted, [IDENTITY, parse_view("rotate_180")])
    assert {name: mask.tolist() for name, mask in found.items()} == {
        "": [False, False, False, True], "equal/": [False, False, True, False], "trivial/": [True, True, False, False],
    }  # fmt: skip
    of_parts = populations(wanted)  # components: no view turns a part
    assert of_parts["equal/"].tolist() == [False, True, True, False] and not of_parts["trivial/"].any()
    assert populations(labels("ABA", "ABC"))["equal/"].tolist() == [True, False]


def test_the_note_says_how_many_stand_apart():
    half = [IDENTITY, parse_view("rotate_180")]
    assert population_note("anagram/rotate_180", labels("AV", "DK"), half) is None
    assert population_note("a", labels("AV", "MW", "QQ"), half) == (
        "a: of 3 pictures 1 need no anagram, for one plain letter reads right in every view (a/trivial/...) and 1 want one letter more "
        "than once (a/equal/...). What is read of the other 1 has the plain names."
    )
    assert "trivial" not in str(population_note("components/colour", labels("AV", "MM")))


@pytest.mark.parametrize("element", range(8))
def test_a_symmetry_is_found_on_any_grid(element):
    assert disc_symmetry(D4[element]) == disc_symmetry(D4[element].refine(6)) == element
    moved = list(D4[element].refine(8).source)
    moved[0], moved[7] = moved[7], moved[0]  # corners, outside of the disc
    assert disc_symmetry(View("corners", 8, tuple(moved), (element,) * 64)) == element
    moved[27], moved[28] = moved[28], moved[27]
    assert disc_symmetry(View("torn", 8, tuple(moved), (element,) * 64)) is None


def test_the_tables_name_letters_and_symmetries():
    for table in (READS_AS, UNCERTAIN):
        assert set(table) <= set(D4_NAMES[1:])
        assert all(set(letter + readings) <= set(LETTERS) for found in table.values() for letter, readings in found.items())
