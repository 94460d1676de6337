"""Does the UNet know these latents? Its denoising loss on them, timestep by timestep, beside what the latents' spectrum alone gives,
and beside its loss on the latents that it was trained on."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import Subset

from eqldm.anagram.sampling import Sampler
from eqldm.autoencoder.fold import alignment, fold_map, latent_matrix
from eqldm.config import DiffusionConfig
from eqldm.data.samples import collate
from eqldm.diffusion.module import LatentDiffusion, draw
from eqldm.diffusion.objective import Objective
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.equivariance import channel_statistics, channel_sums
from eqldm.evaluation.pictures import Pictures
from eqldm.evaluation.work import identity

NUM_BINS = 10  # of timesteps, in the report
NUM_ALIGNED = 256  # pictures that the alignment is measured on
TOLERANCE = 1.1  # a loss this many times that on the UNet's own latents is still a fit


class Fit:
    """The question how well a sampler's UNet denoises its VAE's latents of pictures.

    own: the VAE that the UNet was trained with, where that is another one: the same is measured on its latents, and on those of the VAE
    after the alignment fold towards it.
    """

    name = "fit"

    def __init__(self, sampler: Sampler, samples: Pictures, count: int, own: AutoencoderKL | None = None):
        self.samples, self.count, self.sampler = samples, count, sampler
        self.key = {**identity(sampler.vae, sampler.networks), "data": samples.digest, "own": own and identity(own)["vae"]}
        self.own = own
        self._modules: dict[str, LatentDiffusion] | None = None

    def modules(self) -> dict[str, LatentDiffusion]:
        """The UNet on the VAE's latents (`loss`), on its own VAE's (`own_loss`) and on the aligned ones (`aligned_loss`)."""
        if self._modules is None:
            vaes = {"loss": self.sampler.vae}
            if self.own is not None:
                num_images = min(NUM_ALIGNED, len(self.samples))
                pictures = Subset(self.samples, range(num_images))
                aligned = copy.deepcopy(self.sampler.vae)
                latents, wanted = (latent_matrix(vae, pictures, num_images) for vae in (aligned, self.own))
                matrix, offset = alignment(latents, wanted)
                fold_map(aligned, matrix, offset)
                vaes |= {"own_loss": self.own, "aligned_loss": aligned}
            config, device = DiffusionConfig(), self.sampler.device
            self._modules = {name: LatentDiffusion(config, vae, self.sampler.networks).to(device).eval() for name, vae in vaes.items()}
        return self._modules

    @torch.no_grad()
    def measure(self, numbers: range) -> dict[str, Tensor]:
        """At one (t, noise) a picture, the same as in training's validation: `t` [B]; `loss`, `own_loss`, `aligned_loss` [B].

        Of the latents: `channels/sum`, `channels/square`, `channels/cells` see `channel_sums`, of the own VAE's `own_channels/...`;
        `sum/spectrum` [h, w, C, C, 2], the batch's sum of cross-spectra, real and imaginary part; `aligned_difference` [B]: the sum of
        (z' - z_own)^2, z' the aligned latents.
        """
        batch = collate([self.samples[i] for i in numbers])
        batch["x"] = batch["x"].to(self.sampler.device)
        values, latents = {}, {}
        for name, module in self.modules().items():
            encoded = batch | {"moments": module.vae.encode(batch["x"]).latent_dist.parameters}
            values[name] = module.denoising_loss(encoded, 0, module.unweighted)
            latents[name] = module.latents(encoded, 0)
        module = self.modules()["loss"]
        values["t"] = draw(batch, latents["loss"], 0, module.unweighted)[0]
        transformed = torch.fft.fft2(latents["loss"].double(), norm="ortho").movedim(1, -1)
        values["sum/spectrum"] = torch.view_as_real(torch.einsum("bhwc,bhwd->hwcd", transformed, transformed.conj()))
        for name, prefix in (("loss", "channels"), ("own_loss", "own_channels")):
            if name in latents:
                values |= {f"{prefix}/{key}": value for key, value in channel_sums(latents[name]).items()}
        if self.own is not None:
            aligned, wanted = latents["aligned_loss"].double(), latents["own_loss"].double()
            values["aligned_difference"] = (aligned - wanted).square().sum((1, 2, 3))
        return {name: value.cpu() for name, value in values.items()}


def spectral_loss(values: dict[str, Tensor], objective: Objective, t: Tensor) -> Tensor:
    """[T] the loss at timesteps t [T] of the best linear denoiser that knows the latents' mean and their spectrum, and no more: what a
    UNet must beat to be of any use.

    It is the Wiener filter, over channels together: at each frequency, with eigenvalues l of the channels' covariance, signal a and
    noise s, the error of its estimate of z is the mean of l s^2 / (a^2 l + s^2). Source: Wiener 1949; arXiv 2206.00364, appendix B.3.
    """
    count = len(values["channels/cells"])
    spectrum = torch.view_as_complex(values["sum/spectrum"].contiguous()) / count
    mean, _ = channel_statistics(values, "channels")
    height, width = spectrum.shape[:2]
    spectrum[0, 0] -= height * width * torch.outer(mean, mean)  # the mean is at frequency 0 alone, known and no signal
    eigenvalues = torch.linalg.eigvalsh(spectrum).clamp_min(0).flatten()
    signal, noise = (level.flatten().double() for level in objective.levels(t))
    clean = torch.stack([(eigenvalues * s**2 / (a**2 * eigenvalues + s**2)).mean() for a, s in zip(signal, noise)])
    # How an error of the estimate of z shows in the output, all else known: see `Objective.output_of`
    factor = signal / noise if objective.prediction == "epsilon" else 1 / noise
    return clean * factor.square()


@dataclass(frozen=True)
class Verdict:
    """fits: whether the UNet knows these latents.  text: a sentence or two that say so, with the figures."""

    fits: bool
    text: str


def fit_metrics(values: dict[str, Tensor], objective: Objective) -> Findings:
    """Of what `Fit` measured:

    `fit/val_loss`        the mean denoising loss, as training's validation logs it, without min-SNR weights, so that models trained
                          with and without them compare
    `fit/spectral_loss`   the same of `spectral_loss`;  `fit/loss_ratio` = val_loss / spectral_loss: above 1 the UNet is worse than
                          a filter that knows no picture
    `fit/own_loss`, `fit/aligned_loss`   on the latents of the UNet's own VAE, and on those of the alignment fold;
    `fit/own_ratio` = val_loss / own_loss;  `fit/aligned_share`: of own latents' variance, what the aligned ones show
    `fit/latent_mean`, `fit/latent_std`  root mean squares over channels of their means and standard deviations
    `fit/val_loss/bin_0` to `bin_9`, `fit/loss_ratio/bin_0` to ...   by tenths of the timesteps, 0 the least noise
    """
    findings = Findings(torch.arange(len(values["t"])))
    expected = spectral_loss(values, objective, values["t"])
    findings.mean("fit/val_loss", values["loss"])
    findings.mean("fit/spectral_loss", expected)
    findings.ratio("fit/loss_ratio", values["loss"], expected)
    if "own_loss" in values:
        findings.mean("fit/own_loss", values["own_loss"])
        findings.mean("fit/aligned_loss", values["aligned_loss"])
        findings.ratio("fit/own_ratio", values["loss"], values["own_loss"])
        mean, std = channel_statistics(values, "own_channels")
        variance = float(std.square().sum() * values["own_channels/cells"].double().sum())
        findings.metrics["fit/aligned_share"] = 1 - float(values["aligned_difference"].sum()) / variance
    mean, std = channel_statistics(values, "channels")
    findings.metrics |= {"fit/latent_mean": float(mean.square().mean().sqrt()), "fit/latent_std": float(std.square().mean().sqrt())}
    for number, rows in enumerate(bins(values["t"], 1000 if objective.is_flow else len(objective.alphas_cumprod))):
        if len(rows):
            loss = float(values["loss"][rows].mean())
            findings.metrics[f"fit/val_loss/bin_{number}"] = loss
            findings.metrics[f"fit/loss_ratio/bin_{number}"] = loss / float(expected[rows].mean())
    return findings


def bins(t: Tensor, num_train_timesteps: int = 1000) -> list[Tensor]:
    """The rows of timesteps t [N] that lie in each of `NUM_BINS` equal bins."""
    number = (t * NUM_BINS / num_train_timesteps).long().clamp(max=NUM_BINS - 1)
    return [(number == k).nonzero()[:, 0] for k in range(NUM_BINS)]


def verdict(metrics: dict[str, float]) -> Verdict:
    """Whether the UNet fits, by `fit_metrics`: it must denoise better than a filter that knows the spectrum alone, and about as well
    as it does its own VAE's latents."""
    loss, ratio, own = metrics["fit/val_loss"], metrics["fit/loss_ratio"], metrics.get("fit/own_ratio")
    fits = ratio < 1 and (own is None or own < TOLERANCE)
    parts = [f"its denoising loss, {loss:.3f}, is {ratio:.2f} times that of a filter that knows these latents' spectrum alone"]
    if own is not None:
        parts.append(f"{own:.2f} times that on its own VAE's latents ({metrics['fit/own_loss']:.3f})")
    text = f"The UNet {'fits' if fits else 'does not fit'} this VAE: {', and '.join(parts)}."
    if fits:
        return Verdict(True, text)
    low, high = (metrics.get(f"fit/loss_ratio/bin_{number}") for number in (0, NUM_BINS - 1))
    if low is not None and high is not None:
        text += (
            f" Where there is least noise, and texture is drawn, it is {low:.2f} times the filter's; where there is most, {high:.2f} times."
        )
    if own is not None:
        text += (
            f" The two VAEs' channels differ in what they say: aligned by the best orthogonal map, these show "
            f"{metrics['fit/aligned_share']:.0%} of what the UNet's own hold, and leave it a loss of {metrics['fit/aligned_loss']:.3f}."
        )
    else:
        text += (
            f" These latents' channels have a standard deviation of {metrics['fit/latent_std']:.2f} and a mean of "
            f"{metrics['fit/latent_mean']:.2f} (root mean square; a UNet wants about 1 and 0)."
        )
    return Verdict(False, text + " Adapt the UNet before sampling (train.py, stage: diffusion).")
