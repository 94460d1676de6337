"""Evaluation: each metric against a library, a closed form or training's own; the whole command, end to end."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from eqldm import evaluate as command
from eqldm.anagram.sampling import Sampler
from eqldm.config import load_config
from eqldm.data.samples import PictureSamples
from eqldm.diffusion.module import train_diffusion
from eqldm.evaluation.anagram import Reading, anagram_metrics, generation_metrics, letter_pairs, plain_letters, read_letters
from eqldm.evaluation.equivariance import equivariance_metrics
from eqldm.evaluation.fit import fit_metrics
from eqldm.evaluation.judge import Judge, save_judge
from eqldm.evaluation.monitor import LetterMonitor
from eqldm.evaluation.quality import RealPictures, quality_metrics
from eqldm.evaluation.reconstruction import reconstruction_metrics
from eqldm.evaluation.report import markdown_table, number
from eqldm.model_folder import decode, encode
from eqldm.views import D4, IDENTITY, NEGATE, parse_view

TURNED = [view for view in D4 if view != IDENTITY]


@pytest.fixture
def pictures(tiny_pictures) -> torch.Tensor:
    samples = PictureSamples(tiny_pictures)
    return torch.stack([samples[n]["x"] for n in range(10)])


class EquivariantVAE(nn.Module):
    """Exactly equivariant, with a latent of 3 channels and f = 4: means of 4 x 4 pixels, times 3 plus 7, and back."""

    config = SimpleNamespace(scaling_factor=0.5, get=lambda name, default=None: default)

    def encode(self, x):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=nn.functional.avg_pool2d(x, 4) * 3 + 7))

    def decode(self, z):
        return SimpleNamespace(sample=nn.functional.interpolate((z - 7) / 3, scale_factor=4))


def test_reconstruction_equals_torchmetrics(tiny_vae, pictures):
    found = reconstruction_metrics(tiny_vae, pictures, batch_size=4)
    with torch.no_grad():
        y = decode(tiny_vae, encode(tiny_vae, pictures)).clamp(-1, 1)
    psnr = peak_signal_noise_ratio(y, pictures, data_range=2.0, reduction="elementwise_mean", dim=(1, 2, 3))
    assert found.keys() == {"reconstruction/psnr", "reconstruction/ssim"}
    assert found["reconstruction/psnr"] == pytest.approx(float(psnr), rel=1e-5)
    ssim = [float(structural_similarity_index_measure(a[None], b[None], data_range=2.0)) for a, b in zip(y, pictures)]
    assert found["reconstruction/ssim"] == pytest.approx(sum(ssim) / len(ssim), rel=1e-4)


def test_reconstruction_of_one_picture(tiny_vae, pictures):
    """A last batch of one is a batch too."""
    whole = reconstruction_metrics(tiny_vae, pictures[:5], batch_size=5)
    assert reconstruction_metrics(tiny_vae, pictures[:5], batch_size=4) == pytest.approx(whole, rel=1e-5)


def test_equivariance_of_an_equivariant_autoencoder(pictures):
    views = [*TURNED, parse_view("patch_permute:4"), parse_view("flip@patch_permute:2:3")]
    found = equivariance_metrics(EquivariantVAE(), pictures, views, batch_size=4)
    plain = reconstruction_metrics(EquivariantVAE(), pictures)["reconstruction/psnr"]
    for view in views:
        assert found[f"equivariance/{view.name}/latent_error"] < 1e-10
        assert found[f"equivariance/{view.name}/psnr"] == pytest.approx(plain, rel=1e-4)
        assert found[f"equivariance/{view.name}/decoder_psnr"] == pytest.approx(106.02, abs=0.01)  # the ceiling: no error at all


def test_equivariance_of_the_identity_is_exact(tiny_vae, pictures):
    found = equivariance_metrics(tiny_vae, pictures, [IDENTITY], batch_size=10)
    assert found["equivariance/identity/latent_error"] == 0
    assert found["equivariance/identity/psnr"] == pytest.approx(reconstruction_metrics(tiny_vae, pictures)["reconstruction/psnr"])


def test_equivariance_closed_form(tiny_vae, pictures):
    view = parse_view("rotate_90")
    found = equivariance_metrics(tiny_vae, pictures, [view, NEGATE], batch_size=3)
    with torch.no_grad():
        z, turned = encode(tiny_vae, pictures), encode(tiny_vae, view(pictures))
        mean, std = z.mean((0, 2, 3), keepdim=True), z.std((0, 2, 3), keepdim=True)
        a, b = (turned - mean) / std, (view(z) - mean) / std
        expected = ((a - b).square().sum((1, 2, 3)) / a.square().sum((1, 2, 3))).mean()
        difference = decode(tiny_vae, view(z)).clamp(-1, 1) - view(pictures)
        psnr = (10 * torch.log10(4 / difference.square().mean((1, 2, 3)))).mean()
    assert found["equivariance/rotate_90/latent_error"] == pytest.approx(float(expected), rel=1e-4)
    assert found["equivariance/rotate_90/psnr"] == pytest.approx(float(psnr), rel=1e-4)
    both = [found[f"equivariance/{name}/latent_error"] for name in ("rotate_90", "negate")]
    assert found["equivariance/mean/latent_error"] == pytest.approx(sum(both) / 2)
    assert found["equivariance/rotate_90/latent_error"] > 0.01


def test_negation_of_an_odd_autoencoder_is_exact(pictures):
    """E(-x) = -E(x), whatever the latents' mean: the error is that of z, not of z less its mean."""
    vae = EquivariantVAE()
    vae.encode = lambda x: SimpleNamespace(latent_dist=SimpleNamespace(mean=nn.functional.avg_pool2d(x, 4) * 3))
    vae.decode = lambda z: SimpleNamespace(sample=nn.functional.interpolate(z / 3, scale_factor=4))
    assert abs(float(pictures.mean())) > 0.01
    assert equivariance_metrics(vae, pictures, [NEGATE])["equivariance/negate/latent_error"] < 1e-10


