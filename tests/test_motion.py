"""The way from view to view: it ends where the view does, in whole pieces."""

from __future__ import annotations

import math

import pytest
import torch

from eqldm.views import D4, D4_NAMES, IDENTITY, parse_view
from eqldm.views.motion import extent, motion, spread

VIEWS = [
    *D4_NAMES, "negate", "patch_permute:4", "pixel_permute:6", "inner_circle:8", "square_hinge:3", "skew:1.5:8", "jigsaw:2:1:8",
    "jigsaw:4:2:16", "flip@square_hinge:2", "rotate_90@jigsaw:2:0:8", "mirror@inner_circle:6",
]  # fmt: skip


@pytest.mark.parametrize("name", VIEWS)
def test_each_cell_goes_from_where_it_was_to_where_the_view_shows_it(name):
    view = parse_view(name)
    way, n = motion(view), view.cells
    goes_to = {source: k for k, source in enumerate(view.source)}
    seen = []
    for piece in way.pieces:
        for row, first, last in piece.runs:
            for column in range(first, last):
                cell = row * n + column
                seen.append(cell)
                for s, wanted in ((0, cell), (1, goes_to[cell])):
                    (a, b), (c, d) = piece.matrix(s)
                    down, right = (row + 0.5) / n - piece.start[0], (column + 0.5) / n - piece.start[1]
                    middle = piece.middle(s, way.spreads)
                    place = middle[0] + a * down + b * right, middle[1] + c * down + d * right
                    assert place == pytest.approx([(each + 0.5) / n for each in divmod(wanted, n)], abs=1e-9)
    assert sorted(seen) == list(range(n * n)) and way.sign == view.sign


def test_a_piece_turns_as_its_element_says_and_goes_the_shorter_way():
    for view in D4:
        (piece,) = motion(view).pieces
        (a, b), (c, d) = piece.matrix(1)
        corners = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
        picture = {corner: k for k, corner in enumerate(corners)}
        grid = [[picture[-1, -1], picture[-1, 1]], [picture[1, -1], picture[1, 1]]]

        turned = view(torch.tensor(grid)).tolist()
        for (down, right), k in picture.items():
            to = round(a * down + b * right), round(c * down + d * right)
            assert turned[(to[0] + 1) // 2][(to[1] + 1) // 2] == k, view.name
    half = motion(D4[3]).pieces[0].matrix(0.5)
    assert half[1][0] == pytest.approx(-math.sqrt(0.5))  # clockwise by 45 degrees: what is above goes to the right


def test_a_reflection_turns_about_its_axis():
    """Halfway one sees the sheet from its edge, and the axis has not moved."""
    for name, axis in (("mirror", (1, 0)), ("flip", (0, 1)), ("transpose", (1, 1)), ("anti_transpose", (1, -1))):
        (a, b), (c, d) = motion(parse_view(name)).pieces[0].matrix(0.5)
        assert a * d - b * c == pytest.approx(0, abs=1e-12)
        assert (a * axis[0] + b * axis[1], c * axis[0] + d * axis[1]) == pytest.approx(axis)


def test_hinged_squares_touch_at_their_corners_all_the_way():
    way = motion(parse_view("square_hinge:2"))
    assert way.spreads and len(way.pieces) == 4
    left, right = (next(p for p in way.pieces if p.runs[0][:2] == place) for place in ((0, 0), (0, 1)))
    for s in (0, 0.3, 0.5, 0.9, 1):
        corners = []
        for piece in (left, right):
            (a, b), (c, d) = piece.matrix(s)
            middle = piece.middle(s, True)
            for i, j in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
                corners.append((middle[0] + (a * i + b * j) / 4, middle[1] + (c * i + d * j) / 4))
        nearest = min(math.dist(one, other) for one in corners[:4] for other in corners[4:])
        assert nearest == pytest.approx(0, abs=1e-9)
    assert spread(0) == spread(1) == pytest.approx(1)


def test_pieces_that_stay_and_pieces_that_pass():
    circle = motion(parse_view("inner_circle:8"))
    assert sum(piece.moves for piece in circle.pieces) == 1 and not circle.spreads and circle.pieces[-1].moves
    assert not motion(IDENTITY).pieces[0].moves
    skew = motion(parse_view("skew:1:8"))
    assert not skew.spreads and len(skew.pieces) == 15  # the first column stays, each other is cut in two
    travelled = [math.dist(piece.start, piece.end) for piece in skew.pieces if piece.moves]
    assert travelled == sorted(travelled, reverse=True)  # those that go far go below


def test_how_much_room_a_motion_needs():
    assert extent(motion(IDENTITY)) == extent(motion(D4[4])) == pytest.approx(1)
    assert extent(motion(D4[1])) == pytest.approx(math.sqrt(2))
    assert extent(motion(parse_view("square_hinge:2"))) == pytest.approx(math.sqrt(2), abs=0.01)
    assert 1 <= extent(motion(parse_view("pixel_permute:32"))) <= 1.5
