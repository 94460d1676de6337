"""The run folder and the Lightning trainer that every training stage shares.

A run folder holds `config.yaml`, `command.txt`, `versions.json`, `git.txt` and `git.diff` (where there is a repository),
`logs/` (CSV and TensorBoard), `checkpoints/last.ckpt` and, at the end, the exported model under `model/` and `done.json`.
The same command resumes: it finds `last.ckpt`, checks that the options are the same, and goes on at its step; of a run that
is done it gives the model at once.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import Callback, Checkpoint, EMAWeightAveraging, LearningRateMonitor, RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from eqldm.config import OptimizerConfig, StageConfig, accumulation, to_yaml
from eqldm.data.module import SkippedReport
from eqldm.data.order import position_seed
from eqldm.data.shards import write_json

# May differ between the start of a run and its resumption: where and how long it runs, not what it computes.
RESUMABLE = ("run.num_steps", "run.devices", "run.num_nodes", "run.accelerator", "run.log_every", "run.val_every",
             "run.checkpoint_every", "run.dir", "data.num_workers", "data.micro_batch_size")  # fmt: skip
LAST = Path("checkpoints") / "last.ckpt"
DONE = "done.json"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written beside their name, then renamed; loaded with `weights_only=True`.

    A killed process or a full disk leaves the last whole checkpoint in place.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            partial.unlink(missing_ok=True)
            raise OSError(
                f"checkpoint '{path}' could not be written ({error}). The one before it is kept: make room and start the same command again"
            ) from error
        os.replace(partial, path)

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


class SaveLast(Checkpoint):
    """Saves `last.ckpt` every so many optimizer steps and at the last one; only the newest is kept.

    A `Checkpoint`, so Lightning calls it after all other callbacks: the saved EMA has seen the step.
    micro_batches: of an optimizer step, in one process.
    """

    def __init__(self, path: Path, every: int, micro_batches: int):
        self.path, self.every, self.micro_batches, self.saved_step = path, every, micro_batches, None

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        # Lightning accumulates and validates by its count of batches: state it in the micro-batches of this run, which
        # may be others than those of the run that it resumes
        batches = checkpoint["global_step"] * self.micro_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for count in (progress["total"], progress["current"]):
            count.update(ready=batches, started=batches, processed=batches, completed=batches - 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if due and step > 0 and step != self.saved_step:
            self.saved_step = step
            trainer.save_checkpoint(self.path)

    def on_train_start(self, trainer, pl_module) -> None:
        self.saved_step = trainer.global_step  # after a resumption, do not save the same step again


class EMA(EMAWeightAveraging):
    """Lightning's EMA; its weights also take over where a resumed run has no step left to train, only to export."""

    def on_fit_end(self, trainer, pl_module) -> None:
        self.on_train_end(trainer, pl_module)


class Throughput(Callback):
    """Logs `train/samples_per_second`, over all processes; prints a line of progress where no bar can be drawn."""

    def __init__(self, config: StageConfig):
        self.config, self.start, self.start_step = config, 0.0, 0

    def on_train_start(self, trainer, pl_module) -> None:
        self.start, self.start_step = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step % self.config.run.log_every or step == self.start_step:
            return
        now = time.perf_counter()
        rate = (step - self.start_step) * self.config.data.batch_size / (now - self.start)
        pl_module.log("train/samples_per_second", rate)
        if trainer.is_global_zero and not sys.stderr.isatty():
            loss = trainer.callback_metrics.get("train/loss", float("nan"))
            print(f"step {step}/{trainer.max_steps}  loss {float(loss):.4f}  {rate:.0f} samples/s", flush=True)
        self.start, self.start_step = now, step

    def on_validation_end(self, trainer, pl_module) -> None:
        self.start, self.start_step = time.perf_counter(), trainer.global_step  # leave validation out of the rate


