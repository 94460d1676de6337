"""DeepSpeed's ZeRO: its config as DeepSpeed reads it, and real runs on CPU processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eqldm.config import load_config
from eqldm.diffusion.module import train_diffusion
from eqldm.run_model import export_checkpoint
from eqldm.training.checkpoints import step_checkpoint
from eqldm.training.run_folder import LAST, checkpoint_step
from eqldm.training.zero import ZERO, AdamWEMA, zero_config
from runs import logged, weights

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def options(tmp_path_factory, tiny_pictures, tiny_model_folder, write_tiny_unet_options) -> Path:
    """A config of three steps of the tiny model, on pictures."""
    path = tmp_path_factory.mktemp("zero") / "options.yaml"
    return write_tiny_unet_options(path, tiny_pictures, tiny_model_folder, num_steps=3, val_every=3)


def python(*words) -> subprocess.CompletedProcess:
    """A process of one thread, in the repository."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "NVIDIA_TF32_OVERRIDE": "0"}  # a GPU's float32 is whole
    return subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, env=environment, capture_output=True, text=True)


def train(options: Path, run: Path, *overrides: str, processes: int = 2) -> subprocess.CompletedProcess:
    return python("train.py", options, f"run.dir={run}", f"run.devices={processes}", *overrides)


@pytest.mark.parametrize("strategy", ZERO)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_deepspeed_takes_the_config(options, strategy, precision):
    """Read by DeepSpeed's own class, it says what our options say."""
    from deepspeed.runtime.config import DeepSpeedConfig

    config = load_config(options, [f"run.strategy={strategy}", "data.micro_batch_size=2"])
    read = DeepSpeedConfig({**zero_config(config, precision, overlap=True), "gradient_accumulation_steps": 2})
    assert read.zero_optimization_stage == int(strategy[-1]) and read.zero_config.overlap_comm
    assert (read.train_micro_batch_size_per_gpu, read.gradient_accumulation_steps, read.train_batch_size) == (2, 2, 4)
    assert read.gradient_clipping == 0.1 and read.zero_allow_untested_optimizer
    assert read.torch_autocast_enabled is (precision == "bf16-mixed") and read.torch_autocast_dtype == torch.bfloat16
    assert not read.bfloat16_config.enabled and not read.float16_config.enabled  # weights stay in float32
    assert read.torch_autocast_lower_precision_safe_modules == []  # and gradients are summed in it


def test_no_clipping_is_none(options):
    assert zero_config(load_config(options, ["run.strategy=zero2", "optimizer.clip_norm=.inf"]), "32-true", False)["gradient_clipping"] == 0


def test_adamw_with_the_average_steps_as_adamw_and_averages(tmp_path):
    torch.manual_seed(0)
    a = torch.nn.Parameter(torch.randn(5))
    b, average = torch.nn.Parameter(a.detach().clone()), None
    ours = AdamWEMA([a, torch.nn.Parameter(torch.zeros(2))], 0.75, lr=0.1, weight_decay=0.1)  # the second has no gradient
    torchs = torch.optim.AdamW([b], lr=0.1, weight_decay=0.1)
    for n in range(60):  # the decay rises to .75 in 26 steps
        a.grad = torch.randn(5)
        b.grad = a.grad.clone()
        ours.step()
        torchs.step()
        average = b.detach().clone() if average is None else average.lerp(b.detach(), 1 - min(0.75, (1 + n) / (10 + n)))
    assert torch.equal(a, b)
    torch.testing.assert_close(ours.state[a]["ema"], average)
    again = AdamWEMA([a], 0.75, lr=0.1)
    again.load_state_dict({"state": {0: ours.state[a]}, "param_groups": [{**again.state_dict()["param_groups"][0]}]})
    assert torch.equal(again.state[a]["ema"], ours.state[a]["ema"])


def stop_at(options: Path, run: Path, step: int, *overrides: str, processes: int = 2) -> None:
    """A run that a signal of the scheduler ends at a step, with a checkpoint."""
    code = (
        "import signal, train\n"
        "from eqldm.training.callbacks import SaveLast\n"
        "def told(self, trainer, *_, go_on=SaveLast.on_train_batch_end):\n"
        f"    self.told = signal.SIGUSR1 if trainer.global_step == {step} else None\n"
        "    go_on(self, trainer, *_)\n"
        "SaveLast.on_train_batch_end = told\n"
        "train.main()\n"
    )
    script = run.parent / f"{run.name}_stop.py"
    script.write_text(code)
    done = python(script, options, f"run.dir={run}", f"run.devices={processes}", *overrides)
    assert done.returncode == 75 and f"at step {step}, with a checkpoint" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
