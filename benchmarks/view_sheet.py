"""The figure of docs/sampling.md: for each view, the best of some seeds of a pair of letters that suits it, upright and turned.

python benchmarks/view_sheet.py [--num-samples 16] --out docs/figures/views.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.progress import track

from eqldm.anagram.render import picture_sheet
from eqldm.anagram.sampling import Sampler
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.model_folder import PRETRAINED
from eqldm.views import IDENTITY, parse_view

PAIRS = {  # pairs that read right in `python -m eqldm.evaluate glyphs-eq --metrics anagram --views ...`
    "rotate_90": "NZ", "rotate_180": "DU", "rotate_270": "EH", "mirror": "PR", "flip": "MW", "transpose": "HI", "anti_transpose": "PE",
    "patch_permute:2": "BH", "patch_permute:4": "VK", "pixel_permute": "ZW", "jigsaw:2": "HK", "inner_circle": "DQ",
    "square_hinge:2": "TE", "square_hinge:4": "AX", "skew": "VK",
}  # fmt: skip


def run(out: Path, num_samples: int, columns: int = 3) -> None:
    sampler, judge = Sampler.open(PRETRAINED / "glyphs-eq", precision="auto"), Judge.open()
    cells = []
    for name, pair in track(PAIRS.items(), "views", transient=True):
        views, labels = [IDENTITY, parse_view(name, sampler.side())], [LETTERS.index(letter) for letter in pair]
        pictures = sampler([f"the letter {letter}" for letter in pair], views, range(num_samples))
        best = pictures[int(judge.worst_view([view(pictures) for view in views], labels).argmax())]
        cells.append((name, pair, [view(best) for view in views]))
    lines = -(-len(cells) // columns)
    blank = torch.ones_like(cells[0][2][0])
    rows, headings = [], []
    for i in range(lines):
        row = [cells[i + k * lines] if i + k * lines < len(cells) else None for k in range(columns)]
        rows.append([x for cell in row for x in (cell[2] if cell else [blank, blank])])
        headings.append("   ".join(f"{cell[0]} {cell[1][0]}/{cell[1][1]}" for cell in row if cell))
    out.parent.mkdir(parents=True, exist_ok=True)
    picture_sheet(rows, headings, ["upright", "turned"] * columns).save(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-samples", type=int, default=16, help="seeds of each view, of which the judge keeps the best")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.num_samples < 1:
        parser.error(f"--num-samples: got {args.num_samples}, wanted at least 1")
    try:
        run(args.out, args.num_samples)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
