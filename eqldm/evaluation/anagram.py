"""Does it read as both? Letters sampled plain and as anagrams, read by the judge.

Ambigramability: the share of pictures that the judge reads right in *both* views. Source: arXiv 2306.12049, section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from eqldm.anagram.sampling import Sampler
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.views import View


@dataclass(frozen=True)
class Reading:
    """Sampled pictures [N, 3, H, W] and what the judge read: wanted and read are [views, N] label numbers."""

    pictures: Tensor
    wanted: Tensor
    read: Tensor

    @property
    def right(self) -> Tensor:
        """[views, N] bool."""
        return self.wanted == self.read

    def of(self, numbers: Tensor) -> Reading:
        """That of these pictures alone, in this order."""
        return Reading(self.pictures[numbers], self.wanted[:, numbers], self.read[:, numbers])


def every_pair() -> Tensor:
    """[676, 2] label numbers: every ordered pair of letters, of equal ones too."""
    return torch.cartesian_prod(torch.arange(len(LETTERS)), torch.arange(len(LETTERS)))


def letter_pairs(count: int, seed: int = 0) -> Tensor:
    """[2, count] label numbers: a seeded draw from all ordered pairs of different letters, without repeats while they last."""
    every = every_pair()
    every = every[every[:, 0] != every[:, 1]]
    generator = torch.Generator().manual_seed(seed)
    rounds = [every[torch.randperm(len(every), generator=generator)] for _ in range(-(-count // len(every)))]
    return torch.cat(rounds)[:count].T


def letter_prompts(wanted: Tensor) -> list[list[str]]:
    """For each view, each picture's prompt: "the letter A" of label numbers [views, N]."""
    return [[f"the letter {LETTERS[label]}" for label in labels] for labels in wanted.tolist()]


def read_letters(
    sampler: Sampler, judge: Judge, views: list[View], wanted: Tensor, batch_size: int = 64, seed: int = 0,
    on_step: Callable[[], None] | None = None, **options,
) -> Reading:  # fmt: skip
    """Samples picture k (its seed is seed + k) as letter wanted[i, k] in view i, and reads each view.

    wanted: [views, N]. options: as `Sampler.__call__` takes them.
    """
    parts = []
    for first in range(0, wanted.shape[1], batch_size):
        rows = wanted[:, first : first + batch_size]
        seeds = range(seed + first, seed + first + rows.shape[1])
        parts.append(sampler(letter_prompts(rows), views, seeds, on_step=on_step, **options))
    pictures = torch.cat(parts)
    read = torch.stack([judge(view(pictures)) for view in views])
    return Reading(pictures, wanted, read)


def generation_metrics(reading: Reading, quality: Callable[[Tensor], dict[str, float]]) -> dict[str, float]:
    """`generation/read_right`: the share of plainly sampled letters that the judge reads right; and their quality.

    quality: gives the metrics of pictures [N, 3, H, W]; see `quality_metrics`.
    """
    metrics = {"read_right": float(reading.right[0].float().mean()), **quality(reading.pictures)}
    return {f"generation/{name}": value for name, value in metrics.items()}


def anagram_metrics(view: View, reading: Reading, quality: Callable[[Tensor], dict[str, float]]) -> dict[str, float]:
    """`ambigramability`, and the share read right in the `upright` picture and in the `turned` one, and the quality of both."""
    upright, turned = reading.right.float()
    metrics = {"ambigramability": float((upright * turned).mean()), "upright": float(upright.mean()), "turned": float(turned.mean())}
    metrics |= {f"{name}_upright": value for name, value in quality(reading.pictures).items()}
    metrics |= {f"{name}_turned": value for name, value in quality(view(reading.pictures)).items()}
    return {f"anagram/{view.name}/{name}": value for name, value in metrics.items()}


def plain_letters(count: int, seed: int = 0) -> Tensor:
    """[1, count] label numbers, drawn alike: each letter in turn would lie farther apart than a draw does, and bias KID."""
    return torch.randint(len(LETTERS), (1, count), generator=torch.Generator().manual_seed(seed))
