"""Asks each question of a model: what `python -m eqldm.evaluate` does with each."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import Tensor

from eqldm.anagram.options import Options
from eqldm.anagram.sampling import Sampler
from eqldm.atomic import write_whole
from eqldm.data.samples import from_bytes
from eqldm.diffusion.conditioning import too_long
from eqldm.diffusion.objective import Objective
from eqldm.evaluation import sheets
from eqldm.evaluation.anagram import PROMPT_PAIRS, Reading, anagram_metrics, every_pair, letter_rates, letter_tuples, read_prompts, title
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.entries import Entry
from eqldm.evaluation.equivariance import RESCALES, SYMMETRIES, Equivariance, equivariance_metrics, error_maps, latent_pictures
from eqldm.evaluation.failures import forget_failures, note_failure, noted_failure
from eqldm.evaluation.fit import Fit, fit_metrics, verdict
from eqldm.evaluation.generation import generation_metrics, letter_prompts, plain_letters
from eqldm.evaluation.instruments import Instruments
from eqldm.evaluation.judge import LETTERS
from eqldm.evaluation.judges import by_judge, of_one_judge
from eqldm.evaluation.lookalikes import population_note, populations
from eqldm.evaluation.naming import file_name
from eqldm.evaluation.parts import part_metrics
from eqldm.evaluation.pictures import count_notes, open_pictures
from eqldm.evaluation.quality import RealData, RealPictures
from eqldm.evaluation.real_letters import RealLetters
from eqldm.evaluation.reconstruction import Reconstruction, reconstruction_metrics, worst_reconstructions
from eqldm.evaluation.results import Result, check_own
from eqldm.evaluation.sampled import Sampled
from eqldm.evaluation.work import Question, Store, work
from eqldm.model_folder import Pixels, downsampling, load_vae, vae_hash, weights_hash
from eqldm.training.speed import native_precision
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
        self.failed: list[str] = []
        self.over: set[str] = set()
        forget_failures(self.out, place[0])
        self.values: dict[str, Tensor] | None = None  # of the real pictures
        self.real_letters: dict[str, dict[str, Tensor] | None] = {}  # by an anagram's title, of `RealLetters`
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
            self._note(f"{len(keys)} pictures cannot be read, the next one stands in for each: {', '.join(keys)}.")
        if self.values is not None and self.judge and (without := int((self.values["label"] < 0).sum())):
            self._note(f"{without} of {self.count} pictures have no label: what the judge reads of real pictures is left out, and KID does "
                       "without labels.")  # fmt: skip
        for views in self.anagrams if "anagram" in self.asked else ():
            if self.judge is None:
                break
            letters = RealLetters(title(views), self.samples, self.count, views, self.judge, self.tools.judges)
            self.real_letters[title(views)] = found = self.ask(letters, self.out, "data")
            if found is not None and (left := [letter for k, letter in enumerate(LETTERS) if k not in found["label"]]):
                self._note(f"The data hold no picture labelled {', '.join(left)}: ambigramability_data, what plain letters would be "
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
                self._captions(1, sampler)
            options = Options(**self._sampling(entry))
            if "generation" in self.asked:
                try:
                    options.check(1)
                except ValueError as error:
                    raise ValueError(f"generation by '{entry.text}': {error} (give other options, or leave it out)") from error
            views = {names: names.count(",") + 2 for names in self.args.views} if "anagram" in self.asked else {}
            for name, count in {**views, **{name: len(parts) for name, parts in self.components.items()}}.items():
                prompts, _ = self._anagram_prompts(count)
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
                if values is None or real is None or None in self.real_letters.values():
                    complete = False
                    continue
                findings = summarise(values, real, found, folder)
            except FAULTS as error:  # the other questions, and models, are worth their answers
                self.fail(entry.name, name, error)
                continue
            result.add(findings, name, self.about_samples(question), found)
            if odd := [key for key, value in findings.metrics.items() if not math.isfinite(value)]:
                self._note(f"{entry.name}: no finite number, as of pictures that are too few, too small or all alike: {', '.join(odd)}.")
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
                self._note(f"Not computed for {entry.name}: {', '.join(left)} ('{entry.folder}' is a pixel model, it has no VAE).")
        else:
            if "reconstruction" in asked:
                rebuilt = Reconstruction(vae, self.samples, self.count, self.tools.features, self.tools.lpips)
                yield "reconstruction", rebuilt, lambda *found: self._reconstruction(vae, *found)
            if "equivariance" in asked:
                views = list(dict.fromkeys([*SYMMETRIES, *(view for view in self.views if view not in D4)]))
                sides = self._latent_sides(vae)
                if sides[0] != sides[1]:
                    views = [view for view in views if _fits(view, *sides)]
                    self._note("The pictures are not square: equivariance is that of the views that keep their shape.")
                turned = Equivariance(vae, self.samples, self.count, views, self._rescales(vae), self.tools.lpips)
                yield "equivariance", turned, lambda *found, q=turned: self._equivariance(vae, q, views, *found)
        if sampler is None:
            if left := [name for name in asked if name not in OF_VAES]:
                self._note(f"Not computed for {entry.name}: {', '.join(left)} ('{entry.folder}' holds a VAE alone).")
            return
        if "fit" in asked:
            own = load_vae(entry.folder).to(self.device) if entry.vae else None
            yield "fit", Fit(sampler, self.samples, self.count, own), lambda *found: self._fit(sampler, *found)
        options = {**self._sampling(entry), "features": self.tools.features, "clip": self.tools.clip, "judge": self.judge}
        options["judges"] = self.tools.judges
        options |= {"seed": args.seed, "num_shown": args.num_shown or (24 if max(self.samples.image_size) <= 128 else 12)}
        if "generation" in asked:
            wanted = plain_letters(args.num_letters) if self.judge else None
            prompts = [self._captions(args.num_letters, sampler)] if wanted is None else letter_prompts(wanted)
            question = Sampled("generation", sampler, [IDENTITY], prompts, wanted=wanted, **options)
            yield "generation", question, lambda *found, q=question: self._generation(q, *found)

        def of_tuples(name: str, faces: Sequence[View] | Sequence[Component]) -> Sampled:
            prompts, wanted = self._anagram_prompts(len(faces), [face for face in faces if isinstance(face, View)])
            return Sampled(file_name(name), sampler, faces, prompts, wanted=wanted, chooser=self.tools.chooser, **options)

        for views in self.anagrams if "anagram" in asked else ():
            question = of_tuples(name := f"anagram/{title(views)}", views)
            yield name, question, lambda *found, q=question: self._anagram(q, *found)
        for text in (names := self._components_of(entry, sampler)):
            question = of_tuples(name := f"components/{text}", self.components[text])
            yield name, question, lambda *found, q=question, text=text: self._parts(text, q, *found)
        if left := [text for text in self.components if text not in names]:
            self._note(f"Not computed for {entry.name}: components {', '.join(left)} (latents know nothing of colours: add @blend=pixels).")

    def _components_of(self, entry: Entry, sampler: Sampler) -> list[str]:
        """Those of the components asked for that mean something where this entry takes pictures apart."""
        in_latents = not isinstance(sampler.vae, Pixels) and entry.options.get("blend", "latents") == "latents"
        return [text for text, parts in self.components.items() if not in_latents or all(part.in_latents for part in parts)]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _rescales(self, vae: AutoencoderKL) -> list:
        return [rescale for rescale in RESCALES if all(side * rescale.height % 1 == 0 for side in self._latent_sides(vae))]

    def _latent_sides(self, vae: AutoencoderKL | Pixels) -> list[int]:
        return [side // downsampling(vae) for side in self.samples.image_size]

    def _captions(self, count: int, sampler: Sampler) -> list[str]:
        """The data's first captions that the model can read whole, again from the first where there are too few. Raises ValueError
        where there is none."""
        found: list[str] = []
        left = {"without a caption": 0, "longer than the model reads": 0}
        for number in range(len(self.samples)):
            if len(found) == count:
                break
            caption = self.samples[number]["caption"]
            if not caption.strip():
                left["without a caption"] += 1
            elif too_long(sampler.networks.tokenizer, [caption]):
                left["longer than the model reads"] += 1
            else:
                found.append(caption)
        if not found:
            raise ValueError(
                f"generation: no picture of '{self.args.data}' has a caption that the model can read: leave it out of --metrics"
            )
        if count > 1 and (told := [f"{number} {why}" for why, number in left.items() if number]):  # not where `open` looks for one
            self._note(f"Generation: captions left out: {', '.join(told)}.")
        self._note_again("Generation", "captions", len(found), count)
        return [found[k % len(found)] for k in range(count)]

    def _note_again(self, question: str, what: str, held: int, count: int) -> None:
        """Says where there are fewer prompts than pictures."""
        if held < count:
            self._note(f"{question}: {count} pictures of {held} {what}, which are sampled again with further seeds.")

    def _anagram_prompts(self, num_views: int, views: Sequence[View] = ()) -> tuple[list[list[str]], Tensor | None]:
        """(for each view, each picture's prompt; label numbers [views, N] where a judge reads), in rounds: each tuple once, then once more
        for each further seed. views: see `letter_tuples`. Raises ValueError, FileNotFoundError."""
        every, count = self.args.num_pairs == "all", self.args.num_pairs
        if self.judge:
            if every and num_views > 2:
                raise ValueError(
                    f"--num-pairs all: for two prompts a picture, got {num_views} (views count the upright one): give a number"
                )
            wanted = (every_pair().T if every else letter_tuples(int(count), num_views, views=views)).repeat(1, self.args.num_seeds)
            return letter_prompts(wanted), wanted
        found = read_prompts(Path(self.args.prompt_pairs or PROMPT_PAIRS), num_views)
        if not every:
            self._note_again("Anagrams and components", "prompt pairs" if num_views == 2 else "prompt lists", len(found), int(count))
        chosen = found if every else [found[k % len(found)] for k in range(int(count))]
        return [list(texts) * self.args.num_seeds for texts in zip(*chosen)], None

    def _reconstruction(self, vae, values, real, result: Result, folder: Path) -> Findings:
        worst = worst_reconstructions(vae, self.samples, values)
        self._save(result, folder / "reconstruction_worst.png", sheets.reconstruction_sheet(worst))
        return reconstruction_metrics(values, real)

    def _equivariance(self, vae, question: Equivariance, views: list[View], values, real, result: Result, folder: Path) -> Findings:
        x = torch.stack([self.samples[i]["x"] for i in range(min(4, self.count))])
        result.decodings = sheets.turned_decodings(vae, x.to(self.device), views)
        self._save(result, folder / "equivariance_maps.png", sheets.error_map_sheet(error_maps(values, views)))
        self._save(result, folder / "latents.png", sheets.latent_sheet(x, latent_pictures(vae, x, views)))
        return equivariance_metrics(values, vae, list(question.transforms), [view.name for view in views if view in SYMMETRIES])

    def _fit(self, sampler: Sampler, values, real, result: Result, folder: Path) -> Findings:
        findings = fit_metrics(values, Objective.of(sampler.networks.scheduler))
        channels = sampler.vae.config.latent_channels
        if self.count < 4 * channels:  # the filter knows the spectrum of just these pictures, which flatters it
            self._note(f"Fit: {self.count} pictures are too few for a verdict, wanted {4 * channels} or more.")
        else:
            result.verdict = verdict(findings.metrics)
        return findings

    def _generation(self, question: Sampled, values, real, result: Result, folder: Path) -> Findings:
        self._sampled(question, values, result, folder / ("letters.png" if self.judge else "generation.png"))
        return generation_metrics(values, real, question.wanted, None if self.judge else question.clusters)

    def _anagram(self, question: Sampled, values, real, result: Result, folder: Path) -> Findings:
        views = question.views
        self._sampled(question, values, result, folder / f"anagrams_{file_name(title(views))}.png")
        self._note_populations(f"anagram/{title(views)}", question)
        if question.wanted is not None and self.args.num_pairs == "all":
            heading = f"{result.entry.name}: read right in both views"
            of_pairs = {name: mask.view(len(LETTERS), -1) for name, mask in populations(every_pair().T, views).items()}
            matrix = sheets.letter_matrix(letter_rates(values, question.wanted), heading, [view.name for view in views], of_pairs)
            self._save(result, folder / f"letter_matrix_{file_name(title(views))}.png", matrix)
        clusters = None if self.judge else question.clusters
        about = question.wanted, clusters, self.tools.temperature, self.args.num_seeds
        return anagram_metrics(views, values, real, *about, self.real_letters.get(title(views)))

    def _parts(self, text: str, question: Sampled, values, real, result: Result, folder: Path) -> Findings:
        self._sampled(question, values, result, folder / f"components_{file_name(text)}.png")
        self._note_populations(f"components/{text}", question)
        about = question.clusters, question.wanted, self.tools.temperature, self.args.num_seeds
        return part_metrics(text, question.parts, values, real, *about)

    def _note_populations(self, name: str, question: Sampled) -> None:
        """Says how many pictures of letters do not count under the plain names."""
        if question.wanted is not None and (note := population_note(name, question.wanted, question.views)):
            self._note(note)

    def _sampled(self, question: Sampled, values, result: Result, path: Path) -> None:
        """Keeps the pictures that are shown."""
        pictures, shown = from_bytes(values["shown"]), question.shown
        if question.wanted is None:
            prompts = [[texts[number] for number in shown.tolist()] for texts in question.prompts]
            self._save(result, path, sheets.prompt_sheet(pictures, question.faces, prompts))
            return
        judge = next(iter(self.tools.judges), "")  # values are kept by name, and have lost the order of --judge
        read = by_judge(values, "read")[judge]
        if judge:
            self._note(f"Sheets of pictures say what the first judge, {judge}, reads.")
        reading = Reading(pictures, question.wanted[:, shown], read[shown].T)
        result.readings[question.name] = question.faces, reading
        self._save(result, path, sheets.reading_sheet(reading, question.faces))

    def _save(self, result: Result, path: Path, sheet: Image.Image) -> None:
        write_whole(path, lambda partial: sheet.save(partial, "PNG"))
        result.sheets[path.stem] = path.relative_to(self.out)


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
