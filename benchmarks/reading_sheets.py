"""What the readers of `readers.py` are shown: which pictures, in which order, and the key that says what each is."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eqldm.atomic import write_whole
from eqldm.data.samples import from_bytes, to_bytes
from eqldm.evaluation.anagram import every_pair, letter_tuples
from eqldm.evaluation.drawn import read_pictures
from eqldm.evaluation.generation import letter_prompts
from eqldm.evaluation.judge import ANSWERS, LETTERS
from eqldm.evaluation.lookalikes import READS_AS, populations
from eqldm.evaluation.naming import file_name
from eqldm.evaluation.pictures import Pictures
from eqldm.views import IDENTITY, parse_view
from eqldm.weights import read_weights

VIEW = "rotate_180"
VIEWS = [IDENTITY, parse_view(VIEW, 8)]
REAL = "real letters"  # what the key calls the controls
COLUMNS, ROWS = 6, 5  # of a sheet
SCALE, GAP, CAPTION = 3, 12, 26  # how much an item is enlarged, smoothly; pixels between items, and above each


@dataclass(frozen=True)
class Item:
    """A line of the key: one view of one picture. picture: its number among the evaluation's.  wanted: the letter, or - for none.
    weight: how many of the method's pictures this one stands for."""

    item: int
    method: str
    picture: int
    view: int
    wanted: str
    weight: float
    judges: str  # the letter that each judge read, or -, in the order of their names; of a real letter, which they are not asked, nothing


