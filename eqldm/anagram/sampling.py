"""The sampling loop, over any denoiser and any diffusers scheduler, and `Sampler`, a model folder ready to sample."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline
from torch import Tensor

from eqldm.anagram.blending import blend_pictures, blended_in_pixels
from eqldm.anagram.denoiser import Denoiser, Guidance, alternating_views, mean_of_views, rectified_mean
from eqldm.anagram.factorized import sum_of_parts
from eqldm.anagram.options import Options
from eqldm.anagram.solvers import BLENDING, begin, is_flow, objective_of, solver_for
from eqldm.autoencoder.equivariance import negation_error
from eqldm.diffusion.conditioning import encode_prompts, too_long
from eqldm.diffusion.objective import Objective
from eqldm.model_folder import Networks, Pixels, check_model_folder, decode, downsampling, encode, load_autoencoder, one_model
from eqldm.precision import native_precision, norms_in_bfloat16
from eqldm.processes import checked_device
from eqldm.views import D4, IDENTITY, View
from eqldm.views.components import Component, check_components

BROKEN = "the weights are broken (take another checkpoint), or values too large for the precision (--precision 32-true)"
Prompt = str | Sequence[str]
"""One prompt for all samples, or one for each."""


@torch.no_grad()
def sample(
    denoise: Denoiser, scheduler: SchedulerMixin, z: Tensor, generators: list[torch.Generator], first: int = 0,
    again: Callable[[int], int] = lambda k: 1, shown: Callable[[Tensor], Tensor] = lambda noise: noise,
) -> Tensor:  # fmt: skip
    """Latents z_0 [B, C, h, w] from z [B, C, h, w], unit-variance noise, or latents noised as the step number `first` wants them; the
    scheduler's timesteps must be set.

    generators: one a sample, which any noise of the scheduler's steps is drawn from.  again: how often step k is done, of a scheduler
    that calls the denoiser once a step (see `Options.time_travel`).  shown: makes of each sample's noise that of all its latents, where z
    holds more than one of a sample.  Raises ValueError, which names the step, where latents become NaN or infinite.
    """
    takes = inspect.signature(scheduler.step).parameters
    extra = {"generator": generators} if "generator" in takes else {}
    if not first:
        z = z * getattr(scheduler, "init_noise_sigma", 1.0)
    steps, sound = begin(scheduler, first), torch.ones(len(z), dtype=torch.bool, device=z.device)
    lasted = torch.zeros(len(z), dtype=torch.long, device=z.device)  # of each sample, the steps after which all was finite
    for k, t in enumerate(steps):
        for left in reversed(range(again(first + k) if k + 1 < len(steps) else 1)):
            scaled = scheduler.scale_model_input(z, t) if hasattr(scheduler, "scale_model_input") else z
            z = scheduler.step(denoise(scaled, t), t, z, **extra).prev_sample
            if left:
                kept = scheduler.alphas_cumprod[t.long().cpu()] / scheduler.alphas_cumprod[steps[k + 1].long().cpu()]
                z = kept.sqrt().to(z) * z + (1 - kept).sqrt().to(z) * shown(draw_noise(z.shape[1:], generators).to(z))
        sound = sound & z.isfinite().flatten(1).all(1)
        lasted += sound  # looked at in the end: a GPU is not waited for at each step
    if (k := int(lasted.min())) < len(steps):
        raise ValueError(
            f"sampling: after step {first + k + 1} (timestep {float(steps[k]):g}) the latents of {int((lasted <= k).sum())} of {len(z)} "
            f"are NaN or infinite: {BROKEN}"
        )
    return z


def draw_noise(shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """[B, ...] unit-variance noise, each sample's from its own generator, on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


