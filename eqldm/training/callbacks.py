"""Callbacks of every run: seeds, NaN guard, checkpoints."""

from __future__ import annotations

import signal
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from eqldm.atomic import whole
from eqldm.config import RunConfig
from eqldm.data.order import position_seed
from eqldm.training import stopping
from eqldm.training.checkpoints import LAST, check_numbers, learnt, link_checkpoint, read_checkpoint, step_checkpoint, written
from eqldm.training.identity import ID, stamp
from eqldm.training.records import not_finite


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written beside their name, then renamed; loaded with `weights_only=True`.

    A killed process or a full disk leaves the last whole checkpoint in place.
    """

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        with written(path), whole(path, durable=True) as partial, open(partial, "wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path, map_location=None, weights_only=None):
        checkpoint = read_checkpoint(Path(path))
        check_numbers(Path(path), learnt(checkpoint))
        return checkpoint


class SaveLast(Checkpoint):
    """Saves `last.ckpt` every `checkpoint_every` optimizer steps and at the last one, in the place of the one before; those of every
    `keep_every` steps are kept besides, one file under two names (`step-000002000.ckpt`).

    SIGINT, SIGTERM and SIGUSR1, sent to any of the processes, end the run after its current optimizer step (and the validation that is due
    there) with a checkpoint and the exit status of `stopping.status`. An error between two steps, of a validation or of the data, leaves
    one too (not of ZeRO, whose processes save together).

    A `Checkpoint`, so Lightning calls it after all other callbacks: the saved EMA has seen the step.
    folder: of the run.  micro_batches: of an optimizer step, in one process.
    """

    def __init__(self, folder: Path, run: RunConfig, micro_batches: int):
        self.folder, self.every, self.keep_every, self.micro_batches = folder, run.checkpoint_every, run.keep_every, micro_batches
        self.sharded = run.strategy.startswith("zero")
        self.seen_step: int | None = None
        self.saved_step: int | None = None
        self.between_steps = True
        self.told: signal.Signals | None = None
        self.stamp: dict[str, Any] = {}

    def setup(self, trainer, pl_module, stage) -> None:
        if trainer.is_global_zero:  # it alone writes. Here, once: a record that goes away under a run must cost it no step
            self.stamp = stamp(self.folder, pl_module.config)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        # All that is looked at when it is read: it must not take the place of one that can be used
        _refuse(not_finite(learnt(checkpoint)), checkpoint["global_step"])
        checkpoint[ID] = self.stamp

    def on_load_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        # Lightning accumulates, validates and logs by its counts of batches and steps: state them as at the end of the checkpoint's step,
        # in the micro-batches of this run, which may be others than those of the run that it resumes
        batches = checkpoint["global_step"] * self.micro_batches
        loops = checkpoint["loops"]["fit_loop"]
        for count in (loops["epoch_loop.batch_progress"]["total"], loops["epoch_loop.batch_progress"]["current"]):
            count.update(ready=batches, started=batches, processed=batches, completed=batches - 1)
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = checkpoint["global_step"] - 1

    def on_train_start(self, trainer, pl_module) -> None:
        self.seen_step = self.saved_step = trainer.global_step  # after a resumption, do not save the same step again
        if threading.current_thread() is threading.main_thread():  # no other may; Lightning puts the old handlers back
            for number in stopping.SIGNALS:
                signal.signal(number, partial(self._tell, trainer.is_global_zero))

    def _tell(self, aloud: bool, number: int, frame) -> None:
        self.told = self.told or signal.Signals(number)
        if number == signal.SIGINT:
            stopping.let_a_second_end_it()
            if aloud:
                stopping.say("\nCtrl-C: after the step at hand a checkpoint is saved; another one ends the run at once, without")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self.seen_step:  # a micro-batch that completes no step
            return
        self.seen_step, self.between_steps = step, True

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        # Here, where the step before is validated and logged: at its end these rows of the log would be lost with the process
        if self.between_steps:
            self.between_steps = False
            self._save_if_due(trainer)
            self._end_if_told(trainer, "the same command goes on from there")

    def on_train_end(self, trainer, pl_module) -> None:
        self._save_if_due(trainer)
        self._end_if_told(trainer, "the same command exports the model")

    def on_fit_end(self, trainer, pl_module) -> None:
        self._end_if_told(trainer, "the same command exports the model")  # since the last step's end

    def on_exception(self, trainer, pl_module, exception) -> None:
        # A validation that fails, or a reader: no step is lost to it. Process 0 writes, without waiting for others, who may be elsewhere
        step = trainer.global_step
        here = self.between_steps and self.saved_step not in (None, step) and trainer.is_global_zero
        if not here or self.sharded or not isinstance(exception, Exception):
            return
        try:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
            _flush(trainer)
            trainer.strategy.save_checkpoint(checkpoint, self.folder / LAST)
        except (OSError, RuntimeError, FloatingPointError) as error:
            print(f"note: no checkpoint of step {step} was saved ({error})", file=sys.stderr, flush=True)
        else:
            without = ", and leaves out the validation that failed" if trainer.validating else ""
            print(f"stopped at step {step} by an error, with a checkpoint: the same command goes on from there{without}", file=sys.stderr)

    def _save_if_due(self, trainer) -> None:
        step = trainer.global_step
        if step != self.saved_step and (step % self.every == 0 or step == trainer.max_steps):
            self._save(trainer, step)

    def _end_if_told(self, trainer, then: str) -> None:
        told, step = int(self.told or 0), trainer.global_step
        if trainer.world_size > 1:  # all must stop at one step, and with one status; a process alone need not wait for its GPU
            here = torch.tensor(told, device=trainer.strategy.root_device)
            told = int(trainer.strategy.reduce(here, reduce_op="max"))
        if not told:
            return
        if step != self.saved_step:
            self._save(trainer, step)
        by = signal.Signals(told)
        words = f"at step {step}, with a checkpoint: {then}" if step else "before the first step: nothing to save"
        rank_zero_only(print)(f"stopped by {by.name} {words}", flush=True)
        raise SystemExit(stopping.status(by))

    def _save(self, trainer, step: int) -> None:
        _refuse(not_finite(dict(trainer.lightning_module.named_parameters())), step)
        self.saved_step, last = step, self.folder / LAST
        _flush(trainer)
        if not self.keep_every or step % self.keep_every:
            trainer.save_checkpoint(last)
            return
        kept = self.folder / step_checkpoint(step)
        trainer.save_checkpoint(kept)
        if trainer.is_global_zero:
            link_checkpoint(kept, last)
        trainer.strategy.barrier()


def _flush(trainer) -> None:
    for logger in trainer.loggers:  # a run that is killed goes on from here, with the log of until here
        logger.save() if isinstance(logger, CSVLogger) else logger.experiment.flush()


def _refuse(broken: str | None, step: int) -> None:
    if broken:
        raise FloatingPointError(
            f"weights are not finite after step {step}, such as {broken}: they are not saved, and the last checkpoint is kept. "
            "Try a lower optimizer.learning_rate or run.precision=32-true, in another run.dir"
        )


class StepSeed(Callback):
    """Seeds the global generators from (seed, step, rank), for whatever a network draws by itself, such as dropout."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        torch.manual_seed(position_seed(pl_module.config.run.seed, int(batch["position"][0]), "global"))


