"""The PatchGAN discriminator: a logit for each patch of a picture."""

from __future__ import annotations

from torch import Tensor, nn


class PatchDiscriminator(nn.Sequential):
    """[B, 3, H, W] in [-1, 1] -> logits [B, 1, H / 2^n - 2, W / 2^n - 2] for n strided layers.

    GroupNorm in place of the original's BatchNorm: the same at each batch size and number of processes.
    Source: pix2pix, arXiv 1611.07004, appendix 6.1.2.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3):
        widths = [channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            stride = 2 if i < num_layers else 1
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride, 1, bias=False),
                nn.GroupNorm(1, widths[i]),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        super().__init__(*layers)
        self.smallest = 2**num_layers * 3

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the patches of `x`. Raises ValueError where the picture is too small for one patch."""
        if min(x.shape[-2:]) < self.smallest:
            raise ValueError(
                f"discriminator needs pictures of at least {self.smallest} px, got {tuple(x.shape[-2:])}: use fewer "
                "loss.discriminator_layers (rescaled pictures are smaller than the data's)"
            )
        return super().forward(x)
