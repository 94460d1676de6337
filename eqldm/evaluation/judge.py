"""The judge: a small classifier (timm) that reads letters, or answers that there is none. Trained on glyphs, never used in training the
models; how, is in `judge_training`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from eqldm.atomic import told, whole_folder
from eqldm.evaluation.finite import finite
from eqldm.model_folder import PRETRAINED, check_finite, weights_hash
from eqldm.weights import read_json, read_weights

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_LETTER = len(LETTERS)  # the label of what is none of them
ANSWERS = LETTERS + "-"  # how reports write the labels
SHIPPED = PRETRAINED / "glyphs-judge"


def _count(value: Any) -> bool:
    """a whole number from 1 to 16384"""
    return type(value) is int and 1 <= value <= 16384


def _counts(value: Any) -> bool:
    """whole numbers from 1 to 16384, up to 16 of them"""
    return isinstance(value, list | tuple) and 1 <= len(value) <= 16 and all(map(_count, value))


def _share(value: Any) -> bool:
    """a number from 0 to below 1"""
    return type(value) in (int, float) and 0 <= value < 1


def _switch(value: Any) -> bool:
    """true or false"""
    return type(value) is bool


ARGUMENTS = {  # of timm.create_model that an architecture may be given: sizes
    **dict.fromkeys(("channels", "layers", "depths", "dims", "block_config"), _counts),
    **dict.fromkeys(("stem_width", "base_width", "cardinality", "growth_rate"), _count),
    **dict.fromkeys(("embed_dim", "depth", "num_heads", "patch_size", "img_size"), _count),
    **dict.fromkeys(("drop_rate", "drop_path_rate"), _share),
    "avg_down": _switch,
}


def save_judge(folder: Path, network: nn.Module, about: dict) -> None:
    """Write `config.json` and `model.safetensors` (float16). Raises NotWritten, Held."""
    weights = {name: w.half() if w.is_floating_point() else w for name, w in network.cpu().state_dict().items()}
    with told(f"judge '{folder}'"), whole_folder(folder) as partial:
        partial.mkdir()
        (partial / "config.json").write_text(json.dumps(about, indent=2) + "\n")
        save_file({name: w.contiguous() for name, w in weights.items()}, partial / "model.safetensors")


def make_network(architecture: str, args: dict[str, Any]) -> Any:
    """A random timm network with the judge's answers. A judge may come from anybody: its `config.json` may name one of timm's own
    architectures, and give it the plain arguments of `ARGUMENTS`; nothing that makes timm open a file or an address.

    Raises ValueError that names what else was given, and what timm does not take.
    """
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        models = ", ".join(get_close_matches(str(architecture), timm.list_models())) or "none"
        raise ValueError(f"architecture: timm knows no model {architecture!r}; near: {models}")
    if not isinstance(args, dict):
        raise ValueError(f"architecture_args: got {args!r}, wanted arguments by name")
    for name, value in args.items():
        if name not in ARGUMENTS:
            near = get_close_matches(str(name), ARGUMENTS, 1)
            hint = f". Did you mean {near[0]}?" if near else f": wanted some of {', '.join(ARGUMENTS)}"
            raise ValueError(f"architecture_args.{name} is no argument that a judge may have{hint}")
        if not ARGUMENTS[name](value):
            raise ValueError(f"architecture_args.{name}: got {value!r}, wanted {ARGUMENTS[name].__doc__}")
    try:
        return timm.create_model(architecture, pretrained=False, num_classes=len(ANSWERS), **args)
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError, KeyError) as error:  # what timm raises of what does not fit
        fault = " ".join(str(error).split())[:200]
        raise ValueError(f"architecture_args: timm's '{architecture}' does not take {args}: {fault}") from error


class Judge:
    """`judge(x)` reads pictures [B, 3, H, W] in [-1, 1]: [B] label numbers, 0 for A, `NO_LETTER` for none. Resizes to its own size."""

    network: Any  # of timm, whose methods `nn.Module` does not have

    def __init__(self, network: nn.Module, image_size: int):
        self.network, self.image_size = network.eval(), image_size

    @classmethod
    def open(cls, folder: str | Path | None = None) -> Judge:
        """The judge of a folder; None is the shipped one. Raises FileNotFoundError."""
        folder = Path(folder or SHIPPED)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"'{folder}' holds no judge: train one with python train.py configs/glyphs/judge.yaml")
        about = read_json(folder / "config.json")
        if not {"architecture", "args", "image_size"} <= about.keys():
            raise ValueError(f"'{folder}' holds another kind of model, no judge: train one with python train.py configs/glyphs/judge.yaml")
        try:
            network, image_size = make_network(about["architecture"], about["args"]), about["image_size"]
        except ValueError as error:
            raise ValueError(f"'{folder / 'config.json'}': {error}") from error
        if type(image_size) is not int or not 8 <= image_size <= 1024:
            raise ValueError(f"'{folder / 'config.json'}': image_size is {image_size!r}, wanted pixels from 8 to 1024")
        weights = read_weights(folder / "model.safetensors")
        answers = len(weights.get(network.default_cfg["classifier"] + ".weight", ()))
        if answers != len(ANSWERS):
            raise ValueError(f"the judge in '{folder}' knows {answers} answers, wanted {len(ANSWERS)} (A-Z and none): train it anew")
        try:
            network.load_state_dict({n: w.float() if w.is_floating_point() else w for n, w in weights.items()}, strict=True)
        except RuntimeError as error:
            fault = " ".join(str(error).split())[:200]
            raise ValueError(f"the weights in '{folder}' are not those of its config.json: {fault}") from error
        check_finite(network, folder)
        return cls(network, image_size)

    @property
    def hash(self) -> str:
        """16 hex digits that change with its weights, and with the size that it reads at."""
        return weights_hash(self.network, str(self.image_size))

    @torch.no_grad()
    def __call__(self, x: Tensor, batch_size: int = 256) -> Tensor:
        logits = torch.cat([self.network(part) for part in self._sized(x).split(batch_size)])
        return finite("the judge's logits", logits).argmax(1)  # which reads something in NaN, too

    @torch.no_grad()
    def probabilities(self, x: Tensor, batch_size: int = 256) -> Tensor:
        """[B, 27] of pictures [B, 3, H, W] in [-1, 1]; the last is that of no letter."""
        logits = torch.cat([self.network(part) for part in self._sized(x).split(batch_size)])
        return finite("the judge's logits", logits).float().softmax(1)

    def worst_view(self, faces: Sequence[Tensor], labels: Sequence[Tensor | int] | Tensor) -> Tensor:
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
