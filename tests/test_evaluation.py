"""Evaluation: each metric against a library, a closed form or training's own."""

from __future__ import annotations

import copy
import csv
from types import SimpleNamespace

import pytest
import torch
import yaml
from diffusers.configuration_utils import FrozenDict
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from eqldm.anagram.sampling import Sampler
from eqldm.autoencoder.equivariance import latent_error
from eqldm.autoencoder.fold import fold_map
from eqldm.config import load_config
from eqldm.data.samples import PictureSamples
from eqldm.diffusion.module import train_diffusion
from eqldm.diffusion.objective import Objective
from eqldm.evaluation.anagram import anagram_metrics, best_of, every_pair, letter_rates, letter_tuples, unordered
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.equivariance import SYMMETRIES, Equivariance, equivariance_metrics, error_maps, latent_pictures
from eqldm.evaluation.features import judge_features
from eqldm.evaluation.fit import Fit, bins, fit_metrics, level_of, spectral_loss, verdict
from eqldm.evaluation.generation import generation_metrics, letter_prompts, plain_letters
from eqldm.evaluation.judge import Judge
from eqldm.evaluation.lookalikes import trivial
from eqldm.evaluation.monitor import LetterMonitor
from eqldm.evaluation.naming import question_of
from eqldm.evaluation.parts import part_metrics
from eqldm.evaluation.quality import RealData, RealPictures
from eqldm.evaluation.reconstruction import Reconstruction, reconstruction_metrics, worst_reconstructions
from eqldm.evaluation.sampled import Sampled
from eqldm.evaluation.work import identity, measure_all
from eqldm.model_folder import PRETRAINED, Networks, config_hash, decode, encode, load_vae, make_scheduler
from eqldm.views import IDENTITY, NEGATE, Rescale, parse_view
from eqldm.views.components import parse_components


@pytest.fixture
def samples(tiny_pictures) -> PictureSamples:
    return PictureSamples(tiny_pictures)


@pytest.fixture
def pictures(samples) -> torch.Tensor:
    return torch.stack([samples[n]["x"] for n in range(10)])


class EquivariantVAE(nn.Module):
    """Exactly equivariant, with a latent of 3 channels and f = 4: means of 4 x 4 pixels, times 3 plus 7, and back."""

    config = FrozenDict(scaling_factor=0.5)
    device = torch.device("cpu")

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=nn.functional.avg_pool2d(x, 4) * 3 + 7))

    def decode(self, z):
        return SimpleNamespace(sample=nn.functional.interpolate((z - 7) / 3, scale_factor=4))


def reconstructed(vae, samples, count=10, batch_size=4, **options) -> dict[str, float]:
    """The metrics of `Reconstruction`."""
    return reconstruction_metrics(measure_all(Reconstruction(vae, samples, count, **options), batch_size)).metrics


def test_a_distance_wants_the_real_pictures():
    values = {"psnr": torch.tensor([20.0, 21.0]), "features/judge": torch.ones(2, 3)}
    with pytest.raises(ValueError, match="rfid_judge is a distance from real pictures, .*: wanted `real`"):
        reconstruction_metrics(values)


def turned(vae, samples, views, count=10, batch_size=4, **options) -> dict[str, float]:
    """The metrics of `Equivariance`."""
    question = Equivariance(vae, samples, count, views, **options)
    return equivariance_metrics(measure_all(question, batch_size), vae, list(question.transforms)).metrics


def test_reconstruction_equals_torchmetrics(tiny_vae, samples, pictures):
    found = reconstructed(tiny_vae, samples)
    with torch.no_grad():
        y = decode(tiny_vae, encode(tiny_vae, pictures)).clamp(-1, 1)
    psnr = peak_signal_noise_ratio(y, pictures, data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3))
    assert found.keys() == {"reconstruction/psnr", "reconstruction/ssim"}
    assert found["reconstruction/psnr"] == pytest.approx(float(psnr), rel=1e-5)
    ssim = [float(structural_similarity_index_measure(a[None], b[None], data_range=2.0)) for a, b in zip(y, pictures)]
    assert found["reconstruction/ssim"] == pytest.approx(sum(ssim) / len(ssim), rel=1e-4)
    distance = reconstructed(tiny_vae, samples, lpips=lambda y, x: (y - x).abs().mean((1, 2, 3), keepdim=True))["reconstruction/lpips"]
    assert distance == pytest.approx(float((y - pictures).abs().mean()), rel=1e-5)


def test_reconstruction_of_one_picture(tiny_vae, samples):
    """A last batch of one is a batch too."""
    assert reconstructed(tiny_vae, samples, 5, 4) == pytest.approx(reconstructed(tiny_vae, samples, 5, 5), rel=1e-5)


