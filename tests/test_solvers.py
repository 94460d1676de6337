"""Solvers: each scheduler that a model folder may name samples what the UNet knows, or is refused."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import diffusers
import pytest
import torch

from eqldm.anagram.options import Options
from eqldm.anagram.sampling import Sampler
from eqldm.anagram.solvers import OF_FLOWS, OF_NOISE, begin, objective_of, solver_for
from eqldm.model_folder import PRETRAINED, Networks, Pixels, load_scheduler, make_scheduler
from eqldm.views import IDENTITY, parse_view

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, thousands of them

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ALPHAS = make_scheduler({"_class_name": "DDIMScheduler", **BETAS}).alphas_cumprod
MEAN, STD = 1.5, 0.5
VIEWS = [IDENTITY, parse_view("rotate_180")]
NOISE = [name for name in OF_NOISE if name != "LMSDiscreteScheduler" or find_spec("scipy")]


class Knowing(torch.nn.Module):
    """The exact denoiser of latents that are all N(MEAN, STD^2). seen: how wide its inputs were, over what they should have been."""

    def __init__(self, prediction: str):
        super().__init__()
        self.prediction, self.seen, self.config = prediction, [], SimpleNamespace(in_channels=4, sample_size=8)

    def forward(self, x, t, embeds):
        t = float(t)
        signal, noise = (1 - t / 1000, t / 1000) if self.prediction == "flow_prediction" else self.levels(t)
        variance = signal**2 * STD**2 + noise**2
        self.seen.append(float(x.std()) / variance**0.5)
        eps = noise * (x - signal * MEAN) / variance
        z = MEAN + signal * STD**2 * (x - signal * MEAN) / variance
        states = {"epsilon": eps, "v_prediction": signal * eps - noise * z, "flow_prediction": eps - z}
        return SimpleNamespace(sample=states[self.prediction])

    @staticmethod
    def levels(t: float) -> tuple[float, float]:
        """Between two timesteps as diffusers does it: the line through their sigmas."""
        sigmas = ((1 - ALPHAS) / ALPHAS).sqrt()
        low = min(int(t), 998)
        sigma = float(sigmas[low] + (t - low) * (sigmas[low + 1] - sigmas[low]))
        return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5


class Plain(Sampler):
    """Whose prompts say nothing."""

    def _embed(self, prompt, count):
        return torch.zeros(count, 1, 1)

    def check_length(self, prompts):
        pass


def knowing(name: str, prediction: str, **config) -> Sampler:
    flow = {"use_flow_sigmas": True} if prediction == "flow_prediction" and not name.startswith("FlowMatch") else {}
    scheduler = make_scheduler({"_class_name": name, **BETAS, "prediction_type": prediction, **flow, **config})
    return Plain(Networks(Knowing(prediction), None, None, scheduler), Pixels(), torch.device("cpu"))


def found(sampler: Sampler, **options) -> tuple[float, float, float]:
    """The mean and the standard deviation of what is sampled, and how much wider than it should have been an input was at most."""
    calls, estimates = [], []
    z = sampler.latents(
        ["", ""],
        VIEWS,
        range(16),
        lambda: calls.append(1),
        estimates.append,
        **{"num_inference_steps": 20, "guidance_scale": 1.0, **options},
    )
    assert len(calls) == sampler.num_calls(Options(**{"num_inference_steps": 20, **options})) == len(sampler.networks.unet.seen)
    assert float((estimates[-1] - MEAN).abs().mean()) < 1  # what a preview shows
    return float(z.mean()), float(z.std()), max(sampler.networks.unet.seen)


@pytest.mark.parametrize(
    ("name", "prediction"),
    [(name, kind) for name in NOISE for kind in ("epsilon", "v_prediction")] + [(name, "flow_prediction") for name in OF_FLOWS],
)
def test_every_scheduler_samples_what_the_unet_knows(name, prediction):
    """In a first pass, and in a second one that begins with a step of an odd number."""
    config = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    mean, std, seen = found(knowing(name, prediction, **config), num_inference_steps=21, upscale=2)
    assert mean == pytest.approx(MEAN, abs=0.1) and STD / 2 < std < 1.2 * STD and seen < 1.15


def test_pictures_of_order_2_do_not_depend_on_the_batch(tiny_model_folder):
    sampler = Sampler.open(tiny_model_folder, "cpu")
    sampler.networks.scheduler = make_scheduler({**sampler.networks.scheduler.config, "_class_name": "KDPM2AncestralDiscreteScheduler"})
    options = {"num_inference_steps": 3, "upscale": 2}
    both, alone = (sampler.latents(["the letter a"], VIEWS[:1], seeds, **options) for seeds in ([3, 4], [4]))
    torch.testing.assert_close(both[1:], alone, atol=2e-3, rtol=2e-3)


def test_where_a_scheduler_begins():
    for name, index in (("EulerDiscreteScheduler", 3), ("HeunDiscreteScheduler", 6)):
        solver = make_scheduler({"_class_name": name, **BETAS})
        solver.set_timesteps(10)
        assert torch.equal(begin(solver, 3), solver.timesteps[index:]) and solver.begin_index == index
    solver = make_scheduler({"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True})
    solver.set_timesteps(10)
    assert begin(solver, 6).tolist() == [301, 201, 201, 101, 1] and begin(solver, 9).tolist() == [1]


def test_a_flow_may_be_stated_in_either_way():
    """As Stable Diffusion's pipeline takes it, or as `FlowMatch...` does: what one can do, the other can."""
    for own in ("FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
        shift = {"shift": 3.0} if own.startswith("FlowMatch") else {"flow_shift": 3.0}
        sampler = knowing(own, "flow_prediction", **shift)
        objective = objective_of(sampler.networks.scheduler)
        assert objective.is_flow and objective.flow_shift == 3
        for scheduler in (None, "dpm++", "unipc", "flow_euler"):
            solver = solver_for(sampler.networks.scheduler, Options(scheduler=scheduler))
            assert float(solver.timesteps[15]) == pytest.approx(750, abs=15)  # 3 s / (1 + 2 s) of s = 1 / 2
        for options in ({}, {"scheduler": "dpm++"}, {"scheduler": "flow_euler", "reduction": "rectified"}):
            mean, std, _ = found(sampler, **options)
            assert mean == pytest.approx(MEAN, abs=0.1) and std == pytest.approx(STD, rel=0.2)
            sampler.networks.unet.seen.clear()


LEADING = {"timestep_spacing": "leading"}


@pytest.mark.parametrize(("name", "prediction", "config", "options", "message"), [
    ("EDMEulerScheduler", "epsilon", {}, {}, r"scheduler, EDMEulerScheduler, cannot .*: choose another with --scheduler \(ddim, "),
    ("DDIMInverseScheduler", "epsilon", {}, {}, "DDIMInverseScheduler, cannot sample a UNet of Stable Diffusion's kind"),
    ("DEISMultistepScheduler", "flow_prediction", {}, {}, r"cannot sample a flow model: .* --scheduler \(dpm\+\+, unipc, "),
    ("FlowMatchEulerDiscreteScheduler", "flow_prediction", {}, {"scheduler": "ddim"}, "'ddim' cannot sample a flow model: use dpm"),
    ("FlowMatchEulerDiscreteScheduler", "flow_prediction", {"use_dynamic_shifting": True}, {}, "with use_dynamic_shifting: true"),
    ("FlowMatchEulerDiscreteScheduler", "flow_prediction", {}, {"blend": "pixels"}, r"cannot use FlowMatchEuler.*: use dpm\+\+ or unipc"),
    ("UniPCMultistepScheduler", "flow_prediction", {}, {"time_travel": 2}, "would remember: leave it out for a flow model"),
    ("HeunDiscreteScheduler", "epsilon", {}, {"time_travel": 2}, "which HeunDiscreteScheduler would remember: use ddim or ddpm"),
    ("HeunDiscreteScheduler", "epsilon", {}, {"reduction": "alternate"}, "alternate .* HeunDiscreteScheduler calls the UNet several times"),
    ("PNDMScheduler", "epsilon", {"skip_prk_steps": False}, {"upscale": 2}, "skip_prk_steps: false can only begin with noise: use ddim"),
    ("PNDMScheduler", "epsilon", {"skip_prk_steps": False}, {"num_inference_steps": 3}, "needs 4 steps or more, got 3: use ddim"),
    ("LCMScheduler", "epsilon", {}, {"num_inference_steps": 60}, "LCMScheduler cannot sample in 60 steps: .* Or use ddim"),
    ("EulerDiscreteScheduler", "epsilon", {}, {"num_inference_steps": 1001}, "got 1001, but EulerDiscreteScheduler knows no more"),
    ("DDIMScheduler", "epsilon", LEADING, {"num_inference_steps": 1000}, "got 1000, which DDIMScheduler takes from timestep 1000 to 1 "),
    ("DDIMScheduler", "v_prediction", LEADING, {"num_inference_steps": 1000}, "of a model that knows 0 to 999: wanted fewer steps"),
    ("EulerDiscreteScheduler", "epsilon", LEADING, {"num_inference_steps": 1000}, "from timestep 1000 to 1 .timestep_spacing leading"),
    ("UniPCMultistepScheduler", "epsilon", LEADING, {"num_inference_steps": 999}, "from timestep 1000 to"),
    ("DPMSolverMultistepScheduler", "epsilon", LEADING, {"num_inference_steps": 1000}, "takes from timestep 1 to 1"),
    ("UniPCMultistepScheduler", "flow_prediction", {"final_sigmas_type": "sigma_min"}, {}, "stops where 0.03.* of the noise is left"),
    ("DPMSolverMultistepScheduler", "flow_prediction", {"use_karras_sigmas": True}, {}, "takes use_flow_sigmas or use_karras_sigmas"),
    ("DDIMScheduler", "epsilon", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, {}, "epsilon model states no picture"),
    ("DDIMScheduler", "sample", {}, {}, "scheduler's prediction_type: got 'sample', wanted one of epsilon"),
])  # fmt: skip
def test_what_a_scheduler_cannot_do_is_refused(name, prediction, config, options, message):
    with pytest.raises(ValueError, match=message):
        solver_for(knowing(name, prediction, **config).networks.scheduler, Options(**options))


def test_each_scheduler_of_diffusers_is_known_or_refused_in_one_line():
    names = [name for name in dir(diffusers) if name.endswith("Scheduler") and isinstance(getattr(diffusers, name), type)]
    for name in {*names} - {*OF_NOISE, *OF_FLOWS}:
        with pytest.raises(ValueError, match=f"{name}.*(cannot|needs)") as raised:
            solver_for(make_scheduler({"_class_name": name}), Options())
        assert len(str(raised.value).splitlines()) == 1


def test_a_scheduler_that_finds_no_timesteps_is_refused_before_it_samples():
    own = load_scheduler(PRETRAINED / "glyphs-eq")
    with pytest.raises(ValueError, match="KDPM2AncestralDiscreteScheduler does not find its timesteps"):  # not: "the weights are broken"
        solver_for(make_scheduler(dict(own.config), "KDPM2AncestralDiscreteScheduler"), Options(num_inference_steps=5))


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_a_second_estimate_is_not_magnified_from_pure_noise(name):
    """Seen: glyphs-eq by Heun's, whose first step falls 1,600 times, paints saturated blots where Euler's draws clean letters."""
    config = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    with pytest.raises(ValueError, match=f"{name} corrects .* falls from 2.03e.04 to 12.8 times the signal.*: use ddim"):
        solver_for(make_scheduler({**config, "_class_name": name}), Options(num_inference_steps=20))
    stable = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "_class_name": name}
    assert type(solver_for(make_scheduler(stable), Options(num_inference_steps=5))).__name__ == name
