"""Is an equivariant autoencoder to be had without training? python benchmarks/frame_average.py MODEL [MODEL ...] --data SHARDS

The frame average of an autoencoder over the square's eight symmetries g is equivariant by construction (arXiv 2110.03336, eq. 3 and 4):
E'(x) = mean of g^-1 E(g x), D'(z) = mean of g^-1 D(g z). Of pictures of letters, for each pair of encoder
and decoder: dB of the reconstruction, and the share that the judge reads right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eqldm.autoencoder.equivariance import psnr
from eqldm.data.samples import PictureSamples, collate
from eqldm.evaluation.judge import Judge
from eqldm.model_folder import decode, encode, load_vae
from eqldm.views import D4
from steps import print_table, script, table


def frame_average(network: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """x [..., C, H, W] -> the mean of g^-1 network(g x) over the symmetries g."""
    return lambda x: torch.cat([torch.stack([g.inverse(network(g(part))) for g in D4]).mean(0) for part in x.split(64)])


@torch.no_grad()
def run(args: argparse.Namespace) -> str:
    samples, judge, rows = PictureSamples(args.data), Judge.open(), {}
    batch = collate([samples[i] for i in range(min(args.num_images, len(samples)))])
    x, labels = batch["x"], batch["label"]
    rows["the pictures themselves"] = ["-", f"{float((judge(x) == labels).double().mean()):.1%}"]
    for folder in args.models:
        vae = load_vae(folder)
        encoder, decoder = partial(encode, vae), partial(decode, vae)
        for e, d in (("E", "D"), ("E", "D'"), ("E'", "D"), ("E'", "D'")):
            z = (encoder if e == "E" else frame_average(encoder))(x)
            y = (decoder if d == "D" else frame_average(decoder))(z).clamp(-1, 1)
            right = float((judge(y) == labels).double().mean())
            rows[f"{folder.name}, {d}({e}(x))"] = [f"{float(psnr(y, x).mean()):.2f}", f"{right:.1%}"]
    return table("", ["dB", "read right"], rows)


def main() -> None:
    parser = script(__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="model folders")
    parser.add_argument("--data", type=Path, required=True, help="shards of glyphs")
    parser.add_argument("--num-images", type=int, default=256)
    print_table(parser, run)


if __name__ == "__main__":
    main()
