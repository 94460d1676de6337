"""Wrong architectures and schedulers: one line that names the option, before a step is taken; and the machine that a run wants."""

from __future__ import annotations

import pytest
import torch

from conftest import TINY_UNET
from eqldm.autoencoder.module import build_vae, train_autoencoder
from eqldm.budget import budget
from eqldm.config import AutoencoderConfig, DiffusionConfig, RunConfig, load_config
from eqldm.construction import make_noise
from eqldm.diffusion.adaptation import build_networks
from eqldm.training.machine import check_machine

VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
}
UNET = {name: list(value) if isinstance(value, tuple) else value for name, value in TINY_UNET.items()}


@pytest.mark.parametrize(("changes", "message"), [
    ({"foo": 3}, "architecture.foo: AutoencoderKL has no such argument. It has in_channels"),
    ({"latent_chanels": 4}, r"architecture.latent_chanels: .* Did you mean architecture.latent_channels\?"),
    ({1: 4}, "architecture.1: AutoencoderKL has no such argument"),
    ({"block_out_channels": [1, 2]}, r"architecture does not fit: .*architecture.block_out_channels=\[1, 2\]"),
    ({"block_out_channels": 8}, "architecture.block_out_channels: got 8, wanted a list"),
    ({"block_out_channels": []}, "architecture does not fit"),
    ({"down_block_types": ["Foo", "Foo"]}, r"architecture does not fit: Foo .*\(got architecture.down_block_types=\['Foo', 'Foo'\]\)"),
    ({"latent_channels": "a"}, "architecture.latent_channels: got 'a', wanted a number"),
    ({"latent_channels": True}, "architecture.latent_channels: got True, wanted a number"),
    ({"latent_channels": 0}, "architecture does not fit"),
    ({"latent_channels": -1}, "architecture does not fit"),
    ({"scaling_factor": float("nan")}, "architecture.scaling_factor: got nan, wanted a finite number"),
    ({"in_channels": 4}, "architecture does not fit"),
    ({"layers_per_block": 10**5}, "architecture.layers_per_block: got 100000, wanted at most 256"),
    ({"block_out_channels": [8, 10**9]}, "architecture.block_out_channels: got .*, wanted at most 1000000"),
    ({"act_fn": "foo"}, r"architecture does not fit: .*\(got architecture.act_fn=foo\)"),
    ({"mid_block_add_attention": "no"}, "architecture.mid_block_add_attention: got 'no', wanted true or false"),
])  # fmt: skip
def test_an_architecture_that_does_not_fit(changes, message):
    config = AutoencoderConfig(architecture={**VAE, **changes})
    with pytest.raises(ValueError, match=message) as caught:
        build_vae(config, 32)
    assert "\n" not in str(caught.value)


@pytest.fixture
def build(make_tiny_vae):
    """`build(unet={}, ...)`: the networks of stage 2 from scratch, with these options."""

    def build(**options):
        made = DiffusionConfig(train_text_encoder=True, vae="v", **{"unet": UNET, "text_encoder": {"hidden_size": 16}, **options})
        made.run.seed = 0
        return build_networks(made, make_tiny_vae(), 32, ["the letter A"])

    return build


