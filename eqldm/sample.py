"""A sampling job, what `python sample.py` does: options in, a folder of pictures with everything needed to make them again out."""

from __future__ import annotations

import argparse
import json
import math
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

import eqldm
from eqldm.anagram.animation import check_writable, write_animation
from eqldm.anagram.gallery import Shown
from eqldm.anagram.options import Options
from eqldm.anagram.recipes import Anagram, Composition, Recipe, recipe_sheet
from eqldm.anagram.sampling import Sampler, styled
from eqldm.atomic import write_whole
from eqldm.data.samples import tensor_to_picture
from eqldm.evaluation.clip import Clip, alignment
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.lock import LOCK, held
from eqldm.model_folder import PRETRAINED, vae_hash, weights_hash
from eqldm.run_model import opened

DEFAULT = "glyphs-eq"
"""The shipped model that samples where none is given."""
SWITCHES = ("force", "attention_slicing", "tiled", "offload")  # of the command, beside `Options`
FLAGS = ("symmetrise", *SWITCHES)  # that take no value
DEFAULTS = {  # of the command, in the order in which it is written down
    **{name: field.default for name, field in Options.__dataclass_fields__.items()},
    **dict.fromkeys(("device", "precision")), **dict.fromkeys(FLAGS, False),
}  # fmt: skip


def sample_to_folder(args: argparse.Namespace) -> Path:
    """Samples as `sample.py` asks for it; writes `SEED.png` and `SEED.json`, `sheet.png`, animations, and the page `index.html`, whose path
    is returned.

    Raises: ValueError for options that do not fit each other or the model; FileNotFoundError for a folder that is no model;
    OSError where `--out` cannot be written.
    """
    check_seeds(args.seed, args.num_samples)
    options = options_of(args)
    options.check(len(args.prompts))  # before the model is opened, which takes time
    for kind in args.animate:
        check_writable(kind)
    model = str(opened(args.model) if args.model else PRETRAINED / DEFAULT)
    sampler = Sampler.open(model, args.device, args.precision)
    sampler.save_memory(args.attention_slicing, args.tiled, args.offload)
    recipe = recipe_of(args, sampler, options)
    for view in sorted({view for view in args.views if args.views.count(view) > 1}):
        print(f"note: {view} is there twice: the picture is to read as all of its prompts in one view", file=sys.stderr)
    chooser = Chooser(args) if args.keep else None
    settings = record(model, recipe, hashes(sampler), {name: getattr(args, name) for name in SWITCHES})
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder '{out}' cannot be made ({error.strerror}): give another --out") from error
    with held(out / LOCK, f"'{out}' is being filled", "give another --out"):
        return _sample(args, sampler, recipe, chooser, settings, options, out)


def _sample(
    args: argparse.Namespace, sampler: Sampler, recipe: Recipe, chooser: Chooser | None, settings: dict, options: Options, out: Path
) -> Path:
    check_folder(out, settings, range(args.seed, args.seed + args.num_samples), choosing=chooser is not None)
    start = time.perf_counter()
    pictures: dict[int, Tensor] = {}
    batch_of: dict[int, list[int]] = {}
    scores: dict[int, float] = {}
    seeds = list(range(args.seed, args.seed + args.num_samples))
    batches = [seeds[i : i + args.batch_size] for i in range(0, len(seeds), args.batch_size)]
    with Progress(transient=True) as progress:
        task = progress.add_task("sampling", total=len(batches) * sampler.num_calls(options))
        for batch in batches:
            made = recipe.sample(batch, lambda: progress.advance(task))
            pictures |= dict(zip(batch, made))
            batch_of |= dict.fromkeys(batch, batch)
            if chooser:  # the best so far are on the disk at any time
                scores |= dict(zip(batch, found := chooser(recipe.faces(made)).tolist()))
                if not all(map(math.isfinite, found)):
                    raise ValueError(f"--keep: of the seeds {batch[0]} to {batch[-1]} some score is {found}: none can be chosen")
                best = sorted(scores, key=scores.__getitem__, reverse=True)[: args.keep]
                for seed in pictures.keys() - set(best):
                    del pictures[seed]
                    for ending in ("png", "json"):
                        (out / f"{seed}.{ending}").unlink(missing_ok=True)
                _write_json(out / "scores.json", scores)
            for seed in pictures.keys() & set(batch):
                score = {"score": scores[seed]} if chooser else {}
                write_picture(out, pictures[seed], {**settings, "seed": seed, **score, "command": command(settings, batch)})
    seconds = (time.perf_counter() - start) / len(seeds)
    if chooser:
        seeds = sorted(pictures, key=scores.__getitem__, reverse=True)
    kept = torch.stack([pictures[seed] for seed in seeds])
    write_whole(out / "sheet.png", lambda path: recipe_sheet(recipe, kept, seeds).save(path, "png"))
    with Progress(transient=True) as progress:
        for seed, x in zip(seeds, progress.track(kept, description="animating") if args.animate else ()):
            frames = list(recipe.animate(x))
            for ending in args.animate:
                write_whole(out / f"{seed}.{ending}", partial(write_animation, frames, kind=ending))
    shown = [Shown(x, _called(seed, scores), command(settings, batch_of[seed])) for seed, x in zip(seeds, kept)]
    write_whole(page := out / "index.html", partial(recipe.write_gallery, shown=shown))
    print(f"{len(batch_of)} pictures, {seconds:.2f} s a picture" + (f", the best {len(seeds)} kept" if chooser else ""))
    return page


