"""Does it read as both? Pictures of two prompts or more, one upright and each other in a view of its own.

Ambigramability: the share of letters that the judge reads right in *every* view. Source: arXiv 2306.12049, section 5. Pairs of letters that
need no anagram, and of equal letters, stand apart (`lookalikes.populations`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.clip import alignment, concealment
from eqldm.evaluation.judge import LETTERS
from eqldm.evaluation.judges import add_agreement, add_each, add_share, by_judge
from eqldm.evaluation.lookalikes import populations, trivial
from eqldm.evaluation.quality import RealPictures, distances, features_of, textures
from eqldm.evaluation.real_letters import credit
from eqldm.views import View

PROMPT_PAIRS = Path(__file__).parent / "prompt_pairs.yaml"
QUANTILES = (0.9, 0.95)  # of alignment and concealment, as Visual Anagrams reports them


@dataclass(frozen=True)
class Reading:
    """Sampled pictures [N, 3, H, W] and what the judge read: wanted and read are [views, N] label numbers."""

    pictures: Tensor
    wanted: Tensor
    read: Tensor

    @property
    def right(self) -> Tensor:
        """[views, N] bool."""
        return self.wanted == self.read

    def of(self, numbers: Tensor) -> Reading:
        """That of these pictures alone, in this order."""
        return Reading(self.pictures[numbers], self.wanted[:, numbers], self.read[:, numbers])


def every_pair() -> Tensor:
    """[676, 2] label numbers: every ordered pair of letters, of equal ones too."""
    return torch.cartesian_prod(torch.arange(len(LETTERS)), torch.arange(len(LETTERS)))


def letter_tuples(count: int, num_views: int = 2, seed: int = 0, views: Sequence[View] = ()) -> Tensor:
    """[num_views, count] label numbers: a seeded draw from all ordered tuples of different letters; of pairs without repeats while they
    last.

    views: those that are trivial under them are passed over; all others come in the same order whatever the views.
    """
    generator = torch.Generator().manual_seed(seed)
    every = every_pair()
    every = every[every[:, 0] != every[:, 1]]
    drawn: list[Tensor] = []
    while sum(map(len, drawn)) < count:
        if num_views > 2:
            tuples = torch.stack([torch.randperm(len(LETTERS), generator=generator)[:num_views] for _ in range(count)])
        else:
            tuples = every[torch.randperm(len(every), generator=generator)]
        drawn.append(tuples[~trivial(tuples.T, views)] if views else tuples)
    return torch.cat(drawn)[:count].T


def read_prompts(path: Path, num_views: int = 2) -> list[tuple[str, ...]]:
    """(upright, turned, ...) prompts, one a view, of a file of the form of prompt_pairs.yaml; of more views than two, the subjects after
    a pair's own are those of the next pairs. Raises ValueError, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"no prompt pairs at '{path}': wanted a YAML of `pairs`, of two subjects each, and `styles`")
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"'{path}' is no YAML: {str(error).splitlines()[0]}") from error
    pairs = found.get("pairs") if isinstance(found, dict) else None
    if not isinstance(pairs, list) or len(pairs) < 2 or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"'{path}': wanted a YAML of `pairs`, two or more, a list of two subjects each, and perhaps `styles`")
    styles = found.get("styles") or [""]
    subjects = [subject for pair in pairs for subject in pair]
    tuples = [[subjects[(2 * k + i) % len(subjects)] for i in range(num_views)] for k in range(len(pairs))]
    return [tuple(f"{styles[k % len(styles)]} {subject}".strip() for subject in chosen) for k, chosen in enumerate(tuples)]


def unordered(tuples: Tensor) -> Tensor:
    """[T] cluster numbers of tuples [T, views]: those of the same in any order are one, for under a symmetric view they are one task."""
    return torch.unique(tuples.sort(1).values, dim=0, return_inverse=True)[1]


def title(views: Sequence[View]) -> str:
    """What results call anagrams of these views, of which the first is upright: `rotate_180`, `rotate_90,rotate_180`."""
    return ",".join(view.name for view in views[1:])


def sides(count: int) -> list[str]:
    """What results call each of `count` views: upright, turned; of more than two upright, turned_1, turned_2, ..."""
    return ["upright", "turned"] if count == 2 else ["upright", *(f"turned_{i}" for i in range(1, count))]


def add_readings(
    findings: Findings, prefix: str, faces: Sequence[str], values: dict[str, Tensor], wanted: Tensor | None, temperature: float | None,
    num_seeds: int = 1, *, clusters: Tensor, views: Sequence[View] = (),
) -> None:  # fmt: skip
    """Adds the scores of `add_scores`, and where the pictures are of letters, those of each of their `populations`: of different letters
    that need an anagram under the plain names, of the others, where there are any, under `trivial/...` and `equal/...`.

    clusters: [N] of pictures that are alike, which intervals draw together.  views: of the faces, unless those are parts.
    """
    if wanted is None:
        add_scores(findings, prefix, faces, values, None, temperature, num_seeds)
        return
    for name, mask in populations(wanted, views).items():
        if not bool(mask.any()):
            continue
        read = {key: value[mask] for key, value in values.items() if key.split("/")[0] in ("read", "forced", "chosen", "similarity")}
        found = Findings(clusters[mask])  # drawn from its own pictures: some resamples of all would hold none of a small population
        add_scores(found, prefix + name, faces, read, wanted[:, mask], temperature, num_seeds)
        findings.take(found)


