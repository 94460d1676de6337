"""Does it draw what it is asked for, and as well as real pictures? Plain pictures, one prompt each."""

from __future__ import annotations

import torch
from torch import Tensor

from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.judge import LETTERS
from eqldm.evaluation.judges import add_agreement, add_each, add_share, by_judge
from eqldm.evaluation.quality import RealPictures, distances, features_of, textures


def plain_letters(count: int, seed: int = 0) -> Tensor:
    """[1, count] label numbers, drawn alike: each letter in turn would lie farther apart than a draw does, and bias KID."""
    return torch.randint(len(LETTERS), (1, count), generator=torch.Generator().manual_seed(seed))


def letter_prompts(wanted: Tensor) -> list[list[str]]:
    """For each view, each picture's prompt: "the letter A" of label numbers [views, N]."""
    return [[f"the letter {LETTERS[label]}" for label in labels] for labels in wanted.tolist()]


def generation_metrics(
    values: dict[str, Tensor], real: RealPictures, wanted: Tensor | None = None, clusters: Tensor | None = None
) -> Findings:
    """Of what `Sampled` measured of plain pictures (one view):

    `generation/read_right`   the share that the judge reads right;  wanted: [1, N]; of several judges the mean, with each one's beside it
    `generation/read_right_data`   the same of the real pictures, which is what it can reach
    `generation/kid_NAME`, `fid_NAME`, `precision_NAME`, `recall_NAME`   see `distances`
    `generation/texture_over_contrast`, `contrast`, `texture`   see `textures`
    `generation/round_trip_psnr`   dB of D(E(x)) against x under the model's own VAE; not for pixel models
    `generation/clip_score`   mean similarity with the prompt, 0 where negative, times 100 (as torchmetrics has it; its source multiplies by
                              2.5 and puts "A photo depicts" before each prompt). Source: arXiv 2104.08718, section 3.

    clusters: [N] of pictures that are alike, which intervals draw together; by default none are. (Letters are drawn with their pictures: a
    resample of letters would leave a third of them out.)
    """
    count = len(values["energy"])
    findings = Findings(torch.arange(count) if clusters is None else clusters)
    if wanted is not None:
        right = {judge: (read[:, 0] == wanted[0]).double() for judge, read in by_judge(values, "read").items()}
        add_share(findings, "generation/", "read_right", right)
        if real.read_right is not None:
            findings.metrics["generation/read_right_data"] = real.read_right
            add_each(findings.metrics, "generation/", "read_right_data", real.read_right_each)
        add_agreement(findings, "generation/", right)
    distances(findings, real, {name: features[:, 0] for name, features in features_of(values).items()}, "generation/")
    textures(findings, real, values["energy"][:, 0], values["contrast"][:, 0] if "contrast" in values else None, "generation/")
    if "round_trip" in values:
        findings.mean("generation/round_trip_psnr", values["round_trip"])
    if "similarity" in values:
        findings.mean("generation/clip_score", 100 * values["similarity"][:, 0, 0].clamp_min(0))
    return findings