def test_the_worst_reconstructions(tiny_vae, samples):
    values = measure_all(Reconstruction(tiny_vae, samples, 10))
    worst = worst_reconstructions(tiny_vae, samples, values, 3)
    assert [found["psnr"] for found in worst] == values["psnr"].sort().values[:3].tolist()
    assert worst[0]["key"] == f"{int(values['psnr'].argmin()):09d}" and worst[0]["y"].shape == (3, 32, 32)


def test_equivariance_of_an_equivariant_autoencoder(samples):
    views = [*SYMMETRIES, parse_view("patch_permute:4"), parse_view("flip@patch_permute:2:3")]
    found = turned(EquivariantVAE(), samples, views)
    plain = reconstructed(EquivariantVAE(), samples)["reconstruction/psnr"]
    for view in views:
        assert found[f"equivariance/{view.name}/latent_error"] < 1e-10
        assert found[f"equivariance/{view.name}/psnr"] == pytest.approx(plain, rel=1e-4)
        assert found[f"equivariance/{view.name}/decoder_psnr"] == pytest.approx(106.02, abs=0.01)  # the ceiling: no error at all
    maps = error_maps(measure_all(Equivariance(EquivariantVAE(), samples, 10, views)), views)
    assert list(maps) == [view.name for view in views] and all(float(each.abs().max()) < 1e-6 for each in maps.values())


def test_equivariance_of_the_identity_is_exact(tiny_vae, samples):
    found = turned(tiny_vae, samples, [IDENTITY], batch_size=10)
    assert found["equivariance/identity/latent_error"] == 0
    assert found["equivariance/identity/psnr"] == pytest.approx(reconstructed(tiny_vae, samples)["reconstruction/psnr"])


def test_equivariance_closed_form(tiny_vae, samples, pictures):
    view = parse_view("rotate_90")
    found = turned(tiny_vae, samples, [view, NEGATE], batch_size=3)
    with torch.no_grad():
        z, encoded = encode(tiny_vae, pictures), encode(tiny_vae, view(pictures))
        mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
        expected = latent_error((encoded - mean) / std, (view(z) - mean) / std).mean()
        difference = decode(tiny_vae, view(z)).clamp(-1, 1) - view(pictures)
        psnr = (10 * torch.log10(4 / difference.square().mean((1, 2, 3)))).mean()
        plain = (decode(tiny_vae, z).clamp(-1, 1) - pictures).square().mean((0, 1))
    assert found["equivariance/rotate_90/latent_error"] == pytest.approx(float(expected), rel=1e-4)
    assert found["equivariance/rotate_90/psnr"] == pytest.approx(float(psnr), rel=1e-4)
    both = [found[f"equivariance/{name}/latent_error"] for name in ("rotate_90", "negate")]
    assert found["equivariance/mean/latent_error"] == pytest.approx(sum(both) / 2)
    assert found["equivariance/rotate_90/latent_error"] > 0.01
    (shown,) = error_maps(measure_all(Equivariance(tiny_vae, samples, 10, [view])), [view]).values()
    torch.testing.assert_close(shown, view.inverse(difference).square().mean((0, 1)) - plain, atol=1e-5, rtol=1e-3)


def test_the_error_as_eqvae_states_it(tiny_vae, samples, pictures):
    """Of raw latents, over the three rotations, and over scales by plain bilinear resizing."""
    with torch.no_grad():
        tiny_vae.quant_conv.bias.add_(0.3)
    scales = [Rescale(scale, scale, "bilinear") for scale in (0.75, 0.5)]
    found = turned(tiny_vae, samples, SYMMETRIES, rescales=scales)
    with torch.no_grad():
        raw = tiny_vae.encode(pictures).latent_dist.mean
        for metric, transforms in (("rotation", [parse_view(f"rotate_{a}") for a in (90, 180, 270)]), ("scale", scales)):
            errors = [latent_error(tiny_vae.encode(T(pictures)).latent_dist.mean, T(raw)).mean() for T in transforms]
            expected = sum(map(float, errors)) / len(errors)
            assert found[f"equivariance/eqvae_{metric}_error"] == pytest.approx(expected, rel=1e-4), metric
    # ... and the same through diffusers' scale and shift, which are no part of the latents that the paper means
    tiny_vae.register_to_config(scaling_factor=0.3, shift_factor=0.7)
    again = turned(tiny_vae, samples, SYMMETRIES, rescales=scales)
    for metric in ("rotation", "scale"):
        assert again[f"equivariance/eqvae_{metric}_error"] == pytest.approx(found[f"equivariance/eqvae_{metric}_error"], rel=1e-4)
    assert "equivariance/rescale_0.5/psnr" in found and found["equivariance/mean/psnr"] != found["equivariance/rescale_0.5/psnr"]


