"""Autoencoders in LDM's single-file layout: diffusers' own loader and ours read what we write, exactly."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from diffusers import AutoencoderKL
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from eqldm.autoencoder.module import build_vae, train_autoencoder
from eqldm.config import load_config
from eqldm.export import export_single_file, main
from eqldm.model_folder import decode, encode, load_unet, load_vae, save_model_folder, vae_hash
from eqldm.single_file import ldm_weights, read_single_file, write_single_file

KL_F8 = {  # LDM's and Stable Diffusion's: 83.7 M parameters
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
SMALL = {
    "block_out_channels": (32, 64, 64), "layers_per_block": 1, "latent_channels": 4, "sample_size": 32, "scaling_factor": 1.0,
    "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
}  # fmt: skip


def random_vae(**changes) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{**SMALL, **changes}).eval()


def same_weights(a: AutoencoderKL, b: AutoencoderKL) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@torch.no_grad()
def test_a_full_size_one_goes_there_and_back(tmp_path):
    vae = random_vae(**KL_F8, scaling_factor=0.18215)
    path = write_single_file(vae, tmp_path / "kl-f8.safetensors")
    again = read_single_file(path)
    assert same_weights(vae, again) and again.config.scaling_factor == 0.18215 and vae_hash(again) == vae_hash(vae)
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(decode(again, encode(again, x)), decode(vae, encode(vae, x)))
    with safe_open(path, "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    assert len(shapes) == 248  # as in the released kl-f8 and vae-ft-mse files
    for name, shape in {  # of those, in their shapes
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.3.block.1.conv2.bias": (512,),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "decoder.mid.block_2.norm1.weight": (512,),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "decoder.norm_out.weight": (128,),
        "post_quant_conv.weight": (4, 4, 1, 1),
    }.items():
        assert shapes[name] == shape, name


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("changes", [{}, {"mid_block_add_attention": False}, {"latent_channels": 16, "layers_per_block": 2}])
def test_diffusers_own_loader_agrees(tmp_path, suffix, changes):
    vae = random_vae(**changes)
    path = write_single_file(vae, tmp_path / f"vae{suffix}")
    assert same_weights(vae, read_single_file(path)) and read_single_file(path).config.scaling_factor == 1.0
    if not changes.get("mid_block_add_attention", True):
        return  # diffusers' config of an LDM file cannot say so
    config = OmegaConf.to_container(OmegaConf.load(f"{path}.yaml"))
    stock = AutoencoderKL.from_single_file(str(path), original_config=config)
    assert same_weights(vae, stock) and stock.config.scaling_factor == 1.0


def test_the_first_stage_of_a_whole_model(tmp_path):
    vae = random_vae()
    weights = load_file(write_single_file(vae, tmp_path / "vae.safetensors"))
    whole = {f"first_stage_model.{key}": value for key, value in weights.items()} | {"model.diffusion_model.out.2.bias": torch.zeros(4)}
    save_file(whole, tmp_path / "sd.safetensors")
    save_file({**whole, "conditioner.embedders.0.weight": torch.zeros(4)}, tmp_path / "xl.safetensors")
    scaled = {**whole, "scale_factor": torch.tensor(0.5)}  # where LDM measured it
    save_file(scaled, tmp_path / "scaled.safetensors")
    torch.save({"state_dict": scaled, "global_step": 7}, tmp_path / "scaled.ckpt")
    trained = {**weights, "loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4)}
    torch.save({"state_dict": trained}, tmp_path / "autoencoder.ckpt")
    for name, scale in {"scaled.safetensors": 0.5, "scaled.ckpt": 0.5}.items():
        found = load_vae(tmp_path / name)
        assert same_weights(found, vae) and found.config.scaling_factor == scale and not found.training
    for name, scale in {"sd.safetensors": 0.18215, "xl.safetensors": 0.13025, "autoencoder.ckpt": 0.18215}.items():
        with pytest.warns(UserWarning, match=f"{name}' states no scale_factor: taken to be {scale}"):
            found = load_vae(tmp_path / name)
        assert same_weights(found, vae) and found.config.scaling_factor == scale
    wide = random_vae(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)  # as SD3's
    save_file(ldm_weights(wide), tmp_path / "wide.safetensors")
    with pytest.warns(UserWarning, match="taken to be 1.0, unscaled latents"):
        assert same_weights(load_vae(tmp_path / "wide.safetensors"), wide)


def test_half_precision_files_are_read_in_float32(tmp_path):
    vae = random_vae()
    path = write_single_file(vae.half(), tmp_path / "vae.safetensors")
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    assert read_single_file(path).dtype == torch.float32 and same_weights(read_single_file(path).half(), vae)


class NotWeights:
    """What Lightning's older checkpoints hold beside weights: an object of some class."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"callbacks": NotWeights()}, r"a pickle that holds more than weights \(\S*NotWeights\).* Get the .safetensors"),
        (
            {"state_dict": {"model.diffusion_model.out.2.bias": torch.zeros(4)}},
            "holds no autoencoder in LDM's layout: it lacks encoder.conv_in",
        ),
        ({"state_dict": {}}, "holds no weights by name"),
        ({"state_dict": [1]}, "holds no weights by name"),
        ({"quantize.embedding.weight": torch.zeros(4, 4)}, "holds a VQ autoencoder, wanted one with a KL posterior"),
        ({"encoder.down_blocks.0.resnets.0.conv1.weight": torch.zeros(4)}, "has diffusers' layout: give the model folder"),
    ],
)
def test_what_is_no_autoencoder_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "vae.ckpt")
    with pytest.raises(ValueError, match=message):
        load_vae(tmp_path / "vae.ckpt")


