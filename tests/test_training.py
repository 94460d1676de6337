"""The run folder: what it states, what may change, atomic checkpoints, and a killed run that goes on."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml

from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import AutoencoderConfig, OptimizerConfig, load_config
from eqldm.diffusion.module import train_diffusion
from eqldm.model_folder import load_vae
from eqldm.training.averaging import EMA
from eqldm.training.callbacks import AtomicCheckpointIO, Unchecked, check_finite
from eqldm.training.run_folder import FORMAT, INPUTS_FILE, LAST, changed_inputs, prepare_run
from eqldm.training.speed import Utilisation, note_precision
from eqldm.training.stopping import INTERRUPTED, STOPPED
from eqldm.training.trainer import learning_rate_factor
from runs import contents

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shards(make_picture_shards, tmp_path_factory) -> Path:
    return make_picture_shards(tmp_path_factory.mktemp("shards"), count=12, size=16)


@pytest.fixture
def configured(shards, tmp_path, write_tiny_options):
    """`configured("key=value", ...)`: options of a tiny run in `tmp_path / "run"`."""
    path = write_tiny_options(tmp_path / "tiny.yaml", shards, num_steps=2)

    def build(*overrides: str) -> AutoencoderConfig:
        return load_config(path, overrides)

    return build


def test_a_failed_write_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "checkpoints" / "last.ckpt"
    io.save_checkpoint({"step": 1, "weights": torch.arange(3.0)}, path)

    def half(checkpoint, file):
        file.write(b"half a checkpoint")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match=r"last.ckpt' could not be written .*No space left on device.*The one before it is kept"):
        io.save_checkpoint({"step": 2}, path)
    assert io.load_checkpoint(path)["step"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]  # and no half one beside it


def test_checkpoints_load_tensors_and_plain_values_only(tmp_path):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"weights": torch.ones(2), "names": ["a"]}, tmp_path / "plain.ckpt")
    assert io.load_checkpoint(tmp_path / "plain.ckpt")["names"] == ["a"]
    io.save_checkpoint({"config": OptimizerConfig()}, tmp_path / "pickled.ckpt")
    with pytest.raises(Exception, match="weights_only"):
        io.load_checkpoint(tmp_path / "pickled.ckpt")


def test_learning_rate_factor():
    def factors(**options) -> list[float]:
        return [learning_rate_factor(step, OptimizerConfig(**options), 14) for step in (0, 2, 4, 9, 14, 20)]

    rise = [1 / 5, 3 / 5]
    assert factors(warmup_steps=4) == pytest.approx([*rise, 1, 1, 1, 1])
    assert factors(warmup_steps=4, schedule="linear") == pytest.approx([*rise, 1, 0.505, 0.01, 0.01])
    assert factors(warmup_steps=4, schedule="cosine") == pytest.approx([*rise, 1, 0.505, 0.01, 0.01])
    assert learning_rate_factor(3, OptimizerConfig(warmup_steps=0, schedule="cosine"), 12) == pytest.approx(
        0.01 + 0.99 * math.cos(math.pi / 8) ** 2
    )
    assert learning_rate_factor(5, OptimizerConfig(warmup_steps=100), 2) == pytest.approx(6 / 101)  # shorter than its warm-up


def test_utilisation_is_of_the_devices_peak(configured, tmp_path):
    train_autoencoder(configured("run.log_every=1"), callbacks=[Utilisation(operations=2e9, peak=1e12)])
    assert (tmp_path / "run" / "precision.txt").read_text() in ("32-true\n", "bf16-mixed\n")
    with open(tmp_path / "run" / "logs" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/mfu")]
    assert len(rows) == 2
    for row in rows:
        assert float(row["train/mfu"]) == pytest.approx(float(row["train/samples_per_second"]) * 2e9 / 1e12, rel=1e-5)
    assert "train/max_memory_gb" not in rows[0]  # no CUDA device


def test_check_finite():
    good = {"l1": torch.tensor(0.5), "kl": torch.tensor(2.0)}
    check_finite(good, 7, ["a", "b"])
    for bad in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match=rf"step 7: l1 = 0.5, kl = 2, total = {bad}. Batch: a, b. .*learning_rate"):
            check_finite({**good, "total": torch.tensor(bad)}, 7, ["a", "b"])


def test_unchecked_losses_are_looked_at_once_and_the_first_bad_one_is_told():
    unchecked = Unchecked()
    unchecked.check(6)
    unchecked.add({"l1": torch.tensor(0.5)}, ["a"])
    unchecked.check(6)
    unchecked.add({"l1": torch.tensor(0.5, requires_grad=True)}, ["b"])
    unchecked.add({"l1": torch.tensor([1.0, float("inf")]).sum(), "kl": torch.tensor(2.0)}, ["c", "d"])
    unchecked.add({"grad_norm": torch.tensor(float("nan"))}, ["e"])
    with pytest.raises(FloatingPointError, match=r"step 7: l1 = inf, kl = 2. Batch: c, d. "):
        unchecked.check(7)
    unchecked.check(8)  # none is left


class Overflow(pl.Callback):
    """An infinite weight after step 2, as of an optimizer's step that was too large."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2:
            next(pl_module.parameters()).data.view(-1)[0] = math.inf


