"""The shipped models: small, described, opened by stock diffusers, and not broken. (Their cards have the figures.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import glyphs
from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import PictureSamples
from eqldm.evaluation.equivariance import SYMMETRIES, Equivariance, equivariance_metrics
from eqldm.evaluation.generation import letter_prompts, plain_letters
from eqldm.evaluation.judge import Judge
from eqldm.evaluation.reconstruction import Reconstruction, reconstruction_metrics
from eqldm.evaluation.work import measure_all
from eqldm.model_folder import PRETRAINED, load_vae
from eqldm.views import IDENTITY

ROOT = Path(__file__).parents[1]
MODELS = {"glyphs-base": (0.4, 1.0), "glyphs-eq": (0.0, 0.005)}  # the least and the largest latent error


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> PictureSamples:
    """26 letters in faces that no model has seen."""
    folder = tmp_path_factory.mktemp("glyphs")
    glyphs.make_split(folder, "test", 26, size=64, shard_size=26)
    return PictureSamples(folder / "test")


@pytest.mark.parametrize("folder", sorted(path for path in PRETRAINED.iterdir() if path.is_dir()), ids=lambda path: path.name)
def test_a_shipped_folder_is_small_and_its_card_leads_somewhere(folder):
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 16e6
    card = (folder / "README.md").read_text()
    configs = re.findall(r"configs/glyphs/\w+\.yaml", card)
    assert configs and all((ROOT / config).is_file() for config in configs)
    assert "commit" in card and "thread" in card and "| data |" in card


@pytest.mark.parametrize("name", MODELS)
def test_autoencoders(name, samples):
    vae = load_vae(PRETRAINED / name)
    least, most = MODELS[name]
    assert reconstruction_metrics(measure_all(Reconstruction(vae, samples, 26))).metrics["reconstruction/psnr"] > 31
    values = measure_all(Equivariance(vae, samples, 26))
    error = equivariance_metrics(values, vae, [view.name for view in SYMMETRIES]).metrics["equivariance/mean/latent_error"]
    assert least < error < most


@pytest.mark.parametrize("name", MODELS)
def test_letters_read_right(name):
    wanted = plain_letters(16)
    pictures = Sampler.open(PRETRAINED / name, "cpu")(letter_prompts(wanted), [IDENTITY], range(16), num_inference_steps=15)
    assert int((Judge.open()(pictures) == wanted[0]).sum()) >= 15


@pytest.mark.parametrize("name", MODELS)
def test_stock_diffusers_opens_them(name):
    pipeline = StableDiffusionPipeline.from_pretrained(str(PRETRAINED / name), safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    picture = pipeline("the letter A", num_inference_steps=15, guidance_scale=5.0, generator=generator, output_type="pt").images
    letter = Judge.open()(picture.float() * 2 - 1)
    assert letter.tolist() == [0]
    # Image to image: a little noise gives the picture back, much of it the other letter
    from_image = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    from_image.set_progress_bar_config(disable=True)

    def redrawn(prompt: str, strength: float) -> torch.Tensor:
        options = {"strength": strength, "num_inference_steps": 20, "guidance_scale": 5.0, "generator": generator}
        return from_image(prompt, image=picture.float(), output_type="pt", **options).images.float()

    assert (redrawn("the letter A", 0.1) - picture).square().mean() < 10**-2.2  # 22 dB
    assert Judge.open()(redrawn("the letter B", 0.9) * 2 - 1).tolist() == [1]
