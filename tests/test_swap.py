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
    monkeypatch.setattr(sys, "argv", ["swap", str(tiny_model_folder), "--vae", str(tmp_path / "none"), "--out", str(tmp_path / "new")])
    with pytest.raises(SystemExit, match="does not exist"):
        main()
    assert not (tmp_path / "new").exists() and torch.is_grad_enabled()
