"""How fast a run computes: its precision, its samples per second, the share of the device's peak."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from lightning_fabric.utilities.throughput import get_available_flops
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only

from eqldm.atomic import write_whole
from eqldm.config import RunConfig, StageConfig
from eqldm.precision import native_precision

GPUS = {"A100": (80, 312), "H100": (80, 989), "H200": (141, 989)}  # GB of memory; TFLOP/s of dense bf16, by NVIDIA's data sheets


def resolved_precision(run: RunConfig) -> str:
    """The run's precision, `auto` resolved."""
    return native_precision(run.accelerator) if run.precision == "auto" else run.precision


@rank_zero_only
def note_precision(folder: Path, precision: str) -> None:
    """Notes in the run folder what a run computes in, and says where it has gone on otherwise: `auto` depends on the device."""
    path = folder / "precision.txt"
    before = path.read_text(errors="replace").strip() if path.is_file() else precision
    if before != precision:
        print(
            f"note: run folder '{folder}' was computed in {before[:40]} until now and goes on in {precision}, which run.precision=auto is "
            "on this device: what comes of it is of neither alone. A run that is to stay in one states it",
            file=sys.stderr,
        )
    write_whole(path, lambda partial: partial.write_text(precision + "\n"))


def peak_of(device: torch.device, bf16: bool) -> float | None:
    """FLOP/s that a CUDA device computes at most, in bfloat16 or float32; None where that is not known."""
    peak: float | None = get_available_flops(device, torch.bfloat16 if bf16 else torch.float32)
    if peak is None and bf16:  # Lightning's table knows an H200 by other names than its driver gives
        name = torch.cuda.get_device_name(device)
        peak = next((1e12 * peak for known, (_, peak) in GPUS.items() if known in name), None)
    return peak


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


class Utilisation(Callback):
    """Logs `train/mfu`, the share of the device's peak that the training's own operations come to, and `train/max_memory_gb`, the most
    that tensors have taken of the device since the last log line.

    operations: floating-point operations of a step, per sample, nothing counted twice that is recomputed.
    peak: FLOP/s of one device; None: by Lightning's table of devices, or ours; where both lack the device, mfu is not logged.
    Source: model FLOPs utilisation, arXiv 2204.02311, appendix B.
    """

    def __init__(self, operations: float, peak: float | None = None):
        self.operations, self.peak = operations, peak

    def on_train_start(self, trainer, pl_module) -> None:
        device = trainer.strategy.root_device
        if self.peak is None and device.type == "cuda":
            self.peak = peak_of(device, resolved_precision(pl_module.config.run) == "bf16-mixed")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        rate = trainer.callback_metrics.get("train/samples_per_second")
        if rate is None or trainer.global_step % pl_module.config.run.log_every:
            return
        if self.peak:
            pl_module.log("train/mfu", float(rate) / trainer.world_size * self.operations / self.peak)
        device = trainer.strategy.root_device
        if device.type == "cuda":
            pl_module.log("train/max_memory_gb", torch.cuda.max_memory_allocated(device) / 1e9)
            torch.cuda.reset_peak_memory_stats(device)