class GradientGuard(Callback):
    """The NaN guard and the clipping of automatic optimization: a gradient that is not finite never reaches the weights.

    It clips, and not Lightning, which refuses to clip for a fused optimizer under mixed precision. The losses of the step's micro-batches,
    a module's `unchecked`, are looked at with the norm, once: a GPU is waited for in between.
    """

    def __init__(self, clip_norm: float):
        self.clip_norm = clip_norm
        self.keys: list[str] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.keys = batch["key"]

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not pl_module.automatic_optimization:
            return
        unchecked = getattr(pl_module, "unchecked", None) or Unchecked()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if parameters:  # under ZeRO there are none here
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            unchecked.add({"grad_norm": norm}, self.keys)
        unchecked.check(trainer.global_step)
        if parameters:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
            pl_module.log("train/grad_norm", norm)


class Unchecked:
    """Loss terms of a step's micro-batches that are still to be looked at, each with the batch's keys."""

    def __init__(self) -> None:
        self.terms: list[tuple[dict[str, Tensor], list[str]]] = []

    def add(self, terms: dict[str, Tensor], keys: list[str]) -> None:
        self.terms.append(({name: value.detach() for name, value in terms.items()}, keys))

    def check(self, step: int) -> None:
        """Forgets them. Raises FloatingPointError, as `check_finite`, of the first that are not finite."""
        terms, self.terms = self.terms, []
        if terms and not _finite([value for each, _ in terms for value in each.values()]):
            for each, keys in terms:
                check_finite(each, step, keys)


def _finite(values: list[Tensor]) -> bool:
    """Whether all are: one wait for a GPU, not one a value."""
    return bool(torch.stack([value.detach().isfinite().all() for value in values]).all())


def check_finite(losses: dict[str, Tensor], step: int, keys: list[str]) -> None:
    """The NaN guard. Raises FloatingPointError with the step, the loss terms and the batch's keys, unless all are finite."""
    if not _finite(list(losses.values())):
        terms = ", ".join(f"{name} = {float(value.detach()):.4g}" for name, value in losses.items())
        raise FloatingPointError(
            f"loss is not finite at step {step}: {terms}. Batch: {', '.join(keys)}. The last checkpoint is kept. "
            "Try a lower optimizer.learning_rate or run.precision=32-true, in another run.dir"
        )