@dataclass
class Sampler:
    """A model folder ready to sample: `sampler(prompts, views, seeds)` gives pictures."""

    networks: Networks
    vae: AutoencoderKL | Pixels
    device: torch.device
    precision: str = "32-true"
    """`32-true`, or `bf16-mixed`: bfloat16 where it does no harm (autocast)."""

    def __post_init__(self) -> None:
        norms_in_bfloat16(self.networks.unet)
        norms_in_bfloat16(self.vae)

    @classmethod
    def open(cls, folder: str | Path, device: str | torch.device | None = None, precision: str = "32-true") -> Sampler:
        """precision: as the field, or `auto`: bfloat16 where the device computes it natively.

        Raises FileNotFoundError where the folder is no whole model folder, ValueError for a device that is not there."""
        check_model_folder(folder)
        device = checked_device(str(device or ("cuda" if torch.cuda.is_available() else "cpu")))
        precision = native_precision(device.type) if precision == "auto" else precision
        with one_model(folder):
            networks = Networks.open(folder)
            vae = load_autoencoder(folder)
        networks.unet.to(device)
        networks.text_encoder.to(device)
        check_unet(networks, vae, folder)
        return cls(networks, vae.to(device), device, precision)

    def save_memory(self, attention_slicing: bool = False, tiled: bool = False, offload: bool = False) -> None:
        """Less memory for more time, by diffusers' own switches: attention head by head; large pictures decoded in overlapping tiles, one
        after the other; networks on the GPU only while they compute. Raises ValueError where a switch does not fit."""
        if attention_slicing:
            self.networks.unet.set_attention_slice("auto")
        if tiled:
            if isinstance(self.vae, Pixels):
                raise ValueError("tiled decoding: this is a pixel model, which decodes nothing")
            self.vae.enable_tiling()
            self.vae.enable_slicing()
        if offload:
            if self.device.type != "cuda":
                raise ValueError(f"offloading moves networks from a GPU to the CPU and back, but the device is {self.device}")
            parts = {**vars(self.networks), "vae": self.vae, "safety_checker": None, "feature_extractor": None}
            StableDiffusionPipeline(**parts, requires_safety_checker=False).enable_model_cpu_offload(device=self.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The context that networks compute in, of the precision. Raises ValueError where the memory does not suffice."""
        try:
            with torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16-mixed" else nullcontext():
                yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            raise ValueError(
                f"out of memory on {self.device}: sample fewer pictures together (--batch-size), smaller ones, or with "
                "--attention-slicing, --tiled or --offload"
            ) from error

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
                f"one prompt for each view: got {len(prompts)} prompts and {len(views)} views ({', '.join(view.name for view in views)}); "
                "the upright one is a view too, identity"
            )
        side, factor = self.side(image_size), downsampling(self.vae)
        for view in views:
            view.check(side, side, f" ({side * factor} px at f = {factor})")
        self.check_length(_flatten(prompts))
        return side

    def check_negation(self, views: Sequence[View]) -> None:
        """Raises ValueError where a view negates and the autoencoder's latents do not know it."""
        if not any(view.sign < 0 for view in views) or isinstance(self.vae, Pixels):
            return
        if (error := negation_error(self.vae, device=self.device)) > 0.2:
            raise ValueError(
                f"view 'negate': this autoencoder was not trained with negation (D(-z) is {error:.2f} away from -D(z), trained ones .08): "
                "train it with equivariance.negate_prob, or sample all the same with --force"
            )

    def check_length(self, prompts: Sequence[str]) -> None:
        """Raises ValueError where a prompt is longer than the model takes, or holds what is no text."""
        for prompt in prompts:
            if any("\ud800" <= letter <= "\udfff" for letter in prompt):
                raise ValueError(f"prompt {prompt!a} holds bytes that are not UTF-8 (a shell of another encoding?): type it anew")
        for cut in too_long(self.networks.tokenizer, list(prompts)):
            limit = self.networks.tokenizer.model_max_length
            raise ValueError(f"prompt {cut!r} is longer than the model's {limit} tokens: shorten it")

    def __call__(
        self, prompts: Sequence[Prompt], views: Sequence[View], seeds: Sequence[int], on_step: Callable[[], None] | None = None,
        watch: Callable[[Tensor], None] | None = None, **options,
    ) -> Tensor:  # fmt: skip
        """Pictures [B, 3, H, W] in [-1, 1], on the CPU, one for each seed, that read as prompt i in view i.

        options: of `Options`.  Otherwise as `latents`."""
        o = Options(**options)
        z = self.latents(prompts, views, seeds, on_step, watch, **options)
        if o.blend == "pixels":
            return blend_pictures(self.decode(z, o.symmetrise), views)
        return self.decode(z, o.symmetrise, o.decoded_under(views))

    @torch.no_grad()
    def latents(
        self, prompts: Sequence[Prompt], views: Sequence[View], seeds: Sequence[int], on_step: Callable[[], None] | None = None,
        watch: Callable[[Tensor], None] | None = None, **options,
    ) -> Tensor:  # fmt: skip
        """Latents [B, C, h, w] of the pictures; with blend="pixels" those of all views, [N B, C, h, w], view by view.

        prompts: one for each view; a list in place of a prompt gives each seed its own.  on_step: called after each call of the UNet.
        watch: called with each step's estimate of the latents.  options: of `Options`.
        Each seed has its own generator, so its picture does not depend on the batch. Raises ValueError (see `check`), also for options
        that do not fit each other or the model.
        """
        o = Options(**options)
        prompts = [styled(prompt, o.style) for prompt in prompts]
        side = self.check(prompts, views, o.image_size)
        o.check(len(views))

        def denoiser(guided: Guidance, solver: SchedulerMixin) -> Denoiser:
            if o.blend == "pixels":
                return blended_in_pixels(guided, views, self.vae, Objective.of(solver))
            if o.reduction == "alternate":
                return alternating_views(guided, views, solver.timesteps)
            if o.reduction == "rectified":
                return rectified_mean(guided, views, objective_of(self.networks.scheduler), o.weights)
            return mean_of_views(guided, views, o.weights)

        def shown(noise: Tensor) -> Tensor:
            return torch.cat([view(noise) for view in views]) if o.blend == "pixels" else noise

        return self._run(prompts, seeds, side, o, denoiser, shown, on_step, watch)

    @torch.no_grad()
    def compose(
        self, prompts: Sequence[Prompt], components: Sequence[Component], seeds: Sequence[int], held: Mapping[int, Tensor] | None = None,
        on_step: Callable[[], None] | None = None, watch: Callable[[Tensor], None] | None = None, **options,
    ) -> Tensor:  # fmt: skip
        """Pictures [B, 3, H, W] in [-1, 1], on the CPU, whose component i reads as its prompt.

        prompts: of the components that are not held, in order.  held: by number, pictures [1, 3, H, W] in [-1, 1] whose part is kept.
        options: of `Options`; with blend="pixels" pictures are taken apart in place of latents. Otherwise as `latents`.
        """
        o, held = Options(**options), dict(held or {})
        prompts = [styled(prompt, o.style) for prompt in prompts]
        side = self.check_parts(prompts, components, held, o)
        references = {i: x.to(self.device) for i, x in held.items()}
        if o.blend == "latents":
            references = {i: encode(self.vae, x) for i, x in references.items()}

        def denoiser(guided: Guidance, solver: SchedulerMixin) -> Denoiser:
            return sum_of_parts(
                guided, components, objective_of(self.networks.scheduler), references, self.vae if o.blend == "pixels" else None
            )

        return self.decode(self._run(prompts, seeds, side, o, denoiser, lambda noise: noise, on_step, watch), o.symmetrise)

    def check_parts(self, prompts: Sequence[Prompt], components: Sequence[Component], held: Mapping[int, Tensor], o: Options) -> int:
        """The latent side that `compose` samples at. Raises ValueError where these do not fit each other or the model."""
        pixels = isinstance(self.vae, Pixels)
        free = len(components) - len(held)
        if len(prompts) != free or not free:
            names = ", ".join(component.name for i, component in enumerate(components) if i not in held)
            raise ValueError(f"one prompt for each component that is not held ({names}): got {len(prompts)}")
        check_components(components, in_latents=not pixels and o.blend == "latents")
        if o.reduction != "mean" or o.upscale != 1:
            raise ValueError("components are summed: reduction and upscale mean nothing with them")
        if o.decoding is not None:
            raise ValueError(f"decoding={o.decoding} is for views: it means nothing with components")
        o.check(free)
        side = self.side(o.image_size)
        self.check_length(_flatten(prompts))
        size = side * downsampling(self.vae)
        for x in held.values():
            if tuple(x.shape) != (1, 3, size, size):
                raise ValueError(f"a reference of shape {tuple(x.shape)}: wanted (1, 3, {size}, {size})")
        solver = self.solver(o)
        if held and type(solver).__name__ not in (*BLENDING, "DDPMScheduler"):
            use = "dpm++ or unipc" if is_flow(self.networks.scheduler) else "ddim, ddpm, dpm++ or unipc"
            raise ValueError(f"a part cannot be held with {type(solver).__name__}: use {use}")
        return side

    def _run(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], side: int, o: Options,
        denoiser: Callable[[Guidance, SchedulerMixin], Denoiser], shown: Callable[[Tensor], Tensor], on_step: Callable[[], None] | None,
        watch: Callable[[Tensor], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Latents of checked prompts and options. denoiser: of the guided UNet and the solver.  shown: see `sample`."""
        solver = self.solver(o)
        with self.computing():
            embeds = torch.stack([self._embed(prompt, len(seeds)) for prompt in prompts])
            negatives = torch.cat([self._embed(text, 1) for text in _listed(o.negative_prompt)]).expand(len(prompts), -1, -1)
            guided = Guidance(self.networks.unet, embeds, negatives, o.guidance_scale, o.guidance_rescale)
            solver.set_timesteps(o.num_inference_steps, device=self.device)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            z = shown(draw_noise((self.networks.unet.config.in_channels, side, side), generators).to(self.device))
            denoise = denoiser(guided, solver)
            denoise = denoise if on_step is None else _counting(denoise, on_step)
            denoise = denoise if watch is None else _watched(denoise, watch, objective_of(self.networks.scheduler))
            z = sample(denoise, solver, z, generators, again=o.times, shown=shown)
            return z if o.upscale == 1 else self._refined(denoise, solver, z, generators, o)

    def _refined(self, denoise: Denoiser, solver: SchedulerMixin, z: Tensor, generators: list[torch.Generator], o: Options) -> Tensor:
        """Latents [B, C, u h, u w] of a second, larger pass from those of the first."""
        z = torch.nn.functional.interpolate(z.float(), scale_factor=o.upscale, mode="bicubic")
        solver.set_timesteps(o.num_inference_steps, device=self.device)
        first, noise = o.second_begins, draw_noise(z.shape[1:], generators).to(z)
        t = begin(solver, first)[0].expand(len(z))
        z = solver.add_noise(z, noise, t) if hasattr(solver, "add_noise") else solver.scale_noise(z, t, noise)
        return sample(denoise, solver, z, generators, first, o.times)

    @torch.no_grad()
    def decode(self, z: Tensor, symmetrise: bool = False, views: Sequence[View] = (IDENTITY,)) -> Tensor:
        """Pictures [B, 3, H, W], clamped to [-1, 1], on the CPU: the mean over views V of V^-1 D(V z). symmetrise: see `Options`.

        Raises ValueError where the VAE gives NaN or infinite values."""
        under = dict.fromkeys(element @ view for view in views for element in (D4 if symmetrise else (IDENTITY,)))
        with self.computing():
            x = torch.as_tensor(sum(view.inverse(decode(self.vae, view(z)).float()) for view in under)).div(len(under)).cpu()
        if bad := int((~x.isfinite().flatten(1).all(1)).sum()):
            raise ValueError(f"decoding: of {len(x)} pictures the VAE makes {bad} with NaN or infinite values: {BROKEN}")
        return x.clamp(-1, 1)

    def solver(self, o: Options) -> SchedulerMixin:
        """The scheduler to sample with. Raises ValueError where the options do not fit each other or the model."""
        has_latents = not isinstance(self.vae, Pixels)
        if o.symmetrise and not has_latents:
            raise ValueError("symmetrise: this is a pixel model, which decodes nothing")
        self.check_length(_listed(o.negative_prompt))
        return solver_for(self.networks.scheduler, o, has_latents)

    def num_calls(self, o: Options) -> int:
        """How often the UNet is called for a batch: some schedulers call it twice a step."""
        solver = self.solver(o)
        if solver.order == 1 and len(solver.timesteps) == o.num_inference_steps:
            return o.num_calls
        return len(solver.timesteps) + (len(begin(solver, o.second_begins)) if o.upscale > 1 else 0)

    def _embed(self, prompt: Prompt, count: int) -> Tensor:
        """[count, L, D] of one prompt, or of `count` prompts."""
        texts = _listed(prompt)
        if len(texts) not in (1, count):
            raise ValueError(f"a list of prompts needs one for each seed: got {len(texts)} prompts for {count} seeds")
        embeds = encode_prompts(self.networks.tokenizer, self.networks.text_encoder, texts)
        return embeds.expand(count, -1, -1)


def check_unet(networks: Networks, vae: AutoencoderKL | Pixels, folder: str | Path) -> None:
    """Raises ValueError where the UNet of a folder does not sample latents of its VAE under its prompts."""
    config, channels = networks.unet.config, vae.config.latent_channels
    if {config.in_channels, config.out_channels} != {channels} or config.get("addition_embed_type") == "text_time":
        what = f"one of {config.in_channels} channels" + " (for inpainting?)" * (config.in_channels > channels)
        what = what if config.out_channels == config.in_channels else f"{what} that gives {config.out_channels}"
        what = "SDXL's" if config.get("addition_embed_type") else what
        raise ValueError(f"'{folder}': its UNet is {what}: wanted one of Stable Diffusion 1.x or 2.x, of the VAE's own channels")
    sides = [config.sample_size] * 2 if isinstance(config.sample_size, int) else config.sample_size
    if not isinstance(sides, list | tuple) or len(set(sides)) != 1 or type(sides[0]) is not int or sides[0] < 1:
        raise ValueError(f"'{folder}': sample_size in unet/config.json is {config.sample_size!r}, wanted the side of the latents in cells")
    width = networks.text_encoder.config.hidden_size
    if isinstance(config.cross_attention_dim, int) and config.cross_attention_dim != width:
        raise ValueError(
            f"'{folder}': its UNet reads prompts of width {config.cross_attention_dim}, its text encoder gives {width}: they are of two "
            "models"
        )


def _counting(denoise: Denoiser, on_step: Callable[[], None]) -> Denoiser:
    def counted(z: Tensor, t: Tensor) -> Tensor:
        output = denoise(z, t)
        on_step()
        return output

    return counted


def _watched(denoise: Denoiser, watch: Callable[[Tensor], None], objective: Objective) -> Denoiser:
    def watched(z: Tensor, t: Tensor) -> Tensor:
        output = denoise(z, t)
        watch(objective.clean(output.float(), z.float(), t.expand(len(z))))
        return output

    return watched


@overload
def styled(prompt: str, style: str) -> str: ...


@overload
def styled(prompt: Prompt, style: str) -> Prompt: ...


def styled(prompt: Prompt, style: str) -> Prompt:
    """A prompt, or each of several, after a style."""
    return f"{style} {prompt}".strip() if isinstance(prompt, str) else [f"{style} {text}".strip() for text in prompt]


def _listed(prompt: Prompt) -> list[str]:
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _flatten(prompts: Sequence[Prompt]) -> list[str]:
    return [text for prompt in prompts for text in _listed(prompt)]
