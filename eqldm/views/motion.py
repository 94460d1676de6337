"""How a picture moves from one view of it to another: in pieces, each of them rigid. What the animation and the gallery show.

Places are (down, right) in the unit square. All is found from the view's permutation: neighbours that share one turn and one shift are one
piece.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from eqldm.views.grid import View

Place = tuple[float, float]
Matrix = tuple[Place, Place]


def turning(element: int, s: float) -> Matrix:
    """An element of D4 on its way, at time s in [0, 1]: a turn by the shorter way, or for a reflection a turn about its axis, seen from
    above, as a sheet of paper is turned over."""
    quarter = element % 4
    if element < 4:
        angle = s * math.radians((0, 90, 180, -90)[quarter])
        return (math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))
    down, right, narrow = math.cos(quarter * math.pi / 4), math.sin(quarter * math.pi / 4), math.cos(s * math.pi)
    mixed = (1 - narrow) * down * right
    return (down**2 + narrow * right**2, mixed), (mixed, right**2 + narrow * down**2)


@dataclass(frozen=True)
class Piece:
    """Cells that move as one.

    runs: (row, first column, column past the last) of its cells before, on the motion's grid.
    element: of D4, how it turns.  start, end: where its middle is before and after.
    """

    runs: tuple[tuple[int, int, int], ...]
    element: int
    start: Place
    end: Place

    @property
    def moves(self) -> bool:
        """Whether it does not stay as it is."""
        return self.element != 0 or math.dist(self.start, self.end) > 1e-9

    def matrix(self, s: float) -> Matrix:
        """What multiplies places relative to its middle at time s in [0, 1]; see `turning`."""
        return turning(self.element, s)

    def middle(self, s: float, spreads: bool) -> Place:
        """Where its middle is at time s; spreads: see `Motion`."""
        far = spread(s) if spreads else 1.0
        down, right = (0.5 + far * ((1 - s) * a + s * b - 0.5) for a, b in zip(self.start, self.end))
        return down, right


@dataclass(frozen=True)
class Motion:
    """The pieces of a view, on a grid of `cells` x `cells`; those that travel farthest first, for they pass below the others.

    spreads: whether the pieces part while they move, by what squares need that turn by a quarter between each other (a hinge).
    sign: -1 where the colours go over to their negatives.
    """

    cells: int
    pieces: tuple[Piece, ...]
    spreads: bool
    sign: int


def motion(view: View) -> Motion:
    """From the picture x to view(x)."""
    n, turned = view.cells, {element: turning(element, 1) for element in set(view.turns)}
    found: dict[tuple, dict[tuple[int, int], tuple[int, int]]] = {}
    for k, (source, element) in enumerate(zip(view.source, view.turns)):
        (row, column), (to_row, to_column) = divmod(source, n), divmod(k, n)
        (a, b), (c, d) = turned[element]
        shift = (round(to_row + 0.5 - a * (row + 0.5) - b * (column + 0.5)), round(to_column + 0.5 - c * (row + 0.5) - d * (column + 0.5)))
        found.setdefault((element, shift), {})[row, column] = (to_row, to_column)
    pieces = []
    for (element, _), goes_to in found.items():
        for cells in _connected(set(goes_to)):
            start, end = (tuple((sum(each) / len(cells) + 0.5) / n for each in zip(*at)) for at in (cells, map(goes_to.get, cells)))
            pieces.append(Piece(_runs(cells), element, start, end))
    moving = [piece for piece in pieces if piece.moves]
    along_one_axis = any(all(abs(p.start[axis] - p.end[axis]) < 1e-9 and p.element == 0 for p in moving) for axis in (0, 1))
    pieces.sort(key=lambda piece: (piece.moves, -math.dist(piece.start, piece.end)))
    return Motion(n, tuple(pieces), len(moving) > 1 and not along_one_axis, view.sign)


def _connected(cells: set[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The cells (row, column), parted where one cannot walk from one to the other."""
    parts = []
    while cells:
        reached: list[tuple[int, int]] = []
        edge = {cells.pop()}
        while edge:
            reached += edge
            edge = {(row + i, column + j) for row, column in edge for i, j in ((0, 1), (0, -1), (1, 0), (-1, 0))} & cells
            cells -= edge
        parts.append(reached)
    return parts


def _runs(cells: Sequence[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Cells (row, column) as runs of neighbours in a row."""
    runs: list[tuple[int, int, int]] = []
    for row, column in sorted(cells):
        if runs and runs[-1][0] == row and runs[-1][2] == column:
            runs[-1] = (row, runs[-1][1], column + 1)
        else:
            runs.append((row, column, column + 1))
    return tuple(runs)


def spread(s: float) -> float:
    """How much farther apart squares must be that have each turned by s of a quarter, so that their corners touch."""
    return math.cos(s * math.pi / 2) + math.sin(s * math.pi / 2)


def extent(motion: Motion, steps: int = 16) -> float:
    """The side of the square about the picture's middle that all pieces stay in, in picture sides."""
    n, far = motion.cells, 0.5
    for piece in motion.pieces if len(motion.pieces) <= 256 else ():
        corners = {(row + i, column) for row, first, last in piece.runs for i in (0, 1) for column in (first, last)}
        for k in range(steps + 1):
            (a, b), (c, d) = piece.matrix(k / steps)
            middle = piece.middle(k / steps, motion.spreads)
            for row, column in corners:
                down, right = row / n - piece.start[0], column / n - piece.start[1]
                far = max(far, abs(middle[0] + a * down + b * right - 0.5), abs(middle[1] + c * down + d * right - 0.5))
    if len(motion.pieces) > 256:
        far = 0.5 * max(map(spread, (0, 0.5))) if motion.spreads else 0.5
    return 2 * far
