"""Normalisations that take and give bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eqldm.autoencoder.discriminator import PatchDiscriminator
from eqldm.model_folder import load_unet, load_vae
from eqldm.precision import BFloatGroupNorm, BFloatLayerNorm, norms_in_bfloat16, whole_statistics

SHAPES = [(nn.GroupNorm(4, 8), (2, 8, 5, 6)), (nn.GroupNorm(4, 8, affine=False), (2, 8, 3)), (nn.LayerNorm(6), (2, 3, 6)),
          (nn.LayerNorm((3, 6), bias=False), (2, 3, 6))]  # fmt: skip


def norms(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if isinstance(module, (nn.GroupNorm, nn.LayerNorm))]


def test_every_normalisation_of_a_model_is_one_of_them(tiny_model_folder):
    for network in (load_unet(tiny_model_folder), load_vae(tiny_model_folder), PatchDiscriminator(8, 1)):
        names = list(network.state_dict())
        assert norms(network) and norms_in_bfloat16(norms_in_bfloat16(network)) is network  # once or twice
        swapped = (BFloatGroupNorm, BFloatLayerNorm) if whole_statistics() else (nn.GroupNorm, BFloatLayerNorm)
        assert all(type(module) in swapped for module in norms(copy.deepcopy(network)))
        assert list(network.state_dict()) == names


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_cpu_computes_as_before(tiny_model_folder, precision):
    """Bit for bit, gradients too, which tell that nothing else was changed."""
    found = []
    for network in (load_unet(tiny_model_folder), norms_in_bfloat16(load_unet(tiny_model_folder))):
        torch.manual_seed(0)
        x, t, embeds = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 900.0]), torch.randn(2, 5, network.config.cross_attention_dim)
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            y = network(x, t, embeds).sample
        y.float().square().mean().backward()
        found.append([y, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.gpu
@pytest.mark.parametrize(("norm", "shape"), SHAPES, ids=lambda value: str(value))
def test_on_a_gpu_they_give_bfloat16_near_float32(norm, shape):
    """A mean far from 0, whose square would be lost if it were summed in bfloat16."""
    if isinstance(norm, nn.GroupNorm) and not whole_statistics():
        pytest.skip("this torch rounds a group normalisation's statistics: it is left as it is")
    norm = copy.deepcopy(norm).cuda()
    x = torch.randn(shape, device="cuda", dtype=torch.bfloat16) + 8
    exact = norm(x.float())
    with torch.autocast("cuda", torch.bfloat16):
        before, after = norm(x), norms_in_bfloat16(norm)(x)
    assert (before.dtype, after.dtype, norm(x.float()).dtype) == (torch.float32, torch.bfloat16, torch.float32)
    torch.testing.assert_close(after.float(), exact, rtol=2e-2, atol=1e-2)


@pytest.mark.gpu
def test_on_a_gpu_a_unet_computes_what_the_cpu_does(tiny_model_folder, record_property):
    """In bfloat16 on both, and no further from float32 than with normalisations in float32."""
    torch.manual_seed(0)
    unet = load_unet(tiny_model_folder)
    inputs = [torch.randn(4, 4, 16, 16), torch.tensor([3.0, 200.0, 600.0, 900.0]), torch.randn(4, 5, unet.config.cross_attention_dim)]
    with torch.no_grad():
        exact = unet(*inputs).sample
        found = {}
        for name, network in (("float32", copy.deepcopy(unet)), ("bfloat16", norms_in_bfloat16(copy.deepcopy(unet)))):
            with torch.autocast("cuda", torch.bfloat16):
                output = network.cuda()(*(value.cuda() for value in inputs)).sample
            found[name] = float((output.float().cpu() - exact).norm() / exact.norm())
            record_property(f"from float32, norms in {name}", found[name])
    assert 0 < found["bfloat16"] < 2 * found["float32"] + 1e-3