def add_scores(
    findings: Findings, prefix: str, faces: Sequence[str], values: dict[str, Tensor], wanted: Tensor | None, temperature: float | None,
    num_seeds: int = 1,
) -> None:  # fmt: skip
    """Adds what is read of pictures under views, or of their parts, called `faces`, each name after `prefix`:

    `ambigramability`   the share that the judge reads right in every one;  `read_right_FACE` in each;  wanted: [faces, N]
    `forced_ambigramability`, `forced_read_right_FACE`   the same where it must name one of the 26 letters, as the literature's must
    `best_of_K`, `forced_best_of_K`   the same of the picture that the chooser (if any) likes best of a tuple's K = num_seeds
    `alignment`, `concealment`   means of `clip.alignment` and `clip.concealment` (at CLIP's temperature), and their `_q90`, `_q95`

    Of several judges these are means, with each one's beside them (see `judges.add_share`), and `judges/kappa` is how far they agree on
    what reads right in every view. Pictures are in rounds: each tuple of prompts once, then each once more, of the next seeds.
    """
    if wanted is not None:
        for name, what in (("", "read"), ("forced_", "forced")):
            right = {judge: (read == wanted.T).double() for judge, read in by_judge(values, what).items()}
            both = {judge: each.prod(1) for judge, each in right.items()}
            add_share(findings, prefix, f"{name}ambigramability", both)
            if "chosen" in values and num_seeds > 1:
                add_share(findings, prefix, f"{name}best_of_{num_seeds}", both, best_of(values["chosen"], num_seeds))
            for i, face in enumerate(faces):
                add_share(findings, prefix, f"{name}read_right_{face}", {judge: each[:, i] for judge, each in right.items()})
            if what == "read":
                add_agreement(findings, prefix, both)
    if "similarity" in values:
        if temperature is None:
            raise ValueError("concealment is taken at CLIP's temperature, which is not given: wanted `temperature`")
        scores = {"alignment": alignment(values["similarity"]), "concealment": concealment(values["similarity"], temperature)}
        for name, score in scores.items():
            findings.mean(f"{prefix}{name}", score)
            findings.metrics |= {f"{prefix}{name}_q{q * 100:.0f}": float(score.double().quantile(q)) for q in QUANTILES}


def add_credit(findings: Findings, prefix: str, real_letters: Mapping[str, Tensor], wanted: Tensor, views: Sequence[View]) -> None:
    """Adds what plain letters would be credited with in place of pictures that are wanted as letters [views, N] (`real_letters.credit`), as
    `[forced_]ambigramability_data`, for each of their `populations`: the mean over judges, and each one's."""
    for name, mask in populations(wanted, views).items():
        for forced, what in (("", "read"), ("forced_", "forced")):
            if bool(mask.any()) and (shares := credit(real_letters, wanted[:, mask], what)) is not None:
                findings.metrics[f"{prefix}{name}{forced}ambigramability_data"] = sum(shares.values()) / len(shares)
                add_each(findings.metrics, prefix + name, f"{forced}ambigramability_data", shares)


def best_of(scores: Tensor, num_seeds: int) -> Tensor:
    """[N] float64: 1 for the picture of the highest score of each tuple, 0 for its others. scores: [N], in rounds."""
    rounds = scores.view(num_seeds, -1)
    return torch.zeros_like(rounds, dtype=torch.float64).scatter_(0, rounds.argmax(0, keepdim=True), 1.0).flatten()


def anagram_metrics(
    views: Sequence[View], values: dict[str, Tensor], real: RealPictures, wanted: Tensor | None = None, clusters: Tensor | None = None,
    temperature: float | None = None, num_seeds: int = 1, real_letters: Mapping[str, Tensor] | None = None,
) -> Findings:  # fmt: skip
    """Of what `Sampled` measured under the views (identity, V, ...), each as `anagram/V,.../...`, with `_upright` and `_turned` for the two
    (see `sides`): the readings of `add_readings`, with, of what `RealLetters` measured, if anything,

    `ambigramability_data`, `forced_ambigramability_data`   see `real_letters.credit`; where all wanted letters have a picture

    and of all pictures, whatever their letters,

    `kid_NAME_*`, `fid_NAME_*`, `precision_NAME_*`, `recall_NAME_*`, `texture_over_contrast_*`, `contrast_*`, `texture_*`   as of plain ones
    `round_trip_psnr`   dB of D(E(x)) against x, upright

    clusters: [N] of pictures that are alike, which intervals draw together; by default those of the same letters.
    """
    if clusters is None:
        clusters = torch.arange(len(values["energy"])) if wanted is None else unordered(wanted.T)
    findings, prefix, names = Findings(clusters), f"anagram/{title(views)}/", sides(len(views))
    add_readings(findings, prefix, names, values, wanted, temperature, num_seeds, clusters=clusters, views=views)
    if wanted is not None and real_letters is not None:
        add_credit(findings, prefix, real_letters, wanted, views)
    for i, side in enumerate(names):
        distances(findings, real, {name: features[:, i] for name, features in features_of(values).items()}, prefix, f"_{side}")
        textures(findings, real, values["energy"][:, i], values["contrast"][:, i] if "contrast" in values else None, prefix, f"_{side}")
    if "round_trip" in values:
        findings.mean(f"{prefix}round_trip_psnr", values["round_trip"])
    return findings


def letter_rates(values: dict[str, Tensor], wanted: Tensor) -> Tensor:
    """[26, 26] share of pictures of each ordered pair of letters that read right in both views, the mean over judges; NaN where there is
    none of a pair."""
    right = torch.stack([(read == wanted.T).all(1).double() for read in by_judge(values, "read").values()]).mean(0)
    cells, size = wanted[0] * len(LETTERS) + wanted[1], len(LETTERS) ** 2
    held = torch.bincount(cells, minlength=size)
    return (torch.bincount(cells, right, minlength=size) / held).view(len(LETTERS), -1)
