"""Which of several processes is this one? As torchrun or srun state it, for work that they share without talking to each other."""

from __future__ import annotations

import os
import platform

import torch


def in_srun_step() -> bool:
    """Whether srun started this process. A batch script has SLURM_PROCID 0 of SLURM_NTASKS too, but runs once."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdecimal() and int(step) < 0xFFFFFFF0  # from there on: the batch, interactive and extern steps


def process_rank() -> tuple[int, int]:
    """(rank, world size) as torchrun or srun state them; (0, 1) without either."""
    names = [("RANK", "WORLD_SIZE"), *([("SLURM_PROCID", "SLURM_NTASKS")] if in_srun_step() else [])]
    return next(((int(os.environ[a]), int(os.environ[b])) for a, b in names if a in os.environ and b in os.environ), (0, 1))


def launch() -> str:
    """What all processes of this one's launch have in common, and no other launch; empty for a process by itself."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        found = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")]
        alone = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]  # on one machine, by an address of that machine's own
        return " ".join(["torchrun", *found, *([platform.node()] if alone else [])])
    return f"srun {os.environ.get('SLURM_JOB_ID')}.{os.environ['SLURM_STEP_ID']}" if in_srun_step() else ""


def processes_here() -> int:
    """The most processes on one machine, as torchrun or srun state them."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1") if in_srun_step() else "1"  # such as 8(x3),2
    return max(int(node.split("(")[0]) for node in nodes.split(","))


def pick_device(rank: int) -> torch.device:
    """This process's GPU of those it sees (srun may show each process only its own), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    slurm = os.environ.get("SLURM_LOCALID", rank) if in_srun_step() else rank
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", slurm)) % torch.cuda.device_count())


def checked_device(name: str, called: str = "") -> torch.device:
    """The device of a name. called: how errors call it. Raises ValueError where it is not there, or computes nothing."""
    called = called or f"device '{name}'"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"{called}: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ValueError(f"{called} holds no values: wanted one that computes, such as cpu or cuda")
    return device
