"""Pictures that a model draws from seeds, kept without loss: another judge, CLIP or feature needs no new sampling.

They lie in DIR/MODEL/QUESTION_pictures-KEY/, one file for each batch, as PNGs (a glyph takes 4 to 5 KiB instead of 12 KiB raw). A folder
depends on the model, the prompts, the seeds, the options, the batch size, the device type and the code that samples, and on nothing that
looks at the pictures.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from eqldm.anagram.options import Options
from eqldm.anagram.sampling import Sampler
from eqldm.data.pictures import read_picture
from eqldm.data.samples import to_bytes
from eqldm.evaluation.finite import finite
from eqldm.evaluation.work import identity, read_kept
from eqldm.model_folder import config_hash
from eqldm.views import View
from eqldm.views.components import Component


class Drawn:
    """The question what pictures a model draws. Picture k is drawn from seed `seed + k`, with its own prompt for each face.

    faces: views, or components (parts of a picture).  prompts: for each face, one for each picture.  options: of `sampling.Options`.
    """

    code = ("evaluation/drawn.py", "evaluation/finite.py", "evaluation/work.py")
    """The files of the evaluation's code that its pictures depend on."""

    def __init__(
        self, name: str, sampler: Sampler, faces: Sequence[View] | Sequence[Component], prompts: Sequence[Sequence[str]], seed: int = 0,
        on_step: Callable[[], None] | None = None, **options,
    ):  # fmt: skip
        self.name, self.sampler, self.prompts, self.count = f"{name}_pictures", sampler, prompts, len(prompts[0])
        self.seed, self.on_step, self.options = seed, on_step, options
        self.views = [face for face in faces if isinstance(face, View)]
        self.parts = [face for face in faces if isinstance(face, Component)]
        solver = sampler.solver(Options(**options))
        self.key = {
            **identity(sampler.vae, sampler.networks),
            "solver": f"{type(solver).__name__}-{config_hash(solver.config)}",
            "views": [face.name for face in faces],
            "prompts": prompts_hash(prompts),
            "seed": seed,
            "precision": sampler.precision,
            "options": options,
        }

    def names(self, numbers: range) -> list[str]:
        """What messages call these pictures."""
        return [f"{number} (seed {self.seed + number})" for number in numbers]

    @torch.no_grad()
    def pictures(self, numbers: range) -> Tensor:
        """[B, 3, H, W] uint8, as they would be saved. Raises ValueError, naming the first, where one is NaN or infinite."""
        prompts = [texts[numbers.start : numbers.stop] for texts in self.prompts]
        drawn = self._draw(prompts, [self.seed + number for number in numbers])
        return to_bytes(finite("pixels", drawn, self.names(numbers)))  # a byte has no NaN

    def measure(self, numbers: range) -> dict[str, Tensor]:
        """`png` [bytes] uint8, the files one after another, and `size` [B], the bytes of each. Raises as `pictures`."""
        return as_png(self.pictures(numbers))

    def _draw(self, prompts: Sequence[Sequence[str]], seeds: Sequence[int]) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1]."""
        if self.parts:
            return self.sampler.compose(prompts, self.parts, seeds, on_step=self.on_step, **self.options)
        return self.sampler(prompts, self.views, seeds, on_step=self.on_step, **self.options)


def prompts_hash(prompts: Sequence[Sequence[str]]) -> str:
    """16 hex digits of prompts: for each face, one for each picture."""
    return hashlib.sha256(json.dumps([list(texts) for texts in prompts]).encode()).hexdigest()[:16]


def as_png(pictures: Tensor) -> dict[str, Tensor]:
    """Of pictures [B, 3, H, W] uint8, `png` [bytes] uint8: the files one after another, and `size` [B]: the bytes of each."""
    files = []
    for picture in pictures.permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return {"png": torch.from_numpy(np.frombuffer(b"".join(files), np.uint8).copy()), "size": torch.tensor([len(f) for f in files])}


def from_png(values: dict[str, Tensor]) -> Tensor:
    """[B, 3, H, W] uint8: the inverse of `as_png`. Raises UnfitPicture where a file is damaged."""
    pictures = [read_picture(file.numpy().tobytes()) for file in values["png"].split(values["size"].tolist())]
    return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2).contiguous()


def read_pictures(folder: Path, prompts: Sequence[Sequence[str]] | None = None) -> Tensor:
    """[N, 3, H, W] uint8, all pictures of a folder QUESTION_pictures-KEY, in order.

    prompts: for each face, one for each picture, that they must have been drawn for; None: any. Raises ValueError where they were drawn
    for others, where some are missing and where a file is damaged or none of an evaluation's; FileNotFoundError where there are none.
    """
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"'{folder}' holds no pictures: give a folder QUESTION_pictures-KEY of an evaluation")
    values = f"{folder.name.rpartition('_pictures-')[0]}.safetensors"  # with which nothing is drawn again
    batches = []
    for path in paths:
        try:
            text, kept = read_kept(path)
            key = json.loads(text)
            count, drawn_for = key["count"], key.get("prompts")
            batches.append(from_png(kept))
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:  # UnfitPicture is a ValueError
            raise ValueError(
                f"'{path}' is damaged, or holds no pictures ({' '.join(str(error).split())[:160]}): remove it and '{values}' beside "
                "its folder, and run the command of the evaluation again, which draws these anew"
            ) from error
    if (found := sum(map(len, batches))) != count:
        raise ValueError(
            f"'{folder}' holds {found} of {count} pictures: remove '{values}' beside it, if it is there, and run the command of the "
            "evaluation again, which draws those that are missing"
        )
    if prompts is not None and drawn_for != prompts_hash(prompts):
        raise ValueError(f"'{folder}' holds pictures that were drawn for other prompts than those wanted")
    return torch.cat(batches)
