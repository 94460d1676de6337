"""The tables of the study over training seeds, of readings that are known."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import torch
from safetensors.torch import save_file

import training_seeds
from eqldm.config import load_config
from eqldm.evaluation.anagram import letter_tuples
from eqldm.evaluation.judge import NO_LETTER
from eqldm.views import IDENTITY, parse_view
from steps import slug

ROOT = Path(__file__).parents[1]
PAIRS = letter_tuples(40, 2, views=[IDENTITY, parse_view("rotate_180", 8)])


def evaluated(folder: Path, rate: float, error: float) -> None:
    """What `evaluate` leaves of 40 pairs, two pictures each: both judges read the first `rate` of the pairs right."""
    read = PAIRS.repeat(1, 2).T.contiguous()
    read[torch.arange(80) % 40 >= 40 * rate] = NO_LETTER
    folder.mkdir(parents=True)
    save_file({"read/a": read, "read/b": read.clone(), "forced/a": read.clone()}, folder / "anagram_rotate_180.safetensors")
    metrics = {f"anagram/rotate_180/{name}": 1.0 for name in ("kid_judge_upright", "kid_judge_turned", "texture_over_contrast_upright")}
    metrics |= {"equivariance/mean/latent_error": error, "equivariance/mean/psnr": 20 - 10 * error}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def rows(table: str) -> dict[str, list[str]]:
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in found}


def test_tables_hold_what_was_read(tmp_path):
    args, folders = Namespace(num_pairs=40, num_samples=2), [tmp_path / f"evaluation{seed}" for seed in range(3)]
    rates = {name: 0.5 if name.startswith("D4") else 0.1 for name in training_seeds.METHODS}
    for k, folder in enumerate(folders):
        for name, rate in rates.items():
            evaluated(folder / slug(name), rate + 0.025 * k, 0.1)
    first, minus_plain, *_ = training_seeds.report(args, folders).split("\n\n")
    assert rows(first)["D4"][:3] == ["52.5%", "52.5 to 52.5 %", "50.0, 52.5, 55.0 %"]
    difference, p, shares, permuted = rows(minus_plain)["D4"]
    assert difference.startswith("+40.0 %") and float(p) < 0.01 and permuted == "0.1" and shares == "0%, 100%, 0%"
    assert rows(minus_plain)["plain, blended in pixels"][-1] == "-"  # of the same models
    assert "D4" in rows(minus_plain) and "plain" not in rows(minus_plain)


def test_the_dose_is_ranked(tmp_path):
    args, found = Namespace(num_pairs=40, num_samples=2), {}
    for k, error in enumerate((0.5, 0.3, 0.2, 0.1, 0.01)):
        evaluated(tmp_path / "out" / slug(f"loss {k}"), 0.1 + 0.1 * k, error)
        found[f"loss {k}, seed 0"] = tmp_path / "out", f"loss {k}"
    table = rows(training_seeds.dose(args, found))
    assert table["loss 4, seed 0"] == ["0.0100", "19.9", "50.0%"]
    assert table["Spearman's rho with both read right (p)"] == ["-1.00 (0.017)", "1.00 (0.017)", "of 5 losses"]
    evaluated(tmp_path / "again" / slug("loss 4"), 0.5, 0.02)
    again = rows(training_seeds.dose(args, found | {"loss 4, seed 1": (tmp_path / "again", "loss 4")}))
    assert again["loss 4, seed 1"][0] == "0.0200"  # another training of a loss makes p no smaller
    assert again["Spearman's rho with both read right (p)"] == table["Spearman's rho with both read right (p)"]


def test_every_loss_and_method_is_one_that_there_is():
    for loss in {**training_seeds.SEEDED, **training_seeds.DOSE}.values():
        load_config(ROOT / "configs/glyphs/eq_vae.yaml", [*training_seeds.ALL, *training_seeds.VARIANTS[loss]])
    assert {which for which, _ in training_seeds.METHODS.values()} <= training_seeds.SEEDED.keys()
    assert len(training_seeds.DOSE) == 6 and set(training_seeds.REFERENCES) < training_seeds.METHODS.keys()
