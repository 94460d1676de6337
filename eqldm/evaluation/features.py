"""Features that distances between pictures are measured on, each under a name, for distances of different features do not compare.

judge       the glyph judge's, before its last layer
inception   InceptionV3's pool of 2048, from the weights that FID is defined with (torch-fidelity)
NAME        any timm backbone's pooled ones: `--features NAME=WEIGHTS`
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from torch import Tensor
from torchvision.transforms.functional import InterpolationMode, center_crop, normalize, resize

from eqldm.data.samples import to_bytes
from eqldm.evaluation.judge import Judge
from eqldm.model_folder import weights_hash
from eqldm.weights import read_weights


@dataclass(frozen=True)
class Features:
    """`extract(x)` gives [B, D] float32 (CPU) of pictures x [B, 3, H, W] in [-1, 1].

    name: that metrics bear.  hash: of the weights.
    """

    name: str
    hash: str
    extract: Callable[[Tensor], Tensor]


def torch_fidelity(module: str):
    """A module of torch-fidelity, imported where it is used: a training that looks at its letters needs none of it.

    Raises ValueError where it is not installed."""
    try:
        return importlib.import_module(f"torch_fidelity.{module}")
    except ModuleNotFoundError as error:
        raise ValueError("distances between pictures need torch-fidelity, which is not installed: pip install torch-fidelity") from error


def judge_features(judge: Judge) -> Features:
    """The judge's."""
    return Features("judge", judge.hash, lambda x: judge.features(x.cpu()).float())


def inception_features(weights: Path | None = None, device: str | torch.device = "cpu") -> Features:
    """InceptionV3's. weights: torch-fidelity's file; None is where torch's hub keeps it.

    Raises FileNotFoundError, with the way to get it; ValueError where the file holds something else.
    Source: FID, arXiv 1706.08500.
    """
    theirs = torch_fidelity("feature_extractor_inceptionv3")
    url = theirs.URL_INCEPTION_V3
    path = Path(weights or Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name)
    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights at '{path}': get {url}, and put it there or give --inception FILE")
    read_weights(path)  # a file that is more than tensors is refused here, for the library would run it
    try:
        network = theirs.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path)).to(device)
    except RuntimeError as error:
        raise ValueError(f"'{path}' holds no weights of torch-fidelity's InceptionV3") from error
    return Features("inception", weights_hash(network), lambda x: network(to_bytes(x).to(device))[0].float().cpu())


def timm_features(name: str, weights: Path, device: str | torch.device = "cpu") -> Features:
    """Those of a timm backbone, pooled, of pictures at the size that it was trained at.

    Raises ValueError where timm knows no such model, or the weights are another's; FileNotFoundError.
    """
    if not timm.is_model(name):
        raise ValueError(
            f"--features: timm knows no model '{name}'; near: {', '.join(get_close_matches(name, timm.list_models())) or 'none'}"
        )
    if not Path(weights).is_file():
        raise FileNotFoundError(f"--features: no weights of '{name}' at '{weights}'")
    network = timm.create_model(name, pretrained=False)
    try:
        network.load_state_dict(read_weights(weights), strict=True)
    except RuntimeError as error:
        raise ValueError(f"'{weights}' holds no weights of timm's '{name}': {str(error).splitlines()[1].strip()[:200]}") from error
    network.reset_classifier(0)
    network = network.to(device).eval().requires_grad_(False)
    config = timm.data.resolve_model_data_config(network)
    side, mean, std = config["input_size"][-1], config["mean"], config["std"]

    @torch.no_grad()
    def extract(x: Tensor) -> Tensor:
        x = center_crop(resize(x.to(device), side, InterpolationMode.BICUBIC, antialias=True), [side, side])
        return network(normalize(x.clamp(-1, 1) / 2 + 0.5, mean, std)).float().cpu()

    return Features(name.replace(".", "_"), weights_hash(network), extract)
