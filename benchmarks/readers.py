"""Do people read what the judges read? A blind reading of anagrams by several readers, and how they agree with each other and the judges.

    python benchmarks/readers.py draw NAME=DIR/MODEL NAME=DIR/MODEL ... --out STUDY
    python benchmarks/readers.py score STUDY --answers READER.csv READER.csv READER.csv

DIR/MODEL is what `eqldm.evaluate --metrics anagram --num-pairs NUMBER --judge A B ...` left of a method. `draw` takes --num-pictures
pictures, equally many of each method. Within a method it takes equally many of those that all judges, that some judges and that no judge
reads right in both views, as far as there are enough. Each view of a picture is an item of its own, and all items are shuffled.

STUDY/sheets/*.png show the items by number. A reader writes a CSV of `item,letter`: the letter that the item shows, A to Z, or - where it
shows none. STUDY/key.csv says what each item is, with what each judge read, in the order of their names; readers must not see it.

`score` prints the tables. Agreement is on the items that were drawn, among which hits are more frequent than among all that a method draws.
Rates and the calibration are weighted back to all of the methods' pictures.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from eqldm.atomic import write_whole
from eqldm.command import error_line
from eqldm.data.samples import from_bytes, to_bytes
from eqldm.evaluation.anagram import letter_tuples
from eqldm.evaluation.bootstrap import rate_interval
from eqldm.evaluation.drawn import read_pictures
from eqldm.evaluation.generation import letter_prompts
from eqldm.evaluation.judge import ANSWERS, LETTERS
from eqldm.evaluation.judges import kappa as judges_kappa
from eqldm.evaluation.naming import file_name
from eqldm.markdown import markdown
from eqldm.views import IDENTITY, parse_view
from eqldm.weights import read_weights

VIEW = "rotate_180"
COLUMNS, ROWS = 6, 5  # of a sheet
SCALE, GAP, CAPTION = 3, 12, 26  # how much an item is enlarged, smoothly; pixels between items, and above each


@dataclass(frozen=True)
class Item:
    """A line of the key: one view of one picture. weight: how many of the method's pictures this one stands for."""

    item: int
    method: str
    picture: int
    view: int
    wanted: str
    weight: float
    judges: str  # the letter that each judge read, or -, in the order of their names


def kappa(a: Sequence[str], b: Sequence[str]) -> float:
    """Cohen's kappa of two readers' answers (`judges.kappa`), 1 where they always agree, also where both always answer the same."""
    numbers = {answer: number for number, answer in enumerate({*a, *b})}
    found = float(judges_kappa(*(torch.tensor([numbers[answer] for answer in each]) for each in (a, b))))
    return 1.0 if math.isnan(found) else found


def majority(answers: Sequence[str]) -> str:
    """The answer of more than half of the readers; - where there is none."""
    most = max(set(answers), key=answers.count)
    return most if answers.count(most) * 2 > len(answers) else "-"


def read_answers(file: Path, items: Sequence[int]) -> list[str]:
    """A reader's answers, in the order of `items`. Raises ValueError for items that are missing, unknown or answered twice, and for answers
    that are none of A to Z and -."""
    with open(file, newline="") as opened:
        table = csv.DictReader(opened)
        if lacking := {"item", "letter"} - set(table.fieldnames or ()):
            raise ValueError(f"'{file}' has no column {min(lacking)}: wanted a first line 'item,letter'")
        rows = [((row["item"] or "").strip(), (row["letter"] or "").strip().upper()) for row in table]
    given: dict[int, str] = {}
    for item, letter in rows:
        if not item.isdecimal() or int(item) not in items or int(item) in given:
            raise ValueError(f"'{file}': item {item} is unknown or answered twice")
        if letter not in ANSWERS or len(letter) != 1:
            raise ValueError(f"'{file}': item {item}: got '{letter}', wanted a letter from A to Z, or - for none")
        given[int(item)] = letter
    if missing := [item for item in items if item not in given]:
        raise ValueError(f"'{file}': {len(missing)} items have no answer, such as {missing[0]}")
    return [given[item] for item in items]


