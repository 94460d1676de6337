"""An anagram is a denoiser.

    guided = Guidance(unet, prompt_embeds, negative_embeds, scale)      one UNet under N prompts
    denoise = mean_of_views(guided, views)                              denoise(z, t), for any sampler

Noise, velocity and flow estimates are linear in (z, z_t), and views are linear and orthogonal, so averaging the network's
outputs is averaging its estimates, whatever it predicts. All views, prompts and samples, guided and unguided, go through
the UNet in one call per step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from eqldm.views import View

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""denoise(z_t [B, C, h, w], t []) -> the network's output [B, C, h, w]."""


class Guidance:
    """Classifier-free guidance of one UNet under N prompts: `guided(z [n, B, C, h, w], t, prompts)`, n prompt numbers.

    prompt_embeds: [N, L, D], or [N, B, L, D] where each sample has its own.  negative_embeds: [L, D].
    scale: 1 is unguided, and costs half. Source: arXiv 2207.12598, eq. 6.
    """

    def __init__(self, unet: UNet2DConditionModel, prompt_embeds: Tensor, negative_embeds: Tensor, scale: float):
        self.unet, self.prompt_embeds, self.negative_embeds, self.scale = unet, prompt_embeds, negative_embeds, scale

    def __call__(self, z: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        if len(z) != len(prompts):
            raise ValueError(f"guidance: got {len(z)} stacks of latents for {len(prompts)} prompts")
        n, batch = z.shape[:2]
        embeds = self.prompt_embeds[list(prompts)]
        embeds = (embeds if embeds.ndim == 4 else embeds[:, None]).expand(n, batch, -1, -1).flatten(0, 1)
        rows = z.flatten(0, 1)
        if self.scale == 1:
            return self.unet(rows, t, embeds).sample.unflatten(0, (n, batch))
        embeds = torch.cat([self.negative_embeds.expand_as(embeds), embeds])
        plain, prompted = self.unet(torch.cat([rows, rows]), t, embeds).sample.chunk(2)
        return (plain + self.scale * (prompted - plain)).unflatten(0, (n, batch))


def mean_of_views(guided: Guidance, views: Sequence[View]) -> Denoiser:
    """The mean over views i of view_i^-1(guided(view_i(z), t) under prompt i). Source: arXiv 2311.17919, eq. 2."""

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        outputs = guided(torch.stack([view(z) for view in views]), t, range(len(views)))
        return torch.stack([view.inverse(output) for view, output in zip(views, outputs)]).mean(0)

    return denoise


def alternating_views(guided: Guidance, views: Sequence[View], timesteps: Tensor) -> Denoiser:
    """One view a step in turn: view (k mod N) at the k-th of `timesteps`. Source: arXiv 2311.17919, section 3.2."""
    order = {float(t): k for k, t in enumerate(dict.fromkeys(timesteps.tolist()))}

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        i = order[float(t)] % len(views)
        return views[i].inverse(guided(views[i](z)[None], t, [i])[0])

    return denoise
