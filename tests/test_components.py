"""Components: they add up, do what their names say, and are summed by one denoiser."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision.transforms.v2.functional as TF

from eqldm.anagram.denoiser import Guidance
from eqldm.anagram.factorized import sum_of_parts
from eqldm.anagram.sampling import Sampler
from eqldm.diffusion.objective import Objective
from eqldm.model_folder import encode, make_scheduler
from eqldm.views import IDENTITY
from eqldm.views.components import blur, line_blur, parse_components

FAST = {"num_inference_steps": 3, "guidance_scale": 3.0}
NAMES = ["hybrid:0.05", "hybrid:0.1:0.04", "colour", "motion:0.3", "motion:0.2:60"]


def pictures(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", NAMES)
def test_components_add_up_and_are_linear(name):
    x, y = pictures(), pictures().flip(0)
    parts = parse_components(name)
    torch.testing.assert_close(sum(part(x) for part in parts), x, atol=1e-5, rtol=0)
    for part in parts:
        torch.testing.assert_close(part(2 * x - y), 2 * part(x) - part(y), atol=1e-5, rtol=0)
    assert len({part.name for part in parts}) == len(parts)


def test_a_blur_is_that_of_torchvision_where_no_edge_is_near():
    x = pictures(64)
    found, wanted = blur(x, 2 / 64), TF.gaussian_blur(x, 17, 2.0)
    torch.testing.assert_close(found[..., 9:-9, 9:-9], wanted[..., 9:-9, 9:-9], atol=1e-3, rtol=0)
    torch.testing.assert_close(blur(torch.ones(1, 8, 8), 0.4), torch.ones(1, 8, 8))  # wider than the picture, mirrored at its edges
    torch.testing.assert_close(blur(x, 0.05).flip(-1), blur(x.flip(-1), 0.05), atol=1e-5, rtol=0)


def test_a_line_blur_goes_along_its_line():
    """A point becomes a line of its length: 0 degrees to the right, 90 upwards."""
    x = torch.zeros(1, 1, 33, 33)
    x[..., 16, 16] = 1
    for degrees, (down, right) in ((0, (0, 1)), (90, (-1, 0)), (45, (-1, 1))):
        seen = line_blur(x, 1 / 3, degrees)[0, 0]
        assert float(seen.sum()) == pytest.approx(1, abs=1e-5)
        places = seen.nonzero().double() - 16
        weights = seen[seen > 0].double()
        along, across = torch.tensor([down, right]).double(), torch.tensor([-right, down]).double()
        unit = float(along.norm())
        spread = [float((weights * (places @ axis / unit).square()).sum().sqrt()) for axis in (along, across)]
        assert spread[0] == pytest.approx(11 / 12**0.5, abs=0.4) and spread[1] < 0.6, degrees
    torch.testing.assert_close(line_blur(torch.ones(1, 1, 8, 8), 0.9, 30), torch.ones(1, 1, 8, 8))


def test_bands_part_the_frequencies():
    low, middle, high = parse_components("hybrid:0.08:0.02")
    wave = torch.cos(torch.arange(64) * 2 * torch.pi / 64 * 1)[None, :].expand(64, 64)[None]
    fast = torch.cos(torch.arange(64) * 2 * torch.pi / 64 * 24)[None, :].expand(64, 64)[None]
    assert float(low(wave).std() / wave.std()) > 0.8 and float(low(fast).std() / fast.std()) < 0.06
    assert float(high(fast).std() / fast.std()) > 0.9 and float(middle(fast).std() / fast.std()) < 0.1


@pytest.mark.parametrize(("text", "message"), [
    ("hybrids:1", "unknown components 'hybrids:1': wanted hybrid:SIGMA[:SIGMA], colour, motion:LENGTH[:DEGREES]"),
    ("hybrid", "wanted hybrid:SIGMA[:SIGMA]"),
    ("hybrid:a", "wanted hybrid:SIGMA"),
    ("hybrid:0.02:0.08", "wanted falling standard deviations"),
    ("hybrid:0.05:0.05", "wanted falling standard deviations"),
    ("hybrid:0.7", "between 0 and .5 of the picture's side"),
    ("colour:2", "components 'colour:2': wanted colour"),
    ("motion:2", "got length 2, wanted above 0, below 1"),
    ("motion:nan", "wanted motion:LENGTH"),
])  # fmt: skip
def test_bad_names_say_what_is_wanted(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_components(text)


# Sampling


@pytest.fixture(scope="module")
def sampler(tiny_model_folder) -> Sampler:
    return Sampler.open(tiny_model_folder, "cpu")


def test_equal_prompts_are_a_plain_picture(sampler):
    plain = sampler(["the letter a"], [IDENTITY], [0, 1], **FAST)
    for name in ("hybrid:0.1", "motion:0.3"):
        found = sampler.compose(["the letter a"] * 2, parse_components(name), [0, 1], **FAST)
        torch.testing.assert_close(found, plain, atol=1e-3, rtol=0)
    other = sampler.compose(["the letter a", "picture 3"], parse_components("hybrid:0.1"), [0, 1], **FAST)
    assert float((other - plain).abs().mean()) > 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_each_component_is_that_of_its_own_estimate(prediction):
    objective = Objective.of(make_scheduler({"_class_name": "DDIMScheduler", "prediction_type": prediction}))
    parts, z, t = parse_components("hybrid:0.2"), torch.randn(2, 4, 8, 8), torch.tensor(300)
    outputs, reference = torch.randn(2, 2, 4, 8, 8), torch.randn(1, 4, 8, 8)
    times = t.expand(2)
    estimates = [objective.clean(output, z, times) for output in outputs]
    found = objective.clean(sum_of_parts(lambda z, t, p: outputs[: len(p)], parts, objective)(z, t), z, times)
    torch.testing.assert_close(found, parts[0](estimates[0]) + parts[1](estimates[1]), atol=1e-4, rtol=1e-4)
    held = sum_of_parts(lambda z, t, p: outputs[: len(p)], parts, objective, {0: reference})(z, t)
    wanted = parts[0](reference) + parts[1](estimates[0])
    torch.testing.assert_close(objective.clean(held, z, times), wanted.expand(2, -1, -1, -1), atol=1e-4, rtol=1e-4)


def test_a_part_is_held_to_a_reference(sampler):
    parts, reference = parse_components("hybrid:0.1"), pictures()[:1].clamp(-1, 1)
    found = sampler.compose(["the letter a"], parts, [0], {0: reference}, **FAST)
    z, own = encode(sampler.vae, reference), sampler.compose(["the letter a"] * 2, parts, [0], **FAST)
    with torch.no_grad():
        seen, plain = encode(sampler.vae, found), encode(sampler.vae, own)
    assert found.shape == (1, 3, 32, 32) and float((seen - z).abs().mean()) != float((plain - z).abs().mean())


def test_pictures_are_taken_apart_where_latents_cannot_be(sampler):
    colour = parse_components("colour")
    with pytest.raises(ValueError, match="components grey, colour: latents know nothing of colours. Give blend=pixels"):
        sampler.compose(["the letter a", "the letter v"], colour, [0], **FAST)
    found = sampler.compose(["the letter a", "the letter v"], colour, [0], blend="pixels", **FAST)
    assert found.shape == (1, 3, 32, 32) and bool(torch.isfinite(found).all())
    held = sampler.compose(["the letter a"], colour, [0], {0: pictures()[:1].clamp(-1, 1)}, blend="pixels", **FAST)
    assert bool(torch.isfinite(held).all())


@pytest.mark.parametrize(("changes", "message"), [
    ({"prompts": ["a"]}, "one prompt for each component that is not held (low, high): got 1"),
    ({"held": {0: torch.zeros(1, 3, 32, 32)}}, "one prompt for each component that is not held (high): got 2"),
    ({"prompts": ["a"], "held": {0: torch.zeros(1, 3, 8, 8)}}, "a reference of shape (1, 3, 8, 8): wanted (1, 3, 32, 32)"),
    ({"reduction": "alternate"}, "components are summed: reduction and upscale mean nothing"),
    ({"prompts": ["a"], "held": {0: torch.zeros(1, 3, 32, 32)}, "scheduler": "euler"}, "a part cannot be held with EulerDiscreteScheduler"),
    ({"prompts": ["a", "a " * 9]}, "is longer than the model's 8 tokens"),
])  # fmt: skip
def test_options_that_do_not_fit(sampler, changes, message):
    options = {"prompts": ["a", "v"], "components": parse_components("hybrid:0.1"), "seeds": [0], **FAST, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        sampler.compose(**options)


def test_a_flow_model(make_model_folder, tmp_path):
    flow = {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    sampler = Sampler.open(make_model_folder(tmp_path / "flow", **flow), "cpu")
    found = sampler.compose(["the letter a", "the letter v"], parse_components("hybrid:0.1"), [0], scheduler="flow_euler", **FAST)
    assert bool(torch.isfinite(found).all())


def test_one_call_of_the_unet_a_step():
    sizes = []

    def unet(z, t, embeds):
        sizes.append(len(z))
        return type("Output", (), {"sample": z})

    guided = Guidance(unet, torch.randn(3, 8, 16), torch.randn(8, 16), 4.0)
    objective = Objective.of(make_scheduler({"_class_name": "DDIMScheduler"}))
    sum_of_parts(guided, parse_components("hybrid:0.2:0.1"), objective)(torch.randn(2, 4, 8, 8), torch.tensor(5))
    assert sizes == [2 * 3 * 2]
