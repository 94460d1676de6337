"""Train a stage: python train.py CONFIG [key=value ...] [dry_run=true]

CONFIG is a YAML file of configs/. Overrides are dotted: run.dir=runs/vae optimizer.learning_rate=1e-4. The same command
resumes a stopped run. dry_run=true prints the resolved options, and as comments what the run will need, and stops.

Ctrl-C ends a run after the step at hand, with a checkpoint and exit status 130; a second one ends it at once. SIGTERM and SIGUSR1 do as the
first, with exit status 75.
"""

from __future__ import annotations

import logging
import sys

import yaml

from eqldm.command import Parser, error_line
from eqldm.config import load_config, to_yaml
from eqldm.kinds import check_given_once
from eqldm.paths import place_option
from eqldm.training.stopping import ignore, listen
from eqldm.unused import without_effect


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", type=place_option, help="YAML file that states its stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    args = parser.parse_args()
    for name in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):  # device lists and advertising
        logging.getLogger(f"pytorch_lightning.{name}").setLevel(logging.WARNING)
    try:
        check_given_once(args.overrides)
        dry_run = [_boolean(item) for item in args.overrides if item.startswith("dry_run=")]
        config = load_config(args.config, [item for item in args.overrides if not item.startswith("dry_run=")])
        if dry_run and dry_run[-1]:
            print(to_yaml(config), end="")
            print("".join(f"# {line}\n" for line in [*without_effect(config), *_needs(config)]), end="")
            return
        folder = _train(config)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(error_line(error))
    from pytorch_lightning.utilities import rank_zero_only

    rank_zero_only(print)(f"done: {folder}")


def _boolean(item: str) -> bool:
    """The value of `name=value`, in any of YAML's forms. Raises ValueError for what is no boolean."""
    name, _, text = item.partition("=")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, bool):
        raise ValueError(f"{name}: got {text!r}, wanted true or false")
    return value


def _needs(config) -> list[str]:
    """What the run will need, or why that cannot be told yet. Raises ValueError for options that do not fit."""
    if config.stage == "judge":
        import torch

        from eqldm.evaluation.judge import make_network

        with torch.device("meta"):
            make_network(config.architecture, dict(config.architecture_args))
        return []
    from eqldm.budget import budget, report
    from eqldm.run_model import with_models

    try:
        config = with_models(config)
        return report(config, budget(config))
    except FileNotFoundError as error:  # of an input, which another stage may be making
        return [f"what it will need cannot be told yet: {error}"]


def _train(config):
    """Run the config's stage. The stages are imported here, so that --help and errors in options answer at once."""
    from pytorch_lightning.utilities import rank_zero_only

    for line in without_effect(config):
        rank_zero_only(print)(f"note: {line}", file=sys.stderr)
    if config.stage == "judge":
        from eqldm.evaluation.judge_training import train_judge

        return train_judge(config)
    import torch

    from eqldm.run_model import with_models

    config, callbacks = with_models(config), []
    if config.run.accelerator != "cpu" and torch.cuda.is_available():
        from eqldm.budget import operations
        from eqldm.training.speed import Utilisation

        try:
            callbacks.append(Utilisation(operations(config)))
        except (RuntimeError, NotImplementedError, ValueError, OSError) as error:  # of a network that fake tensors cannot follow
            print(f"train/mfu is not logged, for a step's operations cannot be counted: {error}", file=sys.stderr)
    if config.stage == "autoencoder":
        from eqldm.autoencoder.module import train_autoencoder

        return train_autoencoder(config, callbacks)
    from eqldm.anagram.preview import SampleGrid
    from eqldm.diffusion.module import train_diffusion
    from eqldm.evaluation.monitor import LetterMonitor

    return train_diffusion(config, [*callbacks, SampleGrid(), *([LetterMonitor(config)] if config.val_letters else [])])


if __name__ == "__main__":
    listen("before the first step: nothing is lost, the same command starts the run or goes on with it")
    main()
    ignore()
