"""The demo's own configs and scripts, end to end with two steps each: what `make demo` runs, in small."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch

from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import load_config
from eqldm.diffusion.module import train_diffusion
from eqldm.evaluation.judge import ANSWERS, save_judge

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "glyphs"
SMALL = ["run.num_steps=2", "run.val_every=2", "run.accelerator=cpu", "data.batch_size=4", "data.num_workers=0", "data.val_samples=4"]


def run_script(monkeypatch, name: str, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, stop.code


def demo_config(name: str, run: Path, data: Path, **options):
    overrides = [f"run.dir={run}", f"data.train={data}/train", f"data.val={data}/val", *(f"{k}={v}" for k, v in options.items())]
    return load_config(CONFIGS / f"{name}.yaml", SMALL + overrides)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_the_demos_stages_run_from_glyphs_to_a_report(runs, monkeypatch):
    glyphs, latents = runs / "glyphs", runs / "latents"
    counts = ["--num-train", 104, "--num-val", 8, "--num-test", 8]
    run_script(monkeypatch, "data/glyphs.py", "--out", glyphs, *counts, "--shard-size", 52, "--workers", 1)

    plain = train_autoencoder(demo_config("demo_vae_plain", runs / "vae-plain", glyphs))
    eq = train_autoencoder(demo_config("demo_vae_eq", runs / "vae-eq", glyphs, model=plain))
    for split in ("train", "val"):
        arguments = ["--data", glyphs / split, "--model", eq, "--out", latents / split, "--num-workers", 0]
        run_script(monkeypatch, "data/encode_latents.py", *arguments)
    model = train_diffusion(demo_config("demo_unet", runs / "ldm-eq", latents, vae=eq))

    prompts = ["--prompts", "the letter A", "the letter V", "--views", "identity", "rotate_180"]
    sampling = ["--num-samples", 2, "--num-inference-steps", 2, "--out", runs / "anagrams"]
    run_script(monkeypatch, "sample.py", "--model", model, *prompts, *sampling)
    assert {path.name for path in (runs / "anagrams").iterdir()} == {"0.png", "0.json", "1.png", "1.json", "sheet.png"}

    torch.manual_seed(0)
    args = {"channels": [8, 8, 8, 8]}
    network = timm.create_model("resnet18", num_classes=len(ANSWERS), **args)
    save_judge(runs / "judge", network, {"architecture": "resnet18", "args": args, "image_size": 64})
    few = ["--num-images", 8, "--num-letters", 2, "--num-pairs", 2, "--num-inference-steps", 2, "--judge", runs / "judge"]
    run_script(monkeypatch, "eqldm/evaluate.py", plain, model, "--data", glyphs / "test", "--out", runs / "evaluation", *few)
    report = (runs / "evaluation" / "report.md").read_text()
    assert "equivariance/rotate_180/latent_error" in report
    assert "anagram/rotate_180/ambigramability" in report


def test_every_command_of_the_demo_script_names_files_that_exist():
    script = (CONFIGS / "demo.sh").read_text()
    named = [word for word in script.split() if word.endswith((".py", ".yaml")) and "$" not in word]
    assert len(named) >= 7
    assert all((ROOT / word).is_file() for word in named)


@pytest.mark.parametrize("page", ["README.md", "data/README.md"])
def test_links_of_the_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not ((ROOT / page).parent / link).exists()]
    assert not missing