def test_latent_error_does_not_depend_on_scale_and_offset(tiny_vae, pictures):
    """A channel map must not make an autoencoder look better."""
    before = equivariance_metrics(tiny_vae, pictures, [D4[1]])
    with torch.no_grad():
        tiny_vae.quant_conv.weight.mul_(3)
        tiny_vae.quant_conv.bias.mul_(3).add_(20)
    after = equivariance_metrics(tiny_vae, pictures, [D4[1]])
    assert after["equivariance/rotate_90/latent_error"] == pytest.approx(before["equivariance/rotate_90/latent_error"], rel=1e-3)


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
    loss = float(logged["val/loss"])
    assert fit_metrics(sampler, samples, 10, batch_size=4)["fit/val_loss"] == pytest.approx(loss, rel=1e-5)
    assert fit_metrics(sampler, samples, 10)["fit/val_loss"] == pytest.approx(loss, rel=1e-5)

    judge = Judge.open()
    labels = torch.tensor([samples[i]["label"] for i in range(10)])
    real = RealPictures.of(torch.stack([samples[i]["x"] for i in range(10)]), judge, labels)
    reading = read_letters(sampler, judge, [IDENTITY], plain_letters(4), num_inference_steps=20, guidance_scale=5.0)
    metrics = generation_metrics(reading, lambda x: quality_metrics(x, judge, sampler.vae, real))
    assert metrics.keys() == {f"generation/{name}" for name in ("read_right", "kid", "fid", "texture", "round_trip_psnr")}
    for name, value in metrics.items():
        assert float(logged[f"val/{name}"]) == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_letter_pairs():
    pairs = letter_pairs(650)
    assert pairs.shape == (2, 650) and bool((pairs[0] != pairs[1]).all())
    assert len({tuple(pair) for pair in pairs.T.tolist()}) == 26 * 25  # all of them, once each
    assert torch.equal(letter_pairs(100), pairs[:, :100])
    assert not torch.equal(letter_pairs(100, seed=1), letter_pairs(100))
    assert letter_pairs(700).shape == (2, 700) and int(pairs.min()) == 0 and int(pairs.max()) == 25


def test_plain_letters_are_drawn_alike():
    letters = plain_letters(2600)
    assert letters.shape == (1, 2600) and torch.equal(plain_letters(26), letters[:, :26])
    assert not torch.equal(plain_letters(26, 1), letters[:, :26])
    assert 60 < int(letters[0].bincount(minlength=26).min()) and int(letters.max()) == 25


def test_anagram_metrics_closed_form():
    wanted = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    read = torch.tensor([[0, 1, 2, 9], [4, 5, 9, 9]])
    pictures = torch.zeros(4, 3, 8, 8)
    pictures[..., 0, :] = 1
    reading = Reading(pictures, wanted, read)

    def top(x):
        return {"kid": float(x[..., 0, :].mean())}

    assert anagram_metrics(parse_view("flip"), reading, top) == {
        "anagram/flip/ambigramability": 0.5,
        "anagram/flip/upright": 0.75,
        "anagram/flip/turned": 0.5,
        "anagram/flip/kid_upright": 1.0,
        "anagram/flip/kid_turned": 0.0,
    }
    assert generation_metrics(reading, top) == {"generation/read_right": 0.75, "generation/kid": 1.0}


