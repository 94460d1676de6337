"""Sample grids during training: what the EMA weights draw for the configured prompts, at each validation."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch

from eqldm.anagram.render import picture_sheet
from eqldm.anagram.sampling import Sampler
from eqldm.model_folder import Networks
from eqldm.views import IDENTITY

SEEDS = (0, 1, 2, 3)


def validation_sampler(module: pl.LightningModule) -> Sampler:
    """A sampler of what is trained, as it stands: at a validation's end, the averaged weights."""
    networks = Networks(module.unet, module.tokenizer, module.text_encoder or module.frozen[1], module.scheduler)
    return Sampler(networks, module.vae, module.device)


class SampleGrid(pl.Callback):
    """Writes `RUN/samples/STEP.png`, a row for each prompt, and logs it to TensorBoard. Rank 0 only."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        prompts = module.config.sample_prompts
        if not prompts or not trainer.is_global_zero:
            return
        sampler = validation_sampler(module)
        rows = [sampler([prompt], [IDENTITY], SEEDS) for prompt in prompts]
        sheet = picture_sheet(rows, prompts, [f"seed {seed}" for seed in SEEDS])
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, pl.loggers.TensorBoardLogger):
                logger.experiment.add_images("samples", torch.cat(rows).add(1).div(2), trainer.global_step)
