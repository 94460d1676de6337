"""The Lightning trainer of a stage, its optimizer and learning rate schedule."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, LearningRateMonitor, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy

from eqldm.atomic import NotWritten
from eqldm.config import DiffusionConfig, OptimizerConfig, StageConfig, accumulation
from eqldm.data.module import SkippedReport
from eqldm.data.readers import Reader, naming_lost_readers
from eqldm.training.averaging import EMA
from eqldm.training.callbacks import AtomicCheckpointIO, GradientGuard, SaveLast, StepSeed
from eqldm.training.checkpoints import check_fits, checkpoint_step, newest_checkpoint
from eqldm.training.heartbeat import Heartbeat, lost_others
from eqldm.training.metrics_log import resumed_table
from eqldm.training.speed import Throughput, note_precision, resolved_precision
from eqldm.training.stopping import listen, listening
from eqldm.training.zero import ZERO, AdamWEMA, ZeRO, ZeROWeights, zero_config


def learning_rate_factor(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """The learning rate at a step over its peak: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    return 0.01 + 0.99 * shape


def make_optimizer(parameters, config: OptimizerConfig, strategy: str = "auto") -> torch.optim.AdamW:
    """AdamW with the options' learning rate, betas and weight decay; under ZeRO it keeps the EMA too."""
    # Fused: on a CPU a step over a small UNet's weights otherwise takes a quarter of the time
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": tuple(config.betas), "weight_decay": config.weight_decay, "fused": True}
    if strategy in ZERO and config.ema_decay:
        return AdamWEMA(parameters, config.ema_decay, **options)
    return torch.optim.AdamW(parameters, **options)


def make_schedule(optimizer: torch.optim.Optimizer, config: StageConfig, boundary_steps: int = 0) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate schedule, stepped once per optimizer step.

    boundary_steps: optimizer steps at first in which only the first group of parameters trains, at the warmed-up peak; then the
    schedule begins, for all groups.
    """
    options, num_steps = config.optimizer, config.run.num_steps - boundary_steps

    def factor(step: int, waits: bool) -> float:
        if step >= boundary_steps:
            return learning_rate_factor(step - boundary_steps, options, num_steps)
        return 0.0 if waits else learning_rate_factor(step, replace(options, schedule="constant"), boundary_steps)

    groups = range(len(optimizer.param_groups))
    return torch.optim.lr_scheduler.LambdaLR(optimizer, [partial(factor, waits=number > 0) for number in groups])


def make_trainer(
    config: StageConfig,
    automatic_accumulation: bool,
    callbacks: Sequence[Callback] = (),
    unused_parameters: bool = False,
) -> pl.Trainer:
    """The trainer of a stage, with logs, checkpoints, EMA and reports in the run folder.

    automatic_accumulation: whether Lightning accumulates gradients; False for manual optimization.
    unused_parameters: whether some backward passes leave parameters out, as a generator's and a discriminator's do.
    """
    run = config.run
    folder = Path(run.dir)
    workers = run.devices * run.num_nodes
    micro = accumulation(config)
    averaging = [EMA(config.optimizer.ema_decay)] if config.optimizer.ema_decay else []
    if run.strategy in ZERO:
        averaging = [ZeROWeights(ema=bool(averaging))]
    callbacks = [
        *([Heartbeat(folder, run.timeout_seconds)] if workers > 1 else []),
        StepSeed(),
        GradientGuard(config.optimizer.clip_norm),
        SkippedReport(),
        Throughput(config),
        LearningRateMonitor("step"),
        *callbacks,
        *averaging,
        SaveLast(folder, run, micro),
        RichProgressBar(refresh_rate=10 if sys.stderr.isatty() else 0),
    ]
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*barrier.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")  # a late PatchGAN start
    warnings.filterwarnings("ignore", message=".*Previous log files in this directory will be deleted.*")  # see metrics_log.py
    precision = resolved_precision(run)
    note_precision(folder, precision)
    strategy, timeout = run.strategy, timedelta(seconds=run.timeout_seconds)
    if run.strategy in ZERO:
        assert isinstance(config, DiffusionConfig)  # the options of the others refuse it
        overlap = run.accelerator != "cpu" and torch.cuda.is_available()
        options = zero_config(config, precision, overlap)
        strategy, precision = ZeRO(config=options, timeout=timeout), "32-true"  # DeepSpeed autocasts by itself
    elif strategy == "ddp" or workers > 1:
        strategy = DDPStrategy(timeout=timeout, find_unused_parameters=unused_parameters, gradient_as_bucket_view=True)
    return pl.Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        num_nodes=run.num_nodes,
        strategy=strategy,
        precision=precision,
        max_steps=run.num_steps,
        max_epochs=-1,
        val_check_interval=run.val_every * micro,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=run.log_every,
        logger=_loggers(folder, run.num_steps),
        callbacks=callbacks,
        # Lightning's own requeueing would save elsewhere and twice: slurm/train.sbatch and SaveLast do it
        plugins=[AtomicCheckpointIO(), *([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else [])],
        use_distributed_sampler=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **({"accumulate_grad_batches": micro} if automatic_accumulation else {}),
    )


def fit(trainer: pl.Trainer, module: pl.LightningModule, data: pl.LightningDataModule, checkpoint: Path | None) -> None:
    """Trains to the last step, from the checkpoint where there is one.

    Raises ValueError where that is of other networks; TimeoutError, which names the process and its step, where another stands still.
    """
    if checkpoint is not None and checkpoint.is_file():  # ZeRO's shards are checked as they are read
        check_fits(checkpoint, module)
    try:
        with naming_lost_readers(Reader.option):
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except (RuntimeError, NotWritten) as error:  # torch.distributed's are of no kind of their own
        heartbeats = [callback for callback in trainer.callbacks if isinstance(callback, Heartbeat)]
        if heartbeats and (told := lost_others(error, heartbeats[0])):
            raise told from error
        raise
    if listening():
        listen("after the last step, while the model was exported: the same command exports it")


def _loggers(folder: Path, num_steps: int) -> list[CSVLogger | TensorBoardLogger]:
    """The CSV and TensorBoard logs of a run. A resumed run goes on with them from its checkpoint's step."""
    newest = newest_checkpoint(folder)
    start = checkpoint_step(newest) if newest else 0
    purge = {"purge_step": start} if start else {}
    until = start if start < num_steps else start + 1  # what is logged at the end bears the number of all steps
    return [resumed_table(folder, until), TensorBoardLogger(folder / "logs", name="", version="", **purge)]