def test_weights_that_are_not_finite_are_not_saved(configured, tmp_path):
    with pytest.raises(
        FloatingPointError, match=r"not finite after step 2, such as vae\S+: they are not saved, and the last checkpoint is"
    ):
        train_autoencoder(configured("run.num_steps=4", "run.checkpoint_every=1"), [Overflow()])
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "run" / LAST)["global_step"] == 1


class Spoils(pl.Callback):
    """After step 2, something that a checkpoint holds besides the weights is infinite, or the record of the run's id is gone."""

    def __init__(self, what: str):
        self.what = what

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == 2 and self.what == "optimizer":
            next(iter(trainer.optimizers[0].state.values()))["exp_avg_sq"].view(-1)[0] = math.inf
        elif trainer.global_step == 2 and self.what == "average":
            ema = next(callback for callback in trainer.callbacks if isinstance(callback, EMA))
            next(ema._average_model.parameters()).data.view(-1)[0] = math.nan
        elif trainer.global_step == 2:
            (Path(pl_module.config.run.dir) / INPUTS_FILE).unlink()


@pytest.mark.parametrize(("what", "name"), [("optimizer", r"optimizer_states\S+exp_avg_sq"), ("average", r"state_dict\.vae\S+")])
def test_what_could_not_be_loaded_takes_no_checkpoints_place(configured, tmp_path, what, name):
    """It was saved, in the place of the good one before, and refused when the run went on."""
    options = ["run.num_steps=4", "run.checkpoint_every=1", "optimizer.ema_decay=0.9"]
    with pytest.raises(FloatingPointError, match=rf"not finite after step 2, such as {name}: .* not saved, and the last checkpoint is"):
        train_autoencoder(configured(*options), [Spoils(what)])
    train_autoencoder(configured(*options))
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "run" / LAST)["global_step"] == 4


def test_a_record_that_goes_away_under_a_run_costs_it_no_step(configured, tmp_path):
    train_autoencoder(configured("run.num_steps=4", "run.checkpoint_every=4"), [Spoils("record")])
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "run" / LAST)["global_step"] == 4
    with pytest.raises(FileNotFoundError, match="no inputs.json: put it back"):
        train_autoencoder(configured("run.num_steps=5"))


class Fails(pl.Callback):
    """Fails once, as a validation without memory or a reader of damaged data does."""

    def __init__(self, hook: str):
        def fail(trainer, *_) -> None:
            if trainer.global_step == 3:
                raise ValueError("for once")

        setattr(self, hook, fail)


@pytest.mark.parametrize("hook", ["on_validation_batch_start", "on_validation_end", "on_train_batch_start", "on_before_optimizer_step"])
def test_what_fails_between_two_steps_costs_none(configured, tmp_path, capsys, hook):
    """Its checkpoint was due after the validation: one that fails each time would never let the run go on."""
    options = ["run.num_steps=5", "run.checkpoint_every=3", "run.val_every=3", "optimizer.ema_decay=0.9"]
    train_autoencoder(configured(*options, f"run.dir={tmp_path / 'whole'}"))
    with pytest.raises(ValueError, match="for once"):
        train_autoencoder(configured(*options), [Fails(hook)])
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "run" / LAST)["global_step"] == 3
    train_autoencoder(configured(*options))
    whole, resumed = (load_vae(tmp_path / name / "model").state_dict() for name in ("whole", "run"))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    failed = hook == "on_validation_batch_start"
    logged = [rows(tmp_path / name, "val/reconstruction/psnr") for name in ("whole", "run")]
    assert len(logged[0]) == 1 and logged[1] == ({} if failed else logged[0])
    assert ("leaves out the validation that failed" in capsys.readouterr().err) is ("validation" in hook)


