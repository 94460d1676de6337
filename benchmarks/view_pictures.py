"""The pictures of README's table of views: for each view, or parts, the best of some seeds of letters that suit it, from all sides.

python benchmarks/view_pictures.py [--num-samples 32] --out docs/figures/views
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from PIL import Image
from rich.progress import track
from torch import Tensor

from eqldm.anagram.options import Options
from eqldm.anagram.recipes import Anagram, Composition, Recipe
from eqldm.anagram.sampling import Sampler
from eqldm.atomic import write_whole
from eqldm.data.samples import tensor_to_picture
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.evaluation.naming import file_name
from eqldm.model_folder import PRETRAINED

VIEWS = {  # letters that read right in `python -m eqldm.evaluate glyphs-eq --metrics anagram --views ...`
    "rotate_90": "NZ", "rotate_180": "DU", "rotate_270": "EH", "mirror": "JL", "flip": "MW", "transpose": "HI", "anti_transpose": "PE",
    "patch_permute:2": "BH", "patch_permute:4": "VK", "pixel_permute": "ZW", "jigsaw:2": "HK", "inner_circle": "DQ",
    "square_hinge:2": "TE", "square_hinge:4": "XQ", "skew": "BH", "rotate_90,rotate_180": "NZN",
}  # fmt: skip
PARTS = {"hybrid:0.06": "DU", "motion:0.3": "IT", "colour": "OQ"}  # by glyphs-base, blended in pixels
ALL = {**VIEWS, **PARTS}
SIDE, GAP = 96, 6  # pixels


def best_of(recipe: Recipe, letters: str, judge: Judge, num_samples: int) -> Tensor:
    """The picture [3, H, W] whose worst side reads best."""
    pictures = recipe.sample(range(num_samples))
    return pictures[int(judge.worst_view(recipe.faces(pictures), [LETTERS.index(letter) for letter in letters]).argmax())]


def strip(faces: list[Tensor]) -> Image.Image:
    """Pictures [3, H, W] beside each other."""
    whole = Image.new("RGB", (len(faces) * (SIDE + GAP) - GAP, SIDE), "white")
    for k, face in enumerate(faces):
        whole.paste(tensor_to_picture(face).resize((SIDE, SIDE), Image.Resampling.BICUBIC), (k * (SIDE + GAP), 0))
    return whole


def run(out: Path, num_samples: int, only: list[str]) -> None:
    judge = Judge.open()
    eq, base = (Sampler.open(PRETRAINED / name, precision="auto") for name in ("glyphs-eq", "glyphs-base"))
    wanted = {name: letters for name, letters in ALL.items() if name in only}
    for name, letters in track(wanted.items(), "views", transient=True):
        prompts = [f"the letter {letter}" for letter in letters]
        if name in PARTS:
            recipe: Recipe = Composition(base, prompts, name, Options(blend="pixels"))
        else:
            recipe = Anagram(eq, prompts, ["identity", *name.split(",")], Options())
        faces = recipe.sides(best_of(recipe, letters, judge, num_samples))
        write_whole(out / f"{file_name(name)}.png", partial(strip(faces).save, format="PNG", optimize=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=32, help="seeds of each, of which the judge keeps the best")
    parser.add_argument("--only", nargs="+", choices=list(ALL), default=list(ALL), metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.num_samples < 1:
        parser.error(f"--num-samples: got {args.num_samples}, wanted at least 1")
    try:
        run(args.out, args.num_samples, args.only)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
