"""Components: parts of a picture that add up to it, such as its low and its high frequencies. One prompt each, in place of views.

They are projections, or near them, not permutations: a part cannot be undone, and what is summed are the parts of several estimates of one
noisy picture, not one picture in several views. Source: Factorized Diffusion, arXiv 2404.11615, section 3.

Which act on latents? A blur is a mean of shifted copies: a decoder that commutes with shifts, and is linear, would commute with it. Ours
commutes with turns and patch permutations, and is not linear, so for blurs this holds roughly; of colours latents know nothing. Those act
on pictures alone (a pixel model, or blend=pixels).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Component:
    """`component(x)` is the part of x [..., C, H, W]. name: of the part.  in_latents: whether it means anything there."""

    name: str
    part: Callable[[Tensor], Tensor]
    in_latents: bool = True

    def __call__(self, x: Tensor) -> Tensor:
        return self.part(x)


def hybrid(*sigmas: float) -> list[Component]:
    """Bands from the low to the high frequencies, parted by Gaussian blurs of falling standard deviations, in picture sides: a hybrid image
    (seen from afar, from near), with two sigmas a triple one."""
    if not sigmas or list(sigmas) != sorted(set(sigmas), reverse=True) or not all(0 < sigma < 0.5 for sigma in sigmas):
        raise ValueError(f"components 'hybrid': got {sigmas}, wanted falling standard deviations between 0 and .5 of the picture's side")
    names = ["low", "high"] if len(sigmas) == 1 else ["low", *(f"middle_{k}" for k in range(1, len(sigmas))), "high"]
    names = ["low", "middle", "high"] if len(sigmas) == 2 else names
    edges = [None, *sigmas, None]

    def band(wide: float | None, narrow: float | None) -> Callable[[Tensor], Tensor]:
        return lambda x: (x if narrow is None else blur(x, narrow)) - (0 if wide is None else blur(x, wide))

    return [Component(name, band(wide, narrow)) for name, wide, narrow in zip(names, edges, edges[1:])]


def colour() -> list[Component]:
    """Grey, the mean over the channels, and the colour that is left: seen by day and by night."""
    return [
        Component("grey", lambda x: x.mean(-3, keepdim=True).expand_as(x), in_latents=False),
        Component("colour", lambda x: x - x.mean(-3, keepdim=True), in_latents=False),
    ]


def motion_blur(length: float, degrees: float = 0.0) -> list[Component]:
    """What is seen while it moves, the mean along a line of `length` picture sides (0 degrees: to the right), and what only then when it
    stands still."""
    if not 0 < length < 1:
        raise ValueError(f"components 'motion': got length {length:g}, wanted above 0, below 1 of the picture's side")
    return [
        Component("moving", lambda x: line_blur(x, length, degrees)),
        Component("still", lambda x: x - line_blur(x, length, degrees)),
    ]


def blur(x: Tensor, sigma: float) -> Tensor:
    """x [..., H, W] under a Gaussian of `sigma` picture sides, mirrored at the edges: a constant stays what it is."""
    down, right = (_gaussian(side, sigma, x.device).to(x) for side in x.shape[-2:])
    return down @ x @ right.mT


@lru_cache(maxsize=16)
def _gaussian(side: int, sigma: float, device: torch.device) -> Tensor:
    """[side, side] float64, each row the shares of all pixels in a blurred one."""
    reach = math.ceil(4 * sigma * side)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    shares = torch.exp(-0.5 * (offsets / (sigma * side)).square())
    places = (torch.arange(side)[:, None] + torch.arange(-reach, reach + 1)) % (2 * side)
    places = torch.where(places < side, places, 2 * side - 1 - places)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (shares / shares.sum()).expand(side, -1).contiguous()).to(device)


def line_blur(x: Tensor, length: float, degrees: float) -> Tensor:
    """x [..., H, W] averaged along a line through each pixel, mirrored at the edges."""
    side = x.shape[-1]
    count = max(2, 2 * math.ceil(length * side))
    offsets = torch.linspace(-0.5, 0.5, count, dtype=torch.float64) * length * side
    down, right = -offsets * math.sin(math.radians(degrees)), offsets * math.cos(math.radians(degrees))
    reach = math.ceil(length * side / 2) + 1
    kernel = torch.zeros(2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
    for a, b in zip(down.tolist(), right.tolist()):  # each point of the line shared by its four neighbours
        row, column = math.floor(a), math.floor(b)
        for i, share_i in ((row, row + 1 - a), (row + 1, a - row)):
            for j, share_j in ((column, column + 1 - b), (column + 1, b - column)):
                kernel[reach + i, reach + j] += share_i * share_j
    flat = x.reshape(-1, 1, *x.shape[-2:])
    mirrored = [min(reach, side - 1) for side in x.shape[-2:]]
    padded = F.pad(flat, [mirrored[1]] * 2 + [mirrored[0]] * 2, mode="reflect")
    padded = F.pad(padded, [reach - mirrored[1]] * 2 + [reach - mirrored[0]] * 2, mode="replicate")
    height, width = x.shape[-2:]
    total = torch.zeros_like(flat)
    for i, j in kernel.nonzero().tolist():  # a line has few points: cheaper than a convolution with the square about it
        total += float(kernel[i, j] / kernel.sum()) * padded[..., i : i + height, j : j + width]
    return total.reshape(x.shape)


FORMS = {"hybrid": "hybrid:SIGMA[:SIGMA]", "colour": "colour", "motion": "motion:LENGTH[:DEGREES]"}


def parse_components(text: str) -> list[Component]:
    """The components that a name stands for: `hybrid:0.04`, `hybrid:0.08:0.03` (three bands), `colour`, `motion:0.3:45`.

    Raises ValueError with the form wanted.
    """
    name, *given = text.split(":")
    try:
        numbers = [float(word) for word in given]
    except ValueError:
        numbers = [math.nan]
    counts = {"hybrid": (1, 2), "colour": (0, 0), "motion": (1, 2)}
    if name not in FORMS:
        raise ValueError(f"unknown components '{text}': wanted {', '.join(FORMS.values())}")
    if not counts[name][0] <= len(numbers) <= counts[name][1] or not all(map(math.isfinite, numbers)):
        raise ValueError(f"components '{text}': wanted {FORMS[name]}")
    make: dict[str, Callable[..., list[Component]]] = {"hybrid": hybrid, "colour": colour, "motion": motion_blur}
    return make[name](*numbers)


def check_components(components: Sequence[Component], in_latents: bool) -> None:
    """Raises ValueError where components that need a picture are to act on latents."""
    if in_latents and (needy := [component.name for component in components if not component.in_latents]):
        raise ValueError(
            f"components {', '.join(needy)}: latents know nothing of colours. Give blend=pixels (sample.py --blend pixels), which takes "
            "the picture apart at each step, or a pixel model"
        )
