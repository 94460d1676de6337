"""Half letters, mixtures, ghosts: each against what it should be, pixel by pixel."""

from __future__ import annotations

import pytest
import torch

from eqldm.evaluation.judge import LETTERS
from eqldm.evaluation.letter_pictures import (
    JOINED,
    KEPT,
    blurred,
    colours,
    faded,
    hides,
    ink_of,
    joined,
    joins,
    kept,
    mixed,
    painted,
)

GROUND, LETTER = torch.tensor([0.5, -0.25, -1.0]), torch.tensor([-0.5, 0.75, 0.0])


def bars(*spans: tuple[slice, slice]) -> torch.Tensor:
    """[16, 16] ink of some rectangles."""
    ink = torch.zeros(16, 16)
    for rows, columns in spans:
        ink[rows, columns] = 1
    return ink


def picture(ink: torch.Tensor) -> torch.Tensor:
    return GROUND[:, None, None] + ink * (LETTER - GROUND)[:, None, None]


UPRIGHT, FLAT = bars((slice(2, 14), slice(7, 9))), bars((slice(7, 9), slice(2, 14)))


def test_ink_and_paint_are_inverses():
    ink = bars((slice(2, 14), slice(4, 6))) * torch.linspace(0, 1, 16)[:, None]
    ink[13, 4] = 1
    x = picture(ink)
    assert all(torch.allclose(a, b) for a, b in zip(colours(x), (GROUND, LETTER)))
    assert torch.allclose(ink_of(x), ink, atol=1e-6) and torch.allclose(painted(ink, x), x, atol=1e-6)
    assert not ink_of(picture(torch.zeros(16, 16))).any()  # one colour


@pytest.mark.parametrize(("side", "rows", "columns"), [
    ("left", slice(2, 14), slice(7, 8)), ("right", slice(2, 14), slice(8, 9)),
    ("top", slice(2, 8), slice(7, 9)), ("bottom", slice(8, 14), slice(7, 9)),
])  # fmt: skip
def test_a_half_lies_to_one_side_of_the_letters_own_middle(side, rows, columns):
    assert torch.equal(kept(UPRIGHT, side), bars((rows, columns)))
    assert not kept(torch.zeros(16, 16), side).any()


def test_joined_halves_meet_at_the_first_ones_middle():
    first, second = bars((slice(2, 14), slice(2, 14))), bars((slice(0, 3), slice(0, 3)))  # a square, and a smaller one
    assert torch.equal(joined(first, second, "left"), first)  # which is stretched to its size
    assert torch.equal(joined(first, torch.zeros(16, 16), "top")[:8], first[:8])
    ring = first - bars((slice(6, 10), slice(6, 10)))
    half = joined(ring, first, "left")
    assert torch.equal(half[:, :8], ring[:, :8]) and torch.equal(half[:, 8:], first[:, 8:])


def test_mixtures_and_what_hides_in_them():
    assert torch.equal(mixed(UPRIGHT, FLAT, 0.25), 0.25 * UPRIGHT + 0.75 * FLAT)
    cross = torch.maximum(UPRIGHT, FLAT)
    assert not hides(UPRIGHT, FLAT)
    assert hides(UPRIGHT, UPRIGHT) and hides(UPRIGHT, cross) and hides(cross, UPRIGHT)  # as an I in a T


def test_faded_and_blurred_keep_the_ground():
    x = picture(UPRIGHT)
    assert torch.allclose(faded(x, 0.5), picture(UPRIGHT / 2)) and torch.equal(faded(x, 1), x)
    soft = blurred(x, 1 / 16)
    assert soft.shape == x.shape and torch.allclose(soft[:, 0, 0], GROUND, atol=1e-6)
    assert torch.allclose(ink_of(x).sum(), ((soft - x[:, :1, :1]) / (LETTER - GROUND)[:, None, None]).mean(0).sum(), rtol=0.01)


def test_no_half_is_called_none_that_is_a_letter():
    """A few that read as letters in every face: half an O is a C, an R's top half a P, half an H or a T an I."""
    for side, letters in {"left": "OQBDEFGHIKLTUW", "right": "DHIJKMNTUW", "top": "BCEFGHIJKLMOPQRTVWXY", "bottom": LETTERS}.items():
        assert not set(KEPT.get(side, "")) & set(letters)
    for side in JOINED:
        assert not any(joins(side, letter, letter) for letter in LETTERS)  # it would be the letter
    for side, first, second in ("left", "P", "R"), ("left", "O", "D"), ("top", "T", "I"), ("top", "P", "F"), ("top", "O", "U"):
        assert not joins(side, first, second)
