"""The denoising objective that a model folder's diffusers scheduler states: noise schedule, target and weight.

    epsilon          target eps               z_t = sqrt(a_t) z + sqrt(1 - a_t) eps   (DDPM, arXiv 2006.11239, eq. 4 and 14)
    v_prediction     target sqrt(a_t) eps - sqrt(1 - a_t) z                           (arXiv 2202.00512, appendix D)
    flow_prediction  target eps - z           z_t = (1 - s) z + s eps, t = 1000 s     (arXiv 2209.03003, eq. 1)

`a_t` is the scheduler's `alphas_cumprod`, whatever schedule it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from diffusers import SchedulerMixin
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")


@dataclass(frozen=True)
class Objective:
    """prediction: one of `PREDICTIONS`.  alphas_cumprod: [T] (unused by flows).  flow_shift: of the flow's sigmas.

    min_snr_gamma: of the min-SNR weights min(SNR, gamma) / SNR (epsilon) or / (SNR + 1) (v), in proportion to which timesteps
    are drawn; each then counts alike. In expectation that is the weighted loss of uniform timesteps. With v-prediction on Stable
    Diffusion's schedule the mean squared weight is 1.9 times the squared mean weight: so much is drawn in vain otherwise.
    Source: arXiv 2303.09556, eq. 7.
    min_snr_floor: the smallest weight. The paper has none; but with v-prediction and zero terminal SNR (arXiv 2305.08891) its weight
    of the last timestep is 0, and sampling starts there.
    """

    prediction: str
    alphas_cumprod: Tensor
    flow_shift: float = 1.0
    min_snr_gamma: float | None = None
    min_snr_floor: float = 0.0

    @classmethod
    def of(cls, scheduler: SchedulerMixin, min_snr_gamma: float | None = None, min_snr_floor: float = 0.0) -> Objective:
        """The objective of a scheduler's config. Raises ValueError for one that is not supported, or contradicts itself."""
        config, name = scheduler.config, type(scheduler).__name__
        if name.startswith("FlowMatch"):
            raise ValueError(
                f"Stable Diffusion's pipeline cannot sample with {name}: for a flow, use DPMSolverMultistepScheduler with "
                "use_flow_sigmas: true, prediction_type: flow_prediction"
            )
        flow, prediction = config.get("use_flow_sigmas", False), config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise ValueError(f"scheduler's prediction_type: got '{prediction}', wanted one of {', '.join(PREDICTIONS)}")
        if flow != (prediction == "flow_prediction"):
            raise ValueError(
                f"use_flow_sigmas: true and prediction_type: flow_prediction need each other: {name} states "
                f"use_flow_sigmas: {str(flow).lower()}, prediction_type: {prediction}"
            )
        if flow and config.num_train_timesteps != 1000:
            raise ValueError(f"a flow's num_train_timesteps: got {config.num_train_timesteps}, wanted 1000")
        if flow and min_snr_gamma is not None:
            raise ValueError(f"min_snr_gamma={min_snr_gamma} has no meaning for a flow, which {name} states: leave it unset")
        alphas = torch.empty(0) if flow else scheduler.alphas_cumprod.float()
        made = cls(prediction, alphas, float(config.get("flow_shift") or 1.0), min_snr_gamma, min_snr_floor)
        if min_snr_gamma is not None and not bool((made.min_snr_weights > 0).all()):
            never = (made.min_snr_weights == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"min_snr_floor={min_snr_floor} leaves timesteps {never[0]} to {never[-1]} without any weight: they would never be "
                f"trained, and {name}'s last is where sampling starts. Set min_snr_floor above 0 (0.1), or min_snr_gamma=null"
            )
        return made

    @property
    def is_flow(self) -> bool:
        return self.prediction == "flow_prediction"

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """One timestep []: an integer in [0, T) as float, or 1000 s of a shifted uniform s for flows."""
        if not self.is_flow and self.min_snr_gamma is None:
            return torch.randint(len(self.alphas_cumprod), (), generator=generator).float()
        if not self.is_flow:
            total = self._min_snr_sums
            return torch.searchsorted(total, torch.rand((), generator=generator) * total[-1], right=True).float()
        s = torch.rand((), generator=generator)
        return 1000 * self.flow_shift * s / (1 + (self.flow_shift - 1) * s)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise) factors of z_t, each [B, 1, 1, 1]."""
        if self.is_flow:
            noise = t.float()[:, None, None, None] / 1000
            return 1 - noise, noise
        a = self._alphas_on(t.device)[t.long()][:, None, None, None]
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t [B, C, h, w] of latents z, noise eps and timesteps t [B]."""
        signal, noise = self.levels(t)
        return signal * z + noise * eps

    def target(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """[B, C, h, w], what the network's output is compared with."""
        if self.prediction == "epsilon":
            return eps
        if self.is_flow:
            return eps - z
        signal, noise = self.levels(t)
        return signal * eps - noise * z

    def clean(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of z [B, C, h, w] that an output at z_t and timesteps t [B] states: the inverse of `output_of`."""
        signal, noise = self.levels(t)
        if self.prediction == "epsilon":
            return (z_t - noise * output) / signal
        return z_t - noise * output if self.is_flow else signal * z_t - noise * output

    def output_of(self, clean: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The output [B, C, h, w] that states this estimate of z. Needs noise in z_t (of a flow: t above 0)."""
        signal, noise = self.levels(t)
        if self.prediction == "epsilon":
            return (z_t - signal * clean) / noise
        return (z_t - clean) / noise if self.is_flow else (signal * z_t - clean) / noise

    def noise(self, output: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The estimate of eps [B, C, h, w] that an output at z_t and timesteps t [B] states: the inverse of `output_of_noise`."""
        signal, noise = self.levels(t)
        if self.prediction == "epsilon":
            return output
        return z_t + signal * output if self.is_flow else signal * output + noise * z_t

    def output_of_noise(self, eps: Tensor, z_t: Tensor, t: Tensor) -> Tensor:
        """The output [B, C, h, w] that states this estimate of eps. Needs signal in z_t (of a flow: t below 1000)."""
        signal, noise = self.levels(t)
        if self.prediction == "epsilon":
            return eps
        return (eps - z_t) / signal if self.is_flow else (eps - noise * z_t) / signal

    def _alphas_on(self, device: torch.device) -> Tensor:
        """alphas_cumprod there, copied once: a copy from the CPU waits for a GPU."""
        if device not in self._copies:
            self._copies[device] = self.alphas_cumprod.to(device)
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, Tensor]:
        return {}

    @cached_property
    def min_snr_weights(self) -> Tensor:
        """[T] min-SNR weight of each timestep."""
        gamma = self.min_snr_gamma
        assert gamma is not None
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod).clamp_min(1e-8)
        if self.prediction == "v_prediction":
            weights = snr.clamp(max=gamma) / (snr + 1)
        else:  # min(1, gamma / SNR), the same, is 1 at zero terminal SNR too, where min(SNR, gamma) / SNR would be 0 / 0
            weights = (gamma / snr).clamp(max=1)
        return weights.clamp(min=self.min_snr_floor)

    @cached_property
    def _min_snr_sums(self) -> Tensor:
        return self.min_snr_weights.double().cumsum(0)

    def loss(self, output: Tensor, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """[B] squared error of the network's output, a mean over channels and cells, for timesteps that `draw_time` gave.

        With min-SNR it is scaled by the mean weight, so that its expectation is that of the weighted loss.
        """
        error = (output.float() - self.target(z, eps, t).float()).square().mean((1, 2, 3))
        return error if self.min_snr_gamma is None else self.min_snr_weights.mean() * error
