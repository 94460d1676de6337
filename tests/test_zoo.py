"""The named views against definitions of their own, and what is refused."""

from __future__ import annotations

import math
import re

import pytest
import torch

from eqldm.views import D4, IDENTITY, View, parse_view
from eqldm.views.zoo import FORMS, _cell, _jigsaw_shapes, jigsaw, pixel_permute, square_hinge


def picture(side: int) -> torch.Tensor:
    """[3, side, side], all values different."""
    return torch.arange(3.0 * side * side).view(3, side, side)


@pytest.mark.parametrize(("slope", "cells"), [(1.5, 8), (-0.5, 6), (1, 5), (0.1, 12)])
def test_skew_rolls_each_column_in_proportion_to_its_place(slope, cells):
    x = picture(2 * cells)
    columns = [x[..., k].roll(2 * math.floor(slope * (k // 2) + 0.5), -1) for k in range(2 * cells)]  # cells of two pixels
    assert torch.equal(parse_view(f"skew:{slope}:{cells}")(x), torch.stack(columns, -1))


@pytest.mark.parametrize(("cells", "f"), [(8, 1), (8, 8), (64, 1), (9, 2)])
def test_inner_circle_is_half_a_turn_inside_the_disc(cells, f):
    x = picture(cells * f)
    centres = (torch.arange(cells) + 0.5).repeat_interleave(f) - cells / 2
    inside = centres[:, None] ** 2 + centres**2 <= (cells / 2) ** 2
    assert torch.equal(parse_view(f"inner_circle:{cells}")(x), torch.where(inside, x.rot90(2, (1, 2)), x))
    assert math.pi / 4 == pytest.approx(float(inside.float().mean()), abs=0.1) and not inside[0, 0]


def test_a_skew_of_many_digits_is_found_again_by_its_name():
    for slope in (1 / 6, 0.49999999, 1.5, -2.0):
        view = parse_view(f"skew:{slope!r}:8")
        assert parse_view(view.name) == view


def test_square_hinge_turns_each_square_the_other_way():
    x = picture(9)
    turned = parse_view("square_hinge:3")(x)
    for i in range(3):
        for j in range(3):
            square = (slice(None), slice(3 * i, 3 * i + 3), slice(3 * j, 3 * j + 3))
            assert torch.equal(turned[square], x[square].rot90(-1 if (i + j) % 2 else 1, (1, 2)))


def test_pixel_permute_is_a_patch_permutation_of_latent_cells():
    assert torch.equal(parse_view("pixel_permute", 8)(picture(8)), parse_view("patch_permute:8")(picture(8)))
    assert parse_view("pixel_permute:8:3") == pixel_permute(8, 3) != pixel_permute(8)


JIGSAWS = [(2, 4), (4, 3), (4, 4), (4, 8), (6, 3), (4, 16)]


@pytest.mark.parametrize(("pieces", "side"), JIGSAWS)
def test_the_pieces_of_a_jigsaw_tile_the_square_and_interlock(pieces, side):
    shapes, cells = _jigsaw_shapes(pieces, side), pieces * side
    held = [[_cell(k, place, pieces, cells) for place in shape] for k, shape in enumerate(shapes)]
    assert sorted(cell for piece in held for cell in piece) == list(range(cells**2))
    for k, piece in enumerate(held):
        assert connected(set(piece), cells), f"piece {k} falls apart"
        knobs = {divmod(cell, cells)[0] // side * pieces + cell % cells // side for cell in piece} - {k}
        row, column = divmod(k, pieces)
        neighbours = {(row + i) * pieces + column + j for i, j in ((0, 1), (0, -1)) if 0 <= column + j < pieces}
        above_and_below = {(row + i) * pieces + column for i in (1, -1) if 0 <= row + i < pieces}
        assert knobs == (neighbours if (row + column) % 2 == 0 else above_and_below)


def connected(cells: set[int], side: int) -> bool:
    """Whether one can walk between all of these cells of a grid."""
    reached, edge = set(), {min(cells)}
    while edge:
        reached |= edge
        edge = {cell + step for cell in edge for step in (side, -side, 1, -1)} & cells - reached
    return reached == cells


@pytest.mark.parametrize(("pieces", "side"), JIGSAWS)
def test_a_jigsaw_is_put_together_again_of_whole_pieces(pieces, side):
    """Each piece goes as one to the place of one, turned: pieces of old cells and places of new ones are the same sets."""
    view, cells = jigsaw(pieces, 3, pieces * side), pieces * side
    owner = {_cell(k, place, pieces, cells): k for k, shape in enumerate(_jigsaw_shapes(pieces, side)) for place in shape}
    where = {k: {owner[view.source[cell]] for cell in owner if owner[cell] == k} for k in range(pieces**2)}
    assert all(len(found) == 1 for found in where.values()) and len({min(found) for found in where.values()}) == pieces**2
    assert all(k not in found for k, found in where.items())  # none stays
    for rotation in D4[:4]:
        turned = rotation.refine(cells).source
        assert sum(a == b for a, b in zip(view.source, turned)) <= cells**2 / 2  # nor is it the whole, turned
    for k in range(pieces**2):  # rigid: neighbours stay neighbours
        places = [cell for cell in owner if owner[cell] == k]
        for cell in places:
            for step in (1, cells):
                if cell + step in places and (step > 1 or (cell + 1) % cells):
                    assert abs(view.source[cell + step] - view.source[cell]) in (1, cells)
        assert len({view.turns[cell] for cell in places}) == 1
    assert view.source != tuple(range(cells**2)) and jigsaw(pieces, 3, cells) == view != jigsaw(pieces, 4, cells)
    assert set(view.turns) <= {0, 1, 2, 3}  # no piece lies on its face


def test_corners_and_borders_of_a_jigsaw_stay_on_the_border():
    x = torch.zeros(16, 16)
    x[0] = x[-1] = x[:, 0] = x[:, -1] = 1
    for seed in range(5):
        turned = jigsaw(4, seed, 16)(x)
        assert torch.equal(turned[0], torch.ones(16)) and torch.equal(turned[:, -1], torch.ones(16)) and float(turned.sum()) == 60


@pytest.mark.parametrize(
    "text", ["skew:1.5:8", "inner_circle:8", "square_hinge:2", "jigsaw:2:1:8", "pixel_permute:8:2", "flip@inner_circle:8"]
)  # fmt: skip
def test_a_view_is_found_again_by_its_name(text):
    assert parse_view(text).name == text and parse_view(text) == parse_view(text, 64)


def test_views_as_fine_as_the_latents():
    names = {name: parse_view(name, 64).name for name in FORMS}
    assert names == {
        "patch_permute": "patch_permute:4", "pixel_permute": "pixel_permute:64", "jigsaw": "jigsaw:4:0:64",
        "inner_circle": "inner_circle:64", "square_hinge": "square_hinge:4", "skew": "skew:1.5:64",
    }  # fmt: skip
    assert parse_view("jigsaw:2:5", 8) == jigsaw(2, 5, 8) and parse_view("square_hinge") == square_hinge(4)
    for view in map(lambda name: parse_view(name, 64), names):
        assert isinstance(view, View) and (view.inverse @ view).source == IDENTITY.refine(view.cells).source


@pytest.mark.parametrize(("text", "message"), [
    ("inner_circle", "is as fine as the latents that it acts on, which are not known here: give its N, inner_circle[:N]"),
    ("inner_circle:2", "wanted at least 4 cells a side"),
    ("skew:steep", "wanted skew[:SLOPE[:N]], such as skew:1.5:64"),
    ("skew:inf:8", "wanted a finite slope"),
    ("skew:nan:8", "wanted a finite slope"),
    ("skew:1_0:8", "wanted skew[:SLOPE[:N]]"),
    ("patch_permute:\u0663", "wanted patch_permute[:N[:SEED]]"),
    ("skew:1:1", "at least 2 cells a side"),
    ("square_hinge:1", "at least 2 squares a side"),
    ("square_hinge:2:3", "wanted square_hinge[:N]"),
    ("jigsaw:4:0:8", "4 x 4 pieces need a multiple of 4 cells a side, 12 or more to interlock (12, 16, 32...), got 8. Use a larger"),
    ("jigsaw:3:0:16", "wanted an even number of pieces a side"),
    ("jigsaw:4:0:18", "4 x 4 pieces need a multiple of 4 cells a side"),
    ("jigsaw:1:0:8", "wanted an even number of pieces a side"),
    ("jigsaw:2:0:8:1", "wanted jigsaw[:PIECES[:SEED[:N]]]"),
    ("jigsow", "did you mean jigsaw"),
    ("rotate_45", "'rotate_45' is no view for sampling: a turn by an odd angle takes each pixel from several"),
    ("rotate_-30.5", "a turn by an odd angle"),
    ("rotate_91x", "unknown view 'rotate_91x': did you mean rotate_90"),
    ("blur:3", "takes the high frequencies from the noise"),
    ("white_balance", "it scales the noise of each channel"),
    ("stretch", "Use skew"),
])  # fmt: skip
def test_what_is_refused_says_why(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_view(text)


@pytest.mark.parametrize("side", [None, 8])
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        *(
            (f"{name}:999999999", "999999999 x 999999999 cells: wanted at most 1024")
            for name in ("patch_permute", "pixel_permute", "inner_circle")
        ),
        ("patch_permute:30000", "30000 x 30000 cells: wanted at most 1024"),
        ("square_hinge:1025", "at most 1024"),
        ("skew:1.5:999999999", "at most 1024"),
        ("jigsaw:2:0:999999998", "at most 1024"),
        ("patch_permute:4:99999999999999999999", r"SEED is 99999999999999999999, wanted 0 to 2\^63 - 1"),
        ("jigsaw:2:9223372036854775808:8", "SEED"),
    ],
)
def test_grids_and_seeds_beyond_what_can_be_are_refused_before_they_are_made(text, reason, side):
    with pytest.raises(ValueError, match=re.escape(f"view '{text}'") + ".*" + reason.replace("1024", str(side or 1024))):
        parse_view(text, side)


def test_views_put_together_are_on_no_finer_a_grid():
    for side, wanted in ((None, 1024), (128, 128)):
        with pytest.raises(ValueError, match=f"view 'patch_permute:97@patch_permute:101' is of 9797 x 9797 cells: wanted at most {wanted}"):
            parse_view("patch_permute:97@patch_permute:101", side)


def test_latents_finer_than_that_have_their_own_grid():
    assert parse_view("skew:1", 1030).cells == 1030


def test_views_of_any_number_can_be_put_together():
    assert parse_view("@".join(["flip"] * 2000)).turns == IDENTITY.turns


@pytest.mark.parametrize("slope", ["-1e308", "1e300", "8.5", "-9"])
def test_slopes_of_more_than_the_grid_are_refused(slope):
    """Seen: a traceback at -1e308, and a view of rounding errors at 1e300."""
    with pytest.raises(ValueError, match=re.escape(f"view 'skew:{float(slope):g}:8': wanted a slope of -8 to 8")):
        parse_view(f"skew:{slope}", 8)
    assert sorted(parse_view("skew:-8", 8).source) == list(range(64))
