"""The exponential moving average (EMA) of a run's weights: what is validated, sampled and exported."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from pytorch_lightning.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def decay_at(decay: float, num_averaged: int) -> float:
    """The decay of an average of `num_averaged` steps' weights (1 or more) as the next step's join it: min(decay, (1 + n) / (10 + n)).

    A constant decay forgets the start too slowly: of the first step's weights, .999 leaves 61 % in the average of 500 steps. With this
    one the start is gone after some ten steps, and the average reaches over about a tenth of all steps until `decay` says fewer.
    Source: the warm-up of TensorFlow's tf.train.ExponentialMovingAverage (its argument num_updates).
    """
    return min(decay, (1 + num_averaged) / (10 + num_averaged))


@torch.no_grad()
def join(decay: float, averages: list[Tensor], weights: list[Tensor], num_averaged: int) -> None:
    """Puts the next step's weights into averages of equal shapes and one dtype, in place. num_averaged: steps that are in them.

    The first step's weights are copied, and always what is no float, as a count."""
    if num_averaged and averages[0].is_floating_point():
        torch._foreach_lerp_(averages, weights, 1 - decay_at(decay, num_averaged))
    else:
        torch._foreach_copy_(averages, weights)


@torch.no_grad()
def update(average: AveragedModel, network: nn.Module, decay: float) -> None:
    """Puts the network's weights and buffers, of the next step, into their average, whose steps are counted in its `n_averaged`."""
    groups: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    there, here = (chain(each.parameters(), each.buffers()) for each in (average.module, network))
    for mean, weight in zip(there, here, strict=True):
        for tensors, tensor in zip(groups.setdefault(mean.dtype, ([], [])), (mean.detach(), weight.detach())):
            tensors.append(tensor)
    for means, weights in groups.values():
        join(decay, means, weights, int(average.n_averaged))
    average.n_averaged += 1


class EMA(WeightAveraging):
    """Lightning's weight averaging with the decay of `decay_at`, on the device that trains (Lightning sets it up before the weights are
    there, on the CPU); its weights also take over where a resumed run has no step left to train, only to export.

    The average starts as the first step's weights. Its steps are counted on the CPU: torch's AveragedModel counts them on the device, which
    it then waits for three times a step.
    """

    _latest_update_step: int  # Lightning's

    def __init__(self, decay: float):
        super().__init__()
        self.decay = decay

    def setup(self, trainer, pl_module, stage) -> None:
        self._device: Any = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if self._average_model is not None:
            self._average_model.n_averaged = self._average_model.n_averaged.cpu()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step <= self._latest_update_step:  # a micro-batch that completes no step
            return
        assert self._average_model is not None
        update(self._average_model, pl_module, self.decay)
        self._latest_update_step = trainer.global_step

    swapped = False  # whether the module holds the average, for a validation

    def _swap_models(self, pl_module) -> None:
        super()._swap_models(pl_module)
        self.swapped = not self.swapped

    def on_exception(self, trainer, pl_module, exception) -> None:
        if self.swapped:  # for `SaveLast`, which comes after
            self._swap_models(pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        """Nothing yet: the last checkpoint is still to hold the trained weights."""

    def on_fit_end(self, trainer, pl_module) -> None:
        super().on_train_end(trainer, pl_module)
