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

from eqldm.diffusion.objective import Objective
from eqldm.views import View

PURE_NOISE = 1e-3  # the factor of the signal below which there is none
Denoiser = Callable[[Tensor, Tensor], Tensor]
"""denoise(z_t [B, C, h, w], t []) -> the network's output [B, C, h, w]."""


class Guidance:
    """Classifier-free guidance of one UNet under N prompts: `guided(z [n, B, C, h, w], t, prompts)`, n prompt numbers.

    prompt_embeds: [N, L, D], or [N, B, L, D] where each sample has its own.  negative_embeds: [L, D], or [N, L, D], one a prompt.
    scale: of all, or one a prompt; up to 1 it is the prompted estimate alone, as in diffusers, and costs half where all are.
    Source: arXiv 2207.12598, eq. 6.
    rescale: how far (0 to 1) a guided output is brought back to the standard deviation of the prompted one, against too much contrast.
    Source: arXiv 2305.08891, eq. 15 and 16.
    """

    def __init__(
        self, unet: UNet2DConditionModel, prompt_embeds: Tensor, negative_embeds: Tensor, scale: float | Sequence[float],
        rescale: float = 0.0,
    ):  # fmt: skip
        self.unet, self.prompt_embeds, self.rescale = unet, prompt_embeds, rescale
        count = len(prompt_embeds)
        self.negative_embeds = negative_embeds.expand(count, -1, -1) if negative_embeds.ndim == 2 else negative_embeds
        self.scales = [float(scale)] * count if isinstance(scale, int | float) else list(map(float, scale))
        if len(self.scales) != count or len(self.negative_embeds) != count:
            raise ValueError(
                f"guidance: got {len(self.scales)} scales and {len(self.negative_embeds)} negative prompts for {count} prompts: give one, "
                "or one for each"
            )

    def __call__(self, z: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        if len(z) != len(prompts):
            raise ValueError(f"guidance: got {len(z)} stacks of latents for {len(prompts)} prompts")
        n, batch = z.shape[:2]
        embeds = self.prompt_embeds[list(prompts)]
        embeds = (embeds if embeds.ndim == 4 else embeds[:, None]).expand(n, batch, -1, -1).flatten(0, 1)
        rows = z.flatten(0, 1)
        scales = [self.scales[i] for i in prompts]
        if max(scales) <= 1:
            return self.unet(rows, t, embeds).sample.unflatten(0, (n, batch))
        negative = self.negative_embeds[list(prompts)][:, None].expand(-1, batch, -1, -1).flatten(0, 1)
        outputs = self.unet(torch.cat([rows, rows]), t, torch.cat([negative, embeds])).sample
        plain, prompted = outputs.unflatten(0, (2, n, batch))
        scale = torch.tensor(scales).to(plain).view(n, 1, 1, 1, 1)
        guided = torch.where(scale > 1, plain + scale * (prompted - plain), prompted)
        if not self.rescale:
            return guided
        wanted, found = (each.std((2, 3, 4), keepdim=True) for each in (prompted, guided))
        return guided * (1 + self.rescale * (wanted / found - 1))


def of_all_views(guided: Guidance, views: Sequence[View], z: Tensor, t: Tensor) -> Tensor:
    """[N, B, C, h, w], view_i^-1(guided(view_i(z), t) under prompt i) for all views i, in one call."""
    outputs = guided(torch.stack([view(z) for view in views]), t, range(len(views))).float()  # shares in bfloat16 do not add up to 1
    return torch.stack([view.inverse(output) for view, output in zip(views, outputs)])


def mean_of_views(guided: Guidance, views: Sequence[View], weights: Sequence[float] | None = None) -> Denoiser:
    """The mean over the views, with weights [N] (None: alike). Source: arXiv 2311.17919, eq. 2."""
    shares = shares_of(weights, len(views))

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        outputs = of_all_views(guided, views, z, t)
        return (shares.to(outputs).view(-1, 1, 1, 1, 1) * outputs).sum(0)

    return denoise


def rectified_mean(guided: Guidance, views: Sequence[View], objective: Objective, weights: Sequence[float] | None = None) -> Denoiser:
    """The mean with the variance that one view's noise estimate has: views that disagree average to less, which the solver takes for
    a picture that is nearly finished, and blurs.

    The mean of noise estimates eps_i, of shares a_i, divided by sqrt(sum_i a_i^2 + 2 sum_{i<j} rho_ij a_i a_j), rho_ij their correlation
    in each sample. In pure noise there is nothing to rectify. Source: arXiv 2412.02693, section 4.3. Its released code takes for rho_ij
    the mean product of the estimates, which is their correlation only where each has mean 0 and variance 1, as guided ones do not. Its
    weights come from a CLIP that reads noisy pictures; ours are given, or alike.
    """
    shares = shares_of(weights, len(views))

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        outputs = of_all_views(guided, views, z, t)
        times, a = t.expand(len(z)), shares.to(outputs)
        if float(objective.levels(times)[0].min()) < PURE_NOISE:
            return (a.view(-1, 1, 1, 1, 1) * outputs).sum(0)
        eps = torch.stack([objective.noise(output, z, times) for output in outputs])
        mean = (a.view(-1, 1, 1, 1, 1) * eps).sum(0)
        centred = eps.flatten(2) - eps.flatten(2).mean(2, keepdim=True)
        unit = centred / centred.norm(dim=2, keepdim=True)
        correlations = (unit[:, None] * unit[None]).sum(-1)  # [N, N, B]; no matrix product, which autocast would round
        left = (a[:, None, None] * a[None, :, None] * correlations).sum((0, 1)).clamp_min(1e-4).sqrt().view(-1, 1, 1, 1)
        return objective.output_of_noise(mean / left, z, times)

    return denoise


def shares_of(weights: Sequence[float] | None, count: int) -> Tensor:
    """Weights [N] that add up to 1."""
    given = torch.ones(count) if weights is None else torch.tensor([float(weight) for weight in weights])
    if len(given) != count or not bool((given >= 0).all() and given.isfinite().all()) or float(given.sum()) == 0:
        raise ValueError(f"weights: got {given.tolist()} for {count} views, wanted one for each, finite, none below 0, not all 0")
    return given / given.sum()


def alternating_views(guided: Guidance, views: Sequence[View], timesteps: Tensor) -> Denoiser:
    """One view a step in turn: view (k mod N) at the k-th of `timesteps`. Source: arXiv 2311.17919, section 3.2."""
    order = {float(t): k for k, t in enumerate(dict.fromkeys(timesteps.tolist()))}

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        i = order[float(t)] % len(views)
        return views[i].inverse(guided(views[i](z)[None], t, [i])[0])

    return denoise
