"""What we write, opened by stock pipelines of other versions than those that wrote it: the same ids, embeddings, UNet and pictures.

The versions are fetched from the package index, some 150 MB and without torch, and kept in `.venv-beside-...`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from eqldm.config import LoRAConfig
from eqldm.diffusion.adaptation import add_lora, merge_lora, save_lora
from eqldm.diffusion.conditioning import encode_prompts, tokenize
from eqldm.model_folder import PRETRAINED, Networks, load_vae, save_model_folder
from stock import PROMPTS, outputs
from versions import Unreachable, beside

ROOT = Path(__file__).parents[1]
FIRST = 2  # the number of the first new folder
VERSIONS = {  # of transformers: those that go with it
    "4.46.3": "tokenizers==0.20.3 huggingface_hub==0.26.5 diffusers==0.31.0 peft==0.13.2",
    "4.57.6": "tokenizers==0.22.1 huggingface_hub==0.36.0 diffusers==0.36.0 peft==0.18.0",
    "5.5.0": "tokenizers==0.22.2 huggingface_hub==1.9.0 diffusers==0.37.0",
}


@pytest.fixture(scope="module")
def folders(make_model_folder, tmp_path_factory) -> list[Path]:
    """The shipped models, and new ones: of words that share pieces, with v-prediction; padded with "!", as SD 2; with a token added."""
    root = tmp_path_factory.mktemp("exported")
    captions = ["at cat; zebra's 12", "naïve café!", 'a-b/c (d) & "e"', "don't  we'll 'tis"]
    objective = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    first = make_model_folder(root / "words", captions=captions, max_length=16, **objective)
    padded, added = Networks.open(first), Networks.open(first)
    padded.tokenizer.pad_token = "!"
    added.tokenizer.add_tokens(["<cat-toy>"])
    added.text_encoder.resize_token_embeddings(len(added.tokenizer))
    others = [save_model_folder(root / name, vae=load_vae(first), **vars(n)) for name, n in (("padded", padded), ("added", added))]
    return [PRETRAINED / "glyphs-base", PRETRAINED / "glyphs-eq", first, *others]


@pytest.fixture(scope="module")
def updates(folders, tmp_path_factory) -> tuple[Path, Path]:
    """Low-rank updates of the first new one's UNet, and the model folder into which they are merged."""
    root, folder = tmp_path_factory.mktemp("updates"), folders[FIRST]
    networks = Networks.open(folder)
    add_lora(networks.unet, SimpleNamespace(lora=LoRAConfig(rank=2, alpha=6)))
    torch.manual_seed(0)
    for name, weight in networks.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    save_lora(networks.unet, root / "lora")
    merge_lora(networks.unet)
    return root / "lora", save_model_folder(root / "merged", vae=load_vae(folder), **vars(networks))


@pytest.fixture(scope="module", params=VERSIONS)
def theirs(request, folders, updates, tmp_path_factory) -> dict[str, torch.Tensor]:
    """What tests/stock.py writes under another version of transformers."""
    try:
        path = beside(f"transformers=={request.param}", *VERSIONS[request.param].split())
    except Unreachable as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("theirs") / "outputs.safetensors"
    given = [f"{folder}+{updates[0]}" if i == FIRST else folder for i, folder in enumerate(folders)]
    command = [sys.executable, ROOT / "tests" / "stock.py", out, *given]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


@pytest.fixture(scope="module")
def ours(folders) -> list[dict[str, torch.Tensor]]:
    """What our own loaders and this version's pipeline make of the folders, which agree."""
    found = [outputs(folder) for folder in folders]
    for folder, of in zip(folders, found):
        networks = Networks.open(folder)
        assert torch.equal(tokenize(networks.tokenizer, PROMPTS), of["ids"])
        with torch.no_grad():
            torch.testing.assert_close(encode_prompts(networks.tokenizer, networks.text_encoder, PROMPTS), of["embeds"])
    return found


@pytest.mark.slow
def test_folders_open_in_other_versions(folders, ours, theirs):
    """Seen: under 5.5.0 a random text encoder and a line in the log, under 4.57.6 a TypeError."""
    for i, (folder, wanted) in enumerate(zip(folders, ours)):
        for name, value in wanted.items():
            assert theirs[f"{i}/{name}"].shape == value.shape and theirs[f"{i}/{name}"].dtype == value.dtype
            error = (theirs[f"{i}/{name}"] - value).abs().max().item()
            assert error < (1 if name == "ids" else 1e-4), f"{name} of {folder.name} differs by {error}"


@pytest.mark.slow
def test_low_rank_updates_open_in_other_versions(updates, theirs):
    """Seen: 0.31 took another alpha than the one that they were trained with, and 0.36 stopped at settings of a newer peft."""
    merged = outputs(updates[1])["unet"]
    assert (theirs[f"{FIRST}/updated"] - merged).abs().max() < 1e-4 and (theirs[f"{FIRST}/unet"] - merged).abs().max() > 1e-2
