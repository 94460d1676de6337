"""Equivariance of an autoencoder: what training draws and penalises, and what the evaluation reports.

Two equivariances (T a view, E the encoder's posterior mean, D the decoder):
    the decoder's   D(T z) = T D(z)   trained by the implicit term, D(T E(x)) against T x  (EQ-VAE, arXiv 2502.09509, eq. 4)
    the encoder's   E(T x) = T E(x)   trained by the consistency term
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from eqldm.config import EquivarianceConfig
from eqldm.data.order import position_generator
from eqldm.model_folder import decode, downsampling, encode
from eqldm.views import D4, IDENTITY, Group, Rescale, Transform, draw_rescale, draw_transform

IDENTITY_TRANSFORM = Transform(IDENTITY)
EQVAE_PROB, EQVAE_LOW_RESOLUTION_PROB = 0.5, 0.25  # of a regularised step; of shrunk pictures on a plain one
KEEPS_SHAPE: dict[Group, Group] = {"none": "none", "rotations": "half_turns", "d4": "rectangle"}  # what of a group may act on a rectangle


@dataclass(frozen=True)
class TransformGroup:
    """Samples of a micro-batch whose transforms share an output shape, so that they are decoded in one call.

    rows: their places in the micro-batch.  transforms: one for each.  weight: of the group's reconstruction losses.
    """

    rows: list[int]
    transforms: list[Transform]
    weight: float = 1.0


def draw_groups(
    config: EquivarianceConfig, seed: int, step: int, positions: list[int], side: int, purpose: str = "transform"
) -> list[TransformGroup]:
    """The transforms of a micro-batch whose samples have these stream positions, at an optimizer step.

    side: latent cells per side. The draw depends on (seed, step, position) only: not on processes or micro-batches.
    """
    step_generator = position_generator(seed, step, f"{purpose}/step")
    plain = [TransformGroup(list(range(len(positions))), [IDENTITY_TRANSFORM] * len(positions))]
    if config.preset == "eqvae_paper":
        return _draw_eqvae_paper(step_generator, len(positions), side) or plain
    if float(torch.rand((), generator=step_generator)) >= config.prob:
        return plain
    rescales = [_draw_group_rescale(config, step_generator, side) for _ in range(config.num_groups)]
    groups: dict[Rescale | None, TransformGroup] = {}
    for row, position in enumerate(positions):
        rescale = rescales[position % config.num_groups]
        square = rescale is None or rescale.height == rescale.width
        cells = _dividing(config.permute_cells, side, rescale) if config.permute_prob > 0 else []
        transform = draw_transform(
            position_generator(seed, position, purpose),
            config.group if square else KEEPS_SHAPE[config.group],
            rescale,
            config.permute_prob if cells else 0.0,
            cells,
            config.negate_prob,
            config.patch_turn_prob,
            [count for count in cells if 2 * count <= min(_sides(side, rescale))],
        )
        group = groups.setdefault(rescale, TransformGroup([], []))
        group.rows.append(row)
        group.transforms.append(transform)
    return list(groups.values())


def _draw_group_rescale(config: EquivarianceConfig, generator: torch.Generator, side: int) -> Rescale | None:
    if float(torch.rand((), generator=generator)) >= config.rescale_prob:
        return None
    return draw_rescale(generator, side, config.rescale_smallest, config.anisotropic)


def _sides(side: int, rescale: Rescale | None) -> set[int]:
    """Of a latent of `side` cells, rescaled."""
    return {side} if rescale is None else {round(side * rescale.height), round(side * rescale.width)}


def _dividing(cells: list[int], side: int, rescale: Rescale | None) -> list[int]:
    """The cell counts that divide the rescaled latent, maybe none. Raises ValueError where none divides it at full size."""
    if not any(side % count == 0 for count in cells):
        raise ValueError(f"equivariance.permute_cells={list(cells)}: none divides the latent's {side} cells a side")
    return [count for count in cells if all(s % count == 0 for s in _sides(side, rescale))]


def _draw_eqvae_paper(generator: torch.Generator, batch: int, side: int) -> list[TransformGroup] | None:
    """EQ-VAE's released scheme: half of the steps plain; else one rotation by 90, 180 or 270 degrees *and* one isotropic
    down-scaling for the whole batch. Its losses are sums over pixels, which weighs a step by the scale squared."""
    if float(torch.rand((), generator=generator)) >= EQVAE_PROB:
        return None
    view = D4[int(torch.randint(1, 4, (), generator=generator))]
    rescale = replace(draw_rescale(generator, side, smallest=0.25), mode="bilinear")
    return [TransformGroup(list(range(batch)), [Transform(view, rescale)] * batch, rescale.height * rescale.width)]


def draw_resize(config: EquivarianceConfig, seed: int, step: int, side: int, purpose: str = "transform") -> Rescale | None:
    """How a step's pictures are shrunk before they are encoded: a quarter of eqvae_paper's plain steps, else not at all.

    side: latent cells per side, of the full picture. Draws as `draw_groups` does, so both agree on which steps are plain.
    """
    if config.preset != "eqvae_paper":
        return None
    generator = position_generator(seed, step, f"{purpose}/step")
    if float(torch.rand((), generator=generator)) < EQVAE_PROB:
        return None
    if float(torch.rand((), generator=generator)) >= EQVAE_LOW_RESOLUTION_PROB:
        return None
    return replace(draw_rescale(generator, side, smallest=0.25), mode="bilinear")


def consistency_loss(encoded_transformed: Tensor, transformed_encoded: Tensor, variance: Tensor) -> Tensor:
    """Mean over samples, channels and cells of (E(T x) - T E(x))^2 / var(z). Gradients flow into both encodings.

    encoded_transformed, transformed_encoded: [B, C, h, w].  variance: [C], of the latents over the data; no gradient, which
    `spread_loss` gives it.
    """
    difference = encoded_transformed.float() - transformed_encoded.float()
    return (difference.square() / variance.detach()[:, None, None]).mean()


def spread_loss(latents: Tensor, mean: Tensor, variance: Tensor, error: Tensor) -> Tensor:
    """Zero, with the gradient through var(z) that `consistency_loss` lacks: a mean over latents E(x) [B, C, h, w].

    With a constant in the denominator, shrinking a channel would lower the consistency loss, and channels that are hard to make
    equivariant would die. By the quotient rule d(e / v) = de / v - (e / v) dv / v; with running e and v it stays a mean over
    samples, whatever the micro-batches.

    mean, variance, error: [C], of the latents' channels over the data, the last the mean of (E(T x) - T E(x))^2.
    """
    mean, variance, error = (x.detach()[:, None, None] for x in (mean, variance, error))
    spread = (latents.float() - mean).square() / variance
    return -(error / variance * (spread - spread.detach())).mean()


def latent_error(encoded_transformed: Tensor, transformed_encoded: Tensor) -> Tensor:
    """[B] ||T E(x) - E(T x)||^2 / ||E(T x)||^2 of normalised latents [B, C, h, w]: EQ-VAE's equivariance error (Table 1)."""
    difference = (transformed_encoded - encoded_transformed).float().square().sum((1, 2, 3))
    return difference / encoded_transformed.float().square().sum((1, 2, 3))


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """[B] peak signal-to-noise ratio in dB of pictures [B, 3, H, W] in [-1, 1]; both are clamped to that range first."""
    error = (x.float().clamp(-1, 1) - y.float().clamp(-1, 1)).square().mean((1, 2, 3))
    return 10 * torch.log10(4.0 / error.clamp_min(1e-10))


@torch.no_grad()
def negation_error(vae: AutoencoderKL, num_patterns: int = 32, device: torch.device | None = None) -> float:
    """How far D(-z) is from -D(z), ||D(-z) + D(z)||^2 / ||D(z)||^2, over patterns of two colours that any autoencoder can draw.
    On the glyph world: .07 to .08 for those trained with negation, .46 to .66 for others (14 trainings).

    device: where it computes, None for where its weights lie: an offloaded one computes elsewhere."""
    side = 8 * downsampling(vae)
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(2, num_patterns, 3, 1, 1, generator=generator) * 2 - 1
    shapes = F.interpolate(torch.rand(num_patterns, 1, 3, 3, generator=generator), (side, side), mode="bicubic") > 0.5
    z = encode(vae, torch.where(shapes, colours[0], colours[1]).to(device or vae.device))
    plain, negated = decode(vae, z).float(), decode(vae, -z).float()
    return float((plain + negated).square().sum() / plain.square().sum())
