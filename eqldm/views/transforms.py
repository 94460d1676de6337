"""What training and the metric apply to pictures and latents alike: views, drawn at random, and rescaling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from eqldm.views.grid import D4, IDENTITY, NEGATE, View
from eqldm.views.zoo import patch_permute

Group = Literal["none", "half_turns", "rectangle", "rotations", "d4"]
GROUPS: dict[str, tuple[int, ...]] = {
    "none": (0,),
    "half_turns": (0, 2),
    "rectangle": (0, 2, 4, 6),  # the symmetries that do not swap height and width
    "rotations": (0, 1, 2, 3),
    "d4": tuple(range(8)),
}


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
    if len(transforms) != len(x):
        raise ValueError(f"transform_each: got {len(transforms)} transforms for {len(x)} samples")
    rows: dict[View, list[int]] = {}  # samples of one view together: on a GPU each call costs as much as a batch's
    for row, transform in enumerate(transforms):
        rows.setdefault(transform.view, []).append(row)
    if len(rows) == 1:
        return transforms[0].view(x)
    order = torch.tensor([row for each in rows.values() for row in each]).to(x.device, non_blocking=True)
    parts = x.index_select(0, order).split([len(each) for each in rows.values()])
    return torch.cat([view(part) for view, part in zip(rows, parts)]).index_select(0, order.argsort())


def draw_transform(
    generator: torch.Generator,
    group: Group = "d4",
    rescale: Rescale | None = None,
    permute_prob: float = 0.0,
    permute_cells: Sequence[int] = (2, 4),
    negate_prob: float = 0.0,
    patch_turn_prob: float = 0.0,
    patch_turn_cells: Sequence[int] = (2, 4),
) -> Transform:
    """A transform for one sample: uniform over `group`, with chances of a patch permutation, of a negation, and of turning each patch for
    itself.

    patch_turn_cells: the permutations whose patches may be turned. A latent cell looks the same however it is turned, what it decodes to
    does not: patches must be of two latent cells a side or more.

    `rescale` is given, not drawn: samples that are decoded together share it (see `draw_rescale`).
    """
    view = D4[_choose(GROUPS[group], generator)]
    if _happens(permute_prob, generator):
        seed = int(torch.randint(2**31, (), generator=generator))
        view = view @ patch_permute(_choose(permute_cells, generator), seed)
    if _happens(negate_prob, generator):
        view = NEGATE @ view
    if view.cells in patch_turn_cells and _happens(patch_turn_prob, generator):
        turns = tuple(_choose(GROUPS[group], generator) for _ in view.source)
        view = view @ View("turned_patches", view.cells, tuple(range(view.cells**2)), turns)
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
