"""One picture whose parts read differently: a denoiser that sums the components of several prompts' estimates.

Source: Factorized Diffusion, arXiv 2404.11615: eq. 3 (the sum), section 3.5 (a part held to that of a reference picture). Its released code
holds a part otherwise, before the network is asked: see `sum_of_parts` and docs/differences.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import reduce

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from eqldm.anagram.denoiser import Denoiser, Guidance
from eqldm.diffusion.objective import Objective
from eqldm.model_folder import decode, encode
from eqldm.views.components import Component


def sum_of_parts(
    guided: Guidance, components: Sequence[Component], objective: Objective, held: Mapping[int, Tensor] | None = None,
    vae: AutoencoderKL | None = None,
) -> Denoiser:  # fmt: skip
    """The sum over components i of component_i(the estimate under its prompt), in one call of the UNet a step.

    Prompts are those of the components that are not held, in order.  held: by number, the latents [1, C, h, w] (with vae: the pictures
    [1, 3, H, W]) whose part takes the place of the clean estimate's. (The released code of the paper puts the part of the reference, noised
    anew at each step, into z_t, and lets the network estimate it with the rest.)  vae: take pictures apart in place of latents: each
    estimate is decoded, the sum encoded, and what that loses of the estimates' mean is added back.
    """
    held = dict(held or {})
    free = [i for i in range(len(components)) if i not in held]
    fixed = [components[i](reference) for i, reference in held.items()]

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        outputs = guided(z.expand(len(free), *z.shape), t, range(len(free)))
        if not held and vae is None:  # what the network states is linear in the estimate
            return _sum(components[i](output) for i, output in zip(free, outputs))
        times = t.expand(len(z))
        clean = torch.stack([objective.clean(output, z, times) for output in outputs])
        if vae is None:
            return objective.output_of(_sum([*(components[i](each) for i, each in zip(free, clean)), *fixed]), z, times)
        pictures = decode(vae, clean.flatten(0, 1))
        lost = (clean.flatten(0, 1) - encode(vae, pictures)).unflatten(0, clean.shape[:2]).mean(0)
        shared = _sum([*(components[i](x) for i, x in zip(free, pictures.unflatten(0, clean.shape[:2]))), *fixed])
        return objective.output_of(encode(vae, shared) + lost, z, times)

    return denoise


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)
