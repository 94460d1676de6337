"""The objective: noise, targets and weights against diffusers' own and against closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from eqldm.diffusion.objective import PREDICTIONS, Objective
from eqldm.model_folder import make_scheduler

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULES = {
    "epsilon": {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", **BETAS},
    "v_prediction": {"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", **BETAS},
    "flow_prediction": {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    },
}
ZERO_SNR = {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **BETAS}


def objective(prediction: str, gamma: float | None = None, floor: float = 0.0, **changes) -> Objective:
    return Objective.of(make_scheduler({**SCHEDULES[prediction], **changes}), gamma, floor)


def draw(batch: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, batch, 4, 8, 8, generator=generator).unbind()


@pytest.mark.parametrize(
    "config",
    [
        SCHEDULES["epsilon"],
        {"_class_name": "PNDMScheduler", **BETAS},
        {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"},
        {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "num_train_timesteps": 250},
        ZERO_SNR,
    ],
)
def test_add_noise_equals_the_schedulers_own(config):
    scheduler = make_scheduler(config)
    z, eps = draw()
    count = scheduler.config.num_train_timesteps
    t = torch.linspace(0, count - 1, len(z)).round()
    torch.testing.assert_close(Objective.of(scheduler).add_noise(z, eps, t), scheduler.add_noise(z, eps, t.long()))


@pytest.mark.parametrize("config", [SCHEDULES["v_prediction"], {**ZERO_SNR, "prediction_type": "v_prediction"}])
def test_velocity_equals_the_schedulers_own(config):
    scheduler = make_scheduler(config)
    z, eps = draw()
    t = torch.tensor([0.0, 1, 10, 500, 998, 999])
    reference = make_scheduler({**config, "_class_name": "DDPMScheduler"})  # not all schedulers can tell it
    torch.testing.assert_close(Objective.of(scheduler).target(z, eps, t), reference.get_velocity(z, eps, t.long()))


def test_epsilon_is_the_noise():
    z, eps = draw()
    assert objective("epsilon").target(z, eps, torch.arange(6.0)) is eps


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_closed_form_and_diffusers(shift):
    """`flow_shift` shifts the drawn times; t = 1000 s then means the same level in both libraries."""
    z, eps = draw()
    flow, reference = objective("flow_prediction", flow_shift=shift), FlowMatchEulerDiscreteScheduler(shift=shift)
    t = reference.timesteps[[0, 1, 10, 500, 998, 999]]
    s = t[:, None, None, None] / 1000
    torch.testing.assert_close(flow.add_noise(z, eps, t), (1 - s) * z + s * eps)
    torch.testing.assert_close(flow.add_noise(z, eps, t), reference.scale_noise(z, t, eps))
    torch.testing.assert_close(flow.target(z, eps, t), eps - z)
    drawn = torch.stack([flow.draw_time(torch.Generator().manual_seed(seed)) for seed in range(200)]) / 1000
    unshifted = torch.stack([torch.rand((), generator=torch.Generator().manual_seed(seed)) for seed in range(200)])
    torch.testing.assert_close(drawn, shift * unshifted / (1 + (shift - 1) * unshifted))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_picture_is_recovered_from_the_target(prediction):
    z, eps = draw()
    made = objective(prediction)
    t = torch.tensor([1.0, 100, 300, 500, 700, 900])
    z_t, target = made.add_noise(z, eps, t), made.target(z, eps, t)
    torch.testing.assert_close(made.output_of(z, z_t, t), target, atol=1e-4, rtol=1e-3)
    found = made.clean(target, z_t, t)
    torch.testing.assert_close(found, z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_noise_is_recovered_from_the_target(prediction):
    found = objective(prediction)
    z, eps = draw()
    t = torch.tensor([20.0, 100, 300, 500, 700, 900])
    noisy, target = found.add_noise(z, eps, t), found.target(z, eps, t)
    torch.testing.assert_close(found.noise(target, noisy, t), eps, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.output_of_noise(eps, noisy, t), target, atol=1e-3, rtol=1e-3)


def test_min_snr_weights():
    """min(SNR, gamma) / SNR for epsilon, / (SNR + 1) for v; both are weight 1 on the picture's error where SNR <= gamma."""
    a = make_scheduler(SCHEDULES["epsilon"]).alphas_cumprod
    snr = a / (1 - a)
    assert bool((snr > 5).any()) and bool((snr < 5).any())
    torch.testing.assert_close(objective("epsilon", 5.0).min_snr_weights, snr.clamp(max=5) / snr)
    torch.testing.assert_close(objective("v_prediction", 5.0).min_snr_weights, snr.clamp(max=5) / (snr + 1))
    torch.testing.assert_close(objective("v_prediction", 5.0, 0.2).min_snr_weights, (snr.clamp(max=5) / (snr + 1)).clamp(min=0.2))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_draws_timesteps_as_it_weighs_them(prediction):
    """The expected loss is that of uniform timesteps with weights, and its variance is smaller."""
    made, plain = objective(prediction, 5.0), objective(prediction)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([made.draw_time(generator) for _ in range(4000)])
    assert torch.equal(drawn, drawn.round())
    edges = torch.arange(0.0, 1001, 100)
    share = torch.histogram(drawn, edges).hist / len(drawn)
    expected = made.min_snr_weights.view(10, 100).sum(1) / made.min_snr_weights.sum()
    assert torch.allclose(share, expected, atol=0.025)

    error = torch.linspace(1, 3, 1000)  # of a network, by timestep
    ones = torch.ones(1000, 4, 2, 2)
    every = torch.arange(1000.0)
    losses = [o.loss(error.sqrt()[:, None, None, None] * ones + o.target(ones, ones, every), ones, ones, every) for o in (plain, made)]
    weighted = made.min_snr_weights * losses[0]
    importance = losses[1][drawn.long()]
    assert float(importance.mean()) == pytest.approx(float(weighted.mean()), rel=0.02)
    assert importance.var() < weighted.var()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_zero_terminal_snr(prediction):
    """At the last step the latent is pure noise: everything stays finite, and v's target is -z."""
    made = Objective.of(make_scheduler({**ZERO_SNR, "prediction_type": prediction}), 5.0, 0.1)
    z, eps = draw()
    t = torch.full((6,), 999.0)
    assert float(made.alphas_cumprod[-1]) == 0
    assert torch.equal(made.add_noise(z, eps, t), eps)
    assert float(made.min_snr_weights[-1]) == pytest.approx(1 if prediction == "epsilon" else 0.1)
    assert bool(torch.isfinite(made.min_snr_weights).all())
    if prediction == "v_prediction":
        assert torch.equal(made.target(z, eps, t), -z)


