"""Pictures whose parts read differently (Factorized Diffusion, arXiv 2404.11615) on the glyph world: do they?

    python benchmarks/components.py --data SHARDS [--num-pairs 64] [--out DIR]

Each part of a picture is read by the judge, which must name a letter; pairs of different letters, the first for the first part. The row
`real letters` says how many of the data's letters it reads right from that part alone, which is what can be reached. Writes
DIR/COMPONENTS_WAY.png, the first eight of each.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.progress import track

from eqldm.anagram.render import picture_sheet
from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import PictureSamples
from eqldm.evaluation.anagram import letter_tuples
from eqldm.evaluation.generation import letter_prompts
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.markdown import markdown
from eqldm.model_folder import PRETRAINED
from eqldm.training.run_folder import git_commit
from eqldm.views.components import Component, parse_components

WAYS = {  # model, where the parts are taken
    "glyphs-eq, latents": ("glyphs-eq", "latents"),
    "glyphs-base, latents": ("glyphs-base", "latents"),
    "glyphs-base, pixels": ("glyphs-base", "pixels"),
}


def read(judge: Judge, components: list[Component], pictures: torch.Tensor) -> torch.Tensor:
    """[parts, N] the letter that each part reads as."""
    return torch.stack([judge.probabilities(part(pictures).clamp(-1, 1))[:, : len(LETTERS)].argmax(1) for part in components])


def run(args: argparse.Namespace) -> str:
    judge, samples = Judge.open(), PictureSamples(args.data)
    real = [samples[i] for i in range(min(520, len(samples)))]
    pictures, labels = torch.stack([sample["x"] for sample in real]), torch.tensor([sample["label"] for sample in real])
    wanted, rows = letter_tuples(args.num_pairs), []
    for name in args.components:
        components = parse_components(name)
        right = read(judge, components, pictures) == labels
        rows.append([name, "real letters", *(f"{float(each.double().mean()):.3f}" for each in right), "-"])
        for way, (model, blend) in WAYS.items():
            if blend == "latents" and not all(part.in_latents for part in components):
                continue
            sampler, made = Sampler.open(PRETRAINED / model, args.device, "auto"), []
            for first in track(range(0, args.num_pairs, 16), f"{name}: {way}", transient=True):
                seeds = range(first, min(first + 16, args.num_pairs))
                prompts = letter_prompts(wanted[:, list(seeds)])
                made.append(sampler.compose(prompts, components, seeds, blend=blend, num_inference_steps=20))
            found = torch.cat(made)
            right = read(judge, components, found) == wanted
            rows.append(
                [name, way, *(f"{float(each.double().mean()):.3f}" for each in right), f"{float(right.all(0).double().mean()):.3f}"]
            )
            if args.out:
                args.out.mkdir(parents=True, exist_ok=True)
                sheet = [[x, *(part(x) for part in components)] for x in found[:8]]
                texts = [" / ".join(LETTERS[label] for label in labels) for labels in wanted.T[:8].tolist()]
                path = args.out / f"{name}_{way}.png".replace(":", "-").replace(", ", "-")
                picture_sheet(sheet, texts, ["whole", *(part.name for part in components)], 2).save(path)
    return markdown(["components", "", "first part", "second part", "both"], rows) + f"\n{args.num_pairs} pairs, commit {git_commit()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="shard folder of letters")
    parser.add_argument("--components", nargs="+", default=["hybrid:0.06", "colour", "motion:0.3"], help="of two parts each")
    parser.add_argument("--num-pairs", type=int, default=64)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, help="folder for sheets")
    args = parser.parse_args()
    if args.num_pairs < 1:
        parser.error(f"--num-pairs: got {args.num_pairs}, wanted at least 1")
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
