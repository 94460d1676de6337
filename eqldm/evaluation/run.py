"""Asks each question of a model: what `python -m eqldm.evaluate` does with each."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor

from eqldm.anagram.options import Options
from eqldm.anagram.sampling import Sampler
from eqldm.diffusion.objective import Objective
from eqldm.evaluation.anagram import title
from eqldm.evaluation.answers import Answers
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.entries import Entry
from eqldm.evaluation.equivariance import RESCALES, SYMMETRIES, Equivariance
from eqldm.evaluation.failures import forget_failures, note_failure, noted_failure
from eqldm.evaluation.fit import Fit
from eqldm.evaluation.generation import letter_prompts, plain_letters
from eqldm.evaluation.instruments import Instruments
from eqldm.evaluation.judge import LETTERS
from eqldm.evaluation.judges import of_one_judge
from eqldm.evaluation.naming import file_name
from eqldm.evaluation.pictures import count_notes, open_pictures
from eqldm.evaluation.prompts import Prompts
from eqldm.evaluation.quality import RealData, RealPictures
from eqldm.evaluation.real_letters import RealLetters
from eqldm.evaluation.reconstruction import Reconstruction
from eqldm.evaluation.results import Result, check_own
from eqldm.evaluation.sampled import Sampled
from eqldm.evaluation.work import Question, Store, work
from eqldm.model_folder import Pixels, downsampling, load_vae, vae_hash, weights_hash
from eqldm.precision import native_precision
from eqldm.views import D4, IDENTITY, View, parse_view
from eqldm.views.components import Component, parse_components

OF_VAES = ("reconstruction", "equivariance")
QUESTIONS = (*OF_VAES, "fit", "generation", "anagram", "components")

FAULTS = (ValueError, ArithmeticError, RuntimeError, FileNotFoundError, SafetensorError)
"""What a model raises that cannot be measured: of broken weights, of too little memory, of a folder that is gone. A full disk is none."""

console = Console(stderr=True)


class Evaluation:
    """The pictures, judges and features that all models are measured with.

    missing: what cannot be computed for want of weights, with the way to get them.  notes: what else a reader must know.
    failed: what of a model could not be measured, and why; the rest was.  over: the models of which nothing more is to come.
    """

    def __init__(self, args: argparse.Namespace, entries: list[Entry], place: tuple[int, int] = (0, 1)):
        """Raises ValueError, FileNotFoundError for options that do not fit, before anything long."""
        self.args, self.place, self.out = args, place, Path(args.out)
        check_own(self.out)
        of_unets = any((entry.folder / "unet").is_dir() for entry in entries)
        self.asked = [name for name in args.metrics if of_unets or name in OF_VAES]
        if not self.asked:
            raise ValueError(f"--metrics {' '.join(args.metrics)}: no model holds a UNet, so there is nothing to ask")
        self.device = torch.device(args.device)
        self.anagrams: list[list[View]] = []  # each by its views; see `prepare`
        self.views: list[View] = []
        parts = {name: parse_components(name) for name in args.components}
        self.components = parts if "components" in self.asked else {}
        if not {"anagram", "components"}.intersection(self.asked) and (args.num_seeds > 1 or args.chooser):
            raise ValueError("--num-seeds and --chooser are for anagrams and components, of which none are asked: leave them out")
        self.samples = open_pictures(args.data, args.image_size, args.num_images)
        self.count = min(args.num_images, len(self.samples))
        if self.count < 2:  # as of --num-images
            raise ValueError(f"--data '{args.data}' holds {self.count} picture, wanted at least 2: a distribution takes two")
        height, width = self.samples.image_size
        self.batch_size = args.batch_size or max(1, min(64, 2**20 // (height * width)))
        letters = all(_is_letter(self.samples[i]) for i in range(min(self.count, 8)))
        self.tools = Instruments(args, self.asked, letters, self.device)
        self.missing, self.notes, self.judge = self.tools.missing, self.tools.notes, self.tools.judge
        self.prompts = Prompts(args, self.samples, self.judge is not None, self.notes)
        self.answers = Answers(args, self.samples, self.count, self.tools)
        self.failed: list[str] = []
        self.over: set[str] = set()
        forget_failures(self.out, place[0])
        self.values: dict[str, Tensor] | None = None  # of the real pictures
        self.precision = native_precision(self.device.type) if args.precision == "auto" else args.precision
        few = [n for n in (self.count, args.num_letters, args.num_pairs) if n != "all" and int(n) < 100]
        if few:
            self.notes.append(f"A first look: of {min(map(int, few))} pictures FID, precision and recall say little, and the filter of "
                              "the fit knows the spectrum of just these.")  # fmt: skip
        self.notes += count_notes(self.samples, args.num_images)

    def about(self, entry: Entry) -> dict:
        """How an entry was evaluated, but for what `Result` knows."""
        known = {"data": str(self.args.data), "sampling": self._sampling(entry), "sampling precision": self.precision}
        return known | {"seed": self.args.seed, "device": str(self.device)}

    def _sampling(self, entry: Entry) -> dict:
        """The options of an entry's sampling."""
        return {"num_inference_steps": self.args.num_inference_steps, "guidance_scale": self.args.guidance_scale} | entry.options

    def ask(self, question: Question, folder: Path, about: str) -> dict[str, Tensor] | None:
        """The values of a question, with a bar of progress; None while other processes are at work on it."""
        others = [path.parent for path in self.out.glob(f"*/{question.name}.safetensors")]
        question.key["device"] = self.device.type
        if isinstance(question, Sampled):
            question.drawn.key["device"] = self.device.type
            models = [path.parent for path in self.out.glob(f"*/{question.drawn.name}-*") if path.parent != folder]
            question.store = Store(folder, self.batch_size, sorted(set(models)))
        rank, world = self.place
        total = len(range(0, question.count, self.batch_size)[rank::world])
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("batches"), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task(f"{about}: {question.name}", total=total)
            values = work(question, folder, self.batch_size, self.place, lambda: progress.advance(task), others)
        if values is not None and isinstance(question, Sampled) and question.store is not None:
            question.store.forget_others(question.drawn)
        return values

    def look_at_data(self) -> None:
        """Measures the real pictures, once for all models."""
        question = RealData(self.samples, self.count, self.tools.features, self.judge, list(self.components), self.tools.judges)
        self.values = self.ask(question, self.out, "data")
        if self.values is not None and len(rows := self.values["unreadable"].nonzero()[:, 0]):
            keys = list(dict.fromkeys(key for i in rows.tolist() for key in self.samples[i]["skipped"]))
            self.notes.add(f"{len(keys)} pictures cannot be read, the next one stands in for each: {', '.join(keys)}.")
        if self.values is not None and self.judge and (without := int((self.values["label"] < 0).sum())):
            self.notes.add(f"{without} of {self.count} pictures have no label: what the judge reads of real pictures is left out, and KID "
                           "does without labels.")  # fmt: skip
        for views in self.anagrams if "anagram" in self.asked else ():
            if self.judge is None:
                break
            letters = RealLetters(title(views), self.samples, self.count, views, self.judge, self.tools.judges)
            self.answers.real_letters[title(views)] = found = self.ask(letters, self.out, "data")
            if found is not None and 0 < len(left := [letter for k, letter in enumerate(LETTERS) if k not in found["label"]]) < len(
                LETTERS
            ):
                self.notes.add(f"The data hold no picture labelled {', '.join(left)}: ambigramability_data, what plain letters would be "
                           "credited with, is only given where all wanted letters have one.")  # fmt: skip

    def prepare(self, entries: list[Entry]) -> None:
        """Looks whether all models, options and pictures fit each other, and finds the views, which are the same for all: those that are as
        fine as latents, as fine as the coarsest. Raises ValueError, FileNotFoundError."""
        grids: list[list[int]] = []
        answered: set[str] = set()
        for entry in entries:
            vae, sampler = self.open(entry)
            answered.update(self._components_of(entry, sampler) if sampler is not None else ())
            grids.append(self._latent_sides(vae))
            grids += [[sampler.latent_side] * 2] if sampler is not None else []
        if left := [text for text in self.components if text not in answered]:
            raise ValueError(
                f"components {', '.join(left)}: latents know nothing of colours; add a model that blends in pixels, MODEL@blend=pixels"
            )
        coarsest = min(map(min, grids))
        self.anagrams = [[IDENTITY, *(parse_view(name, coarsest) for name in names.split(","))] for names in dict.fromkeys(self.args.views)]
        for views in self.anagrams:
            if len({view.name for view in views}) < len(views):  # one picture cannot read as two things in one view
                names = ",".join(view.name for view in views[1:])
                raise ValueError(f"--views {names}: one view is there twice (the upright one, identity, counts), wanted different ones")
        self.views = list(dict.fromkeys(view for views in self.anagrams for view in views[1:]))
        for view in self.views:
            for height, width in grids:
                view.check(height, width, " (latents)")

    def open(self, entry: Entry) -> tuple[AutoencoderKL | Pixels, Sampler | None]:
        """The VAE and, where the folder holds a UNet, the sampler of an entry. Raises ValueError where they do not fit each other,
        the pictures or the prompts."""
        vae, sampler = entry.open(self.device, self.precision)
        factor, size = downsampling(vae), self.samples.image_size
        if any(side % factor for side in size):
            raise ValueError(f"pictures of '{self.args.data}' are {size[0]} x {size[1]}: '{entry.folder}' takes multiples of f = {factor}")
        if sampler is not None:
            if "fit" in self.asked:
                try:
                    Objective.of(sampler.networks.scheduler)
                except ValueError as error:
                    raise ValueError(f"fit by '{entry.text}': {error}; or leave fit out of --metrics") from error
            if not self.judge and "generation" in self.asked:
                self.prompts.captions(1, sampler)
            options = Options(**self._sampling(entry))
            if "generation" in self.asked:
                try:
                    options.check(1)
                except ValueError as error:
                    raise ValueError(f"generation by '{entry.text}': {error} (give other options, or leave it out)") from error
            views = {names: names.count(",") + 2 for names in self.args.views} if "anagram" in self.asked else {}
            for name, count in {**views, **{name: len(parts) for name, parts in self.components.items()}}.items():
                prompts, _ = self.prompts.of_faces(count)
                try:
                    options.check(count)
                    for texts in prompts:
                        sampler.check_length(texts)
                except ValueError as error:
                    how = "give other prompts with --prompt-pairs, other options, or leave it out"
                    raise ValueError(f"{name} by '{entry.text}': {error} ({how})") from error
            for name in self._components_of(entry, sampler):
                try:
                    sampler.check_parts([""] * len(self.components[name]), self.components[name], {}, options)
                except ValueError as error:
                    raise ValueError(f"{name} by '{entry.text}': {error}") from error
        return vae, sampler

    def answer(self, entry: Entry) -> Result | None:
        """All that is found of a model; None while other processes are at work on it, or where all failed."""
        try:
            result, complete = self._answer(entry)
        except FAULTS as error:
            self.fail(entry.name, "", error)
            result, complete = None, True
        if complete:
            self.over.add(entry.name)
        return result if complete and result and result.samples else None

    def _answer(self, entry: Entry) -> tuple[Result, bool]:
        """(what is found of a model, whether nothing is left to find). Raises `FAULTS`."""
        folder, result, complete = self.out / entry.name, Result(entry, self.about(entry)), True
        folder.mkdir(parents=True, exist_ok=True)
        vae, sampler = self.open(entry)
        real = None if self.values is None else RealPictures.of(self.values)
        result.hashes = {"vae": vae_hash(vae)} | ({"unet": weights_hash(sampler.networks.unet)} if sampler else {})
        for name, question, summarise in self.questions(entry, vae, sampler):
            found = Result(entry, {})  # of this question: where it fails, its sheets are not shown either
            try:
                values = self.ask(question, folder, entry.name)
                if values is None and (text := noted_failure(self.out, entry.name, name)):  # of a process whose share will not come
                    self._failed(text)
                    continue
                at_work = self.answers.real_letters.get(name.removeprefix("anagram/"), {}) is None  # others, on what is held beside it
                if values is None or real is None or at_work:
                    complete = False
                    continue
                findings = summarise(values, real, found, folder)
            except FAULTS as error:  # the other questions, and models, are worth their answers
                self.fail(entry.name, name, error)
                continue
            result.add(findings, name, self.about_samples(question), found)
            if odd := [key for key, value in findings.metrics.items() if not math.isfinite(value)]:
                self.notes.add(
                    f"{entry.name}: no finite number, as of pictures that are too few, too small or all alike: {', '.join(odd)}."
                )
            console.print(f"{entry.name}: {name} " + ", ".join(f"{key.split('/', 1)[1]} {value:.4g}" for key, value in headline(findings)))
        return result, complete

    def fail(self, model: str, question: str, error: Exception) -> None:
        """Takes down, and says, what failed: a question, or, where that is empty, a model as a whole. Other processes hear of it."""
        plain = str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {str(error)[:400]}"
        text = f"{question} of '{model}': " if question else f"'{model}': "
        text += " ".join(plain.split())
        self._failed(text)
        rank, world = self.place
        if world > 1:
            note_failure(self.out, rank, model, question, text)

    def _failed(self, text: str) -> None:
        if text not in self.failed:
            self.failed.append(text)
            console.print(f"failed: {text}", markup=False, highlight=False, soft_wrap=True)

    def about_samples(self, question: Question) -> dict:
        """What the pictures of a question were: where it is equal, two models were measured on the same."""
        of_model = ("vae", "unet", "text", "scheduler", "solver", "own", "precision", "options", "device", "chooser", "num_shown")
        known = {name: value for name, value in question.key.items() if name not in of_model} | {"count": question.count}
        return known if "data" in known else {**known, "data": self.samples.digest, "num_real": self.count}

    def questions(self, entry: Entry, vae: AutoencoderKL | Pixels, sampler: Sampler | None) -> Iterator[tuple[str, Question, Callable]]:
        """(name, question, how its values become findings) of each that can be asked of a model."""
        asked, args = self.asked, self.args
        if isinstance(vae, Pixels):
            if left := [name for name in OF_VAES if name in asked]:
                self.notes.add(f"Not computed for {entry.name}: {', '.join(left)} ('{entry.folder}' is a pixel model, it has no VAE).")
        else:
            if "reconstruction" in asked:
                rebuilt = Reconstruction(vae, self.samples, self.count, self.tools.features, self.tools.lpips)
                yield "reconstruction", rebuilt, lambda *found: self.answers.reconstruction(vae, *found)
            if "equivariance" in asked:
                views = list(dict.fromkeys([*SYMMETRIES, *(view for view in self.views if view not in D4)]))
                sides = self._latent_sides(vae)
                if sides[0] != sides[1]:
                    views = [view for view in views if _fits(view, *sides)]
                    self.notes.add("The pictures are not square: equivariance is that of the views that keep their shape.")
                turned = Equivariance(vae, self.samples, self.count, views, self._rescales(vae), self.tools.lpips)
                yield "equivariance", turned, lambda *found, q=turned: self.answers.equivariance(vae, q, views, *found)
        if sampler is None:
            if left := [name for name in asked if name not in OF_VAES]:
                self.notes.add(f"Not computed for {entry.name}: {', '.join(left)} ('{entry.folder}' holds a VAE alone).")
            return
        if "fit" in asked:
            own = load_vae(entry.folder).to(self.device) if entry.vae else None
            yield "fit", Fit(sampler, self.samples, self.count, own), lambda *found: self.answers.fit(sampler, *found)
        options = {**self._sampling(entry), "features": self.tools.features, "clip": self.tools.clip, "judge": self.judge}
        options["judges"] = self.tools.judges
        options |= {"seed": args.seed, "num_shown": args.num_shown or (24 if max(self.samples.image_size) <= 128 else 12)}
        if "generation" in asked:
            wanted = plain_letters(args.num_letters) if self.judge else None
            prompts = [self.prompts.captions(args.num_letters, sampler)] if wanted is None else letter_prompts(wanted)
            question = Sampled("generation", sampler, [IDENTITY], prompts, wanted=wanted, **options)
            yield "generation", question, lambda *found, q=question: self.answers.generation(q, *found)

        def of_tuples(name: str, faces: Sequence[View] | Sequence[Component]) -> Sampled:
            prompts, wanted = self.prompts.of_faces(len(faces), [face for face in faces if isinstance(face, View)])
            return Sampled(file_name(name), sampler, faces, prompts, wanted=wanted, chooser=self.tools.chooser, **options)

        for views in self.anagrams if "anagram" in asked else ():
            question = of_tuples(name := f"anagram/{title(views)}", views)
            yield name, question, lambda *found, q=question: self.answers.anagram(q, *found)
        for text in (names := self._components_of(entry, sampler)):
            question = of_tuples(name := f"components/{text}", self.components[text])
            yield name, question, lambda *found, q=question, text=text: self.answers.parts(text, q, *found)
        if left := [text for text in self.components if text not in names]:
            self.notes.add(
                f"Not computed for {entry.name}: components {', '.join(left)} (latents know nothing of colours: add @blend=pixels)."
            )

    def _components_of(self, entry: Entry, sampler: Sampler) -> list[str]:
        """Those of the components asked for that mean something where this entry takes pictures apart."""
        in_latents = not isinstance(sampler.vae, Pixels) and entry.options.get("blend", "latents") == "latents"
        return [text for text, parts in self.components.items() if not in_latents or all(part.in_latents for part in parts)]

    def _rescales(self, vae: AutoencoderKL) -> list:
        return [rescale for rescale in RESCALES if all(side * rescale.height % 1 == 0 for side in self._latent_sides(vae))]

    def _latent_sides(self, vae: AutoencoderKL | Pixels) -> list[int]:
        return [side // downsampling(vae) for side in self.samples.image_size]


def _is_letter(sample: dict) -> bool:
    """Whether a picture is one of the glyph world's: labelled as a letter, and called one."""
    label = sample["label"]
    return isinstance(label, int) and 0 <= label < len(LETTERS) and "letter" in sample["caption"].lower()


def _fits(view: View, height: int, width: int) -> bool:
    try:
        view.check(height, width)
    except ValueError:
        return False
    return True


def headline(findings: Findings, most: int = 4) -> list[tuple[str, float]]:
    """The first metrics that are not of a single view, bin or quantile."""
    metrics = {name: value for name, value in findings.metrics.items() if not of_one_judge(name)}
    short = [(name, value) for name, value in metrics.items() if "bin_" not in name and name.count("/") == 1]
    means = [(name, value) for name, value in metrics.items() if "/mean/" in name or name.startswith(("anagram/", "components/"))]
    return (means or short)[:most]
