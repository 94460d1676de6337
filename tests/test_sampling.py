"""Sampling: seeds, schedulers, symmetry, and options that do not fit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict

from eqldm.anagram.denoiser import Guidance, alternating_views, mean_of_views
from eqldm.anagram.options import Options
from eqldm.anagram.sampling import Sampler, sample
from eqldm.anagram.solvers import SCHEDULERS
from eqldm.autoencoder.equivariance import negation_error
from eqldm.diffusion.conditioning import make_text_encoder
from eqldm.model_folder import PRETRAINED, decode, load_autoencoder, load_scheduler, load_text, load_unet, make_scheduler
from eqldm.views import D4, IDENTITY, NEGATE, parse_view

PROMPTS = ["the letter a", "the letter v"]
VIEWS = [IDENTITY, parse_view("rotate_180")]
FAST = {"num_inference_steps": 4, "guidance_scale": 3.0}


@pytest.fixture(scope="module")
def sampler(tiny_model_folder) -> Sampler:
    return Sampler.open(tiny_model_folder, "cpu")


@pytest.mark.parametrize("scheduler", [None, *(name for name in SCHEDULERS if name != "flow_euler")])
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


@pytest.mark.parametrize("reduction", ["mean", "alternate"])
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


def test_what_cuts_the_picture_up_is_decoded_in_each_view(tiny_model_folder):
    """So that edges of cells are torn alike in all: the picture of views in another order is the same, seen from the other."""
    sampler = Sampler.open(tiny_model_folder, "cpu")
    hinged = [IDENTITY, parse_view("square_hinge:2")]
    z = sampler.latents(PROMPTS, hinged, [3], **FAST)

    def by_hand_of(z, views):
        with torch.no_grad():
            return (sum(view.inverse(decode(sampler.vae, view(z))) for view in views) / len(views)).clamp(-1, 1)

    by_hand = by_hand_of(z, hinged)
    for options in ({}, {"decoding": "views"}):
        torch.testing.assert_close(sampler(PROMPTS, hinged, [3], **FAST, **options), by_hand, atol=1e-5, rtol=0)
    upright = sampler(PROMPTS, hinged, [3], **FAST, decoding="upright")
    assert torch.equal(upright, sampler.decode(z)) and not torch.equal(upright, by_hand)
    both = sampler(PROMPTS, VIEWS, [3], **FAST, decoding="views")  # of whole turns, too, where it is asked for
    turned = sampler.latents(PROMPTS, VIEWS, [3], **FAST)
    torch.testing.assert_close(both, by_hand_of(turned, VIEWS), atol=1e-5, rtol=0)
    symmetric = sampler(PROMPTS, hinged, [3], **FAST, symmetrise=True)
    torch.testing.assert_close(symmetric, by_hand_of(z, [element @ view for view in hinged for element in D4]), atol=1e-5, rtol=0)


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
        ({"reduction": "median"}, "reduction: got median, wanted one of mean, weighted, rectified, alternate"),
        ({"blend": "colours"}, "blend: got colours, wanted one of latents, pixels"),
        ({"blend": "pixels", "reduction": "alternate"}, "blend=pixels averages the views of each step, got reduction=alternate: use mean"),
        ({"blend": "pixels", "scheduler": "ddpm"}, "blend=pixels cannot use DDPMScheduler"),
        ({"blend": "pixels", "scheduler": "euler"}, "blend=pixels cannot use EulerDiscreteScheduler"),
        ({"blend": "pixels", "upscale": 2}, "got upscale=2: use 1"),
        ({"scheduler": "flow_euler"}, "samples flow models, which this is not: use euler"),
        ({"scheduler": "dpm++", "time_travel": 2}, "which DPMSolverMultistepScheduler would remember: use ddim or ddpm"),
        ({"time_travel": 0}, "time_travel: got 0, wanted at least 1"),
        ({"upscale_strength": 0.3}, "upscale_strength means nothing without upscale: leave it out"),
        ({"travel_band": (0.1, 0.3)}, "travel_band means nothing without time_travel"),
        ({"negative_prompt": "picture 1", "guidance_scale": 1.0}, "negative_prompt means nothing without guidance"),
        ({"travel_band": (0.5, 0.5)}, "wanted two rising shares from 0 to 1"),
        ({"weights": [1, 2]}, "weights mean nothing with reduction=mean: use weighted or rectified"),
        ({"reduction": "weighted"}, "reduction=weighted needs weights"),
        ({"reduction": "weighted", "weights": [1, 2, 3]}, "weights: got 3 for 2 views, wanted one for each"),
        ({"reduction": "weighted", "weights": [1, -1]}, "weights: got \\[1, -1\\], wanted 0 or more"),
        ({"reduction": "weighted", "weights": [0, 0]}, "not all 0"),
        ({"upscale": 16, "image_size": 2048, "num_inference_steps": 2}, "upscale: got 16 x 2048 px = 32768 px, wanted at most 16384"),
        ({"image_size": 100000}, "image_size: got 100000, wanted at least 1, up to 16384"),
        ({"num_inference_steps": 10**9}, "num_inference_steps: got 1000000000, wanted at least 1, up to 10000"),
        ({"guidance_scale": [1, 2, 3]}, "guidance_scale: got 3 for 2 views, wanted one for all, or one for each"),
        ({"guidance_rescale": 1.5}, "guidance_rescale: got 1.5, wanted 0 or more, up to 1"),
        ({"negative_prompt": ["a"]}, "negative_prompt: got 1 for 2 views"),
        ({"upscale": 0}, "upscale: got 0"),
        ({"upscale": 2, "num_inference_steps": 1}, "upscale needs two steps or more"),
        ({"reduction": "alternate", "num_inference_steps": 1}, "1 steps show only so many of 2 views"),
        ({"guidance_scale": float("nan")}, "guidance_scale: got nan, wanted 0 or more, up to 10000"),
        ({"guidance_scale": -1.0}, "guidance_scale: got -1.0, wanted 0 or more, up to 10000"),
        ({"guidance_scale": [3.0, float("inf")]}, "guidance_scale: got \\[3.0, inf\\], wanted 0 or more, up to 10000"),
        ({"negative_prompt": "picture 1", "guidance_scale": 0.5}, "negative_prompt means nothing without guidance"),
        ({"negative_prompt": ["", "picture 1"], "guidance_scale": [3.0, 0.5]}, "'picture 1' means nothing where guidance_scale is 0.5"),
        ({"guidance_rescale": 0.5, "guidance_scale": [0.0, 1.0]}, "guidance_rescale means nothing without guidance"),
        ({"reduction": "weighted", "weights": [float("inf"), 1]}, "weights: got \\[inf, 1\\], wanted 0 or more, up to 1000000"),
        ({"upscale_strength": 1.0}, "upscale_strength: got 1.0, wanted above 0, below 1"),
        ({"style": "a " * 9}, "is longer than the model's 8 tokens"),
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
    for scheduler in (None, "dpm++", "unipc", "flow_euler"):
        z = sampler.latents(PROMPTS, VIEWS, [0], scheduler=scheduler, **FAST)
        assert bool(torch.isfinite(z).all())
    with pytest.raises(ValueError, match="scheduler 'ddim' cannot sample a flow model: use dpm\\+\\+, unipc, flow_euler"):
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


# Options


def test_each_prompt_may_have_its_own_guidance(sampler):
    """A view whose prompt is not guided, and is unwanted too, is as if its prompt were that one."""
    one, each = (sampler.latents(PROMPTS, VIEWS, [0, 1], **{**FAST, "guidance_scale": scale}) for scale in (3.0, [3.0, 3.0]))
    assert torch.equal(one, each)
    other = sampler.latents(PROMPTS, VIEWS, [0, 1], **{**FAST, "guidance_scale": [3.0, 1.0]})
    same = sampler.latents(PROMPTS, VIEWS, [0, 1], **{**FAST, "guidance_scale": [3.0, 5.0], "negative_prompt": ["", PROMPTS[1]]})
    torch.testing.assert_close(other, same, atol=1e-4, rtol=1e-4)
    assert float((other - one).abs().mean()) > 1e-3


def test_up_to_1_is_unguided_and_prompted(sampler):
    """As in diffusers: 0 does not draw without the prompt, and 0.5 nothing in between."""
    one, *others = (sampler.latents(PROMPTS, VIEWS, [0], **{**FAST, "guidance_scale": scale}) for scale in (1.0, 0.0, 0.5, [0.0, 1.0]))
    assert all(torch.equal(one, other) for other in others)
    mixed = [sampler.latents(PROMPTS, VIEWS, [0], **{**FAST, "guidance_scale": [3.0, scale]}) for scale in (0.0, 1.0)]
    assert torch.equal(*mixed)


@pytest.mark.parametrize("factor", [float("nan"), 1e30])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_is_not_finite_stops_the_run(tiny_model_folder, factor, precision):
    """Broken weights, and values that are too large for the precision; the step is named, and no picture is made."""
    broken = Sampler.open(tiny_model_folder, "cpu", precision)

    def spoil(module, inputs, output):
        if inputs[1] < 500:
            output.sample.mul_(factor).mul_(factor)

    handle = broken.networks.unet.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=r"after step 3 \(timestep \d+\) the latents of 2 of 2 are NaN or infinite: .*--precision 32-true"):
        broken(PROMPTS, VIEWS, [0, 1], **FAST)
    handle.remove()
    broken.vae.decoder.conv_out.bias.data.fill_(factor).mul_(factor)
    with pytest.raises(ValueError, match="decoding: of 2 pictures the VAE makes 2 with NaN or infinite values"):
        broken(PROMPTS, VIEWS, [0, 1], **FAST)


def test_a_style_goes_before_each_prompt(sampler):
    styled = sampler.latents(PROMPTS, VIEWS, [0], style="picture 3", **FAST)
    assert torch.equal(styled, sampler.latents([f"picture 3 {prompt}" for prompt in PROMPTS], VIEWS, [0], **FAST))


def test_weights_of_the_views(sampler):
    alone = sampler.latents(PROMPTS[:1], VIEWS[:1], [0], **FAST)
    weighted = sampler.latents(PROMPTS, VIEWS, [0], reduction="weighted", weights=[2, 0], **FAST)
    torch.testing.assert_close(weighted, alone, atol=1e-4, rtol=1e-4)
    even = sampler.latents(PROMPTS, VIEWS, [0], reduction="weighted", weights=[3, 3], **FAST)
    torch.testing.assert_close(even, sampler.latents(PROMPTS, VIEWS, [0], **FAST), atol=1e-4, rtol=1e-4)


def test_views_that_agree_are_rectified_to_themselves(sampler):
    one = sampler.latents(["the letter a"], [IDENTITY], [0], **FAST)
    both = sampler.latents(["the letter a"] * 2, [IDENTITY] * 2, [0], reduction="rectified", **FAST)
    torch.testing.assert_close(both, one, atol=1e-3, rtol=1e-3)
    disagreeing = sampler.latents(PROMPTS, VIEWS, [0], reduction="rectified", **FAST)
    assert float((disagreeing - sampler.latents(PROMPTS, VIEWS, [0], **FAST)).abs().mean()) > 1e-3


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm"])
def test_time_travel_keeps_the_distribution(sampler, scheduler):
    """The exact denoiser of latents N(0, 1/4): going back and forth gives them the variance that they have without."""
    found = {}
    for times in (1, 3):
        solver, calls = sampler.solver(Options(scheduler=scheduler, time_travel=times)), []
        solver.set_timesteps(200)

        def denoise(z, t, alphas=solver.alphas_cumprod, calls=calls):
            calls.append(int(t))
            a = alphas[int(t)]
            return (1 - a).sqrt() * z / (a / 4 + 1 - a)  # E[eps | z_t]

        generators = [torch.Generator().manual_seed(seed) for seed in range(64)]
        z = torch.randn(64, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        z = sample(denoise, solver, z, generators, again=lambda k, times=times: times if 40 <= k < 160 else 1)
        found[times] = float(z.std())
        assert len(calls) == 80 + times * 120 and sorted(set(calls), reverse=True) == list(dict.fromkeys(calls))
    assert found[1] == pytest.approx(0.5, rel=0.05) and found[3] == pytest.approx(found[1], rel=0.02)


def test_time_travel_does_its_band_again(sampler):
    calls = []
    options = Options(num_inference_steps=10, time_travel=2, travel_band=(0.3, 0.6), upscale=2)
    z = sampler.latents(PROMPTS, VIEWS, [0], on_step=lambda: calls.append(1), **vars(options))
    assert len(calls) == options.num_calls == 13 + 6 and bool(torch.isfinite(z).all())
    travelled, plain = (sampler.latents(PROMPTS, VIEWS, [3], time_travel=n, **FAST) for n in (2, 1))
    assert float((travelled - plain).abs().mean()) > 1e-2


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler", "euler_ancestral", "dpm++", "unipc"])
def test_a_larger_second_pass(sampler, scheduler):
    options = {"num_inference_steps": 6, "upscale": 2, "upscale_strength": 0.4, "scheduler": scheduler}
    together, alone = (sampler.latents(PROMPTS, VIEWS, seeds, **options) for seeds in ([0, 1], [1]))
    assert together.shape == (2, 4, 16, 16) and bool(torch.isfinite(together).all())
    torch.testing.assert_close(together[1:], alone, atol=1e-3, rtol=1e-3)
    most = sampler.latents(PROMPTS, VIEWS, [1], **{**options, "upscale_strength": 0.99})
    assert float(most.std()) < 3 * float(alone.std())  # never from pure noise: that would be scaled twice
    first = sampler.latents(PROMPTS, VIEWS, [1], num_inference_steps=6, scheduler=scheduler)
    small = torch.nn.functional.avg_pool2d(alone, 2)
    assert float(torch.corrcoef(torch.stack([small.flatten(), first.flatten()]))[0, 1]) > 0.5  # it refines what was there


def test_symmetrised_decoding_is_equivariant(sampler):
    z = sampler.latents(PROMPTS, VIEWS, [0], **FAST)
    plain, turned = sampler.decode(z, symmetrise=True), [sampler.decode(view(z), symmetrise=True) for view in D4]
    for view, x in zip(D4, turned):
        torch.testing.assert_close(x, view(plain), atol=1e-5, rtol=0)
    assert float((sampler.decode(D4[1](z)) - D4[1](sampler.decode(z))).abs().max()) > 1e-3
    assert torch.equal(sampler(PROMPTS, VIEWS, [0], symmetrise=True, **FAST), plain)


def test_negation_needs_a_vae_that_knows_it(sampler, monkeypatch):
    views = [IDENTITY, parse_view("flip@negate")]
    with pytest.raises(ValueError, match="this autoencoder was not trained with negation"):
        sampler.check_negation(views)
    sampler.check_negation(VIEWS)

    class Odd(torch.nn.Module):
        """E(-x) = -E(x), D(-z) = -D(z)."""

        config = {"block_out_channels": (1, 1, 1), "scaling_factor": 1.0}
        device = torch.device("cpu")

        def encode(self, x):
            return SimpleNamespace(latent_dist=SimpleNamespace(mean=torch.nn.functional.avg_pool2d(x, 4)))

        def decode(self, z):
            return SimpleNamespace(sample=torch.nn.functional.interpolate(z, scale_factor=4))

    Odd.config = FrozenDict(Odd.config)
    Sampler(sampler.networks, Odd(), torch.device("cpu")).check_negation(views)
    for shipped in ("glyphs-base", "glyphs-eq"):
        assert negation_error(load_autoencoder(PRETRAINED / shipped)) > 0.4


def test_bfloat16_is_near(tiny_model_folder, sampler):
    half = Sampler.open(tiny_model_folder, "cpu", "bf16-mixed")
    a, b = (each(PROMPTS, VIEWS, [0], **FAST) for each in (sampler, half))
    assert b.dtype == torch.float32 and 0 < float((a - b).abs().max()) < 0.3


@pytest.mark.parametrize("reduction", ["mean", "rectified"])
def test_equal_views_in_bfloat16_are_one(tiny_model_folder, reduction):
    """Shares of a third are no bfloat16: they are added up in float32."""
    half = Sampler.open(tiny_model_folder, "cpu", "bf16-mixed")
    one = half.latents(PROMPTS[:1], [IDENTITY], [0], **FAST)
    three = half.latents(PROMPTS[:1] * 3, [IDENTITY] * 3, [0], reduction=reduction, **FAST)
    torch.testing.assert_close(three, one, atol=2e-2, rtol=2e-2)


def test_devices_that_are_not_there(tiny_model_folder):
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"device '{name}': "):
            Sampler.open(tiny_model_folder, name)


def test_memory_switches(tiny_model_folder, sampler):
    frugal = Sampler.open(tiny_model_folder, "cpu")
    frugal.save_memory(attention_slicing=True, tiled=True)
    torch.testing.assert_close(frugal(PROMPTS, VIEWS, [0], **FAST), sampler(PROMPTS, VIEWS, [0], **FAST), atol=1e-4, rtol=1e-4)
    frugal.vae.tile_latent_min_size, frugal.vae.tile_sample_min_size, calls = 4, 16, []
    handle = frugal.vae.decoder.register_forward_hook(lambda *a: calls.append(1))
    frugal.decode(torch.zeros(1, 4, 8, 8))
    handle.remove()
    assert len(calls) > 4
    with pytest.raises(ValueError, match="offloading moves networks from a GPU to the CPU and back, but the device is cpu"):
        frugal.save_memory(offload=True)


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        *(("unet", {"sample_size": size}, "sample_size in unet/config.json is") for size in (None, "8", 0, -8, 8.5, [8, 16], True)),
        ("unet", {"out_channels": 3}, "gives 3"),
        *(("vae", {"scaling_factor": factor}, "scaling_factor is") for factor in (0, -0.2, float("nan"), float("inf"), None, "0.18", True)),
        *(("vae", {"shift_factor": shift}, "shift_factor is") for shift in (float("nan"), "0.1")),
        ("scheduler", {"num_train_timesteps": 0}, "for 0 timesteps"),
        ("scheduler", {"beta_schedule": "linear", "trained_betas": [0.1, 0.2]}, "2 betas for 1000 timesteps"),
        ("scheduler", {"beta_schedule": "linear", "beta_end": 2.0}, "from 0 to 1"),
        ("scheduler", {"beta_schedule": "linear", "beta_start": float("nan")}, "from 0 to 1"),
    ],
)
def test_settings_that_no_model_has_are_told_as_it_is_opened(tiny_model_folder, tmp_path, file, change, reason):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    path = folder / file / ("scheduler_config.json" if file == "scheduler" else "config.json")
    settings = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps(settings))
    if file == "unet" and "out_channels" in change:
        UNet2DConditionModel.from_config(settings).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match=re.escape(reason)):
        Sampler.open(folder, "cpu")


def test_parts_of_two_models_are_told(tiny_model_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    tokenizer, encoder = load_text(folder)
    make_text_encoder(tokenizer, hidden_size=encoder.config.hidden_size * 2).save_pretrained(folder / "text_encoder")
    with pytest.raises(ValueError, match="they are of two models"):
        Sampler.open(folder, "cpu")