def test_negation_of_an_odd_autoencoder_is_exact(samples, pictures):
    """E(-x) = -E(x), whatever the latents' mean: the error is that of z, not of z less its mean."""
    vae = EquivariantVAE()
    vae.encode = lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=nn.functional.avg_pool2d(x, 4) * 3))
    vae.decode = lambda z: SimpleNamespace(sample=nn.functional.interpolate(z / 3, scale_factor=4))
    assert abs(float(pictures.mean())) > 0.01
    assert turned(vae, samples, [NEGATE])["equivariance/negate/latent_error"] < 1e-10


def test_latent_error_does_not_depend_on_scale_and_offset(tiny_vae, samples):
    """A channel map must not make an autoencoder look better."""
    view = parse_view("rotate_90")
    before = turned(tiny_vae, samples, [view])
    with torch.no_grad():
        tiny_vae.quant_conv.weight.mul_(3)
        tiny_vae.quant_conv.bias.mul_(3).add_(20)
    after = turned(tiny_vae, samples, [view])
    assert after["equivariance/rotate_90/latent_error"] == pytest.approx(before["equivariance/rotate_90/latent_error"], rel=1e-3)


def test_latents_as_colours(tiny_vae, pictures):
    views = [parse_view("rotate_90"), parse_view("flip")]
    shown = latent_pictures(EquivariantVAE(), pictures[:2], views)
    assert len(shown) == 2 and list(shown[0]) == ["z", "rotate_90", "flip"] and shown[0]["z"].shape == (3, 8, 8)
    for each in shown:  # latents that turn look alike
        torch.testing.assert_close(each["rotate_90"], each["z"], atol=1e-4, rtol=0)
    different = latent_pictures(tiny_vae, pictures[:2], views)[0]
    assert float((different["rotate_90"] - different["z"]).abs().max()) > 0.1


# Fit


