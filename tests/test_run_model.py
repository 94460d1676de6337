"""The model of a run at one of its checkpoints: exported as the run's end does, started from, refused by name."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import load_config
from eqldm.diffusion.module import train_diffusion
from eqldm.evaluation.entries import parse_entries
from eqldm.export import main
from eqldm.model_folder import load_vae, vae_hash
from eqldm.run_model import export_checkpoint, opened, with_models
from eqldm.training.checkpoints import LAST, step_checkpoint
from runs import weights


@pytest.fixture(scope="module")
def autoencoder(make_picture_shards, write_tiny_options, tmp_path_factory) -> Path:
    """A config of stage 1 whose run of four steps, in `run` beside it, is done and keeps every second checkpoint."""
    folder = tmp_path_factory.mktemp("autoencoder")
    shards = make_picture_shards(folder / "shards", count=8, size=16)
    path = write_tiny_options(folder / "tiny.yaml", shards, num_steps=4, val_every=2, checkpoint_every=1, keep_every=2)
    train_autoencoder(load_config(path))
    return path


@pytest.fixture(scope="module")
def diffusion(tiny_pictures, tiny_model_folder, write_tiny_unet_options, tmp_path_factory) -> Path:
    """The same of stage 2, of low-rank updates."""
    folder = tmp_path_factory.mktemp("diffusion")
    path = write_tiny_unet_options(folder / "tiny.yaml", tiny_pictures, tiny_model_folder, num_steps=4, val_every=2, checkpoint_every=2)
    path.write_text(path.read_text() + "adapt: lora\nlora: {rank: 2}\n")
    train_diffusion(load_config(path, ["run.keep_every=2"]))
    return path


@pytest.fixture
def export(monkeypatch, capsys):
    """`export("RUN@2", "--out", DIR)`: the folder that the command line names, or what it says of an error."""

    def run(*words) -> Path | str:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, words)])
        try:
            main()
        except SystemExit as stop:
            return str(stop.code)
        return Path(capsys.readouterr().out.strip())

    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_last_step_of_an_autoencoder_is_the_model_of_its_run(autoencoder, export, tmp_path):
    """Bit for bit, folded and with its card; the average of another step, and the trained weights, are others."""
    run = autoencoder.parent / "run"
    for name in ("run", "run@4", "run@last"):
        assert files(export(run.with_name(name), "--out", tmp_path / name)) == files(run / "model"), name
    checkpoint = torch.load(run / step_checkpoint(2), weights_only=True)
    for kind, state in (("ema", "state_dict"), ("raw", "current_model_state")):
        vae = load_vae(export(f"{run}@2", "--out", tmp_path / kind, "--weights", kind)).state_dict()
        same = [torch.equal(value, checkpoint[state][f"vae.{name}"]) for name, value in vae.items() if "quant" not in name]
        assert all(same) and vae_hash(load_vae(tmp_path / kind)) != vae_hash(load_vae(run / "model"))
    assert "| training | 2 steps of 4, seed 0 |" in (tmp_path / "ema" / "README.md").read_text()
    assert "The weights that were trained, not their average." in (tmp_path / "raw" / "README.md").read_text()
    half = load_file(next(export(f"{run}@2", "--out", tmp_path / "half", "--dtype", "float16").rglob("*.safetensors")))
    assert {value.dtype for value in half.values()} == {torch.float16}


def test_the_last_step_of_low_rank_updates_is_the_model_of_their_run(diffusion, export, tmp_path):
    run = diffusion.parent / "run"
    found = files(export(f"{run}@4", "--out", tmp_path / "last"))
    lora = {name.removeprefix("lora/"): data for name, data in found.items() if name.startswith("lora/")}
    assert lora == files(run / "lora") and {name: found[name] for name in found if not name.startswith("lora/")} == files(run / "model")
    early = export(f"{run}@2", "--out", tmp_path / "early")
    assert not any(
        torch.equal(weights(early)[name], value) for name, value in weights(run / "model").items() if name.endswith("to_q.weight")
    )


def test_an_export_replaces_no_model_that_it_is_less_than(autoencoder, diffusion, export, make_model_folder, tmp_path):
    """Nor one that its run has started from."""
    whole = make_model_folder(tmp_path / "whole")
    before = files(whole)
    assert f"--out '{whole}' holds a whole model, which a VAE alone would replace" in export(autoencoder.parent / "run", "--out", whole)
    assert f"--out '{whole}' holds a whole model" in export(autoencoder.parent / "run" / "model", "--out", whole)
    assert files(whole) == before
    config = load_config(diffusion.parent / "run" / "config.yaml")
    assert f"--out '{config.model}' is the model to read" in export(diffusion.parent / "run", "--out", config.model)
    assert export(diffusion.parent / "run", "--out", whole) == whole and files(whole) != before


def test_what_is_not_there_or_does_not_fit_is_named(autoencoder, export, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(autoencoder.parent / "run", run)
    out = ["--out", tmp_path / "out"]
    assert f"error: run folder '{run}' holds no checkpoint of step 3, it has those of 2, 4" in export(f"{run}@3", *out)
    for step in ("", "-1", "1e3", "LAST"):
        assert f"error: '{run}@{step}': got '{step}' after the run's '@', wanted the number of a step, or last" in export(
            f"{run}@{step}", *out
        )
    assert f"error: '{tmp_path / 'none'}' is no run folder" in export(f"{tmp_path / 'none'}@3", *out)
    assert "--weights and --inputs are for a run's checkpoint" in export(run / "model", *out, "--weights", "raw")
    assert "got 'run.seed=1': what may be named anew are a run's inputs" in export(run, *out, "--inputs", "run.seed=1")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").touch()
    assert "is no model folder: it would be deleted" in export(run, "--out", tmp_path / "mine")
    assert f"'{run / 'model'}' is where the run '{run}' keeps its own model" in export(f"{run}@2", "--out", run / "model")
    options = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(options.replace("- 8\n", "- 16\n"))
    assert "config.yaml' has changed, or was cut, since" in export(run, *out)
    (run / "config.yaml").write_text(options)
    (run / step_checkpoint(2)).write_bytes(b"")
    assert "cannot be used: it is empty (0 bytes). Give another (there are those of steps 4)" in export(f"{run}@2", *out)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_inputs_that_have_moved_are_given_and_known_by_their_contents(autoencoder, export, make_picture_shards, tmp_path):
    run, shards, moved = autoencoder.parent / "run", autoencoder.parent / "shards", tmp_path / "moved"
    other = make_picture_shards(tmp_path / "other", count=8, size=16, seed=1)
    os.rename(shards, moved)
    try:
        said = export(run, "--out", tmp_path / "out")
        assert f"data.train: '{shards}' holds neither shards" in said and "or say where it lies (option=path)" in said
        said = export(run, "--out", tmp_path / "out", "--inputs", f"data.train={other}", f"data.val={moved}")
        assert "the contents of data.train are others than when the run" in said
        found = export(run, "--out", tmp_path / "out", "--inputs", f"data.train={moved}", f"data.val={moved}")
        assert vae_hash(load_vae(found)) == vae_hash(load_vae(run / "model"))
    finally:
        os.rename(moved, shards)


def test_a_run_starts_from_anothers_checkpoint(autoencoder, tmp_path, capsys):
    """As the message says that refuses other options; the checkpoint's model is made once, and made anew where the run is another."""
    run = autoencoder.parent / "run"
    with pytest.raises(ValueError, match="loss.l1_weight was 1.0, is 2.0") as caught:
        train_autoencoder(load_config(autoencoder, ["loss.l1_weight=2"]))
    assert f"(to start there from this run's weights: init=pretrained model={run}@4, without architecture)" in str(caught.value)
    assert "What may change is how a run goes and not what it computes: run.devices" in str(caught.value)
    options, file = yaml.safe_load(autoencoder.read_text()), tmp_path / "more.yaml"
    del options["architecture"]  # which the model brings
    file.write_text(yaml.safe_dump(options))
    more = ["init=pretrained", f"model={run}@2", "loss.l1_weight=2", f"run.dir={tmp_path / 'more'}", "run.num_steps=1"]
    config = with_models(load_config(file, more))
    assert config.model == str(run / "models" / "step-000000002")
    assert "the average of its weights, exported to" in capsys.readouterr().err
    made = (run / "models" / "step-000000002" / "checkpoint.json").stat().st_mtime_ns
    train_autoencoder(config)
    assert opened(f"{run}@2") == Path(config.model) and (Path(config.model) / "checkpoint.json").stat().st_mtime_ns == made
    os.utime(run / step_checkpoint(2))  # stands for another run in the same folder
    assert opened(f"{run}@2") == Path(config.model) and (Path(config.model) / "checkpoint.json").stat().st_mtime_ns > made


