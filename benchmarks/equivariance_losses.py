"""Which equivariance loss? The same autoencoder fine-tuned by each, at equal steps: python benchmarks/equivariance_losses.py --out DIR

Each variant is configs/glyphs/eq_vae.yaml without its permutations, with the options below, cut to --num-steps steps on crops, by
--seeds seeds. With --anagrams, glyphs-base's UNet is then adapted to each (first seed), and its letters and anagrams are measured.
Every part runs once: a second call goes on. Writes DIR/table.md.
"""

from __future__ import annotations

from steps import BASE, autoencoders, encode, evaluate, path, shards, slug, spreads, study, table, train

NONE = ["equivariance.group=none", "equivariance.consistency_weight=0"]
ALL = ["equivariance.permute_prob=0", "crop_until=null"]
VARIANTS = {
    "plain (no equivariance)": NONE,
    "EQ-VAE's scheme": ["equivariance.preset=eqvae_paper", *NONE],
    "rotations": ["equivariance.group=rotations"],
    "D4": [],
    "D4, implicit term alone": ["equivariance.consistency_weight=0"],
    "D4, consistency term alone": ["equivariance.implicit_weight=0"],
    "D4 + rescaling": ["equivariance.rescale_prob=0.5"],
    "D4 + permutations": ["equivariance.permute_prob=0.3"],
    "D4 + negation": ["equivariance.negate_prob=0.3"],
}
COLUMNS = {
    "PSNR, dB": "reconstruction/psnr",
    "latent error": "equivariance/mean/latent_error",
    "PSNR of D(T z), dB": "equivariance/mean/psnr",
    "patch_permute:4 error": "equivariance/patch_permute:4/latent_error",
    "negate error": "equivariance/negate/latent_error",
}
ANAGRAMS = {
    "letters read right": "generation/read_right",
    "KID": "generation/kid_judge",
    "ambigramability": "anagram/rotate_180/ambigramability",
    "KID upright": "anagram/rotate_180/kid_judge_upright",
    "KID turned": "anagram/rotate_180/kid_judge_turned",
}


def main() -> None:
    parser = study(__doc__)
    parser.add_argument("--base", type=path, default=BASE, help="model folder to start from: glyphs-base")
    parser.add_argument("--num-steps", type=int, default=1500, help="of the autoencoder")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help="default: all")
    parser.add_argument("--anagrams", action="store_true", help="also adapt a UNet to each variant of the first seed (hours)")
    parser.add_argument("--unet-steps", type=int, default=2000)
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--num-pairs", type=int, default=200)
    args = parser.parse_args()
    rows, columns = {}, [*COLUMNS, *(ANAGRAMS if args.anagrams else {})]
    for name in args.variants:
        folder, options = args.out / slug(name), [f"model={args.base}", *ALL, *VARIANTS[name]]
        found = autoencoders("configs/glyphs/eq_vae.yaml", folder, args, options, "--views", "patch_permute:4", "negate")
        rows[name] = spreads(found, COLUMNS)
        if args.anagrams:
            vae = folder / "vae0" / "model"
            latents = encode(args.data, vae, folder / "latents")
            adapted = [f"vae={vae}", f"model={args.base}", *shards(latents)]
            model = train("configs/glyphs/eq_unet.yaml", folder / "unet", *adapted, f"run.num_steps={args.unet_steps}", *args.set)
            sizes = ["--without", "lpips", "--num-pairs", args.num_pairs, "--num-images", args.num_images]
            rows[name] += spreads([evaluate(folder / "unet" / "evaluation", model, args.data / "test", *sizes)], ANAGRAMS)
        (args.out / "table.md").write_text(table("loss", columns, rows))  # grows as results come
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