@dataclass(frozen=True)
class Method:
    """What a method drew. pictures: [N, 3, H, W] uint8.  wanted: [views, N] label numbers.  read: [N, views, J] what each judge reads.
    judges: their names, in that order."""

    pictures: Tensor
    wanted: Tensor
    read: Tensor
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
        wanted = letter_tuples(count // num_seeds, 2, views=[IDENTITY, parse_view(VIEW, 8)]).repeat(1, num_seeds)
        if wanted.shape[1] != count:
            raise ValueError(f"'{folder}' holds {count} pictures, which are no {num_seeds} of each pair: give --num-seeds")
        try:
            pictures = read_pictures(kept[0], letter_prompts(wanted))
        except ValueError as error:
            how = f"the evaluation must be of --num-pairs NUMBER (not all), and of --num-seeds {num_seeds} as given here"
            raise ValueError(f"{error} ({how})") from error
        return cls(pictures, wanted, torch.stack([*read.values()], 2), tuple(read))

    @property
    def hits(self) -> Tensor:
        """[N] how many judges read both right."""
        return (self.read == self.wanted.T[:, :, None]).all(1).sum(1)


def chosen(method: Method, count: int, generator: torch.Generator) -> dict[int, float]:
    """{picture number: how many of the method's it stands for} of `count`: a third each of those that all judges, some and none read
    right in both views; what there are too few of, the others make up. Raises ValueError where there is no picture for one of them: a rate
    would leave its pictures out."""
    hits, judges = method.hits, method.read.shape[2]
    strata = [(mask.nonzero()[:, 0]) for mask in (hits == judges, (hits > 0) & (hits < judges), hits == 0)]
    sizes, left = [], count
    for k, stratum in enumerate(sorted(strata, key=len)):  # what a small one cannot give, the larger ones do
        sizes.append(min(len(stratum), left // (len(strata) - k)))
        left -= sizes[-1]
    found = {}
    if any(size == 0 < len(stratum) for stratum, size in zip(sorted(strata, key=len), sizes)):
        raise ValueError(
            f"{count} pictures of a method are too few for one of each kind (all judges read it, some, none): wanted 3 or more"
        )
    for stratum, size in zip(sorted(strata, key=len), sizes):
        for number in stratum[torch.randperm(len(stratum), generator=generator)[:size]].tolist():
            found[number] = len(stratum) / size
    return found


def draw(methods: dict[str, Method], count: int, out: Path, seed: int) -> None:
    """Writes the sheets and the key of a study. Raises ValueError where there are fewer pictures than are wanted, where `count` is no
    multiple of the methods, where methods were read by other judges, and where `out` holds a study, whose answers would be scored by
    another key."""
    if count % len(methods):
        raise ValueError(f"--num-pictures {count} is no multiple of {len(methods)} methods: wanted as many of each")
    if (out / "key.csv").exists():
        raise ValueError(f"'{out}' holds a study: give another --out, or remove it")
    (one, of_one), *others = methods.items()
    for name, method in others:
        if method.judges != of_one.judges:
            known = " and ".join(f"{each} by {', '.join(judges)}" for each, judges in ((one, of_one.judges), (name, method.judges)))
            raise ValueError(f"methods were read by other judges: {known}. Evaluate them with the same --judge")
    generator, drawn = torch.Generator().manual_seed(seed), []
    for name, method in methods.items():
        if len(method.pictures) < count // len(methods):
            raise ValueError(f"{name} has {len(method.pictures)} pictures, wanted {count // len(methods)} of it: evaluate more pairs")
        for number, weight in chosen(method, count // len(methods), generator).items():
            drawn += [(name, number, view, weight) for view in range(2)]
    order = torch.randperm(len(drawn), generator=generator).tolist()
    items, shown = [], []
    views = [IDENTITY, parse_view(VIEW, 8)]
    for item, k in enumerate(order, 1):
        name, number, view, weight = drawn[k]
        method = methods[name]
        read = "".join(ANSWERS[each] for each in method.read[number, view].tolist())
        items.append(Item(item, name, number, view, LETTERS[int(method.wanted[view, number])], weight, read))
        x = views[view](from_bytes(method.pictures[number])[None])
        shown.append(F.interpolate(x, scale_factor=SCALE, mode="bicubic").clamp(-1, 1)[0])
    (out / "sheets").mkdir(parents=True, exist_ok=True)
    per = COLUMNS * ROWS
    for first in range(0, len(items), per):
        save = partial(numbered(shown[first : first + per], first + 1).save, format="PNG")
        write_whole(out / "sheets" / f"{first // per + 1:02d}.png", save)
    write_whole(out / "key.csv", partial(write_key, items))


def write_key(items: Sequence[Item], path: Path) -> None:
    """Writes the key, a line for each item; `read_key` reads it."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(items[0])))
        writer.writeheader()
        writer.writerows(asdict(item) for item in items)


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


def read_key(folder: Path) -> list[Item]:
    """The items of a study, in order."""
    with open(folder / "key.csv", newline="") as file:
        return [
            Item(int(row["item"]), row["method"], int(row["picture"]), int(row["view"]), row["wanted"], float(row["weight"]), row["judges"])
            for row in csv.DictReader(file)
        ]


def agreement(names: Sequence[str], answers: Sequence[Sequence[str]], judges: Sequence[Sequence[str]]) -> str:
    """A table of kappa between readers, and of each judge with the readers' majority."""
    rows = [[f"{a} with {b}", *_agreement(x, y)] for (a, x), (b, y) in combinations(zip(names, answers), 2)]
    agreed = [majority(each) for each in zip(*answers)]
    rows += [[f"judge {k + 1} with the majority", *_agreement(judge, agreed)] for k, judge in enumerate(judges)]
    return markdown(["", "the same answer", "kappa", "kappa of letter or none"], rows)


def _agreement(a: Sequence[str], b: Sequence[str]) -> list[str]:
    letters = [["letter" if answer in LETTERS else "none" for answer in each] for each in (a, b)]
    return [f"{sum(x == y for x, y in zip(a, b)) / len(a):.0%}", f"{kappa(a, b):.2f}", f"{kappa(*letters):.2f}"]


def calibration(items: Sequence[Item], agreed: Sequence[str]) -> str:
    """A table: of the items that so many judges read as wanted, the share that the readers' majority does, weighted back to all pictures
    (a view that all judges read is drawn more often where they read the other view too)."""
    rows = []
    for count in range(len(items[0].judges) + 1):
        found = [(item.weight, answer == item.wanted) for item, answer in zip(items, agreed) if item.judges.count(item.wanted) == count]
        total, right = sum(weight for weight, _ in found), sum(weight for weight, hit in found if hit)
        rows.append([str(count), str(len(found)), f"{right / total:.0%}" if found else "-"])
    return markdown(["judges that read it as wanted", "items", "readers do"], rows)


@dataclass(frozen=True)
class Picture:
    """A picture of a method, all of whose views were shown. letters: wanted, in order of the views.  stratum: how many judges read all
    views as wanted, as `chosen` parts them: all, some (None) or none.  right: whether the readers did."""

    letters: str
    stratum: bool | None
    weight: float
    right: bool


def both_read(items: Sequence[Item], answers: Sequence[str]) -> dict[str, list[Picture]]:
    """By method, its pictures."""
    views: dict[tuple[str, int], list[tuple[Item, bool]]] = {}
    for item, answer in zip(items, answers):
        views.setdefault((item.method, item.picture), []).append((item, answer == item.wanted))
    found: dict[str, list[Picture]] = {}
    for (method, _), shown in views.items():
        shown.sort(key=lambda each: each[0].view)
        hits = [all(item.judges[k] == item.wanted for item, _ in shown) for k in range(len(shown[0][0].judges))]
        stratum = None if any(hits) != all(hits) else all(hits)
        letters = "".join(item.wanted for item, _ in shown)
        found.setdefault(method, []).append(Picture(letters, stratum, shown[0][0].weight, all(right for _, right in shown)))
    return found


def weighted_rate(pictures: Sequence[Picture]) -> float:
    """The share read right of all of a method's pictures."""
    return sum(each.weight for each in pictures if each.right) / sum(each.weight for each in pictures)


def stratified_interval(pictures: Sequence[Picture]) -> tuple[float, float]:
    """95 % bounds of the `weighted_rate` of all of a method's pictures: each stratum has the interval of its own share (`rate_interval`,
    which counts pairs of letters in either order once), and their distances from it add up as squares, as those of independent errors.
    A stratum of a single pair says nothing: its bounds are 0 and 1.

    Source: Zou & Donner 2008, Statistics in Medicine 27, for sums of any estimates with intervals.
    """
    total, below, above = sum(each.weight for each in pictures), 0.0, 0.0
    for stratum in {each.stratum for each in pictures}:
        held = [each for each in pictures if each.stratum == stratum]
        pairs = [sorted(each.letters) for each in held]
        right = torch.tensor([float(each.right) for each in held])
        clusters = torch.tensor([pairs.index(pair) for pair in pairs])
        low, high = 0.0, 1.0
        if len(clusters.unique()) > 1:
            found = rate_interval(right, torch.ones_like(right), clusters)
            low, high = found.low, found.high
        share, rate = sum(each.weight for each in held) / total, float(right.mean())
        below, above = below + (share * (rate - low)) ** 2, above + (share * (high - rate)) ** 2
    rate = weighted_rate(pictures)
    return max(rate - below**0.5, 0.0), min(rate + above**0.5, 1.0)


def rates(items: Sequence[Item], answers: Sequence[Sequence[str]]) -> str:
    """A table of the share of each method's pictures that are read in both views: by the readers' majority, by each reader, by each judge,
    weighted back to all of the method's pictures."""
    judges = list(zip(*(item.judges for item in items)))
    columns = [[majority(each) for each in zip(*answers)], *answers, *judges]
    found = [both_read(items, column) for column in columns]
    rows = []
    for method, pictures in found[0].items():
        shares = [weighted_rate(each[method]) for each in found]
        low, high = stratified_interval(pictures)
        readers, of_judges = shares[1 : 1 + len(answers)], shares[1 + len(answers) :]
        cells = [f"{shares[0]:.1%} ({low:.1%} to {high:.1%})"]
        rows.append([method, str(len(pictures)), *cells, *(f"{min(each):.1%} to {max(each):.1%}" for each in (readers, of_judges))])
    return markdown(["method", "pictures", "the majority reads both", "single readers", "judges"], rows)


def score(folder: Path, files: Sequence[Path]) -> str:
    """The tables of a study. Raises ValueError, FileNotFoundError."""
    items = read_key(folder)
    answers = [read_answers(file, [item.item for item in items]) for file in files]
    judges = [[item.judges[k] for item in items] for k in range(len(items[0].judges))]
    agreed = [majority(each) for each in zip(*answers)]
    return "\n".join([agreement([file.stem for file in files], answers, judges), calibration(items, agreed), rates(items, answers)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    drawing = commands.add_parser("draw", help="make the sheets and the key")
    drawing.add_argument("methods", nargs="+", metavar="NAME=DIR/MODEL")
    drawing.add_argument("--num-pictures", type=int, default=200)
    drawing.add_argument("--num-seeds", type=int, default=1, help="that the evaluation was given")
    drawing.add_argument("--seed", type=int, default=0)
    drawing.add_argument("--out", type=Path, required=True)
    scoring = commands.add_parser("score", help="print the tables")
    scoring.add_argument("study", type=Path)
    scoring.add_argument("--answers", type=Path, nargs="+", required=True)
    args = parser.parse_args()
    try:
        if args.command == "score":
            print(score(args.study, args.answers), end="")
            return
        if odd := [text for text in args.methods if not all(text.partition("="))]:
            raise ValueError(f"got '{odd[0]}', wanted NAME=DIR/MODEL")
        methods = dict(text.split("=", 1) for text in args.methods)
        if len(methods) < len(args.methods):
            raise ValueError(f"{len(args.methods)} methods have {len(methods)} names: give each its own")
        draw({name: Method.open(Path(folder), args.num_seeds) for name, folder in methods.items()}, args.num_pictures, args.out, args.seed)
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    main()
