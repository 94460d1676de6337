"""Part 3 of benchmarks/gpu.py, *sampling*: seconds a picture of two views at the size of Stable Diffusion 1.5, 512 px, 30 steps, bfloat16.

Three ways, by the batch: in latents, all views in one call of the UNet, as eqldm samples; one call of it for each view; and blended in
pixels, which decodes and encodes every view at every step, as latents must that do not turn. The weights are random: they take as long.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from eqldm.anagram.sampling import Sampler
from eqldm.model_folder import PRETRAINED
from eqldm.views import View, parse_view
from gpu_parts import Item, Time, run_part
from sampling import measure
from train_step import CAPTION, make_networks

WAYS = {"in latents": 1.0, "one call for each view": 1.2, "blended in pixels": 4.0}  # and about how many times longer it takes
BATCHES = (4, 1, 16)  # in order of worth
SECONDS = 0.6  # a picture in latents takes, about


class EachView(nn.Module):
    """A UNet that is called once for each of N views, where `Guidance` asks it for all at once."""

    def __init__(self, unet: UNet2DConditionModel, num_views: int):
        super().__init__()
        self.unet, self.num_views, self.config = unet, num_views, unet.config

    def forward(self, rows: Tensor, t: Tensor, embeds: Tensor) -> SimpleNamespace:
        """rows [2 N B, C, h, w] and embeds [2 N B, L, D]: unguided, then guided, view by view."""
        x, e = rows.unflatten(0, (2, self.num_views, -1)), embeds.unflatten(0, (2, self.num_views, -1))
        outputs = [self.unet(x[:, i].flatten(0, 1), t, e[:, i].flatten(0, 1)).sample.unflatten(0, (2, -1)) for i in range(self.num_views)]
        return SimpleNamespace(sample=torch.stack(outputs, 1).flatten(0, 2))


@cache
def make_sampler(device: str, tiny: bool) -> Sampler:
    if tiny:
        return Sampler.open(PRETRAINED / "glyphs-base", device)
    networks, vae = make_networks(None, device)
    return Sampler(networks, vae, torch.device(device), "bf16-mixed")


def with_each_view(sampler: Sampler, num_views: int) -> Sampler:
    unet = cast(UNet2DConditionModel, EachView(sampler.networks.unet, num_views))
    return replace(sampler, networks=replace(sampler.networks, unet=unet))


def measure_way(args: argparse.Namespace, way: str, batch: int, limit: Time) -> dict[str, Any]:
    """Seconds a picture, the median of the rounds for which there is time."""
    sampler, prompt = make_sampler(args.device, args.tiny), "the letter A" if args.tiny else CAPTION
    views: list[View] = [parse_view("identity"), parse_view("rotate_180")]
    sampler = with_each_view(sampler, len(views)) if way == "one call for each view" else sampler
    blend = "pixels" if way == "blended in pixels" else "latents"
    steps = 2 if args.tiny else 30
    call = {way: lambda n: sampler([prompt, prompt], views, range(batch), num_inference_steps=n, blend=blend)}
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    (found,) = measure(call, 1, steps, warm_up=2).values()
    if found[0] < min(5.0, limit.left() / 3):
        found += measure(call, 2, steps, warm_up=1)[way]
    about = {"way": way, "batch": batch, "seconds_a_picture": statistics.median(found) / batch, "rounds": len(found)}
    return {**about, **({"memory_gb": torch.cuda.max_memory_allocated() / 1e9} if args.device == "cuda" else {})}


def items(args: argparse.Namespace) -> Sequence[Item]:
    batches = (2,) if args.tiny else BATCHES
    return [
        Item(
            f"{'64' if args.tiny else '512'} px, batch {batch}, {way}",
            1 if args.tiny else 2 + SECONDS * times * batch * 1.2,
            partial(measure_way, args, way, batch),
        )
        for batch in batches
        for way, times in WAYS.items()
    ]


if __name__ == "__main__":
    run_part(__doc__, "sampling", items)