def test_reading_shows_the_judge_each_view(tiny_model_folder):
    """Batches do not change it, and picture k is that of seed + k under its own prompts."""
    sampler, shown = Sampler.open(tiny_model_folder, "cpu"), []

    def judge(x):
        shown.append(x)
        return torch.arange(len(x))

    views, wanted = [IDENTITY, parse_view("rotate_180")], letter_pairs(5)
    reading = read_letters(sampler, judge, views, wanted, batch_size=2, seed=3, num_inference_steps=2)
    assert torch.equal(shown[1], views[1](reading.pictures)) and torch.equal(reading.read, torch.arange(5).expand(2, -1))
    assert reading.right.shape == (2, 5)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    prompts = [f"the letter {letters[label]}" for label in wanted[:, 4].tolist()]
    alone = sampler(prompts, views, [7], num_inference_steps=2)
    torch.testing.assert_close(reading.pictures[4:], alone, atol=1e-4, rtol=1e-4)


def test_table():
    table = markdown_table({"a": {"reconstruction/psnr": 28.512, "fit/val_loss": 0.123456}, "b": {"reconstruction/psnr": 7.0}})
    assert "| reconstruction/psnr ↑ | 28.51 | 7 |" in table and "| fit/val_loss ↓ | 0.123 | - |" in table
    assert number(0.0) == "0" and number(None) == "-"
    rows = markdown_table({"a": {"generation/texture": 1.2, "anagram/flip/kid_turned": 0.1, "generation/round_trip_psnr": 20.0}})
    assert "texture →1" in rows and "kid_turned ↓" in rows and "round_trip_psnr ↑" in rows


# The whole command


@pytest.fixture(scope="module")
def tiny_judge(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    about = {"architecture": "resnet18", "args": {"channels": [8, 8, 8, 8]}, "image_size": 32}
    save_judge(tmp_path_factory.mktemp("judge") / "model", timm.create_model("resnet18", num_classes=27, channels=[8, 8, 8, 8]), about)
    return tmp_path_factory.getbasetemp() / "judge0" / "model"


@pytest.fixture
def run(monkeypatch, tiny_pictures, tmp_path):
    """`run(*models, more=[...])`: the command on the tiny pictures; returns its `--out`."""

    def call(*models, more=()):
        sizes = ["--num-images", 6, "--num-letters", 4, "--num-pairs", 4, "--num-inference-steps", 2, "--device", "cpu"]
        words = [*models, "--data", tiny_pictures, "--out", tmp_path / "out", *sizes, *more]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        command.main()
        return tmp_path / "out"

    return call


@pytest.fixture
def vae_alone(tmp_path, tiny_model_folder) -> Path:
    shutil.copytree(tiny_model_folder / "vae", tmp_path / "vae-eq" / "model" / "vae")
    return tmp_path / "vae-eq" / "model"


def test_two_models_in_one_table(run, tiny_model_folder, vae_alone, tiny_judge, capsys):
    out = run(tiny_model_folder, vae_alone, more=["--judge", tiny_judge, "--views", "rotate_180", "flip@patch_permute:2"])
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out / 'report.md'}"
    whole, alone = (json.loads((out / name / "metrics.json").read_text()) for name in ("tiny", "vae-eq"))
    views = [*(view.name for view in TURNED), "flip@patch_permute:2", "mean"]
    of_vae = {f"equivariance/{view}/{name}" for view in views for name in ("latent_error", "psnr", "decoder_psnr")}
    of_vae |= {"reconstruction/psnr", "reconstruction/ssim", "judge/accuracy"}
    qualities = ("kid", "fid", "texture", "round_trip_psnr")
    shares = ("ambigramability", "upright", "turned", *(f"{name}_{view}" for name in qualities for view in ("upright", "turned")))
    of_anagrams = {f"anagram/{view}/{name}" for view in ("rotate_180", "flip@patch_permute:2") for name in shares}
    assert alone.keys() == of_vae and whole.keys() == of_vae | of_anagrams | {"fit/val_loss", "generation/read_right"} | {
        f"generation/{name}" for name in qualities
    }
    assert all(isinstance(value, float) for value in whole.values())
    assert {name: whole[name] for name in of_vae} == alone  # the same VAE
    errors = [alone[f"equivariance/{view.name}/latent_error"] for view in TURNED]  # the mean is D4's, whatever --views
    assert alone["equivariance/mean/latent_error"] == pytest.approx(sum(errors) / 7)
    sheet = Image.open(out / "models.png")
    assert sheet.width > 3 * 96 and sheet.height > 7 * 96  # 4 letters, and 2 kinds of 4 anagrams in 2 views: 20 rows in 3 columns
    report = (out / "report.md").read_text()
    assert "| metric | tiny | vae-eq |" in report and "Not computed for vae-eq: fit, generation, anagrams" in report
    sheet = Image.open(out / "equivariance.png")
    assert sheet.height > 2 * 4 * 96 and sheet.width > (2 + len(views) - 1) * 96  # 4 pictures by 2 models; x, D(z) and each view
    for name in ("letters.png", "anagrams_rotate_180.png", "anagrams_flip+patch_permute-2.png"):
        assert Image.open(out / "tiny" / name).width > 32
    about = json.loads((out / "tiny" / "about.json").read_text())
    assert about["num_images"] == 6 and len(about["vae_hash"]) == 16 and "torch" in about["versions"]


