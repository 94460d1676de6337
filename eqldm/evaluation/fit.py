"""Does the UNet know these latents? Its denoising loss on them, timestep by timestep, beside what the latents' spectrum alone gives,
and beside the same of the latents that it was trained on."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

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
# Of `fit/ratio_to_own` and, where the own VAE is not known, of `fit/loss_ratio`: below the first it fits, from the second on it does not.
# Chosen by `benchmarks/fit_verdict.py` on the two small models; see docs/metrics.md
TO_OWN, ALONE = (1.25, 2.5), (0.5, 1.0)


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
        """The UNet on the VAE's latents (``), on its own VAE's (`own_`) and on the aligned ones (`aligned_`)."""
        if self._modules is None:
            vaes = {"": self.sampler.vae}
            if self.own is not None:
                num_images = min(NUM_ALIGNED, len(self.samples))
                pictures = Subset(self.samples, range(num_images))
                aligned = copy.deepcopy(self.sampler.vae)
                latents, wanted = (latent_matrix(vae, pictures, num_images) for vae in (aligned, self.own))
                matrix, offset = alignment(latents, wanted)
                fold_map(aligned, matrix, offset)
                vaes |= {"own_": self.own, "aligned_": aligned}
            config, device = DiffusionConfig(), self.sampler.device
            self._modules = {name: LatentDiffusion(config, vae, self.sampler.networks).to(device).eval() for name, vae in vaes.items()}
        return self._modules

    @torch.no_grad()
    def measure(self, numbers: range) -> dict[str, Tensor]:
        """At one (t, noise) a picture, the same as in training's validation: `t` [B]; `loss`, `own_loss`, `aligned_loss` [B].

        Of the latents, and of the others named `own_...`, `aligned_...`: `channels/sum`, `channels/square`, `channels/cells` see
        `channel_sums`; `sum/spectrum` [h, w, C, C, 2], the batch's sum of cross-spectra, real and imaginary part (`sum/own_spectrum`).
        `aligned_difference` [B]: the sum of (z' - z_own)^2, z' the aligned latents.
        """
        batch = collate([self.samples[i] for i in numbers])
        batch["x"] = batch["x"].to(self.sampler.device)
        values, latents = {}, {}
        for name, module in self.modules().items():
            encoded = batch | {"moments": module.vae.encode(batch["x"]).latent_dist.parameters}
            values[f"{name}loss"] = module.denoising_loss(encoded, 0, module.unweighted)
            z = latents[name] = module.latents(encoded, 0)
            values |= {f"{name}channels/{key}": value for key, value in channel_sums(z).items()}
            values[f"sum/{name}spectrum"] = cross_spectra(z)
        module = self.modules()[""]
        values["t"] = draw(batch, latents[""], 0, module.unweighted)[0]
        if self.own is not None:
            values["aligned_difference"] = (latents["aligned_"].double() - latents["own_"].double()).square().sum((1, 2, 3))
        return {name: value.cpu() for name, value in values.items()}


def cross_spectra(z: Tensor) -> Tensor:
    """[h, w, C, C, 2] float64: of latents z [B, C, h, w], the sum over the batch of z_c(f) z_d(f)* at each frequency, real and imaginary
    part."""
    transformed = torch.fft.fft2(z.double(), norm="ortho").movedim(1, -1)
    return torch.view_as_real(torch.einsum("bhwc,bhwd->hwcd", transformed, transformed.conj()))


def spectral_loss(values: dict[str, Tensor], objective: Objective, t: Tensor, of: str = "") -> Tensor:
    """[T] the loss at timesteps t [T] of the best linear denoiser that knows the latents' mean and their spectrum, and no more: what a
    UNet must beat to be of any use.

    It is the Wiener filter, over channels together: at each frequency, with eigenvalues l of the channels' covariance, signal a and
    noise s, the error of its estimate of z is the mean of l s^2 / (a^2 l + s^2). Source: Wiener 1949; arXiv 2206.00364, appendix B.3.
    of: which latents, as `Fit.measure` names them.
    """
    count = len(values[f"{of}channels/cells"])
    spectrum = torch.view_as_complex(values[f"sum/{of}spectrum"].contiguous()) / count
    mean, _ = channel_statistics(values, f"{of}channels")
    height, width = spectrum.shape[:2]
    spectrum[0, 0] -= height * width * torch.outer(mean, mean)  # the mean is at frequency 0 alone, known and no signal
    eigenvalues = torch.linalg.eigvalsh(spectrum).clamp_min(0).flatten()
    signal, noise = (level.flatten().double() for level in objective.levels(t))
    clean = torch.stack([(eigenvalues * s**2 / (a**2 * eigenvalues + s**2)).mean() for a, s in zip(signal, noise)])
    # How an error of the estimate of z shows in the output, all else known: see `Objective.output_of`
    factor = signal / noise if objective.prediction == "epsilon" else 1 / noise
    return clean * factor.square()


Level = Literal["fits", "may fit", "does not fit"]


@dataclass(frozen=True)
class Verdict:
    """level: whether the UNet knows these latents; `may fit` where the figures do not settle it.  text: sentences that say so, with the
    figures."""

    level: Level
    text: str


def fit_metrics(values: dict[str, Tensor], objective: Objective) -> Findings:
    """Of what `Fit` measured:

    `fit/val_loss`        the mean denoising loss, as training's validation logs it, without min-SNR weights, so that models trained
                          with and without them compare
    `fit/spectral_loss`   the same of `spectral_loss`;  `fit/loss_ratio` = val_loss / spectral_loss: above 1 the UNet is worse than
                          a filter that knows no picture
    `fit/own_loss_ratio`, `fit/aligned_loss_ratio`   of the latents of the UNet's own VAE, and of those of the alignment fold, each over the
                          filter of those latents;  `fit/ratio_to_own` = loss_ratio / own_loss_ratio. Losses on different latents do not
                          compare: smooth or small latents are easier
    `fit/aligned_share`   of own latents' variance, what the aligned ones show
    `fit/latent_mean`, `fit/latent_std`  root mean squares over channels of their means and standard deviations
    `fit/val_loss/bin_0` to `bin_9`, `fit/loss_ratio/bin_0` to ...   by tenths of the timesteps, 0 the least noise
    """
    findings = Findings(torch.arange(len(values["t"])))
    expected = {of: spectral_loss(values, objective, values["t"], of) for of in ("", "own_", "aligned_") if f"{of}loss" in values}
    findings.mean("fit/val_loss", values["loss"])
    findings.mean("fit/spectral_loss", expected[""])
    for of in expected:
        findings.ratio(f"fit/{of}loss_ratio", values[f"{of}loss"], expected[of])
    if "own_" in expected:

        def loss_ratio(weights: Tensor, of: str) -> Tensor:
            return (weights @ values[f"{of}loss"].double()) / (weights @ expected[of].double())

        findings.of_weights("fit/ratio_to_own", lambda weights: loss_ratio(weights, "") / loss_ratio(weights, "own_"))
        mean, std = channel_statistics(values, "own_channels")
        variance = float(std.square().sum() * values["own_channels/cells"].double().sum())
        findings.metrics["fit/aligned_share"] = 1 - float(values["aligned_difference"].sum()) / variance
    mean, std = channel_statistics(values, "channels")
    findings.metrics |= {"fit/latent_mean": float(mean.square().mean().sqrt()), "fit/latent_std": float(std.square().mean().sqrt())}
    for number, rows in enumerate(bins(values["t"], 1000 if objective.is_flow else len(objective.alphas_cumprod))):
        if len(rows):
            loss = float(values["loss"][rows].mean())
            findings.metrics[f"fit/val_loss/bin_{number}"] = loss
            findings.metrics[f"fit/loss_ratio/bin_{number}"] = loss / float(expected[""][rows].mean())
    return findings


def bins(t: Tensor, num_train_timesteps: int = 1000) -> list[Tensor]:
    """The rows of timesteps t [N] that lie in each of `NUM_BINS` equal bins."""
    number = (t * NUM_BINS / num_train_timesteps).long().clamp(max=NUM_BINS - 1)
    return [(number == k).nonzero()[:, 0] for k in range(NUM_BINS)]


def verdict(metrics: dict[str, float]) -> Verdict:
    """Whether the UNet fits, by `fit_metrics`: it must do about as well by its latents' filter as it does on its own VAE's latents, and
    better than the filter, which knows the spectrum alone."""
    loss, ratio, to_own = metrics["fit/val_loss"], metrics["fit/loss_ratio"], metrics.get("fit/ratio_to_own")
    level = level_of(ratio, to_own)
    text = f"its denoising loss, {loss:.3f}, is {ratio:.2f} times that of a filter that knows these latents' spectrum alone"
    if to_own is not None:
        text += f", which is {to_own:.2f} times what it is on its own VAE's latents ({metrics['fit/own_loss_ratio']:.2f})"
    if level == "fits":
        return Verdict(level, f"The UNet fits this VAE: {text}.")
    advice = [_alignment(metrics) if to_own is not None else _scale(metrics)]
    if level == "may fit":
        low, high = ALONE if to_own is None else TO_OWN
        known = (
            f"In our small world one change of the latents in six cost letters at such figures; below {low:g} none did, from {high:g} on"
        )
        return Verdict(level, " ".join([f"The UNet may fit this VAE: {text}. {known} three in four.", *advice, "Sample some and look."]))
    least, most = (metrics.get(f"fit/loss_ratio/bin_{number}") for number in (0, NUM_BINS - 1))
    if least is not None and most is not None:
        where = f"Where there is least noise, and texture is drawn, it is {least:.2f} times the filter's"
        advice.insert(0, f"{where}; where there is most, {most:.2f} times.")
    if "fold" not in advice[-1]:
        advice.append("Adapt the UNet before sampling (train.py, stage: diffusion).")
    return Verdict(level, " ".join([f"The UNet does not fit this VAE: {text}.", *advice]))


def level_of(ratio: float, to_own: float | None) -> Level:
    """By `fit/loss_ratio`, and by `fit/ratio_to_own` where the own VAE is known."""
    measured, (low, high) = (ratio, ALONE) if to_own is None else (to_own, TO_OWN)
    if not (measured < high and ratio < 1):
        return "does not fit"
    return "fits" if measured < low else "may fit"


def _alignment(metrics: dict[str, float]) -> str:
    """What a fold towards the UNet's own VAE would do."""
    aligned, share = metrics["fit/aligned_loss_ratio"], metrics["fit/aligned_share"]
    text = (
        f"Aligned to the UNet's own VAE by the best orthogonal map of the channels, these latents show {share:.0%} of what its own hold, "
        f"and the loss is {aligned:.2f} times their filter's"
    )
    level = level_of(aligned, aligned / metrics["fit/own_loss_ratio"])
    if level == "fits":
        return f"{text}: fold that map into the VAE, and the UNet fits (python -m eqldm.autoencoder.fold --align-to)."
    return f"{text}: {'that may fit' if level == 'may fit' else 'that is no fit either'}."


def _scale(metrics: dict[str, float]) -> str:
    """What is known without the UNet's own VAE."""
    mean, std = metrics["fit/latent_mean"], metrics["fit/latent_std"]
    return (
        f"These latents' channels have a standard deviation of {std:.2f} and a mean of {mean:.2f} (root mean square; wanted about 1 and 0)."
    )