def test_where_sampling_starts_is_trained():
    """Min-SNR's weight at zero terminal SNR is 0 with v-prediction: without a floor the last timestep would never be drawn."""
    config = {**ZERO_SNR, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match="timesteps 999 to 999 without any weight.*DDIMScheduler.*min_snr_floor above 0"):
        Objective.of(make_scheduler(config), 5.0)
    made = Objective.of(make_scheduler(config), 5.0, 0.1)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([made.draw_time(generator) for _ in range(20000)])
    last = made.min_snr_weights[950:].sum() / made.min_snr_weights.sum()
    assert float(last) > 0.01
    assert float((drawn >= 950).float().mean()) == pytest.approx(float(last), rel=0.2)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_loss_is_the_mean_square_scaled(prediction):
    z, eps = draw()
    gamma = None if prediction == "flow_prediction" else 5.0
    made, t = objective(prediction, gamma), torch.arange(6.0) * 150
    output = torch.zeros_like(z, dtype=torch.bfloat16)
    scale = 1 if gamma is None else made.min_snr_weights.mean()
    expected = scale * made.target(z, eps, t).square().mean((1, 2, 3))
    assert made.loss(output, z, eps, t).dtype == torch.float32
    torch.testing.assert_close(made.loss(output, z, eps, t), expected)


def test_drawn_times():
    generator = torch.Generator().manual_seed(0)
    steps = torch.stack([objective("epsilon").draw_time(generator) for _ in range(300)])
    assert torch.equal(steps, steps.round()) and 0 <= float(steps.min()) < 50 and 950 < float(steps.max()) <= 999
    short = objective("epsilon", num_train_timesteps=2)
    assert {float(short.draw_time(generator)) for _ in range(30)} == {0.0, 1.0}
    flow = objective("flow_prediction")
    times = torch.stack([flow.draw_time(generator) for _ in range(300)])
    assert 0 <= float(times.min()) < 50 and 950 < float(times.max()) <= 1000


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler", "prediction_type": "sample"}, "got 'sample', wanted one of epsilon"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "need each other.*prediction_type: epsilon"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": "flow_prediction"},
            "need each other.*use_flow_sigmas: false",
        ),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "use DPMSolverMultistepScheduler with use_flow_sigmas: true"),
        ({**SCHEDULES["flow_prediction"], "num_train_timesteps": 100}, "num_train_timesteps: got 100, wanted 1000"),
    ],
)
def test_unusable_schedulers(config, message):
    with pytest.raises(ValueError, match=message):
        Objective.of(make_scheduler(config))


def test_min_snr_of_a_flow():
    """Of a pretrained model the scheduler is known only here, so the options cannot refuse it."""
    with pytest.raises(ValueError, match="min_snr_gamma=5.0 has no meaning for a flow, which DPMSolverMultistepScheduler states"):
        objective("flow_prediction", 5.0)
