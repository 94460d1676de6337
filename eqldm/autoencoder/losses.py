"""Loss terms of the autoencoder. Each is a mean over samples, channels and pixels unless it says otherwise."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eqldm.weights import read_weights


def gradient_loss(y: Tensor, x: Tensor) -> Tensor:
    """Mean absolute error of the horizontal and vertical differences of pictures [B, 3, H, W]: keeps edges sharp."""
    horizontal = (y.diff(dim=-1) - x.diff(dim=-1)).abs().mean()
    vertical = (y.diff(dim=-2) - x.diff(dim=-2)).abs().mean()
    return horizontal + vertical


def kl_loss(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, a mean over samples and latent values.

    Source: arXiv 1312.6114, appendix B. Latent Diffusion's code takes sums over values, and over pixels of the reconstruction loss: its
    kl_weight is here one times C / (3 f^2), with C latent channels.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator from its logits, a mean over samples and patches. Source: arXiv 1705.02894."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """The generator's side of the hinge loss: minus the mean logit of its pictures."""
    return -fake.mean()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """The ratio of the two losses' gradient norms at the decoder's last layer, clamped to [0, 1e4]; carries no gradient.

    Source: VQGAN, arXiv 2012.09841, eq. 7; the clamp, and 1e-4 in the denominator (the paper: 1e-6), are its released code's.
    """
    (a,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
    (b,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
    return (a.norm() / (b.norm() + 1e-4)).clamp(0, 1e4).detach()


def load_lpips() -> nn.Module:
    """LPIPS with VGG16 (torchmetrics), frozen: `lpips(y, x)` of pictures [B, 3, H, W] in [-1, 1] gives [B, 1, 1, 1].

    Raises FileNotFoundError, with the way to get them, where torchvision's VGG16 weights are not in torch's hub folder; ValueError
    where the file there holds more than weights.
    Source: arXiv 1801.03924.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import VGG16_Weights

    url = VGG16_Weights.IMAGENET1K_V1.url
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    wanted = folder / Path(url).name
    if not wanted.is_file():
        raise FileNotFoundError(
            f"LPIPS needs the VGG16 weights of torchvision at '{wanted}'. With network access: "
            f"python -c 'import torchvision; torchvision.models.vgg16(weights=\"IMAGENET1K_V1\")'; without: copy "
            f"{url} there (TORCH_HOME moves the folder). Or do without: loss.perceptual_weight=0 in training, --without lpips in evaluation"
        )
    read_weights(wanted)  # a file that is more than tensors is refused here, for torchvision would run it
    return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.eval().requires_grad_(False)
