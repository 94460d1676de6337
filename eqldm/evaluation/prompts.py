"""What models are asked to draw: letters where a judge reads them, else captions of the data, and pairs of prompts from a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from eqldm.anagram.sampling import Sampler
from eqldm.diffusion.conditioning import too_long
from eqldm.evaluation.anagram import PROMPT_PAIRS, every_pair, letter_tuples, read_prompts
from eqldm.evaluation.generation import letter_prompts
from eqldm.evaluation.notes import Notes
from eqldm.evaluation.pictures import Pictures
from eqldm.views import View


class Prompts:
    """The prompts that all models are asked for. args: of the command.  samples: whose captions are taken.  read: whether a judge reads
    letters."""

    def __init__(self, args: argparse.Namespace, samples: Pictures, read: bool, notes: Notes):
        self.args, self.samples, self.read, self.notes = args, samples, read, notes

    def captions(self, count: int, sampler: Sampler) -> list[str]:
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
        told = [f"{number} {why}" for why, number in left.items() if number]
        if told and count > 1:  # one alone is looked for to see whether there is any
            self.notes.add(f"Generation: captions left out: {', '.join(told)}.")
        self._say_again("Generation", "captions", len(found), count)
        return [found[k % len(found)] for k in range(count)]

    def _say_again(self, question: str, what: str, held: int, count: int) -> None:
        """Says where there are fewer prompts than pictures."""
        if held < count:
            self.notes.add(f"{question}: {count} pictures of {held} {what}, which are sampled again with further seeds.")

    def of_faces(self, num_views: int, views: Sequence[View] = ()) -> tuple[list[list[str]], Tensor | None]:
        """(for each view, each picture's prompt; label numbers [views, N] where a judge reads), in rounds: each tuple once, then once more
        for each further seed. views: see `letter_tuples`. Raises ValueError, FileNotFoundError."""
        every, count = self.args.num_pairs == "all", self.args.num_pairs
        if self.read:
            if every and num_views > 2:
                raise ValueError(
                    f"--num-pairs all: for two prompts a picture, got {num_views} (views count the upright one): give a number"
                )
            wanted = (every_pair().T if every else letter_tuples(int(count), num_views, views=views)).repeat(1, self.args.num_seeds)
            return letter_prompts(wanted), wanted
        found = read_prompts(Path(self.args.prompt_pairs or PROMPT_PAIRS), num_views)
        if not every:
            self._say_again("Anagrams and components", "prompt pairs" if num_views == 2 else "prompt lists", len(found), int(count))
        chosen = found if every else [found[k % len(found)] for k in range(int(count))]
        return [list(texts) * self.args.num_seeds for texts in zip(*chosen)], None