def test_prepare_run_describes_the_run(configured, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "tiny.yaml", "run.seed=5"])
    config = configured("run.seed=5")
    assert prepare_run(config) is None
    folder = tmp_path / "run"
    assert load_config(folder / "config.yaml") == config  # every option, resolved, and itself a config
    assert (folder / "command.txt").read_text().endswith("train.py tiny.yaml run.seed=5\n")
    versions = json.loads((folder / "versions.json").read_text())
    assert torch.__version__.startswith(versions["torch"]) and {"python", "diffusers", "eqldm"} <= versions.keys()
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    if commit.returncode == 0:
        assert (folder / "git.txt").read_text() == commit.stdout and (folder / "git.diff").exists()


def test_one_training_at_a_time_in_a_run_folder(configured, tmp_path):
    train_autoencoder(configured())
    another = "from sys import argv; from pathlib import Path; from eqldm.lock import hold; hold(Path(argv[1]), 'it is', '')"
    done = subprocess.run([sys.executable, "-c", another, tmp_path / "run"], cwd=ROOT, capture_output=True, text=True)
    assert f"it is by process {os.getpid()} on " in done.stderr
    assert subprocess.run([sys.executable, "-c", another, tmp_path / "free"], cwd=ROOT).returncode == 0
    (tmp_path / "free" / ".lock").rename(tmp_path / "run" / "left.lock")  # what a dead process leaves holds nothing
    train_autoencoder(configured("run.num_steps=3"))


@pytest.mark.parametrize("leads", ["run", "nowhere"])  # to itself: a traceback
def test_a_link_to_no_folder_is_named(configured, tmp_path, leads):
    (tmp_path / "run").symlink_to(leads)
    with pytest.raises(NotADirectoryError, match=r"run\.dir: '.*run' is no folder"):
        prepare_run(configured())


def test_a_run_replaces_no_model_that_it_did_not_make(configured, tmp_path):
    mine = tmp_path / "run" / "model" / "mine.txt"
    mine.parent.mkdir(parents=True)
    assert prepare_run(configured()) is None  # an empty folder holds nothing to lose
    mine.write_text("of years")
    with pytest.raises(ValueError, match="and no checkpoint to go on from: a run that begins there would replace it at its end"):
        train_autoencoder(configured())
    assert mine.read_text() == "of years"


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_in_silence(configured, tmp_path):
    model = train_autoencoder(configured())
    before = contents(model)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert train_autoencoder(configured()) == model  # it has taken all of its steps
    with pytest.raises(ValueError, match="no checkpoint to go on from"):
        train_autoencoder(configured("run.num_steps=4"))
    assert contents(model) == before


def test_the_run_folder_and_the_input_models_are_apart(configured, tmp_path):
    model = train_autoencoder(configured("run.dir=" + str(tmp_path / "first")))
    from_it = [f"model={model}", "init=pretrained", "architecture={}"]
    path = tmp_path / "tiny.yaml"
    options = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**options, "architecture": {}}))
    shutil.rmtree(tmp_path / "first" / "checkpoints")
    (tmp_path / "first" / "done.json").unlink()
    with pytest.raises(ValueError, match=r"model: '.*first/model' is where run.dir='.*' puts its own model, which would replace it"):
        train_autoencoder(configured(*from_it, f"run.dir={model.parent / '..' / 'first'}"))
    with pytest.raises(ValueError, match="run.dir: '.*' lies within model='.*', whose contents it would change"):
        train_autoencoder(configured(*from_it, f"run.dir={model / 'further'}"))


def test_changed_options_are_refused_and_listed(configured):
    train_autoencoder(configured())
    for overrides in (["optimizer.learning_rate=0.5", "data.batch_size=6"], ["loss.l1_weight=3", "run.num_steps=4"]):
        with pytest.raises(ValueError, match="holds a run with other options") as caught:
            train_autoencoder(configured(*overrides))
        changed = [item.partition("=")[0] for item in overrides if not item.startswith("run.num_steps")]
        assert all(f"{name} was " in str(caught.value) for name in changed)
    assert "data.batch_size was 4, is 6; optimizer.learning_rate was 0.001, is 0.5. Use another run.dir" in str(
        pytest.raises(ValueError, prepare_run, configured("optimizer.learning_rate=0.5", "data.batch_size=6")).value
    )