@pytest.mark.parametrize(("changes", "message"), [
    ({"foo": 3}, "unet.foo: UNet2DConditionModel has no such argument"),
    ({"layers_per_blok": 3}, r"Did you mean unet.layers_per_block\?"),
    ({"block_out_channels": [1, 2, 3]}, "unet does not fit: Must provide the same number of `block_out_channels`"),
    ({"block_out_channels": [8, "a"]}, r"unet.block_out_channels: got \[8, 'a'\], wanted a number"),
    ({"norm_num_groups": 3}, r"unet does not fit: num_channels \(8\) must be divisible by num_groups \(3\)"),
    ({"class_embed_type": "timestep"}, "unet does not fit: class_labels"),
    ({"mid_block_type": "foo"}, r"unet does not fit: .*\(got unet.mid_block_type=foo\)"),
    ({"conv_in_kernel": 2}, "unet does not fit"),
    ({"encoder_hid_dim": 5}, "unet does not fit"),
    ({"in_channels": 4}, "unet.in_channels follows from the latents"),
])  # fmt: skip
def test_a_unet_that_does_not_fit(build, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(unet={**UNET, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("sizes", "message"), [
    ({"foo": 3}, "text_encoder.foo: CLIPTextConfig has no such argument"),
    ({"hiden_size": 3}, r"Did you mean text_encoder.hidden_size\?"),
    ({"hidden_size": 15}, "text_encoder does not fit: .*text_encoder.hidden_size=15"),
    ({"hidden_size": "a"}, "text_encoder.hidden_size: got 'a', wanted a number"),
    ({"hidden_size": 16.5}, "text_encoder does not fit: .*hidden_size.*"),
    ({"hidden_act": "foo"}, "text_encoder does not fit"),
    ({"vocab_size": 5}, "text_encoder.vocab_size follows from the captions: drop it"),
    ({"dtype": "float16"}, "text_encoder.dtype: CLIPTextConfig has no such argument"),
])  # fmt: skip
def test_a_text_encoder_that_does_not_fit(build, sizes, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(text_encoder={"hidden_size": 16, **sizes})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("scheduler", "message"), [
    ({"predition_type": "v_prediction"}, r"scheduler.predition_type: DDIMScheduler has no .* Did you mean scheduler.prediction_type\?"),
    ({"_class_name": "Foo"}, "scheduler._class_name: diffusers has no scheduler 'Foo': wanted a class name such as DDIMScheduler"),
    ({"_class_name": "DDIMSheduler"}, r"Did you mean DDIMScheduler\?"),
    ({"_class_name": "__version__"}, "diffusers has no scheduler '__version__'"),
    ({"_class_name": ["a"]}, "diffusers has no scheduler"),
    ({"beta_schedule": "foo"}, r"scheduler does not fit: .*\(got scheduler.beta_schedule=foo\)"),
    ({"timestep_spacing": "foo"}, r"scheduler does not fit: .*\(got scheduler.timestep_spacing=foo\)"),
    ({"beta_start": float("nan")}, "scheduler.beta_start: got nan, wanted a finite number"),
    ({"beta_start": "a"}, "scheduler.beta_start: got 'a', wanted a number"),
    ({"num_train_timesteps": 0}, "scheduler does not fit"),
    ({"num_train_timesteps": 10**12}, "scheduler.num_train_timesteps: got 1000000000000, wanted at most 1000000"),
    ({"_class_name": "PNDMScheduler", "clip_sample": False}, "scheduler.clip_sample: PNDMScheduler has no such argument"),
])  # fmt: skip
def test_a_scheduler_that_does_not_fit(scheduler, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_noise(scheduler)
    assert "\n" not in str(caught.value)


def test_what_fits_is_made(build):
    networks = build(scheduler={"prediction_type": "v_prediction"})
    assert networks.scheduler.config.prediction_type == "v_prediction"
    assert build_vae(AutoencoderConfig(architecture=VAE), 32).config.sample_size == 32


def test_a_budget_is_refused_by_the_option(tmp_path, tiny_pictures, write_tiny_options):
    path = write_tiny_options(tmp_path / "options.yaml", tiny_pictures, num_steps=2)
    with pytest.raises(ValueError, match="architecture.foo: AutoencoderKL has no such argument"):
        budget(load_config(path, ["architecture.foo=3"]))


def test_the_machine_is_looked_at_first(tmp_path, tiny_pictures, write_tiny_options, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="run.accelerator=gpu: torch sees no GPU on this machine"):
        train_autoencoder(load_config(write_tiny_options(tmp_path / "options.yaml", tiny_pictures, num_steps=2), ["run.accelerator=gpu"]))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for accelerator in ("gpu", "auto"):
        with pytest.raises(ValueError, match="run.devices=3: torch sees 1 GPU on this machine. Set run.devices=1"):
            check_machine(RunConfig(accelerator=accelerator, devices=3))
    check_machine(RunConfig(accelerator="cpu", devices=3))
