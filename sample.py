"""Sample anagrams: one picture that reads as prompt i in view i.

python sample.py                         # the shipped glyphs-eq: A, and V when turned; writes a page to look at
python sample.py --model FOLDER --prompts "the letter A" "the letter V" --views identity rotate_180 --out DIR
python sample.py --prompts "the letter A" "the letter V" --num-samples 32 --keep 4 --animate mp4        # the best four of 32
"""

from __future__ import annotations

import argparse
import sys
import time

from eqldm.command import Parser, error_line, real, whole
from eqldm.paths import place_option
from eqldm.ranges import SAMPLING, SEED


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add(
        "--model",
        type=place_option,
        help="model folder (a diffusers pipeline), or RUN@STEP: a run's checkpoint; default: the shipped glyphs-eq",
    )
    add("--prompts", nargs="+", help="one for each view; default, with glyphs-eq and two views: the letter A, the letter V")
    add("--views", nargs="+", help="one for each prompt, the upright one too (default: identity rotate_180)")
    add("--components", metavar="NAME", help="parts in place of views: hybrid:0.05 (low, high), hybrid:0.08:0.03, colour, motion:0.3")
    add("--reference", type=place_option, metavar="FILE", help="a picture, one part of which is kept")
    add("--hold", metavar="PART", help="which: low, high, grey, colour, moving, still, ...")
    add("--style", default="", help='goes before each prompt: "an oil painting of"')
    add("--negative-prompt", nargs="+", default=[""], help="one, or one for each prompt")
    add("--num-samples", type=whole(1, 10**5), default=8, help="pictures, of seeds SEED, SEED + 1, ... (default: 8)")
    add("--seed", type=whole(SEED), default=0, help="of the first picture (default: 0)")
    add(
        "--batch-size",
        type=whole(1, 4096),
        default=16,
        help="pictures sampled together; does not change them beyond rounding (default: 16)",
    )
    add("--keep", type=whole(1, 10**5), help="of all that are sampled keep so many, those that read best: by the judge (letters) or --clip")
    add("--clip", type=place_option, metavar="FOLDER", help="a CLIP of transformers, for --keep")
    add("--animate", nargs="+", default=[], choices=["mp4", "gif", "webp"], help="each picture moving from view to view")
    add("--num-inference-steps", type=whole(SAMPLING["num_inference_steps"]), default=30, help="default: 30")
    add(
        "--guidance-scale",
        type=real(SAMPLING["guidance_scale"]),
        nargs="+",
        default=[5.0],
        help="one, or one for each prompt; up to 1 is unguided (default: 5)",
    )
    add("--guidance-rescale", type=real(SAMPLING["guidance_rescale"]), default=0.0, help="0 to 1, against too much contrast")
    add("--reduction", default="mean", help="of the views: mean, weighted (--weights), rectified (keeps the noise's variance), alternate")
    add("--weights", type=real(SAMPLING["weights"]), nargs="+", help="of the views")
    add("--blend", default="latents", help="latents, or pixels: for models whose latents do not turn (slow)")
    add("--scheduler", help="ddim, ddpm, euler, euler_ancestral, dpm++, unipc, flow_euler; default: the model's own")
    add(
        "--time-travel",
        type=whole(SAMPLING["time_travel"]),
        default=1,
        help="how often each step of --travel-band is done, after its noise was given back",
    )
    add(
        "--travel-band",
        type=real(SAMPLING["travel_band"]),
        nargs=2,
        default=[0.2, 0.8],
        help="from which to which share of the steps (default: 0.2 0.8)",
    )
    add("--image-size", type=whole(SAMPLING["image_size"]), help="pixels a side; default: what the UNet was trained at")
    add("--upscale", type=whole(SAMPLING["upscale"]), default=1, help="a second pass, so many times larger, that keeps every view")
    add(
        "--upscale-strength",
        type=real(SAMPLING["upscale_strength"]),
        default=0.5,
        help="the share of the steps that it takes (default: 0.5)",
    )
    add("--decoding", help="upright, or views: the mean over the views (default: views where one cuts the picture up)")
    add("--symmetrise", action="store_true", help="decode as the mean over the square's symmetries (8 x the decoding)")
    add("--force", action="store_true", help="the view negate for models that were not trained with it, too")
    add("--device", help="cpu, cuda, cuda:1; default: a GPU where there is one")
    add("--precision", choices=["auto", "32-true", "bf16-mixed"], default="auto", help="auto: bfloat16 where it is native")
    add("--attention-slicing", action="store_true", help="less memory, slower")
    add("--tiled", action="store_true", help="decode large pictures in tiles")
    add("--offload", action="store_true", help="networks on the GPU only while they compute")
    add("--out", type=place_option, help="folder for index.html, SEED.png, SEED.json and sheet.png; default: runs/samples/ and the time")
    args = parser.parse_args()
    for name in [name for name, value in vars(args).items() if value == "" and name != "style"]:
        parser.error(f"--{name.replace('_', '-')}: got an empty text (a variable that is not set?): give a value, or leave it out")
    if args.views is not None and args.components:
        parser.error("--views and --components: give one of them")
    args.views = args.views or ([] if args.components else ["identity", "rotate_180"])
    if args.prompts is None:
        if args.model is not None or len(args.views) != 2:
            parser.error("--prompts: give one for each view (only glyphs-eq with two views has a default)")
        args.prompts = ["the letter A", "the letter V"]
    if args.clip and not args.keep:
        parser.error("--clip chooses what is kept: give --keep too")
    args.out = args.out or time.strftime("runs/samples/%Y%m%d-%H%M%S")
    return args


def main() -> None:
    args = parse_args()
    from eqldm.sample import sample_to_folder  # after parsing, so that --help answers at once

    try:
        page = sample_to_folder(args)
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
    print(f"open in a browser: {page}")


if __name__ == "__main__":
    main()
