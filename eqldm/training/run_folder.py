"""The run folder: what a run states about itself, and what it resumes from.

A run folder holds `config.yaml`, `inputs.json`, `command.txt`, `versions.json`, `precision.txt` (what it computes in), `git.txt` and
`git.diff` (where there is a repository),
`logs/` (CSV and TensorBoard), `checkpoints/last.ckpt` (a file; under ZeRO a folder), with run.keep_every earlier ones beside it
(`step-000002000.ckpt`), and, at the end, the exported model under `model/` and `done.json`.
The same command resumes: it finds `last.ckpt`, checks that options and inputs are the same, and goes on at its step; of a run that
is done it gives the model at once. One process at a time trains there (`.lock`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities import rank_zero_only

import eqldm
from eqldm.atomic import recover_folder, write_whole
from eqldm.config import StageConfig, to_yaml
from eqldm.data.remote import is_remote
from eqldm.data.shards import hash_file, holds_shards, read_manifest, write_json
from eqldm.lock import hold
from eqldm.model_card import model_card
from eqldm.model_folder import PARTS
from eqldm.paths import check_folder
from eqldm.text_files import OLD_VOCABULARY, header_without_prefix
from eqldm.training.checkpoints import LAST, checkpoint_step, newest_checkpoint
from eqldm.training.identity import ID, INPUTS, INPUTS_FILE, RESUMABLE, check_own, flat, free, new_id, read_options, read_record
from eqldm.training.metrics_log import TABLE, last_validation
from eqldm.weights import read_json

DONE = "done.json"
UNKNOWN = "unknown"  # on a card, where the file is gone or damaged that said it
FORMAT = 2  # to be raised by a change after which a run begun before must not go on: other buffers, losses or draws


def prepare_run(config: StageConfig) -> Path | None:
    """Write what a run folder states about the run; the checkpoint to resume from, or None for a fresh run.

    Raises ValueError where the folder holds a run with other options, one that is past run.num_steps, or a checkpoint that cannot be used;
    where the run's own model would replace one that it did not make; or where another process trains there.
    """
    folder = Path(config.run.dir)
    check_folder("run.dir", folder)
    _check_own_place(config)
    rank_zero_only(hold)(folder, f"run folder '{folder}' is being trained", "use another run.dir")
    for part in (folder / LAST.parent, folder / TABLE.parent):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(f"'{part}' is a file, where run.dir='{folder}' has a folder: move it away, or use another run.dir")
    recover_folder(folder / LAST)
    checkpoint = newest_checkpoint(folder)
    if checkpoint:
        _check_same_run(config)
        step = checkpoint_step(checkpoint)
        if checkpoint != folder / LAST:
            rank_zero_only(print)(f"run folder '{folder}' has no {LAST}: it goes on from the checkpoint kept at step {step}", flush=True)
        if step > config.run.num_steps:
            raise ValueError(
                f"run folder '{folder}' holds a run at step {step}, past run.num_steps={config.run.num_steps}: set at least "
                f"{step}, or use another run.dir"
            )
    elif (model := folder / "model").exists() and not (model.is_dir() and not any(model.iterdir())):
        raise ValueError(
            f"run folder '{folder}' holds '{model}' and no checkpoint to go on from: a run that begins there would replace it at its end. "
            "Use another run.dir, or move it away"
        )
    _describe_run(config, fresh=checkpoint is None)
    return checkpoint


def _check_own_place(config: StageConfig) -> None:
    """Raises ValueError, naming the option, where an input is what the run's model would replace, or has the run folder within it."""
    run = Path(config.run.dir).resolve()
    for name, source in _sources(config).items():
        there = Path(source).resolve()
        if is_remote(source) or name.startswith("data."):
            continue
        if there.is_relative_to(run / "model"):
            raise ValueError(f"{name}: '{source}' is where run.dir='{config.run.dir}' puts its own model, which would replace it: "
                             "use another run.dir")  # fmt: skip
        if run.is_relative_to(there):
            raise ValueError(
                f"run.dir: '{config.run.dir}' lies within {name}='{source}', whose contents it would change: use another run.dir"
            )


def finished_model(config: StageConfig) -> Path | None:
    """The model folder of a run that has taken all its steps and exported them; None where something is left to do.

    Raises ValueError where the folder holds a run with other options.
    """
    folder = Path(config.run.dir)
    if not (folder / DONE).exists() or not (folder / "model").is_dir():
        return None
    _check_same_run(config)
    if read_done(folder).get("num_steps") != config.run.num_steps:
        return None
    rank_zero_only(print)(f"run folder '{folder}' has taken all of its {config.run.num_steps} steps: nothing to do")
    return folder / "model"


def read_done(folder: Path) -> dict[str, Any]:
    """What a run folder notes of a run that is done; nothing where it is not, or the note is damaged, which is said."""
    if not (folder / DONE).exists():
        return {}
    try:
        return read_json(folder / DONE)
    except (ValueError, OSError) as error:
        print(f"note: '{folder / DONE}' is damaged ({error}): the run counts as one that is not done", file=sys.stderr)
        return {}


