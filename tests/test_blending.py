"""Blending the views in picture space, and pixel models, in which latents and pictures are one."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from eqldm.anagram.blending import blend_pictures, blended_in_pixels
from eqldm.anagram.sampling import Sampler
from eqldm.diffusion.objective import Objective
from eqldm.model_folder import (
    Pixels,
    decode,
    downsampling,
    encode,
    load_autoencoder,
    load_scheduler,
    load_text,
    load_vae,
    make_scheduler,
    save_model_folder,
)
from eqldm.views import IDENTITY, parse_view

VIEWS = [IDENTITY, parse_view("rotate_90"), parse_view("patch_permute:2")]
PROMPTS = ["the letter a", "the letter v", "picture 1"]
FAST = {"num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def pixel_folder(tiny_model_folder, tmp_path_factory):
    """A random pixel model of 8 px pictures."""
    torch.manual_seed(0)
    tokenizer, text_encoder = load_text(tiny_model_folder)
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, cross_attention_dim=16, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    parts = {"unet": unet, "tokenizer": tokenizer, "text_encoder": text_encoder, "scheduler": load_scheduler(tiny_model_folder)}
    return save_model_folder(tmp_path_factory.mktemp("pixels") / "model", vae=Pixels(), **parts)


def test_the_latents_of_a_pixel_model_are_its_pictures(pixel_folder):
    pixels = load_autoencoder(pixel_folder)
    x = torch.rand(2, 3, 8, 8) * 2 - 1
    assert isinstance(pixels, Pixels) and downsampling(pixels) == 1
    assert torch.equal(encode(pixels, x), x) and torch.equal(decode(pixels, x), x)
    assert float(pixels.encode(x).latent_dist.std.max()) < 1e-6
    assert json.loads((pixel_folder / "vae" / "config.json").read_text()) == {"_class_name": "Pixels"}
    with pytest.raises(ValueError, match="is a pixel model, wanted one with a VAE"):
        load_vae(pixel_folder)


def test_a_pixel_model_samples_anagrams(pixel_folder):
    sampler = Sampler.open(pixel_folder, "cpu")
    pictures = sampler(PROMPTS, VIEWS, [0, 1], **FAST)
    assert pictures.shape == (2, 3, 8, 8) and bool(torch.isfinite(pictures).all())
    with pytest.raises(ValueError, match="this is a pixel model: leave blend=latents"):
        sampler(PROMPTS, VIEWS, [0], blend="pixels", **FAST)


def test_with_an_equivariant_lossless_vae_it_is_the_mean_of_views(pixel_folder):
    """Then decoding, blending and encoding change nothing: both ways are one, whatever the solver, and however often a step is done: the
    views of a sample get back one noise, each as it shows it."""
    sampler = Sampler.open(pixel_folder, "cpu")
    for options in ({"scheduler": "ddim"}, {"scheduler": "dpm++"}, {"scheduler": "ddim", "time_travel": 3, "travel_band": (0.0, 1.0)}):
        expected = sampler(PROMPTS, VIEWS, [0, 1], **options, **FAST)
        sampler.vae = torch.nn.Module()  # not Pixels: it may be blended in pixels
        sampler.vae.__class__ = type("Lossless", (torch.nn.Module,), {k: vars(Pixels)[k] for k in ("config", "encode", "decode")})
        found = sampler(PROMPTS, VIEWS, [0, 1], blend="pixels", **options, **FAST)
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
        sampler.vae = Pixels()


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++", "unipc"])
def test_blending_needs_no_equivariance(tiny_model_folder, scheduler):
    sampler = Sampler.open(tiny_model_folder, "cpu")
    steps = []
    options = {"scheduler": scheduler, "blend": "pixels", **FAST}
    together = sampler(PROMPTS, VIEWS, [3, 4], on_step=lambda: steps.append(1), **options)
    assert together.shape == (2, 3, 32, 32) and bool(torch.isfinite(together).all()) and len(steps) == 4
    torch.testing.assert_close(sampler(PROMPTS, VIEWS, [4], **options), together[1:], atol=1e-3, rtol=1e-3)
    assert (together - sampler(PROMPTS, VIEWS, [3, 4], scheduler=scheduler, **FAST)).abs().mean() > 1e-3


def test_the_views_agree_after_each_step(tiny_vae):
    """Each view's new estimate is its share of the blended picture, plus what re-encoding loses of its own."""
    scheduler = make_scheduler({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"})
    objective = Objective.of(scheduler)
    z = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor(500.0)
    with torch.no_grad():
        denoise = blended_in_pixels(lambda z, t, prompts: 0.1 * z, VIEWS, tiny_vae, objective)
        agreed = objective.clean(denoise(z, t), z, t.expand(6))
        own = objective.clean(0.1 * z, z, t.expand(6))
        pictures = decode(tiny_vae, own)
        shared = blend_pictures(pictures, VIEWS)
        expected = torch.cat([encode(tiny_vae, view(shared)) for view in VIEWS]) + own - encode(tiny_vae, pictures)
    torch.testing.assert_close(agreed, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(shared[0], (pictures[0] + VIEWS[1].inverse(pictures[2]) + VIEWS[2].inverse(pictures[4])) / 3)
