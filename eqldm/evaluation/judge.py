"""The judge: a small classifier (timm) that reads letters. Trained on glyphs, never used in training the models."""

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

from eqldm.config import JudgeConfig
from eqldm.data.module import ShardData
from eqldm.data.order import position_generator
from eqldm.model_folder import replace_folder
from eqldm.training.callbacks import check_finite
from eqldm.training.run_folder import finish_run, finished_model, prepare_run
from eqldm.training.trainer import make_optimizer, make_schedule, make_trainer

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SHIPPED = Path(__file__).parents[1] / "pretrained" / "glyphs-judge"


class JudgeTraining(pl.LightningModule):
    """Trains the classifier on slightly turned and noisy glyphs. Batches: `{x: [B, 3, H, W] in [-1, 1], label: [B]}`."""

    def __init__(self, config: JudgeConfig, network: nn.Module):
        super().__init__()
        self.config, self.network = config, network

    def configure_optimizers(self):
        optimizer = make_optimizer(self.network.parameters(), self.config.optimizer)
        return [optimizer], [{"scheduler": make_schedule(optimizer, self.config), "interval": "step"}]

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        x = torch.stack([self._augment(x, p) for x, p in zip(batch["x"], batch["position"].tolist())])
        loss = F.cross_entropy(self.network(x).float(), batch["label"])
        check_finite({"loss": loss.detach()}, self.trainer.global_step, batch["key"])
        self.log("train/loss", loss.detach(), prog_bar=True)
        return loss

    def _augment(self, x: Tensor, position: int) -> Tensor:
        generator = position_generator(self.config.run.seed, position, "augment")
        angle = (2 * float(torch.rand((), generator=generator)) - 1) * self.config.rotation_degrees
        edge = x[:, :2].mean((1, 2)).tolist()
        x = rotate(x, angle, InterpolationMode.BILINEAR, fill=edge)
        return x + self.config.noise * torch.randn(x.shape, generator=generator).to(x)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        right = (self.network(batch["x"]).argmax(1) == batch["label"]).float()
        self.log("val/accuracy", right.mean(), batch_size=len(right), sync_dist=True, prog_bar=True)


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
    network = timm.create_model(config.architecture, num_classes=len(LETTERS), **args)
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
    """`judge(x)` reads pictures [B, 3, H, W] in [-1, 1]: [B] label numbers, 0 for A. Resizes to its own picture size."""

    def __init__(self, network: nn.Module, image_size: int):
        self.network, self.image_size = network.eval(), image_size

    @classmethod
    def open(cls, folder: str | Path | None = None) -> Judge:
        """The judge of a folder; None is the shipped one. Raises FileNotFoundError."""
        folder = Path(folder or SHIPPED)
        if not (folder / "model.safetensors").is_file():
            raise FileNotFoundError(f"'{folder}' holds no judge: train one with python train.py configs/glyphs/judge.yaml")
        about = json.loads((folder / "config.json").read_text())
        network = timm.create_model(about["architecture"], num_classes=len(LETTERS), **about["args"])
        weights = load_file(folder / "model.safetensors")
        network.load_state_dict({n: w.float() if w.is_floating_point() else w for n, w in weights.items()}, strict=True)
        return cls(network, about["image_size"])

    @torch.no_grad()
    def __call__(self, x: Tensor, batch_size: int = 256) -> Tensor:
        if x.shape[-1] != self.image_size:
            x = F.interpolate(x, (self.image_size, self.image_size), mode="bilinear", antialias=True)
        return torch.cat([self.network(part).argmax(1) for part in x.split(batch_size)])