def gaussian_values(spectrum: torch.Tensor, mean: torch.Tensor, count: int = 4000) -> tuple[torch.Tensor, dict]:
    """Latents [N, C, h, w] of two equal channels with this spectrum [h, w] and mean [C], and the values that `Fit` has of them."""
    height, width = spectrum.shape
    noise = torch.randn(count, 1, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = torch.fft.ifft2(torch.fft.fft2(noise) * spectrum.sqrt()).real.expand(-1, 2, -1, -1) + mean.view(1, 2, 1, 1)
    transformed = torch.fft.fft2(z, norm="ortho").movedim(1, -1)
    values = {
        "sum/spectrum": torch.view_as_real(torch.einsum("bhwc,bhwd->hwcd", transformed, transformed.conj())),
        "channels/sum": z.sum((2, 3)), "channels/square": z.square().sum((2, 3)), "channels/cells": torch.full((count,), height * width),
    }  # fmt: skip
    return z, values


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_spectral_loss_is_that_of_the_best_linear_denoiser(prediction):
    """By drawing: no denoiser that is linear in each frequency comes below it, and the Wiener filter reaches it."""
    frequencies = torch.fft.fftfreq(8)
    spectrum = (1 / (0.05 + frequencies[:, None] ** 2 + frequencies**2)).double()
    mean = torch.tensor([0.5, -2.0], dtype=torch.float64)
    z, values = gaussian_values(spectrum, mean)
    objective = Objective.of(make_scheduler({"_class_name": "DDIMScheduler", "prediction_type": prediction}))
    t = torch.tensor([50.0, 400.0, 900.0])
    expected = spectral_loss(values, objective, t)
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for time, loss in zip(t, expected):
        times = time.expand(len(z))
        noisy = objective.add_noise(z, eps, times)
        signal, noise = (float(level[0]) for level in objective.levels(times[:1]))
        both = (noisy - signal * mean.view(1, 2, 1, 1)).mean(1, keepdim=True)  # the channels are equal: half the noise in their mean
        gain = signal * spectrum / (signal**2 * spectrum + noise**2 / 2)
        clean = torch.fft.ifft2(torch.fft.fft2(both) * gain).real + mean.view(1, 2, 1, 1)
        found = objective.loss(objective.output_of(clean, noisy, times), z, eps, times).mean()
        assert float(loss) == pytest.approx(float(found), rel=0.03)


def test_the_spectral_loss_of_white_latents():
    """Unit variance, nothing shared: the estimate's error is 1 - a of alphas_cumprod, and that of eps a."""
    values = {
        "sum/spectrum": torch.view_as_real(torch.eye(3, dtype=torch.complex128).expand(4, 4, 3, 3) * 5), "channels/sum": torch.zeros(5, 3),
        "channels/square": torch.full((5, 3), 16.0), "channels/cells": torch.full((5,), 16.0),
    }  # fmt: skip
    objective = Objective.of(make_scheduler({"_class_name": "DDIMScheduler"}))
    t = torch.tensor([0.0, 500.0, 999.0])
    torch.testing.assert_close(spectral_loss(values, objective, t), objective.alphas_cumprod[t.long()].double())


def test_bins():
    assert [len(each) for each in bins(torch.tensor([0.0, 99.0]), 100)] == [1, *[0] * 8, 1]
    rows = bins(torch.tensor([0.0, 99.0, 100.0, 999.0, 1000.0]))
    assert [each.tolist() for each in rows] == [[0, 1], [2], [], [], [], [], [], [], [], [3, 4]]


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> PictureSamples:
    """52 letters in faces that no model has seen."""
    import glyphs

    folder = tmp_path_factory.mktemp("glyphs")
    glyphs.make_split(folder, "test", 52, size=64, shard_size=52)
    return PictureSamples(folder / "test")


@pytest.mark.parametrize("name, other", [("glyphs-base", "glyphs-eq"), ("glyphs-eq", "glyphs-base")])
def test_the_verdict_on_latents_that_a_shipped_unet_knows_and_does_not(letters, name, other):
    """With the UNet's own VAE given, and without. Latents a little larger cost no letters; a channel negated, or the other VAE, do."""
    sampler, own = Sampler.open(PRETRAINED / name, "cpu"), load_vae(PRETRAINED / name)
    negated = torch.ones(8).double()
    negated[0] = -1
    changes = {"own": torch.ones(8).double(), "scaled": torch.full((8,), 1.2).double(), "negated": negated}
    vaes = {"swap": load_vae(PRETRAINED / other)}
    for change, scales in changes.items():
        vaes[change] = load_vae(PRETRAINED / name)
        fold_map(vaes[change], torch.diag(scales), torch.zeros(8).double())
    known, alone = {}, {}
    for change, vae in vaes.items():
        sampler.vae = vae
        known[change] = measured_fit(Fit(sampler, letters, 52, own=own if change in ("swap", "negated") else None))
        alone[change] = verdict({key: value for key, value in known[change].items() if "own" not in key and "aligned" not in key})
    good, bad = "fits", "does not fit"
    assert {change: each.level for change, each in alone.items()} == {"own": good, "scaled": good, "negated": bad, "swap": bad}
    ratios = {change: each["fit/loss_ratio"] for change, each in known.items()}
    assert level_of(ratios["scaled"], ratios["scaled"] / ratios["own"]) == good
    swap, turned = (verdict(known[change]) for change in ("swap", "negated"))
    assert swap.level == turned.level == bad

    assert alone["own"].text.startswith("The UNet fits this VAE: its denoising loss, 0.")
    metrics = known["swap"]
    assert metrics["fit/loss_ratio"] > 1.5 and 0.5 < metrics["fit/aligned_share"] < 0.9
    assert metrics["fit/loss_ratio/bin_0"] > 2 * metrics["fit/loss_ratio/bin_8"]
    assert "times what it is on its own VAE's latents" in swap.text and "that is no fit either" in swap.text
    assert "Adapt the UNet" in swap.text and "Adapt the UNet" in alone["swap"].text and "standard deviation of" in alone["swap"].text
    assert known["negated"]["fit/aligned_share"] > 0.9
    if name == "glyphs-base":  # whose channels have equal variances, so that the alignment undoes it
        assert "fold that map into the VAE, and the UNet fits" in turned.text and "Adapt" not in turned.text


def test_the_levels_of_the_verdict():
    """The ratio to own decides where there is one; a UNet no better than the filter never fits, nor does one whose loss is not finite."""
    nan = float("nan")
    cases = {
        (0.4, None): "fits", (0.5, None): "may fit", (0.99, None): "may fit", (1.0, None): "does not fit", (nan, None): "does not fit",
        (0.4, 1.0): "fits", (0.7, 1.2): "fits", (0.4, 1.25): "may fit", (0.9, 2.4): "may fit", (0.9, 2.5): "does not fit",
        (1.1, 1.0): "does not fit", (0.4, nan): "does not fit",
    }  # fmt: skip
    assert {key: level_of(*key) for key in cases} == cases
    metrics = {"fit/val_loss": 0.3, "fit/loss_ratio": 0.6, "fit/latent_std": 1.0, "fit/latent_mean": 0.0}
    found = verdict(metrics)
    assert found.level == "may fit" and "below 0.5 none did, from 1 on three in four" in found.text and "Adapt" not in found.text
    own = {"fit/ratio_to_own": 1.5, "fit/own_loss_ratio": 0.4, "fit/aligned_loss_ratio": 0.4, "fit/aligned_share": 0.99}
    assert "below 1.25 none did, from 2.5 on three" in verdict(metrics | own).text


def test_losses_on_other_latents_are_held_against_their_own_filter(tiny_model_folder, samples, make_tiny_vae):
    """The own VAE's ratio is the one that it has when it is measured itself."""
    sampler, other = Sampler.open(tiny_model_folder, "cpu"), make_tiny_vae(seed=3)
    own = sampler.vae
    alone = measured_fit(Fit(sampler, samples, 24))
    sampler.vae = other
    metrics = measured_fit(Fit(sampler, samples, 24, own=own))
    assert metrics["fit/own_loss_ratio"] == pytest.approx(alone["fit/loss_ratio"], rel=1e-5)
    assert metrics["fit/ratio_to_own"] == pytest.approx(metrics["fit/loss_ratio"] / alone["fit/loss_ratio"], rel=1e-5)
    assert metrics["fit/loss_ratio"] == pytest.approx(measured_fit(Fit(sampler, samples, 24))["fit/loss_ratio"], rel=1e-5)


def measured_fit(question: Fit) -> dict[str, float]:
    """The metrics of `Fit`."""
    return fit_metrics(measure_all(question, 26), Objective.of(question.sampler.networks.scheduler)).metrics


def test_the_same_vae_under_another_name_fits(tiny_model_folder, samples):
    sampler = Sampler.open(tiny_model_folder, "cpu")
    metrics = measured_fit(Fit(sampler, samples, 24, own=load_vae(tiny_model_folder)))
    assert metrics["fit/ratio_to_own"] == pytest.approx(1) and metrics["fit/own_loss_ratio"] == pytest.approx(metrics["fit/loss_ratio"])


def test_what_training_logs_at_validation_is_what_the_evaluation_gives(tmp_path, make_model_folder, tiny_pictures):
    """The fit, and what letters read as, of the exported model are the last that its training logged, on the same pictures."""
    letters = [f"the letter {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    model = make_model_folder(tmp_path / "model", captions=letters)
    file = {
        "stage": "diffusion", "init": "pretrained", "model": str(model), "vae": str(model), "val_letters": 4, "min_snr_gamma": 5.0,
        "data": {"train": str(tiny_pictures), "val": str(tiny_pictures), "batch_size": 4, "num_workers": 0, "val_samples": 10},
        "run": {"dir": str(tmp_path / "run"), "num_steps": 2, "precision": "32-true", "accelerator": "cpu", "val_every": 2},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "ema_decay": 0.5},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(file))
    config = load_config(tmp_path / "config.yaml")
    sampler = Sampler.open(train_diffusion(config, callbacks=[LetterMonitor(config)]), "cpu")
    with open(tmp_path / "run" / "logs" / "metrics.csv", newline="") as rows:
        logged = [row for row in csv.DictReader(rows) if row.get("val/loss")][-1]
    samples = PictureSamples(tiny_pictures)
    for batch_size in (4, 10):
        assert measured_fit_loss(sampler, samples, batch_size) == pytest.approx(float(logged["val/loss"]), rel=1e-5)

    judge, wanted = Judge.open(), plain_letters(4)
    features = [judge_features(judge)]
    real = RealPictures.of(measure_all(RealData(samples, 10, features, judge)))
    question = Sampled(
        "generation", sampler, [IDENTITY], letter_prompts(wanted), wanted=wanted, judge=judge, features=features,
        num_inference_steps=20, guidance_scale=5.0,
    )  # fmt: skip
    metrics = generation_metrics(measure_all(question), real, wanted).metrics
    assert {
        "generation/read_right",
        "generation/read_right_data",
        "generation/kid_judge",
        "generation/texture",
        "generation/round_trip_psnr",
    } <= metrics.keys()
    for name, value in metrics.items():
        assert float(logged[f"val/{name}"]) == pytest.approx(value, rel=1e-3, abs=1e-5), name


def measured_fit_loss(sampler: Sampler, samples: PictureSamples, batch_size: int) -> float:
    """The mean denoising loss of ten pictures."""
    values = measure_all(Fit(sampler, samples, 10), batch_size)
    return fit_metrics(values, Objective.of(sampler.networks.scheduler)).metrics["fit/val_loss"]


def test_letter_tuples():
    pairs = letter_tuples(650)
    assert pairs.shape == (2, 650) and bool((pairs[0] != pairs[1]).all())
    assert len({tuple(pair) for pair in pairs.T.tolist()}) == 26 * 25  # all of them, once each
    assert torch.equal(letter_tuples(100), pairs[:, :100])
    assert not torch.equal(letter_tuples(100, seed=1), letter_tuples(100))
    assert letter_tuples(700).shape == (2, 700) and int(pairs.min()) == 0 and int(pairs.max()) == 25
    triples = letter_tuples(500, 3)
    assert triples.shape == (3, 500) and torch.equal(letter_tuples(10, 3), triples[:, :10])
    assert all(len(set(letters)) == 3 for letters in triples.T.tolist()) and int(triples.min()) == 0 and int(triples.max()) == 25


def test_the_draw_passes_over_pairs_that_need_no_anagram():
    """All others come in the same order as for views under which none is trivial."""
    half, pairs = [IDENTITY, parse_view("rotate_180")], letter_tuples(650)
    needed = pairs[:, ~trivial(pairs, half)]
    assert needed.shape == (2, 648) and torch.equal(letter_tuples(648, views=half), needed)
    assert torch.equal(letter_tuples(1400, views=half)[:, :648], needed) and not bool(trivial(letter_tuples(1400, views=half), half).any())
    assert torch.equal(letter_tuples(650, views=[IDENTITY, parse_view("jigsaw:2:0:8")]), pairs)
    three = [IDENTITY, parse_view("rotate_90"), parse_view("rotate_180")]
    assert torch.equal(letter_tuples(300, 3, views=three), letter_tuples(300, 3))  # no letter reads as three different ones


def test_plain_letters_are_drawn_alike():
    letters = plain_letters(2600)
    assert letters.shape == (1, 2600) and torch.equal(plain_letters(26), letters[:, :26])
    assert not torch.equal(plain_letters(26, 1), letters[:, :26])
    assert 60 < int(letters[0].bincount(minlength=26).min()) and int(letters.max()) == 25


def sampled_values(read, forced=None) -> dict[str, torch.Tensor]:
    """What `Sampled` has of pictures in two views, of which all but what was read is alike."""
    read = torch.tensor(read).T
    return {
        "read": read,
        "forced": read if forced is None else torch.tensor(forced).T,
        "energy": torch.tensor([[1.0, 3.0]]).expand(len(read), 2),
    }


def test_anagram_metrics_closed_form():
    wanted = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    values = sampled_values([[0, 1, 2, 26], [4, 5, 26, 26]], [[0, 1, 2, 3], [4, 5, 6, 0]])
    values["features/judge"] = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    values["similarity"] = torch.tensor([[[0.3, 0.1], [0.2, 0.4]]]).expand(4, 2, 2)
    real = RealPictures({"judge": torch.randn(9, 5)}, None, 2.0)
    found = anagram_metrics([IDENTITY, parse_view("flip")], values, real, wanted, temperature=0.01).metrics
    shares = ("ambigramability", "read_right_upright", "read_right_turned", "forced_ambigramability")
    assert [found[f"anagram/flip/{name}"] for name in shares] == [0.5, 0.75, 0.5, 0.75]
    assert found["anagram/flip/texture_upright"] == 0.5 and found["anagram/flip/texture_turned"] == 1.5
    assert found["anagram/flip/alignment"] == pytest.approx(0.3) and found["anagram/flip/alignment_q95"] == pytest.approx(0.3)
    assert found["anagram/flip/concealment"] == pytest.approx(1, abs=1e-4)
    assert {"anagram/flip/kid_judge_upright", "anagram/flip/precision_judge_turned"} <= found.keys()


def test_pairs_that_need_no_anagram_stand_apart():
    """M/W and N/N under half a turn, which a plain letter is; A/A; and A/B, C/D, of which one is read. Two seeds of each."""
    views, texture = [IDENTITY, parse_view("rotate_180")], ("texture_upright", "texture_turned")
    wanted = torch.tensor([[12, 13, 0, 0, 2], [22, 13, 0, 1, 3]]).repeat(1, 2)
    read = wanted.clone()
    read[1, [2, 3, 8]] = 26
    values = {**sampled_values(read.tolist(), wanted.tolist()), "chosen": torch.tensor([0.9] * 5 + [0.1] * 5)}
    findings = anagram_metrics(views, values, RealPictures({}, None, 1.0), wanted, num_seeds=2)
    found = {name.removeprefix("anagram/rotate_180/"): value for name, value in findings.metrics.items()}
    assert (found["ambigramability"], found["read_right_upright"], found["best_of_2"]) == (0.5, 1, 0.5)  # of A/B and C/D
    assert (found["trivial/ambigramability"], found["trivial/best_of_2"], found["trivial/forced_read_right_turned"]) == (1, 1, 1)
    assert (found["equal/ambigramability"], found["equal/best_of_2"], found["equal/forced_best_of_2"]) == (0.5, 0, 1)
    assert not [name for name in found if name.split("/")[-1] in texture and "/" in name]  # of all pictures
    assert "anagram/rotate_180/trivial/ambigramability" in findings.resampled  # of its own pictures, however few
    assert question_of("anagram/rotate_180/trivial/best_of_2") == "anagram/rotate_180"
    cut = anagram_metrics([IDENTITY, parse_view("patch_permute:2")], values, RealPictures({}, None, 1.0), wanted).metrics
    assert cut["anagram/patch_permute:2/equal/ambigramability"] == 0.75 and not [name for name in cut if "trivial" in name]


def test_readings_without_letters_are_of_all_pictures():
    values = {"energy": torch.ones(3, 2), "similarity": torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))}
    found = anagram_metrics([IDENTITY, parse_view("rotate_180")], values, RealPictures({}, None, 1.0), temperature=0.01).metrics
    least = values["similarity"].diagonal(dim1=1, dim2=2).amin(1)
    assert found["anagram/rotate_180/alignment"] == pytest.approx(float(least.mean()))
    assert all(name.count("/") == 2 for name in found)


