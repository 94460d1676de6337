"""What training draws, and both equivariances' loss and errors."""

from __future__ import annotations

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio

from eqldm.autoencoder.equivariance import consistency_loss, draw_groups, draw_resize, latent_error, psnr, spread_loss
from eqldm.autoencoder.module import transform_group
from eqldm.config import EquivarianceConfig
from eqldm.views import D4, GROUPS, NEGATE, Rescale

SIDE, POSITIONS = 8, list(range(40, 56))
EVERYTHING = EquivarianceConfig(group="d4", rescale_prob=0.7, anisotropic=True, num_groups=3, permute_prob=0.5, negate_prob=0.3, prob=0.8)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_position(config: EquivarianceConfig, positions: list[int], step: int = 5, seed: int = 0) -> dict:
    groups = draw_groups(config, seed, step, positions, SIDE)
    assert sorted(row for group in groups for row in group.rows) == list(range(len(positions)))  # each once
    assert all(len(group.rows) == len(group.transforms) for group in groups)
    return {positions[row]: t for group in groups for row, t in zip(group.rows, group.transforms)}


def all_transforms(config: EquivarianceConfig, steps: int = 30) -> list:
    return [t for step in range(steps) for t in by_position(config, list(range(16 * step, 16 * step + 16)), step).values()]


@pytest.mark.parametrize("micro", [1, 2, 8])
def test_a_position_keeps_its_transform_however_the_batch_is_split(micro):
    for step in range(8):
        whole = by_position(EVERYTHING, POSITIONS, step)
        parts = {}
        for first in range(0, len(POSITIONS), micro):
            parts |= by_position(EVERYTHING, POSITIONS[first : first + micro], step)
        assert parts == whole
    assert by_position(EVERYTHING, POSITIONS, seed=1) != by_position(EVERYTHING, POSITIONS)


def test_groups_share_a_shape_for_picture_and_latent():
    x, z = normal(16, 3, 4 * SIDE, 4 * SIDE), normal(16, 4, SIDE, SIDE)
    for step in range(30):
        for group in draw_groups(EVERYTHING, 0, step, POSITIONS, SIDE):
            picture, latent = transform_group(group, x), transform_group(group, z)
            assert len(picture) == len(latent) == len(group.rows)
            assert picture.shape[-2:] == tuple(4 * side for side in latent.shape[-2:])
            alone = group.transforms[0](x[group.rows[:1]])[0]
            assert torch.allclose(picture[0], alone, atol=1e-5)


def test_options_are_respected():
    for group in ("none", "rotations", "d4"):
        drawn = {t.view for t in all_transforms(EquivarianceConfig(group=group))}
        assert drawn == {D4[g] for g in GROUPS[group]}
    plain = all_transforms(EquivarianceConfig(group="d4", prob=0.0, rescale_prob=1.0, negate_prob=1.0))
    assert {(t.view, t.rescale) for t in plain} == {(D4[0], None)}
    negated = all_transforms(EquivarianceConfig(negate_prob=1.0))
    assert {(t.view.sign, t.view.turns) for t in negated} == {(NEGATE.sign, (0,))}
    permuted = all_transforms(EquivarianceConfig(permute_prob=1.0, permute_cells=[2, 4]))
    assert {t.view.cells for t in permuted} == {2, 4}
    assert {len(set(t.view.turns)) for t in permuted} == {1}  # all as the whole
    turned = EquivarianceConfig(group="rotations", permute_prob=1.0, permute_cells=[4], patch_turn_prob=0.5)
    turns = [len(set(t.view.turns)) for t in all_transforms(turned, steps=60)]
    assert 0.4 < sum(number > 1 for number in turns) / len(turns) < 0.6 and max(turns) == 4
    finest = EquivarianceConfig(group="d4", permute_prob=1.0, permute_cells=[4, 8], patch_turn_prob=1.0)
    turned = {cells: {len(set(t.view.turns)) for t in all_transforms(finest) if t.view.cells == cells} for cells in (4, 8)}
    assert min(turned[4]) > 1 and turned[8] == {1}  # of 8 latent cells a side: a single one shows no turn
    some = [t.view.cells > 1 for t in all_transforms(EquivarianceConfig(permute_prob=0.25), steps=60)]
    assert 0.2 < sum(some) / len(some) < 0.3


