"""Do the anagrams of an equivariant autoencoder come out better whatever the training seed, the letters and the judge?

    python benchmarks/training_seeds.py --judges FOLDER [FOLDER ...] --out DIR

For each training seed, glyphs-base's autoencoder is fine-tuned three ways (plain, rotations, D4), and its UNet is adapted to each. Then
each of METHODS samples the same pairs of letters, which need an anagram, from the same seeds, and all judges read them. Training seeds,
pairs and judges are all counted as samples (`crossed.contrast`), so that a difference is one that others would see too.
All trainings start from one base: another seed is another fine-tuning, not another base. Each p is of its own comparison, of the two
dozen that the tables hold.

With --dose the first seed also trains the other losses of equivariance_losses.py: do anagrams read better the less the latents err?

Every part runs once: a second call goes on, and another judge costs no new sampling. Writes DIR/table.md (and DIR/dose.md).
"""

from __future__ import annotations

import json
import statistics
import sys
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from crossed import Contrast, contrast, permutation_p, rank_correlation
from eqldm.evaluation.anagram import letter_tuples, unordered
from eqldm.evaluation.judges import by_judge
from eqldm.evaluation.naming import file_name
from eqldm.views import IDENTITY, parse_view
from equivariance_losses import ALL, VARIANTS
from steps import BASE, call, encode, path, shards, slug, study, table, train

VIEW = "rotate_180"
SEEDED = {"plain": "plain (no equivariance)", "rotations": "rotations", "D4": "D4"}  # by each seed: the loss
DOSE = {slug(name): name for name in VARIANTS if name not in SEEDED.values()}  # by the first seed
METHODS = {  # name: (which autoencoder, options of the sampling)
    "plain": ("plain", ""),
    "plain, time travel": ("plain", "time_travel=2"),
    "plain, decoded over the group": ("plain", "symmetrise=true"),
    "plain, the turned view alone": ("plain", "reduction=weighted,weights=0:1"),
    "plain, blended in pixels": ("plain", "blend=pixels"),
    "plain, blended, time travel": ("plain", "blend=pixels,time_travel=2"),
    "rotations": ("rotations", ""),
    "D4": ("D4", ""),
    "D4, time travel": ("D4", "time_travel=2"),
}
REFERENCES = ("plain", "plain, blended in pixels", "plain, blended, time travel")  # that the others are held against
SOURCES = ("training seed", "pair", "judge")


def trained(args: Namespace, name: str, loss: str, seed: int) -> Path:
    """The model of a loss: its autoencoder, and --base's UNet adapted to that, in the folders `name`/vaeSEED and so on."""
    folder, options = args.out / name, [f"run.seed={seed}", *args.set]
    length = [f"model={args.vae_base}", *ALL, f"run.num_steps={args.num_steps}"]
    vae = train("configs/glyphs/eq_vae.yaml", folder / f"vae{seed}", *shards(args.data), *length, *VARIANTS[loss], *options)
    latents = shards(encode(args.data, vae, folder / f"latents{seed}"))
    adapted = [f"vae={vae}", f"model={args.base}", f"run.num_steps={args.unet_steps}"]
    return train("configs/glyphs/eq_unet.yaml", folder / f"unet{seed}", *latents, *adapted, *options)


def evaluated(args: Namespace, out: Path, entries: Mapping[str, str]) -> None:
    """Samples and reads the anagrams of entries, MODEL@OPTIONS by name, and measures their autoencoders."""
    sizes = ["--num-pairs", args.num_pairs, "--num-seeds", args.num_samples, "--num-images", args.num_images]
    call("-m", "eqldm.evaluate", *(f"{slug(name)}={entry}" for name, entry in entries.items()), "--data", args.data / "test", "--out", out,
         "--metrics", "anagram", "equivariance", "--without", "lpips", "--views", VIEW, "--judge", *args.judges, *sizes)  # fmt: skip


def pairs(args: Namespace) -> Tensor:
    """[P, 2] label numbers of the letters that are sampled."""
    return letter_tuples(args.num_pairs, 2, views=[IDENTITY, parse_view(VIEW, 8)]).T


def readings(args: Namespace, out: Path, name: str) -> dict[str, Tensor]:
    """By judge, [P] the share of a pair's pictures in which it reads both letters right."""
    values = load_file(out / slug(name) / f"{file_name(f'anagram/{VIEW}')}.safetensors")
    wanted = pairs(args).repeat(args.num_samples, 1)
    read = by_judge(values, "read").items()
    return {judge: (each == wanted).all(1).double().view(args.num_samples, -1).mean(0) for judge, each in read}


def metrics_of(out: Path, name: str) -> dict[str, float]:
    return json.loads((out / slug(name) / "metrics.json").read_text())


def rate_cells(shares: Tensor) -> list[str]:
    """Of shares [S, P, J] read right: their mean, of each judge the least and the most, and of each training seed."""
    judges, seeds = 100 * shares.mean((0, 1)), 100 * shares.mean((1, 2))
    return [f"{shares.mean():.1%}", f"{judges.min():.1f} to {judges.max():.1f} %", ", ".join(f"{seed:.1f}" for seed in seeds) + " %"]


