"""Do the pictures look like real ones? Distances between features of real and of sampled pictures, and scores for texture.

A reading judge forgives a rough texture, as CLIP scores do; these do not. Distances bear the name of their features (see
`features`): only those of the same ones compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from eqldm.autoencoder.equivariance import psnr
from eqldm.data.samples import collate
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.features import Features, torch_fidelity
from eqldm.evaluation.finite import finite
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.evaluation.judges import by_judge, by_suffix
from eqldm.evaluation.pictures import Pictures
from eqldm.model_folder import decode, encode
from eqldm.views.components import parse_components

NEIGHBOURS = 3  # of precision and recall


@dataclass(frozen=True)
class RealPictures:
    """What sampled pictures are held against: features [M, D] of real ones by name, their labels [M] (None: they have none), their mean
    high-frequency energy and their mean contrast (None: it was not measured); of those with labels, where a judge reads, the share that
    it reads right, and by components (`hybrid:0.06`) that of each of their parts, where it must name a letter; means over judges, and
    (`..._each`) by judge."""

    features: dict[str, Tensor]
    labels: Tensor | None
    energy: float
    read_right: float | None = None
    read_parts: dict[str, list[float]] = field(default_factory=dict)
    contrast: float | None = None
    read_right_each: dict[str, float] = field(default_factory=dict)
    read_parts_each: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Tensor]) -> RealPictures:
        """Of what `RealData` measured."""
        labels = values["label"]
        energy, contrast = (float(values[name].double().mean()) for name in ("energy", "contrast"))
        if bool((labels < 0).any()):
            return cls(features_of(values), None, energy, contrast=contrast)
        if not any(name.split("/")[0] == "read" for name in values):
            return cls(features_of(values), labels, energy, contrast=contrast)
        right = {judge: float((read == labels).double().mean()) for judge, read in by_judge(values, "read").items()}
        components = dict.fromkeys(name.split("/")[1] for name in values if name.startswith("parts/"))
        parts = {
            name: {each: (read == labels[:, None]).double().mean(0).tolist() for each, read in by_judge(values, f"parts/{name}").items()}
            for name in components
        }
        means = {name: [sum(shares) / len(found) for shares in zip(*found.values())] for name, found in parts.items()}
        return cls(features_of(values), labels, energy, sum(right.values()) / len(right), means, contrast, right, parts)


class RealData:
    """The question what real pictures are like: their features, energy and contrast, their labels, and which cannot be read."""

    name = "data"

    def __init__(
        self, samples: Pictures, count: int, features: Sequence[Features] = (), judge: Judge | None = None,
        components: Sequence[str] = (), judges: Mapping[str, Judge] | None = None,
    ):  # fmt: skip
        """components: such as `hybrid:0.06`, whose parts the judge reads too.  judges: by name, where several read."""
        self.samples, self.count, self.features, self.judge = samples, count, features, judge
        self.components = {name: parse_components(name) for name in components}
        hashes = {f.name: f.hash for f in features}
        self.judges = judges or {}
        self.key = {"data": samples.digest, "features": hashes, "judge": judge and judge.hash, "components": list(components)}
        self.key |= {"judges": {name: each.hash for name, each in self.judges.items()}} if self.judges else {}

    def measure(self, numbers: range) -> dict[str, Tensor]:
        """`label` [B] (-1: none), `unreadable` [B] 1 where another picture stands in, `energy`, `contrast` [B], `features/NAME` [B, D], and
        `read` [B], what the judge reads, and `parts/COMPONENTS` [B, parts], what of each part if it must name a letter; of several judges
        `read/NAME` and `parts/COMPONENTS/NAME`.

        Raises ValueError where a judge reads and a label is that of no letter, and where a value is NaN or infinite."""
        batch = collate([self.samples[i] for i in numbers])
        if self.judge is not None:
            check_letters(batch["label"], batch["key"])
        x = batch["x"]
        unreadable = torch.tensor([float(bool(self.samples[i]["skipped"])) for i in numbers] if batch["skipped"] else [0.0] * len(x))
        values = {"label": batch["label"], "unreadable": unreadable}
        values["energy"] = finite("energies", high_frequency_energy(x), batch["key"])
        values["contrast"] = finite("contrasts", contrast(x), batch["key"])
        values |= {f"features/{f.name}": finite(f"features '{f.name}'", f.extract(x), batch["key"]) for f in self.features}
        for suffix, judge in by_suffix(self.judge, self.judges).items():
            values[f"read{suffix}"] = judge(x)
            for name, parts in self.components.items():
                seen = [judge.probabilities(part(x).clamp(-1, 1)) for part in parts]
                values[f"parts/{name}{suffix}"] = torch.stack([each[:, : len(LETTERS)].argmax(1) for each in seen], 1)
        return values


def check_letters(labels: Tensor, keys: Sequence[str]) -> None:
    """Raises ValueError where one of labels [B], of pictures of these keys, is neither a letter's nor -1 (none)."""
    for label, key in zip(labels.tolist(), keys):
        if not -1 <= label < len(LETTERS):
            raise ValueError(
                f"picture '{key}': its label is {label}, but the judge reads letters, wanted 0 (A) to {len(LETTERS) - 1} (Z), or -1 for "
                "none: mend the data, or add --without judge (and give no --judge)"
            )