def test_anagrams_of_three_views():
    wanted = torch.tensor([[0, 1], [2, 3], [4, 5]])
    read = torch.tensor([[0, 2, 4], [1, 3, 26]])
    values = {"read": read, "forced": wanted.T, "energy": torch.tensor([[1.0, 2.0, 3.0]]).expand(2, 3)}
    views = [IDENTITY, parse_view("rotate_90"), parse_view("patch_permute:2")]
    found = anagram_metrics(views, values, RealPictures({}, None, 1.0), wanted).metrics
    assert {name.removeprefix("anagram/rotate_90,patch_permute:2/"): value for name, value in found.items()} == {
        "ambigramability": 0.5, "read_right_upright": 1, "read_right_turned_1": 1, "read_right_turned_2": 0.5,
        "forced_ambigramability": 1, "forced_read_right_upright": 1, "forced_read_right_turned_1": 1, "forced_read_right_turned_2": 1,
        "texture_upright": 1, "texture_turned_1": 2, "texture_turned_2": 3,
    }  # fmt: skip


def test_intervals_draw_the_pictures_of_two_letters_together():
    """Ten pictures of each of six pairs, all ten alike: six draws, not sixty."""
    wanted = torch.tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]).repeat(1, 10)
    right = torch.tensor([True, True, True, False, False, False]).repeat(10)
    values = sampled_values(torch.where(right, wanted, 26).tolist())
    found = anagram_metrics([IDENTITY, parse_view("flip")], values, RealPictures({}, None, 1.0), wanted)
    spread = float(found.resampled["anagram/flip/ambigramability"].std())
    assert spread == pytest.approx((0.25 / 6) ** 0.5, rel=0.1)
    assert torch.equal(unordered(torch.tensor([[0, 1], [1, 0], [1, 1]])), torch.tensor([0, 0, 1]))