def test_a_run_without_an_average_says_so(autoencoder, tmp_path, capsys):
    run = tmp_path / "run"
    train_autoencoder(load_config(autoencoder, [f"run.dir={run}", "optimizer.ema_decay=0", "run.num_steps=2"]))
    with pytest.raises(ValueError, match=r"the run keeps no average of its weights \(optimizer.ema_decay=0\)"):
        export_checkpoint(run, 2, tmp_path / "never", "ema")
    opened(f"{run}@2")
    assert "the trained weights, for the run keeps no average, exported to" in capsys.readouterr().err


def test_other_commands_take_a_runs_checkpoint(diffusion):
    run = diffusion.parent / "run"
    names = [(entry.name, str(entry.folder), str(entry.vae), entry.options) for entry in parse_entries(
        [f"{run}@2", f"a={run}@last@guidance_scale=2", f"b={run}@2,guidance_scale=2.5", f"c=x@vae={run}@2"])]  # fmt: skip
    assert names == [
        ("run-2", f"{run}@2", "None", {}),
        ("a", f"{run}@last", "None", {"guidance_scale": 2.0}),
        ("b", f"{run}@2", "None", {"guidance_scale": 2.5}),
        ("c", "x", f"{run}@2", {}),
    ]
    assert opened(f"{run}@last") == opened(f"{run}@4") == run / "models" / "step-000000004"
    last = torch.load(run / LAST, weights_only=True)["global_step"]
    assert last == 4 and files(opened(f"{run}@4") / "unet") == files(run / "model" / "unet")
    (run / step_checkpoint(4)).unlink()
    (run / LAST).rename(run / "aside")
    assert opened(f"{run}@4") == run / "models" / "step-000000004"  # a run that started from it finds it again
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3, it has those of 2"):
        opened(f"{run}@3")
    (run / "aside").rename(run / LAST)


