"""The sampling loop, over any denoiser and any diffusers scheduler, and `Sampler`, a model folder ready to sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from torch import Tensor

from eqldm.anagram.blending import blend_pictures, blended_in_pixels
from eqldm.anagram.denoiser import Denoiser, Guidance, alternating_views, mean_of_views
from eqldm.diffusion.conditioning import encode_prompts, too_long
from eqldm.diffusion.objective import Objective
from eqldm.model_folder import Networks, Pixels, check_model_folder, decode, downsampling, load_autoencoder, make_scheduler
from eqldm.views import View

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}
REDUCTIONS = ("mean", "alternate")
BLENDS = ("latents", "pixels")
BLENDING = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")  # deterministic, at the levels of training
Prompt = str | Sequence[str]
"""One prompt for all samples, or one for each."""


@torch.no_grad()
def sample(denoise: Denoiser, scheduler: SchedulerMixin, z: Tensor, generators: list[torch.Generator]) -> Tensor:
    """Latents z_0 [B, C, h, w] from unit-variance noise z [B, C, h, w]; the scheduler's timesteps must be set.

    generators: one a sample, which any noise of the scheduler's steps is drawn from.
    """
    takes = inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if "generator" in takes else {}
    z = z * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = denoise(scheduler.scale_model_input(z, t), t)
        z = scheduler.step(output, t, z, **extra).prev_sample
    return z


@dataclass
class Sampler:
    """A model folder ready to sample: `sampler(prompts, views, seeds)` gives pictures."""

    networks: Networks
    vae: AutoencoderKL | Pixels
    device: torch.device

    @classmethod
    def open(cls, folder: str | Path, device: str | torch.device | None = None) -> Sampler:
        """Raises FileNotFoundError where the folder is no whole model folder."""
        check_model_folder(folder)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        networks = Networks.open(folder)
        networks.unet.to(device)
        networks.text_encoder.to(device)
        return cls(networks, load_autoencoder(folder).to(device), device)

    @property
    def latent_side(self) -> int:
        """The latent side the UNet was trained at."""
        side = self.networks.unet.config.sample_size
        return side if isinstance(side, int) else side[0]

    def side(self, image_size: int | None = None) -> int:
        """The latent side of pictures of a size; None: the size that the UNet was trained at. Raises ValueError for one that is no multiple
        of f."""
        factor = downsampling(self.vae)
        if image_size is not None and (image_size < factor or image_size % factor):
            raise ValueError(f"image size {image_size}: wanted a multiple of f = {factor}")
        return self.latent_side if image_size is None else image_size // factor

    def check(self, prompts: Sequence[Prompt], views: Sequence[View], image_size: int | None = None) -> int:
        """The latent side to sample at. Raises ValueError where prompts, views and size do not fit each other."""
        if len(prompts) != len(views) or not views:
            raise ValueError(
                f"one prompt for each view: got {len(prompts)} prompts and {len(views)} views ({', '.join(view.name for view in views)})"
            )
        side, factor = self.side(image_size), downsampling(self.vae)
        for view in views:
            view.check(side, side, f" ({side * factor} px at f = {factor})")
        self.check_length(_flatten(prompts))
        return side

    def check_length(self, prompts: Sequence[str]) -> None:
        """Raises ValueError where a prompt is longer than the model takes."""
        for cut in too_long(self.networks.tokenizer, prompts):
            limit = self.networks.tokenizer.model_max_length
            raise ValueError(f"prompt {cut!r} is longer than the model's {limit} tokens: shorten it")

    def __call__(self, prompts: Sequence[Prompt], views: Sequence[View], seeds: Sequence[int], **options) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], on the CPU, one for each seed, that read as prompt i in view i; see `latents`."""
        pictures = self.decode(self.latents(prompts, views, seeds, **options))
        return blend_pictures(pictures, views) if options.get("blend") == "pixels" else pictures

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[Prompt],
        views: Sequence[View],
        seeds: Sequence[int],
        *,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        negative_prompt: str = "",
        reduction: str = "mean",
        blend: str = "latents",
        scheduler: str | None = None,
        image_size: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Latents [B, C, h, w] of the pictures; with blend="pixels" those of all views, [N B, C, h, w], view by view.

        prompts: one for each view; a list in place of a prompt gives each seed its own.
        blend: where the views meet, in the latents or (for latents that do not turn) in decoded pictures; see `blending`.
        scheduler: a name of `SCHEDULERS`; None is the model folder's own. Each seed has its own generator, so its picture
        does not depend on the batch. Raises ValueError (see `check`), also for an unknown scheduler, reduction or blend.
        """
        side = self.check(prompts, views, image_size)
        self.check_length([negative_prompt])
        solver = self.solver(scheduler, reduction, blend)
        embeds = torch.stack([self._embed(prompt, len(seeds)) for prompt in prompts])
        guided = Guidance(self.networks.unet, embeds, self._embed(negative_prompt, 1)[0], guidance_scale)
        solver.set_timesteps(num_inference_steps, device=self.device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        shape = (self.networks.unet.config.in_channels, side, side)
        z = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
        if blend == "pixels":
            denoise = blended_in_pixels(guided, views, self.vae, Objective.of(solver))
            z = torch.cat([view(z) for view in views])
        elif reduction == "mean":
            denoise = mean_of_views(guided, views)
        else:
            denoise = alternating_views(guided, views, solver.timesteps)
        return sample(denoise if on_step is None else _counting(denoise, on_step), solver, z, generators)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], clamped to [-1, 1], on the CPU."""
        return decode(self.vae, z).float().clamp(-1, 1).cpu()

    def solver(self, scheduler: str | None = None, reduction: str = "mean", blend: str = "latents") -> SchedulerMixin:
        """The scheduler to sample with; its timesteps are not set. Raises ValueError where scheduler, reduction and blend (see `latents`)
        do not fit each other or the model."""
        own = self.networks.scheduler
        if scheduler is not None and scheduler not in SCHEDULERS:
            raise ValueError(f"unknown scheduler '{scheduler}': wanted one of {', '.join(SCHEDULERS)}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"unknown reduction '{reduction}': wanted one of {', '.join(REDUCTIONS)}")
        if blend not in BLENDS:
            raise ValueError(f"unknown blend '{blend}': wanted one of {', '.join(BLENDS)}")
        if own.config.get("use_flow_sigmas") and scheduler not in (None, "dpm++", "unipc"):
            raise ValueError(f"scheduler '{scheduler}' cannot sample a flow model: use dpm++ or unipc")
        name = type(own).__name__ if scheduler is None else SCHEDULERS[scheduler]
        solver = make_scheduler(dict(own.config), name)
        if blend == "pixels":
            if isinstance(self.vae, Pixels):
                raise ValueError("blend=pixels decodes latents at each step, but this is a pixel model: leave blend=latents")
            if reduction != "mean":
                raise ValueError(f"blend=pixels averages the views, got reduction={reduction}: use mean")
            sigmas = [key for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas") if solver.config.get(key)]
            if name not in BLENDING or sigmas or "sde" in str(solver.config.get("algorithm_type")):
                raise ValueError(f"blend=pixels cannot use {name}{' with ' + sigmas[0] if sigmas else ''}: use ddim, dpm++ or unipc")
        return solver

    def _embed(self, prompt: Prompt, count: int) -> Tensor:
        """[count, L, D] of one prompt, or of `count` prompts."""
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if len(texts) not in (1, count):
            raise ValueError(f"a list of prompts needs one for each seed: got {len(texts)} prompts for {count} seeds")
        embeds = encode_prompts(self.networks.tokenizer, self.networks.text_encoder, texts)
        return embeds.expand(count, -1, -1)


def _counting(denoise: Denoiser, on_step: Callable[[], None]) -> Denoiser:
    def counted(z: Tensor, t: Tensor) -> Tensor:
        output = denoise(z, t)
        on_step()
        return output

    return counted


def _flatten(prompts: Sequence[Prompt]) -> list[str]:
    return [text for prompt in prompts for text in ([prompt] if isinstance(prompt, str) else prompt)]
