"""What sampling costs: one picture at a time, as Visual Anagrams does, against a batch; and latents against blending in pixels.

    python benchmarks/sampling.py [--model FOLDER] [--num-pictures 16] [--rounds 5] --out FILE.json

All are measured in turn, several rounds of it, in one process, so that what else the machine does falls on all alike; the table gives the
median of the rounds' ratios and their range. Times are of whole pictures: text encoding, steps, decoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from eqldm.anagram.sampling import Sampler
from eqldm.markdown import markdown
from eqldm.model_folder import PRETRAINED
from eqldm.training.run_folder import git_commit
from eqldm.views import parse_view


def measure(ways: Mapping[str, Callable[[int], object]], rounds: int, num_steps: int, warm_up: int | None = None) -> dict[str, list[float]]:
    """Seconds of each way, a list of the rounds; before them each is done once. ways: take the number of steps.  warm_up: the number of
    that first time, where it is another."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way(warm_up or num_steps)
    for _ in range(rounds):
        for name, way in ways.items():
            begun = time.perf_counter()
            way(num_steps)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times slower, by round."""
    each = [a / b for a, b in zip(slow, fast)]
    return {"median": statistics.median(each), "least": min(each), "most": max(each)}


def run(args: argparse.Namespace) -> str:
    sampler = Sampler.open(args.model, args.device, args.precision)
    prompts, views = ["the letter A", "the letter V"], [parse_view("identity"), parse_view("rotate_180")]
    seeds = range(args.num_pictures)
    ways = {
        "a loop of one": lambda n: [sampler(prompts, views, [seed], num_inference_steps=n) for seed in seeds],
        "one batch": lambda n: sampler(prompts, views, seeds, num_inference_steps=n),
        "one batch, blended in pixels": lambda n: sampler(prompts, views, seeds, blend="pixels", num_inference_steps=n),
    }
    seconds = measure(ways, args.rounds, args.num_inference_steps)
    ratios = {
        "a loop of one / one batch": ratio(seconds["a loop of one"], seconds["one batch"]),
        "blended in pixels / in latents": ratio(seconds["one batch, blended in pixels"], seconds["one batch"]),
    }
    rows = [[name, f"{args.num_pictures / statistics.median(each):.2f}"] for name, each in seconds.items()]
    text = markdown(["way", "pictures/s"], rows)
    text += "\n" + markdown(["ratio", "median", "range"], [
        [name, f"{found['median']:.2f}", f"{found['least']:.2f} to {found['most']:.2f}"] for name, found in ratios.items()
    ])  # fmt: skip
    about = {
        "model": str(args.model), "device": str(sampler.device), "precision": sampler.precision, "threads": torch.get_num_threads(),
        "num_pictures": args.num_pictures, "num_inference_steps": args.num_inference_steps, "commit": git_commit(),
    }  # fmt: skip
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**about, "seconds": seconds, "ratios": ratios}, indent=2) + "\n")
    return text + "\n" + ", ".join(f"{name} {value}" for name, value in about.items())


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=PRETRAINED / "glyphs-eq")
    parser.add_argument("--num-pictures", type=int, default=16)
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device")
    parser.add_argument("--precision", choices=["auto", "32-true", "bf16-mixed"], default="auto")
    parser.add_argument("--out", type=Path, help="JSON file of all rounds")
    args = parser.parse_args()
    if args.num_pictures < 2 or args.rounds < 1 or args.num_inference_steps < 1:
        parser.error("wanted --num-pictures of at least 2, --rounds and --num-inference-steps of at least 1")
    return args


def main() -> None:
    try:
        print(run(parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
