"""Sampling: seeds, schedulers, symmetry, and options that do not fit."""

from __future__ import annotations

import shutil

import pytest
import torch

from eqldm.anagram.denoiser import Guidance, alternating_views, mean_of_views
from eqldm.anagram.sampling import REDUCTIONS, SCHEDULERS, Sampler, sample
from eqldm.model_folder import load_scheduler, load_unet, make_scheduler
from eqldm.views import D4, IDENTITY, NEGATE, parse_view

PROMPTS = ["the letter a", "the letter v"]
VIEWS = [IDENTITY, parse_view("rotate_180")]
FAST = {"num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def sampler(tiny_model_folder) -> Sampler:
    return Sampler.open(tiny_model_folder, "cpu")


@pytest.mark.parametrize("scheduler", [None, *SCHEDULERS])
def test_a_seeds_picture_does_not_depend_on_the_batch(sampler, scheduler):
    """Also with solvers that draw noise at each step: it is drawn from the seed's own generator."""
    together = sampler.latents(PROMPTS, VIEWS, range(16), scheduler=scheduler, **FAST)
    alone = sampler.latents(PROMPTS, VIEWS, [7], scheduler=scheduler, **FAST)
    assert together.shape == (16, 4, 8, 8) and bool(torch.isfinite(together).all())
    torch.testing.assert_close(together[7:8], alone, atol=1e-4, rtol=1e-4)
    assert (together[7] - together[8]).abs().mean() > 0.1
    pictures = sampler.decode(together)
    assert pictures.shape == (16, 3, 32, 32) and float(pictures.abs().max()) <= 1


def test_same_seed_same_bits(sampler):
    for scheduler in ("ddim", "euler_ancestral"):
        a, b = (sampler.latents(PROMPTS, VIEWS, [3, 4], scheduler=scheduler, **FAST) for _ in range(2))
        assert torch.equal(a, b)


def test_each_sample_may_have_its_own_prompt(sampler):
    lists = [["the letter a", "picture 1"], ["the letter v", "picture 2"]]
    together = sampler.latents(lists, VIEWS, [0, 1], **FAST)
    for k in range(2):
        alone = sampler.latents([prompts[k] for prompts in lists], VIEWS, [k], **FAST)
        torch.testing.assert_close(together[k : k + 1], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_swapping_views_and_prompts_by_a_symmetry(sampler, tiny_model_folder, reduction):
    """An anagram has no upright: in views (g, g v) from noise g^-1 z it is g^-1 of the anagram in views (1, v) from z."""
    scheduler = load_scheduler(tiny_model_folder)
    embeds = torch.stack([sampler._embed(prompt, 2) for prompt in PROMPTS])
    guided = Guidance(sampler.networks.unet, embeds, sampler._embed("", 1)[0], 3.0)
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    v = parse_view("patch_permute:2:5")

    def run(views, noise):
        scheduler.set_timesteps(4)
        turns = alternating_views(guided, views, scheduler.timesteps)
        denoise = mean_of_views(guided, views) if reduction == "mean" else turns
        return sample(denoise, scheduler, noise, [torch.Generator().manual_seed(0)] * 2)

    expected = run([IDENTITY, v], z)
    for g in (D4[1], D4[4], NEGATE):  # the views see the same latents: any invertible g will do
        found = run([g, v @ g], g.inverse(z))
        torch.testing.assert_close(g(found), expected, atol=1e-4, rtol=1e-4)


def test_order_of_views_does_not_matter_to_the_mean(sampler):
    forth = sampler.latents(PROMPTS, VIEWS, [0], **FAST)
    back = sampler.latents(PROMPTS[::-1], VIEWS[::-1], [0], **FAST)
    torch.testing.assert_close(forth, back, atol=1e-4, rtol=1e-4)


def test_one_unet_call_a_step(sampler):
    calls, steps = [], []
    handle = sampler.networks.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(output.sample)))
    try:
        sampler.latents(PROMPTS, VIEWS, range(3), on_step=lambda: steps.append(1), **FAST)
    finally:
        handle.remove()
    assert calls == [2 * 2 * 3] * 4 and len(steps) == 4


def test_negative_prompt_and_guidance_matter(sampler):
    plain, negative, strong = (
        sampler.latents(PROMPTS, VIEWS, [0], num_inference_steps=2, **options)
        for options in ({}, {"negative_prompt": "picture 5"}, {"guidance_scale": 9.0})
    )
    assert (plain - negative).abs().mean() > 1e-3 and (plain - strong).abs().mean() > 1e-3


def test_other_sizes(sampler):
    z = sampler.latents(PROMPTS, VIEWS, [0], image_size=48, **FAST)
    assert z.shape == (1, 4, 12, 12) and sampler.decode(z).shape == (1, 3, 48, 48)


