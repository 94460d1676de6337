"""Pictures that a judge learns from besides plain letters: what is no letter although it has the strokes of some, and letters as models
draw them. Each is a pure function; `judge_training` draws which of them a training picture becomes, and how.

Pictures x are [3, H, W] in [-1, 1], of a letter in one colour on a ground of another; ink is [H, W] in [0, 1]. A half of a letter, or two
halves joined, may be a letter again (half an O is a C, of an E and a T an F is made), by face. `KEPT` and `JOINED` name those that readers
of several faces call none; all others stay out of training.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

KEPT = {"left": "X", "right": "B", "top": "AUZ"}  # side that stays: letters of which it is no letter
JOINED = {  # side of the first: {first letters: second letters whose other half makes no letter of it}
    "left": {"S": "HMN", "X": "CGLQSU", "M": "CGQS"},
    "top": {
        "W": "CEGLQSZ", "VXY": "CGOQU", "T": "CGMOQUW", "Z": "HMW", "M": "ELSZ", "S": "HMNRW", "CGOQ": "MTVW", "BPR": "W", "EF": "MVW",
    },
}  # fmt: skip
MIXED_WEIGHTS = (0.4, 0.6)  # of the first of two letters that make none
GHOST_WEIGHTS = (0.05, 0.2)  # of a second one behind a letter, which stays that letter; between them readers disagree
CONTRASTS = (0.35, 0.8)
BLURS = (0.5 / 64, 1.5 / 64)  # standard deviations, of the side
SHARED_INK = 0.55  # a letter of which another covers more than this reads as a part of it (an F in an E, an O in a Q)


def joins(side: str, first: str, second: str) -> bool:
    """Whether the half of a first letter on a side, with the other half of a second, is no letter."""
    return any(first in firsts and second in seconds for firsts, seconds in JOINED[side].items())


def colours(x: Tensor) -> tuple[Tensor, Tensor]:
    """([3] the ground's colour, [3] the letter's) of a picture: the median of its edge, and the colour farthest from it."""
    edge = torch.cat([x[:, 0], x[:, -1], x[:, :, 0], x[:, :, -1]], 1)
    ground = edge.median(1).values
    far = (x - ground[:, None, None]).square().sum(0).flatten().argmax()
    return ground, x.flatten(1)[:, far]


def ink_of(x: Tensor) -> Tensor:
    """[H, W] in [0, 1]: how far each pixel is from the ground's colour on the way to the letter's; 0 in a picture of one colour."""
    ground, letter = colours(x)
    way = letter - ground
    return ((x - ground[:, None, None]) * way[:, None, None]).sum(0).div(way.square().sum().clamp_min(1e-6)).clamp(0, 1)


def painted(ink: Tensor, like: Tensor) -> Tensor:
    """[3, H, W]: ink in the colours of the picture `like`."""
    ground, letter = (colour[:, None, None] for colour in colours(like))
    return ground + ink * (letter - ground)


def kept(ink: Tensor, side: str) -> Tensor:
    """[H, W]: of a letter's ink that half which lies to one side of its middle: left, right, top or bottom."""
    return ink * _half(ink, side)


def joined(first: Tensor, second: Tensor, side: str) -> Tensor:
    """[H, W]: of a first letter's ink the half on a side, and beyond its middle the second's, stretched to the size of the first."""
    rows, columns = _box(first)
    size = rows.stop - rows.start, columns.stop - columns.start
    fitted = torch.zeros_like(first)
    fitted[rows, columns] = F.interpolate(second[_box(second)][None, None], size, mode="bilinear", antialias=True)[0, 0]
    return torch.where(_half(first, side) > 0, first, fitted)


def mixed(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """[H, W]: the average of two inks, the first's weight in [0, 1]."""
    return weight * first + (1 - weight) * second


def hides(first: Tensor, second: Tensor) -> bool:
    """Whether two letters lie on each other so that their mixture reads as one of them: most of one's ink is within a pixel or so of
    the other's."""

    def within(ink: Tensor, other: Tensor) -> float:
        reach = 2 * max(1, len(other) // 48) + 1
        near = F.max_pool2d(other[None], reach, 1, reach // 2)[0]
        return float((ink * near).sum() / ink.sum().clamp_min(1e-6))

    return max(within(first, second), within(second, first)) > SHARED_INK


def faded(x: Tensor, contrast: float) -> Tensor:
    """[3, H, W]: the picture with its letter nearer to the ground, by a factor in [0, 1]."""
    ground = colours(x)[0][:, None, None]
    return ground + contrast * (x - ground)


def blurred(x: Tensor, deviation: float) -> Tensor:
    """[3, H, W]: the picture under a Gaussian blur, its standard deviation as a fraction of the side."""
    sigma = deviation * x.shape[-1]
    return gaussian_blur(x, 2 * math.ceil(3 * sigma) + 1, sigma)


def _half(ink: Tensor, side: str) -> Tensor:
    """[H, W]: 1 to one side of the middle of what a letter's ink takes up."""
    rows, columns = _box(ink)
    row, column = (rows.start + rows.stop) // 2, (columns.start + columns.stop) // 2
    mask = torch.zeros_like(ink)
    mask[{"top": slice(row), "bottom": slice(row, None)}.get(side, slice(None)),
         {"left": slice(column), "right": slice(column, None)}.get(side, slice(None))] = 1  # fmt: skip
    return mask


def _box(ink: Tensor) -> tuple[slice, slice]:
    """The rows and columns that hold ink; all where none do."""
    held = ink > 0.5
    if not held.any():
        return slice(0, ink.shape[0]), slice(0, ink.shape[1])
    rows, columns = (held.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
