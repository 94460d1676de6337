"""What is evaluated: a model, by name, and how it is sampled. Written `[NAME=]MODEL[@OPTION=VALUE,...]`.

eqldm/pretrained/glyphs-eq
swap=eqldm/pretrained/glyphs-base@vae=eqldm/pretrained/glyphs-eq      another VAE in the place of its own
blend=eqldm/pretrained/glyphs-base@blend=pixels,scheduler=dpm++
early=runs/ldm@2000                                                   a run at one of its checkpoints, RUN@STEP
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from eqldm.anagram.options import Options
from eqldm.anagram.sampling import Sampler
from eqldm.model_folder import Pixels, downsampling, load_autoencoder
from eqldm.paths import expanded

RESERVED = ("report.html", "report.md", "data.safetensors", "equivariance.png", "models.png")  # what lies beside the models' folders


def switch(text: str) -> bool:
    """Of `true` or `false`. Raises ValueError for anything else, of which `bool` would make True."""
    if text not in ("true", "false"):
        raise ValueError(f"got '{text}', wanted true or false")
    return text == "true"


def shares(text: str) -> tuple[float, ...]:
    """Of weights with `:` between them, one for each view: `1:2`. Raises ValueError for anything else."""
    return tuple(map(float, text.split(":")))


OPTIONS: dict[str, Callable[[str], Any]] = {
    "vae": str, "blend": str, "reduction": str, "weights": shares, "scheduler": str, "guidance_scale": float, "guidance_rescale": float,
    "num_inference_steps": int, "time_travel": int, "symmetrise": switch, "decoding": str,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A row of the tables. folder: of the model.  vae: the folder of another VAE, or None.  options: of `Options`, texts and numbers."""

    name: str
    folder: Path
    vae: Path | None
    options: dict[str, Any]

    def open(self, device: torch.device, precision: str = "32-true") -> tuple[AutoencoderKL | Pixels, Sampler | None]:
        """The VAE and, where the folder holds a UNet, the sampler, of that precision. Raises ValueError where they or the options do not
        fit each other, and as the loaders."""
        vae = load_autoencoder(self.vae or self.folder).to(device)
        if not (self.folder / "unet").is_dir():
            if self.vae or self.options:
                raise ValueError(f"'{self.text}': '{self.folder}' holds no UNet, so the options after '@' mean nothing")
            return vae, None
        sampler = Sampler.open(self.folder, device, precision)
        if self.vae and isinstance(sampler.vae, Pixels):
            raise ValueError(f"'{self.text}': '{self.folder}' is a pixel model, whose UNet knows no VAE")
        if self.vae:
            own, given = ((v.config.latent_channels, downsampling(v)) for v in (sampler.vae, vae))
            if own != given:
                raise ValueError(
                    f"'{self.text}': the UNet takes {own[0]} channels at f = {own[1]}, this VAE gives {given[0]} at f = {given[1]}"
                )
            sampler.vae = vae
        options = Options(**self.options)
        options.check(len(options.weights or (1, 2)))  # of how many views is not known here
        sampler.solver(options)
        return sampler.vae, sampler

    @property
    def text(self) -> str:
        """How it is written, but for the name."""
        options = ({"vae": self.vae} if self.vae else {}) | self.options
        return str(self.folder) + ("@" if options else "") + ",".join(f"{name}={_written(value)}" for name, value in options.items())


def _written(value: Any) -> str:
    """An option's value as `OPTIONS` reads it."""
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)


def parse_entry(text: str) -> Entry:
    """Of `[NAME=]MODEL[@OPTION=VALUE,...]`; without a name it has an empty one. A path that exists is taken as it is.

    Raises ValueError for an option that there is not, or a value that is none of its kind.
    """
    if Path(text).exists():
        return Entry("", Path(text), None, {})
    head, _, given = text.partition("@")
    if step := re.match(r"(\d+|last)(?:[@,]|$)", given):  # a checkpoint of a run: RUN@STEP, RUN@STEP@OPTION=VALUE
        head, given = f"{head}@{step[1]}", given[step.end() :]
    name, equals, model = head.partition("=")
    if not equals:
        name, model = "", head
    if not model or (equals and not name):
        raise ValueError(f"model: got '{text}', wanted MODEL or NAME=MODEL, and options as MODEL@OPTION=VALUE,...")
    options: dict = {}
    for option in given.split(",") if given else []:
        key, _, value = option.partition("=")
        if key in options:
            raise ValueError(f"model '{text}': {key} is given twice after '@'")
        try:
            if not value:  # `vae=` of a variable that is not set would be the model's own
                raise ValueError("nothing after '='")
            options[key] = OPTIONS[key](value)
        except (KeyError, ValueError):
            kinds = ", ".join(f"{key} ({kind.__name__})" for key, kind in OPTIONS.items())
            raise ValueError(f"model '{text}': got '{option}' after '@', wanted OPTION=VALUE of {kinds}") from None
    vae = options.pop("vae", None)
    return Entry(name, Path(expanded(model)), vae and Path(expanded(vae)), options)


def parse_entries(texts: list[str]) -> list[Entry]:
    """All of them; those without a name get that of the run or folder that the model lies in, with as many parents as tell them
    apart. Raises ValueError where two have one name."""
    entries = [parse_entry(text) for text in texts]
    unnamed = [entry for entry in entries if not entry.name]
    names = iter(folder_names([entry.folder for entry in unnamed]))
    named = [entry if entry.name else Entry(next(names), entry.folder, entry.vae, entry.options) for entry in entries]
    twice = sorted({entry.name for entry in named if sum(other.name == entry.name for other in named) > 1})
    if twice:
        raise ValueError(f"a model is given twice: {', '.join(twice)} (name them: NAME=MODEL)")
    odd = [entry.name for entry in named if not re.fullmatch(r"[^\W_][\w.+-]*", entry.name) or entry.name in RESERVED]
    if odd:
        raise ValueError(
            f"a model's name is that of a folder: got '{odd[0]}', wanted letters, digits and . + - _ (none of {', '.join(RESERVED)})"
        )
    return named


def folder_names(folders: list[Path]) -> list[str]:
    """Names of folders: of the run or folder that each lies in, with as many parents as tell them apart."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    parts = [(path.parent if path.name == "model" else path).parts for path in paths]
    parts = [tuple(re.sub(r"[^\w.+-]", "-", part).strip("-_.") for part in names) for names in parts]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["-".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    if not parts:
        return []
    return [part[-1] for part in parts]
