"""Whether this machine is one that a run can run on, before anything is read."""

from __future__ import annotations

import importlib.util

import torch

from eqldm.config import RunConfig
from eqldm.paths import check_folder


def check_machine(run: RunConfig) -> None:
    """Raises ValueError, naming the option, where the machine lacks the GPUs, or the installation the packages, that a run asks for;
    OSError where no run folder can be written."""
    check_folder("run.dir", run.dir)
    gpus, others = torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.backends.mps.is_available()
    if run.accelerator == "gpu" and not gpus and not others:
        raise ValueError("run.accelerator=gpu: torch sees no GPU on this machine. Use run.accelerator=cpu, or look at nvidia-smi")
    if run.accelerator != "cpu" and gpus and run.devices > gpus:
        raise ValueError(f"run.devices={run.devices}: torch sees {gpus} GPU{'s' * (gpus > 1)} on this machine. Set run.devices={gpus}")
    if run.strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"run.strategy={run.strategy} needs DeepSpeed, which is not installed: pip install deepspeed, or run.strategy=ddp")