def test_too_few_pictures_have_no_interval():
    findings = Findings(torch.tensor([0, 7]))
    findings.mean("a", torch.tensor([1.0, 0.0]))
    findings.of_weights("b", lambda w: w[:, 0] / w[:, 1])
    assert findings.metrics == {"a": 0.5, "b": 1.0} and findings.resampled.keys() == {"a"}
    assert set(findings.resampled["a"].tolist()) == {0.0, 0.5, 1.0}  # two clusters, whatever their numbers


def test_letter_rates():
    wanted = torch.cat([every_pair(), every_pair()]).T
    read = wanted.clone()
    read[0, 5] = 26  # A with F, the first time
    rates = letter_rates(sampled_values(read.tolist()), wanted)
    assert float(rates[0, 5]) == 0.5 and float(rates.sum()) == 26 * 26 - 0.5
    assert bool(letter_rates(sampled_values([[0], [1]]), torch.tensor([[0], [1]]))[2, 3].isnan())


def test_what_is_sampled_is_seen_in_each_view(tiny_model_folder):
    """Batches do not change it, and picture k is that of seed + k under its own prompts."""
    sampler, shown = Sampler.open(tiny_model_folder, "cpu"), []

    class Letters:
        hash = "letters"

        def probabilities(self, x):
            shown.append(x)
            return nn.functional.one_hot(torch.arange(len(x)) + 5, 27).float()

    views, wanted = [IDENTITY, parse_view("rotate_180")], letter_tuples(5)
    question = Sampled("anagram", sampler, views, letter_prompts(wanted), judge=Letters(), wanted=wanted, seed=3, num_inference_steps=2)
    values = measure_all(question, 5)
    pictures = values["shown"].float() / 127.5 - 1
    torch.testing.assert_close(shown[0], pictures)
    torch.testing.assert_close(shown[1], views[1](pictures))
    assert torch.equal(values["read"], torch.arange(5, 10)[:, None].expand(-1, 2)) and values["energy"].shape == (5, 2)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    prompts = [f"the letter {letters[label]}" for label in wanted[:, 4].tolist()]
    alone = sampler(prompts, views, [7], num_inference_steps=2)
    torch.testing.assert_close(pictures[4:], alone, atol=1e-2, rtol=0)  # 8 bits
    assert int((measure_all(question, 2)["shown"].int() - values["shown"].int()).abs().max()) <= 1


