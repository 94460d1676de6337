"""The named views, and `parse_view`, which finds them by name.

Those of Visual Anagrams (arXiv 2311.17919) and its code, each as a permutation of grid cells, so that it acts on latents too; drawn by
formula, none by a stored picture. Some are as fine as the latents that they act on (SIDE): at f = 8 and 512 px on 64 x 64 cells.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from eqldm.views.grid import D4, NEGATE, View, turned_place

ALIASES = {"rotate_ccw": "rotate_90", "rotate_cw": "rotate_270"}


def patch_permute(cells: int = 4, seed: int = 0) -> View:
    """A seeded permutation of `cells` x `cells` patches, none of them turned."""
    if cells < 2:
        raise ValueError(f"view 'patch_permute:{cells}': wanted at least 2 cells a side")
    source = torch.randperm(cells**2, generator=torch.Generator().manual_seed(seed)).tolist()
    return View(f"patch_permute:{cells}:{seed}" if seed else f"patch_permute:{cells}", cells, tuple(source), (0,) * cells**2)


def pixel_permute(cells: int, seed: int = 0) -> View:
    """`patch_permute` of the smallest patches that latents know: one latent cell each."""
    view = patch_permute(cells, seed)
    return replace(view, name=view.name.replace("patch", "pixel"))


def skew(slope: float, cells: int) -> View:
    """Column j rolled down by round(slope j) of `cells` cells; what leaves below comes in above."""
    if cells < 2 or not math.isfinite(slope):
        raise ValueError(f"view 'skew:{slope:g}:{cells}': wanted a finite slope and at least 2 cells a side")
    if abs(slope) > cells:  # it shears no further, and where the columns land becomes a matter of rounding
        raise ValueError(f"view 'skew:{slope:g}:{cells}': wanted a slope of -{cells} to {cells}, as many as there are cells")
    rolls = [math.floor(slope * column + 0.5) for column in range(cells)]
    source = [(row - rolls[column]) % cells * cells + column for row in range(cells) for column in range(cells)]
    written = f"{slope:g}" if float(f"{slope:g}") == slope else repr(slope)  # the name must give the same view again
    return View(f"skew:{written}:{cells}", cells, tuple(source), (0,) * cells**2)


def inner_circle(cells: int) -> View:
    """The disc that touches the sides (cells whose centre is in it) turned by half a turn; the corners stay."""
    if cells < 4:
        raise ValueError(f"view 'inner_circle:{cells}': wanted at least 4 cells a side, else the disc is the square")
    source, turns = [], []
    for k in range(cells**2):
        row, column = divmod(k, cells)
        inside = (2 * row - cells + 1) ** 2 + (2 * column - cells + 1) ** 2 <= cells**2
        source.append(cells**2 - 1 - k if inside else k)
        turns.append(2 if inside else 0)
    return View(f"inner_circle:{cells}", cells, tuple(source), tuple(turns))


def square_hinge(cells: int = 4) -> View:
    """`cells` x `cells` squares, hinged at their corners, each turned by a quarter: those of one colour of a chessboard counter-clockwise,
    of the other clockwise."""
    if cells < 2:
        raise ValueError(f"view 'square_hinge:{cells}': wanted at least 2 squares a side")
    turns = [3 if (k // cells + k % cells) % 2 else 1 for k in range(cells**2)]
    return View(f"square_hinge:{cells}", cells, tuple(range(cells**2)), tuple(turns))


def jigsaw(pieces: int, seed: int, cells: int) -> View:
    """A jigsaw of `pieces` x `pieces` interlocking pieces on `cells` x `cells` cells, put together in another, seeded order: each piece in
    the place of another of its shape, turned as it must be to fit. No turn of the whole explains more than half of it.

    Every second piece has knobs to the left and right and holes above and below, the others the reverse: so all corners are of one shape,
    and all inner pieces.
    """
    name = f"jigsaw:{pieces}:{seed}:{cells}"
    if pieces < 2 or pieces % 2:
        raise ValueError(f"view '{name}': wanted an even number of pieces a side, so that each has others of its shape: jigsaw:2, jigsaw:4")
    if cells % pieces or cells < 3 * pieces:
        wanted = [pieces * k for k in (3, 4, 8)]
        raise ValueError(
            f"view '{name}': {pieces} x {pieces} pieces need a multiple of {pieces} cells a side, {wanted[0]} or more to interlock "
            f"({wanted[0]}, {wanted[1]}, {wanted[2]}...), got {cells}. Use a larger picture, or fewer pieces: jigsaw:2"
        )
    shapes, generator = _jigsaw_shapes(pieces, cells // pieces), torch.Generator().manual_seed(seed)
    turned = [rotation.refine(cells).source for rotation in D4[:4]]
    while True:
        source, turns = _shuffled(shapes, pieces, cells, generator)
        if all(sum(a == b for a, b in zip(source, other)) <= cells**2 / 2 for other in turned):
            return View(name, cells, tuple(source), tuple(turns))


def _shuffled(shapes: list[Shape], pieces: int, cells: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """(source, turns) of a view that takes each piece to the place of another of its shape."""
    source, turns, placed = [-1] * cells**2, [0] * cells**2, set()
    for first in range(pieces**2):
        if first in placed:
            continue
        alike = [k for k in range(pieces**2) if _turns_onto(shapes[first], shapes[k])]
        order = [alike[k] for k in torch.randperm(len(alike), generator=generator).tolist()]
        for piece, place in zip(order, order[1:] + order[:1]):  # in a circle: none stays where it is
            fitting = _turns_onto(shapes[piece], shapes[place])
            element = fitting[int(torch.randint(len(fitting), (), generator=generator))]
            for row, column in shapes[place]:
                there = _cell(place, (row, column), pieces, cells)
                source[there] = _cell(piece, turned_place((row, column), element), pieces, cells)
                turns[there] = element
        placed.update(alike)
    return source, turns


Shape = frozenset[tuple[int, int]]
"""A piece's cells by their distance, down and right, from the centre of its square, in half cells."""


