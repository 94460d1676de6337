"""Each loss term against a closed form, or a library's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import distributions, nn
from torchmetrics.functional.image import image_gradients

from eqldm.autoencoder.discriminator import PatchDiscriminator
from eqldm.autoencoder.losses import (
    adaptive_weight,
    gradient_loss,
    hinge_discriminator_loss,
    hinge_generator_loss,
    kl_loss,
    load_lpips,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_kl_is_that_of_torch_distributions():
    mean, logvar = normal(3, 4, 5, 5), normal(3, 4, 5, 5, seed=1)
    posterior = distributions.Normal(mean, (0.5 * logvar).exp())
    prior = distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    assert torch.allclose(kl_loss(mean, logvar), distributions.kl_divergence(posterior, prior).mean(), rtol=1e-5)
    assert kl_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)) == 0


def test_gradient_loss():
    y, x = normal(2, 3, 6, 7), normal(2, 3, 6, 7, seed=1)
    assert gradient_loss(x + 0.7, x) == pytest.approx(0, abs=1e-6)  # a constant has no edges
    slope = torch.arange(7.0) * 0.25  # horizontal slope: 0.25 a pixel, and nothing vertically
    assert gradient_loss(x + slope, x) == pytest.approx(0.25, abs=1e-6)
    vertical, horizontal = image_gradients(y - x)  # torchmetrics pads the last row and column with zeros
    expected = horizontal[..., :-1].abs().mean() + vertical[..., :-1, :].abs().mean()
    assert torch.allclose(gradient_loss(y, x), expected)


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert hinge_discriminator_loss(real, fake) == pytest.approx(0.5 * ((0 + 0.5 + 2) / 3 + (0 + 1 + 2) / 3))
    assert hinge_discriminator_loss(torch.full((4,), 1.5), torch.full((4,), -1.5)) == 0
    assert torch.allclose(  # torch's own with a margin of 1, for the pictures of one kind
        hinge_discriminator_loss(real, torch.full((3,), -1.0)), 0.5 * F.margin_ranking_loss(real, torch.zeros(3), torch.ones(3), 1)
    )
    assert hinge_generator_loss(fake) == pytest.approx(2 / 3)


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    w, x = normal(3, 2).requires_grad_(), normal(2, 5, seed=1)
    y = w @ x
    factor = adaptive_weight((2 * y).sum(), y.square().sum(), w)
    by_hand = (2 * x.sum(1)).expand(3, 2).norm() / (2 * y @ x.T).norm()
    assert torch.allclose(factor, by_hand, rtol=1e-3) and not factor.requires_grad
    assert w.grad is None  # and it leaves nothing behind for the optimizer
    assert adaptive_weight(y.sum(), (0 * y).sum(), w) == 1e4  # clamped where the adversarial gradient vanishes


@pytest.mark.parametrize(("layers", "size", "patches"), [(1, 16, 6), (2, 16, 2), (3, 32, 2), (3, 64, 6), (3, 24, 1)])
def test_discriminator_shapes(layers, size, patches):
    logits = PatchDiscriminator(4, layers)(normal(2, 3, size, size))
    assert logits.shape == (2, 1, patches, patches)


def test_discriminator_judges_patches_and_samples_apart():
    network, x = PatchDiscriminator(4, 2), normal(3, 3, 32, 32)
    assert torch.allclose(network(x)[1:], network(x[1:]), atol=1e-5)  # no statistics over the batch


@pytest.mark.parametrize("size", [(23, 64), (64, 8)])
def test_discriminator_refuses_too_small_pictures(size):
    with pytest.raises(ValueError, match=r"at least 24 px, got \(\d+, \d+\).*fewer loss.discriminator_layers"):
        PatchDiscriminator(4, 3)(normal(1, 3, *size))


def test_lpips_without_weights_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="vgg16.*download.pytorch.org/models/vgg16.*perceptual_weight=0") as caught:
        load_lpips()
    assert str(tmp_path) in str(caught.value)


@pytest.mark.slow  # writes 528 MB of stand-in weights
def test_lpips_with_weights_gives_gradients(vgg16_weights):
    lpips = load_lpips()
    assert isinstance(lpips, nn.Module) and not any(p.requires_grad for p in lpips.parameters())
    x, y = normal(2, 3, 32, 32).tanh(), normal(2, 3, 32, 32, seed=1).tanh().requires_grad_()
    distance = lpips(y, x)
    assert distance.shape == (2, 1, 1, 1) and float(lpips(x, x).abs().max()) == 0
    distance.mean().backward()
    assert y.grad.isfinite().all() and y.grad.abs().sum() > 0
