"""Which small world can prove anything? Plain autoencoders of the glyphs, at equal steps: python benchmarks/world.py --out DIR

Each variant is configs/glyphs/base_vae.yaml with the options below, cut to --num-steps steps on crops, by --seeds seeds. Wanted is one
that keeps the picture, and whose turned latents do not decode to the turned picture, as Stable Diffusion's do not (its latent error
under rotations is .89, EQ-VAE's Table 1; these worlds are easier). Every part runs once: a second call goes on. Writes DIR/table.md.
"""

from __future__ import annotations

from steps import autoencoders, slug, spreads, study, table

THREE = ["architecture.down_block_types=[DownEncoderBlock2D,DownEncoderBlock2D,DownEncoderBlock2D]",
         "architecture.up_block_types=[UpDecoderBlock2D,UpDecoderBlock2D,UpDecoderBlock2D]",
         "architecture.block_out_channels=[16,32,64]"]  # fmt: skip
VARIANTS = {
    "f = 4, 4 channels": [*THREE, "architecture.latent_channels=4"],
    "f = 8, 4 channels": ["architecture.latent_channels=4"],
    "f = 8, 8 channels": [],
    "f = 8, 16 channels": ["architecture.latent_channels=16"],
}
COLUMNS = {
    "PSNR, dB": "reconstruction/psnr",
    "latent error": "equivariance/mean/latent_error",
    "of rotate_90": "equivariance/rotate_90/latent_error",
    "PSNR of D(T z), dB": "equivariance/mean/psnr",
}


def main() -> None:
    parser = study(__doc__)
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--num-images", type=int, default=512)
    args = parser.parse_args()
    rows = {}
    for name, options in VARIANTS.items():
        found = autoencoders("configs/glyphs/base_vae.yaml", args.out / slug(name), args, ["crop_until=null", *options])
        rows[name] = spreads(found, COLUMNS)
        (args.out / "table.md").write_text(table("world", list(COLUMNS), rows))  # grows as results come
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
