"""Figures are made of finite numbers: a NaN ends in a mean, in an arg max, or in a library that dies of it, far from its cause."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def finite(what: str, values: Tensor, names: Sequence[object] | None = None) -> Tensor:
    """values [B, ...], if all are finite. names: of the pictures [B]; None is their numbers, from 0.

    Raises ValueError that says how many pictures are not, and names the first.
    """
    rows = values.reshape(len(values), -1).isfinite().all(1) if values.numel() else torch.ones(len(values), dtype=torch.bool)
    if bool(rows.all()):
        return values
    broken = (~rows).nonzero()[:, 0].tolist()
    first = broken[0] if names is None else names[broken[0]]
    raise ValueError(f"{what} hold NaN or infinity for {len(broken)} of {len(values)} pictures, first for picture {first}")