def test_options_younger_than_the_run_had_their_defaults(configured, tmp_path):
    train_autoencoder(configured())
    path = tmp_path / "run" / "config.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("crop_size:")))
    train_autoencoder(configured())
    with pytest.raises(ValueError, match="crop_size was None, is 16"):
        train_autoencoder(configured("crop_size=16"))


def test_a_run_of_another_version_is_refused(configured, tmp_path):
    """A change of losses or draws raises FORMAT; a run begun before it must not go on as if nothing were."""
    train_autoencoder(configured())
    path = tmp_path / "run" / INPUTS_FILE
    inputs = json.loads(path.read_text())
    assert inputs.pop("format") == FORMAT
    path.write_text(json.dumps(inputs))
    with pytest.raises(ValueError, match=r"begun by another version of eqldm \(format 1, now \d\): go on with the commit in its git.txt"):
        train_autoencoder(configured("run.num_steps=3"))


def test_what_may_change_may_change(configured, tmp_path):
    train_autoencoder(configured())
    more = configured("run.num_steps=3", "data.micro_batch_size=2", "run.checkpoint_every=1", "run.val_every=1", "run.log_every=2")
    assert prepare_run(more) == tmp_path / "run" / LAST
    assert train_autoencoder(more) == tmp_path / "run" / "model"
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "run" / LAST)["global_step"] == 3
    with pytest.raises(ValueError, match="holds a run at step 3, past run.num_steps=1: set at least 3"):
        train_autoencoder(configured("run.num_steps=1"))


def test_a_finished_run_started_again_changes_nothing(configured, tmp_path, capsys):
    model = train_autoencoder(configured())
    before = contents(tmp_path / "run")
    assert train_autoencoder(configured()) == model
    assert contents(tmp_path / "run") == before
    assert "has taken all of its 2 steps: nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other options: loss.l1_weight was 1.0, is 2.0"):
        train_autoencoder(configured("loss.l1_weight=2"))


def test_settings_of_a_model_that_change_under_a_run_are_told(tiny_pictures, make_model_folder, write_tiny_unet_options, tmp_path):
    """Its weights do not tell: another prediction_type is another objective, another scaling_factor other latents."""
    model = make_model_folder(tmp_path / "m")
    path = write_tiny_unet_options(tmp_path / "tiny.yaml", tiny_pictures, model, num_steps=2)
    train_diffusion(load_config(path))
    more, folder = load_config(path, ["run.num_steps=3"]), tmp_path / "run"
    assert changed_inputs(more, folder) == []
    scheduler, vae = "scheduler/scheduler_config.json", "vae/config.json"
    for file, name, value, told in (
        (scheduler, "prediction_type", "v_prediction", f"model ({scheduler})"),
        (vae, "scaling_factor", 3.0, f"model ({vae}), vae ({vae})"),
    ):
        settings = model / file
        before = settings.read_text()
        settings.write_text(json.dumps({**json.loads(before), "_diffusers_version": "9"}))
        assert changed_inputs(more, folder) == []
        settings.write_text(json.dumps({**json.loads(before), name: value}))
        with pytest.raises(ValueError, match=re.escape(f"the contents of {told} have changed")):
            train_diffusion(more)
        settings.write_text(before)
    inputs = json.loads((folder / INPUTS_FILE).read_text())
    del inputs["settings"]  # a run that was begun before they were noted
    (folder / INPUTS_FILE).write_text(json.dumps(inputs))
    assert changed_inputs(more, folder) == []


def test_logs_go_on_where_the_checkpoint_was(configured, tmp_path, monkeypatch):
    options = ["run.num_steps=5", "run.checkpoint_every=2", "run.val_every=2"]

    def stop(unchecked, step):
        if step == 3:
            raise FloatingPointError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("eqldm.training.callbacks.Unchecked.check", stop)
        with pytest.raises(FloatingPointError, match="stopped"):
            train_autoencoder(configured(*options))
    train_autoencoder(configured(*options))
    table = (tmp_path / "run" / "logs" / "metrics.csv").read_text().splitlines()
    names = table[0].split(",")
    steps = [int(row.split(",")[names.index("step")]) for row in table[1:] if row.split(",")[names.index("train/loss")]]
    assert steps == [0, 1, 2, 3, 4]  # step 2 was logged, lost, and logged again: it counts once


def train(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), str(folder / "tiny.yaml"), *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True)