class StepSeed(Callback):
    """Seeds the global generators from (seed, step, rank), for whatever a network draws by itself, such as dropout."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        torch.manual_seed(position_seed(pl_module.config.run.seed, int(batch["position"][0]), "global"))


class GradientGuard(Callback):
    """The NaN guard of automatic optimization: stops before a gradient that is not finite reaches the weights."""

    def __init__(self):
        self.keys: list[str] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.keys = batch["key"]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if pl_module.automatic_optimization and gradients:
            norm = torch.nn.utils.get_total_norm(gradients)
            check_finite({"grad_norm": norm}, trainer.global_step, self.keys)
            pl_module.log("train/grad_norm", norm)


def check_finite(losses: dict[str, Tensor], step: int, keys: list[str]) -> None:
    """The NaN guard. Raises FloatingPointError with the step, the loss terms and the batch's keys, unless all are finite."""
    if not all(bool(torch.isfinite(value).all()) for value in losses.values()):
        terms = ", ".join(f"{name} = {float(value.detach()):.4g}" for name, value in losses.items())
        raise FloatingPointError(
            f"loss is not finite at step {step}: {terms}. Batch: {', '.join(keys)}. The last checkpoint is kept; "
            "lower optimizer.learning_rate, or set run.precision=32-true, and start the same command again"
        )


def learning_rate_factor(step: int, config: OptimizerConfig, num_steps: int) -> float:
    """The learning rate at a step over its peak: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    done = min(1.0, (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps))
    shape = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.schedule]
    return 0.01 + 0.99 * shape


def make_optimizer(parameters, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with the options' learning rate, betas and weight decay."""
    return torch.optim.AdamW(parameters, lr=config.learning_rate, betas=tuple(config.betas), weight_decay=config.weight_decay)


def make_schedule(optimizer: torch.optim.Optimizer, config: StageConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning rate schedule, stepped once per optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, config.optimizer, config.run.num_steps))


def make_trainer(
    config: StageConfig,
    automatic_accumulation: bool,
    callbacks: list[Callback] = (),
    unused_parameters: bool = False,
) -> pl.Trainer:
    """The trainer of a stage, with logs, checkpoints, EMA and reports in the run folder.

    automatic_accumulation: whether Lightning accumulates and clips gradients; False for manual optimization.
    unused_parameters: whether some backward passes leave parameters out, as a generator's and a discriminator's do.
    """
    run = config.run
    folder = Path(run.dir)
    workers = run.devices * run.num_nodes
    micro = accumulation(config)
    callbacks = [
        StepSeed(),
        GradientGuard(),
        SkippedReport(),
        Throughput(config),
        LearningRateMonitor("step"),
        *callbacks,
        *([EMA(decay=config.optimizer.ema_decay)] if config.optimizer.ema_decay else []),
        SaveLast(folder / LAST, run.checkpoint_every, micro),
        RichProgressBar(refresh_rate=10 if sys.stderr.isatty() else 0),
    ]
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*barrier.*")
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")  # a late PatchGAN start
    warnings.filterwarnings("ignore", message=".*Previous log files in this directory will be deleted.*")  # see _loggers
    strategy = "ddp" if run.strategy == "auto" and workers > 1 else run.strategy
    if strategy == "ddp" and unused_parameters:
        strategy = "ddp_find_unused_parameters_true"
    automatic = {"accumulate_grad_batches": micro, "gradient_clip_val": config.optimizer.clip_norm}
    return pl.Trainer(
        accelerator=run.accelerator,
        devices=run.devices,
        num_nodes=run.num_nodes,
        strategy=strategy,
        precision=run.precision,
        max_steps=run.num_steps,
        max_epochs=-1,
        val_check_interval=run.val_every * micro,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=run.log_every,
        logger=_loggers(folder),
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **(automatic if automatic_accumulation else {}),
    )