def features_of(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features among measured values, by name."""
    return {name.removeprefix("features/"): value for name, value in values.items() if name.startswith("features/")}


def distances(findings: Findings, real: RealPictures, features: dict[str, Tensor], prefix: str, suffix: str = "") -> None:
    """Adds, of sampled pictures' features [N, D] by name, N > 1, each under `PREFIX_NAMESUFFIX`:

    `kid`, `fid`            distances from those of real pictures
    `precision`, `recall`   how many sampled pictures lie among real ones, and the reverse

    Raises ValueError, naming the features, where some are NaN or infinite.
    """
    for name, fake in features.items():
        known = finite(f"features '{name}' of real pictures", real.features[name])
        finite(f"features '{name}' of sampled pictures", fake)
        findings.of_weights(f"{prefix}kid_{name}{suffix}", partial(kid, known, fake, real_labels=real.labels, clusters=findings.clusters))
        findings.metrics[f"{prefix}fid_{name}{suffix}"] = float(fid(known, fake))
        if min(len(known), len(fake)) > NEIGHBOURS:
            precision, recall = precision_recall(known, fake)
            findings.metrics |= {f"{prefix}precision_{name}{suffix}": precision, f"{prefix}recall_{name}{suffix}": recall}


def precision_recall(real: Tensor, fake: Tensor) -> tuple[float, float]:
    """(precision, recall) of features fake [N, D] among real [M, D]: the share of each that lies nearer to one of the other than that
    one's third neighbour among its own.

    Raises ValueError where some are NaN or infinite. Source: arXiv 1904.06991, eq. 1 and 2 (torch-fidelity),
    there on features of VGG16.
    """
    _check(real, fake)
    theirs = torch_fidelity("metric_prc")
    found = theirs.prc_features_to_metric(fake.float(), real.float(), prc_neighborhood=NEIGHBOURS, verbose=False)
    return found["precision"], found["recall"]


def kid(
    real: Tensor, fake: Tensor, weights: Tensor | None = None, real_labels: Tensor | None = None, clusters: Tensor | None = None
) -> Tensor:
    """Kernel distance of features real [M, D] and fake [N, D]: the unbiased squared MMD under k(a, b) = (a.b / D + 1)^3.

    weights: [R, N] counts of a bootstrap over the fake ones; the result is then [R], else [].
    clusters: [N] cluster number of each fake one (default: each is its own). Pictures of one cluster are alike, and in a resample they may
    be the same: only pairs of different clusters tell how far apart independent draws of prompts lie, so all others are left out, and the
    estimate and its resamples are unbiased. NaN where there are no such pairs.
    real_labels: [M] of a balanced set, in which two pictures are of one label less often than in independent draws; with them
    the estimate is that of such draws. Raises ValueError where some features are NaN or infinite.
    Source: KID, arXiv 1801.01401, section 4 (which averages the estimates of subsets of the pictures; this is one of them all).
    """
    _check(real, fake)
    real, fake = real.double(), fake.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    among_real = _mean_over_pairs(kernel(real, real), real_labels)
    w = fake.new_ones(1, len(fake)) if weights is None else weights.double()
    total = w.sum(1)
    of = torch.arange(len(fake)) if clusters is None else clusters.unique(return_inverse=True)[1]
    alike = w.new_zeros(len(w), int(of.max()) + 1).index_add_(1, of, w).square_().sum(1)
    others = kernel(fake, fake).masked_fill_(of[:, None] == of, 0)
    among_fake = ((w @ others) * w).sum(1) / (total.square() - alike)
    between = w @ kernel(fake, real).mean(1) / total
    distance = among_real + among_fake - 2 * between
    return distance[0] if weights is None else distance


def _mean_over_pairs(values: Tensor, labels: Tensor | None) -> Tensor:
    """[] mean of values [M, M] over pairs of different pictures, as many of each two labels as independent draws would have."""
    values = values.fill_diagonal_(0)
    count = len(values)
    if labels is None:
        return values.sum() / (count * (count - 1))
    of = torch.nn.functional.one_hot(labels.unique(return_inverse=True)[1]).to(values)  # labels may be any numbers
    held = of.sum(0)
    pairs = held[:, None] * held - torch.diag(held)
    if bool((pairs == 0).any()):  # a label with a single picture
        return _mean_over_pairs(values, None)
    return ((held[:, None] * held) / count**2 * (of.T @ values @ of) / pairs).sum()


def fid(real: Tensor, fake: Tensor) -> Tensor:
    """[] Frechet distance of Gaussians fitted to features real [M, D] and fake [N, D]; biased upward for few samples.

    Raises ValueError where some are NaN or infinite: LAPACK may end the process of them. Source: FID, arXiv 1706.08500, eq. 6
    (torchmetrics).
    """
    _check(real, fake)
    metric = FrechetInceptionDistance(feature=_AsFeatures(real.shape[1]))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


def _check(real: Tensor, fake: Tensor) -> None:
    """Raises ValueError where features [M, D] or [N, D] are NaN or infinite."""
    finite("features of real pictures", real)
    finite("features of sampled pictures", fake)


class _AsFeatures(nn.Module):
    """Stands where torchmetrics has its Inception: what it is given are features already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def high_frequency_energy(pictures: Tensor, batch_size: int = 64) -> Tensor:
    """[N] mean energy per pixel of pictures [N, 3, H, W] at frequencies above half of Nyquist's (radially).

    Pictures are mirrored at their edges first (as a cosine transform does), so that opposite edges make no step. It grows with the square
    of the pictures' contrast: see `contrast`.
    """
    height, width = (2 * side for side in pictures.shape[-2:])
    high = (torch.fft.fftfreq(height)[:, None].square() + torch.fft.fftfreq(width).square()).sqrt() > 0.25
    energies = []
    for x in pictures.float().split(batch_size):
        x = torch.cat([x, x.flip(-1)], -1)
        x = torch.cat([x, x.flip(-2)], -2)
        spectrum = torch.fft.fft2(x, norm="ortho").abs().square()
        energies.append((spectrum * high.to(x)).mean((1, 2, 3)))
    return torch.cat(energies)


def contrast(pictures: Tensor) -> Tensor:
    """[N] mean energy per pixel of pictures [N, 3, H, W] at all frequencies but the mean: what `high_frequency_energy` is a share of.

    By Parseval the variance of a channel's pixels, of mirrored pictures as of plain ones.
    """
    return pictures.float().var((-2, -1), correction=0).mean(1)


def textures(
    findings: Findings, real: RealPictures, energy: Tensor, contrasts: Tensor | None, prefix: str, suffix: str = ""
) -> None:  # fmt: skip
    """Adds, of sampled pictures' high-frequency energy [N] and contrasts [N] (None: not measured), each under `PREFIX...SUFFIX`, and each
    over the same of real pictures, so that 1 is best:

    `texture_over_contrast`   the share of the energy that is of high frequencies (a ratio of sums): rough above 1, blurred below
    `contrast`                the energy of all frequencies but the mean: pale below 1
    `texture`                 the energy of high frequencies, the two multiplied: a pale picture has less of it, however sharp it is
    """
    if contrasts is not None:
        if real.contrast is None:
            raise ValueError("texture_over_contrast is held against real pictures, whose contrast is not given: wanted `real.contrast`")
        findings.ratio(f"{prefix}texture_over_contrast{suffix}", energy.double() * (real.contrast / real.energy), contrasts)
        findings.mean(f"{prefix}contrast{suffix}", contrasts / real.contrast)
    findings.mean(f"{prefix}texture{suffix}", energy / real.energy)


@torch.no_grad()
def round_trip_psnr(vae: AutoencoderKL, x: Tensor, batch_size: int = 64) -> Tensor:
    """[B] dB of D(E(x)) against sampled pictures x [B, 3, H, W]: low where x is nothing that the autoencoder knows."""
    device = next(vae.parameters()).device
    parts = x.split(batch_size)
    return torch.cat([psnr(decode(vae, encode(vae, part.to(device))).cpu(), part.cpu()) for part in parts])
