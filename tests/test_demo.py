"""The demo's own configs and scripts, end to end with two steps each: what `make demo` runs, in small."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import load_config
from eqldm.diffusion.module import train_diffusion
from eqldm.evaluation.judge import ANSWERS, save_judge
from eqldm.swap import swap

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


@pytest.fixture(scope="module")
def glyphs(runs) -> Path:
    words = [sys.executable, "data/glyphs.py", "--out", runs / "glyphs", "--num-train", 104, "--num-val", 8, "--num-test", 8]
    subprocess.run([*map(str, words), "--shard-size", "52", "--workers", "1"], cwd=ROOT, check=True, capture_output=True)
    return runs / "glyphs"


@pytest.fixture(scope="module")
def judge(runs) -> Path:
    torch.manual_seed(0)
    args = {"channels": [8, 8, 8, 8]}
    network = timm.create_model("resnet18", num_classes=len(ANSWERS), **args)
    save_judge(runs / "judge", network, {"architecture": "resnet18", "args": args, "image_size": 64})
    return runs / "judge"


FEW = ["--without", "lpips", "--num-images", 8, "--num-letters", 2, "--num-pairs", 2, "--num-inference-steps", 2]


def encode(monkeypatch, glyphs: Path, vae: Path, out: Path) -> Path:
    for split in ("train", "val"):
        arguments = ["--data", glyphs / split, "--model", vae, "--out", out / split, "--num-workers", 0]
        run_script(monkeypatch, "data/encode_latents.py", *arguments)
    return out


@pytest.mark.slow
def test_demo_scratch_from_glyphs_to_a_report_and_the_demo_from_its_model(runs, glyphs, judge, monkeypatch):
    scratch, demo = runs / "scratch", runs / "demo"
    plain = train_autoencoder(demo_config("scratch_vae_plain", scratch / "vae-plain", glyphs))
    eq = train_autoencoder(demo_config("scratch_vae_eq", scratch / "vae-eq", glyphs, model=plain))
    latents = encode(monkeypatch, glyphs, eq, scratch / "latents")
    model = train_diffusion(demo_config("scratch_unet", scratch / "ldm-eq", latents, vae=eq))

    prompts = ["--prompts", "the letter A", "the letter V", "--views", "identity", "rotate_180"]
    sampling = ["--num-samples", 2, "--num-inference-steps", 2, "--out", runs / "anagrams"]
    run_script(monkeypatch, "sample.py", "--model", model, *prompts, *sampling)
    assert {path.name for path in (runs / "anagrams").iterdir()} == {"0.png", "0.json", "1.png", "1.json", "sheet.png", "index.html"}

    vae = train_autoencoder(demo_config("demo_vae", demo / "vae", glyphs, model=model, **{"fold.align_to": model}))
    swap(model, vae, demo / "swap" / "model")
    latents = encode(monkeypatch, glyphs, vae, demo / "latents")
    adapted = train_diffusion(demo_config("demo_unet", demo / "adapted", latents, vae=vae, model=model))
    models = [plain, model, demo / "swap" / "model", adapted]
    run_script(monkeypatch, "eqldm/evaluate.py", *models, "--data", glyphs / "test", "--out", demo / "evaluation", "--judge", judge, *FEW)
    report = (demo / "evaluation" / "report.md").read_text()
    assert "| metric | vae-plain | ldm-eq | swap | adapted |" in report
    assert "equivariance/rotate_180/latent_error" in report
    assert "anagram/rotate_180/ambigramability" in report
    assert (demo / "evaluation" / "models.png").exists()


@pytest.mark.parametrize("name", ["demo", "demo_scratch"])
def test_every_command_of_the_demo_scripts_names_files_that_exist(name):
    script = (CONFIGS / f"{name}.sh").read_text()
    named = [word for word in script.split() if word.endswith((".py", ".yaml")) and "$" not in word]
    assert len(named) >= 7
    assert all((ROOT / word).is_file() for word in named)


PAGES = [
    "README.md",
    "data/README.md",
    "docs/results.md",
    *(f"eqldm/pretrained/glyphs-{name}/README.md" for name in ("base", "eq", "judge")),
]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_pages_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text())
    local = [link for link in links if "://" not in link]
    missing = [link for link in local if not ((ROOT / page).parent / link).exists()]
    assert not missing
