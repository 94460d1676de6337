"""The benchmark scripts, on tiny random models: they run, resume, and compare on equal letters and seeds."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops

from eqldm.autoencoder.equivariance import IDENTITY_TRANSFORM, draw_groups
from eqldm.config import load_config
from eqldm.evaluation.naming import file_name
from eqldm.evaluation.sheets import letter_matrix
from eqldm.model_folder import decode, encode
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
    rings = torch.zeros(26, 26, dtype=torch.bool)
    rings[12, 22] = True
    ringed = letter_matrix(rates, "a", ["identity", "flip"], {"": ~rings, "trivial/": rings})
    changed = ImageChops.difference(ringed, letter_matrix(rates, "a", ["identity", "flip"], {"": ~rings, "trivial/": ~rings & rings}))
    assert changed.crop((300, 200, 700, 700)).getbbox()


# first_steps.py, frame_average.py


def printed(script: str, words: list, monkeypatch, capsys) -> dict[str, list[str]]:
    """The cells of the table that a script prints, by row."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    runpy.run_path(str(ROOT / "benchmarks" / script), run_name="__main__")
    rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in capsys.readouterr().out.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


def test_first_steps(tiny_model_folder, tiny_pictures, monkeypatch, capsys):
    words = [tiny_model_folder, "--data", tiny_pictures, "--num-images", 6, "--num-noises", 3, "--num-inference-steps", 4]
    (cells,) = printed("first_steps.py", words, monkeypatch, capsys).values()
    assert len(cells) == 5 and all(float(cell.split()[0]) > 0 for cell in cells)


def test_a_frame_average_is_equivariant(tiny_vae, tiny_model_folder, tiny_pictures, monkeypatch, capsys):
    from frame_average import frame_average

    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        average = frame_average(lambda x: tiny_vae.encode(x).latent_dist.mean)
        for view in D4:
            torch.testing.assert_close(average(view(x)), view(average(x)), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(tiny_vae.encode(D4[1](x)).latent_dist.mean, D4[1](tiny_vae.encode(x).latent_dist.mean), atol=1e-3)
    rows = printed("frame_average.py", [tiny_model_folder, "--data", tiny_pictures, "--num-images", 4], monkeypatch, capsys)
    assert len(rows) == 5 and {row.rsplit(", ", 1)[-1] for row in rows} >= {"D(E(x))", "D'(E'(x))"}


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


# no_views.py


def test_maps_that_are_no_views():
    import no_views

    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(no_views.turned(x, 90), torch.rot90(x, 1, (-2, -1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(no_views.stretched(x, 1), x, atol=1e-5, rtol=0)
    least, greatest, beside = no_views.statistics(D4[2], 4, 8)
    assert 0.9 < least < 1 < greatest < 1.1 and abs(beside) < 0.01
    for view in no_views.MAPS[1:]:  # each is what its table says: the noise is no longer white, or not of one variance
        least, greatest, beside = no_views.statistics(view, 4, 8)
        assert least < 0.5 and (beside > 0.2 or view.name == "white_balance")
    torch.testing.assert_close(no_views.balanced(torch.ones(1, 3, 1, 1), 2)[0, :, 0, 0], torch.tensor([2.0, 1.0, 0.5]))


def test_one_samples_with_maps_that_are_no_views(tmp_path, monkeypatch):
    import no_views

    monkeypatch.setattr(no_views, "MAPS", no_views.MAPS[-1:])
    monkeypatch.setattr(sys, "argv", ["no_views.py", "--num-samples", "1", "--out", str(tmp_path / "deep" / "figure.png")])
    no_views.main()
    assert Image.open(tmp_path / "deep" / "figure.png").height > 2 * 64


# view_pictures.py


@pytest.mark.slow
def test_a_picture_for_each_view(tmp_path, monkeypatch):
    import view_pictures

    words = ["--num-samples", 1, "--only", "rotate_90,rotate_180", "colour", "skew", "--out", tmp_path / "deep"]
    monkeypatch.setattr(sys, "argv", ["view_pictures.py", *map(str, words)])
    view_pictures.main()
    for name in ("rotate_90_rotate_180", "colour"):  # three views; the whole and two parts
        assert Image.open(tmp_path / "deep" / f"{name}.png").size == (3 * 96 + 2 * 6, 96)
    assert Image.open(tmp_path / "deep" / "skew.png").size == (2 * 96 + 6, 96)
    readme = (ROOT / "README.md").read_text()
    for name in view_pictures.ALL:
        assert (ROOT / "docs" / "figures" / "views" / f"{file_name(name)}.png").exists()
    shown = re.findall(r"docs/figures/views/(\S+)\.png", readme)
    assert set(shown) <= {file_name(name) for name in view_pictures.ALL} and len(shown) > 15


# fit_verdict.py


def test_a_change_of_latents_keeps_reconstructions(tiny_vae, make_tiny_vae):
    """And moves the latents. But for noise, which is meant to spoil either, and the other model's VAE."""
    import fit_verdict

    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = encode(tiny_vae, x)
    found = {}
    for change in fit_verdict.changes(4, make_tiny_vae(seed=1), None):
        if change.dose != "aligned":
            changed = change.make(tiny_vae)
            latents = encode(changed, x)
            found[change.name, change.dose] = torch.dist(latents, z), torch.dist(decode(changed, latents), decode(tiny_vae, z))
    assert len(found) > 40 and found.pop(("none", "")) == (0, 0)
    for (name, dose), (moved, spoilt) in found.items():
        assert (moved > 1e-3) != name.startswith("noise"), (name, dose)  # noise is the posterior's, not of its mean
        assert (spoilt > 1e-2) == (name in ("noise in both", "noise in the decoder", "the other model's VAE")), (name, dose)


@pytest.mark.slow
def test_the_fit_of_changed_latents_is_tabled_and_kept(make_picture_shards, tmp_path, monkeypatch, capsys):
    import fit_verdict

    every, kept = fit_verdict.changes, (("none", ""), ("offset", "1"))
    monkeypatch.setattr(fit_verdict, "changes", lambda *given: [each for each in every(*given) if (each.name, each.dose) in kept])
    pictures = make_picture_shards(tmp_path / "pictures", 4, size=64)
    words = ["--data", pictures, "--num-letters", 2, "--num-images", 4, "--num-inference-steps", 1, "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["fit_verdict.py", *map(str, words)])
    fit_verdict.main()
    first = (tmp_path / "out" / "results.json").read_text()
    assert [row.split(" | ")[0] for row in (tmp_path / "out" / "table.md").read_text().splitlines()[2:]] == ["| none", "| offset 1"]
    capsys.readouterr()
    fit_verdict.main()
    assert "loss_ratio 0" not in capsys.readouterr().out and (tmp_path / "out" / "results.json").read_text() == first
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--num-letters", "3"])
    with pytest.raises(SystemExit, match=r"results.json' is of other options"):
        fit_verdict.main()
