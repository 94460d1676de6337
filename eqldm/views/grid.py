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

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# Element k + 4 m of D4: mirror left-right if m, then turn counter-clockwise by k quarter turns.
D4_NAMES = ("identity", "rotate_90", "rotate_180", "rotate_270", "mirror", "transpose", "flip", "anti_transpose")
ALIASES = {"rotate_ccw": "rotate_90", "rotate_cw": "rotate_270"}

Group = Literal["none", "half_turns", "rectangle", "rotations", "d4"]
GROUPS: dict[str, tuple[int, ...]] = {
    "none": (0,),
    "half_turns": (0, 2),
    "rectangle": (0, 2, 4, 6),  # the symmetries that do not swap height and width
    "rotations": (0, 1, 2, 3),
    "d4": tuple(range(8)),
}


def turn(x: Tensor, element: int) -> Tensor:
    """`x` [..., H, W] turned by an element of D4 (see `D4_NAMES`). Odd turns swap H and W."""
    x = x.flip(-1) if element >= 4 else x
    return x.rot90(element % 4, (-2, -1)) if element % 4 else x


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
                f"view '{self.name}' needs sides divisible by {self.cells}, got {height} x {width}{where}. "
                f"Use a size that its grid divides, or a coarser grid"
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
    out = torch.stack([turn(pixels[origin], element) for origin, element in zip(view.source, view.turns)])
    return out.unflatten(0, (n, n)).transpose(1, 2).reshape(-1).to(device)


IDENTITY = View("identity")
D4 = tuple(View(name, turns=(element,)) for element, name in enumerate(D4_NAMES))
NEGATE = View("negate", sign=-1)


def patch_permute(cells: int, seed: int = 0) -> View:
    """A seeded permutation of `cells` x `cells` patches, none of them turned."""
    if cells < 2:
        raise ValueError(f"view 'patch_permute:{cells}': wanted at least 2 cells a side")
    generator = torch.Generator().manual_seed(seed)
    source = torch.randperm(cells**2, generator=generator).tolist()
    return View(f"patch_permute:{cells}:{seed}" if seed else f"patch_permute:{cells}", cells, tuple(source), (0,) * cells**2)


def parse_view(text: str) -> View:
    """The view that a name stands for: `rotate_90`, `patch_permute:4`, `patch_permute:4:7` (seed 7), `flip@rotate_90`.

    Raises: ValueError with the nearest names for an unknown one, with the form wanted for bad parameters, and with the
    reason for `rescale`, which is no view.
    """
    if "@" in text:
        first, rest = text.split("@", 1)
        return parse_view(first) @ parse_view(rest)
    name, *parameters = text.split(":")
    name = ALIASES.get(name, name)
    if name == "rescale":
        raise ValueError(
            "'rescale' is no view for sampling: it is not invertible and changes the noise's statistics. It is a "
            "transform for training (equivariance.rescale_prob)"
        )
    if name == "patch_permute":
        if not 1 <= len(parameters) <= 2 or not all(p.isdecimal() for p in parameters):
            raise ValueError(f"view '{text}': wanted patch_permute:N or patch_permute:N:SEED, such as patch_permute:4")
        return patch_permute(*map(int, parameters))
    known = {view.name: view for view in (*D4, NEGATE)}
    if name not in known:
        names = [*known, *ALIASES, "patch_permute"]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known views: {', '.join(names)}"
        raise ValueError(f"unknown view '{text}': {hint}")
    if parameters:
        raise ValueError(f"view '{name}' takes no parameters, got '{text}'")
    return known[name]


@dataclass(frozen=True)
class Rescale:
    """Resize by (height, width) factors: EQ-VAE's scaling. Training and metric only.

    mode: bicubic with antialiasing, or EQ-VAE's plain bilinear.

    Not invertible and not orthogonal, so it is not a `View`: it would change the statistics of the noise.
    Source: EQ-VAE, arXiv 2502.09509, section 3.3.
    """

    height: float
    width: float
    mode: Literal["bicubic", "bilinear"] = "bicubic"

    def __call__(self, x: Tensor) -> Tensor:
        """`x` [B, C, H, W] at the size (H * height, W * width), which must be whole. Raises ValueError if not."""
        size = (x.shape[-2] * self.height, x.shape[-1] * self.width)
        whole = tuple(round(side) for side in size)
        if any(abs(side - near) > 1e-6 or near < 1 for side, near in zip(size, whole)):
            raise ValueError(f"rescale {self.height:g} x {self.width:g} of {tuple(x.shape[-2:])} gives {size}: wanted whole sides")
        antialias = self.mode == "bicubic"
        return F.interpolate(x.float(), whole, mode=self.mode, antialias=antialias, align_corners=False).to(x.dtype)


@dataclass(frozen=True)
class Transform:
    """What training applies to one sample's picture and latent alike: an optional rescaling, then a view."""

    view: View = IDENTITY
    rescale: Rescale | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The transform of `x` [B, C, H, W]."""
        return self.view(x if self.rescale is None else self.rescale(x))


def transform_each(transforms: Sequence[Transform], x: Tensor) -> Tensor:
    """Each sample of `x` [B, C, H, W] under its own transform. All transforms must give one shape."""
    shared = transforms[0].rescale
    if any(t.rescale != shared for t in transforms):
        raise ValueError("transform_each: the samples of a group must share their rescaling")
    x = x if shared is None else shared(x)
    return torch.stack([t.view(sample) for t, sample in zip(transforms, x, strict=True)])


def draw_transform(
    generator: torch.Generator,
    group: Group = "d4",
    rescale: Rescale | None = None,
    permute_prob: float = 0.0,
    permute_cells: Sequence[int] = (2, 4),
    negate_prob: float = 0.0,
) -> Transform:
    """A transform for one sample: uniform over `group`, with chances of a patch permutation and of a negation.

    `rescale` is given, not drawn: samples that are decoded together share it (see `draw_rescale`).
    """
    view = D4[_choose(GROUPS[group], generator)]
    if _happens(permute_prob, generator):
        seed = int(torch.randint(2**31, (), generator=generator))
        view = view @ patch_permute(_choose(permute_cells, generator), seed)
    if _happens(negate_prob, generator):
        view = NEGATE @ view
    return Transform(view, rescale)


def draw_rescale(generator: torch.Generator, side: int, smallest: float = 0.25, anisotropic: bool = False) -> Rescale:
    """A down-scaling that keeps a latent of `side` cells whole: factors k / side, uniform over [smallest, 1).

    Isotropic unless `anisotropic`, which draws height and width apart.
    """
    low = max(1, math.ceil(smallest * side - 1e-9))
    if low >= side:
        raise ValueError(f"rescale: no whole size between {smallest:g} x {side} and {side} cells; use larger pictures")
    height, width = (int(torch.randint(low, side, (), generator=generator)) / side for _ in range(2))
    return Rescale(height, width if anisotropic else height)


def _choose(options: Sequence[int], generator: torch.Generator) -> int:
    return options[int(torch.randint(len(options), (), generator=generator))]


def _happens(probability: float, generator: torch.Generator) -> bool:
    return float(torch.rand((), generator=generator)) < probability
