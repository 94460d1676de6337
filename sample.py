"""Sample anagrams: one picture that reads as prompt i in view i.

python sample.py                         # the shipped glyphs-eq: A, and V when turned
python sample.py --model FOLDER --prompts "the letter A" "the letter V" --views identity rotate_180 --out DIR
"""

from __future__ import annotations

import argparse
import sys
import time


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="model folder (a diffusers pipeline); default: the shipped glyphs-eq")
    parser.add_argument("--prompts", nargs="+", help="one for each view; default, of the shipped model: the letter A, the letter V")
    parser.add_argument("--views", nargs="+", default=["identity", "rotate_180"], help="such as rotate_90, flip, patch_permute:4")
    parser.add_argument("--negative-prompt", default="")
    parser.add_argument("--num-samples", type=int, default=8, help="pictures, of seeds SEED, SEED + 1, ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16, help="pictures sampled together; does not change them beyond rounding")
    parser.add_argument("--num-inference-steps", type=int, default=30)
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="1 is unguided")
    parser.add_argument("--reduction", default="mean", help="mean or alternate")
    parser.add_argument("--blend", default="latents", help="latents, or pixels: for models whose latents do not turn (slow)")
    parser.add_argument("--scheduler", help="ddim, ddpm, euler, euler_ancestral, dpm++, unipc; default: the model's own")
    parser.add_argument("--image-size", type=int, help="pixels a side; default: what the UNet was trained at")
    parser.add_argument("--device", help="cpu, cuda, cuda:1; default: a GPU where there is one")
    parser.add_argument("--out", help="folder for SEED.png, SEED.json and sheet.png; default: runs/samples/ and the time")
    args = parser.parse_args()
    if args.prompts is None:
        if args.model is not None or len(args.views) != 2:
            parser.error("--prompts: give one for each view")
        args.prompts = ["the letter A", "the letter V"]
    args.out = args.out or time.strftime("runs/samples/%Y%m%d-%H%M%S")
    return args


def main() -> None:
    args = parse_args()
    from eqldm.anagram.job import sample_to_folder  # after parsing, so that --help answers at once

    try:
        sheet = sample_to_folder(args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"done: {sheet}")


if __name__ == "__main__":
    main()
