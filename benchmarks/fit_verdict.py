"""When does a UNet no longer fit a VAE, and does the evaluation see it? python benchmarks/fit_verdict.py --data SHARDS --out DIR

Changes the shipped models' latents in many ways and doses. The VAE's encoder gives the changed latents and its decoder undoes the change,
so reconstructions stay as they are, but the UNet meets latents that it does not know, as after a swap. For each change: letters
that the judge reads right, and what `fit` measures. One UNet's letters have the same latents under every VAE (it never sees the
VAE), so each change costs one decoding, and all changes are compared on equal letters, noises and pictures.

Writes DIR/results.json as results come (a second call goes on), DIR/table.md, DIR/statistics.md, and some letters of each change.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Subset

from eqldm.anagram.render import picture_sheet
from eqldm.anagram.sampling import Sampler
from eqldm.atomic import write_whole
from eqldm.autoencoder.equivariance import psnr
from eqldm.autoencoder.fold import alignment, fold_map, latent_matrix
from eqldm.data.samples import PictureSamples
from eqldm.diffusion.objective import Objective
from eqldm.evaluation.fit import NUM_ALIGNED, NUM_BINS, Fit, fit_metrics
from eqldm.evaluation.generation import letter_prompts, plain_letters
from eqldm.evaluation.judge import Judge
from eqldm.evaluation.naming import file_name, number
from eqldm.evaluation.work import measure_all
from eqldm.markdown import markdown
from eqldm.model_folder import PRETRAINED, load_vae, weights_hash
from eqldm.training.run_folder import git_commit
from eqldm.views import IDENTITY, parse_view

MODELS = ("glyphs-base", "glyphs-eq")
STATISTICS = {  # of a change's metrics m and those of the UNet's own VAE o
    "loss_ratio": lambda m, o: m["fit/loss_ratio"],
    "ratio to own": lambda m, o: m["fit/loss_ratio"] / o["fit/loss_ratio"],
    "loss / own loss": lambda m, o: m["fit/val_loss"] / o["fit/val_loss"],
    "worst bin of loss_ratio": lambda m, o: max(by_bins(m)),
    "worst bin of ratio to own": lambda m, o: max(a / b for a, b in zip(by_bins(m), by_bins(o))),
    "geometric mean of bins' ratio to own": lambda m, o: statistics.geometric_mean(a / b for a, b in zip(by_bins(m), by_bins(o))),
}
READ, UNREAD = 0.95, 0.8  # of the letters that read right under the own VAE: all is well, and much has failed


@dataclass(frozen=True)
class Change:
    """Of a VAE's latents. make: the changed VAE of a VAE."""

    name: str
    dose: str
    make: Callable[[AutoencoderKL], AutoencoderKL]


def by_bins(metrics: dict[str, float]) -> list[float]:
    """`fit/loss_ratio` in each tenth of the timesteps that a picture fell in."""
    return [metrics[name] for k in range(NUM_BINS) if (name := f"fit/loss_ratio/bin_{k}") in metrics]


def mapped(vae: AutoencoderKL, matrix: Tensor, offset: Tensor | None = None) -> AutoencoderKL:
    """With latents `matrix @ z + offset`."""
    changed = copy.deepcopy(vae)
    fold_map(changed, matrix.double(), torch.zeros(len(matrix)).double() if offset is None else offset.double())
    return changed


def hooked(vae: AutoencoderKL, forth: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> AutoencoderKL:
    """forth: of the moments [B, 2C, h, w] that are encoded.  back: of the latents [B, C, h, w] that are decoded."""
    changed = mapped(vae, torch.eye(vae.config.latent_channels))  # the scaling factor is 1 then
    changed.quant_conv.register_forward_hook(lambda module, args, output: forth(output))
    changed.post_quant_conv.register_forward_pre_hook(lambda module, args: back(args[0]))
    return changed


def noisier(moments: Tensor, std: float) -> Tensor:
    """A posterior with so much more noise."""
    mean, logvar = moments.chunk(2, 1)
    return torch.cat([mean, (logvar.exp() + std**2).log()], 1)


def with_noise(z: Tensor, std: float) -> Tensor:
    """z and noise, the same for equal shapes."""
    return z + std * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))


def louder(z: Tensor, gain: float) -> Tensor:
    """z [B, C, h, w] with frequencies multiplied by 1 (the lowest) to `gain` (half a cycle a cell, in either direction)."""
    frequencies = [torch.fft.fftfreq(side).abs() * 2 for side in z.shape[-2:]]
    highest = torch.maximum(frequencies[0][:, None], frequencies[1][None])
    return torch.fft.ifft2(torch.fft.fft2(z) * gain**highest).real


def turn(channels: int, i: int, j: int, degrees: float) -> Tensor:
    """[C, C] that turns the plane of two channels."""
    matrix, angle = torch.eye(channels), math.radians(degrees)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[j, i], matrix[i, j] = math.sin(angle), -math.sin(angle)
    return matrix


def scaled(channels: int, factor: float, *which: int) -> Tensor:
    """[C, C] that scales these channels."""
    return torch.diag(torch.tensor([factor if k in which else 1.0 for k in range(channels)]))


