"""Trains the judge (stage `judge` of train.py).

Its 27th answer, "no letter", is learnt from glyphs turned by the symmetries of the square: a turned R is no R, nor any other letter.
`READS_AS` (see `lookalikes`) names the turned letters that are letters (H, N as Z, M as W), and `UNCERTAIN` those that readers disagree
on, which training leaves out. (Left to find the lookalikes by itself, the judge tells them by the font's small asymmetries, and refuses a
third of the upright Os.)
"""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, rotate

from eqldm.config import JudgeConfig
from eqldm.data.module import ShardData
from eqldm.data.order import position_generator
from eqldm.data.samples import PictureSamples
from eqldm.evaluation.judge import LETTERS, NO_LETTER, make_network, save_judge
from eqldm.evaluation.lookalikes import READS_AS, UNCERTAIN
from eqldm.training.callbacks import check_finite
from eqldm.training.machine import check_machine
from eqldm.training.run_folder import finish_run, finished_model, prepare_run
from eqldm.training.trainer import fit, make_optimizer, make_schedule, make_trainer
from eqldm.views import D4


def turned_label(label: int, symmetry: str) -> int | None:
    """The label of a letter turned by a symmetry of the square: a letter's, `NO_LETTER`, or None where readers disagree."""
    letter = LETTERS[label]
    if letter in UNCERTAIN.get(symmetry, ()):
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


def prepare_judge(config: JudgeConfig) -> tuple[JudgeTraining, ShardData]:
    """What the stage trains, as it starts, and its data. Raises as the data module, and ValueError where the pictures carry no labels."""
    data = ShardData(config)
    for folder, samples in ((config.data.train, data.train_samples), (config.data.val, data.val_samples)):
        if samples[0]["label"] < 0:
            raise ValueError(f"data set '{folder}' has no labels: the judge learns from glyph shards (data/glyphs.py)")
    torch.manual_seed(config.run.seed)
    return JudgeTraining(config, make_network(config.architecture, dict(config.architecture_args))), data


def export_judge(module: JudgeTraining, data: ShardData, folder: Path) -> None:
    """Write the judge's folder."""
    config, samples = module.config, data.train_samples
    assert isinstance(samples, PictureSamples)  # `prepare_judge` asks for no latents
    about = {"architecture": config.architecture, "args": dict(config.architecture_args), "image_size": samples.image_size[0]}
    save_judge(folder, module.network, about)


def train_judge(config: JudgeConfig) -> Path:
    """Trains the judge, or resumes; writes `RUN/model` and returns it. Raises as the other stages and `prepare_judge`."""
    if done := finished_model(config):
        return done
    check_machine(config.run)
    module, data = prepare_judge(config)
    checkpoint = prepare_run(config)
    trainer = make_trainer(config, automatic_accumulation=True)
    fit(trainer, module, data, checkpoint)
    folder = Path(config.run.dir) / "model"
    if trainer.is_global_zero:
        export_judge(module, data, folder)
        finish_run(config, trainer)
    trainer.strategy.barrier()
    return folder
