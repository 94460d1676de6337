"""The judge: a small classifier (timm) that reads letters, or answers that there is none. Trained on glyphs, never used in training the
models; how, is in `judge_training`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eqldm.atomic import replace_folder
from eqldm.model_folder import PRETRAINED, weights_hash

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_LETTER = len(LETTERS)  # the label of what is none of them
ANSWERS = LETTERS + "-"  # how reports write the labels
SHIPPED = PRETRAINED / "glyphs-judge"


def save_judge(folder: Path, network: nn.Module, about: dict) -> None:
    """Write `config.json` and `model.safetensors` (float16), beside their folder's name, then renamed."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    weights = {name: w.half() if w.is_floating_point() else w for name, w in network.cpu().state_dict().items()}
    save_file({name: w.contiguous() for name, w in weights.items()}, partial / "model.safetensors")
    replace_folder(folder, partial)


class Judge:
    """`judge(x)` reads pictures [B, 3, H, W] in [-1, 1]: [B] label numbers, 0 for A, `NO_LETTER` for none. Resizes to its own size."""

    def __init__(self, network: nn.Module, image_size: int):
        self.network, self.image_size = network.eval(), image_size

    @classmethod
    def open(cls, folder: str | Path | None = None) -> Judge:
        """The judge of a folder; None is the shipped one. Raises FileNotFoundError."""
        folder = Path(folder or SHIPPED)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"'{folder}' holds no judge: train one with python train.py configs/glyphs/judge.yaml")
        about = json.loads((folder / "config.json").read_text())
        if not {"architecture", "args", "image_size"} <= about.keys():
            raise ValueError(f"'{folder}' holds another kind of model, no judge: train one with python train.py configs/glyphs/judge.yaml")
        network = timm.create_model(about["architecture"], num_classes=len(ANSWERS), **about["args"])
        weights = load_file(folder / "model.safetensors")
        answers = len(weights[network.default_cfg["classifier"] + ".weight"])
        if answers != len(ANSWERS):
            raise ValueError(f"the judge in '{folder}' knows {answers} answers, wanted {len(ANSWERS)} (A-Z and none): train it anew")
        network.load_state_dict({n: w.float() if w.is_floating_point() else w for n, w in weights.items()}, strict=True)
        return cls(network, about["image_size"])

    @property
    def hash(self) -> str:
        """16 hex digits that change with its weights, and with the size that it reads at."""
        return weights_hash(self.network, str(self.image_size))

    @torch.no_grad()
    def __call__(self, x: Tensor, batch_size: int = 256) -> Tensor:
        return torch.cat([self.network(part).argmax(1) for part in self._sized(x).split(batch_size)])

    @torch.no_grad()
    def probabilities(self, x: Tensor, batch_size: int = 256) -> Tensor:
        """[B, 27] of pictures [B, 3, H, W] in [-1, 1]; the last is that of no letter."""
        return torch.cat([self.network(part).float().softmax(1) for part in self._sized(x).split(batch_size)])

    def worst_view(self, faces: Sequence[Tensor], labels: Sequence[Tensor | int]) -> Tensor:
        """[B] probability of the wanted letter in the view that shows it worst. faces: for each view pictures [B, 3, H, W] as it shows
        them.  labels: for each view that of all, or [B]."""
        found = [self.probabilities(x) for x in faces]
        wanted = [torch.as_tensor(label).expand(len(each)) for each, label in zip(found, labels)]
        return torch.stack([each.gather(1, label[:, None])[:, 0] for each, label in zip(found, wanted)]).amin(0)

    @torch.no_grad()
    def features(self, x: Tensor, batch_size: int = 256) -> Tensor:
        """[B, D] pooled features before the last layer: what KID and FID of glyphs are measured on."""
        network = self.network
        parts = self._sized(x).split(batch_size)
        return torch.cat([network.forward_head(network.forward_features(part), pre_logits=True) for part in parts])

    def _sized(self, x: Tensor) -> Tensor:
        if x.shape[-1] == self.image_size:
            return x
        return F.interpolate(x, (self.image_size, self.image_size), mode="bilinear", antialias=True)