@pytest.mark.slow
def test_as_a_module(tiny_pictures, vae_alone, tmp_path):
    words = [sys.executable, "-m", "eqldm.evaluate", vae_alone, "--data", tiny_pictures, "--out", tmp_path / "out", "--num-images", 4]
    result = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "equivariance/mean/latent_error" in json.loads((tmp_path / "out" / "vae-eq" / "metrics.json").read_text())


def test_without_a_judge(run, tiny_model_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "SHIPPED", tmp_path / "none")
    out = run(tiny_model_folder)
    metrics = json.loads((out / "tiny" / "metrics.json").read_text())
    assert "fit/val_loss" in metrics and not any(name.startswith(("anagram", "generation", "judge")) for name in metrics)
    assert "Not computed: what the judge reads (no judge: give --judge FOLDER" in (out / "report.md").read_text()


def test_judge_none_asks_for_no_letters(run, tiny_model_folder):
    out = run(tiny_model_folder, more=["--judge", "none"])
    metrics = json.loads((out / "tiny" / "metrics.json").read_text())
    assert "fit/val_loss" in metrics and not any(name.startswith(("anagram", "generation", "judge")) for name in metrics)
    assert "Not computed: what the judge reads (--judge none)." in (out / "report.md").read_text()


def test_the_batch_size_reaches_every_metric_and_the_sampler(run, tiny_model_folder, tiny_judge, monkeypatch):
    encoded, sampled = [], []
    encode_one, call = AutoencoderKL.encode, Sampler.__call__
    monkeypatch.setattr(AutoencoderKL, "encode", lambda self, x, *a, **o: (encoded.append(len(x)), encode_one(self, x, *a, **o))[1])
    monkeypatch.setattr(Sampler, "__call__", lambda self, p, v, seeds, **o: (sampled.append(len(seeds)), call(self, p, v, seeds, **o))[1])
    monkeypatch.setattr(command, "turned_decodings", lambda vae, x, views: {"x": x})
    run(tiny_model_folder, more=["--judge", tiny_judge, "--batch-size", 3])
    assert set(encoded) == {3, 1} and sampled == [3, 1, 3, 1]  # 6 pictures; 4 letters, 4 pairs


def test_the_report_gives_a_command_that_a_shell_reads_and_names_unreadable_pictures(run, vae_alone, make_picture_shards, tmp_path):
    data = make_picture_shards(tmp_path / "my pictures", corrupt={2, 4})
    report = (run(vae_alone, more=["--data", data, "--judge", "none"]) / "report.md").read_text()
    assert "2 pictures cannot be read, the next one stands in for each: 000000002, 000000004." in report
    words = shlex.split(report.split("command: `")[1].split("`.")[0])
    assert words[:3] == ["python", "-m", "eqldm.evaluate"] and words[3:] == sys.argv[1:] and str(data) in words


def test_models_of_one_name_are_told_apart(run, vae_alone, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "SHIPPED", tmp_path / "none")
    other = shutil.copytree(vae_alone, tmp_path / "more" / "vae-eq" / "model")
    out = run(vae_alone, other)
    header = (out / "report.md").read_text().splitlines()[2]
    assert header == f"| metric | {tmp_path.name}-vae-eq | more-vae-eq |"
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == sorted([f"{tmp_path.name}-vae-eq", "more-vae-eq"])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--views", "rotat_180"], "unknown view 'rotat_180': did you mean rotate_180"),
        (["--views", "patch_permute:3"], "needs sides divisible by 3, got 8 x 8"),
        (["--judge", "nowhere"], "'nowhere' holds no judge"),
        (["--num-images", "0"], "--num-images: got 0, wanted at least 2"),
        (["--batch-size", "0"], "--batch-size: got 0, wanted at least 1"),
    ],
)
def test_errors_are_one_line(run, tiny_model_folder, tiny_judge, more, message):
    with pytest.raises(SystemExit) as info:
        run(tiny_model_folder, more=["--judge", tiny_judge, *more])
    assert info.value.code.startswith("error: ") and message in info.value.code


def test_one_model_twice(run, vae_alone):
    with pytest.raises(SystemExit, match="error: a model is given twice"):
        run(vae_alone, vae_alone)


def test_folders_that_are_no_models(run, tmp_path):
    with pytest.raises(SystemExit, match="error: model folder .*nowhere' does not exist"):
        run(tmp_path / "nowhere")


def test_judge_reads_other_sizes(tiny_judge):
    judge = Judge.open(tiny_judge)
    assert judge(torch.zeros(3, 3, 64, 64)).shape == (3,)