def test_a_process_alone_computes_the_same_under_zero(options, tmp_path):
    run, chosen = tmp_path / "zero", ["run.strategy=zero3", "data.micro_batch_size=2", "run.channels_last=true"]
    done = train(options, run, *chosen, processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    check_same(options, train_diffusion(load_config(options, [f"run.dir={tmp_path / 'plain'}", *chosen[1:]])).parent, run)


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ZERO)
def test_on_a_gpu_in_bfloat16(options, tmp_path, strategy):
    pytest.importorskip("deepspeed")
    chosen = ["run.accelerator=gpu", "run.precision=bf16-mixed", "data.micro_batch_size=2"]
    for name in ("auto", strategy):
        done = train(options, tmp_path / name, f"run.strategy={name}", *chosen, processes=1)
        assert done.returncode == 0, done.stderr[-3000:]
    assert logged(tmp_path / strategy, "val/loss") == pytest.approx(logged(tmp_path / "auto", "val/loss"), rel=0.02)
    start, after = weights(Path(load_config(options).model)), weights(tmp_path / strategy / "model")
    assert sum(not torch.equal(start[name], after[name]) for name in start) > len(start) / 2


@pytest.mark.parametrize(
    ("strategy", "accelerator"),
    [
        pytest.param("zero2", "cpu", marks=pytest.mark.slow),
        *(pytest.param(strategy, "gpu", marks=pytest.mark.gpu) for strategy in ZERO),
    ],
)
def test_one_device_trains_saves_resumes_and_exports(options, tmp_path, strategy, accelerator):
    """Stopped at step 2 and gone on with, against a run without ZeRO that was not stopped; and the checkpoint's own export."""
    pytest.importorskip("deepspeed")
    chosen = [f"run.accelerator={accelerator}", "data.micro_batch_size=2"]
    one, run, each = tmp_path / "one", tmp_path / strategy, [*chosen, f"run.strategy={strategy}", "run.checkpoint_every=1"]
    assert train(options, one, *chosen, processes=1).returncode == 0
    stop_at(options, run, 2, *each, processes=1)
    done = train(options, run, *each, processes=1)
    assert done.returncode == 0, done.stderr[-3000:]
    check_same(options, one, run)
    exported = python("-m", "eqldm.export", f"{run}@3", "--out", tmp_path / "exported")
    assert exported.returncode == 0, exported.stderr[-3000:]
    assert all(torch.equal(value, weights(tmp_path / "exported")[name]) for name, value in weights(run / "model").items())


def check_same(options: Path, one: Path, other: Path, least: float = 0.01) -> None:
    """Asserts that two runs have had the same validation losses and gradients, and exported the same average."""
    for name in ("val/loss", "train/grad_norm"):  # the training loss is logged of a micro-batch
        assert logged(other, name)[-1] == pytest.approx(logged(one, name)[-1], rel=1e-4), name
    start, a, b = weights(Path(load_config(options).model)), weights(one / "model"), weights(other / "model")
    moved = torch.cat([(a[name] - start[name]).flatten() for name in a]).norm()
    apart = torch.cat([(a[name] - b[name]).flatten() for name in a]).norm()
    assert moved > least and apart / moved < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ZERO)
def test_it_computes_what_one_process_does_and_resumes(options, tmp_path, strategy):
    """Two real processes under ZeRO, stopped and gone on with, against one without: losses, gradients' norms and the exported average."""
    one, run = tmp_path / "one", tmp_path / strategy
    chosen = [f"run.strategy={strategy}", "data.micro_batch_size=1"]  # two micro-batches a step
    assert train(options, one, processes=1).returncode == 0
    stop_at(options, run, 2, *chosen)
    assert (run / LAST).is_dir() and checkpoint_step(run / LAST) == 2
    os.replace(run / LAST, run / LAST.with_name(".last.ckpt.eqldm.old"))  # as if killed between the two renames
    alone = train(options, run, *chosen, processes=1)
    assert alone.returncode == 1 and "is of 2 processes, now there are 1" in alone.stderr
    done = train(options, run, *chosen)
    assert done.returncode == 0, done.stderr[-3000:]
    check_same(options, one, run)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize("trained", ["text encoder", "lora"])
