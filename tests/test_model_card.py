"""Model cards: what they state, the licence that binds, and that tools carry them on."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard

from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import load_config
from eqldm.export import export
from eqldm.model_card import carried_card, licence
from eqldm.swap import swap

ROOT = Path(__file__).parents[1]
FRONT = "---\nlicense: creativeml-openrail-m\n---\n\n# base\n"


@pytest.fixture
def base(tmp_path, tiny_model_folder) -> Path:
    """The tiny model, with a card that states a licence."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_model_folder, folder)
    (folder / "README.md").write_text(FRONT)
    return folder


def test_the_licence_of_a_base(base, tiny_model_folder):
    assert licence(base) == licence(base / "vae") == "creativeml-openrail-m"
    assert licence(tiny_model_folder) is None and licence("nowhere/at-all") is None


@pytest.mark.parametrize("text", ["# no front matter\n", "---\nnot: [closed\n---\n", ""])
def test_what_is_no_card_states_no_licence(base, text):
    (base / "README.md").write_text(text)
    assert licence(base) is None


def test_a_trained_model_says_what_it_is_of(base, tmp_path, tiny_pictures, write_tiny_options):
    options = write_tiny_options(tmp_path / "options.yaml", tiny_pictures, num_steps=2)
    file = yaml.safe_load(options.read_text())
    del file["architecture"]
    options.write_text(yaml.safe_dump({**file, "init": "pretrained", "model": str(base)}))
    model = train_autoencoder(load_config(options, ["run.val_every=1"]))
    card = ModelCard.load(model / "README.md")
    assert card.data.license == "creativeml-openrail-m" and card.data.base_model == str(base) and card.data.library_name == "diffusers"
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    for part in (f"`{tiny_pictures}`", commit, "2 steps of 4, seed 0", "1 x CPU", "`val/reconstruction/psnr`", "num_steps: 2", "torch "):
        assert part in card.text, part
    exported = export(model, tmp_path / "half", torch.float16)
    assert "Then: stored in float16" in (exported / "README.md").read_text()
    assert licence(exported) == "creativeml-openrail-m"


def test_a_base_that_states_none_is_said_to(base, tmp_path, tiny_pictures, write_tiny_options):
    (base / "README.md").unlink()
    assert carried_card(base, "x") is None
    swapped = swap(base, base / "vae", tmp_path / "swapped")
    assert not (swapped / "README.md").exists()


def test_stock_diffusers_minds_no_card(base, tmp_path):
    swapped = swap(base, base / "vae", tmp_path / "swapped")
    assert "was put in the place of its own" in (swapped / "README.md").read_text()
    StableDiffusionPipeline.from_pretrained(swapped, safety_checker=None)
