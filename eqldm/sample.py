"""A sampling job, what `python sample.py` does: options in, a folder of pictures with everything needed to make them again out."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image, ImageOps
from rich.progress import Progress
from torch import Tensor

import eqldm
from eqldm.anagram.animation import Frame, animate, animate_parts, write_animation
from eqldm.anagram.gallery import Shown, write_gallery, write_gallery_of_parts
from eqldm.anagram.options import Options
from eqldm.anagram.render import anagram_sheet, picture_sheet
from eqldm.anagram.sampling import Sampler, styled
from eqldm.data.samples import picture_to_tensor, tensor_to_picture
from eqldm.data.sources import read_picture
from eqldm.evaluation.clip import Clip, alignment
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.model_folder import PRETRAINED, downsampling, vae_hash, weights_hash
from eqldm.views import parse_view
from eqldm.views.components import parse_components

DEFAULT = "glyphs-eq"
"""The shipped model that samples where none is given."""
FLAGS = ("symmetrise", "force", "attention_slicing", "tiled", "offload")
OPTIONS = (  # of the command, in the order in which it is written down; those of `Options` first
    "num_inference_steps", "guidance_scale", "guidance_rescale", "negative_prompt", "style", "reduction", "weights", "blend", "scheduler",
    "time_travel", "travel_band", "image_size", "upscale", "upscale_strength", "symmetrise", "force", "device", "precision",
    "attention_slicing", "tiled", "offload",
)  # fmt: skip


def sample_to_folder(args: argparse.Namespace) -> Path:
    """Samples as `sample.py` asks for it; writes `SEED.png` and `SEED.json`, `sheet.png`, animations, and the page `index.html`, whose path
    is returned.

    Raises: ValueError for options that do not fit each other or the model; FileNotFoundError for a folder that is no model;
    OSError where `--out` cannot be written.
    """
    if args.num_samples < 1 or args.batch_size < 1:
        raise ValueError("--num-samples and --batch-size must be at least 1")
    if not 0 <= args.seed <= 2**63 - 1 - args.num_samples:
        raise ValueError(f"--seed {args.seed}: wanted 0 to 2^63, less the number of samples")
    model = args.model or PRETRAINED / DEFAULT
    sampler = Sampler.open(model, args.device, args.precision)
    sampler.save_memory(args.attention_slicing, args.tiled, args.offload)
    options = sampling_options(args)
    chosen = Options(**options)
    chosen.check(len(args.prompts))
    kind = Parts(args, sampler, chosen) if args.components else Anagram(args, sampler)
    sampler.check_length(args.negative_prompt)
    sampler.solver(args.scheduler, args.blend, args.time_travel)
    chooser = Chooser(args) if args.keep else None
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"folder '{out}' cannot be made ({error.strerror}): give another --out") from error

    settings = {
        "model": str(model),
        "vae_hash": vae_hash(sampler.vae),
        "unet_hash": weights_hash(sampler.networks.unet),
        "prompts": args.prompts,
        **kind.settings,
        **{name: getattr(args, name) for name in OPTIONS},
        "scheduler": args.scheduler or type(sampler.networks.scheduler).__name__,
        "device": str(sampler.device),
        "precision": sampler.precision,
        "versions": {"eqldm": eqldm.__version__, "torch": torch.__version__},
    }
    check_folder(out, settings)
    start = time.perf_counter()
    pictures, batch_of, scores = {}, {}, {}
    seeds = list(range(args.seed, args.seed + args.num_samples))
    batches = [seeds[i : i + args.batch_size] for i in range(0, len(seeds), args.batch_size)]
    with Progress(transient=True) as progress:
        task = progress.add_task("sampling", total=len(batches) * chosen.num_calls)
        for batch in batches:
            made = kind.sample(batch, lambda: progress.advance(task), options)
            pictures |= dict(zip(batch, made))
            batch_of |= dict.fromkeys(batch, batch)
            if chooser:  # the best so far are on the disk at any time
                scores |= dict(zip(batch, chooser([face(made) for face in kind.faces]).tolist()))
                best = sorted(scores, key=scores.get, reverse=True)[: args.keep]
                for seed in pictures.keys() - set(best):
                    del pictures[seed]
                    for ending in ("png", "json"):
                        (out / f"{seed}.{ending}").unlink(missing_ok=True)
                with _writing(out / "scores.json") as path:
                    path.write_text(json.dumps(scores, indent=2) + "\n")
            for seed in pictures.keys() & set(batch):
                score = {"score": scores[seed]} if chooser else {}
                write_picture(out, pictures[seed], {**settings, "seed": seed, **score, "command": command(settings, batch)})
    seconds = (time.perf_counter() - start) / len(seeds)
    if chooser:
        seeds = sorted(pictures, key=scores.get, reverse=True)
    kept = torch.stack([pictures[seed] for seed in seeds])
    with _writing(out / "sheet.png") as path:
        kind.sheet(kept, seeds).save(path, "png")
    with Progress(transient=True) as progress:
        for seed, x in zip(seeds, progress.track(kept, description="animating") if args.animate else ()):
            frames = list(kind.animate(x))
            for ending in args.animate:
                with _writing(out / f"{seed}.{ending}") as path:
                    write_animation(frames, path, ending)
    shown = [Shown(x, _called(seed, scores), command(settings, batch_of[seed])) for seed, x in zip(seeds, kept)]
    with _writing(page := out / "index.html") as path:
        kind.gallery(path, shown)
    print(f"{len(batch_of)} pictures, {seconds:.2f} s a picture" + (f", the best {len(seeds)} kept" if chooser else ""))
    return page


class Anagram:
    """Pictures that read as prompt i in view i."""

    def __init__(self, args: argparse.Namespace, sampler: Sampler):
        """Raises ValueError where views, prompts and model do not fit each other."""
        if args.reference or args.hold:
            raise ValueError("--reference and --hold mean something with --components alone")
        self.prompts, self.sampler = args.prompts, sampler
        self.faces = [parse_view(name, sampler.side(args.image_size)) for name in args.views]
        sampler.check([styled(prompt, args.style) for prompt in self.prompts], self.faces, args.image_size)
        if not args.force and args.blend == "latents":
            sampler.check_negation(self.faces)
        self.settings = {"views": [view.name for view in self.faces]}

    def sample(self, seeds: Sequence[int], on_step: Callable[[], None], options: dict) -> Tensor:
        return self.sampler(self.prompts, self.faces, seeds, on_step, **options)

    def sheet(self, pictures: Tensor, seeds: Sequence[int]) -> Image.Image:
        return anagram_sheet(pictures, seeds, self.prompts, self.faces)

    def animate(self, x: Tensor) -> Iterator[Frame]:
        return animate(x, self.faces, self.prompts)

    def gallery(self, path: Path, shown: Sequence[Shown]) -> None:
        write_gallery(path, shown, self.faces, self.prompts)


class Parts:
    """Pictures whose component i reads as prompt i; one of them perhaps that of a reference picture."""

    def __init__(self, args: argparse.Namespace, sampler: Sampler, options: Options):
        """Raises ValueError where components, prompts and reference do not fit each other, FileNotFoundError."""
        self.sampler, self.components, self.held = sampler, parse_components(args.components), {}
        names = [component.name for component in self.components]
        if bool(args.reference) != bool(args.hold):
            raise ValueError("--reference FILE and --hold PART need each other")
        if args.hold:
            if args.hold not in names:
                raise ValueError(f"--hold {args.hold}: wanted one of {', '.join(names)}")
            size = sampler.side(args.image_size) * downsampling(sampler.vae)
            with open(args.reference, "rb") as file:
                picture = ImageOps.fit(read_picture(file.read()), (size, size))
            self.held = {names.index(args.hold): picture_to_tensor(picture)[None]}
        self.faces = [part for i, part in enumerate(self.components) if i not in self.held]
        self.prompts = args.prompts
        sampler.check_parts([styled(prompt, args.style) for prompt in self.prompts], self.components, self.held, options)
        self.settings = {"views": [], "components": args.components, "reference": args.reference, "hold": args.hold}

    def sample(self, seeds: Sequence[int], on_step: Callable[[], None], options: dict) -> Tensor:
        return self.sampler.compose(self.prompts, self.components, seeds, self.held, on_step, **options)

    def sheet(self, pictures: Tensor, seeds: Sequence[int]) -> Image.Image:
        rows = [[x, *(part(x) for part in self.components)] for x in pictures]
        headings = ["whole", *(f"{part.name}: {text}" for part, text in zip(self.components, self._texts()))]
        return picture_sheet(rows, [f"seed {seed}" for seed in seeds], headings, max(1, 128 // pictures.shape[-1]))

    def animate(self, x: Tensor) -> Iterator[Frame]:
        return animate_parts(x, self.components, self._texts())

    def gallery(self, path: Path, shown: Sequence[Shown]) -> None:
        write_gallery_of_parts(path, shown, self.components, self._texts())

    def _texts(self) -> list[str]:
        """What each component shows: its prompt, or the reference."""
        prompts = iter(self.prompts)
        return ["the reference" if i in self.held else next(prompts) for i in range(len(self.components))]


def sampling_options(args: argparse.Namespace) -> dict:
    """Those of `Options`: one number in place of a list of one."""
    options = {name: getattr(args, name) for name in Options.__dataclass_fields__}
    single = {name: options[name][0] for name in ("guidance_scale", "negative_prompt") if len(options[name]) == 1}
    return {**options, **single, "travel_band": tuple(options["travel_band"])}


class Chooser:
    """Scores pictures: [B], by the view, or part, that shows its prompt worst.

    Letters ("the letter A") by the probability that the judge gives them; other prompts by their CLIP similarity.
    Raises ValueError where there is no CLIP for prompts that are no letters, FileNotFoundError.
    """

    def __init__(self, args: argparse.Namespace):
        self.prompts = [styled(prompt, args.style) for prompt in args.prompts]
        self.letters = [re.fullmatch(r"(?:(?:the|a) )?letter ([a-z])", prompt, re.IGNORECASE) for prompt in args.prompts]
        if args.keep > args.num_samples:
            raise ValueError(f"--keep {args.keep}: only {args.num_samples} are sampled (--num-samples)")
        if args.clip:
            self.clip = Clip(args.clip, args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        elif all(self.letters):
            self.clip, self.judge = None, Judge.open()
        else:
            raise ValueError("--keep: the shipped judge reads letters alone; for other prompts give --clip FOLDER, a CLIP of transformers")

    def __call__(self, faces: Sequence[Tensor]) -> Tensor:
        """faces: for each prompt, the pictures as its view, or part, shows them."""
        if self.clip:
            seen = torch.stack([self.clip.pictures(x) for x in faces], 1)
            return alignment(seen @ self.clip.texts(self.prompts).T)
        labels = [LETTERS.index(letter[1].upper()) for letter in self.letters]
        return self.judge.worst_view(faces, labels)


def check_folder(out: Path, settings: dict) -> None:
    """Raises ValueError where the folder holds pictures made otherwise, which would lie beside the new ones as if they were of one run."""
    wanted = json.loads(json.dumps(settings))
    for path in out.glob("*.json"):
        found = json.loads(path.read_text())
        if "prompts" in found and any(found.get(name) != value for name, value in wanted.items()):
            changed = ", ".join(name for name, value in wanted.items() if found.get(name) != value)
            raise ValueError(f"'{out}' holds pictures made with another {changed}: give another --out")


def write_picture(out: Path, picture: Tensor, about: dict) -> None:
    """`SEED.png`, and `SEED.json` beside it."""
    with _writing(out / f"{about['seed']}.png") as path:
        tensor_to_picture(picture).save(path, "png")
    with _writing(out / f"{about['seed']}.json") as path:
        path.write_text(json.dumps(about, indent=2) + "\n")


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
    for name in OPTIONS:
        value = settings[name]
        if value == DEFAULTS.get(name) or (name == "scheduler" and value.endswith("Scheduler")):
            continue
        words += ["--" + name.replace("_", "-"), *([] if name in FLAGS else value if isinstance(value, list | tuple) else [value])]
    return shlex.join(["python", "sample.py", *map(str, words), "--out", "DIR"])


DEFAULTS = {  # of sample.py
    **{name: field.default for name, field in Options.__dataclass_fields__.items()},
    "guidance_scale": [5.0], "negative_prompt": [""], "travel_band": [0.2, 0.8], **dict.fromkeys(FLAGS, False),
}  # fmt: skip


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Where to write the file: beside its name, to which it is renamed when whole. Raises OSError that names it."""
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"'{path}' cannot be written ({error.strerror or error}): make room, or give another --out") from error
