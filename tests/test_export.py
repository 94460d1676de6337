"""Exported folders: smaller, the same model to float16's precision, and open as before."""

from __future__ import annotations

import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from eqldm.anagram.sampling import Sampler
from eqldm.export import export, main
from eqldm.model_folder import load_vae, save_model_folder, vae_hash
from eqldm.views import IDENTITY


def test_half_the_bytes_and_the_same_pictures(tiny_model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["export", str(tiny_model_folder), "--out", str(tmp_path / "half")])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "half")
    files = {path.relative_to(tiny_model_folder) for path in tiny_model_folder.rglob("*.safetensors")}
    assert len(files) == 3
    for file in files:
        stored = load_file(tmp_path / "half" / file)
        assert {w.dtype for w in stored.values() if w.is_floating_point()} == {torch.float16}
    samplers = [Sampler.open(folder, "cpu") for folder in (tiny_model_folder, tmp_path / "half")]
    a, b = (sampler(["the letter a"], [IDENTITY], [0], num_inference_steps=3) for sampler in samplers)
    torch.testing.assert_close(a, b, atol=0.02, rtol=0.02)
    assert load_vae(tmp_path / "half").dtype == torch.float32
    again = export(tmp_path / "half", tmp_path / "again", torch.float16)
    assert vae_hash(load_vae(again)) == vae_hash(load_vae(tmp_path / "half")) != vae_hash(load_vae(tiny_model_folder))


def test_stock_pipelines_open_it_in_one_dtype(tiny_model_folder, tmp_path):
    folder = export(tiny_model_folder, tmp_path / "half", torch.float16)
    for options, dtype in (({}, torch.float32), ({"torch_dtype": torch.bfloat16}, torch.bfloat16)):
        pipeline = StableDiffusionPipeline.from_pretrained(str(folder), **options)
        assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {dtype}


def test_a_vae_alone(make_tiny_vae, tmp_path):
    vae = make_tiny_vae()
    folder = export(save_model_folder(tmp_path / "vae", vae=vae), tmp_path / "out", torch.float32)
    assert vae_hash(load_vae(folder)) == vae_hash(vae) and [path.name for path in folder.iterdir()] == ["vae"]


def test_weights_that_overflow_and_folders_that_are_none(make_tiny_vae, tmp_path, monkeypatch):
    vae = make_tiny_vae()
    with torch.no_grad():
        vae.quant_conv.weight.fill_(1e6)
    folder = save_model_folder(tmp_path / "vae", vae=vae)
    with pytest.raises(ValueError, match="weights of vae/ of .* are too large for torch.float16: use bfloat16 or float32"):
        export(folder, tmp_path / "out", torch.float16)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is the model to read"):
        export(folder, folder, torch.float16)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="is no model folder: it would be deleted"):
        export(folder, tmp_path / "runs", torch.float32)
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "none"), "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="error: .*none' does not exist"):
        main()


@pytest.mark.parametrize("out", [".", "..", "../here"])
def test_the_folder_that_one_is_in_is_not_replaced(make_tiny_vae, tmp_path, monkeypatch, out):
    folder, here = save_model_folder(tmp_path / "vae", vae=make_tiny_vae()), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", ["export", str(folder), "--out", out])
    with pytest.raises(SystemExit, match="is the folder that you are in|is no model folder"):
        main()
    (here / "inputs.json").touch()
    (here / "model").mkdir()
    (here / "link").symlink_to("model")
    for name in ("model", "link"):
        with pytest.raises(ValueError, match="keeps its own model"):
            export(folder, here / name, torch.float32)
    assert here.is_dir() and sorted(path.name for path in tmp_path.iterdir()) == ["here", "vae"]