def test_pictures_are_the_decoded_latents(sampler):
    assert torch.equal(sampler(PROMPTS, VIEWS, [3], **FAST), sampler.decode(sampler.latents(PROMPTS, VIEWS, [3], **FAST)))


def test_schedulers_of_other_classes_do_not_clip(tiny_model_folder, make_model_folder, tmp_path):
    """From a folder whose scheduler has no such option, as from one that states it."""
    euler = Sampler.open(make_model_folder(tmp_path / "euler", _class_name="EulerDiscreteScheduler"), "cpu")
    assert "clip_sample" not in euler.networks.scheduler.config
    clipping = Sampler.open(make_model_folder(tmp_path / "clip", clip_sample=True), "cpu")
    runs = [s.latents(PROMPTS, VIEWS, [0], scheduler="ddim", **FAST) for s in (Sampler.open(tiny_model_folder, "cpu"), euler, clipping)]
    assert torch.equal(runs[0], runs[2]) and float(runs[0].abs().max()) > 3
    assert float(runs[1].abs().max()) > 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": PROMPTS[:1]}, r"one prompt for each view: got 1 prompts and 2 views \(identity, rotate_180\)"),
        ({"prompts": [], "views": []}, "one prompt for each view: got 0 prompts and 0 views"),
        ({"prompts": [["a", "v", "x"], "a"]}, "needs one for each seed: got 3 prompts for 2 seeds"),
        ({"views": [IDENTITY, parse_view("patch_permute:3")]}, r"needs sides divisible by 3 \(3, 6, 9...\), got 8 x 8 \(32 px at f = 4\)"),
        ({"image_size": 30}, "image size 30: wanted a multiple of f = 4"),
        ({"image_size": 0}, "image size 0: wanted a multiple of f = 4"),
        ({"scheduler": "dppm"}, "unknown scheduler 'dppm': wanted one of ddim, ddpm, euler"),
        ({"reduction": "median"}, "unknown reduction 'median': wanted one of mean, alternate"),
        ({"blend": "colours"}, "unknown blend 'colours': wanted one of latents, pixels"),
        ({"blend": "pixels", "reduction": "alternate"}, "blend=pixels averages the views, got reduction=alternate"),
        ({"blend": "pixels", "scheduler": "ddpm"}, "blend=pixels cannot use DDPMScheduler"),
        ({"blend": "pixels", "scheduler": "euler"}, "blend=pixels cannot use EulerDiscreteScheduler"),
        ({"prompts": ["the letter a", "a " * 9]}, "is longer than the model's 8 tokens"),
        ({"negative_prompt": "a " * 9}, "is longer than the model's 8 tokens"),
    ],
)
def test_options_that_do_not_fit(sampler, changes, message):
    options = {"prompts": PROMPTS, "views": VIEWS, "seeds": [0, 1], **FAST, **changes}
    with pytest.raises(ValueError, match=message):
        sampler.latents(**options)


def test_unknown_view_names_the_nearest():
    with pytest.raises(ValueError, match="unknown view 'rotat_180': did you mean rotate_180"):
        parse_view("rotat_180")


def test_flow_models_need_a_solver_of_flows(make_model_folder, tmp_path):
    flow = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    sampler = Sampler.open(make_model_folder(tmp_path / "flow", **flow), "cpu")
    for scheduler in (None, "dpm++", "unipc"):
        z = sampler.latents(PROMPTS, VIEWS, [0], scheduler=scheduler, **FAST)
        assert bool(torch.isfinite(z).all())
    with pytest.raises(ValueError, match="scheduler 'ddim' cannot sample a flow model: use dpm\\+\\+ or unipc"):
        sampler.latents(PROMPTS, VIEWS, [0], scheduler="ddim", **FAST)


def test_folders_that_are_no_models(tiny_model_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        Sampler.open(tmp_path / "nowhere")
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    shutil.rmtree(folder / "unet")
    with pytest.raises(FileNotFoundError, match="it lacks unet"):
        Sampler.open(folder)


def test_exact_latents_of_a_perfect_denoiser():
    """The loop gives back the picture that a perfect epsilon-denoiser knows, in any solver."""
    z0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
    a = make_scheduler({"_class_name": "DDIMScheduler", **betas}).alphas_cumprod
    for name in ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        solver = make_scheduler({"_class_name": name, **betas})
        solver.set_timesteps(10)

        def denoise(z, t):
            return (z - a[int(t)].sqrt() * z0) / (1 - a[int(t)]).sqrt()

        found = sample(denoise, solver, noise, [torch.Generator()] * 2)
        torch.testing.assert_close(found, z0, atol=0.05, rtol=0.05)


def test_opened_networks_are_ready(sampler, tiny_model_folder):
    assert not sampler.networks.unet.training and not sampler.networks.text_encoder.training
    assert all(torch.equal(a, b) for a, b in zip(sampler.networks.unet.parameters(), load_unet(tiny_model_folder).parameters()))
