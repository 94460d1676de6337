"""Does the UNet know these latents? Its denoising loss on the VAE's latents of held-out pictures."""

from __future__ import annotations

import torch

from eqldm.anagram.sampling import Sampler
from eqldm.config import DiffusionConfig
from eqldm.data.samples import PictureSamples, collate
from eqldm.diffusion.module import LatentDiffusion


@torch.no_grad()
def fit_metrics(sampler: Sampler, samples: PictureSamples, num_images: int, batch_size: int = 64) -> dict[str, float]:
    """`fit/val_loss`: the mean denoising loss at one fixed (t, noise) for each picture, the same code and draws as in
    training's validation, without min-SNR weights, so that models trained with and without them compare."""
    module = LatentDiffusion(DiffusionConfig(), sampler.vae, sampler.networks).to(sampler.device)
    losses = []
    for first in range(0, num_images, batch_size):
        batch = collate([samples[i] for i in range(first, min(num_images, first + batch_size))])
        batch["x"] = batch["x"].to(sampler.device)
        losses.append(module.denoising_loss(batch, 0, module.unweighted))
    return {"fit/val_loss": float(torch.cat(losses).mean())}
