"""The Lightning data module: endless training stream that starts at the run's step, and a fixed validation set."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from eqldm.config import StageConfig, micro_batch_size
from eqldm.data.order import StreamSampler
from eqldm.data.readers import reader
from eqldm.data.samples import LatentSamples, PictureSamples
from eqldm.data.shards import read_manifest
from eqldm.data.workers import end_with_parent

TO_THE_TRAINING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # which tell it to stop


def check_image_size(config: StageConfig, folder: str, size: tuple[int, int]) -> None:
    """Raises ValueError where the pictures of a shard folder have another size, px, than data.image_size states."""
    wanted = config.data.image_size
    if wanted is not None and size != (wanted, wanted):
        raise ValueError(
            f"data.image_size={wanted}, but the pictures of '{folder}' are {size[0]} x {size[1]} px: make the shards with --size {wanted}, "
            "or state their size"
        )


READ_AS_NUMBERS = ("position", "drawn_share")


class ShardData(pl.LightningDataModule):
    """Pictures or latents, as the shards hold. Opening reads headers and fails before step 0 where data is unusable.

    Raises: FileNotFoundError, ValueError (see `ShardSet.open`, `PictureSamples`, `LatentSamples`); ValueError where the
    validation set is smaller than data.val_samples.
    """

    def __init__(self, config: StageConfig, need_captions: bool = False, vae_hash: str | None = None):
        super().__init__()
        self.config = config
        self.draws: Callable[[int], dict[str, Tensor]] | None = None  # what the readers add to each training sample, by its position
        data = config.data

        def open_shards(folder: str, seed: int | None) -> PictureSamples | LatentSamples:
            if read_manifest(folder).get("kind") == "latents" and vae_hash is not None:
                return LatentSamples(folder, seed, data.shuffle_shards, vae_hash)
            pictures = PictureSamples(folder, seed, data.shuffle_shards, need_captions)
            height, width = pictures.image_size
            check_image_size(config, folder, (height, width))
            return pictures

        self.train_samples = open_shards(data.train, config.run.seed)
        self.val_samples = open_shards(data.val, None)
        if len(self.val_samples) < data.val_samples:
            raise ValueError(f"data.val_samples={data.val_samples}, but '{data.val}' holds {len(self.val_samples)} samples")
        if len(self.train_samples) < data.batch_size:
            rank_zero_warn(
                f"data.batch_size={data.batch_size}, but '{data.train}' holds {len(self.train_samples)} samples: a step sees some of "
                "them more than once"
            )

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        """The batch there, but for what is read as numbers: reading it back would wait for all that a GPU has still to compute."""
        read = {name: batch[name] for name in READ_AS_NUMBERS if name in batch}
        rest = {name: value for name, value in batch.items() if name not in read}
        return {**super().transfer_batch_to_device(rest, device, dataloader_idx), **read}

    def train_dataloader(self) -> DataLoader:
        sampler = StreamSampler(
            self.config.data.batch_size,
            micro_batch_size(self.config),
            self.trainer.global_rank,
            self.trainer.world_size,
            start_step=self.trainer.global_step,
        )
        return self._loader(WithDraws(self.train_samples, self.draws) if self.draws else self.train_samples, sampler)

    def val_dataloader(self) -> DataLoader:
        mine = range(self.trainer.global_rank, self.config.data.val_samples, self.trainer.world_size)
        return self._loader(self.val_samples, BatchSampler(mine, micro_batch_size(self.config), drop_last=False))

    def _loader(self, samples, sampler) -> DataLoader:
        workers = self.config.data.num_workers
        return reader(
            samples,
            sampler,
            workers,
            start=leave_signals_to_the_training,
            deaf=TO_THE_TRAINING,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


@dataclass(frozen=True)
class WithDraws:
    """Samples, and what is drawn for each position."""

    samples: PictureSamples | LatentSamples
    draws: Callable[[int], dict[str, Tensor]]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> dict:
        return {**self.samples[position], **self.draws(position)}


def leave_signals_to_the_training(worker: int) -> None:
    """Of a reader process: it reads on when Ctrl-C or a scheduler tells the whole process group to stop, for the step at hand needs it.

    It ends with the training process, and when that says so, by SIGTERM if need be, which it obeys from that process alone.
    """
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before there is another thread that would obey it
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    else:  # macOS does not tell who has sent a signal
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


class SkippedReport(pl.Callback):
    """Counts the unreadable pictures and reports them at the end of each epoch of the data, and of the run."""

    def __init__(self) -> None:
        self.skipped: set[str] = set()
        self.count = 0  # not of the keys, which tars may share
        self.epoch = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        # Read off process 0's first position: processes that straddle the end of an epoch must all report, or none
        first = int(batch["position"][0]) - trainer.global_rank * len(batch["position"])
        epoch = first // len(trainer.datamodule.train_samples)
        if epoch != self.epoch:
            self._report(pl_module, trainer)
            self.epoch = epoch
        self.skipped.update(batch["skipped"])
        self.count += sum(batch["replaced"])  # an epoch comes to each picture's own place once

    def on_train_end(self, trainer, pl_module) -> None:
        self._report(pl_module, trainer)

    def _report(self, pl_module, trainer) -> None:
        count = self.count
        if trainer.world_size > 1:
            count = int(trainer.strategy.reduce(torch.tensor(float(count), device=pl_module.device), reduce_op="sum"))
        if count:
            shown = ", ".join(sorted(self.skipped)[:5])
            rank_zero_warn(f"epoch {self.epoch}: {count} unreadable pictures were skipped (here: {shown})")
        for logger in trainer.loggers:
            logger.log_metrics({"data/skipped": count}, step=trainer.global_step)
        self.skipped, self.count = set(), 0
