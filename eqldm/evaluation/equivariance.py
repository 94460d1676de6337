"""Do the latents turn with the picture? For each view, in both senses: the encoder's and the decoder's; and do they shrink with it?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from eqldm.autoencoder.equivariance import psnr
from eqldm.data.samples import collate
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.pictures import Pictures
from eqldm.evaluation.work import identity
from eqldm.model_folder import check_latents, decode, denormalise, encode
from eqldm.views import D4, IDENTITY, Rescale, View

SYMMETRIES = [view for view in D4 if view != IDENTITY]
RESCALES = [Rescale(scale, scale, "bilinear") for scale in (0.75, 0.5, 0.25)]  # as EQ-VAE measures
ROTATIONS = ("rotate_90", "rotate_180", "rotate_270")
LPIPS_SIDE = 16  # VGG16 halves pictures four times before its last layer: smaller (shrunk) ones have no LPIPS
MAP_SIDE = 128  # the most pixels a side of the maps of where it fails


def rescale_name(rescale: Rescale) -> str:
    """Of a rescaling alike in both directions, in metrics."""
    return f"rescale_{rescale.height:g}"


class Equivariance:
    """The question how far D(T E(x)) is from T x, and E(T x) from T E(x), under views and rescalings T of pictures x."""

    name = "equivariance"

    def __init__(
        self, vae: AutoencoderKL, samples: Pictures, count: int, views: Sequence[View] = SYMMETRIES,
        rescales: Sequence[Rescale] = (), lpips: Callable | None = None,
    ):  # fmt: skip
        self.vae, self.samples, self.count, self.lpips = vae, samples, count, lpips
        self.transforms = {view.name: view for view in views} | {rescale_name(r): r for r in rescales}
        self.key = {**identity(vae), "data": samples.digest, "transforms": list(self.transforms), "lpips": lpips is not None}

    @torch.no_grad()
    def measure(self, numbers: range) -> dict[str, Tensor]:
        """Of the latents z = E(x), each channel apart [B, C] float64: `latent/sum`, `latent/square`; `latent/cells` [B]. Under each T:

        `T/difference`   the sum over cells of (E(T x) - T z)^2,  `T/sum`, `T/square` of E(T x)  [B, C]; `T/cells` [B]
        `T/psnr`         dB of D(T z) against T x;  `T/decoder_psnr` against T D(z)  [B];  `T/lpips` [B] of D(T z) against T x
        `sum/T`          of views: the squared error of D(T z), turned back, less that of D(z), summed over the batch [h, w]
        """
        batch = collate([self.samples[i] for i in numbers])
        x = batch["x"].to(self.vae.device)
        z = encode(self.vae, x)
        y = decode(self.vae, z)
        check_latents(self.vae, y, batch["key"], "the data")
        plain = (y.clamp(-1, 1) - x).square()
        values = {f"latent/{name}": value for name, value in channel_sums(z).items()}
        for name, transform in self.transforms.items():
            wanted, moved = transform(x), transform(z)
            expected, turned = encode(self.vae, wanted), decode(self.vae, moved)
            values |= {f"{name}/{key}": value for key, value in channel_sums(expected).items()}
            values[f"{name}/difference"] = (expected.double() - moved.double()).square().sum((2, 3))
            values[f"{name}/psnr"] = psnr(turned, wanted)
            values[f"{name}/decoder_psnr"] = psnr(turned, transform(y))
            if self.lpips is not None and min(wanted.shape[-2:]) >= LPIPS_SIDE:
                values[f"{name}/lpips"] = self.lpips(turned.float().clamp(-1, 1), wanted).view(len(x))
            if isinstance(transform, View):
                more = (transform.inverse(turned).clamp(-1, 1) - x).square() - plain
                values[f"sum/{name}"] = _small(more.mean(1)).sum(0)
        return {name: value.cpu() for name, value in values.items()}


def channel_sums(z: Tensor) -> dict[str, Tensor]:
    """Of latents [B, C, h, w], over cells, in float64."""
    z = z.double()
    return {"sum": z.sum((2, 3)), "square": z.square().sum((2, 3)), "cells": torch.full((len(z),), float(z[0, 0].numel()))}


def channel_statistics(values: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """(mean [C], standard deviation [C]) of latents over all pictures, of their `channel_sums` `PREFIX/...`."""
    total = values[f"{prefix}/cells"].sum()
    mean = values[f"{prefix}/sum"].sum(0) / total
    return mean, (values[f"{prefix}/square"].sum(0) / total - mean.square()).clamp_min(0).sqrt()


def _small(maps: Tensor) -> Tensor:
    """Maps [B, H, W] at no more than `MAP_SIDE` a side, means of whole blocks."""
    block = -(-max(maps.shape[-2:]) // MAP_SIDE)
    return F.avg_pool2d(maps[:, None], block)[:, 0] if block > 1 else maps


def equivariance_metrics(values: dict[str, Tensor], vae: AutoencoderKL, transforms: Sequence[str], mean_of: Sequence[str] = ()) -> Findings:
    """Means over pictures of what `Equivariance` measured, for each view or rescaling T, named in `transforms`:

    `latent_error`   ||T E(x) - E(T x)||^2 / ||E(T x)||^2 of latents with each channel standardised over the pictures: a UNet never
                     sees raw ones, and a large offset would hide the error
    `psnr`           dB of D(T E(x)) against T x, to be held against `reconstruction/psnr`;  `lpips`
    `decoder_psnr`   dB of D(T E(x)) against T D(E(x)): the decoder alone

    `mean/...`: means over the views `mean_of` (default: all that are no rescaling). `eqvae_rotation_error`, `eqvae_scale_error`: the
    error of the raw latents, with their offset and scale, over rotations and over scales. Source: EQ-VAE, arXiv 2502.09509, Table 1.
    """
    findings = Findings(torch.arange(len(values["latent/cells"])))
    mean, std = channel_statistics(values, "latent")
    errors = {name: _error(values, name, mean, std) for name in transforms}
    for name in transforms:
        findings.mean(f"equivariance/{name}/latent_error", errors[name], rate=False)
        for metric in ("psnr", "decoder_psnr", "lpips"):
            if f"{name}/{metric}" in values:
                findings.mean(f"equivariance/{name}/{metric}", values[f"{name}/{metric}"], rate=False)
    views = list(mean_of) or [name for name in transforms if not name.startswith("rescale_")]
    for metric in ("latent_error", "psnr", "decoder_psnr", "lpips"):
        known = errors if metric == "latent_error" else {name: values[key] for name in views if (key := f"{name}/{metric}") in values}
        if views and all(name in known for name in views):
            findings.mean(f"equivariance/mean/{metric}", torch.stack([known[name] for name in views]).double().mean(0), rate=False)
    origin = denormalise(vae, torch.zeros(1)).double() * -vae.config.scaling_factor  # what z would be of raw latents of zero
    for metric, names in (("rotation", ROTATIONS), ("scale", [name for name in transforms if name.startswith("rescale_")])):
        if names and all(name in transforms for name in names):
            raw = [_error(values, name, origin.expand_as(mean), torch.ones_like(std)) for name in names]
            findings.mean(f"equivariance/eqvae_{metric}_error", torch.stack(raw).mean(0), rate=False)
    return findings


def _error(values: dict[str, Tensor], name: str, mean: Tensor, std: Tensor) -> Tensor:
    """[B] ||T E(x) - E(T x)||^2 / ||E(T x)||^2 of latents less `mean` [C], over `std` [C]."""
    weight = 1 / std.square()
    cells = values[f"{name}/cells"].double()[:, None]
    norm = values[f"{name}/square"] - 2 * mean * values[f"{name}/sum"] + cells * mean.square()
    return (values[f"{name}/difference"] @ weight) / (norm @ weight)


def error_maps(values: dict[str, Tensor], views: Sequence[View]) -> dict[str, Tensor]:
    """By view: [h, w] mean squared error (pictures in [-1, 1]) that turning the latents adds at each place, turned back."""
    return {view.name: values[f"sum/{view.name}"] / len(values["latent/cells"]) for view in views}


@torch.no_grad()
def latent_pictures(vae: AutoencoderKL, x: Tensor, views: Sequence[View] = ()) -> list[dict[str, Tensor]]:
    """For each picture of x [N, 3, H, W]: `z` and, for each view T, `T` -> T^-1 E(T x), all [3, h, w] in [-1, 1]: the three principal
    components of the latent channels over these pictures as red, green and blue. Where latents turn, all are alike.

    Source: EQ-VAE, arXiv 2502.09509, figure 1.
    """
    z = encode(vae, x.to(vae.device))
    cells = z.movedim(1, -1).flatten(0, -2).double()
    mean = cells.mean(0)
    _, _, components = torch.linalg.svd(cells - mean, full_matrices=False)
    components = F.pad(components[:3], (0, 0, 0, max(0, 3 - len(components))))  # fewer than three channels leave colours out
    low, high = (((cells - mean) @ components.T).quantile(q, 0) for q in (0.02, 0.98))

    def coloured(z: Tensor) -> Tensor:
        scores = (z.movedim(1, -1).double() - mean) @ components.T
        return (2 * (scores - low) / (high - low).clamp_min(1e-9) - 1).movedim(-1, 1).clamp(-1, 1).float().cpu()

    columns = {"z": coloured(z)} | {view.name: coloured(view.inverse(encode(vae, view(x.to(vae.device))))) for view in views}
    return [{name: column[i] for name, column in columns.items()} for i in range(len(x))]
