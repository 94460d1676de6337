"""What would be if one sampled with maps that are no views: python benchmarks/no_views.py --out docs/figures/no_views.png

For each map T: the variance of T(noise) and how alike neighbours are in it, where white noise has 1 and 0 (a view keeps both); and two
letters by glyphs-eq, upright and as T shows them, the best of some seeds. Prints the table, writes the figure.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from eqldm.anagram.render import picture_sheet
from eqldm.anagram.sampling import Sampler
from eqldm.atomic import write_whole
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.markdown import markdown
from eqldm.model_folder import PRETRAINED
from eqldm.views import IDENTITY, View, parse_view
from eqldm.views.components import blur


@dataclass(frozen=True)
class Map:
    """A linear map in the place of a `View`, with what comes nearest to its inverse."""

    name: str
    forth: Callable[[Tensor], Tensor]
    inverse: Callable[[Tensor], Tensor]
    cells: int = 1  # it cuts nothing up

    def __call__(self, x: Tensor) -> Tensor:
        return self.forth(x)

    def check(self, height: int, width: int, where: str = "") -> None:
        """It acts on any grid."""


def turned(x: Tensor, degrees: float) -> Tensor:
    """x [..., C, H, W] turned counter-clockwise."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return warped(x, [[c, -s, 0], [s, c, 0]])


def stretched(x: Tensor, factor: float) -> Tensor:
    """x [..., C, H, W] stretched to `factor` of its width about its middle."""
    return warped(x, [[1 / factor, 0, 0], [0, 1, 0]])


def warped(x: Tensor, matrix: list[list[float]]) -> Tensor:
    """x [..., C, H, W], each place from where a matrix (right, down) takes it, bilinearly; what comes from outside is of the border."""
    flat = x.reshape(-1, *x.shape[-3:])
    grid = F.affine_grid(flat.new_tensor([matrix]).expand(len(flat), -1, -1), list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, "bilinear", "border", align_corners=False).reshape(x.shape)


def balanced(x: Tensor, factor: float) -> Tensor:
    """Channels scaled from `factor` to 1 / `factor`."""
    return x * torch.logspace(math.log10(factor), -math.log10(factor), x.shape[-3]).to(x)[:, None, None]


MAPS: list[View | Map] = [
    parse_view("rotate_180"),
    Map("rotate_170", lambda x: turned(x, 170), lambda x: turned(x, -170)),
    Map("rotate_135", lambda x: turned(x, 135), lambda x: turned(x, -135)),
    Map("blur", lambda x: blur(x, 0.06), lambda x: x),
    Map("white_balance", lambda x: balanced(x, 1.5), lambda x: balanced(x, 1 / 1.5)),
    Map("stretch", lambda x: stretched(x, 1.5), lambda x: stretched(x, 1 / 1.5)),
]


def statistics(view: View | Map, channels: int, side: int) -> tuple[float, float, float]:
    """(least, greatest variance over cells, mean correlation of neighbours) of what a map makes of white noise."""
    z = view(torch.randn(4096, channels, side, side, generator=torch.Generator().manual_seed(0)))
    variance = z.var(0)
    beside = (z[..., 1:] * z[..., :-1]).mean(0) / (variance[..., 1:] * variance[..., :-1]).sqrt()
    return float(variance.min()), float(variance.max()), float(beside.mean())


def run(out: Path, letters: str, num_samples: int) -> str:
    sampler, judge = Sampler.open(PRETRAINED / "glyphs-eq", precision="auto"), Judge.open()
    labels, rows, shown = [LETTERS.index(letter) for letter in letters], [], []
    for view in MAPS:
        least, greatest, beside = statistics(view, sampler.vae.config.latent_channels, sampler.side())
        views = [IDENTITY, cast(View, view)]  # which most are not: that is what is tried here
        pictures = sampler([f"the letter {letter}" for letter in letters], views, range(num_samples))
        score = judge.worst_view([pictures, view(pictures).clamp(-1, 1)], labels)
        best = pictures[int(score.argmax())]
        rows.append([f"`{view.name}`", f"{least:.2f} to {greatest:.2f}", f"{beside:.2f}", f"{float((score > 0.5).double().mean()):.0%}"])
        shown.append([best, view(best).clamp(-1, 1)])
    sheet = picture_sheet(list(zip(*shown)), ["upright", "as T shows it"], [view.name for view in MAPS], 1)
    write_whole(out, lambda path: sheet.save(path, "PNG"))
    return markdown(["T", "variance of T(noise), over cells", "correlation of neighbours", f"of {num_samples} read right in both"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--letters", default="AV", help="two, which half a turn makes of each other")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if args.num_samples < 1 or len(args.letters) != 2 or not set(args.letters) <= set(LETTERS):
        parser.error(f"wanted at least one sample, and two of {LETTERS}: got {args.num_samples}, '{args.letters}'")
    try:
        print(run(args.out, args.letters, args.num_samples))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
