"""The anagram denoiser: guidance, the mean over views, and views in turn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from eqldm.anagram.denoiser import Guidance, alternating_views, mean_of_views, rectified_mean
from eqldm.diffusion.objective import Objective
from eqldm.model_folder import load_unet, make_scheduler
from eqldm.views import D4, IDENTITY, NEGATE, parse_view

VIEWS = (IDENTITY, parse_view("rotate_180"), parse_view("patch_permute:2:3"))
T = torch.tensor(500)


def latents(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def prompts(count: int, batch: int | None = None) -> Tensor:
    shape = (count, 8, 16) if batch is None else (count, batch, 8, 16)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


class CountedUNet:
    """A UNet that keeps the sizes of the batches it was called with."""

    def __init__(self, unet):
        self.unet, self.batches = unet, []
        unet.register_forward_hook(lambda module, inputs, output: self.batches.append(len(output.sample)))

    def __call__(self, *inputs):
        with torch.no_grad():
            return self.unet(*inputs)


@pytest.fixture
def unet(tiny_model_folder) -> CountedUNet:
    return CountedUNet(load_unet(tiny_model_folder))


def pointwise(z: Tensor, t: Tensor, embeds: Tensor) -> SimpleNamespace:
    """A network that commutes with every view, negation included: odd, and the same at each cell."""
    return SimpleNamespace(sample=z.pow(3) * embeds.mean((1, 2))[:, None, None, None] + torch.tanh(z) * t / 1000)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_views_of_an_equivariant_network_change_nothing(scale):
    embeds = prompts(1).expand(10, -1, -1)
    views = [*D4, NEGATE, parse_view("patch_permute:4")]
    z = latents()
    guided = Guidance(pointwise, embeds, prompts(2)[1], scale)
    single = guided(z[None], T, [0])[0]
    torch.testing.assert_close(mean_of_views(guided, views)(z, T), single)
    turns = alternating_views(guided, views, torch.arange(10))
    for k in range(10):
        torch.testing.assert_close(turns(z, torch.tensor(k)), guided(z[None], torch.tensor(k), [0])[0])


@pytest.mark.parametrize("own_prompts", [False, True])
def test_mean_of_views_is_the_loop_of_separate_calls(unet, own_prompts):
    z, batch = latents(), 3
    embeds = prompts(3, batch if own_prompts else None)
    negative = prompts(4)[3]
    found = mean_of_views(Guidance(unet, embeds, negative, 4.0), VIEWS)(z, T)
    assert unet.batches == [2 * 3 * batch]  # all views, prompts and samples, guided and unguided, in one call
    outputs = []
    for i, view in enumerate(VIEWS):
        rows = []
        for b in range(batch):
            x = view(z[b : b + 1])
            prompt = embeds[i, b] if own_prompts else embeds[i]
            plain, prompted = (unet(x, T, e[None]).sample for e in (negative, prompt))
            rows.append(view.inverse(plain + 4.0 * (prompted - plain)))
        outputs.append(torch.cat(rows))
    torch.testing.assert_close(found, torch.stack(outputs).mean(0), atol=1e-5, rtol=1e-4)


def test_unguided_costs_half(unet):
    z, embeds = latents(), prompts(3)
    found = mean_of_views(Guidance(unet, embeds, prompts(1)[0], 1.0), VIEWS)(z, T)
    assert unet.batches == [9]
    outputs = [view.inverse(unet(view(z), T, embeds[i].expand(3, -1, -1)).sample) for i, view in enumerate(VIEWS)]
    torch.testing.assert_close(found, torch.stack(outputs).mean(0), atol=1e-5, rtol=1e-4)


def test_guidance_closed_form():
    """u + s (c - u), of a network whose output is its prompt's mean."""
    network = lambda z, t, embeds: SimpleNamespace(sample=torch.ones_like(z) * embeds.mean((1, 2))[:, None, None, None])  # noqa: E731
    z, embeds, negative = latents()[None].expand(2, -1, -1, -1, -1), prompts(2), prompts(3)[2]
    found = Guidance(network, embeds, negative, 7.0)(z, T, [1, 0])
    for output, i in zip(found, [1, 0]):
        expected = negative.mean() + 7 * (embeds[i].mean() - negative.mean())
        torch.testing.assert_close(output, torch.full_like(output, float(expected)))
    with pytest.raises(ValueError, match="got 2 stacks of latents for 1 prompts"):
        Guidance(network, embeds, negative, 7.0)(z, T, [0])


