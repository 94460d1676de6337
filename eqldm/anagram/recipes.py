"""What pictures are made by, checked and ready to sample and to show: an anagram of views, or a composition of parts."""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps
from torch import Tensor

from eqldm.anagram.animation import Frame, animate, animate_parts
from eqldm.anagram.gallery import Shown, write_gallery, write_gallery_of_parts
from eqldm.anagram.options import Options
from eqldm.anagram.render import picture_sheet
from eqldm.anagram.sampling import Sampler, styled
from eqldm.data.pictures import read_picture
from eqldm.data.samples import picture_to_tensor
from eqldm.model_folder import downsampling
from eqldm.views import parse_view
from eqldm.views.components import parse_components


class Anagram:
    """Pictures that read as prompt i in view i.

    settings: what a record of it holds beside prompts and options, as the command has it.
    """

    def __init__(self, sampler: Sampler, prompts: Sequence[str], views: Sequence[str], options: Options, force: bool = False):
        """views: by name.  force: `negate` for any model. Raises ValueError where these do not fit each other."""
        self.sampler, self.prompts, self.options = sampler, list(prompts), options
        options.check(len(prompts))
        self.views = [parse_view(name, sampler.side(options.image_size)) for name in views]
        sampler.check([styled(prompt, options.style) for prompt in prompts], self.views, options.image_size)
        if not force and options.blend == "latents":
            sampler.check_negation(self.views)
        sampler.solver(options)
        self.settings: dict[str, Any] = {"views": [view.name for view in self.views]}

    def sample(
        self, seeds: Sequence[int], on_step: Callable[[], None] | None = None, watch: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1], one for each seed. on_step, watch: see `Sampler.latents`."""
        return self.sampler(self.prompts, self.views, seeds, on_step, watch, **vars(self.options))

    def faces(self, x: Tensor) -> list[Tensor]:
        """Pictures x [..., 3, H, W] as they show each prompt."""
        return [view(x) for view in self.views]

    def preview(self, estimate: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] of what `watch` was given."""
        if self.options.blend == "latents":
            return self.sampler.decode(estimate, views=self.options.decoded_under(self.views))
        return self.views[0].inverse(self.sampler.decode(estimate.chunk(len(self.views))[0]))

    @property
    def headings(self) -> list[str]:
        """What each of `sides` shows."""
        return [f"{view.name}: {prompt}" for view, prompt in zip(self.views, self.prompts)]

    def sides(self, x: Tensor) -> list[Tensor]:
        """A picture x [3, H, W] from all its sides, to be shown beside each other."""
        return self.faces(x)

    def animate(self, x: Tensor) -> Iterator[Frame]:
        """A picture [3, H, W] moving through its views."""
        return animate(x, self.views, self.prompts)

    def write_gallery(self, path: Path, shown: Sequence[Shown]) -> None:
        """The page of its pictures. Raises OSError."""
        write_gallery(path, shown, self.views, self.prompts)


class Composition:
    """Pictures whose component i reads as prompt i; one of the components perhaps that of a reference picture. Otherwise as `Anagram`."""

    def __init__(
        self, sampler: Sampler, prompts: Sequence[str], components: str, options: Options, reference: str | Path | None = None,
        hold: str | None = None,
    ):  # fmt: skip
        """components: such as `hybrid:0.06`.  reference, hold: the picture file, cut to a square, whose part `hold` is kept.

        Raises ValueError where these do not fit each other, FileNotFoundError."""
        self.sampler, self.prompts, self.options = sampler, list(prompts), options
        self.components, self.held = parse_components(components), {}
        names = [component.name for component in self.components]
        if bool(reference) != bool(hold):
            raise ValueError("--reference FILE and --hold PART need each other")
        if reference and hold:
            if hold not in names:
                raise ValueError(f"--hold {hold}: wanted one of {', '.join(names)}")
            if not Path(reference).is_file():
                raise FileNotFoundError(f"--reference '{reference}' is no file: give a picture")
            size, content = sampler.side(options.image_size) * downsampling(sampler.vae), Path(reference).read_bytes()
            try:
                read = read_picture(content)
                picture = ImageOps.fit(read, (size, size))
            except ValueError as error:
                raise ValueError(
                    f"--reference '{reference}' is no picture that can be read ({error}): give a PNG, JPEG or WebP file"
                ) from error
            if "note" in read.info:
                warnings.warn(f"--reference '{reference}': {read.info['note']}", stacklevel=2)
            self.held = {names.index(hold): picture_to_tensor(picture)[None]}
        sampler.check_parts([styled(prompt, options.style) for prompt in prompts], self.components, self.held, options)
        self.settings: dict[str, Any] = {"views": [], "components": components, "reference": reference and str(reference), "hold": hold}
        self.settings |= {"reference_hash": hashlib.sha256(content).hexdigest()[:16]} if self.held else {}

    def sample(
        self, seeds: Sequence[int], on_step: Callable[[], None] | None = None, watch: Callable[[Tensor], None] | None = None
    ) -> Tensor:
        return self.sampler.compose(self.prompts, self.components, seeds, self.held, on_step, watch, **vars(self.options))

    def faces(self, x: Tensor) -> list[Tensor]:
        return [part(x).clamp(-1, 1) for i, part in enumerate(self.components) if i not in self.held]

    def preview(self, estimate: Tensor) -> Tensor:
        return self.sampler.decode(estimate)

    @property
    def headings(self) -> list[str]:
        return ["whole", *(f"{part.name}: {text}" for part, text in zip(self.components, self._texts()))]

    def sides(self, x: Tensor) -> list[Tensor]:
        return [x, *(part(x).clamp(-1, 1) for part in self.components)]

    def animate(self, x: Tensor) -> Iterator[Frame]:
        return animate_parts(x, self.components, self._texts())

    def write_gallery(self, path: Path, shown: Sequence[Shown]) -> None:
        write_gallery_of_parts(path, shown, self.components, self._texts())

    def _texts(self) -> list[str]:
        """What each component shows: its prompt, or the reference."""
        prompts = iter(self.prompts)
        return ["the reference" if i in self.held else next(prompts) for i in range(len(self.components))]


Recipe = Anagram | Composition


def released(recipe: Recipe) -> Recipe:
    """The same without its model, which it would keep in memory: it shows and writes pictures, and samples no more."""
    found = copy.copy(recipe)
    vars(found)["sampler"] = None  # which it never asks for again
    return found


def recipe_sheet(recipe: Recipe, pictures: Tensor, seeds: Sequence[int]) -> Image.Image:
    """Each picture of [B, 3, H, W] (a row) from all its sides (a column each, headed by its prompt)."""
    rows, labels = [recipe.sides(x) for x in pictures], [f"seed {seed}" for seed in seeds]
    return picture_sheet(rows, labels, recipe.headings, max(1, 128 // pictures.shape[-1]))
