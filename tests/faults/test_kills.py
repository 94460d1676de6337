"""A process killed while it writes: what stood there is whole, and the same command goes on to what it would have made.

The places: just before each time that the process opens a file to write, renames, links, removes one, or makes a folder. `seed` shares
them out.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from forks import entry, fork, killed_at, script, status

import encode_latents
import glyphs
from eqldm import export
from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import load_config
from eqldm.diffusion.module import train_diffusion
from eqldm.model_folder import Networks, load_vae, vae_hash
from eqldm.run_model import opened
from eqldm.training.checkpoints import newest_checkpoint, read_whole
from runs import contents

sampling = script("sample")
TRIES = 4


def places(seed: int) -> Callable[[], int]:
    """The places of one try: every `TRIES`-th, each once."""
    return count(seed % TRIES, TRIES).__next__


def exhaust(folder: Path, work: Callable[[], object], check: Callable[[], object], seed: int, begin: Callable[[], object]) -> int:
    """Kills the work at each of this try's places, from the beginning each time, with a check of what is there; and lets it end then.
    Returns how many places there were."""
    next_place = places(seed)
    for tried in count():
        begin()
        killed = killed_at(next_place(), folder, work)
        check()
        assert status(fork(work)) == 0
        check()
        if not killed:
            return tried


@pytest.mark.slow
@pytest.mark.fault("killed while a model is exported", tries=TRIES)
def test_export(tiny_model_folder, make_model_folder, tmp_path, seed, tried):
    out, other = tmp_path / "to" / "out", make_model_folder(tmp_path / "other", seed=1)
    hashes = [vae_hash(load_vae(model).half().float()) for model in (other, tiny_model_folder)]
    work = entry(export.main, tiny_model_folder, "--out", out)

    def begin() -> None:
        shutil.rmtree(out.parent, ignore_errors=True)
        assert status(fork(entry(export.main, other, "--out", out))) == 0

    def whole() -> None:
        aside = out.with_name(f".{out.name}.eqldm.old")  # killed between two renames: the next writer puts it back
        found = out if out.exists() else aside
        Networks.open(found)
        assert vae_hash(load_vae(found)) in hashes

    tried(exhaust(out.parent, work, whole, seed, begin))
    assert vae_hash(load_vae(out)) == hashes[1] and [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.fault("killed while latents are encoded", tries=TRIES)
def test_encode(tiny_model_folder, tiny_pictures, tmp_path, seed, tried):
    words = ["--data", tiny_pictures, "--model", tiny_model_folder, "--num-workers", 0]
    assert status(fork(entry(encode_latents.main, *words, "--out", tmp_path / "whole"))) == 0
    out = tmp_path / "to" / "out"
    work = entry(encode_latents.main, *words, "--out", out)
    tried(exhaust(out, work, lambda: None, seed, lambda: shutil.rmtree(out, ignore_errors=True)))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.fault("killed while glyphs are made", tries=TRIES)
def test_glyphs(tmp_path, seed, tried):
    sizes = ["--num-train", 6, "--num-val", 2, "--num-test", 2, "--size", 32, "--shard-size", 3, "--workers", 1]
    assert status(fork(entry(glyphs.main, "--out", tmp_path / "whole", *sizes))) == 0
    out = tmp_path / "to" / "out"
    work = entry(glyphs.main, "--out", out, *sizes)
    tried(exhaust(out, work, lambda: None, seed, lambda: shutil.rmtree(out, ignore_errors=True)))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.fault("killed while pictures are sampled", tries=TRIES)
def test_sample(tiny_model_folder, tmp_path, seed, tried):
    words = ["--model", tiny_model_folder, "--prompts", "the letter a", "the letter v", "--num-samples", 2, "--num-inference-steps", 2]
    assert status(fork(entry(sampling.main, *words, "--out", tmp_path / "whole"))) == 0
    out = tmp_path / "to" / "out"
    work = entry(sampling.main, *words, "--out", out)
    tried(exhaust(out, work, lambda: None, seed, lambda: shutil.rmtree(out, ignore_errors=True)))
    whole = contents(tmp_path / "whole")
    assert {name for name in contents(out)} == set(whole)
    assert all(contents(out)[name] == value for name, value in whole.items() if name.endswith(".png"))


@pytest.mark.slow
@pytest.mark.fault("killed while a run trains, saves and exports", tries=TRIES)
@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_training(stage, make_picture_shards, write_tiny_options, write_tiny_unet_options, tiny_model_folder, tmp_path, seed, tried):
    shards = make_picture_shards(tmp_path / "shards", count=8, size=32)
    steps = {"num_steps": 4, "checkpoint_every": 1, "keep_every": 2, "val_every": 2}
    if stage == "autoencoder":
        path, train = write_tiny_options(tmp_path / "tiny.yaml", shards, **steps), train_autoencoder
    else:
        path, train = write_tiny_unet_options(tmp_path / "tiny.yaml", shards, tiny_model_folder, **steps), train_diffusion
    whole, run = tmp_path / "whole", tmp_path / "to" / "run"
    assert status(fork(lambda: train(load_config(path, [f"run.dir={whole}"])))) == 0

    def work() -> None:
        train(load_config(path, [f"run.dir={run}"]))

    def check() -> None:
        if newest := newest_checkpoint(run):
            read_whole(newest)
        if (run / "model").exists():
            load_vae(run / "model") if stage == "autoencoder" else Networks.open(run / "model")

    tried(exhaust(run, work, check, seed, lambda: shutil.rmtree(run, ignore_errors=True)))
    ours, theirs = contents(run / "model"), contents(whole / "model")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in theirs if name.endswith(".safetensors"))
    table = "logs/metrics.csv"
    assert [line.split(",")[0] for line in (run / table).read_text().splitlines()] == [
        line.split(",")[0] for line in (whole / table).read_text().splitlines()
    ]
    assert not [name for name in contents(run) if ".partial" in name or name.endswith(".old")]


@pytest.mark.slow
@pytest.mark.fault("killed while RUN@STEP is opened", tries=TRIES)
def test_a_step_of_a_run(make_picture_shards, write_tiny_options, tmp_path, seed, tried):
    shards = make_picture_shards(tmp_path / "shards", count=8, size=32)
    run = tmp_path / "run"
    config = load_config(
        write_tiny_options(tmp_path / "tiny.yaml", shards, num_steps=2, checkpoint_every=1, keep_every=1), [f"run.dir={run}"]
    )
    assert status(fork(lambda: train_autoencoder(config))) == 0
    models = run / "models"

    def check() -> None:
        for model in models.glob("step-*"):
            load_vae(model)

    tried(exhaust(models, lambda: opened(f"{run}@1"), check, seed, lambda: shutil.rmtree(models, ignore_errors=True)))
    assert [path.name for path in models.iterdir()] == ["step-000000001"]