def until(process: subprocess.Popen, start: str) -> str:
    """The output of a process up to a line that begins so."""
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith(start):
            break
    return output


@pytest.mark.slow
def test_a_killed_process_goes_on(configured, tmp_path):
    """SIGKILL after the first checkpoint, then the same command: equal to a run in this process that nothing stopped."""
    options = ["run.num_steps=40", "run.checkpoint_every=2", "run.log_every=100"]
    configured()  # writes tiny.yaml
    process, last = train(tmp_path, *options), tmp_path / "run" / LAST
    limit = time.monotonic() + 120
    while not last.exists() and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert last.exists() and process.returncode == -signal.SIGKILL, output
    step = AtomicCheckpointIO().load_checkpoint(last)["global_step"]
    assert step < 40 and not (tmp_path / "run" / "model").exists()

    process = train(tmp_path, *options)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and f"done: {tmp_path / 'run' / 'model'}" in output, output
    whole = train_autoencoder(configured(*options, f"run.dir={tmp_path / 'whole'}"))
    a, b = load_vae(tmp_path / "run" / "model").state_dict(), load_vae(whole).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("number", "processes"),
    [
        pytest.param(signal.SIGTERM, 1, id="SIGTERM"),
        pytest.param(signal.SIGUSR1, 2, id="SIGUSR1 to one of two", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_told_to_stop_saves_its_step(configured, tmp_path, number, processes):
    """Far from any checkpoint that is due; the same command goes on, and ends where a run ends that nothing stopped."""
    options = ["run.checkpoint_every=1000", "run.val_every=1000", "optimizer.schedule=constant", f"data.micro_batch_size={4 // processes}"]
    configured()  # writes tiny.yaml
    process = train(tmp_path, *options, "run.num_steps=1000", f"run.devices={processes}")
    output = until(process, "step 3/")
    process.send_signal(number)
    output += process.communicate(timeout=120)[0]
    assert process.returncode == STOPPED, output
    step = AtomicCheckpointIO().load_checkpoint(tmp_path / "run" / LAST)["global_step"]
    assert 3 <= step < 1000 and f"stopped by {number.name} at step {step}, with a checkpoint: the same command goes on" in output
    assert not (tmp_path / "run" / "model").exists()

    options.append(f"run.num_steps={step + 2}")
    resumed = load_vae(train_autoencoder(configured(*options))).state_dict()
    if processes == 1:  # two round otherwise (see test_autoencoder.py)
        whole = load_vae(train_autoencoder(configured(*options, f"run.dir={tmp_path / 'whole'}"))).state_dict()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_to_the_whole_group_loses_nothing(configured, tmp_path, number):
    """As a terminal and a scheduler send it: the reader processes get it too. Twice, as under torchrun, which hands it on."""
    options = ["data.num_workers=2", "run.checkpoint_every=1000", "run.val_every=3", "optimizer.schedule=constant"]
    configured()  # writes tiny.yaml
    process = train(tmp_path, *options, "run.num_steps=1000")
    output = until(process, "step 3/")
    for _ in range(2):
        os.killpg(process.pid, number)
    output += process.communicate(timeout=120)[0]
    assert process.returncode == (INTERRUPTED if number == signal.SIGINT else STOPPED), output
    assert "Traceback" not in output and "DataLoader worker" not in output, output
    assert ("Ctrl-C: after the step at hand a checkpoint is saved; another" in output) is (number == signal.SIGINT)
    step = AtomicCheckpointIO().load_checkpoint(tmp_path / "run" / LAST)["global_step"]
    assert 3 <= step < 1000 and f"stopped by {number.name} at step {step}, with a checkpoint: the same command goes on" in output

    options.append(f"run.num_steps={step + 2}")
    model = load_vae(train_autoencoder(configured(*options))).state_dict()
    whole = load_vae(train_autoencoder(configured(*options, f"run.dir={tmp_path / 'whole'}"))).state_dict()
    assert all(torch.equal(model[name], whole[name]) for name in whole)
    for name in ("train/loss", "val/reconstruction/psnr"):  # no row of the log is lost either, and none is moved
        assert rows(tmp_path / "run", name) == rows(tmp_path / "whole", name) != {}


def rows(run: Path, name: str) -> dict[int, float]:
    with open(run / "logs" / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[name]) for row in csv.DictReader(file) if row.get(name)}


class Tell(pl.Callback):
    """Sends this process a signal from a hook, at a step."""

    def __init__(self, hook: str, step: int, number: int = signal.SIGINT):
        setattr(self, hook, lambda trainer, *_: os.kill(os.getpid(), number) if trainer.global_step == step else None)


@pytest.mark.parametrize(
    ("hook", "step", "words"),
    [
        ("on_train_batch_start", 0, "stopped by SIGINT before the first step: nothing to save"),
        ("on_validation_start", 2, "stopped by SIGINT at step 2, with a checkpoint: the same command goes on from there"),
        ("on_validation_start", 4, "stopped by SIGINT at step 4, with a checkpoint: the same command exports the model"),
    ],
)
def test_stopped_between_steps(configured, tmp_path, capsys, hook, step, words):
    """Before the first, while it validates, at the last; the signal's handlers are put back."""
    options, before = ["run.num_steps=4", "run.val_every=2", "run.checkpoint_every=4"], signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as caught:
        train_autoencoder(configured(*options), [Tell(hook, step)])
    assert caught.value.code == INTERRUPTED and words in capsys.readouterr().out
    assert (tmp_path / "run" / LAST).exists() is (step > 0) and not (tmp_path / "run" / "model").exists()
    assert signal.getsignal(signal.SIGINT) is before
    train_autoencoder(configured(*options))
    assert list(rows(tmp_path / "run", "val/reconstruction/psnr")) == [1, 3] and (tmp_path / "run" / "model").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prepare_run", "save_model_folder"])
def test_stopped_before_the_steps_and_while_exporting(configured, tmp_path, name):
    """No traceback, what it was at, and the same command ends the run."""
    configured()  # writes tiny.yaml
    script = tmp_path / "told.py"
    script.write_text(
        "import runpy, sys, time, eqldm.autoencoder.module as module\n"
        f"module.{name} = lambda *_, **__: print('here', flush=True) or time.sleep(60)\n"
        f"sys.argv = {['train.py', str(tmp_path / 'tiny.yaml')]}\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    for number, status in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, STOPPED)):
        process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output = until(process, "here")
        process.send_signal(number)
        output += process.communicate(timeout=60)[0]
        where = "before the first step: nothing is lost" if name == "prepare_run" else "after the last step, while the model was exported"
        assert process.returncode == status and f"stopped by {number.name} {where}" in output and "Traceback" not in output, output
    train_autoencoder(configured())
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_run_at_once(configured, tmp_path):
    configured()  # writes tiny.yaml
    script = tmp_path / "second.py"
    script.write_text(
        "import runpy, sys, time, eqldm.training.callbacks as callbacks\n"
        "callbacks.GradientGuard.on_train_batch_start = lambda *_: print('here', flush=True) or time.sleep(60)\n"
        f"sys.argv = {['train.py', str(tmp_path / 'tiny.yaml'), 'data.num_workers=1']}\n"
        f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
    )
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    until(process, "here")
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    process.wait(10)
    assert process.returncode == -signal.SIGINT
    process.stdout.read()  # ends when the reader process, which holds it too, has found its parent gone


def test_errors_of_train_are_one_line(configured, tmp_path, monkeypatch):
    configured()
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "tiny.yaml"), "data.train=/nowhere"])
    with pytest.raises(SystemExit, match="^error: .*'/nowhere' is not a folder"):
        importlib.import_module("train").main()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_compiled_autoencoder_with_a_late_discriminator_computes_the_same(configured, tmp_path):
    options = ["run.num_steps=3", "loss.adversarial_weight=0.5", "loss.adversarial_start=1", "loss.discriminator_layers=1",
               "loss.discriminator_channels=8", "equivariance.group=d4", "equivariance.consistency_weight=0.1"]  # fmt: skip
    folders = [train_autoencoder(configured(*options, f"run.compile={on}", f"run.dir={tmp_path / on}")) for on in ("false", "true")]
    a, b = (load_vae(folder).state_dict() for folder in folders)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-4)


def test_another_arithmetic_is_said(tmp_path, capsys):
    """run.precision=auto is bfloat16 on one device and float32 on another."""
    for precision, said in (("bf16-mixed", ""), ("bf16-mixed", ""), ("32-true", "in bf16-mixed until now and goes on in 32-true")):
        note_precision(tmp_path, precision)
        assert said in (error := capsys.readouterr().err) and bool(said) == bool(error)
    assert (tmp_path / "precision.txt").read_text() == "32-true\n"
