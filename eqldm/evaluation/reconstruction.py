"""How well does the autoencoder reconstruct?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from eqldm.autoencoder.equivariance import psnr
from eqldm.data.samples import collate
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.features import Features
from eqldm.evaluation.finite import finite
from eqldm.evaluation.pictures import Pictures
from eqldm.evaluation.quality import RealPictures, features_of, fid
from eqldm.evaluation.work import identity
from eqldm.model_folder import check_latents, decode, encode


class Reconstruction:
    """The question how near D(E(x)) comes to pictures x, E the posterior's mean."""

    name = "reconstruction"

    def __init__(self, vae: AutoencoderKL, samples: Pictures, count: int, features: Sequence[Features] = (), lpips: Callable | None = None):
        self.vae, self.samples, self.count, self.features, self.lpips = vae, samples, count, features, lpips
        hashes = {f.name: f.hash for f in features}
        self.key = {**identity(vae), "data": samples.digest, "features": hashes, "lpips": lpips is not None}

    @torch.no_grad()
    def measure(self, numbers: range) -> dict[str, Tensor]:
        """`psnr` (dB), `ssim`, `lpips` [B], and `features/NAME` [B, D] of the reconstructions."""
        batch = collate([self.samples[i] for i in numbers])
        x = batch["x"].to(self.vae.device)
        decoded = decode(self.vae, encode(self.vae, x)).float()
        check_latents(self.vae, decoded, batch["key"], "the data")
        y = decoded.clamp(-1, 1)
        ssim = structural_similarity_index_measure(y, x, data_range=(-1.0, 1.0), reduction="none")
        values = {"psnr": psnr(y, x), "ssim": ssim.view(len(x))}
        values |= {f"features/{f.name}": finite(f"features '{f.name}'", f.extract(y), batch["key"]) for f in self.features}
        if self.lpips is not None:
            values["lpips"] = finite("LPIPS", self.lpips(y, x).view(len(x)), batch["key"])
        return {name: value.cpu() for name, value in values.items()}


def reconstruction_metrics(values: dict[str, Tensor], real: RealPictures | None = None) -> Findings:
    """Of what `Reconstruction` measured: means of `psnr`, `ssim`, `lpips`, and `rfid_NAME`, the Frechet distance of the reconstructions'
    features from the pictures' (of `real`, the same pictures). Raises ValueError where features were measured and `real` is not given."""
    findings = Findings(torch.arange(len(values["psnr"])))
    for name in ("psnr", "ssim", "lpips"):
        if name in values:
            findings.mean(f"reconstruction/{name}", values[name], rate=False)
    for name, features in features_of(values).items():
        if real is None:
            raise ValueError(f"rfid_{name} is a distance from real pictures, of which nothing is given: wanted `real`")
        findings.metrics[f"reconstruction/rfid_{name}"] = float(fid(real.features[name][: len(features)], features))
    return findings


@torch.no_grad()
def worst_reconstructions(vae: AutoencoderKL, samples: Pictures, values: dict[str, Tensor], most: int = 8) -> list[dict]:
    """The pictures of the lowest PSNR, worst first: `{key, psnr, x, y}`."""
    found = []
    for i in values["psnr"].argsort()[:most].tolist():
        sample = samples[i]
        y = decode(vae, encode(vae, sample["x"][None].to(vae.device)))[0].float().cpu()
        found.append({"key": sample["key"], "psnr": float(values["psnr"][i]), "x": sample["x"], "y": y})
    return found
