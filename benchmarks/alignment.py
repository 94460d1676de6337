"""Which channel map may be folded into a VAE before its UNet is adapted? python benchmarks/alignment.py --vae FOLDER --data SHARDS

Maps the latents of --vae onto those of --to: not at all (each channel normalised), by the orthogonal map that is folded
(`eqldm.autoencoder.fold.alignment`), and by least squares. Prints a table: how near the map comes, how much it stretches and shrinks,
and what noise in its latents, which stands for a UNet's errors, does to the decoded pictures.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from eqldm.autoencoder.equivariance import psnr
from eqldm.autoencoder.fold import alignment, fold_map, latent_matrix, normalisation
from eqldm.data.samples import PictureSamples, collate
from eqldm.model_folder import decode, encode, load_vae
from steps import BASE, print_table, script, table

NOISE = (0.0, 0.02, 0.05, 0.1, 0.2)


def least_squares(latents: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(A [C, C], b [C]), the affine map of latents [N, C] that comes nearest to `wanted` [N, C]."""
    solution = torch.linalg.lstsq(torch.cat([latents, latents.new_ones(len(latents), 1)], 1), wanted).solution
    return solution[:-1].T, solution[-1]


@torch.no_grad()
def noisy_psnrs(vae: AutoencoderKL, pictures: Tensor) -> list[float]:
    """Mean dB of D(z + noise) against pictures [N, 3, H, W], for each standard deviation of `NOISE`."""
    z = encode(vae, pictures)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    return [float(psnr(decode(vae, z + noise * eps), pictures).mean()) for noise in NOISE]


def run(args: argparse.Namespace) -> str:
    vae, samples = load_vae(args.vae), PictureSamples(args.data)
    latents, wanted = (latent_matrix(model, samples, args.num_images) for model in (vae, load_vae(args.to)))
    pictures = collate([samples[i] for i in range(min(len(samples), args.num_decoded))])["x"]
    maps = {"none": normalisation(latents), "orthogonal": alignment(latents, wanted), "least squares": least_squares(latents, wanted)}
    rows = {}
    for name, (matrix, offset) in maps.items():
        explained = 1 - float((latents @ matrix.T + offset - wanted).square().mean() / (wanted - wanted.mean(0)).square().mean())
        scales = torch.linalg.svdvals(matrix @ torch.diag(latents.std(0)))
        mapped = copy.deepcopy(vae)
        fold_map(mapped, matrix, offset)
        rows[name] = [f"{explained:.2f}", f"{float(scales[0]):.3g} to {float(scales[-1]):.2g}"]
        rows[name] += [f"{value:.1f}" for value in noisy_psnrs(mapped, pictures)]
    return table("map", ["explained variance", "singular values", *(f"dB, noise {noise:g}" for noise in NOISE)], rows)


def main() -> None:
    parser = script(__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="model folder of the new VAE")
    parser.add_argument("--to", type=Path, default=BASE, help="model folder of the VAE whose latents a UNet knows: glyphs-base")
    parser.add_argument("--data", type=Path, required=True, help="picture shards")
    parser.add_argument("--num-images", type=int, default=512, help="pictures that the maps are measured on")
    parser.add_argument("--num-decoded", type=int, default=64, help="pictures that are decoded from noisy latents")
    print_table(parser, run)


if __name__ == "__main__":
    main()