def _jigsaw_shapes(pieces: int, side: int) -> list[Shape]:
    """The shapes of a jigsaw's pieces, row by row, of squares of `side` cells."""
    middle = side - 1
    square = {(2 * row - middle, 2 * column - middle) for row in range(side) for column in range(side)}
    # of the neighbour to the right: down and right of the middle of the edge between, in half cells
    knob = {place for place in square if _in_knob(abs(place[0]), place[1] + middle + 1, side)}
    shapes = []
    for number in range(pieces**2):
        row, column = divmod(number, pieces)
        shape = set(square)
        for quarter, (down, right) in enumerate([(0, 1), (-1, 0), (0, -1), (1, 0)]):  # counter-clockwise from the right
            if not (0 <= row + down < pieces and 0 <= column + right < pieces):
                continue
            if (row + column + quarter) % 2 == 0:
                shape |= {turned_place((r, c + 2 * side), -quarter) for r, c in knob}
            else:
                shape -= {turned_place((r, c), -quarter - 2) for r, c in knob}
        shapes.append(frozenset(shape))
    return shapes


def _in_knob(across: int, out: int, side: int) -> bool:
    """Whether a cell is of the knob on an edge of `side` cells: `across` from its middle, `out` of the piece, in half cells. A disc on a
    neck."""
    radius, neck = 0.4 * side, 0.24 * side
    return across**2 + (out - radius) ** 2 <= radius**2 or (across <= neck and out <= radius)


def _turns_onto(shape: Shape, place: Shape) -> list[int]:
    """The quarter turns, counter-clockwise, that turn a piece into the shape of a place."""
    return [element for element in range(4) if frozenset(turned_place(cell, element) for cell in place) == shape]