@dataclass(frozen=True)
class Method:
    """What a method drew that needs an anagram (`lookalikes.populations`). pictures: [N, 3, H, W] uint8.  wanted: [views, N] label numbers.
    read: [N, views, J] what each judge reads.  numbers: [N] which of the evaluation's pictures these are.  judges: their names, in that
    order."""

    pictures: Tensor
    wanted: Tensor
    read: Tensor
    numbers: Tensor
    judges: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: Path, num_seeds: int) -> Method:
        """Of a folder DIR/MODEL of an evaluation. Raises ValueError, FileNotFoundError where it does not hold what is needed."""
        name = file_name(f"anagram/{VIEW}")
        kept = sorted(folder.glob(f"{name}_pictures-*"))
        if len(kept) != 1:
            raise FileNotFoundError(f"'{folder}' holds {len(kept)} sets of pictures of {VIEW}, wanted one: give DIR/MODEL of an evaluation")
        values = read_weights(folder / f"{name}.safetensors")
        read = {key.removeprefix("read/"): values[key] for key in sorted(values) if key.startswith("read/")}
        if len(read) < 2:
            raise ValueError(f"'{folder}' was read by {'one judge' if 'read' in values else 'no judge'}: evaluate it with --judge A B ...")
        count = len(next(iter(read.values())))
        if count % num_seeds:
            raise ValueError(f"'{folder}' holds {count} pictures, which are no {num_seeds} of each pair: give --num-seeds")
        every, drawn = every_pair().T, letter_tuples(count // num_seeds, 2, views=VIEWS)
        fault: ValueError | None = None
        for pairs in (every, drawn) if count == num_seeds * every.shape[1] else (drawn,):
            wanted = pairs.repeat(1, num_seeds)
            try:
                pictures = read_pictures(kept[0], letter_prompts(wanted))
                break
            except ValueError as error:
                fault = error
        else:
            raise ValueError(f"{fault} (the evaluation must be of --num-seeds {num_seeds}, as given here)") from fault
        needed = populations(wanted, VIEWS)[""].nonzero()[:, 0]
        if left := count - len(needed):
            print(f"'{folder}': {left} of {count} pictures need no anagram or want one letter twice: left out", file=sys.stderr)
        answers = torch.stack([*read.values()], 2)
        return cls(pictures[needed], wanted[:, needed], answers[needed], needed, tuple(read))

    @property
    def hits(self) -> Tensor:
        """[N] how many judges read both right."""
        return (self.read == self.wanted.T[:, :, None]).all(1).sum(1)


def chosen(method: Method, count: int, generator: torch.Generator) -> dict[int, float]:
    """{place in the method: how many of its pictures this one stands for} of `count`: a quarter each of those that all judges and that some
    read right in both views, and half of those that none does, which are most of what a method draws. What there are too few of, the others
    make up. Raises ValueError where there is no picture for one of them: a rate would leave its pictures out."""
    hits, judges = method.hits, method.read.shape[2]
    strata = [mask.nonzero()[:, 0] for mask in (hits == judges, (hits > 0) & (hits < judges), hits == 0)]
    parts = [1, 1, 2]
    order, sizes, left = sorted(range(3), key=lambda k: len(strata[k]) / parts[k]), [0] * 3, count
    for place, k in enumerate(order):  # what a small one cannot give, the larger ones do
        share = left * parts[k] // sum(parts[each] for each in order[place:])
        sizes[k] = min(len(strata[k]), share)
        left -= sizes[k]
    if any(size == 0 < len(stratum) for stratum, size in zip(strata, sizes)):
        raise ValueError(
            f"{count} pictures of a method are too few for one of each kind (all judges read it, some, none): wanted 4 or more"
        )
    found = {}
    for stratum, size in zip(strata, sizes):
        for place in stratum[torch.randperm(len(stratum), generator=generator)[:size]].tolist():
            found[place] = len(stratum) / size
    return found


def draw(methods: dict[str, Method], count: int, out: Path, seed: int, real: Pictures | None = None, num_real: int = 0) -> None:
    """Writes the sheets and the key of a study, with both views of `num_real` pictures of `real` among those of the methods. Raises
    ValueError where there are fewer pictures than are wanted, where `count` is no multiple of the methods, where methods were read by other
    judges, and where `out` holds a study, whose answers would be scored by another key."""
    if count % len(methods):
        raise ValueError(f"--num-pictures {count} is no multiple of {len(methods)} methods: wanted as many of each")
    if REAL in methods:
        raise ValueError(f"a method is called '{REAL}', as the controls are: give it another name")
    if (out / "key.csv").exists():
        raise ValueError(f"'{out}' holds a study: give another --out, or remove it")
    (one, of_one), *others = methods.items()
    for name, method in others:
        if method.judges != of_one.judges:
            known = " and ".join(f"{each} by {', '.join(judges)}" for each, judges in ((one, of_one.judges), (name, method.judges)))
            raise ValueError(f"methods were read by other judges: {known}. Evaluate them with the same --judge")
    generator = torch.Generator().manual_seed(seed)
    drawn: list[tuple[Item, Tensor]] = []  # without their places
    for name, method in methods.items():
        if len(method.pictures) < count // len(methods):
            raise ValueError(f"{name} has {len(method.pictures)} pictures, wanted {count // len(methods)} of it: evaluate more pairs")
        for place, weight in chosen(method, count // len(methods), generator).items():
            number = int(method.numbers[place])
            for view in range(2):
                read = "".join(ANSWERS[each] for each in method.read[place, view].tolist())
                wanted = LETTERS[int(method.wanted[view, place])]
                drawn.append((Item(0, name, number, view, wanted, weight, read), from_bytes(method.pictures[place])))
    drawn += controls(real, num_real, generator) if real is not None else []
    items, shown = [], []
    for item, k in enumerate(torch.randperm(len(drawn), generator=generator).tolist(), 1):
        about, picture = drawn[k]
        items.append(replace(about, item=item))
        shown.append(F.interpolate(VIEWS[about.view](picture[None]), scale_factor=SCALE, mode="bicubic").clamp(-1, 1)[0])
    (out / "sheets").mkdir(parents=True, exist_ok=True)
    per = COLUMNS * ROWS
    for first in range(0, len(items), per):
        save = partial(numbered(shown[first : first + per], first + 1).save, format="PNG")
        write_whole(out / "sheets" / f"{first // per + 1:02d}.png", save)
    write_whole(out / "key.csv", partial(write_key, items))


def controls(real: Pictures, count: int, generator: torch.Generator) -> list[tuple[Item, Tensor]]:
    """Both views of `count` real letters, with pictures in [-1, 1]. A turned one is wanted as the letter that it reads as (an M as W), or
    as none. Raises ValueError where there are fewer, or where one has no label."""
    if len(real) < count:
        raise ValueError(f"--num-real {count}: the data hold {len(real)} pictures")
    found = []
    for number in torch.randperm(len(real), generator=generator)[:count].tolist():
        sample = real[number]
        if not 0 <= sample["label"] < len(LETTERS) or "letter" not in sample["caption"].lower():
            raise ValueError(
                f"picture {number} of the data is labelled and captioned as no letter: wanted the glyph world's, of data/glyphs.py"
            )
        letter = LETTERS[sample["label"]]
        turned = READS_AS[VIEW].get(letter, "-")
        found += [(Item(0, REAL, number, view, wanted, 1.0, ""), sample["x"]) for view, wanted in enumerate((letter, turned))]
    return found


def write_key(items: Sequence[Item], path: Path) -> None:
    """Writes the key, a line for each item; `read_key` reads it."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(items[0])))
        writer.writeheader()
        writer.writerows(asdict(item) for item in items)


def read_key(folder: Path) -> list[Item]:
    """The items of a study, in order."""
    with open(folder / "key.csv", newline="") as file:
        return [
            Item(int(row["item"]), row["method"], int(row["picture"]), int(row["view"]), row["wanted"], float(row["weight"]), row["judges"])
            for row in csv.DictReader(file)
        ]


def numbered(pictures: Sequence[Tensor], first: int) -> Image.Image:
    """A sheet of pictures [3, H, W], each with its number above it."""
    height, width = pictures[0].shape[-2:]
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, rows * (height + GAP + CAPTION) + GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(CAPTION - 6)
    for k, picture in enumerate(pictures):
        left, top = GAP + (k % COLUMNS) * (width + GAP), GAP + (k // COLUMNS) * (height + GAP + CAPTION)
        pen.text((left, top), str(first + k), fill="black", font=font)
        sheet.paste(Image.fromarray(to_bytes(picture[None])[0].permute(1, 2, 0).numpy()), (left, top + CAPTION))
    return sheet
