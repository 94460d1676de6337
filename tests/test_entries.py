"""How models are written for an evaluation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from conftest import TINY_UNET
from eqldm.evaluation.entries import Entry, parse_entries, parse_entry
from eqldm.model_folder import Networks, save_model_folder, vae_hash

XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 40}


def test_what_a_model_is_written_as(tmp_path):
    assert parse_entry("runs/a/model") == Entry("", Path("runs/a/model"), None, {})
    assert parse_entry("b=runs/a") == Entry("b", Path("runs/a"), None, {})
    entry = parse_entry("b=runs/a@vae=other/vae,blend=pixels,guidance_scale=2,num_inference_steps=7")
    assert entry == Entry("b", Path("runs/a"), Path("other/vae"), {"blend": "pixels", "guidance_scale": 2.0, "num_inference_steps": 7})
    assert entry.text == "runs/a@vae=other/vae,blend=pixels,guidance_scale=2.0,num_inference_steps=7"
    weighted = parse_entry("a@reduction=weighted,weights=0:1.5,symmetrise=true")
    assert weighted.options == {"reduction": "weighted", "weights": (0.0, 1.5), "symmetrise": True}
    assert parse_entry(weighted.text) == weighted  # as it is written it is read again
    assert [parse_entry(f"a@symmetrise={text}").options["symmetrise"] for text in ("true", "false")] == [True, False]
    odd = tmp_path / "lr=1e-4@cosine"
    odd.mkdir()
    assert parse_entry(str(odd)) == Entry("", odd, None, {})


@pytest.mark.parametrize(("text", "message"), [
    ("=a", "got '=a', wanted MODEL or NAME=MODEL"), ("a=", "wanted MODEL"), ("@blend=pixels", "wanted MODEL"),
    ("a@pixels", "got 'pixels' after '@', wanted OPTION=VALUE of vae .str., blend .str."),
    ("a@weights=1,2", "got '2' after '@'"), ("a@weights=1:", "got 'weights=1:' after '@', wanted OPTION=VALUE of .* weights .shares."),
    ("a@guidance_scale=high", "got 'guidance_scale=high' after '@'"),
    ("a@symmetrise=2", "got 'symmetrise=2' after '@', wanted OPTION=VALUE of .* symmetrise .switch."),
    ("a@blend=pixels,blend=none", "blend is given twice"), ("a@vae=", "got 'vae=' after '@', wanted OPTION=VALUE"),
])  # fmt: skip
def test_what_is_none(text, message):
    with pytest.raises(ValueError, match=message):
        parse_entry(text)


def test_names():
    assert [entry.name for entry in parse_entries(["runs/a/model", "x=runs/b", "pretrained/c"])] == ["a", "x", "c"]
    assert [entry.name for entry in parse_entries(["m/runs/a/model", "n/runs/a/model"])] == ["m-runs-a", "n-runs-a"]
    for texts in (["runs/a", "runs/a"], ["x=runs/a", "x=runs/b"], ["a=runs/b", "runs/a"]):
        with pytest.raises(ValueError, match="a model is given twice: .* NAME=MODEL"):
            parse_entries(texts)
    assert [entry.name for entry in parse_entries(["runs/_lr 1e-4 <b>|$x$/model"])] == ["lr-1e-4--b---x"]
    for name in ("a/b", "a$x$", "_a", "<b>", "report.html"):
        with pytest.raises(ValueError, match="wanted letters, digits and"):
            parse_entries([f"{name}=c"])


def test_a_swap_is_opened_without_being_written(tiny_model_folder, make_tiny_vae, tmp_path):
    other = make_tiny_vae(seed=5)
    save_model_folder(tmp_path / "vae", vae=other)
    vae, sampler = parse_entry(f"{tiny_model_folder}@vae={tmp_path / 'vae'}").open(torch.device("cpu"))
    assert vae_hash(vae) == vae_hash(other) and sampler.vae is vae
    save_model_folder(tmp_path / "wide", vae=make_tiny_vae(latent_channels=8))
    with pytest.raises(ValueError, match="the UNet takes 4 channels at f = 4, this VAE gives 8 at f = 4"):
        parse_entry(f"{tiny_model_folder}@vae={tmp_path / 'wide'}").open(torch.device("cpu"))
    shutil.copytree(tiny_model_folder / "vae", tmp_path / "alone" / "vae")
    with pytest.raises(ValueError, match="alone' holds no UNet, so the options after '@' mean nothing"):
        parse_entry(f"{tmp_path / 'alone'}@blend=pixels").open(torch.device("cpu"))
    parts = vars(Networks.open(tiny_model_folder))
    for more, message in (({"in_channels": 9}, "its UNet is one of 9 channels"), (XL, "its UNet is SDXL's")):
        unet = UNet2DConditionModel(**{**TINY_UNET, "sample_size": 8, "in_channels": 4, "cross_attention_dim": 16, **more})
        odd = save_model_folder(tmp_path / "odd", vae=make_tiny_vae(), **{**parts, "unet": unet})
        with pytest.raises(ValueError, match=message):
            parse_entry(str(odd)).open(torch.device("cpu"))
    assert parse_entry(str(tmp_path / "alone")).open(torch.device("cpu"))[1] is None
    with pytest.raises(ValueError, match="unknown scheduler 'fast'"):
        parse_entry(f"{tiny_model_folder}@scheduler=fast").open(torch.device("cpu"))
