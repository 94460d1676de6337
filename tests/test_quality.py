"""Distances between feature distributions, and the texture scores."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torchmetrics.image.kid import KernelInceptionDistance

from eqldm.evaluation.bootstrap import Findings, bootstrap_weights
from eqldm.evaluation.finite import finite
from eqldm.evaluation.quality import (
    RealPictures,
    contrast,
    distances,
    fid,
    high_frequency_energy,
    kid,
    precision_recall,
    round_trip_psnr,
    textures,
)


@pytest.fixture
def features() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(60, 6, generator=generator), 0.5 + 1.2 * torch.randn(60, 6, generator=generator)
    return real, fake


class Features(torch.nn.Module):
    num_features = 6

    def forward(self, x):
        return x


def test_kid_is_torchmetrics_on_the_whole_set(features):
    real, fake = features
    theirs = KernelInceptionDistance(feature=Features(), subsets=1, subset_size=60)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    assert float(kid(real, fake)) == pytest.approx(float(theirs.compute()[0]), rel=1e-5)


def test_a_resampled_kid_is_that_of_the_pictures_drawn(features):
    real, fake = features
    weights = torch.zeros(2, 60)
    weights[0, :30], weights[1] = 1, 1
    assert torch.allclose(kid(real, fake, weights), torch.stack([kid(real, fake[:30]), kid(real, fake)]))
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(60, (4000, 60), generator=generator)
    counts = torch.zeros(4000, 60).scatter_add_(1, drawn, torch.ones(4000, 60))
    assert float(kid(real, fake, counts).mean()) == pytest.approx(float(kid(real, fake)), rel=0.02)  # unbiased


def test_samples_of_one_distribution_have_no_kernel_distance():
    generator = torch.Generator().manual_seed(0)
    draws = [kid(torch.randn(50, 4, generator=generator), torch.randn(50, 4, generator=generator)) for _ in range(200)]
    mean, spread = torch.stack(draws).mean(), torch.stack(draws).std()
    assert abs(float(mean)) < 3 * float(spread) / 200**0.5


def alike(num_clusters: int, num_seeds: int, generator: torch.Generator) -> torch.Tensor:
    """[N, 4] of clusters, as seeds of one prompt are alike; all together they are normal, of unit variance."""
    centres, own = (torch.randn(num_clusters, size, 4, generator=generator) for size in (1, num_seeds))
    return (0.6**0.5 * centres + 0.4**0.5 * own).flatten(0, 1)


@pytest.mark.parametrize(("num_clusters", "num_seeds"), [(24, 1), (12, 4), (12, 8)])
def test_seeds_of_one_prompt_are_no_distance(num_clusters, num_seeds):
    """The real ones are of the same distribution. With pairs of one cluster left in, the estimate is above 0, the resamples more so."""
    generator = torch.Generator().manual_seed(0)
    clusters = torch.arange(num_clusters).repeat_interleave(num_seeds)
    weights = bootstrap_weights(clusters, 100)
    plain, estimates, resamples = [], [], []
    for _ in range(300):
        real, fake = torch.randn(60, 4, generator=generator), alike(num_clusters, num_seeds, generator)
        plain.append(kid(real, fake))
        estimates.append(kid(real, fake, clusters=clusters * 5 - 3))  # any numbers
        resamples.append(kid(real, fake, weights, clusters=clusters).mean())
    for found in (estimates, resamples):
        assert torch.stack(found).mean().abs() < 3 * torch.stack(found).std() / 300**0.5
    assert (torch.stack(plain).mean() > 5 * torch.stack(plain).std() / 300**0.5) == (num_seeds > 1)


def test_kid_of_clusters_is_that_of_pairs_of_different_ones():
    generator = torch.Generator().manual_seed(0)
    real, fake, clusters = (
        torch.randn(9, 3, generator=generator),
        torch.randn(7, 3, generator=generator),
        torch.tensor([4, 4, 1, 0, 0, 0, 9]),
    )

    def kernel(a, b):
        return float((a.double() @ b.double() / 3 + 1) ** 3)

    def expected(rows, of):  # of pictures, with their clusters
        pairs = [kernel(fake[i], fake[j]) for i, g in zip(rows, of) for j, h in zip(rows, of) if g != h]
        between = [kernel(fake[i], real[j]) for i in rows for j in range(9)]
        among_real = [kernel(real[i], real[j]) for i in range(9) for j in range(9) if i != j]
        return sum(among_real) / len(among_real) + sum(pairs) / len(pairs) - 2 * sum(between) / len(between)

    assert float(kid(real, fake, clusters=clusters)) == pytest.approx(expected(range(7), clusters.tolist()))
    weights = torch.tensor([[2.0, 2, 1, 0, 0, 0, 1]])  # one cluster twice, one not at all
    assert float(kid(real, fake, weights, clusters=clusters)[0]) == pytest.approx(expected([0, 0, 1, 1, 2, 6], [4, 4, 4, 4, 1, 9]))
    assert torch.equal(kid(real, fake), kid(real, fake, clusters=torch.arange(7)))
    assert bool(kid(real, fake, clusters=torch.zeros(7)).isnan())  # of a single prompt nothing tells how far prompts lie apart


@pytest.mark.slow
@pytest.mark.parametrize(("num_clusters", "num_seeds"), [(12, 4), (25, 8), (100, 1)])
def test_the_interval_of_kid_covers(num_clusters, num_seeds):
    """The distance of all that a model may draw from these real pictures. (Percentiles of the resamples cover less.)"""
    generator = torch.Generator().manual_seed(0)
    real, clusters = torch.randn(60, 4, generator=generator) + 0.3, torch.arange(num_clusters).repeat_interleave(num_seeds)
    truth = float(kid(real, alike(8000, 1, generator)))
    covered = 0
    for _ in range(300):
        findings = Findings(clusters, 300)
        findings.of_weights("kid", partial(kid, real, alike(num_clusters, num_seeds, generator), clusters=clusters))
        covered += findings.intervals["kid"].low <= truth <= findings.intervals["kid"].high
    assert covered / 300 >= 0.93


def test_balanced_real_pictures_are_no_farther_than_drawn_ones():
    generator = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(8, 4, generator=generator)
    balanced = torch.arange(8).repeat(4)
    plain, corrected = [], []
    for _ in range(400):
        drawn = torch.randint(8, (40,), generator=generator)
        real, fake = (centres[labels] + torch.randn(len(labels), 4, generator=generator) for labels in (balanced, drawn))
        plain.append(kid(real, fake))
        corrected.append(kid(real, fake, real_labels=balanced))
    error = torch.stack(corrected).std() / 400**0.5
    assert torch.stack(plain).mean() < -5 * error and torch.stack(corrected).mean().abs() < 3 * error
    assert torch.equal(kid(real, fake, real_labels=balanced * 2**60 - 5), kid(real, fake, real_labels=balanced))  # labels are any numbers
    assert torch.equal(kid(real[:8], fake, real_labels=balanced[:8]), kid(real[:8], fake))  # one of each: nothing to correct by


def test_fid_of_shifted_gaussians_is_the_squared_shift():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 3, generator=generator)
    assert float(fid(x, x + torch.tensor([3.0, 0.0, 4.0]))) == pytest.approx(25, rel=1e-3)
    assert float(fid(x, x)) == pytest.approx(0, abs=1e-3)


def wave(cycles: float, side: int = 64, axis: int = 0) -> torch.Tensor:
    """[1, 3, side, side] a cosine wave that the mirrored edges continue, of unit mean energy."""
    position = (torch.arange(side) + 0.5) / side
    line = 2**0.5 * torch.cos(torch.pi * 2 * cycles * position)
    return (line[:, None] if axis == 0 else line[None]).expand(1, 3, side, side)


def test_high_frequencies_are_those_above_half_of_nyquist():
    low, high = wave(15), wave(17)  # of 32 cycles at Nyquist
    assert float(high_frequency_energy(low)) == pytest.approx(0, abs=1e-6)
    assert float(high_frequency_energy(high)) == pytest.approx(1, rel=1e-4)
    assert float(high_frequency_energy(0.5 * wave(17, axis=1) + low)) == pytest.approx(0.25, rel=1e-4)
    assert float(high_frequency_energy(torch.ones(1, 3, 64, 64))) == 0
    assert high_frequency_energy(torch.rand(5, 3, 16, 24)).shape == (5,)


def test_opposite_edges_make_no_step():
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert float(high_frequency_energy(ramp)) < 1e-4
    assert 0.5 < float(high_frequency_energy(noise)) < 0.9  # white noise: all but a circle's share, 1 - pi / 16


def test_contrast_is_the_energy_of_all_frequencies_but_the_mean():
    assert float(contrast(0.5 * wave(17, axis=1) + wave(15) + 0.3)) == pytest.approx(1.25, rel=1e-4)
    assert float(contrast(torch.full((1, 3, 16, 24), 0.7))) == pytest.approx(0, abs=1e-10)
    flat = torch.tensor([-1.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)  # a colour is none
    assert float(contrast(flat)) == 0
    x = torch.rand(5, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    mirrored = torch.cat([torch.cat([x, x.flip(-1)], -1), torch.cat([x, x.flip(-1)], -1).flip(-2)], -2)
    spectrum = torch.fft.fft2(mirrored, norm="ortho").abs().square()
    spectrum[..., 0, 0] = 0
    torch.testing.assert_close(contrast(x), spectrum.mean((1, 2, 3)))
    assert bool((high_frequency_energy(x) < contrast(x)).all())


def found_textures(x: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """`textures` of pictures x against real ones."""
    held = RealPictures({}, None, float(high_frequency_energy(real).mean()), contrast=float(contrast(real).mean()))
    findings = Findings(torch.arange(len(x)))
    textures(findings, held, high_frequency_energy(x), contrast(x), "")
    assert findings.resampled.keys() == findings.metrics.keys()  # each has an interval
    return findings.metrics


def test_texture_over_contrast_tells_blurred_pictures_from_pale_ones():
    generator = torch.Generator().manual_seed(0)
    real = torch.nn.functional.avg_pool2d(torch.rand(40, 3, 66, 66, generator=generator) * 2 - 1, 3, 1)
    assert found_textures(real, real) == pytest.approx({"texture_over_contrast": 1, "contrast": 1, "texture": 1}, rel=1e-5)
    pale = found_textures(0.6 * real + 0.2, real)
    assert pale == pytest.approx({"texture_over_contrast": 1, "contrast": 0.36, "texture": 0.36}, rel=1e-4)
    blurred = found_textures(torch.nn.functional.avg_pool2d(real, 3, 1, 1, count_include_pad=False), real)
    rough = found_textures(real + 0.3 * torch.randn(real.shape, generator=generator), real)
    assert blurred["texture_over_contrast"] < 0.7 and rough["texture_over_contrast"] > 1.5
    strong = found_textures(2 * torch.nn.functional.avg_pool2d(real, 3, 1, 1, count_include_pad=False), real)  # blurred, with more contrast
    assert strong["texture_over_contrast"] == pytest.approx(blurred["texture_over_contrast"], rel=1e-4)
    for found in (pale, blurred, rough, strong):
        assert found["texture"] == pytest.approx(found["texture_over_contrast"] * found["contrast"], rel=1e-4)


def test_texture_over_contrast_is_a_ratio_of_sums():
    """A picture with nearly no contrast must not decide."""
    real = RealPictures({}, None, 1.0, contrast=4.0)
    findings = Findings(torch.arange(2))
    textures(findings, real, torch.tensor([2.0, 1e-6]), torch.tensor([4.0, 1e-6]), "anagram/flip/", "_turned")
    assert findings.metrics == pytest.approx(
        {"anagram/flip/texture_over_contrast_turned": 2, "anagram/flip/contrast_turned": 0.5, "anagram/flip/texture_turned": 1}, rel=1e-5
    )
    with pytest.raises(ValueError, match="wanted `real.contrast`"):
        textures(findings, RealPictures({}, None, 1.0), torch.ones(2), torch.ones(2), "")


def test_round_trip_is_the_reconstruction_of_what_was_sampled(tiny_vae):
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    values = round_trip_psnr(tiny_vae, x, batch_size=2)
    assert values.shape == (3,) and torch.allclose(values, round_trip_psnr(tiny_vae, x), atol=1e-4)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_features_that_are_no_numbers_are_refused(features, value):
    """LAPACK of MKL ends the process of them, with all that it had measured."""
    real, fake = features
    for place in (0, 1):
        broken = [real.clone(), fake.clone()]
        broken[place][[7, 9], 2] = value
        whose = ("real", "sampled")[place]
        for distance in (fid, kid, precision_recall):
            with pytest.raises(
                ValueError, match=f"features of {whose} pictures hold NaN or infinity for 2 of 60 pictures, first for picture 7"
            ):
                distance(*broken)
        with pytest.raises(ValueError, match=f"features 'judge' of {whose} pictures hold NaN or infinity for 2 of 60 pictures"):
            distances(Findings(torch.arange(60)), RealPictures({"judge": broken[0]}, None, 0.0), {"judge": broken[1]}, "generation/")
    assert finite("features", real) is real and len(finite("features", real[:0])) == 0
