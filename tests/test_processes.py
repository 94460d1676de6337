"""Which process is this, and on which GPU: as torchrun and srun say it."""

from __future__ import annotations

import pytest
import torch

from eqldm import processes


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, (0, 1)),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1)),  # a batch script
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "4294967291"}, (0, 1)),  # the batch step, so numbered
    ({"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}, (3, 8)),  # srun
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0", "RANK": "1", "WORLD_SIZE": "2"}, (1, 2)),  # srun torchrun
])  # fmt: skip
def test_ranks(monkeypatch, environment, expected):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.process_rank() == expected


@pytest.mark.parametrize(("environment", "expected"), [
    ({}, 1),
    ({"LOCAL_WORLD_SIZE": "8"}, 8),
    ({"SLURM_STEP_ID": "0", "SLURM_STEP_TASKS_PER_NODE": "2(x3),4"}, 4),
    ({"SLURM_STEP_ID": "4294967291", "SLURM_STEP_TASKS_PER_NODE": "8"}, 1),  # a batch script
])  # fmt: skip
def test_processes_of_a_machine(monkeypatch, environment, expected):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_ID", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.processes_here() == expected


@pytest.mark.parametrize(("visible", "expected"), [(1, 0), (2, 1), (8, 3)])
def test_devices_are_those_that_the_process_sees(monkeypatch, visible, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "3")
    assert processes.pick_device(11) == torch.device("cuda", expected)
