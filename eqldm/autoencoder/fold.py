"""Folds: channel maps of the latents, written into the autoencoder's own 1 x 1 convolutions.

A channel map `z -> A z + b`, the same at each cell, commutes with every spatial view (and with `negate` if b = 0), so folding
it into `quant_conv` (and its inverse into `post_quant_conv`) changes neither a reconstruction nor the equivariance. Two maps are
folded: normalisation (zero mean and unit variance per channel) and alignment (a turn towards another VAE's latents). The
exported VAE has `scaling_factor = 1` and no shift: stock diffusers pipelines need to know nothing.

    python -m eqldm.autoencoder.fold MODEL --data SHARDS --out FOLDER [--align-to MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from eqldm.command import Parser, error_line, whole
from eqldm.data.samples import PictureSamples, collate
from eqldm.model_card import carried_card
from eqldm.model_folder import check_latents, check_replaceable, encode, load_vae, save_model_folder
from eqldm.paths import place_option


@torch.no_grad()
def latent_matrix(vae: AutoencoderKL, samples: PictureSamples | Subset, num_images: int, batch_size: int = 64) -> Tensor:
    """[N, C] float64: the normalised latent cells of the first `num_images` pictures, one row a cell."""
    device = next(vae.parameters()).device
    rows = []
    picked = Subset(samples, range(min(num_images, len(samples))))
    for batch in DataLoader(picked, batch_size, collate_fn=collate):
        z = encode(vae, batch["x"].to(device))
        check_latents(vae, z, batch["key"], "the data")  # one of them would spoil all statistics
        rows.append(z.double().cpu().movedim(1, -1).flatten(0, -2))
    return torch.cat(rows)


def normalisation(latents: Tensor, keep_origin: bool = False) -> tuple[Tensor, Tensor]:
    """(A [C, C], b [C]) that gives latents [N, C] zero mean and unit variance per channel. Raises ValueError if constant.

    keep_origin: b = 0, and the mean square is 1 in place of the variance.
    """
    if not bool(latents.isfinite().all()):
        raise ValueError("latents hold NaN or infinity, of which there are no statistics: the autoencoder or its input is broken")
    mean, std = latents.mean(0), latents.std(0, unbiased=False)
    if keep_origin:
        mean, std = torch.zeros_like(mean), latents.square().mean(0).sqrt()
    if bool((std < 1e-6).any()):
        dead = (std < 1e-6).nonzero().flatten().tolist()
        raise ValueError(f"latent channels {dead} are constant: the autoencoder has collapsed there and cannot be normalised")
    return torch.diag(1 / std), -mean / std


def alignment(latents: Tensor, wanted: Tensor, keep_origin: bool = False) -> tuple[Tensor, Tensor]:
    """(A [C, C], b [C]): normalisation of latents [N, C], then the orthogonal map of the channels (a turn, perhaps with a mirror) that
    brings them nearest to `wanted` [N, C], latents of the same cells by another VAE, then the scale and mean of those.
    The mean square over all channels is then that of `wanted`; single channels may have more or less.

    A turn, and not least squares, which comes nearer but shrinks what the other VAE's latents do not show: a UNet's errors are
    about equal in all directions, and the decoder would magnify them there. keep_origin: b = 0.
    Raises ValueError where the two do not match, or one is constant.
    Source: orthogonal Procrustes problem, Schoenemann 1966, doi 10.1007/BF02289451.
    """
    if latents.shape != wanted.shape:
        raise ValueError(f"alignment: latents {tuple(latents.shape)} and {tuple(wanted.shape)} differ in channels or cells")
    if not bool(wanted.isfinite().all()):
        raise ValueError("alignment: the latents to align to hold NaN or infinity: the model to align to is broken")
    matrix, offset = normalisation(latents, keep_origin)
    mean = torch.zeros_like(offset) if keep_origin else wanted.mean(0)
    scale = (wanted - mean).square().mean().sqrt()
    if not scale > 1e-6:
        raise ValueError("alignment: the latents to align to are constant, so there is no direction to turn to")
    left, _, right = torch.linalg.svd((wanted - mean).T @ (latents @ matrix.T + offset))
    turn = scale * left @ right
    return turn @ matrix, turn @ offset + mean


def fold_map(vae: AutoencoderKL, matrix: Tensor, offset: Tensor) -> None:
    """Changes `vae` in place so that its normalised latents become `matrix @ z + offset`, reconstructions staying equal.

    matrix: [C, C], invertible.  offset: [C]. The model's scaling and shift are folded in too and become 1 and 0. The
    posterior stays diagonal: its log-variances are mapped through the squared matrix, exact where that is diagonal, else a lower bound
    of the variances' (the weighted geometric mean of what is mixed).
    """
    channels = vae.config.latent_channels
    shift, scale = vae.config.get("shift_factor") or 0.0, vae.config.scaling_factor
    a = matrix.to(vae.device, torch.float64) * scale
    b = offset.to(vae.device, torch.float64) - shift * a.sum(1)
    vae.register_to_config(use_quant_conv=True, use_post_quant_conv=True, scaling_factor=1.0, shift_factor=None)
    vae.quant_conv = vae.quant_conv if vae.quant_conv is not None else _identity_conv(2 * channels).to(vae.device)
    vae.post_quant_conv = vae.post_quant_conv if vae.post_quant_conv is not None else _identity_conv(channels).to(vae.device)

    with torch.no_grad():
        weight, bias = vae.quant_conv.weight.double().flatten(1), vae.quant_conv.bias.double()
        # Log-variance rows: a diagonal map adds 2 log |a_ii|. Off the diagonal the posterior is not diagonal any more:
        # its variances are mixed to first order, with the row's squares as weights.
        share = a.square() / a.square().sum(1, keepdim=True)
        mean_rows, logvar_rows = weight[:channels], weight[channels:]
        mean_bias, logvar_bias = bias[:channels], bias[channels:]
        new_weight = torch.cat([a @ mean_rows, share @ logvar_rows])
        new_bias = torch.cat([a @ mean_bias + b, share @ logvar_bias + a.square().sum(1).log()])
        vae.quant_conv.weight.copy_(new_weight.view_as(vae.quant_conv.weight))
        vae.quant_conv.bias.copy_(new_bias)

        inverse = torch.linalg.inv(a)
        weight, bias = vae.post_quant_conv.weight.double().flatten(1), vae.post_quant_conv.bias.double()
        vae.post_quant_conv.bias.copy_(bias - weight @ inverse @ b)
        vae.post_quant_conv.weight.copy_((weight @ inverse).view_as(vae.post_quant_conv.weight))


def _identity_conv(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.dirac_(conv.weight)
    assert conv.bias is not None  # it was asked for
    nn.init.zeros_(conv.bias)
    return conv


def fold_channels(
    vae: AutoencoderKL,
    samples: PictureSamples,
    num_images: int = 2048,
    align_to: AutoencoderKL | None = None,
    keep_origin: bool = False,
) -> None:
    """Folds normalisation, or alignment to another VAE's normalised latents, into `vae`, measured on the pictures.

    keep_origin: fold no offset. For a VAE trained with negation: -z then still decodes to the negative.
    """
    latents = latent_matrix(vae, samples, num_images)
    if align_to is None:
        fold_map(vae, *normalisation(latents, keep_origin))
    else:
        fold_map(vae, *alignment(latents, latent_matrix(align_to, samples, num_images), keep_origin))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", type=place_option, help="model folder, or AutoencoderKL folder")
    parser.add_argument("--data", type=place_option, required=True, help="shard folder of pictures to measure the latents on")
    parser.add_argument("--out", type=place_option, required=True, help="model folder to write, holding vae/")
    parser.add_argument("--align-to", type=place_option, help="model folder whose latents are to be matched")
    parser.add_argument("--num-images", type=whole(2, 10**6), default=2048)
    parser.add_argument("--keep-origin", action="store_true", help="fold no offset: for a VAE trained with negation")
    args = parser.parse_args()
    try:
        check_replaceable(Path(args.out), *(Path(folder) for folder in (args.model, args.align_to) if folder))  # before anything long
        vae = load_vae(args.model)
        align = load_vae(args.align_to) if args.align_to else None
        fold_channels(vae, PictureSamples(args.data), args.num_images, align, args.keep_origin)
        onto = f" and turned towards those of `{args.align_to}`" if args.align_to else ""
        card = carried_card(args.model, f"its latents normalised{onto}, over {args.num_images} pictures of `{args.data}`, by folding.")
        print(save_model_folder(args.out, card, vae=vae))
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    main()
