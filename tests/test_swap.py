"""The one-line swap: another VAE under an old UNet."""

from __future__ import annotations

import sys

import pytest
import torch

from eqldm.model_folder import load_unet, load_vae, save_model_folder, vae_hash, weights_hash
from eqldm.swap import main, swap


def test_only_the_vae_changes(tiny_model_folder, make_tiny_vae, tmp_path, monkeypatch, capsys):
    other = make_tiny_vae(seed=5)
    save_model_folder(tmp_path / "other", vae=other)
    monkeypatch.setattr(sys, "argv", ["swap", *map(str, [tiny_model_folder, "--vae", tmp_path / "other", "--out", tmp_path / "new"])])
    main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "new")
    assert vae_hash(load_vae(tmp_path / "new")) == vae_hash(other)
    assert weights_hash(load_unet(tmp_path / "new")) == weights_hash(load_unet(tiny_model_folder))


def test_other_latents_are_refused(tiny_model_folder, make_tiny_vae, tmp_path, monkeypatch):
    save_model_folder(tmp_path / "other", vae=make_tiny_vae(latent_channels=6))
    with pytest.raises(ValueError, match="takes 4 latent channels, the VAE of .* gives 6: nothing but another UNet helps"):
        swap(tiny_model_folder, tmp_path / "other", tmp_path / "new")
    tall = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "block_out_channels": (8, 16)}
    save_model_folder(tmp_path / "tall", vae=make_tiny_vae(**tall))
    with pytest.raises(ValueError, match="has f = 2, that of .* f = 4: wanted the same"):
        swap(tiny_model_folder, tmp_path / "tall", tmp_path / "new")
    save_model_folder(tmp_path / "shifted", vae=make_tiny_vae(shift_factor=0.1))
    with pytest.raises(ValueError, match="has a shift_factor"):
        swap(tiny_model_folder, tmp_path / "shifted", tmp_path / "new")
    monkeypatch.setattr(sys, "argv", ["swap", str(tiny_model_folder), "--vae", str(tmp_path / "none"), "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="does not exist"):
        main()
    assert not (tmp_path / "new").exists() and torch.is_grad_enabled()


def test_what_is_no_model_is_never_replaced(tiny_model_folder, make_tiny_vae, tmp_path):
    vae = save_model_folder(tmp_path / "vae", vae=make_tiny_vae(seed=5))
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("mine")
    for out, message in {tmp_path / "precious": "is no model folder: it would be deleted", vae: "is the model to read"}.items():
        with pytest.raises(ValueError, match=message):
            swap(tiny_model_folder, vae, out)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # an empty folder, then the model that stands there
        assert vae_hash(load_vae(swap(tiny_model_folder, vae, tmp_path / "empty"))) == vae_hash(load_vae(vae))


def test_what_lies_beside_a_models_parts_is_never_deleted(tiny_model_folder, make_tiny_vae, tmp_path):
    """A folder counted as a model once it held vae/config.json, whatever else lay there."""
    vae, out = save_model_folder(tmp_path / "vae", vae=make_tiny_vae(seed=5)), tmp_path / "out"
    swap(tiny_model_folder, vae, out)
    (out / "thesis.txt").write_text("mine")
    for write in (lambda: swap(tiny_model_folder, vae, out), lambda: save_model_folder(out, vae=make_tiny_vae())):
        with pytest.raises(ValueError, match="is a model folder that also holds thesis.txt, which would be deleted: give another"):
            write()
    assert (out / "thesis.txt").read_text() == "mine" and vae_hash(load_vae(out)) == vae_hash(load_vae(vae))
    (out / "thesis.txt").unlink()
    (out / "lora").mkdir()
    swap(tiny_model_folder, vae, out)
