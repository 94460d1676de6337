"""Letters sampled and read during training, at each validation: how quality grows with steps."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl

from eqldm.anagram.preview import validation_sampler
from eqldm.config import DiffusionConfig
from eqldm.data.remote import is_remote
from eqldm.data.samples import PictureSamples
from eqldm.data.shards import ShardSet, read_manifest
from eqldm.evaluation.features import judge_features
from eqldm.evaluation.generation import generation_metrics, letter_prompts, plain_letters
from eqldm.evaluation.judge import Judge
from eqldm.evaluation.quality import RealData, RealPictures
from eqldm.evaluation.sampled import Sampled
from eqldm.evaluation.work import measure_all
from eqldm.views import IDENTITY

NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 20, 5.0  # as python -m eqldm.evaluate samples by default


class LetterMonitor(pl.Callback):
    """Logs `val/generation/...` of the EMA weights, the same code, letters and seeds as the evaluation's.

    Rank 0 samples while the others wait, at most for the process group's timeout: keep val_letters to some seconds' work there.
    Raises ValueError where the validation set's pictures, which samples are held against, cannot be found.
    """

    def __init__(self, config: DiffusionConfig):
        self.config, self.folder = config, config.data.val
        manifest = read_manifest(self.folder)
        if manifest.get("kind") == "latents":
            pictures: str | None = manifest.get("pictures")
            known = pictures and (is_remote(pictures) or Path(pictures).is_dir())
            if not pictures or not known or pictures.lower().startswith("pipe:"):  # a manifest must not say what is executed here
                raise ValueError(
                    f"val_letters={config.val_letters} needs the pictures of data.val, but '{pictures}', which its latents were "
                    "made of, is not there (or a command): bring it back, or set val_letters=0"
                )
            self.folder = pictures
            if is_remote(pictures):
                ShardSet.open(pictures)  # where it cannot be read, each process says so, now

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        self.judge, samples = Judge.open(), PictureSamples(self.folder)
        self.features = [judge_features(self.judge)]
        count = min(len(samples), self.config.data.val_samples)
        self.real = RealPictures.of(RealData(samples, count, self.features, self.judge).measure(range(count)))
        validation_sampler(module).check_length(["the letter A"])

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        wanted = plain_letters(self.config.val_letters)
        sampled = Sampled(
            "generation", validation_sampler(module), [IDENTITY], letter_prompts(wanted), wanted=wanted, judge=self.judge,
            features=self.features, num_inference_steps=NUM_INFERENCE_STEPS, guidance_scale=GUIDANCE_SCALE,
        )  # fmt: skip
        metrics = generation_metrics(measure_all(sampled), self.real, wanted).metrics
        module.log_dict({f"val/{name}": value for name, value in metrics.items()}, rank_zero_only=True)
