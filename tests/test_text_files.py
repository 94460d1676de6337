"""Text encoders and tokenizers: written as every transformers reads them, and the same model whether written so or as before.

tests/test_other_versions.py opens them under other versions.
"""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from eqldm import text_files
from eqldm.atomic import NotWritten, told
from eqldm.config import load_config
from eqldm.data.shards import write_json
from eqldm.diffusion.conditioning import tokenize
from eqldm.model_folder import PRETRAINED, Networks, load_text, load_vae, save_model_folder, text_hash
from eqldm.text_files import OLD_VOCABULARY, PREFIX, save_tokenizer
from eqldm.training.run_folder import INPUTS_FILE, _digest, _sources, changed_inputs, input_digests, input_settings

WEIGHTS = Path("text_encoder", "model.safetensors")


def as_before(folder: Path, out: Path) -> Path:
    """A copy of a model folder as transformers 5.6 and newer write one: no prefix, and no vocabulary for older ones."""
    shutil.copytree(folder, out)
    weights = {name.removeprefix(PREFIX): weight for name, weight in load_file(out / WEIGHTS).items()}
    save_file(weights, out / WEIGHTS, {"format": "pt"})
    for name in OLD_VOCABULARY:
        (out / "tokenizer" / name).unlink()
    return out


def again(folder: Path, out: Path) -> Path:
    """The model of a folder, opened and saved."""
    networks = Networks.open(folder)
    return save_model_folder(out, vae=load_vae(folder), **vars(networks))


def test_a_folder_opened_and_saved_is_written_alike_however_it_was_written(tiny_model_folder, tmp_path):
    old = as_before(tiny_model_folder, tmp_path / "old")
    wanted = (tiny_model_folder / WEIGHTS).read_bytes()
    assert all(name.startswith(PREFIX) for name in load_file(tiny_model_folder / WEIGHTS))
    assert (old / WEIGHTS).read_bytes() != wanted
    for number, source in enumerate((tiny_model_folder, old)):
        saved = again(source, tmp_path / f"{number}")
        assert (saved / WEIGHTS).read_bytes() == wanted
        assert text_hash(*load_text(saved)) == text_hash(*load_text(source)) == text_hash(*load_text(tiny_model_folder))
        for name in ("tokenizer.json", *OLD_VOCABULARY):
            assert (saved / "tokenizer" / name).read_bytes() == (tiny_model_folder / "tokenizer" / name).read_bytes()
        assert json.loads((saved / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
        assert json.loads((saved / "model_index.json").read_text())["text_encoder"] == ["transformers", "CLIPTextModel"]


def test_a_full_disk_is_told(tiny_model_folder, tmp_path):
    """tokenizers reports it by a bare Exception."""
    tokenizer, _ = load_text(tiny_model_folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (6000, 3000):  # above tokenizer.json's size, below it
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(NotWritten, match=r"the tokenizer could not be written \(File too large\): when that is mended"):
                with told("the tokenizer"):
                    save_tokenizer(tokenizer, tmp_path / str(size))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("name", ["glyphs-base", "glyphs-eq"])
def test_the_old_vocabulary_says_what_the_new_one_says(name, tmp_path):
    tokenizer, _ = load_text(PRETRAINED / name)
    prompts = ["the letter A", "a red letter q on a blue background", "zebra's 12 ½ naïve!?", ""]
    shutil.copytree(PRETRAINED / name / "tokenizer", tmp_path / "old", ignore=shutil.ignore_patterns("tokenizer.json"))
    old = CLIPTokenizer.from_pretrained(tmp_path / "old")
    assert tokenize(old, prompts).tolist() == tokenize(tokenizer, prompts).tolist()
    assert all(key.startswith(PREFIX) for key in load_file(PRETRAINED / name / WEIGHTS))


def test_a_vocabulary_that_old_ones_would_cut_is_not_written_for_them(tiny_model_folder, tmp_path, monkeypatch):
    tokenizer, _ = load_text(tiny_model_folder)
    merges = len((tiny_model_folder / "tokenizer" / "merges.txt").read_text().splitlines()) - 1
    monkeypatch.setattr(text_files, "MOST_MERGES", merges)
    save_tokenizer(tokenizer, tmp_path / "fits")
    monkeypatch.setattr(text_files, "MOST_MERGES", merges - 1)
    with pytest.warns(UserWarning, match=f"the tokenizer has {merges} merges, transformers 4 reads {merges - 1}: it is written for"):
        save_tokenizer(tokenizer, tmp_path / "cut")
    assert [sorted(path.name for path in (tmp_path / name).iterdir() if path.name in OLD_VOCABULARY) for name in ("fits", "cut")] == [
        sorted(OLD_VOCABULARY), []
    ]  # fmt: skip


def test_a_run_knows_its_model_however_it_is_written(tiny_pictures, tiny_model_folder, write_tiny_unet_options, tmp_path):
    """A run that began on a folder of before goes on with the same model written anew, and the other way round."""
    model, kept, run = tmp_path / "m", tmp_path / "kept", tmp_path / "run"
    shutil.copytree(tiny_model_folder, kept)
    folders = [kept, as_before(kept, tmp_path / "old")]
    run.mkdir()
    for began_on in folders:
        shutil.copytree(began_on, model)
        config = load_config(write_tiny_unet_options(tmp_path / "tiny.yaml", tiny_pictures, model, num_steps=2))
        write_json(run / INPUTS_FILE, {**input_digests(config), "settings": input_settings(config)})
        for now in folders:
            shutil.rmtree(model)
            shutil.copytree(now, model)
            assert changed_inputs(config, run) == []
            weights = load_file(model / WEIGHTS)
            next(iter(weights.values())).view(-1)[0] += 1
            save_file(weights, model / WEIGHTS, {"format": "pt"})
            assert changed_inputs(config, run) == ["model", "vae"]
        shutil.rmtree(model)


def test_a_run_that_noted_a_file_as_it_lay_goes_on(tiny_pictures, tiny_model_folder, write_tiny_unet_options, tmp_path):
    """As runs did before the prefix was looked at: on Stable Diffusion's own folder, whose names have it, too."""
    config = load_config(write_tiny_unet_options(tmp_path / "tiny.yaml", tiny_pictures, tiny_model_folder, num_steps=2))
    (tmp_path / "run").mkdir()
    now = input_digests(config)
    lies = {name: _digest(name, source, as_it_lies=True) for name, source in _sources(config).items()}
    assert lies["model"] != now["model"]
    write_json(tmp_path / "run" / INPUTS_FILE, lies)
    assert changed_inputs(config, tmp_path / "run") == []
