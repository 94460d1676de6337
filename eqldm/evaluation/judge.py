"""The judge: a small classifier (timm) that reads letters. Trained on glyphs, never used in training the models.

It has a 27th answer, "no letter", learnt from glyphs turned by the symmetries of the square: a turned R is no R, nor any other
letter. `READS_AS` names the turned letters that are letters (H, N as Z, M as W), and `UNCERTAIN` those that readers disagree
on, which training leaves out. (Left to find the lookalikes by itself, the judge tells them by the font's small asymmetries, and
refuses a third of the upright Os.)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytorch_lightning as pl
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, rotate

from eqldm.atomic import replace_folder
from eqldm.config import JudgeConfig
from eqldm.data.module import ShardData
from eqldm.data.order import position_generator
from eqldm.model_folder import PRETRAINED, weights_hash
from eqldm.training.callbacks import check_finite
from eqldm.training.run_folder import finish_run, finished_model, prepare_run
from eqldm.training.trainer import make_optimizer, make_schedule, make_trainer
from eqldm.views import D4

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_LETTER = len(LETTERS)  # the label of what is none of them
ANSWERS = LETTERS + "-"  # how reports write the labels
READS_AS = {  # symmetry: {letter: the letter that it reads as when turned by it}
    "rotate_90": dict(zip("NOXZ", "ZOXN")),
    "rotate_180": dict(zip("HIMNOSWXZ", "HIWNOSMXZ")),
    "rotate_270": dict(zip("NOXZ", "ZOXN")),
    "mirror": dict(zip("AHIMOTUVWXY", "AHIMOTUVWXY")),
    "transpose": dict(zip("OX", "OX")),
    "flip": dict(zip("BCDEHIKMOWX", "BCDEHIKWOMX")),
    "anti_transpose": dict(zip("LOX", "LOX")),
}
UNCERTAIN = {  # symmetry: letters that may or may not read as a letter when turned by it, by face
    "rotate_90": "CHI",
    "rotate_270": "HIU",
    "mirror": "JL",
    "transpose": "CHIU",
    "flip": "G",
    "anti_transpose": "CHIU",
}
SHIPPED = PRETRAINED / "glyphs-judge"


def turned_label(label: int, symmetry: str) -> int | None:
    """The label of a letter turned by a symmetry of the square: a letter's, `NO_LETTER`, or None where readers disagree."""
    letter = LETTERS[label]
    if letter in UNCERTAIN.get(symmetry, ""):
        return None
    reading = READS_AS[symmetry].get(letter)
    return NO_LETTER if reading is None else LETTERS.index(reading)


class JudgeTraining(pl.LightningModule):
    """Trains the classifier on slightly turned and noisy glyphs. Batches: `{x: [B, 3, H, W] in [-1, 1], label: [B]}`."""

    def __init__(self, config: JudgeConfig, network: nn.Module):
        super().__init__()
        self.config, self.network = config, network

    def configure_optimizers(self):
        optimizer = make_optimizer(self.network.parameters(), self.config.optimizer)
        return [optimizer], [{"scheduler": make_schedule(optimizer, self.config), "interval": "step"}]

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        pairs = zip(batch["x"], batch["label"].tolist(), batch["position"].tolist())
        pictures, labels = zip(*(self._augment(x, label, position) for x, label, position in pairs))
        loss = F.cross_entropy(self.network(torch.stack(pictures)).float(), torch.tensor(labels, device=self.device))
        check_finite({"loss": loss.detach()}, self.trainer.global_step, batch["key"])
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def _augment(self, x: Tensor, label: int, position: int) -> tuple[Tensor, int]:
        """The picture turned a little and noisy; at times (`turned_share`) also turned by a symmetry, with its label then."""
        generator = position_generator(self.config.run.seed, position, "augment")
        angle = (2 * float(torch.rand((), generator=generator)) - 1) * self.config.rotation_degrees
        edge = x[:, :2].mean((1, 2)).tolist()
        x = rotate(x, angle, InterpolationMode.BILINEAR, fill=edge)
        if float(torch.rand((), generator=generator)) < self.config.turned_share:
            view = D4[int(torch.randint(1, len(D4), (), generator=generator))]
            if (reading := turned_label(label, view.name)) is not None:
                x, label = view(x), reading
        return x + self.config.noise * torch.randn(x.shape, generator=generator).to(x), label

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """`val/accuracy` on upright letters; `val/turned_accuracy` on all their turned forms that readers agree on."""
        labels = batch["label"].tolist()
        right = (self.network(batch["x"]).argmax(1) == batch["label"]).float()
        self.log("val/accuracy", right.mean(), batch_size=len(labels), sync_dist=True, prog_bar=True)
        turned = [(view(x), turned_label(label, view.name)) for view in D4[1:] for x, label in zip(batch["x"], labels)]
        pictures, wanted = zip(*((picture, label) for picture, label in turned if label is not None))
        right = (self.network(torch.stack(pictures)).argmax(1) == torch.tensor(wanted, device=self.device)).float()
        self.log("val/turned_accuracy", right.mean(), batch_size=len(wanted), sync_dist=True)


def train_judge(config: JudgeConfig) -> Path:
    """Trains the judge, or resumes; writes `RUN/model` and returns it. Raises as the other stages, and ValueError where
    the pictures carry no labels."""
    if done := finished_model(config):
        return done
    data = ShardData(config)
    for folder, samples in ((config.data.train, data.train_samples), (config.data.val, data.val_samples)):
        if samples[0]["label"] < 0:
            raise ValueError(f"data set '{folder}' has no labels: the judge learns from glyph shards (data/glyphs.py)")
    torch.manual_seed(config.run.seed)
    args = dict(config.architecture_args)
    network = timm.create_model(config.architecture, num_classes=len(ANSWERS), **args)
    module = JudgeTraining(config, network)
    checkpoint = prepare_run(config)
    trainer = make_trainer(config, automatic_accumulation=True)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    folder = Path(config.run.dir) / "model"
    if trainer.is_global_zero:
        about = {"architecture": config.architecture, "args": args, "image_size": data.train_samples.image_size[0]}
        save_judge(folder, module.network, about)
        finish_run(config)
    trainer.strategy.barrier()
    return folder


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
