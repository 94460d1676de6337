"""Evaluate model folders: python -m eqldm.evaluate MODEL [MODEL ...] --data SHARDS --out DIR

    python -m eqldm.evaluate eqldm/pretrained/glyphs-eq --baseline eqldm/pretrained/glyphs-base --data SHARDS --out DIR
    python -m eqldm.evaluate swap=sd15@vae=eq-vae --metrics fit --data SHARDS --out DIR      does this UNet fit this VAE?
    torchrun --nproc-per-node 8 -m eqldm.evaluate ...      (or srun: each process takes every n-th batch)

A model is `[NAME=]FOLDER[@OPTION=VALUE,...]`. FOLDER is a diffusers folder, or RUN@STEP, a checkpoint of a run. A folder with a VAE alone
is not asked what needs a UNet. The options say how the model is put together and sampled: vae (the folder of another VAE), blend,
reduction, weights, scheduler, guidance_scale, guidance_rescale, num_inference_steps, time_travel, symmetrise, decoding.

Writes DIR/report.html (one file, opens offline), DIR/report.md, and for each model DIR/NAME/metrics.json and pictures; docs/metrics.md says
what each figure means. The report is of the last command alone. What was measured is kept in DIR: the same command continues where it was
stopped, and one that asks for more reuses what is there for the same pictures, options, batch size, device type and code.

Exit status: 3 where a metric was not computed because weights are missing (the report lists them with the way to get them; `--without` says
that you do not want them); 1 where a model or a question failed (the report names it and holds all other results; the same command tries it
again).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from eqldm.command import Parser, error_line, real, whole
from eqldm.evaluation.entries import parse_entries
from eqldm.evaluation.failures import forget_failures
from eqldm.evaluation.instruments import WEIGHTS
from eqldm.evaluation.results import Result, keep, write_results
from eqldm.evaluation.run import QUESTIONS, Evaluation
from eqldm.paths import place_option
from eqldm.processes import checked_device, pick_device, process_rank
from eqldm.ranges import PICTURE_SIDE, SAMPLING, SEED
from eqldm.run_model import opened

FULL = {"num_images": 512, "num_letters": 256, "num_pairs": "128", "num_inference_steps": 20}
QUICK = {"num_images": 128, "num_letters": 64, "num_pairs": "32", "num_inference_steps": 10}
INCOMPLETE = 3  # exit status


def evaluate(args: argparse.Namespace, command: str) -> tuple[Path | None, bool, list[str]]:
    """(The path of the report, or None where other processes are still at work or all models failed; whether weights were missing; what
    failed). The last two are said by the process that writes the report alone: a launcher ends all where one exits with an error."""
    rank, world = place = process_rank()
    entries = parse_entries([*([args.baseline] if args.baseline else []), *args.models])
    entries = [replace(entry, folder=opened(entry.folder), vae=entry.vae and opened(entry.vae)) for entry in entries]
    evaluation = Evaluation(args, entries, place)
    evaluation.prepare(entries)  # before anything long
    results: dict[str, Result] = {}

    def ask() -> None:
        evaluation.look_at_data()
        for entry in entries:
            if entry.name in evaluation.over:
                continue
            if (result := evaluation.answer(entry)) is not None:
                results[entry.name] = result
                keep(evaluation.out, result, command)

    ask()
    if world > 1 and len(evaluation.over) < len(entries):  # others may have finished meanwhile
        ask()
    if len(evaluation.over) < len(entries):
        print(f"process {rank} of {world} is done: the report is written by the one that finishes last")
        return None, False, []
    forget_failures(evaluation.out)  # they are in the report
    found = [results[entry.name] for entry in entries if entry.name in results]  # in the tables' order, whichever was found first
    for name in [entry.name for entry in entries if entry.name not in results and (evaluation.out / entry.name / "metrics.json").exists()]:
        evaluation.failed.append(f"'{evaluation.out / name}' still holds what an earlier command found of '{name}'")
    if not found:
        return None, bool(evaluation.missing), evaluation.failed
    if (first := entries[0].name) not in results:
        others = f", and differences are from '{found[0].entry.name}' instead" if len(found) > 1 else ""
        evaluation.failed.append(f"'{first}', which all others are held against, is not in the report{others}")
    title = f"{evaluation.count} pictures of {args.data}"
    report = write_results(evaluation.out, found, evaluation.missing, evaluation.notes, title, evaluation.failed)
    return report, bool(evaluation.missing), evaluation.failed


def pairs(text: str) -> str:
    """The `type` of an option that is a number of pairs, or all of them; as text."""
    return text if text == "all" else str(whole(2, 10**6)(text))


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="[NAME=]FOLDER[@OPTION=VALUE,...]: options as of sample.py, and vae=FOLDER")
    add("--data", type=place_option, required=True, help="held-out pictures: a shard folder, the address of one, or a folder of pictures")
    add("--image-size", type=whole(PICTURE_SIDE), help="for a folder of pictures: pixels a side that they are resized and cropped to")
    add("--out", type=place_option, required=True, help="folder for the report, and for what is kept of the measurements")
    add(
        "--baseline",
        metavar="MODEL",
        help="a further model, with which all others are compared; it comes first in the tables (default: the first MODEL)",
    )
    add(
        "--metrics",
        nargs="+",
        action="extend",
        choices=QUESTIONS,
        help="questions to answer (default: all, but components only where --components names some)",
    )
    add(
        "--views",
        nargs="+",
        action="extend",
        metavar="VIEW[,VIEW...]",
        help="views of the anagrams to sample, beside the upright one: rotate_180, or rotate_90,rotate_180 for three views in one picture; "
        "equivariance is measured under them too (default: rotate_180)",
    )
    add(
        "--components",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="pictures to compose of parts, one prompt each: hybrid:0.06, colour, motion:0.3",
    )
    add(
        "--judge",
        nargs="+",
        action="extend",
        type=place_option,
        metavar="[NAME=]FOLDER",
        help="classifiers that read letters (default: the shipped one, where the data are labelled letters). Of several, the report gives "
        "the mean, the range, each one's figures and their agreement; distances use the features of the first",
    )
    add(
        "--features",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=WEIGHTS",
        help="timm backbones for FID, KID, precision and recall",
    )
    add(
        "--inception",
        type=place_option,
        metavar="FILE",
        help="weights of FID's InceptionV3 (default: from torch's hub folder; not needed where a judge reads or --features are given)",
    )
    add("--clip", type=place_option, metavar="FOLDER", help="a CLIP of transformers, for CLIP score, alignment and concealment")
    add(
        "--without",
        nargs="+",
        action="extend",
        choices=WEIGHTS,
        default=[],
        help="leave out the metrics that need these weights; the exit status is then 0",
    )
    add(
        "--prompt-pairs",
        type=place_option,
        metavar="FILE",
        help="YAML of prompt pairs for anagrams of other things than letters (default: the shipped list)",
    )
    # a distribution takes two
    add("--num-images", type=whole(2, 10**6), help="real pictures, for reconstruction, equivariance, fit and distances (default: 512)")
    add("--num-letters", type=whole(2, 10**6), help="pictures sampled for generation, from letters or the data's captions (default: 256)")
    add(
        "--num-pairs",
        type=pairs,
        help="pairs of prompts sampled for each of --views; all: every ordered pair of letters, with their matrix (default: 128)",
    )
    add("--num-seeds", type=whole(1, 10**4), default=1, help="pictures of each pair (default: 1)")
    add(
        "--chooser",
        type=place_option,
        metavar="FOLDER",
        help="another judge, which picks the best of each pair's --num-seeds pictures; how often the best reads right is reported too",
    )
    add("--num-shown", type=whole(1, 1000), help="sampled pictures shown on each question's sheet (default: 24; 12 above 128 px)")
    add("--seed", type=whole(SEED), default=0, help="seed of the first sampled picture; picture k has seed + k")
    add("--batch-size", type=whole(1, 4096), help="pictures computed together (default: 64 up to 128 px, 4 at 512 px)")
    add("--num-inference-steps", type=whole(SAMPLING["num_inference_steps"]), help="default: 20")
    add("--guidance-scale", type=real(SAMPLING["guidance_scale"]), default=5.0)
    add("--precision", choices=["auto", "32-true", "bf16-mixed"], default="auto", help="of sampling; auto: bfloat16 where it is native")
    add("--quick", action="store_true", help=f"a first look: {', '.join(f'{name} {value}' for name, value in QUICK.items())}")
    add("--device", default=str(pick_device(process_rank()[0])))
    args = parser.parse_args()
    for name in [name for name, value in vars(args).items() if value == ""]:
        parser.error(f"--{name.replace('_', '-')}: got an empty text (a variable that is not set?): give a value, or leave it out")
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.views = args.views or ["rotate_180"]  # no default of argparse's, which would be extended
    if args.metrics is None:
        args.metrics = [name for name in QUESTIONS if name != "components" or args.components]
    return args


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that do not fit each other, or the machine."""
    checked_device(args.device, f"--device {args.device}")
    if ("components" in args.metrics) != bool(args.components):
        raise ValueError("--metrics components and --components NAME (hybrid:0.06, colour, motion:0.3) need each other")


def main() -> None:
    try:
        args = parse_args()
        check(args)
        report, incomplete, failed = evaluate(args, shlex.join(["python", "-m", "eqldm.evaluate", *sys.argv[1:]]))
        if report is not None:
            print(f"report: {report}")
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))
    if failed:
        sys.exit("\n".join(f"error: {text}" for text in failed))
    if incomplete:
        sys.exit(INCOMPLETE)


if __name__ == "__main__":
    main()
