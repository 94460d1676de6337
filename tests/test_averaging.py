"""The average of a run's weights: its decay rises, so that a short run's holds nothing of the start."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from eqldm.training.averaging import EMA, decay_at, update


def average_of(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    """What the callback's averaging makes of each step's weights."""
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("seen", torch.zeros((), dtype=torch.long))
    averaged = AveragedModel(model, use_buffers=True)
    for step, weight in enumerate(weights):
        model.weight.data.fill_(weight)
        model.seen.fill_(step)
        update(averaged, model, decay)
    assert int(averaged.module.seen) == len(weights) - 1  # a count is no average
    return averaged.module.weight.detach()[0, 0]


@pytest.mark.parametrize(("n", "decay"), [(1, 2 / 11), (10, 11 / 20), (500, 501 / 510), (8990, 8991 / 9000), (8991, 0.999), (10**9, 0.999)])
def test_the_decay_rises_and_stays(n, decay):
    assert decay_at(0.999, n) == pytest.approx(decay, rel=1e-12)
    assert decay_at(0.1, n) == 0.1


@pytest.mark.parametrize("steps", [20, 100, 500, 3000])
def test_a_short_runs_average_holds_nothing_of_its_start(steps):
    """A constant decay of .999 left 61 % of it after 500 steps: what was sampled then was the start."""
    share = float(average_of([1.0] + [0.0] * (steps - 1), 0.999))
    product = math.prod((1 + n) / (10 + n) for n in range(1, steps))
    assert share == pytest.approx(product, rel=1e-4) and share < 1e-5
    assert 0.999**500 == pytest.approx(0.606, abs=1e-3)


@pytest.mark.parametrize("steps", [50, 400, 2000])
def test_it_lags_a_tenth_of_the_steps_behind(steps):
    """Of weights that grow evenly, the average is that of n / 10 steps ago, until the decay is the smaller reach."""
    lag = (steps - 1) - float(average_of([float(n) for n in range(steps)], 0.999))
    assert lag == pytest.approx(0.1 * steps, rel=0.25)
    assert (steps - 1) - float(average_of([float(n) for n in range(steps)], 0.9)) < 10


def test_a_training_averages_each_step_once():
    class Counts(pl.LightningModule):
        """Its weight is the number of the step."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            self.optimizers().step()
            self.weight.data.fill_(float(batch_idx))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    options = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    module = Counts()
    pl.Trainer(max_steps=30, max_epochs=1, callbacks=[EMA(0.8)], **options).fit(module, torch.utils.data.DataLoader(range(30)))
    wanted = 0.0
    for n in range(1, 30):
        decay = min(0.8, (1 + n) / (10 + n))
        wanted = decay * wanted + (1 - decay) * n
    assert module.weight.item() == pytest.approx(wanted, rel=1e-5)
