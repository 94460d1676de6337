"""From the values of a question to what is said of a model: its figures, and the sheets of pictures that are shown with them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from eqldm.anagram.sampling import Sampler
from eqldm.atomic import write_whole
from eqldm.data.samples import from_bytes
from eqldm.diffusion.objective import Objective
from eqldm.evaluation import sheets
from eqldm.evaluation.anagram import Reading, anagram_metrics, every_pair, letter_rates, title
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.equivariance import SYMMETRIES, Equivariance, equivariance_metrics, error_maps, latent_pictures
from eqldm.evaluation.fit import fit_metrics, verdict
from eqldm.evaluation.generation import generation_metrics
from eqldm.evaluation.instruments import Instruments
from eqldm.evaluation.judge import LETTERS
from eqldm.evaluation.judges import by_judge
from eqldm.evaluation.lookalikes import population_note, populations
from eqldm.evaluation.naming import file_name
from eqldm.evaluation.parts import part_metrics
from eqldm.evaluation.pictures import Pictures
from eqldm.evaluation.quality import RealPictures
from eqldm.evaluation.reconstruction import reconstruction_metrics, worst_reconstructions
from eqldm.evaluation.results import Result
from eqldm.evaluation.sampled import Sampled
from eqldm.views import View

Values = dict[str, Tensor]


class Answers:
    """What is made of the values that each question measured of a model, a method for each question: findings are returned, sheets are
    saved in the model's `folder` and listed in its `result`. real: what of real pictures the values are held against."""

    def __init__(self, args: argparse.Namespace, samples: Pictures, count: int, tools: Instruments):
        """args: of the command.  count: of the samples that are measured."""
        self.args, self.samples, self.count, self.tools, self.notes = args, samples, count, tools, tools.notes
        self.out, self.device = Path(args.out), torch.device(args.device)
        self.real_letters: dict[str, Mapping[str, Tensor] | None] = {}
        """By an anagram's title, what `RealLetters` measured; None while other processes are at work on it."""

    def reconstruction(self, vae: AutoencoderKL, values: Values, real: RealPictures, result: Result, folder: Path) -> Findings:
        worst = worst_reconstructions(vae, self.samples, values)
        self._save(result, folder / "reconstruction_worst.png", sheets.reconstruction_sheet(worst))
        return reconstruction_metrics(values, real)

    def equivariance(
        self, vae: AutoencoderKL, question: Equivariance, views: list[View], values: Values, real: RealPictures, result: Result,
        folder: Path,
    ) -> Findings:  # fmt: skip
        x = torch.stack([self.samples[i]["x"] for i in range(min(4, self.count))])
        result.decodings = sheets.turned_decodings(vae, x.to(self.device), views)
        self._save(result, folder / "equivariance_maps.png", sheets.error_map_sheet(error_maps(values, views)))
        self._save(result, folder / "latents.png", sheets.latent_sheet(x, latent_pictures(vae, x, views)))
        return equivariance_metrics(values, vae, list(question.transforms), [view.name for view in views if view in SYMMETRIES])

    def fit(self, sampler: Sampler, values: Values, real: RealPictures, result: Result, folder: Path) -> Findings:
        findings = fit_metrics(values, Objective.of(sampler.networks.scheduler))
        channels = sampler.vae.config.latent_channels
        if self.count < 4 * channels:  # the filter knows the spectrum of just these pictures, which flatters it
            self.notes.add(f"Fit: {self.count} pictures are too few for a verdict, wanted {4 * channels} or more.")
        else:
            result.verdict = verdict(findings.metrics)
        return findings

    def generation(self, question: Sampled, values: Values, real: RealPictures, result: Result, folder: Path) -> Findings:
        self._sampled(question, values, result, folder / ("letters.png" if self.tools.judge else "generation.png"))
        return generation_metrics(values, real, question.wanted, None if self.tools.judge else question.clusters)

    def anagram(self, question: Sampled, values: Values, real: RealPictures, result: Result, folder: Path) -> Findings:
        views = question.views
        self._sampled(question, values, result, folder / f"anagrams_{file_name(title(views))}.png")
        self._note_populations(f"anagram/{title(views)}", question)
        if question.wanted is not None and self.args.num_pairs == "all":
            heading = f"{result.entry.name}: read right in both views"
            of_pairs = {name: mask.view(len(LETTERS), -1) for name, mask in populations(every_pair().T, views).items()}
            matrix = sheets.letter_matrix(letter_rates(values, question.wanted), heading, [view.name for view in views], of_pairs)
            self._save(result, folder / f"letter_matrix_{file_name(title(views))}.png", matrix)
        clusters = None if self.tools.judge else question.clusters
        about = question.wanted, clusters, self.tools.temperature, self.args.num_seeds
        return anagram_metrics(views, values, real, *about, self.real_letters.get(title(views)))

    def parts(self, text: str, question: Sampled, values: Values, real: RealPictures, result: Result, folder: Path) -> Findings:
        self._sampled(question, values, result, folder / f"components_{file_name(text)}.png")
        self._note_populations(f"components/{text}", question)
        about = question.clusters, question.wanted, self.tools.temperature, self.args.num_seeds
        return part_metrics(text, question.parts, values, real, *about)

    def _note_populations(self, name: str, question: Sampled) -> None:
        """Says how many pictures of letters do not count under the plain names."""
        if question.wanted is not None and (note := population_note(name, question.wanted, question.views)):
            self.notes.add(note)

    def _sampled(self, question: Sampled, values: Values, result: Result, path: Path) -> None:
        """Keeps the pictures that are shown."""
        pictures, shown = from_bytes(values["shown"]), question.shown
        if question.wanted is None:
            prompts = [[texts[number] for number in shown.tolist()] for texts in question.prompts]
            self._save(result, path, sheets.prompt_sheet(pictures, question.faces, prompts))
            return
        judge = next(iter(self.tools.judges), "")  # values are kept by name, and have lost the order of --judge
        read = by_judge(values, "read")[judge]
        if judge:
            self.notes.add(f"Sheets of pictures say what the first judge, {judge}, reads.")
        reading = Reading(pictures, question.wanted[:, shown], read[shown].T)
        result.readings[question.name] = question.faces, reading
        self._save(result, path, sheets.reading_sheet(reading, question.faces))

    def _save(self, result: Result, path: Path, sheet: Image.Image) -> None:
        write_whole(path, lambda partial: sheet.save(partial, "PNG"))
        result.sheets[path.stem] = path.relative_to(self.out)