def finish_run(config: StageConfig, trainer: pl.Trainer) -> None:
    """Note in the run folder that the model there holds all of the run's steps, and what they were computed on."""
    if trainer.is_global_zero:
        done = {"num_steps": config.run.num_steps, "hardware": hardware(config, trainer.strategy.root_device)}
        write_json(Path(config.run.dir) / DONE, done)


def hardware(config: StageConfig, device: torch.device) -> str:
    """The devices of a run, for its card."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.processor() or platform.machine()})"
    return f"{config.run.num_nodes * config.run.devices} x {name}"


def run_card(config: StageConfig, folder: Path, about: str, step: int, on: str | None = None) -> str:
    """The card of the model that a run has trained for so many steps, with the metrics of its last validation until then.

    folder: of the run, wherever it lies now.  on: its `hardware`, None where that is not known any more.
    """
    run = config.run
    commit, changed = _note(folder, "git.txt"), (folder / "git.diff").exists() and _note(folder, "git.diff")
    try:
        known = ", ".join(f"{name} {version}" for name, version in read_json(folder / "versions.json").items())
    except (ValueError, OSError):
        known = UNKNOWN
    facts = {
        "data": f"`{config.data.train}`",
        "command": f"`{_note(folder, 'command.txt')}`",
        "commit of eqldm": commit + (" and changes that are not committed" if changed else ""),
        "training": f"{step} steps of {config.data.batch_size}, seed {run.seed}",
        **({"hardware": on} if on else {}),
        "versions": known,
    }
    return model_card(folder.name, about, facts, last_validation(folder, step), to_yaml(config), getattr(config, "model", None))


def _note(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(errors="replace").strip()
    except OSError:
        return UNKNOWN


@rank_zero_only
def _describe_run(config: StageConfig, fresh: bool) -> None:
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.yaml", lambda path: path.write_text(to_yaml(config)))  # other processes may be reading it
    if fresh:  # a resumed run has just been found to have the same inputs: large models take a while to read
        write_json(folder / INPUTS_FILE, {**input_digests(config), "settings": input_settings(config), "format": FORMAT, ID: new_id()})
    (folder / "command.txt").write_text(shlex.join([Path(sys.executable).name, *sys.argv]) + "\n")
    (folder / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n")
    _write_git_state(folder)


def _check_same_run(config: StageConfig) -> None:
    folder = Path(config.run.dir)
    for name in ("config.yaml", INPUTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"run folder '{folder}' holds checkpoints and no {name}: put it back, or use another run.dir")
    before, now = read_options(folder, type(config)()), OmegaConf.create(to_yaml(config))
    assert isinstance(now, DictConfig)
    if checkpoint := newest_checkpoint(folder):
        check_own(folder, checkpoint, flat(before))
    changed = _differences(before, now)
    if changed:
        may = ", ".join(name for name in RESUMABLE if name in flat(OmegaConf.structured(config)) and name not in (*INPUTS, "run.dir"))
        raise ValueError(
            f"run folder '{folder}' holds a run with other options: {'; '.join(changed)}. Use another run.dir{_from_its_weights(config)}, "
            f"or remove the folder to start anew. What may change is how a run goes and not what it computes: {may}; where its inputs "
            "lie; and with optimizer.schedule=constant a larger run.num_steps"
        )
    version = read_record(folder / INPUTS_FILE).get("format", 1)
    if version != FORMAT:
        raise ValueError(
            f"run folder '{folder}' was begun by another version of eqldm (format {version}, now {FORMAT}): go on with the commit in "
            f"its git.txt, or use another run.dir{_from_its_weights(config)}"
        )
    if other := changed_inputs(config, folder):
        raise ValueError(
            f"run folder '{folder}' holds a run on other inputs: the contents of {', '.join(other)} have changed. Use another "
            f"run.dir{_from_its_weights(config)}, or remove the folder to start anew"
        )


def _from_its_weights(config: StageConfig) -> str:
    """How a new run starts from the weights of the one in run.dir."""
    folder, newest = Path(config.run.dir), newest_checkpoint(Path(config.run.dir))
    if newest is None or config.stage == "judge":  # which starts from none
        return ""
    drop = ", ".join(name for name in ("architecture", "unet", "text_encoder", "scheduler") if getattr(config, name, None))
    without = f", without {drop}" if drop else ""  # which the model brings
    return f" (to start there from this run's weights: init=pretrained model={folder}@{checkpoint_step(newest)}{without})"


def changed_inputs(config: StageConfig, folder: Path) -> list[str]:
    """The names of the inputs whose contents are others than when the run in the folder began. Raises as `input_digests`."""
    before, now = read_record(folder / INPUTS_FILE), input_digests(config)
    settings, settings_now = before.pop("settings", None), input_settings(config)
    if settings is not None and not (isinstance(settings, dict) and all(isinstance(files, dict) for files in settings.values())):
        raise ValueError(f"run folder '{folder}': its {INPUTS_FILE} is damaged (settings): put it back from a copy of the folder")
    changed = [name for name in sorted((before.keys() | now.keys()) - {"format", ID}) if before.get(name) != now.get(name)]
    # runs of before noted a text encoder's file as it lies, whatever the prefix of its names
    changed = [name for name in changed if name not in now or before.get(name) != _digest(name, _sources(config)[name], as_it_lies=True)]
    for name in settings_now if settings is not None else ():  # runs of before did not note them
        old, new = _without_copies((settings or {}).get(name, {})), _without_copies(settings_now[name])
        if name not in changed:
            changed += [f"{name} ({file})" for file in sorted(old.keys() | new.keys()) if old.get(file) != new.get(file)]
    return changed


def _without_copies(settings: dict[str, str]) -> dict[str, str]:
    """The settings of a model without those that only old transformers read: `tokenizer.json` says the same."""
    copies = {f"tokenizer/{file}" for file in OLD_VOCABULARY} if "tokenizer/tokenizer.json" in settings else set()
    return {file: digest for file, digest in settings.items() if file not in copies}


def input_digests(config: StageConfig) -> dict[str, str]:
    """A digest of the contents of each shard folder and model that the run starts from, by option name.

    Raises FileNotFoundError where one is missing.
    """
    return {name: _digest(name, source) for name, source in _sources(config).items()}


def input_settings(config: StageConfig) -> dict[str, dict[str, str]]:
    """Digests of what the models that a run starts from state beside their weights (a scheduler's config, a tokenizer's vocabulary, a
    VAE's scale), by option and file. Not of names that begin with _, where libraries note their versions."""
    settings = {}
    for name, source in _sources(config).items():
        if not name.startswith("data."):
            parts = [Path(source) / part for part in (PARTS if name == "model" else ("vae",))]
            files = [path for part in parts for path in sorted(part.glob("*")) if path.suffix in (".json", ".txt")]
            files += [Path(source) / "config.json"] * (Path(source) / "config.json").is_file()  # of a VAE's own folder
            settings[name] = {path.relative_to(source).as_posix(): _settings_digest(path) for path in files}
    return settings


def _settings_digest(path: Path) -> str:
    content = path.read_bytes()
    if path.name.endswith("config.json"):
        stated = {name: value for name, value in read_json(path).items() if not name.startswith("_") or name == "_class_name"}
        content = json.dumps(stated, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def _sources(config: StageConfig) -> dict[str, str]:
    """The inputs of a run by option name."""
    options = flat(OmegaConf.structured(config))
    return {name: options[name] for name in INPUTS if options.get(name) and (name, options[name]) != ("vae", "pixels")}


def _digest(name: str, source: str, as_it_lies: bool = False) -> str:
    digest, folder = hashlib.sha256(), Path(source)
    if holds_shards(source):
        digest.update(json.dumps([entry["sha256"] for entry in read_manifest(source)["shards"]]).encode())
        return digest.hexdigest()[:16]
    weights = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
    if not weights:
        raise FileNotFoundError(f"{name}: '{folder}' holds neither shards (manifest.json) nor a model (.safetensors)")
    for path in weights:
        digest.update(path.relative_to(folder).as_posix().encode())
        skip = 0
        if path.parent.name == "text_encoder" and not as_it_lies:  # the same weights under names with a prefix and without
            header, skip = header_without_prefix(path)
            digest.update(header)
        hash_file(digest, path, skip)
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = ("torch", "pytorch-lightning", "diffusers", "transformers", "webdataset", "timm", "torchmetrics")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found, "eqldm": eqldm.__version__}  # which may run from a clone, not installed


def _differences(old: DictConfig, new: DictConfig) -> list[str]:
    before, after = flat(old), flat(new)
    names = [name for name in sorted(before.keys() | after.keys()) if name not in free(after)]
    return [f"{n} was {before.get(n)}, is {after.get(n)}" for n in names if before.get(n) != after.get(n)]


def _write_git_state(folder: Path) -> None:
    for name, arguments in {"git.txt": ["rev-parse", "HEAD"], "git.diff": ["diff", "HEAD"]}.items():
        if (found := _git(*arguments)) is not None:
            (folder / name).write_text(found)


def git_commit() -> str:
    """The commit of this code, and whether it was changed since; "unknown" where there is no repository."""
    commit, changed = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
    return "unknown" if commit is None else commit.strip() + (" and changes that are not committed" if changed else "")


def _git(*arguments: str) -> str | None:
    here = Path(__file__).resolve().parents[1]
    try:
        result = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=20)
    except FileNotFoundError:  # no git on this machine: an installed package has no commit to state
        return None
    return result.stdout if result.returncode == 0 else None