def test_the_best_of_a_pairs_pictures_is_the_choosers():
    """Two pairs, three rounds of seeds: the chooser takes the second picture of the first pair, the third of the second."""
    scores = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.5, 0.8])
    assert best_of(scores, 3).tolist() == [0, 0, 1, 0, 0, 1]
    wanted = torch.tensor([[0, 1], [2, 3]]).repeat(1, 3)
    read = wanted.T.clone()
    read[[0, 1, 5], 1] = 26  # right in both views: numbers 2, 3, 4
    values = {"read": read, "forced": wanted.T, "chosen": scores, "energy": torch.ones(6, 2)}
    found = anagram_metrics([IDENTITY, parse_view("flip")], values, RealPictures({}, None, 1.0), wanted, num_seeds=3)
    assert found.metrics["anagram/flip/ambigramability"] == 0.5 and found.metrics["anagram/flip/best_of_3"] == 0.5
    assert found.metrics["anagram/flip/forced_best_of_3"] == 1
    resampled = found.resampled["anagram/flip/best_of_3"]  # pairs are drawn, each with all its pictures: both, the first or the second
    assert set(resampled.tolist()) == {0, 0.5, 1}


def test_parts_are_read_each_for_itself(tiny_model_folder):
    """The judge sees each part, within the range of pictures, of what `compose` gives."""
    sampler, seen = Sampler.open(tiny_model_folder, "cpu"), []

    class Letters:
        hash = "letters"

        def probabilities(self, x):
            seen.append(x)
            return nn.functional.one_hot(torch.full((len(x),), 4), 27).float()

    parts, wanted = parse_components("hybrid:0.06"), torch.tensor([[4, 1], [4, 4]])
    question = Sampled(
        "components_hybrid", sampler, parts, letter_prompts(wanted), judge=Letters(), wanted=wanted, num_inference_steps=2, blend="pixels"
    )
    values = measure_all(question)
    made = sampler.compose(letter_prompts(wanted), parts, [0, 1], num_inference_steps=2, blend="pixels")
    for part, shown in zip(parts, seen):
        torch.testing.assert_close(shown, part(made).clamp(-1, 1), atol=2e-2, rtol=0)  # 8 bits
    assert not {name for name in values if name.startswith(("energy", "features"))}
    real = RealPictures({}, None, 1.0, None, {"hybrid:0.06": [0.4, 0.9]})
    apart = part_metrics("hybrid:0.06", parts, values, real, question.clusters, wanted).metrics
    assert (apart["components/hybrid:0.06/ambigramability"], apart["components/hybrid:0.06/equal/ambigramability"]) == (0, 1)  # B/E, E/E
    wanted[1, 0] = values["read"][0, 1] = values["forced"][0, 1] = 5  # E/F, read right, and B/E
    found = part_metrics("hybrid:0.06", parts, values, real, question.clusters, wanted).metrics
    shares = {name.removeprefix("components/hybrid:0.06/"): value for name, value in found.items() if "round_trip" not in name}
    assert shares == {
        "ambigramability": 0.5, "read_right_low": 0.5, "read_right_high": 1, "forced_read_right_low_data": 0.4,
        "forced_ambigramability": 0.5, "forced_read_right_low": 0.5, "forced_read_right_high": 1, "forced_read_right_high_data": 0.9,
    }  # fmt: skip


