"""Do the pictures look like real ones? Distances between features of a classifier, and scores for texture.

A reading judge forgives a rough texture, as CLIP scores do; these do not. Distances are taken between features [N, D] that
`Judge.features` gives of real and of sampled pictures (KID and FID of the literature use Inception's: figures compare only
where the features are the same).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from eqldm.autoencoder.equivariance import psnr
from eqldm.evaluation.judge import Judge
from eqldm.model_folder import Pixels, decode, encode


@dataclass(frozen=True)
class RealPictures:
    """What sampled pictures are held against: the features [M, D] of real ones, their labels [M] (None: they have none), and their
    mean high-frequency energy."""

    features: Tensor
    labels: Tensor | None
    energy: float

    @classmethod
    def of(cls, pictures: Tensor, judge: Judge, labels: Tensor | None = None) -> RealPictures:
        """Measured on pictures [M, 3, H, W] in [-1, 1]. labels: [M], -1 where a picture has none."""
        labels = None if labels is None or bool((labels < 0).any()) else labels
        return cls(judge.features(pictures), labels, float(high_frequency_energy(pictures).mean()))


def quality_metrics(
    pictures: Tensor, judge: Judge, vae: AutoencoderKL | Pixels, real: RealPictures, batch_size: int = 64
) -> dict[str, float]:
    """Of sampled pictures [N, 3, H, W] in [-1, 1], N > 1:

    `kid`, `fid`        distances of the judge's features from those of real pictures
    `texture`           high-frequency energy over that of real pictures: above 1 where they are rough, below where blurred
    `round_trip_psnr`   dB of D(E(x)) against x under the model's own VAE; not for pixel models
    """
    features = judge.features(pictures, batch_size)
    metrics = {
        "kid": float(kid(real.features, features, real_labels=real.labels)),
        "fid": float(fid(real.features, features)),
        "texture": float(high_frequency_energy(pictures).mean()) / real.energy,
    }
    if not isinstance(vae, Pixels):
        metrics["round_trip_psnr"] = float(round_trip_psnr(vae, pictures, batch_size).mean())
    return metrics


def kid(real: Tensor, fake: Tensor, weights: Tensor | None = None, real_labels: Tensor | None = None) -> Tensor:
    """Kernel distance of features real [M, D] and fake [N, D]: the unbiased squared MMD under k(a, b) = (a.b / D + 1)^3.

    weights: [R, N] counts of a bootstrap over the fake ones; the result is then [R], else []. Pairs of one picture with its
    own copies are left out, so that a resampled estimate of independent pictures stays unbiased.
    real_labels: [M] of a balanced set, in which two pictures are of one label less often than in independent draws; with them
    the estimate is that of such draws. Source: KID, arXiv 1801.01401, section 4.
    """
    real, fake = real.double(), fake.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    among_real = _mean_over_pairs(kernel(real, real), real_labels)
    w = fake.new_ones(1, len(fake)) if weights is None else weights.double()
    total = w.sum(1)
    among_fake = ((w @ kernel(fake, fake).fill_diagonal_(0)) * w).sum(1) / (total.square() - w.square().sum(1))
    between = w @ kernel(fake, real).mean(1) / total
    distance = among_real + among_fake - 2 * between
    return distance[0] if weights is None else distance


def _mean_over_pairs(values: Tensor, labels: Tensor | None) -> Tensor:
    """[] mean of values [M, M] over pairs of different pictures, as many of each two labels as independent draws would have."""
    values = values.fill_diagonal_(0)
    count = len(values)
    if labels is None:
        return values.sum() / (count * (count - 1))
    of = torch.nn.functional.one_hot(labels).to(values)
    of = of[:, of.sum(0) > 0]
    held = of.sum(0)
    pairs = held[:, None] * held - torch.diag(held)
    if bool((pairs == 0).any()):  # a label with a single picture
        return _mean_over_pairs(values, None)
    return ((held[:, None] * held) / count**2 * (of.T @ values @ of) / pairs).sum()


def fid(real: Tensor, fake: Tensor) -> Tensor:
    """[] Frechet distance of Gaussians fitted to features real [M, D] and fake [N, D]; biased upward for few samples.

    Source: FID, arXiv 1706.08500, eq. 6 (torchmetrics).
    """
    metric = FrechetInceptionDistance(feature=_AsFeatures(real.shape[1]))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


class _AsFeatures(nn.Module):
    """Stands where torchmetrics has its Inception: what it is given are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def high_frequency_energy(pictures: Tensor, batch_size: int = 64) -> Tensor:
    """[N] mean energy per pixel of pictures [N, 3, H, W] at frequencies above half of Nyquist's (radially).

    Pictures are mirrored at their edges first (as a cosine transform does), so that opposite edges make no step.
    """
    height, width = (2 * side for side in pictures.shape[-2:])
    high = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.fftfreq(width).square()).sqrt() > 0.25
    energies = []
    for x in pictures.float().split(batch_size):
        x = torch.cat([x, x.flip(-1)], -1)
        x = torch.cat([x, x.flip(-2)], -2)
        spectrum = torch.fft.fft2(x, norm="ortho").abs().square()
        energies.append((spectrum * high.to(x)).mean((1, 2, 3)))
    return torch.cat(energies)


@torch.no_grad()
def round_trip_psnr(vae: AutoencoderKL, x: Tensor, batch_size: int = 64) -> Tensor:
    """[B] dB of D(E(x)) against sampled pictures x [B, 3, H, W]: low where x is nothing that the autoencoder knows."""
    device = next(vae.parameters()).device
    parts = x.split(batch_size)
    return torch.cat([psnr(decode(vae, encode(vae, part.to(device))).cpu(), part.cpu()) for part in parts])