def _loggers(folder: Path) -> list[CSVLogger | TensorBoardLogger]:
    """The CSV and TensorBoard logs of a run. A resumed run goes on with them from its checkpoint's step."""
    start = _checkpoint_step(folder / LAST) if (folder / LAST).exists() else 0
    table, rows = folder / "logs" / "metrics.csv", []
    if table.exists():
        with open(table, newline="") as file:
            rows = [row for row in csv.DictReader(file) if int(row["step"]) < start]
    logger = CSVLogger(folder / "logs", name="", version="")
    if rows:  # Lightning begins the table anew: put the rows back
        logger.experiment.metrics = rows
        logger.save()
    purge = {"purge_step": start} if start else {}
    return [logger, TensorBoardLogger(folder / "logs", name="", version="", **purge)]


def prepare_run(config: StageConfig) -> Path | None:
    """Write what a run folder states about the run; the checkpoint to resume from, or None for a fresh run.

    Raises ValueError where the folder holds a run with other options, or one that is past run.num_steps.
    """
    folder = Path(config.run.dir)
    checkpoint = folder / LAST if (folder / LAST).exists() else None
    if checkpoint:
        _check_same_options(config)
        step = _checkpoint_step(checkpoint)
        if step > config.run.num_steps:
            raise ValueError(
                f"run folder '{folder}' holds a run at step {step}, past run.num_steps={config.run.num_steps}: set at least "
                f"{step}, or use another run.dir"
            )
    _describe_run(config)
    return checkpoint


def finished_model(config: StageConfig) -> Path | None:
    """The model folder of a run that has taken all its steps and exported them; None where something is left to do.

    Raises ValueError where the folder holds a run with other options.
    """
    folder = Path(config.run.dir)
    if not (folder / DONE).exists() or not (folder / "model").is_dir():
        return None
    _check_same_options(config)
    if json.loads((folder / DONE).read_text())["num_steps"] != config.run.num_steps:
        return None
    rank_zero_only(print)(f"run folder '{folder}' has taken all of its {config.run.num_steps} steps: nothing to do")
    return folder / "model"


@rank_zero_only
def finish_run(config: StageConfig) -> None:
    """Note in the run folder that the model there holds all of the run's steps."""
    write_json(Path(config.run.dir) / DONE, {"num_steps": config.run.num_steps})


@rank_zero_only
def _describe_run(config: StageConfig) -> None:
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "config.yaml.partial"
    partial.write_text(to_yaml(config))
    os.replace(partial, folder / "config.yaml")  # other processes may be reading it
    (folder / "command.txt").write_text(" ".join([Path(sys.executable).name, *sys.argv]) + "\n")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
    _write_git_state(folder)


def _checkpoint_step(checkpoint: Path) -> int:
    return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]


def _check_same_options(config: StageConfig) -> None:
    path = Path(config.run.dir) / "config.yaml"
    changed = _differences(OmegaConf.create(path.read_text()), OmegaConf.create(to_yaml(config)))
    if changed:
        raise ValueError(
            f"run folder '{path.parent}' holds a run with other options: {'; '.join(changed)}. Use another run.dir, or "
            "remove the folder to start anew"
        )


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = ("torch", "pytorch-lightning", "diffusers", "transformers", "webdataset", "timm", "torchmetrics", "eqldm")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def _differences(old, new) -> list[str]:
    before, after = _flat(OmegaConf.to_container(old)), _flat(OmegaConf.to_container(new))
    names = [name for name in sorted(before.keys() | after.keys()) if name not in RESUMABLE]
    return [f"{n} was {before.get(n)}, is {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _write_git_state(folder: Path) -> None:
    here = Path(__file__).resolve().parents[1]
    for name, arguments in {"git.txt": ["rev-parse", "HEAD"], "git.diff": ["diff", "HEAD"]}.items():
        try:
            result = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=20)
        except FileNotFoundError:  # no git on this machine: an installed package has no commit to state
            return
        if result.returncode == 0:
            (folder / name).write_text(result.stdout)