def difference_cells(found: Contrast) -> list[str]:
    low, high = (f"{100 * bound:+.1f}" for bound in found.bounds)
    return [f"{100 * found.value:+.1f} % ({low} to {high})", f"{found.p:.2g}", ", ".join(f"{share:.0%}" for share in found.shares.values())]


def report(args: Namespace, folders: list[Path]) -> str:
    """The tables of the methods: rates and quality, and what each has more than each of REFERENCES."""
    shares = {name: torch.stack([torch.stack([*readings(args, out, name).values()], 1) for out in folders]) for name in METHODS}
    rows = {}
    for name, each in shares.items():
        found = [metrics_of(out, name) for out in folders]
        kid = [statistics.fmean(m[f"anagram/{VIEW}/kid_judge_{side}"] for side in ("upright", "turned")) for m in found]
        sharp = [m[f"anagram/{VIEW}/texture_over_contrast_upright"] for m in found]
        quality = (f"{min(values):.2f} to {max(values):.2f}" for values in (kid, sharp))
        rows[name] = [*rate_cells(each), *quality]
    columns = ["both read right", "by judge", "by training seed", "KID, by seed", "texture over contrast"]
    parts = [table("sampled by", columns, rows)]
    alike = {"pair": unordered(pairs(args))}  # in either order they are one task
    for reference in REFERENCES:
        rows = {}
        for name, each in shares.items():
            if name != reference:
                trainings = permutation_p(*(values.mean((1, 2)).tolist() for values in (each, shares[reference])))
                same = METHODS[name][0] == METHODS[reference][0]  # of the same models: their seeds cannot be dealt anew
                rows[name] = [*difference_cells(contrast(each - shares[reference], SOURCES, alike)), "-" if same else f"{trainings:.2g}"]
        columns = ["difference (95 %)", "p", f"of the squared error: {', '.join(SOURCES)}", "p of permuted trainings"]
        parts.append(table(f"minus {reference}", columns, rows))
    return "\n".join(parts)


def dose(args: Namespace, found: dict[str, tuple[Path, str]]) -> str:
    """The table of the autoencoders: how far each is from equivariant, and how often its anagrams read right. found: by row, the folder of
    the evaluation and the name in it. Ranks are of the means of each name: trainings of one loss are no independent points."""
    rows: dict[str, list[str]] = {}
    of_losses: dict[str, list[tuple[float, float, float]]] = {}
    for row, (out, name) in found.items():
        metrics = metrics_of(out, name)
        error, decoded = (metrics[f"equivariance/mean/{metric}"] for metric in ("latent_error", "psnr"))
        share = statistics.fmean(float(each.mean()) for each in readings(args, out, name).values())
        of_losses.setdefault(name, []).append((error, decoded, share))
        rows[row] = [f"{error:.4f}", f"{decoded:.1f}", f"{share:.1%}"]
    errors, psnrs, shares = zip(*(map(statistics.fmean, zip(*each)) for each in of_losses.values()))
    ranks = [rank_correlation(each, shares) for each in (errors, psnrs)]
    rows["Spearman's rho with both read right (p)"] = [*(f"{rho:.2f} ({p:.2g})" for rho, p in ranks), f"of {len(shares)} losses"]
    return table("autoencoder", ["latent error", "PSNR of D(T z), dB", "both read right"], rows)


def main() -> None:
    parser = study(__doc__)
    parser.add_argument("--base", type=path, default=BASE, help="model folder whose UNet is adapted: glyphs-base")
    parser.add_argument("--vae-base", type=path, default=BASE, help="model folder whose autoencoder is fine-tuned: glyphs-base")
    parser.add_argument("--judges", type=path, nargs="+", required=True, help="two or more; see configs/glyphs/judges.sh")
    parser.add_argument("--num-steps", type=int, default=1500, help="of the autoencoder")
    parser.add_argument("--unet-steps", type=int, default=2000)
    parser.add_argument("--num-pairs", type=int, default=300)
    parser.add_argument("--num-samples", type=int, default=2, help="pictures of each pair")
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--dose", action="store_true", help="also train the other losses, by the first seed")
    args = parser.parse_args()
    if args.seeds < 2 or len(args.judges) < 2:
        sys.exit(f"error: --seeds {args.seeds}, {len(args.judges)} judges: wanted two or more of each, for one says nothing of others")
    folders: list[Path] = []
    rows: dict[str, tuple[Path, str]] = {}
    for seed in range(args.seeds):
        models = {name: trained(args, name, loss, seed) for name, loss in SEEDED.items()}
        folders.append(out := args.out / f"evaluation{seed}")
        evaluated(args, out, {name: f"{models[which]}{options and '@' + options}" for name, (which, options) in METHODS.items()})
        rows |= {f"{name}, seed {seed}": (out, name) for name in SEEDED}
        if len(folders) > 1:  # the table grows as results come
            (args.out / "table.md").write_text(report(args, folders))
    if args.dose:
        out = args.out / "evaluation-dose"
        evaluated(args, out, {name: str(trained(args, name, loss, 0)) for name, loss in DOSE.items()})
        rows |= {f"{loss}, seed 0": (out, name) for name, loss in DOSE.items()}
        (args.out / "dose.md").write_text(dose(args, rows))
    for name in ("table.md", "dose.md")[: 1 + args.dose]:
        print((args.out / name).read_text())


if __name__ == "__main__":
    main()
