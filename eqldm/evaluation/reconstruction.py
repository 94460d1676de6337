"""How well does the autoencoder reconstruct?"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from eqldm.autoencoder.equivariance import psnr
from eqldm.model_folder import decode, encode


@torch.no_grad()
def reconstruction_metrics(vae: AutoencoderKL, pictures: Tensor, batch_size: int = 64) -> dict[str, float]:
    """Means over pictures [N, 3, H, W] in [-1, 1] of PSNR (dB) and SSIM of D(E(x)), E the posterior's mean."""
    totals = {"psnr": 0.0, "ssim": 0.0}
    for x in pictures.split(batch_size):
        y = decode(vae, encode(vae, x)).clamp(-1, 1)
        totals["psnr"] += float(psnr(y, x).sum())
        ssim = structural_similarity_index_measure(y, x, data_range=(-1.0, 1.0), reduction="sum")
        totals["ssim"] += float(ssim)
    return {f"reconstruction/{name}": value / len(pictures) for name, value in totals.items()}
