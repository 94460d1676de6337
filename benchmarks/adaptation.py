"""How to adapt a UNet to new latents: python benchmarks/adaptation.py --vae FOLDER --out DIR

From glyphs-base to the autoencoder of --vae, step by step: scratch, full from base, full and LoRA from base after the alignment fold.
Quality against steps comes from the validation (`val_letters`), by --seeds seeds; step 0 is the swap (with and without the fold) with
nothing trained. Every part runs once: a second call goes on. Writes DIR/table.md, DIR/curves.json and DIR/curves.png.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from steps import BASE, call, encode, evaluate, logged, path, shards, slug, spread, spreads, study, table, train

METHODS = {  # name: (config, whether the VAE is aligned, options)
    "scratch": ("configs/glyphs/base_unet.yaml", False, []),
    "full": ("configs/glyphs/eq_unet.yaml", False, []),
    "full, aligned": ("configs/glyphs/eq_unet.yaml", True, []),
    "LoRA, aligned": ("configs/glyphs/eq_unet.yaml", True, ["adapt=lora"]),
}
CURVES = {"letters read right": "val/generation/read_right", "KID": "val/generation/kid_judge", "validation loss": "val/loss"}
SWAP = {"letters read right": "generation/read_right", "KID": "generation/kid_judge", "validation loss": "fit/val_loss"}


def curve(run: Path) -> dict[int, dict[str, float]]:
    """What a run logged at each validation, by step."""
    rows = logged(run, "val/loss")
    return {int(row["step"]) + 1: {name: float(row[column]) for name, column in CURVES.items()} for row in rows}


def plot(curves: dict[str, list[dict[int, dict[str, float]]]], path: Path) -> None:
    """A panel for each measure, a line for each method: the mean over seeds, and their range."""
    figure = Figure(figsize=(5 * len(CURVES), 4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, measure in zip(figure.subplots(1, len(CURVES)), CURVES):
        for method, runs in curves.items():
            steps = sorted(set.intersection(*(set(run) for run in runs)))
            values = [[run[step][measure] for run in runs] for step in steps]
            (line,) = axes.plot(steps, [statistics.fmean(v) for v in values], marker=".", label=method)
            axes.fill_between(steps, list(map(min, values)), list(map(max, values)), alpha=0.2, color=line.get_color())
        axes.set_title(measure)
        axes.set_xlabel("optimizer steps")
        axes.set_yscale("linear" if measure == "letters read right" else "log")
    axes.legend()
    figure.savefig(path)


def main() -> None:
    parser = study(__doc__)
    parser.add_argument("--vae", type=path, required=True, help="model folder of the equivariant VAE, normalised, not aligned")
    parser.add_argument("--base", type=path, default=BASE, help="model folder to start from: glyphs-base")
    parser.add_argument("--num-steps", type=int, default=4000)
    parser.add_argument("--adapted-steps", type=int, help="of all but scratch; default: --num-steps")
    parser.add_argument("--val-every", type=int, default=500)
    parser.add_argument("--num-letters", type=int, default=208)
    parser.add_argument("--num-images", type=int, default=1024, help="validation pictures that samples and losses are held against")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    aligned = args.out / "vae-aligned"
    call("-m", "eqldm.autoencoder.fold", args.vae, "--data", args.data / "train", "--out", aligned, "--align-to", args.base)
    vaes = {False: args.vae, True: aligned}
    latents = {key: encode(args.data, vae, args.out / f"latents-{'aligned' if key else 'plain'}") for key, vae in vaes.items()}
    rows = {}
    for key, vae in vaes.items():
        name = "swap, aligned" if key else "swap"
        folder = args.out / slug(name)
        call("-m", "eqldm.swap", args.base, "--vae", vae, "--out", folder)
        sizes = ["--without", "lpips", "--metrics", "fit", "generation", "--num-letters", args.num_letters, "--num-images", args.num_images]
        metrics = evaluate(args.out / f"evaluation-{folder.name}", folder, args.data / "val", *sizes)
        rows[name] = ["0", *spreads([metrics], SWAP)]
    curves: dict[str, list] = {}
    for seed in range(args.seeds):
        for name, (config, is_aligned, options) in METHODS.items():
            run = args.out / f"{slug(name)}{seed}"
            start = [] if name == "scratch" else [f"model={args.base}"]
            num_steps = args.num_steps if name == "scratch" else args.adapted_steps or args.num_steps
            length = [f"run.num_steps={num_steps}", f"run.val_every={args.val_every}", f"val_letters={args.num_letters}",
                      f"data.val_samples={args.num_images}"]  # fmt: skip
            more = [f"run.seed={seed}", f"vae={vaes[is_aligned]}", "optimizer.schedule=constant", *options, *start, *args.set]
            train(config, run, *shards(latents[is_aligned]), *length, *more)
            curves.setdefault(name, []).append(curve(run))
        for name, runs in curves.items():
            for step in sorted(set.intersection(*(set(found) for found in runs))):
                rows[f"{name}, {step}"] = [str(step), *(spread([found[step][measure] for found in runs]) for measure in CURVES)]
        (args.out / "table.md").write_text(table("method", ["steps", *CURVES], rows))  # grows as results come
        (args.out / "curves.json").write_text(json.dumps(curves, indent=2) + "\n")
        plot(curves, args.out / "curves.png")
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
