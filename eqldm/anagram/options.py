"""How pictures are sampled: the options, and which of them fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eqldm.anagram.denoiser import shares_of
from eqldm.ranges import PICTURE_SIDE, SAMPLING
from eqldm.views import IDENTITY, View

DECODINGS = ("upright", "views")
REDUCTIONS = ("mean", "weighted", "rectified", "alternate")
BLENDS = ("latents", "pixels")


@dataclass(frozen=True)
class Options:
    """How pictures are sampled."""

    num_inference_steps: int = 30
    guidance_scale: float | Sequence[float] = 5.0
    """Of all prompts, or one for each; up to 1 it is unguided: the estimate under the prompt alone, as in diffusers."""
    guidance_rescale: float = 0.0
    """0 to 1, against too much contrast; see `Guidance`."""
    negative_prompt: str | Sequence[str] = ""
    """Of all prompts, or one for each."""
    style: str = ""
    """Goes before each prompt, such as "an oil painting of"."""
    reduction: str = "mean"
    """How the views become one estimate: mean; weighted, by `weights`; rectified, which keeps the noise's variance; alternate, a view a
    step in turn."""
    weights: Sequence[float] | None = None
    """Of the views, for the weighted and the rectified mean; None: alike."""
    blend: str = "latents"
    """Where the views meet, in the latents or (for latents that do not turn) in decoded pictures; see `blending`."""
    scheduler: str | None = None
    """A name of `solvers.SCHEDULERS`; None is the model folder's own."""
    time_travel: int = 1
    """How often each step of `travel_band` is done; before each again, the noise that it took is given back. Source: RePaint, arXiv
    2201.09865, section 4.2, whose code goes back ten steps at a time where this goes back one; for anagrams LookingGlass, arXiv
    2504.08902."""
    travel_band: tuple[float, float] = (0.2, 0.8)
    """From which to which share of the steps."""
    image_size: int | None = None
    """Pixels a side; None: what the UNet was trained at."""
    upscale: int = 1
    """How much larger a second pass makes the picture: its latents enlarged, noised and denoised again under all views."""
    upscale_strength: float = 0.5
    """The share of the steps that the second pass takes."""
    decoding: str | None = None
    """How latents become one picture: `upright`, as they lie, or `views`, the mean of what each view of them decodes to, turned back. A
    decoder joins strokes across the edges of cells as they lie, which tears them in a view that moves the cells apart: so None is `views`
    where one cuts the picture up, else `upright`."""
    symmetrise: bool = False
    """Decode as the mean over the square's eight symmetries: exactly equivariant, eight times the cost."""

    @property
    def num_calls(self) -> int:
        """How often the UNet is called by a scheduler that does so once a step; see `Sampler.num_calls`."""
        calls = [self.times(k) for k in range(self.num_inference_steps - 1)] + [1]
        return sum(calls) + (sum(calls[self.second_begins :]) if self.upscale > 1 else 0)

    @property
    def second_begins(self) -> int:
        """The step that the larger pass begins with: never the first, which takes pure noise."""
        return max(1, self.num_inference_steps - max(1, round(self.upscale_strength * self.num_inference_steps)))

    @property
    def guidance_scales(self) -> Sequence[float]:
        """Of all prompts, as a list."""
        return [self.guidance_scale] if isinstance(self.guidance_scale, int | float) else self.guidance_scale

    def decoded_under(self, views: Sequence[View]) -> Sequence[View]:
        """The views that an anagram's latents are decoded in."""
        in_all = self.decoding == "views" or (self.decoding is None and any(view.cells > 1 for view in views))
        return views if in_all else (IDENTITY,)

    def times(self, k: int) -> int:
        """How often step k is done."""
        share = k / self.num_inference_steps
        return self.time_travel if self.travel_band[0] <= share < self.travel_band[1] else 1

    def check(self, num_views: int) -> None:
        """Raises ValueError for values that cannot be."""
        for name, span in SAMPLING.items():
            given = getattr(self, name)
            values = given if isinstance(given, Sequence) else [] if given is None else [given]
            if not all(value in span for value in values):
                raise ValueError(f"{name}: got {given}, wanted {span}")
        wanted = {
            "reduction": (self.reduction in REDUCTIONS, f"one of {', '.join(REDUCTIONS)}"),
            "decoding": (self.decoding in (None, *DECODINGS), f"one of {', '.join(DECODINGS)}"),
            "blend": (self.blend in BLENDS, f"one of {', '.join(BLENDS)}"),
            "travel_band": (self.travel_band[0] < self.travel_band[1], "two rising shares from 0 to 1"),
        }
        for name, (fits, what) in wanted.items():
            if not fits:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted {what}")
        if self.weights is not None and self.reduction not in ("weighted", "rectified"):
            raise ValueError(f"weights mean nothing with reduction={self.reduction}: use weighted or rectified")
        for name, default, without in (
            ("upscale_strength", 0.5, self.upscale == 1 and "upscale"),
            ("travel_band", (0.2, 0.8), self.time_travel == 1 and "time_travel"),
            ("negative_prompt", "", max(self.guidance_scales, default=1) <= 1 and "guidance (a guidance_scale above 1)"),
            ("guidance_rescale", 0.0, max(self.guidance_scales, default=1) <= 1 and "guidance (a guidance_scale above 1)"),
        ):
            if without and getattr(self, name) != default:
                raise ValueError(f"{name} means nothing without {without}: leave it out")
        if (size := (self.image_size or 0) * self.upscale) > PICTURE_SIDE.high:
            raise ValueError(f"upscale: got {self.upscale} x {self.image_size} px = {size} px, wanted at most {PICTURE_SIDE.high} px")
        if self.upscale > 1 and self.num_inference_steps < 2:
            raise ValueError("upscale needs two steps or more: the second pass does not begin with the first")
        if self.reduction == "alternate" and self.num_inference_steps < num_views:
            raise ValueError(f"reduction=alternate: {self.num_inference_steps} steps show only so many of {num_views} views")
        if self.reduction == "weighted" and self.weights is None:
            raise ValueError("reduction=weighted needs weights, one for each view")
        for name in ("guidance_scale", "negative_prompt", "weights"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str) and len(value) != num_views:
                both = "" if name == "weights" else " for all, or one"
                raise ValueError(f"{name}: got {len(value)} for {num_views} views, wanted one{both} for each")
        if not isinstance(self.negative_prompt, str):
            for text, scale in zip(self.negative_prompt, list(self.guidance_scales) * (1 if len(self.guidance_scales) > 1 else num_views)):
                if text and scale <= 1:
                    raise ValueError(f"negative_prompt '{text}' means nothing where guidance_scale is {scale:g}: leave it empty (\"\")")
        if self.weights is not None:
            shares_of(self.weights, num_views)
        if self.blend == "pixels":
            if self.decoding == "upright":
                raise ValueError("blend=pixels decodes each view: decoding=upright means nothing with it, leave it out")
            for name, default in (("reduction", "mean"), ("upscale", 1)):
                if getattr(self, name) != default:
                    raise ValueError(f"blend=pixels averages the views of each step, got {name}={getattr(self, name)}: use {default}")
