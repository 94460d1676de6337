"""The denoising objective that a model folder's diffusers scheduler states: noise schedule, target and weight.

    epsilon          target eps               z_t = sqrt(a_t) z + sqrt(1 - a_t) eps   (DDPM, arXiv 2006.11239, eq. 4 and 14)
    v_prediction     target sqrt(a_t) eps - sqrt(1 - a_t) z                           (arXiv 2202.00512, appendix D)
    flow_prediction  target eps - z           z_t = (1 - s) z + s eps, t = 1000 s     (arXiv 2209.03003, eq. 1)

`a_t` is the scheduler's `alphas_cumprod`, whatever schedule it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import SchedulerMixin
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")


@dataclass(frozen=True)
class Objective:
    """prediction: one of `PREDICTIONS`.  alphas_cumprod: [T] (unused by flows).  flow_shift: of the flow's sigmas.

    min_snr_gamma: of the loss weight min(SNR, gamma) / SNR (epsilon) or / (SNR + 1) (v). Source: arXiv 2303.09556, eq. 7.
    """

    prediction: str
    alphas_cumprod: Tensor
    flow_shift: float = 1.0
    min_snr_gamma: float | None = None

    @classmethod
    def of(cls, scheduler: SchedulerMixin, min_snr_gamma: float | None = None) -> Objective:
        """The objective of a scheduler's config. Raises ValueError for a prediction type that is not supported."""
        config = scheduler.config
        flow = type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
        prediction = "flow_prediction" if flow else config.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise ValueError(f"scheduler's prediction_type: got '{prediction}', wanted one of {', '.join(PREDICTIONS)}")
        if flow and config.get("prediction_type", prediction) != "flow_prediction":
            raise ValueError("a scheduler with use_flow_sigmas needs prediction_type: flow_prediction")
        alphas = torch.empty(0) if flow else scheduler.alphas_cumprod.float()
        return cls(prediction, alphas, float(config.get("flow_shift") or config.get("shift") or 1.0), min_snr_gamma)

    @property
    def is_flow(self) -> bool:
        return self.prediction == "flow_prediction"

    def draw_time(self, generator: torch.Generator) -> Tensor:
        """One timestep []: an integer in [0, T) as float, or 1000 s of a shifted uniform s for flows."""
        if not self.is_flow:
            return torch.randint(len(self.alphas_cumprod), (), generator=generator).float()
        s = torch.rand((), generator=generator)
        return 1000 * self.flow_shift * s / (1 + (self.flow_shift - 1) * s)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise) factors of z_t, each [B, 1, 1, 1]."""
        if self.is_flow:
            noise = t.float()[:, None, None, None] / 1000
            return 1 - noise, noise
        a = self.alphas_cumprod.to(t.device)[t.long()][:, None, None, None]
        return a.sqrt(), (1 - a).sqrt()

    def add_noise(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """z_t [B, C, h, w] of latents z, noise eps and timesteps t [B]."""
        signal, noise = self._levels(t)
        return signal * z + noise * eps

    def target(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """[B, C, h, w], what the network's output is compared with."""
        if self.prediction == "epsilon":
            return eps
        if self.is_flow:
            return eps - z
        signal, noise = self._levels(t)
        return signal * eps - noise * z

    def weight(self, t: Tensor) -> Tensor:
        """[B] loss weights: ones, or min-SNR."""
        if self.min_snr_gamma is None or self.is_flow:
            return torch.ones_like(t, dtype=torch.float32)
        a = self.alphas_cumprod.to(t.device)[t.long()]
        snr = a / (1 - a).clamp_min(1e-8)
        # With zero terminal SNR the last step's epsilon weight is 0 / 0 -> 1: its target is all that is left to learn.
        capped = snr.clamp(max=self.min_snr_gamma)
        return capped / (snr + 1) if self.prediction == "v_prediction" else (capped / snr.clamp_min(1e-8)).clamp(max=1)

    def loss(self, output: Tensor, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """[B] weighted squared error of the network's output, a mean over channels and cells."""
        error = (output.float() - self.target(z, eps, t).float()).square().mean((1, 2, 3))
        return self.weight(t) * error