def check_seeds(first: int, count: int) -> None:
    """Raises ValueError where a generator does not take these seeds."""
    if not 0 <= first <= 2**63 - 1 - count:
        raise ValueError(f"--seed {first}: wanted 0 to 2^63, less the number of samples")


def options_of(args: argparse.Namespace) -> Options:
    """Those of the command: one number or text in place of a list of one."""
    options = {name: getattr(args, name) for name in Options.__dataclass_fields__}
    single = {name: options[name][0] for name in ("guidance_scale", "negative_prompt") if len(options[name]) == 1}
    return Options(**{**options, **single, "travel_band": tuple(options["travel_band"])})


def recipe_of(args: argparse.Namespace, sampler: Sampler, options: Options) -> Recipe:
    """What the command asks for. Raises ValueError where it does not fit together, or the model; FileNotFoundError."""
    if args.components:
        if args.force:
            raise ValueError("--force is for the view negate: it means nothing with --components")
        return Composition(sampler, args.prompts, args.components, options, args.reference, args.hold)
    if args.reference or args.hold:
        raise ValueError("--reference and --hold mean something with --components alone")
    return Anagram(sampler, args.prompts, args.views, options, args.force)


def hashes(sampler: Sampler) -> dict[str, str]:
    """Of the weights that sample."""
    return {"vae_hash": vae_hash(sampler.vae), "unet_hash": weights_hash(sampler.networks.unet)}


def record(model: str, recipe: Recipe, hashes: Mapping[str, str], switches: Mapping[str, bool]) -> dict:
    """All that pictures of a recipe are made with, but for seed and batch. model: its folder.  switches: `SWITCHES`.

    Raises ValueError for texts that no command could give again."""
    sampler, o = recipe.sampler, recipe.options
    for text in (*recipe.prompts, o.style, *([o.negative_prompt] if isinstance(o.negative_prompt, str) else o.negative_prompt)):
        if text.startswith("-") and " " not in text:
            raise ValueError(f"prompt '{text}' looks like an option of the command: let it begin with something else than '-'")
    return {
        "model": model,
        **hashes,
        "prompts": recipe.prompts,
        **recipe.settings,
        **vars(o),
        "scheduler": o.scheduler or type(sampler.networks.scheduler).__name__,
        "device": str(sampler.device),
        "precision": sampler.precision,
        **switches,
        "versions": {"eqldm": eqldm.__version__, "torch": torch.__version__},
    }


