"""Latent shards: what is stored, resuming, several processes, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from eqldm.data.samples import LatentSamples, PictureSamples
from eqldm.data.shards import ShardSet, read_manifest, write_manifest, write_shard
from eqldm.diffusion.conditioning import encode_prompts
from eqldm.model_folder import load_text, load_vae, text_hash, vae_hash
from runs import contents

ROOT = Path(__file__).parents[1]
specification = importlib.util.spec_from_file_location("encode_latents_script", ROOT / "data" / "encode_latents.py")
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


@pytest.fixture
def run(monkeypatch, tiny_model_folder, tiny_pictures):
    """`run(out, *more)`: the script, on the tiny pictures and model unless `data=` or `model=` say other ones."""

    def call(out, *more, data=tiny_pictures, model=tiny_model_folder):
        words = ["--data", data, "--model", model, "--out", out, "--num-workers", 0, *more]
        monkeypatch.setattr(sys, "argv", ["encode_latents.py", *map(str, words)])
        script.main()
        return Path(out)

    return call


@pytest.fixture
def refused(run, capsys):
    def call(*arguments, **names) -> str:
        with pytest.raises(SystemExit) as info:
            run(*arguments, **names)
        error = capsys.readouterr().err if info.value.code == 2 else str(info.value.code)
        assert error.startswith("error: ")
        return error

    return call


def test_captions_that_are_cut_are_said(run, tmp_path, make_picture_shards, capsys):
    data = make_picture_shards(tmp_path / "long", count=4, caption="picture {} the letter a the letter v the letter a")
    run(tmp_path / "out", "--prompt-embeds", data=data)
    said = f"100.00% of the captions of '{data}' are longer than the text encoder's 8 tokens and are cut there"
    assert said in capsys.readouterr().out
    run(tmp_path / "without", data=data)
    assert "are cut" not in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_moments_are_the_encoders(run, tmp_path, tiny_model_folder, tiny_pictures, dtype, tolerance):
    latents = LatentSamples(run(tmp_path / "out", "--dtype", dtype, "--batch-size", 5))
    pictures, vae = PictureSamples(tiny_pictures), load_vae(tiny_model_folder)
    assert len(latents) == len(pictures) == 24
    assert latents.shards.manifest["vae_hash"] == vae_hash(vae) and latents.shards.manifest["skipped"] == []
    for number in (0, 7, 23):
        picture, latent = pictures[number], latents[number]
        with torch.no_grad():
            moments = vae.encode(picture["x"][None]).latent_dist.parameters[0]
        torch.testing.assert_close(latent["moments"], moments, atol=tolerance, rtol=tolerance)
        assert (latent["caption"], latent["key"]) == (picture["caption"], picture["key"])
        assert "prompt_embeds" not in latent


def test_a_batch_of_none_is_refused(refused, tmp_path):
    """A negative one gave a latent set without latents, and no error."""
    for option, given, least in (("--batch-size", 0, "at least 1"), ("--batch-size", -3, "at least 1"), ("--num-workers", -1, "0 or more")):
        assert f"{option}: got {given}, wanted {least}" in refused(tmp_path / "out", option, given)
    assert not (tmp_path / "out").exists()


def test_prompt_embeddings(run, refused, tmp_path, tiny_model_folder):
    latents = LatentSamples(run(tmp_path / "out", "--prompt-embeds"))
    with torch.no_grad():
        embeds = encode_prompts(*load_text(tiny_model_folder), [latents[5]["caption"]])[0]
    torch.testing.assert_close(latents[5]["prompt_embeds"], embeds, atol=2e-3, rtol=2e-3)
    manifest = latents.shards.manifest
    assert manifest["text_hash"] == manifest["generator"]["text_hash"] == text_hash(*load_text(tiny_model_folder))
    assert "prompt_embeds (there True, now False)" in refused(tmp_path / "out")
    assert "text_hash" not in read_manifest(run(tmp_path / "plain"))


def test_another_text_encoder_is_refused_by_its_hash(run, refused, tmp_path, tiny_model_folder, make_model_folder):
    """Not by its folder's name: a copy of the model is the same one."""
    out = run(tmp_path / "out", "--prompt-embeds")
    run(out, "--prompt-embeds", "--text-model", shutil.copytree(tiny_model_folder, tmp_path / "copy"))
    other = make_model_folder(tmp_path / "other", seed=1)
    assert "text_hash (there " in refused(out, "--prompt-embeds", "--text-model", other)