def test_rescaling_keeps_latents_whole():
    scales = [t.rescale for t in all_transforms(EquivarianceConfig(rescale_prob=0.5, rescale_smallest=0.5), steps=60)]
    drawn = {r for r in scales if r is not None}
    assert 0.35 < sum(r is None for r in scales) / len(scales) < 0.65
    assert drawn == {Rescale(k / SIDE, k / SIDE) for k in range(4, 8)}
    apart = {t.rescale for t in all_transforms(EquivarianceConfig(rescale_prob=1.0, anisotropic=True))}
    assert any(r.height != r.width for r in apart)
    assert all((SIDE * side).is_integer() for r in apart for side in (r.height, r.width))


def test_anisotropic_groups_draw_only_symmetries_that_keep_their_shape():
    for group, kept in {"rotations": {0, 2}, "d4": {0, 2, 4, 6}}.items():
        drawn = all_transforms(EquivarianceConfig(group=group, rescale_prob=1.0, anisotropic=True))
        assert {t.view.turns[0] for t in drawn if t.rescale.height != t.rescale.width} == kept
        assert {t.view.turns[0] for t in drawn if t.rescale.height == t.rescale.width} == set(GROUPS[group])


def test_permutations_that_do_not_fit_a_rescaled_latent_are_left_out():
    drawn = all_transforms(EquivarianceConfig(rescale_prob=0.5, permute_prob=1.0, permute_cells=[4]))
    for t in drawn:
        side = SIDE if t.rescale is None else round(SIDE * t.rescale.height)
        assert t.view.cells == (4 if side % 4 == 0 else 1)


def test_permute_cells_that_never_fit_are_an_error():
    config = EquivarianceConfig(permute_prob=0.5, permute_cells=[3, 5])
    with pytest.raises(ValueError, match=r"permute_cells=\[3, 5\]: none divides the latent's 8 cells"):
        draw_groups(config, 0, 0, POSITIONS, SIDE)
    draw_groups(EquivarianceConfig(), 0, 0, POSITIONS, 5)  # nor do they matter where nothing is permuted


def test_eqvae_paper():
    config = EquivarianceConfig(preset="eqvae_paper")
    plain, drawn, shrunk = 0, set(), []
    for step in range(400):
        (group,) = draw_groups(config, 0, step, POSITIONS, SIDE)
        assert group.rows == list(range(16)) and len(set(group.transforms)) == 1  # one for the whole batch
        transform = group.transforms[0]
        if transform.rescale is None:
            plain += 1
            assert transform.view == D4[0] and group.weight == 1
            shrunk += [r for r in [draw_resize(config, 0, step, SIDE)] if r is not None]
        else:
            assert draw_resize(config, 0, step, SIDE) is None  # a regularised step sees full pictures
            drawn.add((transform.view, transform.rescale))
            assert group.weight == pytest.approx(transform.rescale.height**2)
    assert 160 < plain < 240
    assert {view for view, _ in drawn} == set(D4[1:4])  # never the identity, never a flip
    scales = {Rescale(k / SIDE, k / SIDE, "bilinear") for k in range(2, 8)}  # always smaller
    assert {r for _, r in drawn} == scales
    assert 0.15 < len(shrunk) / plain < 0.35 and set(shrunk) <= scales
    assert draw_resize(EquivarianceConfig(group="d4"), 0, 0, SIDE) is None
    other = draw_groups(config, 0, 0, POSITIONS, SIDE, "transform/discriminator")
    assert any(draw_groups(config, 0, s, POSITIONS, SIDE) != other for s in range(8))  # its two steps draw apart


def test_consistency_loss():
    a, b, variance = normal(3, 4, 5, 5).requires_grad_(), normal(3, 4, 5, 5, seed=1).requires_grad_(), torch.rand(4).add(0.5)
    variance.requires_grad_()
    loss = consistency_loss(a, b, variance)
    per_channel = ((a - b) ** 2).mean((0, 2, 3)) / variance
    assert torch.allclose(loss, per_channel.mean())
    loss.backward()
    expected = 2 * (a - b).detach() / variance.detach()[:, None, None] / a.numel()
    assert torch.allclose(a.grad, expected) and torch.allclose(b.grad, -expected)
    assert variance.grad is None


