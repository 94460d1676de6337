"""The benchmark scripts, on tiny random models: they run, resume, and compare on equal letters and seeds."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from eqldm.autoencoder.equivariance import IDENTITY_TRANSFORM, draw_groups
from eqldm.config import load_config
from eqldm.evaluation.anagram import Reading
from eqldm.evaluation.judge import ANSWERS, save_judge
from eqldm.evaluation.sheets import letter_matrix
from eqldm.views import D4, Transform

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> list[Path]:
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = timm.create_model("resnet18", num_classes=len(ANSWERS), channels=[8, 8, 8, 8])
        folders.append(tmp_path_factory.mktemp("judges") / "model")
        save_judge(folders[-1], network, {"architecture": "resnet18", "args": {"channels": [8, 8, 8, 8]}, "image_size": 32})
    return folders


@pytest.fixture
def anagrams(monkeypatch, tmp_path, tiny_pictures, judges):
    """`anagrams(method, ..., more=[...])`: the script; returns its `--out`."""

    def call(*methods, more=()):
        options = ["--real", tiny_pictures, "--judge", judges[0], "--chooser", judges[1], "--num-inference-steps", 2, "--device", "cpu"]
        words = [*methods, *options, "--num-resamples", 50, "--out", tmp_path / "out", *more]
        monkeypatch.setattr(sys, "argv", ["anagrams.py", *map(str, words)])
        runpy.run_path(str(ROOT / "benchmarks" / "anagrams.py"), run_name="__main__")
        return tmp_path / "out"

    return call


def test_methods_are_compared_on_equal_letters_and_seeds(anagrams, tiny_model_folder):
    few = ["--tuples", 20, "--num-seeds", 2, "--batch-size", 15]
    methods = [f"a={tiny_model_folder}", f"b={tiny_model_folder}@blend=pixels"]
    out = anagrams(*methods, more=[*few, "--against", "a"])
    results = json.loads((out / "metrics.json").read_text())
    assert results["methods"].keys() == {"a", "b"} and results["comparisons"].keys() == {"b against a"}
    metrics = results["methods"]["a"]
    for name in ("ambigramability", "best_of_2", "identity/kid", "rotate_180/fid", "texture", "round_trip_psnr", "seconds_per_picture"):
        assert isinstance(metrics[name], float), name
    assert metrics["forced_ambigramability"] >= metrics["ambigramability"] and "forced_best_of_2" in metrics
    low, high = metrics["ambigramability_95"]
    assert low <= metrics["ambigramability"] <= high
    assert "kid_difference" in results["comparisons"]["b against a"]
    files = sorted((out / "a").glob("*.safetensors"))
    assert [len(load_file(path)["pictures"]) for path in files] == [15, 5, 15, 5]
    assert "| method |" in (out / "table.md").read_text()
    failed = round(40 * (1 - metrics["ambigramability"]))
    assert Image.open(out / "methods.png").height >= 96 * 12 * 2 / 3  # twelve pairs in both views, in three columns
    assert Image.open(out / "failures_a.png").height >= 96 * -(-failed // 3)  # three columns

    before = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()  # a stopped run: the file is made again, and equal; the others are left alone, and one more seed is added
    again = json.loads((anagrams(*methods, more=[*few, "--against", "a"]) / "metrics.json").read_text())
    assert again["methods"]["a"]["kid"] == pytest.approx(metrics["kid"], rel=1e-6)
    anagrams(*methods, more=["--tuples", 20, "--num-seeds", 3, "--batch-size", 15])
    assert sum(path.stat().st_mtime_ns == time for path, time in before.items()) == 3
    assert len(list((out / "a").glob("*.safetensors"))) == 6

    for more, changed in ((["--guidance-scale", 2], "guidance_scale"), (["--views", "identity", "flip"], "views")):
        with pytest.raises(SystemExit, match=f"holds pictures made with another {changed}: give another NAME"):
            anagrams(*methods, more=[*few, *more])
    with pytest.raises(SystemExit, match="holds pictures made with another blend"):
        anagrams(methods[0] + "@blend=pixels", more=few)
    with pytest.raises(SystemExit, match="holds pictures made with another scheduler_config, scheduler"):
        anagrams(methods[0] + "@scheduler=ddpm", more=few)


def test_a_method_has_sampling_options_of_its_own(anagrams, tiny_model_folder):
    methods = [f"a={tiny_model_folder}", f"b={tiny_model_folder}@scheduler=ddpm,num_inference_steps=3,guidance_scale=1"]
    out = anagrams(*methods, more=["--tuples", 20, "--num-seeds", 1])
    a, b = (json.loads((out / name / "about.json").read_text()) for name in "ab")
    assert (a["scheduler"], a["num_inference_steps"], a["guidance_scale"]) == (None, 2, 5.0)
    assert (b["scheduler"], b["num_inference_steps"], b["guidance_scale"]) == ("ddpm", 3, 1.0)
    pictures = [load_file(out / name / "000-000000.safetensors")["pictures"] for name in "ab"]
    assert not torch.equal(*pictures)


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        (["=a"], [], "model: got '=a', wanted MODEL or NAME=MODEL"),
        (["a=b", "a=c"], [], "a model is given twice: a"),
        (["a=b@pixels"], [], "got 'pixels' after '@', wanted OPTION=VALUE of vae"),
        (["a=b@guidance_scale=high"], [], "got 'guidance_scale=high' after '@'.* guidance_scale .float."),
        (["a=nowhere"], ["--tuples", 20], "nowhere' does not exist"),
        (["a=nowhere"], ["--tuples", 2], "20 tuples to resample: got 4, 52 and 2"),
        (["a=nowhere"], ["--views", "identity", "flip", "mirror"], "--tuples all: for two views, got 3"),
    ],
)
def test_what_cannot_work_is_an_error(anagrams, methods, more, message):
    with pytest.raises(SystemExit, match=message):
        anagrams(*methods, more=more)


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


def test_failures_are_shown_and_none_where_there_are_none(tmp_path):
    script = runpy.run_path(str(ROOT / "benchmarks" / "anagrams.py"))
    pictures, wanted = torch.zeros(5, 3, 32, 32), torch.arange(5)[None]
    for read, shown in ((wanted, False), (wanted + (wanted == 3), True), (wanted, False)):
        method = SimpleNamespace(reading=Reading(pictures, wanted, read))
        script["failures"](method, [D4[0]], 100, tmp_path / "failures.png")
        assert (tmp_path / "failures.png").exists() == shown  # the last time, the sheet before is stale


def test_the_judge_must_not_choose(anagrams, tiny_model_folder, judges):
    with pytest.raises(SystemExit, match="--chooser is the judge itself"):
        anagrams(f"a={tiny_model_folder}", more=["--tuples", 20, "--chooser", judges[0]])


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


# sampling.py, components.py


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


def test_parts_are_read(tmp_path, monkeypatch, capsys):
    import components
    import glyphs

    glyphs.make_split(tmp_path, "test", 26, size=64, shard_size=26)
    words = ["--data", tmp_path / "test", "--components", "colour", "--num-pairs", 2, "--device", "cpu", "--out", tmp_path / "sheets"]
    monkeypatch.setattr(sys, "argv", ["components.py", *map(str, words)])
    components.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| colour")]
    assert len(rows) == 2 and "glyphs-base, pixels" in rows[1]  # colours are no part of latents
    assert float(rows[0].split("|")[3]) > 0.8  # real letters read from their grey alone
    assert (tmp_path / "sheets" / "colour_glyphs-base-pixels.png").exists()