def test_views_take_turns(unet):
    z, embeds, negative = latents(), prompts(3), prompts(4)[3]
    guided = Guidance(unet, embeds, negative, 4.0)
    steps = torch.tensor([900, 700, 700, 500, 300])  # some solvers call a timestep twice
    denoise = alternating_views(guided, VIEWS, steps)
    for t, i in ((900, 0), (700, 1), (700, 1), (500, 2), (300, 0)):
        unet.batches.clear()
        found = denoise(z, torch.tensor(t))
        assert unet.batches == [6]
        expected = VIEWS[i].inverse(guided(VIEWS[i](z)[None], torch.tensor(t), [i])[0])
        torch.testing.assert_close(found, expected)


def test_negation_is_turned_back(unet):
    """The mean of f(z) and -f(-z) is odd, whatever the network."""
    guided = Guidance(unet, prompts(1).expand(2, -1, -1), prompts(2)[1], 4.0)
    denoise = mean_of_views(guided, [IDENTITY, NEGATE])
    z = latents()
    torch.testing.assert_close(denoise(-z, T), -denoise(z, T), atol=1e-5, rtol=1e-4)
    assert (guided(-z[None], T, [0]) + guided(z[None], T, [0])).abs().mean() > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(unet, share):
    z, embeds, negative = latents(), prompts(1), prompts(2)[1]
    guided = Guidance(unet, embeds, negative, 6.0)(z[None], T, [0])[0]
    prompted = unet(z, T, embeds.expand(3, -1, -1)).sample
    found = Guidance(unet, embeds, negative, 6.0, rescale=share)(z[None], T, [0])[0]
    torch.testing.assert_close(found, rescale_noise_cfg(guided, prompted, share), atol=1e-5, rtol=1e-4)


def test_scales_and_negative_prompts_of_each_prompt(unet):
    z, embeds, negative = latents(), prompts(2), prompts(4)[2:]
    both = Guidance(unet, embeds, negative, [2.0, 7.0])(torch.stack([z, z]), T, [0, 1])
    assert unet.batches == [2 * 2 * 3]
    for i, scale in enumerate((2.0, 7.0)):
        alone = Guidance(unet, embeds[i : i + 1], negative[i], scale)(z[None], T, [0])[0]
        torch.testing.assert_close(both[i], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="got 3 scales and 2 negative prompts for 2 prompts"):
        Guidance(unet, embeds, negative, [1, 2, 3])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("weights", [None, [3, 1]])
def test_a_rectified_mean_has_the_variance_of_one_view(prediction, weights):
    """Of independent noise estimates; the plain mean has half of it."""
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": prediction, "rescale_betas_zero_snr": True}
    objective, z, t = Objective.of(make_scheduler(scheduler)), torch.randn(2, 4, 32, 32), torch.tensor(400)
    eps, times = torch.randn(2, 2, 4, 32, 32), t.expand(2)

    def guided(z, t, prompts):
        return torch.stack([objective.output_of_noise(each, row, times) for each, row in zip(eps, z)])

    views = [IDENTITY, IDENTITY]
    found = objective.noise(rectified_mean(guided, views, objective, weights)(z, t), z, times)
    plain = objective.noise(mean_of_views(guided, views, weights)(z, t), z, times)
    assert float(found.std()) == pytest.approx(1, abs=0.02) and float(plain.std()) == pytest.approx(
        (0.5, 0.625)[weights is not None] ** 0.5, abs=0.02
    )
    alike = [each / each.flatten(1).norm(dim=1)[:, None, None, None] for each in (found, plain)]  # each sample has a factor of its own
    torch.testing.assert_close(*alike, atol=1e-5, rtol=1e-3)
    pure = torch.tensor(999)  # there the signal is 0: nothing is divided by it
    assert bool(torch.isfinite(rectified_mean(lambda z, t, p: eps, views, objective, weights)(z, pure)).all())
