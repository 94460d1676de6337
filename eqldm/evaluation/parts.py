"""Does each part read as its own prompt? Pictures that are composed of components, such as low and high frequencies.

Source: Factorized Diffusion, arXiv 2404.11615.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from eqldm.evaluation.anagram import add_readings
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.judges import add_each
from eqldm.evaluation.quality import RealPictures
from eqldm.views.components import Component


def part_metrics(
    title: str, components: Sequence[Component], values: dict[str, Tensor], real: RealPictures, clusters: Tensor,
    wanted: Tensor | None = None, temperature: float | None = None, num_seeds: int = 1,
) -> Findings:  # fmt: skip
    """Of what `Sampled` measured of parts, each as `components/TITLE/...`: the readings of `add_readings`, a face being a part, and

    `forced_read_right_PART_data`   of the real pictures' parts; a model may draw letters whose parts read better
    `round_trip_psnr`   dB of D(E(x)) against x, the whole

    title: what was asked for, `hybrid:0.06`.  clusters: [N] of pictures that are alike, which intervals draw together.
    """
    findings, prefix = Findings(clusters), f"components/{title}/"
    add_readings(findings, prefix, [part.name for part in components], values, wanted, temperature, num_seeds, clusters=clusters)
    for i, (part, share) in enumerate(zip(components, real.read_parts.get(title, ()))):
        findings.metrics[f"{prefix}forced_read_right_{part.name}_data"] = share
        each = {judge: shares[i] for judge, shares in real.read_parts_each.get(title, {}).items()}
        add_each(findings.metrics, prefix, f"forced_read_right_{part.name}_data", each)
    if "round_trip" in values:
        findings.mean(f"{prefix}round_trip_psnr", values["round_trip"])
    return findings
