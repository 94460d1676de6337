"""Part 2 of benchmarks/gpu.py, *fast*: training steps at the size of Stable Diffusion 1.5, by the options for speed and the batch.

Each is a row of benchmarks/train_step.py: pictures/s, and the most memory that tensors take. Beside them: the networks alone, as
eqldm.budget counts them, whose time tells what of a step is spent outside of them; and AdamW's step, fused and not.
What the budget predicts comes from benchmarks/gpu_predicted.py.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from eqldm.budget import counted
from eqldm.model_folder import PRETRAINED
from eqldm.training.speed import peak_of
from gpu_parts import Item, Time, run_part
from train_step import ROWS, make_data, make_networks, make_vgg, release, row_config, train_row

TINY = ["run.accelerator=cpu", "data.num_workers=0"]
TINY_VAE = ["loss.perceptual_weight=0", "loss.discriminator_layers=1", "equivariance.permute_cells=[2]", "equivariance.rescale_prob=0"]
MEASURED_SECONDS = 4.0  # of a row, after its second step
NUM_STEPS = 36


@dataclass(frozen=True)
class Row:
    """A row of train_step.py, at a size and a batch. seconds: that it takes, with its start."""

    options: str
    size: int
    batch: int
    seconds: float = 14.0

    @property
    def name(self) -> str:
        network, _, options = self.options.partition(", ")
        return f"{network}, {self.size} px, batch {self.batch}, {options}"


BEST, COMPILED = "bf16", "bf16, channels_last, compile"
# In order of worth, but for what compiles, which comes late: nothing bounds how long that takes. Three words: the networks alone
FULL: list[Row | tuple[str, int, int]] = [
    Row(f"unet, {BEST}", 256, 64),
    Row("unet, plain", 256, 64, 20),
    Row(f"vae, {BEST}", 256, 10, 20),
    Row("vae, plain", 256, 10, 25),
    Row(f"unet, {BEST}", 512, 16),
    Row(f"unet, {BEST}", 256, 256, 18),
    Row("unet, bf16, channels_last", 256, 64),
    Row("vae, bf16, channels_last", 256, 10, 20),
    ("unet", 256, 64),
    ("vae", 256, 10),
    Row(f"unet, {BEST}", 512, 64, 18),
    Row(f"vae, {BEST}", 256, 40, 25),
    Row(f"unet, {BEST}", 256, 128),
    ("unet", 512, 16),
    Row(f"unet, {BEST}, checkpointing", 512, 64, 18),
    Row(f"unet, {COMPILED}", 256, 64, 180),  # on 16 cores it had not compiled after 100 s
    Row(f"vae, {COMPILED}", 256, 10, 120),
]
SMALL: list[Row | tuple[str, int, int]] = [Row("unet, plain", 64, 2), Row("vae, plain", 64, 2), ("unet", 64, 2), ("vae", 64, 2)]


def options_of(args: argparse.Namespace, network: str) -> list[str]:
    if not args.tiny:
        return [] if args.device == "cuda" else ["run.accelerator=cpu"]
    return [*TINY, *(TINY_VAE if network == "vae" else [])]


def measure_row(args: argparse.Namespace, row: Row, limit: Time) -> dict[str, Any]:
    """Pictures/s of a training, the device's peak in FLOP/s, and GB."""
    model, network = PRETRAINED / "glyphs-base" if args.tiny else None, row.options.split(",")[0]
    release()
    networks, vae = make_networks(model, args.device)
    steps = 4 if args.tiny else NUM_STEPS
    config = row_config(ROWS[row.options], row.size, row.batch, steps, args.scratch, model, options_of(args, network))
    make_data(config, 4 * row.batch if args.tiny else 512, vae, networks)
    if network == "vae" and not args.tiny:
        make_vgg(args.scratch / "torch")
    found = train_row(config, vae, networks, min(MEASURED_SECONDS, limit.left()))
    del networks, vae
    about = {"network": network, "size": row.size, "batch": row.batch, "options": row.options.partition(", ")[2]}
    return {**about, **found, **peak(args.device, bf16="bf16" in row.options)}


def peak(device: str, bf16: bool) -> dict[str, float]:
    found = peak_of(torch.device(device), bf16) if device == "cuda" else None
    return {"peak": found} if found else {}


def clock(step: Callable[[], object], device: str, seconds: float, least: int = 3) -> float:
    """The median of a step's seconds, the first two left out."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 2 + least or time.perf_counter() < end:
        begun = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken[2:])


def alone(args: argparse.Namespace, network: str, size: int, batch: int, limit: Time) -> dict[str, Any]:
    """Seconds of a step's networks alone, forward and backward, as the budget counts them; and of AdamW's step over their weights."""
    model = PRETRAINED / "glyphs-base" if args.tiny else None
    release()
    row = f"{network}, plain" if args.tiny else f"{network}, {BEST}"
    config = row_config(ROWS[row], size, batch, 1, args.scratch, model, options_of(args, network))
    networks, step, _ = counted(config, size, [])
    trained = [on_device(each, args.device, config.run.channels_last) for each in networks.values()]
    parameters = [p for each in trained for p in each.parameters() if p.requires_grad]

    def forward_and_backward() -> None:
        with torch.device(args.device), torch.autocast(args.device, torch.bfloat16, enabled=not args.tiny):
            losses = step(batch)
        for loss in losses:
            loss.backward()
        for parameter in parameters:
            parameter.grad = None

    found: dict[str, Any] = {"network": network, "size": size, "batch": batch}
    found["networks_seconds"] = clock(forward_and_backward, args.device, min(3.0, limit.left()))
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    for name in ("fused", "foreach", "loop"):
        optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=name == "fused", foreach=name == "foreach")
        found[f"adamw_{name}_seconds"] = clock(optimizer.step, args.device, min(1.0, limit.left()))
        del optimizer
    return found


def on_device(network: nn.Module, device: str, channels_last: bool) -> nn.Module:
    """A network of the meta device, with small random weights on another."""
    generator = torch.Generator(device).manual_seed(0)
    network = network.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0, 0.02, generator=generator)
            else:
                tensor.zero_()
    return network.to(memory_format=torch.channels_last) if channels_last else network


def items(args: argparse.Namespace) -> Sequence[Item]:
    found = []
    for row in SMALL if args.tiny else FULL:
        if isinstance(row, Row):
            found.append(Item(row.name, 1 if args.tiny else row.seconds, partial(measure_row, args, row)))
        else:
            network, size, batch = row
            name = f"{network}, {size} px, batch {batch}, networks alone"
            found.append(Item(name, 1 if args.tiny else 10, partial(alone, args, network, size, batch)))
    return found


if __name__ == "__main__":
    run_part(__doc__, "fast", items)
