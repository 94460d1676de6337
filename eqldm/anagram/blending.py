"""Anagrams from latents that do not turn with the picture: the views are blended in picture space, at each step.

The known way around an autoencoder that is not equivariant, and what an equivariant one saves: each view has latents of its
own; at each step the clean estimate of every view is decoded, turned back, averaged with the others, turned again and encoded
again. A decoding and two encodings for each view and step; with `Options.time_travel`, as LookingGlass does it, for each time a step is
done. Sources: LookingGlass, arXiv 2504.08902; SyncTweedies, arXiv 2403.14370. LookingGlass blends Laplacian pyramids, for views that
resample the picture; ours are permutations of pixels, and their mean is plain.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from eqldm.anagram.denoiser import Denoiser, Guidance
from eqldm.diffusion.objective import Objective
from eqldm.model_folder import decode, encode
from eqldm.views import View


def blended_in_pixels(guided: Guidance, views: Sequence[View], vae: AutoencoderKL, objective: Objective) -> Denoiser:
    """A denoiser of the latents of all views, [N B, C, h, w], view by view, each in its own orientation.

    What re-encoding loses of a view's own estimate, z - E(D(z)), is added back to what it is given: otherwise the autoencoder's
    error would enter at each step.
    """

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        times = t.expand(len(z))
        own = objective.clean(guided(split(z, views), t, range(len(views))).flatten(0, 1), z, times)
        pictures = decode(vae, own)
        shared = blend_pictures(pictures, views)
        agreed = encode(vae, torch.cat([view(shared) for view in views])) + own - encode(vae, pictures)
        return objective.output_of(agreed, z, times)

    return denoise


def split(z: Tensor, views: Sequence[View]) -> Tensor:
    """[N, B, ...] of stacked latents or pictures [N B, ...]."""
    return z.unflatten(0, (len(views), -1))


def blend_pictures(pictures: Tensor, views: Sequence[View]) -> Tensor:
    """[B, 3, H, W], the mean of each picture's views [N B, 3, H, W], turned back."""
    return torch.stack([view.inverse(x) for view, x in zip(views, split(pictures, views))]).mean(0)
