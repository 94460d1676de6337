"""Does a UNet know the noise that sampling begins with? python benchmarks/first_steps.py MODEL [MODEL ...] --data SHARDS

Of each model, at the first timesteps of its sampling schedule (--num-inference-steps):

    loss          the mean denoising loss on --num-images latents of real pictures
    floor         the same of the best linear denoiser (`fit.spectral_loss`)
    spread        of the guided clean estimate at the first of them, over --num-noises noises: its variance, a mean over letters, channels
                  and cells. Where the input holds no signal (zero terminal SNR), a UNet that knows so gives one estimate a prompt: 0
    mean energy   of the mean over these noises: the mean square of what all agree on
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from eqldm.anagram.denoiser import Guidance
from eqldm.anagram.options import Options
from eqldm.anagram.sampling import Sampler
from eqldm.config import DiffusionConfig
from eqldm.data.samples import PictureSamples, collate
from eqldm.diffusion.conditioning import encode_prompts
from eqldm.diffusion.module import LatentDiffusion, draw
from eqldm.diffusion.objective import Objective
from eqldm.evaluation.fit import Fit, spectral_loss
from eqldm.evaluation.judge import LETTERS
from eqldm.evaluation.work import measure_all
from steps import print_table, script, table

NUM_TIMESTEPS = 3


@torch.no_grad()
def losses(sampler: Sampler, samples: PictureSamples, count: int, timesteps: torch.Tensor) -> tuple[list[float], list[float]]:
    """(losses, those of the linear denoiser) at each of timesteps [T], on the first `count` pictures."""
    module = LatentDiffusion(DiffusionConfig(), sampler.vae, sampler.networks).eval()
    found = torch.zeros(len(timesteps))
    for first in range(0, count, 64):
        batch = collate([samples[i] for i in range(first, min(first + 64, count))])
        z = module.latents(batch, 0)
        _, eps, captions = draw(batch, z, 0, module.unweighted)
        embeds = module.prompt_embeds(batch, captions)
        for k, t in enumerate(timesteps):
            times = t.expand(len(z))
            output = module.unet(module.unweighted.add_noise(z, eps, times), times, embeds).sample
            found[k] += module.unweighted.loss(output, z, eps, times).sum() / count
    expected = spectral_loss(measure_all(Fit(sampler, samples, count)), module.unweighted, timesteps)
    return found.tolist(), expected.tolist()


@torch.no_grad()
def spread(sampler: Sampler, t: torch.Tensor, num_noises: int, guidance_scale: float) -> tuple[float, float]:
    """(variance over noises, energy of the mean over noises) of the guided clean estimate of z from pure noise, for all letters."""
    networks, objective = sampler.networks, Objective.of(sampler.networks.scheduler)
    side, channels = sampler.side(), networks.unet.config.in_channels
    noises = torch.randn(num_noises, channels, side, side, generator=torch.Generator().manual_seed(0))
    variances, energies = [], []
    for letter in LETTERS:
        embeds, negative = (encode_prompts(networks.tokenizer, networks.text_encoder, [text]) for text in (f"the letter {letter}", ""))
        output = Guidance(networks.unet, embeds, negative, guidance_scale)(noises[None], t, [0])[0]
        clean = objective.clean(output.float(), noises, t.expand(num_noises))
        variances.append(clean.var(0).mean())
        energies.append(clean.mean(0).square().mean())
    return float(torch.stack(variances).mean()), float(torch.stack(energies).mean())


def run(args: argparse.Namespace) -> str:
    samples, rows = PictureSamples(args.data), {}
    headings: list[str] = []
    for folder in args.models:
        sampler = Sampler.open(folder, "cpu")
        solver = sampler.solver(Options(num_inference_steps=args.num_inference_steps))
        solver.set_timesteps(args.num_inference_steps)
        timesteps = solver.timesteps[:NUM_TIMESTEPS].float()
        found, expected = losses(sampler, samples, min(args.num_images, len(samples)), timesteps)
        variance, energy = spread(sampler, timesteps[0], args.num_noises, args.guidance_scale)
        headings = headings or [f"loss at {t:.0f} (floor)" for t in timesteps]
        name = folder.parent.name if folder.name == "model" else folder.name
        rows[name] = [f"{a:.3f} ({b:.3f})" for a, b in zip(found, expected)] + [f"{variance:.3f}", f"{energy:.3f}"]
    return table("model", [*headings, "spread", "mean energy"], rows)


def main() -> None:
    parser = script(__doc__)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL", help="model folders of one schedule")
    parser.add_argument("--data", type=Path, required=True, help="picture shards")
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--num-noises", type=int, default=32)
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    print_table(parser, run)


if __name__ == "__main__":
    main()