def test_what_another_run_has_exported_in_the_same_folder_is_not_taken(autoencoder, tmp_path):
    """Its checkpoints were removed to start anew: RUN@STEP was the earlier run's model for good."""
    run = shutil.copytree(autoencoder.parent / "run", tmp_path / "run")
    (run / step_checkpoint(4)).unlink()
    before = vae_hash(load_vae(opened(f"{run}@4")))
    shutil.rmtree(run / LAST.parent)
    shutil.rmtree(run / "model")
    (run / "done.json").unlink()
    train_autoencoder(load_config(autoencoder, [f"run.dir={run}", "run.seed=5", "run.keep_every=3"]))
    assert vae_hash(load_vae(opened(f"{run}@4"))) == vae_hash(load_vae(run / "model")) != before


def test_a_run_of_somebody_else_that_cannot_be_written_to(autoencoder, tmp_path):
    run = shutil.copytree(autoencoder.parent / "run", tmp_path / "run")
    shutil.rmtree(run / "models", ignore_errors=True)
    (run / "models").touch()
    with pytest.raises(OSError, match=r"models' is no folder, so .* give another, which is python -m eqldm.export '.*run@2' --out DIR"):
        opened(f"{run}@2")


def test_low_rank_updates_that_a_killed_export_left_are_not_taken(diffusion, tmp_path):
    """Nor left there: they lay beside under a name that the next export used again."""
    run = shutil.copytree(diffusion.parent / "run", tmp_path / "run")
    export_checkpoint(run, 2, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    kept = files(tmp_path / "out" / "lora")
    (tmp_path / ".again-lora").mkdir()
    (tmp_path / ".again-lora" / "stale").touch()
    export_checkpoint(run, 2, tmp_path / "again")
    assert files(tmp_path / "again" / "lora") == kept
