"""What pictures are measured with: the judge, features, LPIPS and CLIP that are at hand, and which are not."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from eqldm.autoencoder.losses import load_lpips
from eqldm.evaluation.clip import HOW, Clip
from eqldm.evaluation.features import Features, inception_features, judge_features, timm_features, torch_fidelity
from eqldm.evaluation.judge import Judge
from eqldm.evaluation.judges import open_judges
from eqldm.evaluation.notes import Notes
from eqldm.paths import expanded

WEIGHTS = {  # what `--without` may name, and the questions that need it
    "lpips": {"reconstruction", "equivariance"},
    "inception": {"reconstruction", "generation", "anagram"},
    "clip": {"generation", "anagram", "components"},
    "judge": {"reconstruction", "generation", "anagram", "components"},
}
READ = WEIGHTS["judge"] - {"reconstruction"}  # the questions in which letters are read


class Instruments:
    """What the questions `asked` need and what is on this disk: judge, chooser, lpips, clip, each None where it is not, and features.
    judge: the one, or the first of several; distances use its features.  judges: all by name, where there are several, else empty.

    missing: what cannot be computed because weights are missing, with the way to get them.  notes: what is left out or not used.
    """

    def __init__(self, args: argparse.Namespace, asked: Sequence[str], letters: bool, device: torch.device):
        """args: of the command.  letters: whether the pictures are such as the judge reads.

        Raises ValueError, FileNotFoundError where what was given by its path is not there, or does not fit the rest.
        """
        self.args, self.asked, self.device = args, asked, device
        self.missing: list[str] = []
        self.notes = Notes()
        for name in args.without:
            if getattr(args, name, None):
                raise ValueError(f"--{name} and --without {name}: give one of them")
        read = self._needing("judge", "what the judge reads", partial(open_judges, args.judge)) if args.judge or letters else None
        self.judge: Judge | None = next(iter(read.values())) if read else None
        self.judges = read if read and len(read) > 1 else {}
        if self.judges and not READ.intersection(asked):
            first, *others = self.judges
            self.notes.append(f"Not used (--judge): {', '.join(others)}. Nothing is read, and distances are on the features of {first}.")
        if self.judge and args.prompt_pairs:
            raise ValueError("--prompt-pairs means nothing where a judge reads letters: leave it out, or add --without judge")
        self.chooser = self._chooser() if args.chooser else None
        self.features = self._features()
        self.lpips = self._needing("lpips", "LPIPS", lambda: load_lpips().to(device))
        self.clip = None if self.judge and not args.clip else self._needing("clip", "CLIP score, alignment, concealment", self._clip)

    def _needing(self, name: str, what: str, make: Callable):
        """What `make` gives, or None where it is done without (`--without`) or its weights are not there, which is then noted."""
        if not WEIGHTS[name].intersection(self.asked):
            if path := getattr(self.args, name, None):
                self.notes.append(
                    f"Not used (--{name} {path if isinstance(path, str) else ' '.join(path)}): none of {', '.join(self.asked)} needs it."
                )
            return None
        if name in self.args.without:
            self.notes.append(f"Left out (--without {name}): {what}.")
            return None
        try:
            return make()
        except FileNotFoundError as error:
            if getattr(self.args, name, None):  # asked for by its path
                raise
            self.missing.append(f"{what}: {error}")
            return None

    @property
    def temperature(self) -> float | None:
        """CLIP's own; None without one."""
        return self.clip and self.clip.temperature

    def _chooser(self) -> Judge:
        """Chooses the best of a pair's pictures, which the judge then reads."""
        if not self.judge:
            raise ValueError("--chooser chooses among letters that the judge reads, but none reads here: leave it out")
        if self.args.num_seeds < 2:
            raise ValueError(f"--chooser: nothing to choose from with --num-seeds {self.args.num_seeds}, wanted 2 or more")
        chooser = Judge.open(self.args.chooser)
        if chooser.hash in {judge.hash for judge in (self.judge, *self.judges.values())}:
            raise ValueError("--chooser is the judge itself, which must not choose what it reads: give one trained with another seed")
        return chooser

    def _features(self) -> list[Features]:
        if WEIGHTS["inception"].intersection(self.asked):
            torch_fidelity("metric_prc")  # missing, it is told now and not after hours of sampling
        found = [judge_features(self.judge)] if self.judge else []
        for text in self.args.features:
            name, _, path = text.partition("=")
            if not path:
                raise ValueError(f"--features: got '{text}', wanted NAME=WEIGHTS, a timm model and its file")
            found.append(timm_features(name, Path(expanded(path)), self.device))
        if len({features.name for features in found}) < len(found):
            raise ValueError(f"--features: got one name twice ({' '.join(self.args.features)}), and metrics bear it")
        if self.args.inception or not found:
            open_it = partial(inception_features, self.args.inception, self.device)
            inception = self._needing("inception", "FID, KID, precision and recall", open_it)
            found += [inception] if inception else []
        return found

    def _clip(self) -> Clip:
        if not self.args.clip:
            raise FileNotFoundError(f"{HOW} and give --clip FOLDER")
        return Clip(self.args.clip, self.device)