def test_groups_of_weights_frozen_ones_and_an_export_that_was_missed(options, tmp_path, strategy, trained):
    """Several groups of parameters; weights that are frozen, and sharded all the same; a run that lacks its export alone."""
    more = {
        "text encoder": ["train_text_encoder=true", "boundary_steps=1"],
        "lora": ["adapt=lora", "lora.rank=2", "optimizer.clip_norm=1"],
    }[trained]
    run, one = tmp_path / "run", train_diffusion(load_config(options, [f"run.dir={tmp_path / 'one'}", *more])).parent
    chosen = [*more, f"run.strategy={strategy}", "run.checkpoint_every=1", "run.keep_every=2"]
    script = tmp_path / "sharded.py"  # stage 3 leaves small weights whole
    script.write_text(
        "import train, eqldm.training.trainer as t\n"
        "def sharded(*words, made=t.zero_config):\n"
        "    config = made(*words)\n"
        "    config['zero_optimization']['stage3_param_persistence_threshold'] = 0\n"
        "    return config\n"
        "t.zero_config = sharded\n"
        "train.main()\n"
    )
    for again in (False, True):
        done = python(script, options, f"run.dir={run}", "run.devices=2", *chosen)
        assert done.returncode == 0, done.stderr[-3000:]
        check_same(options, one, run, least=1e-4 if trained == "lora" else 0.01)
        if not again:  # as if killed in its export
            (run / "done.json").unlink()
            shutil.rmtree(run / "model")
    for kind in ("ema", "raw"):  # in one process, without the run's strategy
        for step in (2, 3):
            export_checkpoint(run, step, tmp_path / f"{kind}-{step}", kind)
    assert all(torch.equal(value, weights(tmp_path / "ema-3")[name]) for name, value in weights(run / "model").items())
    for other in ("ema-2", "raw-3", "raw-2"):
        assert not all(torch.equal(value, weights(tmp_path / other)[name]) for name, value in weights(run / "model").items())
    shard = run / step_checkpoint(2) / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(ValueError, match="step-000000002.ckpt' cannot be used: "):
        export_checkpoint(run, 2, tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ZERO)
def test_deepspeeds_own_consolidation_gives_the_exported_weights(options, tmp_path, strategy):
    """`zero_to_fp32`, which lies in each of its checkpoints, without our code; and a run with no step left exports the same again."""
    run, chosen = tmp_path / "run", [f"run.strategy={strategy}", "optimizer.ema_decay=0"]
    assert train(options, run, *chosen).returncode == 0
    checkpoint = run / LAST
    done = python(checkpoint / "zero_to_fp32.py", checkpoint, tmp_path / "whole", "--safe_serialization", "-t", "checkpoint")
    assert done.returncode == 0, done.stderr[-3000:]
    whole, exported = load_file(next((tmp_path / "whole").glob("*.safetensors"))), weights(run / "model")
    assert {name.removeprefix("unet.") for name in whole} == exported.keys()
    assert all(torch.equal(whole[f"unet.{name}"], exported[name]) for name in exported)
    (run / "done.json").unlink()
    (run / "model").rename(run / "first")
    done = train(options, run, *chosen)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(torch.equal(value, exported[name]) for name, value in weights(run / "model").items())


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(options, tmp_path):
    run, chosen = tmp_path / "run", ["run.strategy=zero2", "run.checkpoint_every=1"]
    stop_at(options, run, 1, *chosen)
    words = [sys.executable, "train.py", str(options), f"run.dir={run}", "run.devices=2", *chosen]
    limit = ["bash", "-c", f"ulimit -f 100; exec {' '.join(words)}"]  # KiB a file
    done = subprocess.run(limit, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode and "could not be written" in done.stderr + done.stdout, done.stderr[-3000:]
    assert checkpoint_step(run / LAST) == 1
    done = train(options, run, *chosen)
    assert done.returncode == 0, done.stderr[-3000:]
