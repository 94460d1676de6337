"""The benchmark scripts, on tiny random models: they run, resume, and compare on equal letters and seeds."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import torch

from eqldm.autoencoder.equivariance import IDENTITY_TRANSFORM, draw_groups
from eqldm.config import load_config
from eqldm.evaluation.sheets import letter_matrix
from eqldm.views import D4, Transform

ROOT = Path(__file__).parents[1]


def test_every_variant_of_the_losses_is_what_its_name_says():
    study = runpy.run_path(str(ROOT / "benchmarks" / "equivariance_losses.py"))
    configs = {n: load_config(ROOT / "configs/glyphs/eq_vae.yaml", [*study["ALL"], *o]) for n, o in study["VARIANTS"].items()}
    drawn = {name: [t for g in draw_groups(c.equivariance, 0, 3, list(range(64)), 4) for t in g.transforms] for name, c in configs.items()}
    assert set(drawn["plain (no equivariance)"]) == {IDENTITY_TRANSFORM}
    symmetries = {Transform(view) for view in D4}
    assert set(drawn["D4"]) == set(drawn["D4, implicit term alone"]) == symmetries
    assert set(drawn["rotations"]) < symmetries and not set(drawn["D4 + permutations"]) <= symmetries
    assert any(t.rescale for t in drawn["D4 + rescaling"]) and not any(t.rescale for t in drawn["D4"])
    assert configs["EQ-VAE's scheme"].equivariance.preset == "eqvae_paper"


def test_alignment_compares_three_maps(tiny_model_folder, tiny_pictures, monkeypatch, capsys):
    words = ["--vae", tiny_model_folder, "--to", tiny_model_folder, "--data", tiny_pictures, "--num-images", 6, "--num-decoded", 2]
    monkeypatch.setattr(sys, "argv", ["alignment.py", *map(str, words)])
    runpy.run_path(str(ROOT / "benchmarks" / "alignment.py"), run_name="__main__")
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in capsys.readouterr().out.splitlines()[2:]}
    assert rows.keys() == {"none", "orthogonal", "least squares"}
    assert rows["least squares"][0] == "1.00"  # the same VAE
    assert len({row[2] for row in rows.values()}) == 1  # without noise all decode alike


def test_the_letter_matrix_shows_each_pair():
    rates = torch.zeros(26, 26)
    rates[3, 7] = 1
    picture = letter_matrix(rates, "a", ["identity", "rotate_180"])
    assert picture.size == (800, 750)
    red = (255, 0, 0)
    assert red in [colour for _, colour in picture.getcolors(1 << 20)]
    unframed = letter_matrix(rates, "a", ["identity", "flip"])
    assert red not in [colour for _, colour in unframed.getcolors(1 << 20)]


# sampling.py


def test_sampling_is_timed_side_by_side(tiny_model_folder, tmp_path, monkeypatch, capsys):
    import sampling

    out = tmp_path / "deep" / "out.json"
    words = ["--model", tiny_model_folder, "--num-pictures", 2, "--rounds", 3, "--num-inference-steps", 1, "--device", "cpu", "--out", out]
    monkeypatch.setattr(sys, "argv", ["sampling.py", *map(str, words)])
    sampling.main()
    found = json.loads(out.read_text())
    assert {len(each) for each in found["seconds"].values()} == {3} and len(found["seconds"]) == 3
    assert all(0 < ratio["least"] <= ratio["median"] <= ratio["most"] for ratio in found["ratios"].values())
    assert "a loop of one / one batch" in capsys.readouterr().out
    assert sampling.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == {"median": 2.0, "least": 2.0, "most": 3.0}
