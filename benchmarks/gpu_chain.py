"""What the part *learn* of benchmarks/gpu.py does with two configs: an autoencoder, then a UNet on its latents, in the time that there is.

One process does all of it, for a start of one costs what hundreds of steps do. The clock decides how many steps a stage takes: it ends
when its time is up, and its learning rate goes down with the time. The UNet encodes its pictures as it goes, which on a GPU costs less than
encoding all of them before. What a stage has learnt is laid into OUT before the next one begins.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from PIL import Image

from eqldm.anagram.render import picture_sheet
from eqldm.anagram.sampling import Sampler
from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import AutoencoderConfig, DiffusionConfig, load_config, to_yaml
from eqldm.data.making import num_cores
from eqldm.data.samples import PictureSamples
from eqldm.data.shards import holds_shards
from eqldm.diffusion.module import train_diffusion
from eqldm.export import export
from eqldm.model_folder import decode, encode, load_vae
from eqldm.training.metrics_log import last_validation
from eqldm.views import IDENTITY, parse_view
from gpu_learn import finish, rates, write_pieces
from gpu_parts import DONE, FAILED, FAULTS, Time, broke_the_device, note
from steps import last, shards

FIRST_SHARE = 0.33  # of the trainings' time: the autoencoder's
END_SECONDS = {"autoencoder": 7.0, "diffusion": 9.0}  # of a training: the step at hand, the validation, the model
HOME_SECONDS = 25.0  # for the pieces and the pictures to look at
HELD = 0.3  # share of a training at the peak of its learning rate; then down to 1 %
ENDLESS = 10**7  # steps
VALIDATION = 512  # pictures
READER_BYTES = 60_000_000  # of shared memory: of a reader, three batches of some hundred small pictures
ROW, ROWS, EACH = 8, 8, 4  # of the sheet: pictures a row, rows of one prompt each, pictures of each pair
STAGES = {"autoencoder": train_autoencoder, "diffusion": train_diffusion}


class Timed(pl.Callback):
    """Ends a training when its time is up, with a validation, and takes the learning rate down with the time."""

    def __init__(self, limit: Time):
        self.limit, self.seconds, self.begun = limit, 0.0, limit.now()

    def on_train_start(self, trainer, pl_module) -> None:
        self.begun, self.seconds = self.limit.now(), max(1e-3, self.limit.left())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        factor = rate_factor((self.limit.now() - self.begun) / self.seconds)
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:  # whose rate the schedule has just set: the warm-up's, then the peak
                group["lr"] = min(group["lr"], factor * group["initial_lr"])
        trainer.should_stop = trainer.should_stop or self.limit.left() <= 0

    def on_train_end(self, trainer, pl_module) -> None:
        pl_module.config.run.num_steps = trainer.global_step  # for the model's card


def rate_factor(share: float) -> float:
    """The learning rate over its peak when this share of the time is over."""
    return 0.01 + 0.99 * min(1.0, max(0.0, (1 - share) / (1 - HELD)))


@dataclass
class Learnt:
    """What is there to be brought home: the newest model, and the files beside it, by their names in the tar."""

    args: argparse.Namespace
    model: Path | None = None
    beside: dict[str, Path] = field(default_factory=dict)

    def add(self, stage: str, run: Path, model: Path) -> list[str]:
        """Writes the pieces anew, with the model of a further stage in float16, and the log and the options of its run."""
        self.model = export(model, self.args.scratch / "learnt" / stage, torch.float16)
        self.beside |= {
            f"{stage}/{name}": path for name, path in (("metrics.csv", run / "logs/metrics.csv"), ("config.yaml", run / "config.yaml"))
        }
        return [path.name for path in write_pieces({"model": self.model, **self.beside}, self.args.out)]


def learn_both(args: argparse.Namespace, limit: Time) -> dict[str, Any]:
    """Trains both, and brings home what there is. Raises as the trainings where the first one fails, or the second leaves no checkpoint."""
    torch.backends.cudnn.benchmark = True
    data = args.shards if holds_shards(args.shards / "train") else make_pictures(args, limit)
    learnt, steps, rate, pieces = Learnt(args), 0, 0.0, []
    for config_path, share in ((args.config, FIRST_SHARE), (args.then, 1.0)):  # of what is left
        stage, end = load_config(config_path).stage, limit.at_most(share * (limit.left() - HOME_SECONDS))
        run, begun = args.scratch / stage, time.monotonic()
        more = [f"vae={learnt.model}"] if learnt.model else []
        try:
            model, found = train(config_path, options(args, stage, run, data, *more), end)
        except FAULTS as error:
            note(args.out, "stage", stage, FAILED, seconds=time.monotonic() - begun, why=f"{type(error).__name__}: {error}"[:300])
            if learnt.model is None or broke_the_device(error):
                raise
            model, found = args.scratch / "rescued", {"steps": 0, "samples_per_second": 0.0}
            finish(["-m", "eqldm.export", run, "--out", model], limit)  # of its last checkpoint
        else:
            note(args.out, "stage", stage, DONE, seconds=time.monotonic() - begun, **found)
        pieces = learnt.add(stage, run, model)
        steps, rate = steps + found["steps"], found["samples_per_second"]
    assert learnt.model is not None
    draw(learnt.model, load_config(args.then), data / "val", args).save(args.out / "samples.png")
    return {"planned_steps": steps, "stopped": True, "samples_per_second": rate, "pieces": pieces}


def make_pictures(args: argparse.Namespace, limit: Time) -> Path:
    """Shards `train` and `val` of the packages of drawings in args.shards."""
    out, begun = args.scratch / "pictures", time.monotonic()
    sizes = [
        "--num-train",
        args.num_pictures,
        "--num-val",
        VALIDATION,
        "--shard-size",
        min(1000, args.num_pictures),
        "--workers",
        num_cores(),
    ]
    finish(["data/icons.py", "--packages", args.shards, "--out", out, "--split", "train", "val", *sizes], limit)
    note(args.out, "stage", "pictures", DONE, seconds=time.monotonic() - begun, pictures=args.num_pictures)
    return out


def options(args: argparse.Namespace, stage: str, run: Path, data: Path, *more: str) -> list[str]:
    """Of a stage's training: where its data lies, and no end that comes before the time's. Those of --set may begin with a stage's name and
    a colon, and are then that stage's alone."""
    device = "gpu" if args.device == "cuda" else "cpu"
    readers = max(1, min(num_cores() - 4, shutil.disk_usage("/dev/shm").free // READER_BYTES))
    steps = [f"run.num_steps={ENDLESS}", f"run.val_every={ENDLESS}", "run.checkpoint_every=1000", "run.log_every=50"]
    given = [item for item in args.set if ":" not in item.partition("=")[0]]
    given += [item.removeprefix(f"{stage}:") for item in args.set if item.startswith(f"{stage}:")]
    return last([f"run.dir={run}", *shards(data), f"run.accelerator={device}", f"data.num_workers={readers}", *steps, *more, *given])


def train(config_path: Path, overrides: Sequence[str], limit: Time) -> tuple[Path, dict[str, Any]]:
    """Trains a config until the time is up: its model, and what is known of it. Raises as the trainings."""
    config, begun = load_config(config_path, overrides), time.monotonic()
    assert isinstance(config, AutoencoderConfig | DiffusionConfig)
    timed = Timed(limit.at_most(limit.left() - END_SECONDS[config.stage]))
    model = STAGES[config.stage](config, [timed])  # type: ignore[operator]
    run, steps = Path(config.run.dir), config.run.num_steps
    (run / "config.yaml").write_text(to_yaml(config))  # with the steps that were taken
    rate = statistics.median(rates(run) or [0.0])
    found = {"steps": steps, "samples": steps * config.data.batch_size, "samples_per_second": rate, "training": timed.seconds}
    return model, {**found, "starting": timed.begun - begun, **last_validation(run, steps + 1)}


@torch.no_grad()
def draw(model: Path, config: Any, pictures: Path, args: argparse.Namespace) -> Image.Image:
    """A sheet: pictures of the validation set, and through the autoencoder; pictures of that set's captions; anagrams under half a turn of
    each two prompts of the config's, upright and turned."""
    samples, views = PictureSamples(pictures, need_captions=True), [IDENTITY, parse_view("rotate_180")]
    rows_wanted, each, steps = (ROWS, EACH, 30) if args.device == "cuda" else (1, 1, 4)
    sampler = Sampler.open(model, args.device, "auto")
    x = torch.stack([samples[number]["x"] for number in range(ROW)]).to(args.device)
    vae = load_vae(model).to(args.device)
    rows, labels = [x.cpu(), decode(vae, encode(vae, x)).float().clamp(-1, 1).cpu()], ["pictures", "through the autoencoder"]
    captions = [samples[number]["caption"].partition(" on ")[0] for number in range(ROW * rows_wanted)]
    drawn = sampler([captions], [IDENTITY], range(len(captions)), num_inference_steps=steps)
    for first in range(0, len(captions), ROW):
        rows.append(drawn[first : first + ROW])
        labels.append(", ".join(captions[first : first + ROW]))
    for pair in zip(config.sample_prompts[::2], config.sample_prompts[1::2]):
        upright = sampler(pair, views, range(each), num_inference_steps=steps)
        rows.append(torch.cat([upright, views[1](upright)]))
        labels.append(" / ".join(pair))
    return picture_sheet(rows, labels, [""] * ROW, 2)
