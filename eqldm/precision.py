"""In what a device computes: bfloat16 where it does so natively, and for sampling normalisations that take it and give it."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

Network = TypeVar("Network", bound=nn.Module)


def native_precision(accelerator: str) -> str:
    """bf16-mixed where the device computes bfloat16 natively, else 32-true: emulated, it is many times slower."""
    if accelerator != "cpu" and torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = torch.cpu.get_capabilities()
        native = bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))
    return "bf16-mixed" if native else "32-true"


WHOLE_STATISTICS = (2, 14)
"""From this torch on CUDA's group normalisation of bfloat16 keeps mean and variance in float32 (pytorch's pull request 183946). Before, it
rounds them to bfloat16, which moves pictures of letters by .2 to .3 of 255 levels (emulated on a CPU). Its gradient still does."""


class BFloatGroupNorm(nn.GroupNorm):
    """Takes and gives bfloat16 under autocast on a GPU; mean and variance are in float32. For inference."""

    def forward(self, input: Tensor) -> Tensor:
        if not _in_bfloat16(input):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return F.group_norm(input, self.num_groups, _like(self.weight, input), _like(self.bias, input), self.eps)


class BFloatLayerNorm(nn.LayerNorm):
    """As `BFloatGroupNorm`, with any torch."""

    def forward(self, input: Tensor) -> Tensor:
        if not _in_bfloat16(input):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input, self.normalized_shape, _like(self.weight, input), _like(self.bias, input), self.eps)


def _in_bfloat16(input: Tensor) -> bool:
    device = input.device.type
    return device != "cpu" and input.dtype == torch.bfloat16 and torch.is_autocast_enabled(device)


def _like(weight: Tensor | None, input: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(input.dtype)


def whole_statistics() -> bool:
    """Whether this torch is of `WHOLE_STATISTICS`."""
    return TorchVersion(torch.__version__) >= WHOLE_STATISTICS  # type: ignore[operator]


def norms_in_bfloat16(network: Network) -> Network:
    """The network, whose normalisations take and give bfloat16 under autocast on a GPU too. In place; its weights keep their names.

    A CPU's autocast does so by itself. CUDA's normalises in float32, and what follows is read and written in that, until the next
    convolution rounds it to bfloat16 anyway. Not for training: the gradient is by rounded statistics.
    """
    for module in network.modules():
        if type(module) is nn.GroupNorm and whole_statistics():
            module.__class__ = BFloatGroupNorm  # as it is, with its hooks: no module is replaced that others hold
        elif type(module) is nn.LayerNorm:
            module.__class__ = BFloatLayerNorm
    return network
