"""The model of a run at one of its checkpoints, written `RUN@STEP`, or `RUN@last`: exported as the run's own end does.

What is not in a checkpoint (the frozen VAE, a tokenizer, the pictures that latents are normalised over) comes from the run's inputs, which
are known by their contents: one that has moved is found by its option (`inputs`), one that has changed is refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor

from eqldm.atomic import beside, lock_of, whole_folder
from eqldm.config import AutoencoderConfig, DiffusionConfig, JudgeConfig, StageConfig, load_config
from eqldm.lock import held
from eqldm.paths import check_folder
from eqldm.training.checkpoints import LAST, check_fits, check_numbers, find_checkpoint, kept_checkpoints, read_whole
from eqldm.training.identity import INPUTS, INPUTS_FILE, check_own, flat, read_options, run_id
from eqldm.training.run_folder import changed_inputs, read_done, run_card
from eqldm.training.zero import shard_weights
from eqldm.weights import read_json

Config = TypeVar("Config", bound=AutoencoderConfig | DiffusionConfig | JudgeConfig)
Weights = Literal["ema", "raw"]
STEP = re.compile(r"(.+)@(\d+|last)")
MADE_FROM = "checkpoint.json"  # in a folder of RUN/models: the checkpoint that it was exported from


def parse_run(model: str | Path) -> tuple[Path, int | None] | None:
    """The run folder and the step of `RUN@STEP`, `RUN@last` or `RUN`, the step of the last two None; None for what is no such thing.

    Raises ValueError where something else stands after a run folder's '@'.
    """
    named = None if Path(model).exists() else STEP.fullmatch(str(model))
    if named:
        return Path(named[1]), None if named[2] == "last" else int(named[2])
    folder, at, step = str(model).rpartition("@")
    if at and not Path(model).exists() and _is_run(Path(folder)):
        raise ValueError(f"'{model}': got '{step}' after the run's '@', wanted the number of a step, or last")
    return (Path(model), None) if _is_run(Path(model)) else None


def _is_run(folder: Path) -> bool:
    return (folder / LAST).exists() or bool(kept_checkpoints(folder))


def opened(model: str | Path) -> Path:
    """The folder of a model: of `RUN@STEP` one under RUN/models, exported now unless that is done; any other path as it is.

    Several processes may do so at once. Raises as `export_checkpoint`.
    """
    if Path(model).exists() or not (found := parse_run(model)):
        return Path(model)
    run, step = found
    if step is not None and step not in kept_checkpoints(run):  # the newest, perhaps, or one that was the newest when it was exported
        folder = _exported(run, step)
        if (made := _made_from(folder)) and made.get("run") == _id(run):
            return folder
    step, checkpoint = find_checkpoint(run, step)
    folder, stamp = _exported(run, step), {**_stamp(checkpoint), "run": _id(run)}
    if _made_from(folder) == stamp:
        return folder
    try:
        check_folder(f"model '{model}'", folder)
    except OSError as error:
        raise OSError(f"{error}, which is python -m eqldm.export '{model}' --out DIR") from error
    folder.parent.mkdir(exist_ok=True)
    with held(lock_of(folder), f"'{folder}' is being exported", wait=True):
        if _made_from(folder) == stamp:  # by another process, in the meantime
            return folder
        with whole_folder(folder) as partial:
            export_checkpoint(run, step, partial)
            (partial / MADE_FROM).write_text(json.dumps(stamp) + "\n")
    kind = "average of its weights," if run_options(run).optimizer.ema_decay else "trained weights, for the run keeps no average,"
    print(f"'{model}': the {kind} exported to '{folder}'", file=sys.stderr, flush=True)
    return folder


def _exported(run: Path, step: int) -> Path:
    return run / "models" / f"step-{step:09d}"


def _made_from(folder: Path) -> dict | None:
    """The stamp of the checkpoint that a folder of RUN/models was exported from; None where it does not say, and so is made anew."""
    try:
        return read_json(folder / MADE_FROM)
    except (ValueError, OSError):
        return None


def _id(run: Path) -> str | None:
    """Of the run that is in a folder: another may have been there before. None for one of before that has none."""
    return run_id(run) if (run / INPUTS_FILE).is_file() else None


def _stamp(checkpoint: Path) -> dict[str, int]:
    file = checkpoint / "about.json" if checkpoint.is_dir() else checkpoint
    return {"bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns}


def with_models(config: Config) -> Config:
    """The options, where they name models as `RUN@STEP` with their folders in place. Raises as `opened`."""
    for part, name in ((config, "model"), (config, "vae"), (getattr(config, "fold", None), "align_to")):
        model = getattr(part, name, None)
        if model and "@" in model and not Path(model).exists():
            setattr(part, name, str(opened(model)))
    return config


def export_checkpoint(run: Path, step: int | None, out: Path, weights: Weights | None = None, inputs: Sequence[str] = ()) -> int:
    """Writes the model of a run at a step, None for the newest, to `out`; low-rank updates by themselves to its lora/. Returns the step.

    weights: the average or the trained ones; None for what the run's end exports, the average where there is one.
    inputs: `option=path` of those that have moved.
    Raises: FileNotFoundError where there is no run, no such step (it says which there are) or no input; ValueError where an input has
    changed, the run keeps no average, or the checkpoint is none or does not fit; OSError.
    """
    config = _run_config(run, inputs)
    step, checkpoint = find_checkpoint(run, step)
    check_own(run, checkpoint, flat(read_options(run, type(config)())))
    found = checkpoint_weights(config, checkpoint, weights)
    about = " The weights that were trained, not their average." if weights == "raw" and config.optimizer.ema_decay else ""
    card = partial(run_card, config, run, step=step, on=read_done(run).get("hardware"))
    if config.stage == "autoencoder":
        from eqldm.autoencoder.module import ABOUT, export_autoencoder, prepare_autoencoder

        module, data = prepare_autoencoder(config)
        _load(module, checkpoint, found)
        device = torch.device("cuda" if config.run.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
        export_autoencoder(module, data, device, out, card(ABOUT + about))
    elif config.stage == "diffusion":
        from eqldm.diffusion.module import about as trained_on
        from eqldm.diffusion.module import prepare_diffusion

        module, data = prepare_diffusion(config)
        _load(module, checkpoint, found)
        with beside(out) as lora:  # none that a killed export left there
            module.export(out, card(trained_on(config) + about), lora)
            if lora.exists():
                lora.rename(out / "lora")
    else:
        from eqldm.evaluation.judge_training import export_judge, prepare_judge

        module, data = prepare_judge(config)
        _load(module, checkpoint, found)
        export_judge(module, data, out)
    return step


def run_options(run: Path, inputs: Sequence[str] = ()) -> StageConfig:
    """The options of a run, with those of its inputs that have moved, `option=path`. Raises FileNotFoundError, ValueError."""
    if other := [item for item in inputs if item.partition("=")[0] not in INPUTS]:
        raise ValueError(
            f"got '{other[0]}': what may be named anew are a run's inputs that have moved, {', '.join(INPUTS)}, as option=path"
        )
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"'{run}' is no run folder: it holds no config.yaml")
    return load_config(run / "config.yaml", list(inputs))


def _run_config(run: Path, inputs: Sequence[str]) -> StageConfig:
    config = run_options(run, inputs)
    try:
        changed = changed_inputs(config, run)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. It is an input of the run '{run}', as seen from where that was started: go there, or say where it lies (option=path)"
        ) from error
    if changed:
        raise ValueError(f"the contents of {', '.join(changed)} are others than when the run '{run}' began: give those, as option=path")
    return config


def checkpoint_weights(config: StageConfig, checkpoint: Path, weights: Weights | None) -> dict[str, Tensor]:
    """The weights of a checkpoint by name, on the CPU; None for the average where there is one.

    Raises ValueError for the average of a run without, or where the checkpoint cannot be used.
    """
    averaged = bool(config.optimizer.ema_decay)
    if weights == "ema" and not averaged:
        raise ValueError("the run keeps no average of its weights (optimizer.ema_decay=0): export the trained ones, raw")
    average = averaged and weights != "raw"
    if checkpoint.is_dir():
        found = shard_weights(checkpoint, average)
    else:
        whole = read_whole(checkpoint, check=True)
        if averaged and "current_model_state" not in whole:
            raise ValueError(f"checkpoint '{checkpoint}' holds no average of its weights, which the run keeps: it is of another run")
        found = whole["current_model_state"] if averaged and not average else whole["state_dict"]
    check_numbers(checkpoint, found)
    return found


def _load(module: torch.nn.Module, checkpoint: Path, found: dict[str, Tensor]) -> None:
    if checkpoint.is_file():
        check_fits(checkpoint, module)
    module.load_state_dict(found)