class Chooser:
    """Scores pictures: [B], by the view, or part, that shows its prompt worst.

    Letters ("the letter A") by the probability that the judge gives them; other prompts by their CLIP similarity.
    Raises ValueError where there is no CLIP for prompts that are no letters, FileNotFoundError.
    """

    def __init__(self, args: argparse.Namespace):
        self.prompts = [styled(prompt, args.style) for prompt in args.prompts]
        found = [re.fullmatch(r"(?:(?:the|a) )?letter ([a-z])", prompt, re.IGNORECASE) for prompt in args.prompts]
        self.labels = [LETTERS.index(letter[1].upper()) for letter in found if letter]
        self.clip: Clip | None = None
        if args.keep > args.num_samples:
            raise ValueError(f"--keep {args.keep}: only {args.num_samples} are sampled (--num-samples)")
        if args.clip:
            self.clip = Clip(args.clip, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        elif len(self.labels) == len(found):
            self.judge = Judge.open()
        else:
            raise ValueError("--keep: the shipped judge reads letters alone; for other prompts give --clip FOLDER, a CLIP of transformers")

    def __call__(self, faces: Sequence[Tensor]) -> Tensor:
        """faces: for each prompt, the pictures as its view, or part, shows them."""
        if self.clip:
            seen = torch.stack([self.clip.pictures(x) for x in faces], 1)
            return alignment(seen @ self.clip.texts(self.prompts).T)
        return self.judge.worst_view(faces, self.labels)


def check_folder(out: Path, settings: dict, seeds: range, choosing: bool = False) -> None:
    """Raises ValueError where the folder holds pictures made otherwise, which would lie beside the new ones as if they were of one run,
    (choosing) pictures that were not chosen, which a choice would take away, or files of others, which these seeds' would replace."""
    wanted, ours = json.loads(json.dumps(settings)), False
    for path in out.glob("*.json"):
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"'{path}' is damaged ({error}): remove it, or give another --out") from error
        if not isinstance(found, dict) or "prompts" not in found:  # none of ours
            scores = path.name == "scores.json" and isinstance(found, dict) and all(map(str.isdigit, found))
            if path.stem.isdigit() or (path.name == "scores.json" and not scores):
                raise ValueError(f"'{path}' was not written by this command, which would replace it: give another --out")
            continue
        ours = True
        if changed := ", ".join(name for name, value in wanted.items() if found.get(name) != value):
            raise ValueError(f"'{out}' holds pictures made with another {changed}: give another --out")
        if choosing and "score" not in found:
            raise ValueError(f"'{out}' holds pictures that --keep did not choose, and would remove: give another --out")
    for path in out.iterdir():
        of_seed = path.suffix == ".png" and path.stem.isdecimal() and int(path.stem) in seeds
        foreign = not path.with_suffix(".json").exists() if of_seed else not ours and path.name in ("index.html", "sheet.png")
        if foreign:
            raise ValueError(f"'{path}' was not written by this command, which would replace it: give another --out")


def write_picture(out: Path, picture: Tensor, about: dict) -> None:
    """`SEED.json`, and `SEED.png` beside it, which without the other is none of ours: see `check_folder`."""
    _write_json(out / f"{about['seed']}.json", about)
    write_whole(out / f"{about['seed']}.png", lambda path: tensor_to_picture(picture).save(path, "png"))


def _write_json(path: Path, value: dict) -> None:
    write_whole(path, lambda partial: partial.write_text(json.dumps(value, indent=2) + "\n"))


def _called(seed: int, scores: dict[int, float]) -> str:
    return f"seed {seed}" + (f", score {scores[seed]:.2f}" if seed in scores else "")


def command(settings: dict, batch: Sequence[int]) -> str:
    """The command that makes a batch of seeds again, byte for byte; a batch of another size rounds floats differently. Options that are
    as sample.py has them by default are left out."""
    words = [] if settings["model"] == str(PRETRAINED / DEFAULT) else ["--model", settings["model"]]
    words += ["--prompts", *settings["prompts"], *(["--views", *settings["views"]] if settings["views"] else [])]
    for name in ("components", "reference", "hold"):
        words += [f"--{name}", settings[name]] if settings.get(name) else []
    words += ["--seed", batch[0], "--num-samples", len(batch), "--batch-size", len(batch)]
    for name, default in DEFAULTS.items():
        value = settings[name]
        if value == default or (name == "scheduler" and value.endswith("Scheduler")):
            continue
        words += ["--" + name.replace("_", "-"), *([] if name in FLAGS else value if isinstance(value, list | tuple) else [value])]
    return shlex.join(["python", "sample.py", *map(str, words), "--out", "DIR"])