def channel_maps(channels: int) -> Iterator[tuple[str, str, Tensor, Tensor | None]]:
    """(name, dose, matrix, offset) of the maps of channels that are tried. Random ones are drawn from fixed seeds."""
    for factor in (0.5, 0.7, 0.9, 1.2, 1.5, 2):
        yield "scale all channels", f"{factor:g}", factor * torch.eye(channels), None
    for factor in (0.25, 0.5, 2, 4):
        yield "scale one channel", f"{factor:g}", scaled(channels, factor, 0), None
    for shift in (0.1, 0.2, 0.5, 1):
        yield "offset", f"{shift:g}", torch.eye(channels), torch.full((channels,), shift)
    for i, j in ((0, 1), (channels - 3, channels - 1)):
        for degrees in (10, 20, 45, 90):
            yield f"turn channels {i} and {j}", f"{degrees}°", turn(channels, i, j, degrees), None
    drawn = torch.randn(channels, channels, generator=torch.Generator().manual_seed(0))
    skew = (drawn - drawn.T) / torch.linalg.matrix_norm(drawn - drawn.T, 2)
    for degrees in (20, 45, 60):
        yield "turn all channels, by up to", f"{degrees}°", torch.matrix_exp(math.radians(degrees) * skew), None
    for size in (0.05, 0.1, 0.2):
        other = torch.randn(channels, channels, generator=torch.Generator().manual_seed(1))
        yield "random linear map, entries", f"{size:g}", torch.matrix_exp(size * other), None
    for k in range(channels):
        yield "negate one channel", f"number {k}", scaled(channels, -1, k), None
    for i, j in ((0, 1), (1, channels - 2)):
        yield "swap two channels", f"{i} and {j}", torch.eye(channels)[[{i: j, j: i}.get(k, k) for k in range(channels)]], None
    for seed in range(2):
        drawn = torch.randn(channels, channels, generator=torch.Generator().manual_seed(seed))
        yield "random orthogonal map", f"seed {seed}", torch.linalg.qr(drawn).Q, None


def changes(channels: int, other: AutoencoderKL, pictures: Subset) -> Iterator[Change]:
    """All that are tried. other: the VAE of another model.  pictures: that it is aligned on."""
    yield Change("none", "", lambda vae: vae)
    for name, dose, matrix, offset in channel_maps(channels):
        yield Change(name, dose, partial(mapped, matrix=matrix, offset=offset))
    for gain in (0.5, 2):
        forth, back = partial(louder, gain=gain), partial(louder, gain=1 / gain)
        yield Change("highest frequencies", f"x {gain:g}", partial(hooked, forth=on_means(forth), back=back))
    for name in ("mirror", "rotate_180", "patch_permute:4"):
        view = parse_view(name)
        yield Change("cells moved", name, partial(hooked, forth=view, back=view.inverse))
    for std in (0.2, 0.4, 0.8):
        yield Change("noise in both", f"{std:g}", partial(hooked, forth=partial(noisier, std=std), back=partial(with_noise, std=std)))
    yield Change("noise in the encoder", "0.8", partial(hooked, forth=partial(noisier, std=0.8), back=lambda z: z))
    yield Change("noise in the decoder", "0.8", partial(hooked, forth=lambda z: z, back=partial(with_noise, std=0.8)))
    yield Change("the other model's VAE", "", lambda vae: other)
    yield Change("the other model's VAE", "aligned", lambda vae: aligned(other, vae, pictures))


