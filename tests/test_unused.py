"""Options that other options of the same run leave without effect are said; those of the shipped configs all do something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eqldm.config import load_config
from eqldm.unused import without_effect

ROOT = Path(__file__).parents[1]
AUTOENCODER = """
stage: autoencoder
data: {train: shards, val: shards}
run: {dir: run, num_steps: 1000}
"""


@pytest.fixture
def told(tmp_path):
    """`told(stage, "key=value", ...)`: what is said of the options."""

    def load(stage: str, *overrides: str) -> list[str]:
        path = tmp_path / "options.yaml"
        more = "" if stage == "autoencoder" else "init: pretrained\nmodel: m\nvae: m\n"
        path.write_text(AUTOENCODER.replace("autoencoder", stage) + more)
        return without_effect(load_config(path, overrides))

    return load


@pytest.mark.parametrize(
    "stage, overrides, words",
    [
        ("autoencoder", ["run.num_steps=400"], "run.val_every=500 is past the last step, 400: nothing is validated"),
        ("diffusion", ["run.num_steps=400", "sample_prompts=[a]"], "nothing is validated, sample_prompts wait for it"),
        ("autoencoder", ["run.checkpoint_every=2000"], "run.checkpoint_every=2000 is past the last step, 1000: a run that dies"),
        ("autoencoder", ["run.log_every=2000"], "run.log_every=2000 is past the last step, 1000: no loss is logged"),
        ("diffusion", ["train_text_encoder=true", "text_encoder_lr_factor=0"], "train_text_encoder=true has no effect"),
        ("autoencoder", ["equivariance.group=d4", "equivariance.rescale_prob=1", "equivariance.num_groups=33"], "each is its own group"),
        ("autoencoder", ["run.keep_every=2000"], "run.keep_every=2000 is past the last step, 1000: no checkpoint is kept but the newest"),
        ("autoencoder", ["optimizer.warmup_steps=1000"], "last as long as the run, 1000 steps: the learning rate ends at 1 of its peak"),
        ("diffusion", ["boundary_steps=950"], "optimizer.warmup_steps=100 last as long as the run, 50 steps"),
        ("autoencoder", ["loss.adversarial_start=5"], "loss.adversarial_start=5 has no effect: loss.adversarial_weight=0"),
        ("autoencoder", ["loss.discriminator_channels=8", "loss.discriminator_layers=2"], "loss.discriminator_layers=2 have no effect"),
        ("autoencoder", ["loss.adversarial_weight=1", "loss.adversarial_start=1000"], "the discriminator is never trained"),
        ("autoencoder", ["crop_size=8", "crop_until=0"], "crop_size=8 has no effect"),
        ("autoencoder", ["crop_size=8", "crop_until=1000"], "no whole picture is trained on"),
        ("autoencoder", ["equivariance.anisotropic=true"], "equivariance.anisotropic=True has no effect"),
        ("autoencoder", ["equivariance.permute_cells=[8]"], "equivariance.permute_cells=[8] has no effect"),
        ("autoencoder", ["equivariance.consistency_weight=1"], "equivariance.consistency_weight=1.0 has no effect: no transform is drawn"),
        ("autoencoder", ["equivariance.group=d4", "equivariance.prob=0"], "equivariance.group=d4 has no effect: equivariance.prob=0"),
        ("autoencoder", ["equivariance.group=d4", "equivariance.implicit_weight=0"], "equivariance.group=d4 has no effect"),
        ("diffusion", ["text_encoder_lr_factor=1"], "text_encoder_lr_factor=1.0 has no effect: train_text_encoder=false"),
        ("diffusion", ["min_snr_floor=0.5"], "min_snr_floor=0.5 has no effect: min_snr_gamma is not set"),
    ],
)
def test_what_has_no_effect_is_said(told, stage, overrides, words):
    (line,) = told(stage, *overrides)
    assert words in line


def test_options_that_act_are_passed_over(told):
    assert not told("autoencoder") and not told("diffusion", "min_snr_gamma=5", "min_snr_floor=0.2")
    eq = ["equivariance.group=d4", "equivariance.implicit_weight=0", "equivariance.consistency_weight=1"]
    assert not told("autoencoder", *eq, "loss.adversarial_weight=1", "loss.adversarial_start=999", "crop_size=8", "crop_until=999")


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda path: path.stem)
def test_in_the_shipped_configs_all_options_act(path):
    missing = [f"{name}=x" for name in ("data.train", "data.val", "run.dir") if f"{name.split('.')[1]}:" not in path.read_text()]
    assert not without_effect(load_config(path, missing))


def test_train_says_so(tmp_path, tiny_pictures, write_tiny_options):
    path = write_tiny_options(tmp_path / "tiny.yaml", tiny_pictures, num_steps=2)
    done = subprocess.run(
        [sys.executable, "train.py", path, "dry_run=true", "crop_size=8", "crop_until=0"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert "# crop_size=8 has no effect: crop_until=0 ends the crops before the first step\n" in done.stdout