def test_resumes_without_encoding_again(run, tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole")
    encoded = []
    samples = script.Encoder.samples

    def stops(self, n, on_batch):
        if n == 2:
            raise KeyboardInterrupt
        encoded.append(n)
        yield from samples(self, n, on_batch)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(script.Encoder, "samples", stops)
        run(tmp_path / "out")
    assert encoded == [0, 1]
    with pytest.raises(FileNotFoundError, match="has no manifest.json"):
        read_manifest(tmp_path / "out")
    monkeypatch.setattr(script.Encoder, "samples", lambda *a: (encoded.append(a[1]), samples(*a))[1])
    run(tmp_path / "out")
    assert encoded == [0, 1, 2]
    assert contents(tmp_path / "out") == contents(whole)
    capsys.readouterr()
    run(tmp_path / "out")
    assert encoded == [0, 1, 2]
    assert "already encoded with this VAE (24 latents)" in capsys.readouterr().out


def test_processes_one_after_another(run, tmp_path, monkeypatch, capsys):
    one = run(tmp_path / "one")
    assert "shards are done" not in capsys.readouterr().out
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert not (tmp_path / "two" / "manifest.json").exists()
        run(tmp_path / "two")
        waiting = "1 of 3 shards are done: the manifest is written by the process that finishes last" in capsys.readouterr().out
        assert waiting is (rank == 1)
    assert contents(tmp_path / "two") == contents(one)


@pytest.mark.slow
def test_two_processes_at_once_give_the_same_set(run, tmp_path, tiny_model_folder, tiny_pictures):
    one = run(tmp_path / "one")
    words = [sys.executable, "data/encode_latents.py", "--data", tiny_pictures, "--model", tiny_model_folder, "--out", tmp_path / "two"]
    processes = [
        subprocess.Popen(list(map(str, words)), cwd=ROOT, env={**os.environ, "RANK": rank, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"})
        for rank in "01"
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert contents(tmp_path / "two") == contents(one)


def test_processes_that_finish_at_once(run, tmp_path, tiny_model_folder):
    """Both find all shards done, write the same manifest, and clear up what the other may have cleared."""
    out = run(tmp_path / "out")
    before = contents(out)
    manifest = read_manifest(out)
    entries = [out / f"pictures-{n:06d}.done.json" for n in range(3)]
    about = {name: value for name, value in manifest.items() if name not in ("shards", "count", "skipped")}
    script._finish(out, entries, about)  # the other has cleared up
    assert contents(out) == before
    for path, entry in zip(entries, manifest["shards"]):
        path.write_text(json.dumps({**entry, "skipped": []}))
    script._finish(out, entries, about)  # the other has written the manifest only
    assert contents(out) == before


def test_other_options_are_refused(run, refused, tmp_path, make_model_folder, make_picture_shards, monkeypatch):
    """Into a finished folder, and into one that was begun."""
    other = make_model_folder(tmp_path / "other", seed=1)
    pictures = make_picture_shards(tmp_path / "pictures", seed=1)
    out = run(tmp_path / "finished")
    begun = tmp_path / "begun"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(script, "_finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        run(begun)
    for folder in (out, begun):
        before = contents(folder)
        assert f"'{folder}' holds latents made with other options: vae (there " in refused(folder, model=other)
        assert "pictures (there " in refused(folder, data=pictures)
        assert "dtype (there float16, now bfloat16)" in refused(folder, "--dtype", "bfloat16")
        assert contents(folder) == before
    run(begun)
    assert contents(begun) == contents(out)
    assert "holds tars that this script did not make" in refused(pictures_without_manifest(pictures, tmp_path / "copy"))


def pictures_without_manifest(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    (copy / "manifest.json").unlink()
    return copy


def test_unreadable_pictures_are_left_out(run, tmp_path, make_picture_shards, tiny_model_folder, capsys):
    """A whole shard of them included."""
    bad = {2, 7, *range(8, 16)}
    data = make_picture_shards(tmp_path / "pictures", corrupt=bad)
    latents = LatentSamples(run(tmp_path / "out", data=data))
    assert "10 unreadable pictures skipped" in capsys.readouterr().out
    assert latents.shards.manifest["skipped"] == [f"{number:09d}" for number in sorted(bad)]
    assert latents.shards.keys.tolist() == [f"{number:09d}" for number in range(24) if number not in bad]
    vae, pictures = load_vae(tiny_model_folder), PictureSamples(data)
    for number in range(len(latents)):
        key = int(latents[number]["key"])
        with torch.no_grad():
            moments = vae.encode(pictures[key]["x"][None]).latent_dist.parameters[0]
        torch.testing.assert_close(latents[number]["moments"], moments, atol=1e-3, rtol=1e-3)


def test_an_unreadable_picture_before_one_of_the_same_key(run, tmp_path, tiny_pictures):
    """Tars of other origin may count from 0 each; a key does not tell whether the next picture stands in."""
    shards, folder = ShardSet.open(tiny_pictures), tmp_path / "pictures"
    folder.mkdir()
    pictures = [shards.read(0, "png")[:100], shards.read(1, "png"), shards.read(2, "png")]
    entries = [write_shard(folder / f"{n}.tar", [{"__key__": "0", "png": png, "txt": str(n)}]) for n, png in enumerate(pictures)]
    write_manifest(folder, entries, kind="pictures")
    latents = LatentSamples(run(tmp_path / "out", data=folder))
    assert [latents[n]["caption"] for n in range(len(latents))] == ["1", "2"] and latents.shards.manifest["skipped"] == ["0"]


def test_missing_captions_stay_missing(run, refused, tmp_path, tiny_pictures):
    """So that training on them is refused, as on the pictures."""
    shards, folder = ShardSet.open(tiny_pictures), tmp_path / "pictures"
    folder.mkdir()
    samples = [{"__key__": str(shards.keys[n]), "png": shards.read(n, "png"), **({"txt": "one"} if n else {})} for n in range(4)]
    write_manifest(folder, [write_shard(folder / "a.tar", samples)], kind="pictures")
    with pytest.raises(ValueError, match="1 of 4 samples have no caption"):
        LatentSamples(run(tmp_path / "out", data=folder))
    assert "1 of 4 samples have no caption" in refused(tmp_path / "embeds", "--prompt-embeds", data=folder)


def test_latents_that_overflow(refused, run, tmp_path, make_model_folder, make_tiny_vae):
    vae = make_tiny_vae()
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1e6)
    model = make_model_folder(tmp_path / "model", vae=vae)
    assert "do not fit float16: give --dtype bfloat16" in refused(tmp_path / "out", model=model)
    run(tmp_path / "wide", "--dtype", "bfloat16", model=model)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_network_that_gives_nan_is_told_from_an_overflow(refused, tmp_path, make_model_folder, make_tiny_vae, dtype):
    vae = make_tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] = torch.nan
    model = make_model_folder(tmp_path / "broken", vae=vae)
    said = refused(tmp_path / "out", "--dtype", dtype, model=model)
    assert "encoder.conv_in.bias" in said and "--dtype" not in said  # weights that are broken are refused when they are opened
    vae = make_tiny_vae()
    with torch.no_grad():
        vae.quant_conv.weight.fill_(3e38)
    said = refused(tmp_path / "other", "--dtype", dtype, model=make_model_folder(tmp_path / "overflows", vae=vae))
    assert "the VAE gives NaN or infinity for picture '000000000' of 'pictures-000000.tar'" in said
    assert "its weights are finite, so its arithmetic overflowed" in said


def test_a_text_encoder_that_gives_nan(refused, tmp_path, make_model_folder, tiny_model_folder):
    text = load_text(tiny_model_folder)[1]
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path / "broken"))
    with torch.no_grad():
        text.final_layer_norm.weight.fill_(3e38)
        text.final_layer_norm.bias.fill_(3e38)
    text.save_pretrained(folder / "text_encoder")
    said = refused(tmp_path / "out", "--prompt-embeds", "--text-model", folder)
    assert "the text encoder gives NaN or infinity for picture '000000000'" in said


def test_a_full_disk(refused, run, small_disk):
    out = small_disk(56) / "out"
    error = refused(out)
    assert f"no space left in '{out}'. Finished shards are kept" in error
    assert 0 < len(list(out.glob("*.tar"))) < 3 and not list(out.glob(".*"))
    small_disk(1000)
    assert len(LatentSamples(run(out))) == 24


def test_a_folder_without_a_vae(refused, tmp_path, tiny_pictures):
    assert "lacks vae" in refused(tmp_path / "out", model=tiny_pictures)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["gone", "cut"])
def test_a_finished_tar_that_is_lost_before_the_manifest_is_made_again(run, tmp_path, how):
    """The same command found it missing, or no tar, when all was encoded, and again whenever it was started."""
    out = run(tmp_path / "out")
    before, manifest = contents(out), read_manifest(out)
    for entry in manifest["shards"]:
        (out / f"{Path(entry['name']).stem}.done.json").write_text(json.dumps({**entry, "skipped": []}))
    (out / script.UNFINISHED).write_text(json.dumps({"generator": manifest["generator"]}))
    (out / "manifest.json").unlink()
    shutil.rmtree(out / "index")
    tar = out / manifest["shards"][1]["name"]
    if how == "gone":
        tar.unlink()
    else:
        tar.write_bytes(tar.read_bytes()[:1000])
    assert contents(run(out)) == before
