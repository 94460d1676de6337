"""Views: the invertible linear maps that a picture, a noisy latent and a noise estimate all understand.

A `View` permutes the cells of an n x n grid and turns each cell's content by one of the eight symmetries of the square
(D4), so one object acts on a 512 px picture and on its 64 x 64 latent: at every resolution that its grid divides. It is
a permutation of pixels, hence exactly invertible, linear and orthogonal (white noise stays white noise), and it commutes
with f x f pooling. The same views serve the equivariance loss, the metric and the sampler.

    view(x)           [..., H, W] -> [..., H, W]
    view.inverse(x)   undoes it exactly
    a @ b             first b, then a

Source: Visual Anagrams, arXiv 2311.17919, section 3.3 (views must be linear and keep the noise's statistics).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

# Element k + 4 m of D4: mirror left-right if m, then turn counter-clockwise by k quarter turns.
D4_NAMES = ("identity", "rotate_90", "rotate_180", "rotate_270", "mirror", "transpose", "flip", "anti_transpose")


def turn(x: Tensor, element: int) -> Tensor:
    """`x` [..., H, W] turned by an element of D4 (see `D4_NAMES`). Odd turns swap H and W."""
    x = x.flip(-1) if element >= 4 else x
    return x.rot90(element % 4, (-2, -1)) if element % 4 else x


def turned_place(place: tuple[int, int], element: int) -> tuple[int, int]:
    """Where a square turned by k quarter turns (rotations alone) takes the content of a place from: (down, right) of its centre."""
    down, right = place
    for _ in range(element % 4):
        down, right = right, -down
    return down, right


def _d4_tables() -> tuple[list[list[int]], list[int]]:
    """The product and inverse tables of D4, read off its action on four distinct corners."""
    corners = torch.arange(4).view(2, 2)
    act = [turn(corners, g).flatten().tolist() for g in range(8)]
    product = [[act.index(turn(turn(corners, b), a).flatten().tolist()) for b in range(8)] for a in range(8)]
    return product, [row.index(0) for row in product]


_PRODUCT, _INVERSE = _d4_tables()


@dataclass(frozen=True)
class View:
    """A grid view: output cell k is input cell `source[k]`, turned by `turns[k]`, times `sign`.

    name: how it was asked for, and how errors and file names call it.
    cells: n, the grid is n x n, numbered row by row.
    source: n * n cell numbers, each once.  turns: n * n elements of D4.  sign: 1, or -1 for `negate`.
    """

    name: str
    cells: int = 1
    source: tuple[int, ...] = (0,)
    turns: tuple[int, ...] = (0,)
    sign: int = 1

    def __post_init__(self):
        count = self.cells**2
        if sorted(self.source) != list(range(count)):
            raise ValueError(f"view '{self.name}': source must hold each of the {count} cells once, got {self.source}")
        if len(self.turns) != count or not set(self.turns) <= set(range(8)):
            raise ValueError(f"view '{self.name}': turns must be {count} numbers from 0 to 7, got {self.turns}")
        if self.sign not in (1, -1):
            raise ValueError(f"view '{self.name}': sign must be 1 or -1, got {self.sign}")

    def __call__(self, x: Tensor) -> Tensor:
        """The view of `x` [..., H, W]. Raises ValueError where the grid does not divide H and W."""
        self.check(*x.shape[-2:])
        if self.cells == 1:
            out = turn(x, self.turns[0])
        else:
            index = _pixel_source(self, *x.shape[-2:], x.device)
            out = x.flatten(-2)[..., index].unflatten(-1, x.shape[-2:])
        return out if self.sign == 1 else -out

    def check(self, height: int, width: int, where: str = "") -> None:
        """Raises ValueError, which says what would fit, unless the view acts on a grid of this height and width."""
        if height % self.cells or width % self.cells:
            raise ValueError(
                f"view '{self.name}' needs sides divisible by {self.cells} ({self.cells}, {2 * self.cells}, {3 * self.cells}...), got "
                f"{height} x {width}{where}. Use a size that its grid divides, or a coarser grid"
            )
        if height != width and any(element % 2 for element in self.turns):
            raise ValueError(f"view '{self.name}' swaps height and width: it needs a square, got {height} x {width}{where}")

    @cached_property
    def inverse(self) -> View:
        """The view that undoes this one exactly."""
        source, turns = [0] * self.cells**2, [0] * self.cells**2
        for k, (origin, element) in enumerate(zip(self.source, self.turns)):
            source[origin], turns[origin] = k, _INVERSE[element]
        if (tuple(source), tuple(turns)) == (self.source, self.turns):
            return self
        name = D4_NAMES[turns[0]] if self.name in D4_NAMES else f"inverse({self.name})"
        return View(name, self.cells, tuple(source), tuple(turns), self.sign)

    def __matmul__(self, other: View) -> View:
        """`(a @ b)(x) == a(b(x))`, on the coarsest grid that both grids divide."""
        cells = math.lcm(self.cells, other.cells)
        a, b = self.refine(cells), other.refine(cells)
        source = tuple(b.source[k] for k in a.source)
        turns = tuple(_PRODUCT[g][b.turns[k]] for g, k in zip(a.turns, a.source))
        return View(f"{self.name}@{other.name}", cells, source, turns, self.sign * other.sign)

    def refine(self, cells: int) -> View:
        """The same map, written on a finer grid of `cells` x `cells`."""
        if cells == self.cells:
            return self
        self.check(cells, cells)
        turns = torch.tensor(self.turns).view(self.cells, self.cells)
        for dim in (0, 1):
            turns = turns.repeat_interleave(cells // self.cells, dim)
        index = _pixel_source(self, cells, cells, torch.device("cpu"))
        return View(self.name, cells, tuple(index.tolist()), tuple(turns.flatten().tolist()), self.sign)


@lru_cache(maxsize=32)  # a training run draws permutations without end: keep few
def _pixel_source(view: View, height: int, width: int, device: torch.device) -> Tensor:
    """[H * W] int64: the flat input pixel that each flat output pixel takes."""
    n = view.cells
    pixels = torch.arange(height * width).view(n, height // n, n, width // n).transpose(1, 2).flatten(0, 1)
    out, turns = pixels[list(view.source)], torch.tensor(view.turns)
    for element in turns.unique().tolist():
        out[turns == element] = turn(out[turns == element], element)
    return out.unflatten(0, (n, n)).transpose(1, 2).reshape(-1).to(device)


IDENTITY = View("identity")
D4 = tuple(View(name, turns=(element,)) for element, name in enumerate(D4_NAMES))
NEGATE = View("negate", sign=-1)
