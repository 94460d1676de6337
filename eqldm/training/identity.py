"""Which run a checkpoint, a config.yaml and a folder are of: what is of another is refused, and what is damaged is named.

A run gets its id when it begins, in its folder's `inputs.json`; each checkpoint bears the id, and the options that must stay. A folder that
is copied or moved stays the run that it was.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eqldm.config import StageConfig, to_yaml
from eqldm.training.checkpoints import read_about, read_whole
from eqldm.weights import read_json

# May differ between the start of a run and its resumption: where and how long it runs, not what it computes. Inputs may
# have moved: they are known by their contents (see `input_digests`).
INPUTS = ("data.train", "data.val", "model", "vae", "fold.align_to")
RESUMABLE = ("run.devices", "run.num_nodes", "run.accelerator", "run.timeout_seconds", "run.log_every",
             "run.val_every", "run.checkpoint_every",
             "run.keep_every", "run.compile", "run.dir", "data.num_workers", "data.micro_batch_size", "gradient_checkpointing",
             "sample_prompts", *INPUTS)  # fmt: skip
INPUTS_FILE = "inputs.json"
ID = "run"  # in inputs.json and in checkpoints


def new_id() -> str:
    """The id of a run that begins."""
    return secrets.token_hex(8)


def read_record(path: Path) -> dict[str, Any]:
    """One of the JSON files in which a run folder states what the run is. Raises ValueError, with what to do, for one that is damaged."""
    try:
        return read_json(path, way_out="")
    except (ValueError, OSError) as error:
        raise ValueError(
            f"run folder '{path.parent}': its {path.name} cannot be used ({error}). Put it back from a copy of the folder, or use another "
            "run.dir"
        ) from error


def run_id(folder: Path) -> str | None:
    """The id of the run in a folder; None of one that began before runs had any. Raises as `read_record`."""
    return read_record(folder / INPUTS_FILE).get(ID)


def stamp(folder: Path, config: StageConfig) -> dict[str, Any]:
    """What a checkpoint says of the run that it is of."""
    options = OmegaConf.create(to_yaml(config))
    assert isinstance(options, DictConfig)
    return {"id": run_id(folder), "options": {name: value for name, value in flat(options).items() if name not in free(flat(options))}}


def check_own(folder: Path, checkpoint: Path, options: dict[str, Any]) -> None:
    """Raises ValueError where a checkpoint is of another run than the folder that it lies in, or the folder's options, flat, are other than
    when it was written."""
    found = (read_about(checkpoint) if checkpoint.is_dir() else read_whole(checkpoint)).get(ID) or {"id": None, "options": {}}
    if not isinstance(found, dict) or not isinstance(found.get("options"), dict):
        raise ValueError(f"checkpoint '{checkpoint}' is not one of a run: it does not say which. Give another")
    if found.get("id") != (mine := run_id(folder)):
        raise ValueError(
            f"checkpoint '{checkpoint}' is of another run (id {found.get('id')}) than its folder (id {mine} in {INPUTS_FILE}): put back "
            "its own; or, to start from its weights, leave it where it was made and give a new run init=pretrained model=RUN@STEP"
        )
    changed = [f"{name} was {value}, is {options[name]}" for name, value in found["options"].items() if options.get(name, value) != value]
    if changed:
        raise ValueError(
            f"'{folder / 'config.yaml'}' has changed, or was cut, since '{checkpoint}' was written: {'; '.join(changed)}. Put it back: "
            "train.py CONFIG key=value ... dry_run=true prints it"
        )


def read_options(folder: Path, defaults: StageConfig) -> DictConfig:
    """The options in a run folder's config.yaml; those that are younger than the run had their defaults' effect.

    Raises ValueError, with what to do, where it is damaged.
    """
    path = folder / "config.yaml"
    try:
        found = OmegaConf.load(path)
        if not isinstance(found, DictConfig) or "stage" not in found:
            raise ValueError("it states no stage")
        merged = OmegaConf.merge(OmegaConf.create(to_yaml(defaults)), found)
        assert isinstance(merged, DictConfig)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError) as error:
        about = " ".join(str(error).split())
        raise ValueError(
            f"run folder '{folder}': its config.yaml is cut or damaged ({about}). Put it back: train.py CONFIG key=value ... dry_run=true "
            "prints it; or use another run.dir"
        ) from error
    return merged


def free(options: dict[str, Any]) -> tuple[str, ...]:
    """The names of the options, of these flat ones, that may change when a run goes on."""
    # More steps are the same run with more to do, but not where the learning rate falls towards the last one
    return (*RESUMABLE, *(["run.num_steps"] if options["optimizer.schedule"] == "constant" else []))


def flat(options: DictConfig) -> dict[str, Any]:
    """The options by dotted names."""
    tree = OmegaConf.to_container(options)
    assert isinstance(tree, dict)  # which options by name become
    return _flat_dict(tree)


def _flat_dict(tree: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat_dict(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