def test_damaged_and_strange_files_are_refused(tmp_path):
    path = write_single_file(random_vae(), tmp_path / "vae.safetensors")
    weights = load_file(path)
    for name, change, message in (
        ("lacking", {"encoder.norm_out.bias": None}, "that diffusers knows: .*Missing key.*conv_norm_out.bias"),
        ("deeper", {"encoder.mid.block_3.conv1.weight": torch.zeros(1)}, "than diffusers converts: encoder.mid.block_3.conv1.weight would"),
        ("flux2", {"bn.running_mean": torch.zeros(4)}, "holds more than an autoencoder in LDM's layout: bn.running_mean"),
        ("scaled", {"scale_factor": torch.tensor(float("nan"))}, "states a scale_factor that is no number above 0"),
        ("kl-f16", {"encoder.down.2.attn.0.q.weight": torch.zeros(1)}, "attention outside its middle block"),
        ("narrow", {"encoder.conv_in.weight": torch.zeros(20, 3, 3, 3)}, "20 channels, which LDM's GroupNorm of 32"),
    ):
        save_file({key: value for key, value in {**weights, **change}.items() if value is not None}, tmp_path / f"{name}.safetensors")
        with pytest.raises(ValueError, match=message):
            load_vae(tmp_path / f"{name}.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:1000])
    (tmp_path / "cut.ckpt").write_bytes(write_single_file(random_vae(), tmp_path / "whole.ckpt").read_bytes()[:1000])
    for name in ("cut.safetensors", "cut.ckpt"):
        with pytest.raises(ValueError, match="cannot be read, it may be cut off"):
            load_vae(tmp_path / name)
    (tmp_path / "pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 334695179\n")
    with pytest.raises(ValueError, match="is no PyTorch file .a web page, a git-lfs pointer"):
        load_vae(tmp_path / "pointer.ckpt")
    (tmp_path / "vae.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="no single-file checkpoint: wanted one of .safetensors, .ckpt"):
        load_vae(tmp_path / "vae.bin")


def test_what_the_layout_cannot_say_is_not_written(tmp_path, make_tiny_vae):
    for vae, message in (
        (make_tiny_vae(), "GroupNorm of 4 groups, LDM's have 32"),
        (random_vae(block_out_channels=(64, 96, 96)), "widths .64, 96, 96. that are no multiples of the first"),
        (random_vae(act_fn="relu"), "act_fn relu, LDM's is silu"),
        (random_vae(latents_mean=[0.0] * 4), "latents_mean and latents_std"),
        (random_vae(shift_factor=0.1), "a shift_factor .python -m eqldm.export folds it in"),
        (random_vae(use_quant_conv=False, use_post_quant_conv=False), "no quant_conv .python -m eqldm.export adds one"),
    ):
        with pytest.raises(ValueError, match=message):
            write_single_file(vae, tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="ends in .safetensors or .ckpt"):
        write_single_file(random_vae(), tmp_path / "vae.bin")
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 0.18215), ({"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1, "scaling_factor": 1.5}, None)],
    ids=["another scale", "a shift and no quant_conv, as SD3's"],
)
def test_export_keeps_what_a_unet_sees(tmp_path, monkeypatch, capsys, changes, scale):
    vae = random_vae(**changes)
    folder = save_model_folder(tmp_path / "model", vae=vae)
    out = tmp_path / "out" / "vae.safetensors"
    words = ["export", folder, "--out", out, "--single-file", "--dtype", "float32", *(["--scale-factor", scale] if scale else [])]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    main()
    assert capsys.readouterr().out.strip() == str(out)
    found, scale = load_vae(out), scale or vae.config.scaling_factor
    assert found.config.scaling_factor == scale and not found.config.get("shift_factor")
    assert OmegaConf.load(f"{out}.yaml").model.params.scale_factor == scale
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(encode(found, x), encode(vae, x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode(found, encode(found, x)), decode(vae, encode(vae, x)), rtol=1e-4, atol=1e-5)
    posteriors = [network.encode(x).latent_dist.std * network.config.scaling_factor for network in (found, vae)]
    torch.testing.assert_close(*posteriors, rtol=1e-4, atol=1e-5)


def test_exports_that_cannot_be(tmp_path, monkeypatch, capsys):
    folder = save_model_folder(tmp_path / "model", vae=random_vae())
    path = export_single_file(folder, tmp_path / "vae.ckpt", torch.float16)
    for words, message in (
        ([folder, "--out", tmp_path / "x", "--scale-factor", "1"], "--scale-factor is for --single-file"),
        ([folder, "--out", tmp_path / "x.ckpt"], "x.ckpt' would be a folder: give --single-file"),
        ([path, "--out", tmp_path / "x.ckpt", "--single-file"], "vae.ckpt' is a single file already"),
    ):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
        with pytest.raises(SystemExit, match=message):
            main()
    for scale in ("0", "inf", "nan", "-1"):
        monkeypatch.setattr(sys, "argv", ["export", str(folder), "--out", "x.ckpt", "--scale-factor", scale, "--single-file"])
        with pytest.raises(SystemExit):
            main()
        assert f"error: argument --scale-factor: got {scale}, wanted above 0" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="vae.ckpt' is a file, which can be no more than a VAE: wanted a model folder with unet"):
        load_unet(path)


def test_stage_1_starts_from_a_file_and_knows_it_again(tmp_path, tiny_pictures):
    path = write_single_file(random_vae(), tmp_path / "kl.ckpt")
    options = {
        "stage": "autoencoder", "init": "pretrained", "model": str(path), "fold": {"num_images": 4},
        "data": {"train": str(tiny_pictures), "val": str(tiny_pictures), "batch_size": 2, "num_workers": 0, "val_samples": 2},
        "run": {"dir": str(tmp_path / "run"), "num_steps": 1, "accelerator": "cpu", "precision": "32-true"},
    }  # fmt: skip
    (tmp_path / "options.yaml").write_text(json.dumps(options))
    config = load_config(tmp_path / "options.yaml", [])
    folder = train_autoencoder(config)
    assert same_weights(build_vae(config, 32), read_single_file(path))
    exported = read_single_file(export_single_file(folder, tmp_path / "mine.safetensors", torch.float32))
    assert vae_hash(exported) == vae_hash(load_vae(folder))  # folded, with a scale of 1
    assert train_autoencoder(config) == folder
    write_single_file(random_vae(scaling_factor=0.5), path)
    with pytest.raises(ValueError, match="the contents of model have changed"):
        train_autoencoder(config)


def test_a_state_dict_that_contains_itself_is_refused(tmp_path):
    """It was looked into for ever."""
    inner: dict = {}
    inner["state_dict"] = {"state_dict": inner}
    torch.save(inner, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="a.ckpt' holds no weights by name: its state_dict contains itself"):
        load_vae(tmp_path / "a.ckpt")


def test_a_failed_write_leaves_weights_and_scale_as_they_were(small_disk):
    """The YAML was written first: it stated the new scale of weights that were still the old ones."""
    disk = small_disk(64_000)
    path = write_single_file(random_vae(), disk / "a.safetensors")
    before = {each.name: each.read_bytes() for each in disk.iterdir()}
    small_disk(sum(map(len, before.values())) // 1024 + 100)

    with pytest.raises(OSError, match="a.safetensors' could not be written .No space left on device."):
        write_single_file(random_vae(scaling_factor=0.5), path)
    assert {each.name: each.read_bytes() for each in disk.iterdir()} == before
