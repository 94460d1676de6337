"""The studies of benchmarks/, with tiny models and two steps each: they run, resume, and write their tables."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LETTERS = " ".join(["the letter", *"abcdefghijklmnopqrstuvwxyz"])
SMALL = ["data.batch_size=4", "data.num_workers=0", "run.accelerator=cpu", "run.precision=32-true", "optimizer.warmup_steps=1"]

pytestmark = pytest.mark.slow


def study(name: str, *words) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / f"{name}.py", *map(str, words)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.fixture(scope="module")
def base(make_model_folder, tmp_path_factory) -> Path:
    return make_model_folder(
        tmp_path_factory.mktemp("base") / "model", captions=[LETTERS, "a blue letter on a yellow background"], max_length=12
    )


@pytest.fixture(scope="module")
def data(make_picture_shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for split, count in {"train": 16, "val": 8, "test": 8}.items():
        make_picture_shards(folder / split, count=count, size=32, caption="{} a blue letter on a yellow background " + LETTERS)
    return folder


def test_adaptation(base, data, tmp_path, make_tiny_vae):
    vae = make_tiny_vae(seed=3)
    vae.save_pretrained(tmp_path / "vae" / "vae")
    words = ["--vae", tmp_path / "vae", "--base", base, "--data", data, "--seeds", 2, "--num-steps", 2, "--val-every", 1,
             "--adapted-steps", 1, "--num-letters", 2, "--num-images", 4, "--out", tmp_path / "out", "--set", *SMALL]  # fmt: skip
    study("adaptation", *words)
    table = (tmp_path / "out" / "table.md").read_text()
    for row in ("swap", "swap, aligned", "scratch, 1", "scratch, 2", "full, 1", "full, aligned, 1", "LoRA, aligned, 1"):
        assert f"| {row} | " in table
    curves = json.loads((tmp_path / "out" / "curves.json").read_text())
    assert {name: len(runs) for name, runs in curves.items()} == dict.fromkeys(("scratch", "full", "full, aligned", "LoRA, aligned"), 2)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 1000
    again = study("adaptation", *words).stdout
    assert "nothing to do" in again and (tmp_path / "out" / "table.md").read_text() == table


def test_equivariance_losses(base, data, tmp_path):
    words = ["--base", base, "--data", data, "--seeds", 1, "--num-steps", 1, "--num-images", 4, "--num-pairs", 2, "--unet-steps", 1]
    variants = ["EQ-VAE's scheme", "D4 + negation"]
    words += ["--variants", *variants, "--anagrams", "--out", tmp_path / "out", "--set", *SMALL, "data.val_samples=4"]
    study("equivariance_losses", *words)
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(rows) == 2 + len(variants) and all(row.count("|") == rows[0].count("|") and " - " not in row for row in rows)


def test_training_seeds(base, data, tmp_path, make_judge):
    judges = [make_judge(tmp_path / f"judge{seed}", seed) for seed in range(2)]
    words = ["--base", base, "--vae-base", base, "--data", data, "--judges", *judges, "--seeds", 2, "--num-steps", 1, "--unet-steps", 1,
             "--num-pairs", 3, "--num-samples", 2, "--num-images", 4, "--out", tmp_path / "out", "--set", *SMALL,
             "data.val_samples=4"]  # fmt: skip
    study("training_seeds", *words)
    table = (tmp_path / "out" / "table.md").read_text()
    module = runpy.run_path(str(ROOT / "benchmarks" / "training_seeds.py"))
    assert all(table.count(f"| {name} | ") == 4 - (name in module["REFERENCES"]) for name in module["METHODS"])


def test_one_seed_or_judge_says_nothing_of_others(tmp_path):
    script = [sys.executable, ROOT / "benchmarks" / "training_seeds.py", "--judges", tmp_path, "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, script)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode and "error: --seeds 3, 1 judges: wanted two or more of each" in done.stderr


def test_world(data, tmp_path):
    words = ["--data", data, "--seeds", 2, "--num-steps", 1, "--num-images", 4, "--out", tmp_path / "out", "--set", *SMALL]
    study("world", *words, "data.val_samples=4")
    rows = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert len(rows) == 2 + 4 and all(row.count(" ± ") == 4 for row in rows[2:])


def test_train_step(base, tmp_path):
    words = ["--out", tmp_path / "out", "--model", base, "--size", 32, "--num-images", 8, "--vae-batch", 2, "--unet-batch", 2,
             "--num-steps", 4, "--set", "run.accelerator=cpu", "run.precision=32-true", "data.num_workers=0"]  # fmt: skip
    only = ["--only", "vae, plain", "unet, plain", "unet, bf16, zero2"]
    small = ["loss.discriminator_layers=1", "equivariance.permute_cells=[2]"]  # 16 px is the smallest picture
    first = study("train_step", *words, *small, *only[:2])
    assert "| vae, plain | " in first.stdout and "vae, plain ...\n" in first.stdout
    again = study("train_step", *words, *only)
    assert "vae, plain ..." not in again.stdout  # its row is kept
    rows = {line.split("|")[1].strip(): line.split("|")[2:5] for line in again.stdout.splitlines() if line.startswith("| ")}
    assert rows["unet, plain"][1].strip() == "1.00" and float(rows["unet, bf16, zero2"][0]) > 0
    assert (tmp_path / "out" / "table.md").read_text().count("\n") >= 5