def on_means(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same of moments: variances stay."""
    return lambda moments: torch.cat([change(moments.chunk(2, 1)[0]), moments.chunk(2, 1)[1]], 1)


def aligned(other: AutoencoderKL, vae: AutoencoderKL, pictures: Subset) -> AutoencoderKL:
    """`other` after the alignment fold towards `vae`."""
    latents, wanted = (latent_matrix(each, pictures, len(pictures)) for each in (other, vae))
    return mapped(other, *alignment(latents, wanted))


class Study:
    """A model, and what is measured of each of its changes."""

    def __init__(self, name: str, args: argparse.Namespace):
        self.name, self.args, self.judge, self.samples = name, args, Judge.open(), PictureSamples(args.data)
        self.sampler = Sampler.open(PRETRAINED / name, "cpu")
        self.objective = Objective.of(self.sampler.networks.scheduler)
        self.wanted = plain_letters(args.num_letters)

    def changes(self) -> Iterator[Change]:
        """See `changes`."""
        (other,) = (load_vae(PRETRAINED / name).eval() for name in MODELS if name != self.name)
        pictures = Subset(self.samples, range(min(NUM_ALIGNED, self.args.num_images)))
        return changes(other.config.latent_channels, other, pictures)

    @cached_property
    def latents(self) -> Tensor:
        """[N, C, h, w] of the letters."""
        (prompts,) = letter_prompts(self.wanted)
        options = {"num_inference_steps": self.args.num_inference_steps, "guidance_scale": 5.0}
        parts = [part.tolist() for part in torch.arange(len(prompts)).split(104)]
        return torch.cat([self.sampler.latents([[prompts[k] for k in part]], [IDENTITY], part, **options) for part in parts])

    @cached_property
    def pictures(self) -> Tensor:
        """[N, 3, H, W] the letters under the UNet's own VAE."""
        return self.sampler.decode(self.latents)

    def measure(self, change: Change) -> dict[str, float]:
        """What `fit` finds on the changed latents, no own VAE given; `read`, the share of letters that the judge reads right; `psnr`, dB
        of these letters against those under the own VAE."""
        sampler = replace(self.sampler, vae=change.make(self.sampler.vae))
        pictures = sampler.decode(self.latents)
        self._show(change, pictures)
        metrics = fit_metrics(measure_all(Fit(sampler, self.samples, self.args.num_images)), self.objective).metrics
        metrics["read"] = float((self.judge(pictures) == self.wanted[0]).double().mean())
        metrics["psnr"] = float(psnr(pictures, self.pictures).clamp(max=60).mean())
        return metrics

    def _show(self, change: Change, pictures: Tensor) -> None:
        words = "-".join(filter(None, (self.name, change.name, change.dose))).replace(" ", "_").replace("°", "")
        rows = [list(part) for part in pictures[:16].split(8)]
        sheet = picture_sheet(rows, [""] * len(rows), [""] * len(rows[0]))
        write_whole(self.args.out / "letters" / f"{file_name(words)}.png", partial(sheet.save, format="PNG"))


Results = dict[str, dict[str, dict[str, float]]]
"""The metrics of each change, `NAME|DOSE`, of each model."""


def measured(args: argparse.Namespace) -> Results:
    """The results of all changes; those that OUT holds are not measured again. Raises ValueError where OUT holds others."""
    studies = [Study(name, args) for name in MODELS]
    about = {name: getattr(args, name) for name in ("num_letters", "num_images", "num_inference_steps")}
    about |= {study.name: weights_hash(study.sampler.networks.unet) for study in studies} | {"data": studies[0].samples.digest}
    path = args.out / "results.json"
    held = json.loads(path.read_text()) if path.exists() else {"about": about, "results": {}}
    if held["about"] != about:
        raise ValueError(f"'{path}' is of other options, models or pictures ({held['about']}): remove it, or give another --out")
    results: Results = held["results"]
    for study in studies:
        known = results.setdefault(study.name, {})
        for change in study.changes():
            key = f"{change.name}|{change.dose}"
            if key not in known:
                known[key] = study.measure(change)
                text = json.dumps({"about": about, "commit": git_commit(), "results": results}, indent=1) + "\n"
                write_whole(path, partial(Path.write_text, data=text))
                print(study.name, key, f"read {known[key]['read']:.2f}, loss_ratio {known[key]['fit/loss_ratio']:.2f}", flush=True)
    return results


def change_table(results: Results) -> str:
    """A row for each change: letters that read right and the ratio to own, by each model."""
    rows = []
    for key in results[MODELS[0]]:
        cells = []
        for model in MODELS:
            found, own = results[model][key], results[model]["none|"]
            cells += [f"{found['read']:.0%}", number(STATISTICS["ratio to own"](found, own))]
        rows.append([" ".join(filter(None, key.split("|"))), *cells])
    return markdown(["change", *(f"{model}: {what}" for model in MODELS for what in ("read", "to own"))], rows)


def statistic_table(results: Results) -> str:
    """How well each statistic separates changes after which letters still read from those after which they do not."""
    rows = []
    for name, statistic in STATISTICS.items():
        well, ill = [], []
        for model in MODELS:
            own = results[model]["none|"]
            for key, found in results[model].items():
                if key.startswith("noise in the"):  # of which one half says nothing of the other
                    continue
                if found["read"] >= READ * own["read"]:
                    well.append(statistic(found, own))
                elif found["read"] < UNREAD * own["read"]:
                    ill.append(statistic(found, own))
        pairs = [(a < b) + (a == b) / 2 for a in well for b in ill]
        right = sum(pairs) / len(pairs) if pairs else None
        rows.append([name, number(max(well, default=None)), number(min(ill, default=None)), number(right)])
    headings = [f"greatest of {len(well)} after which {READ:.0%} still read", f"least of {len(ill)} after which under {UNREAD:.0%} do"]
    return markdown(["statistic", *headings, "share of pairs, one of each, in the right order"], rows)


def run(args: argparse.Namespace) -> str:
    results = measured(args)
    tables = {"table.md": change_table(results), "statistics.md": statistic_table(results)}
    for name, text in tables.items():
        write_whole(args.out / name, partial(Path.write_text, data=text))
    return "\n".join(tables.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="glyph shards, of pictures that no model has seen")
    parser.add_argument("--num-letters", type=int, default=104, help="letter k has seed k")
    parser.add_argument("--num-images", type=int, default=256, help="pictures that losses are measured on")
    parser.add_argument("--num-inference-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if min(args.num_letters, args.num_images, args.num_inference_steps) < 1:
        parser.error("wanted --num-letters, --num-images and --num-inference-steps of at least 1")
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
