"""Pictures sampled from seeds, and looked at in each view, or part: what the questions of generation, anagrams and components share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import from_bytes
from eqldm.evaluation.clip import Clip
from eqldm.evaluation.drawn import Drawn, from_png
from eqldm.evaluation.features import Features
from eqldm.evaluation.finite import finite
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.evaluation.judges import by_suffix
from eqldm.evaluation.quality import contrast, high_frequency_energy, round_trip_psnr
from eqldm.evaluation.work import Store
from eqldm.model_folder import Pixels
from eqldm.views import View
from eqldm.views.components import Component


class Sampled:
    """The question what judges, features and CLIP see in the pictures that a model draws (`Drawn`), in each view, or each part, of them.

    faces: views, or components (parts).  prompts: for each face, one for each picture.  wanted: [faces, N] label numbers, where a judge
    reads.  num_shown: how many pictures are shown, drawn at random (the first of all pairs of letters would be alike).
    judges: by name, where several read; `judge` is then the first of them.  options: of `sampling.Options`.
    store: where pictures are kept and looked for; None samples them and keeps none.
    """

    store: Store | None = None

    def __init__(
        self, name: str, sampler: Sampler, faces: Sequence[View] | Sequence[Component], prompts: Sequence[Sequence[str]], *,
        wanted: Tensor | None = None, judge: Judge | None = None, judges: Mapping[str, Judge] | None = None, chooser: Judge | None = None,
        features: Sequence[Features] = (), clip: Clip | None = None, seed: int = 0, num_shown: int = 24,
        on_step: Callable[[], None] | None = None, **options,
    ):  # fmt: skip
        self.name, self.sampler, self.faces, self.prompts, self.count = name, sampler, faces, prompts, len(prompts[0])
        self.wanted, self.judge, self.chooser, self.features, self.clip = wanted, judge, chooser, features, clip
        self.judges = judges or {}
        self.drawn = Drawn(name, sampler, faces, prompts, seed, on_step, **options)
        self.views, self.parts = self.drawn.views, self.drawn.parts
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(0))
        self.shown = order[:num_shown].sort().values
        self.key = {
            **self.drawn.key,
            "name": name,
            "judge": judge and judge.hash,
            **({"judges": {each: other.hash for each, other in self.judges.items()}} if self.judges else {}),
            "chooser": chooser and chooser.hash,
            "features": {f.name: f.hash for f in features},
            "clip": clip and clip.hash,
            "num_shown": num_shown,
        }

    @property
    def clusters(self) -> Tensor:
        """[N] the same number for pictures of the same prompts: they are alike."""
        numbers: dict[tuple[str, ...], int] = {}
        return torch.tensor([numbers.setdefault(texts, len(numbers)) for texts in zip(*self.prompts)])

    @torch.no_grad()
    def measure(self, numbers: range) -> dict[str, Tensor]:
        """Of pictures, rounded to 8 bits as they would be saved, under V views or parts:

        `shown` [S, 3, H, W] uint8, those S of these pictures that are in `self.shown`;
        `round_trip` [B] dB of D(E(x)) against x; not of pixel models;
        `energy`, `contrast` [B, V] and `features/NAME` [B, V, D], of views alone: parts are not like real pictures;
        `read`, `forced` [B, V] label numbers that the judge reads, and reads where it must name a letter; of several judges `read/NAME`,
        `forced/NAME`;
        `chosen` [B] the probability in [0, 1] that the chooser gives the wanted letter in the view that shows it worst;
        `similarity` [B, V, V] CLIP's, in [-1, 1], of the picture in view i with the prompt of view j

        Raises ValueError, naming the first picture, where a picture or a value is NaN or infinite.
        """
        prompts, names = [texts[numbers.start : numbers.stop] for texts in self.prompts], self.drawn.names(numbers)
        saved = self.drawn.pictures(numbers) if self.store is None else from_png(self.store.batch(self.drawn, numbers))
        x = from_bytes(saved)
        seen = [face(x).clamp(-1, 1) for face in self.faces]  # a part may leave the range
        shown = [number - numbers.start for number in self.shown.tolist() if number in numbers]
        values = {"shown": saved[shown]}
        if not self.parts:
            values["energy"] = finite("energies", torch.stack([high_frequency_energy(x) for x in seen], 1), names)
            values["contrast"] = finite("contrasts", torch.stack([contrast(x) for x in seen], 1), names)
            for f in self.features:
                values[f"features/{f.name}"] = finite(f"features '{f.name}'", torch.stack([f.extract(x) for x in seen], 1), names)
        if not isinstance(self.sampler.vae, Pixels):
            values["round_trip"] = round_trip_psnr(self.sampler.vae, x)
        for suffix, judge in by_suffix(self.judge, self.judges).items():
            probabilities = finite("the judge's answers", torch.stack([judge.probabilities(x) for x in seen], 1), names)
            values[f"read{suffix}"] = probabilities.argmax(-1)
            values[f"forced{suffix}"] = probabilities[..., : len(LETTERS)].argmax(-1)
        if self.chooser is not None:
            assert self.wanted is not None  # it is given where a judge reads
            worst = self.chooser.worst_view(seen, self.wanted[:, numbers.start : numbers.stop])
            values["chosen"] = finite("the chooser's answers", worst, names)
        if self.clip is not None:
            texts = torch.stack([self.clip.texts(list(each)) for each in prompts], 1)
            values["similarity"] = finite("CLIP's scores", torch.stack([self.clip.pictures(x) for x in seen], 1) @ texts.mT, names)
        return values