def test_the_pictures_that_are_shown_are_drawn_from_all(tiny_model_folder):
    question = Sampled("anagram", Sampler.open(tiny_model_folder, "cpu"), [IDENTITY], [["the letter a"] * 60], num_inference_steps=1)
    shown = question.shown.tolist()
    assert len(shown) == 24 and shown == sorted(set(shown)) and shown[-1] > 50
    last = question.measure(range(50, 60))
    alone = question.sampler(["the letter a"], [IDENTITY], [shown[-1]], num_inference_steps=1)
    assert len(last["shown"]) == sum(number >= 50 for number in shown)
    torch.testing.assert_close(last["shown"][-1:].float() / 127.5 - 1, alone, atol=1e-2, rtol=0)


def test_a_key_says_all_that_a_model_computes_with(tiny_model_folder, make_tiny_vae):
    """Weights alone do not: settings of the networks, but not the order in which diffusers lists those that were left out."""
    networks = Networks.open(tiny_model_folder)
    vae = make_tiny_vae()
    before = identity(vae, networks)
    other = copy.deepcopy(networks)
    other.unet.register_to_config(sample_size=16)
    other.scheduler.register_to_config(beta_end=0.02)
    changed = identity(make_tiny_vae(norm_num_groups=2), other)
    assert {name for name in before if before[name] != changed[name]} == {"vae", "unet", "scheduler"}
    orders = [{"beta_end": 0.02, "_use_default_values": order} for order in (["a", "b"], ["b", "a"])]
    assert config_hash(orders[0]) == config_hash(orders[1]) != config_hash({"beta_end": 0.03})


def test_real_pictures(make_picture_shards, tmp_path):
    samples = PictureSamples(make_picture_shards(tmp_path / "data", corrupt={2}))
    values = measure_all(RealData(samples, 6), 4)
    assert values["unreadable"].tolist() == [0, 0, 1, 0, 0, 0] and values["label"].tolist() == [0, 1, 0, 0, 1, 2]
    assert RealPictures.of(values).labels is not None
    values["label"][3] = -1
    assert RealPictures.of(values).labels is None
