"""benchmarks/gpu_chain.py: stages that end with their time, and what they leave."""

from __future__ import annotations

import argparse
import csv
import tarfile
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

import gpu_chain
from eqldm.config import load_config
from gpu_parts import DONE, FAILED, Time, results

VAE = {
    "stage": "autoencoder",
    "architecture": {"block_out_channels": [8] * 3, "layers_per_block": 1, "norm_num_groups": 1, "mid_block_add_attention": False,
                     "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3, "latent_channels": 4},
    "equivariance": {"group": "d4", "consistency_weight": 0.1},
}  # fmt: skip
UNET = {
    "stage": "diffusion", "vae": "none", "train_text_encoder": True, "sample_prompts": ["picture 1", "picture 2"],
    "unet": {"block_out_channels": [16, 16], "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "layers_per_block": 1,
             "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": 4, "norm_num_groups": 8},
    "text_encoder": {"hidden_size": 32},
    "scheduler": {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                  "timestep_spacing": "trailing", "clip_sample": False},
}  # fmt: skip
REST = {
    "data": {"train": "none", "val": "none", "batch_size": 4, "num_workers": 0, "val_samples": 8},
    "run": {"dir": "none", "num_steps": 10, "precision": "32-true", "log_every": 1},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "ema_decay": 0.5},
    "fold": {"num_images": 8},
}


class Passing:
    """Seconds that pass by being looked at."""

    def __init__(self, each: float):
        self.seconds, self.each = 0.0, each

    def __call__(self) -> float:
        self.seconds += self.each
        return self.seconds


@pytest.fixture
def data(tmp_path, make_picture_shards) -> Path:
    for split in ("train", "val"):
        make_picture_shards(tmp_path / "data" / split)
    return tmp_path / "data"


@pytest.fixture
def configs(tmp_path) -> tuple[Path, Path]:
    paths = tmp_path / "vae.yaml", tmp_path / "unet.yaml"
    rest = {key: value for key, value in REST.items() if key != "fold"}
    for path, file in zip(paths, ({**VAE, **REST}, {**UNET, **rest})):
        path.write_text(yaml.safe_dump(file))
    return paths


def arguments(tmp_path: Path, configs: tuple[Path, Path], data: Path) -> argparse.Namespace:
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    for folder in (out, scratch):
        folder.mkdir()
    given = {"out": out, "scratch": scratch, "device": "cpu", "tiny": False, "shards": data, "num_pictures": 8}
    return argparse.Namespace(config=configs[0], then=configs[1], set=["data.num_workers=0", "run.log_every=1"], **given)


def test_the_learning_rate_goes_down_with_the_time():
    rates = [gpu_chain.rate_factor(share) for share in (0, gpu_chain.HELD, 0.65, 1, 1.5)]
    assert rates == pytest.approx([1, 1, 0.01 + 0.99 / 2, 0.01, 0.01])


def test_a_training_ends_with_its_time_and_knows_its_steps(tmp_path, configs, data, monkeypatch):
    monkeypatch.setattr(gpu_chain, "END_SECONDS", {"autoencoder": 0.0})
    args = arguments(tmp_path, configs, data)
    options = gpu_chain.options(args, "autoencoder", tmp_path / "run", data)
    model, found = gpu_chain.train(configs[0], options, Time(40, Passing(1.0)))
    assert 5 < found["steps"] < 40 and found["samples"] == 4 * found["steps"] and "val/reconstruction/psnr" in found
    assert load_config(tmp_path / "run" / "config.yaml").run.num_steps == found["steps"]
    assert f"{found['steps']} steps of 4" in (model / "README.md").read_text()
    with open(tmp_path / "run" / "logs" / "metrics.csv", newline="") as file:
        rates = [float(row["lr-AdamW"]) for row in csv.DictReader(file) if row.get("lr-AdamW")]
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < 3e-4 and rates == sorted(rates, reverse=True)


def test_options_may_be_of_one_stage(tmp_path, configs, data):
    args = arguments(tmp_path, configs, data)
    args.set = ["data.batch_size=2", "diffusion:data.batch_size=8", "autoencoder:model=a:b"]
    found = {stage: gpu_chain.options(args, stage, tmp_path, data) for stage in ("autoencoder", "diffusion")}
    assert "data.batch_size=2" in found["autoencoder"] and "model=a:b" in found["autoencoder"]
    assert "data.batch_size=8" in found["diffusion"] and not any(item.startswith("model=") for item in found["diffusion"])


@pytest.mark.slow
def test_both_stages_come_home_in_one_model(tmp_path, configs, data, monkeypatch):
    monkeypatch.setattr(gpu_chain, "END_SECONDS", {"autoencoder": 1.0, "diffusion": 1.0})
    monkeypatch.setattr(gpu_chain, "HOME_SECONDS", 2.0)
    args = arguments(tmp_path, configs, data)
    found = gpu_chain.learn_both(args, Time.of(20))
    assert found["planned_steps"] > 2 and found["pieces"] == ["learnt.tar.00"] and (args.out / "samples.png").is_file()
    assert [(row["name"], row["state"]) for row in results(args.out)] == [("autoencoder", DONE), ("diffusion", DONE)]
    with tarfile.open(args.out / "learnt.tar.00") as tar:
        tar.extractall(tmp_path / "learnt", filter="data")
    for part in ("vae", "unet"):
        weights = load_file(next((tmp_path / "learnt" / "model" / part).glob("*.safetensors")))
        assert {str(value.dtype) for value in weights.values()} == {"torch.float16"}
    assert (tmp_path / "learnt" / "diffusion" / "metrics.csv").is_file()


@pytest.mark.slow
def test_what_the_first_stage_learnt_comes_home_though_the_second_fails(tmp_path, configs, data, monkeypatch):
    monkeypatch.setattr(gpu_chain, "END_SECONDS", {"autoencoder": 1.0, "diffusion": 1.0})
    monkeypatch.setattr(gpu_chain, "HOME_SECONDS", 2.0)
    args = arguments(tmp_path, configs, data)
    args.set.append("diffusion:unet.norm_num_groups=7")
    with pytest.raises(RuntimeError, match="export"):  # of a run that left no checkpoint
        gpu_chain.learn_both(args, Time.of(20))
    assert [(row["name"], row["state"]) for row in results(args.out)] == [("autoencoder", DONE), ("diffusion", FAILED)]
    assert (args.out / "learnt.tar.00").is_file()