def with_statistics(z: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The whole term of one group of latents, with the statistics that every batch being this one would give."""
    mean, variance = z.mean((0, 2, 3)), z.var((0, 2, 3), unbiased=False)
    error = sum((a - b).square().mean((0, 2, 3)) for a, b in pairs) / len(pairs)
    consistency = sum(consistency_loss(a, b, variance) for a, b in pairs) / len(pairs)
    return consistency + spread_loss(z, mean, variance, error)


def ratio(z: torch.Tensor, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    error = sum((a - b).square().mean((0, 2, 3)) for a, b in pairs) / len(pairs)
    return (error / z.var((0, 2, 3), unbiased=False)).mean()


GROUPS_OF_PAIRS = {
    "turned": lambda z, noise: [(z.rot90(1, (-2, -1)) + 0.3 * noise, z.rot90(1, (-2, -1)))],
    "negated, far from the origin": lambda z, noise: [(-(z + 3) + 0.3 * noise, -(z + 3))],
    "two sizes": lambda z, noise: [(z + 0.3 * noise, z), (0.2 * noise[..., :3, :3], z[..., :3, :3] / 4)],
}


@pytest.mark.parametrize("pairs", GROUPS_OF_PAIRS.values(), ids=GROUPS_OF_PAIRS)
def test_consistency_has_the_gradient_of_the_error_over_the_variance(pairs):
    """As if the variance had been measured of this very batch: so shrinking a channel gains nothing."""
    z = (normal(3, 4, 6, 6) + 2).requires_grad_()
    found = with_statistics(z, pairs(z, normal(3, 4, 6, 6, seed=1)))
    expected = ratio(z, pairs(z, normal(3, 4, 6, 6, seed=1)))
    assert torch.allclose(found, expected)
    for x, y in zip(torch.autograd.grad(found, z), torch.autograd.grad(expected, z)):
        assert torch.allclose(x, y, atol=1e-6)


def test_shrinking_a_channel_does_not_lower_the_consistency():
    scale = torch.ones(4, 1, 1, requires_grad=True)
    a, b = normal(3, 4, 5, 5) * scale, (normal(3, 4, 5, 5) + 0.3 * normal(3, 4, 5, 5, seed=1)) * scale
    (whole,) = torch.autograd.grad(with_statistics(b, [(a, b)]), scale, retain_graph=True)
    (constant,) = torch.autograd.grad(consistency_loss(a, b, b.var((0, 2, 3))), scale)
    assert float(whole.abs().max()) < 1e-6 < 1e-3 < float(constant.min())


def test_the_spread_of_parts_is_their_mean_and_its_value_zero():
    z, mean, variance, error = normal(4, 4, 5, 5).requires_grad_(), *(torch.rand(3, 4) + 0.5)
    whole = spread_loss(z, mean, variance, error)
    parts = (spread_loss(z[:1], mean, variance, error) + 3 * spread_loss(z[1:], mean, variance, error)) / 4
    assert float(whole) == float(parts) == 0
    for x, y in zip(torch.autograd.grad(whole, z), torch.autograd.grad(parts, z)):
        assert torch.allclose(x, y)


def test_latent_error():
    x = normal(2, 3, 16, 16)

    def encode(x):  # 2 x 2 means of a channel map: equivariant under D4
        return torch.nn.functional.avg_pool2d(torch.einsum("oc,bchw->bohw", normal(4, 3, seed=2), x), 2)

    for view in D4:
        assert torch.allclose(latent_error(encode(view(x)), view(encode(x))), torch.zeros(2), atol=1e-10)
    a, b = normal(2, 4, 5, 5), normal(2, 4, 5, 5, seed=1)
    expected = torch.stack([((q - p) ** 2).sum() / (p**2).sum() for p, q in zip(a, b)])
    assert torch.allclose(latent_error(a, b), expected)


def test_psnr_is_that_of_torchmetrics_per_picture():
    x, y = normal(4, 3, 8, 8) * 0.7, normal(4, 3, 8, 8, seed=1) * 0.7  # some values beyond [-1, 1]
    expected = [peak_signal_noise_ratio(p.clamp(-1, 1), q.clamp(-1, 1), data_range=(-1.0, 1.0)) for p, q in zip(x, y)]
    assert torch.allclose(psnr(x, y), torch.stack(expected), atol=1e-4)
    assert psnr(x, x).isfinite().all()