def _cell(piece: int, place: tuple[int, int], pieces: int, cells: int) -> int:
    """The number of the cell at a place (see `Shape`) of a piece."""
    side = cells // pieces
    row, column = (side * each + (side - 1 + offset) // 2 for each, offset in zip(divmod(piece, pieces), place))
    return row * cells + column


MOST_CELLS = 1024  # a side, where the latents are not finer
SIDE = object()  # a default: the side of the latents


@dataclass(frozen=True)
class Form:
    """How a view with parameters is asked for: `name:...`, each parameter's name, type and default."""

    make: Callable[..., View]
    parameters: Sequence[tuple[str, type, Any]]

    def text(self, name: str) -> str:
        """`patch_permute[:N[:SEED]]`."""
        return name + "".join(f"[:{each}" for each, _, _ in self.parameters) + "]" * len(self.parameters)


FORMS = {
    "patch_permute": Form(patch_permute, [("N", int, 4), ("SEED", int, 0)]),
    "pixel_permute": Form(pixel_permute, [("N", int, SIDE), ("SEED", int, 0)]),
    "jigsaw": Form(jigsaw, [("PIECES", int, 4), ("SEED", int, 0), ("N", int, SIDE)]),
    "inner_circle": Form(inner_circle, [("N", int, SIDE)]),
    "square_hinge": Form(square_hinge, [("N", int, 4)]),
    "skew": Form(skew, [("SLOPE", float, 1.5), ("N", int, SIDE)]),
}
SIMPLE = {view.name: view for view in (*D4, NEGATE)}
NO_VIEWS = {  # by what their names begin with: why they cannot be sampled
    "rescale": "it is not invertible and changes the noise's statistics. It is a transform for training (equivariance.rescale_prob)",
    "rotate_": "a turn by an odd angle takes each pixel from several: the noise loses variance between pixels, neighbours become alike, "
    "and the UNet sees noise that it never saw. Use rotate_90, rotate_180, rotate_270 or inner_circle",
    "blur": "it takes the high frequencies from the noise, which the UNet then takes for a finished picture. To show one prompt from afar "
    "and another from near, use components in place of views: hybrid:0.06 (sample.py --components)",
    "white_balance": "it scales the noise of each channel, so that its level is not that of the timestep. negate is the one change of "
    "colours that keeps it",
    "stretch": "it is not orthogonal: neighbouring noise becomes alike, or is lost. Use skew",
}


def parse_view(text: str, side: int | None = None) -> View:
    """The view that a name stands for: `rotate_90`, `patch_permute:4`, `patch_permute:4:7` (seed 7), `flip@rotate_90`.

    side: of the latents, for views as fine as they are (`inner_circle` is then `inner_circle:64`).
    Raises: ValueError with the nearest names for an unknown one, with the form wanted for bad parameters, and with the reason for what
    is no view.
    """
    *others, last = text.split("@")
    if others:
        view = parse_view(last, side)
        for other in map(partial(parse_view, side=side), reversed(others)):
            _check_cells(text, math.lcm(other.cells, view.cells), side)
            view = other @ view
        return view
    name, *parameters = text.split(":")
    name = ALIASES.get(name, name)
    if name in SIMPLE:
        if parameters:
            raise ValueError(f"view '{name}' takes no parameters, got '{text}'")
        return SIMPLE[name]
    if name in FORMS:
        return FORMS[name].make(*_parameters(text, name, parameters, side))
    for start, reason in NO_VIEWS.items():
        if name.startswith(start) and (start != "rotate_" or re.fullmatch(r"rotate_-?[\d.]+", name)):
            raise ValueError(f"'{text}' is no view for sampling: {reason}")
    names = [*SIMPLE, *ALIASES, *FORMS]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known views: {', '.join(names)}"
    raise ValueError(f"unknown view '{text}': {hint}")


def _parameters(text: str, name: str, given: Sequence[str], side: int | None) -> list[int | float]:
    """The values of a view's parameters. Raises ValueError with the form wanted."""
    form = FORMS[name]
    error = ValueError(f"view '{text[:200]}': wanted {form.text(name)}, such as {EXAMPLES[name]}")
    if len(given) > len(form.parameters):
        raise error
    values = []
    for (parameter, kind, default), word in zip(form.parameters, [*given, *[None] * len(form.parameters)]):
        if word is not None:
            if not re.fullmatch(r"\d+" if kind is int else r"[a-z\d.+-]+", word, re.ASCII):
                raise error
            try:
                values.append(kind(word))
            except ValueError:
                raise error from None
            if parameter == "SEED" and values[-1] >= 2**63:
                raise ValueError(f"view '{text}': SEED is {word}, wanted 0 to 2^63 - 1")
            if parameter == "N":
                _check_cells(text, values[-1], side)
        elif default is SIDE and side is None:
            raise ValueError(f"view '{text}' is as fine as the latents that it acts on, which are not known here: give its {parameter}, "
                             f"{form.text(name)}")  # fmt: skip
        else:
            values.append(side if default is SIDE else default)
    return values


def _check_cells(text: str, cells: int, side: int | None) -> None:
    """Raises ValueError for a grid that no latents are as fine as: to write it down could take all the memory."""
    if cells > (most := side or MOST_CELLS):
        has = "as many as the latents have" if side else "and no more than the latents have"
        raise ValueError(f"view '{text[:200]}' is of {str(cells)[:40]} x {str(cells)[:40]} cells: wanted at most {most} a side, {has}")


EXAMPLES = {
    "patch_permute": "patch_permute:4", "pixel_permute": "pixel_permute:64", "jigsaw": "jigsaw:4:0:64", "inner_circle": "inner_circle:64",
    "square_hinge": "square_hinge:4", "skew": "skew:1.5:64",
}  # fmt: skip
