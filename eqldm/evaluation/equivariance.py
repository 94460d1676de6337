"""Do the latents turn with the picture? For each view, in both senses: the encoder's and the decoder's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from eqldm.autoencoder.equivariance import latent_error, psnr
from eqldm.model_folder import decode, encode
from eqldm.views import View


@torch.no_grad()
def equivariance_metrics(vae: AutoencoderKL, pictures: Tensor, views: Sequence[View], batch_size: int = 64) -> dict[str, float]:
    """Means over pictures x [N, 3, H, W] in [-1, 1], for each view T and over views:

    `latent_error`   ||T E(x) - E(T x)||^2 / ||E(T x)||^2 (EQ-VAE, Table 1), of latents with each channel standardised
                     over the pictures: a UNet never sees raw ones, and a large offset would hide the error
    `psnr`           dB of D(T E(x)) against T x, to be held against `reconstruction/psnr`
    `decoder_psnr`   dB of D(T E(x)) against T D(E(x)): the decoder alone
    """
    latents = torch.cat([encode(vae, x) for x in pictures.split(batch_size)])
    mean, std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
    names = ("latent_error", "psnr", "decoder_psnr")
    totals = {view.name: dict.fromkeys(names, 0.0) for view in views}
    for x, z in zip(pictures.split(batch_size), latents.split(batch_size)):
        y = decode(vae, z)
        for view in views:
            turned = decode(vae, view(z))
            expected = encode(vae, view(x))
            sums = totals[view.name]
            sums["latent_error"] += float(latent_error((expected - mean) / std, (view(z) - mean) / std).sum())
            sums["psnr"] += float(psnr(turned, view(x)).sum())
            sums["decoder_psnr"] += float(psnr(turned, view(y)).sum())
    metrics = {f"equivariance/{view}/{name}": s[name] / len(pictures) for view, s in totals.items() for name in names}
    for name in names:
        values = [metrics[f"equivariance/{view.name}/{name}"] for view in views]
        metrics[f"equivariance/mean/{name}"] = sum(values) / len(values)
    return metrics
