"""Pictures of the capital letters A-Z, with captions: the small world's data.

    python data/glyphs.py --out FOLDER --num-train 40000 --num-val 1000 --num-test 2000 --size 64

writes FOLDER/train, FOLDER/val and FOLDER/test. A sample is a `png`, its caption (`txt`) and how it was drawn (`json`).
Sample `index` of a split is drawn by the generator of (seed, split, index): splits share no seed, and neither the number
of workers nor the shard size changes a picture. The test split is drawn with faces that the other splits never use.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, features
from PIL import __version__ as pillow_version

from eqldm.command import Parser
from eqldm.data.making import console, make_folder
from eqldm.data.shards import write_shard
from eqldm.paths import path_option
from splits import SPLITS, add_options, block_order, check_options, exit_status, pop_splits, sample_rng, shard_jobs

GENERATOR_VERSION = 1  # to be raised by any change that changes a picture
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# The faces of matplotlib's that draw Latin capitals. Left out: STIX sizes and non-Unicode, DejaVu Display and Last Resort
# (no letters), cmex10 (symbols at the letters' places), cmsy10 (script capitals, whose I, J and T can hardly be told apart).
FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSans-Oblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "DejaVuSerif-Italic",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralBolIta",
    "STIXGeneralItalic",
    "cmb10",
    "cmmi10",
    "cmr10",
    "cmss10",
    "cmti10",
    "cmtt10",
)
# A sans and a slab serif, each the only face of its family, so that no sibling of theirs is seen in training.
HELD_OUT_FACES = ("cmss10", "cmtt10")

COLOURS = {
    "red": (226, 42, 40),
    "orange": (245, 135, 25),
    "yellow": (245, 220, 50),
    "green": (40, 150, 60),
    "cyan": (60, 205, 220),
    "blue": (28, 50, 178),
    "purple": (120, 45, 155),
    "pink": (248, 150, 195),
    "brown": (110, 65, 30),
    "black": (18, 18, 18),
    "white": (242, 242, 242),
    "grey": (135, 135, 135),
}
BRIGHTNESS_JITTER, CHANNEL_JITTER = 14, 8  # of 255; small enough for each colour to keep its name
MIN_CONTRAST = 2.0  # ratio of relative luminances (WCAG 2.1). Its 3.0 for large text would leave grey three partners

FILL = (0.55, 0.85)  # the longer side of the letter's ink, as a fraction of the picture's side
MAX_ROTATION_DEGREES = 10.0  # a turned letter must stay that letter
MAX_SLANT = 0.2  # horizontal shift per height
STRETCH = (0.85, 1.2)  # width, against height
MAX_STROKE = 0.025  # added around the letter, as a fraction of the font size
MAX_WARP = 0.03  # displacement, as a fraction of the side
MAX_SHIFT = 0.12  # of the centre, as a fraction of the side
MARGIN = 0.05  # that the unwarped letter keeps from the edge: more than the warp moves it

SUPERSAMPLE = 2  # the letter is placed at twice the size, then reduced
MESH_CELLS = 8  # per side: the warp is sampled at their corners and is bilinear inside


def letter_label(seed: int, split: str, index: int) -> int:
    """Label 0-25 of a sample: each block of 26 samples is a permutation of the alphabet."""
    block, place = divmod(index, len(LETTERS))
    return int(block_order(seed, split, block, len(LETTERS))[place])


def contrast(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Contrast ratio of two RGB colours (0-255): 1 for equal luminance, 21 for black on white. Source: WCAG 2.1."""

    def luminance(rgb: tuple[int, ...]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def draw_colours(rng: np.random.Generator, names: Sequence[str] = tuple(COLOURS)) -> dict:
    """Names and RGB values of a foreground and a background of different names and at least MIN_CONTRAST."""

    def jittered(name: str) -> tuple[int, ...]:
        shift = rng.integers(-BRIGHTNESS_JITTER, BRIGHTNESS_JITTER + 1)
        shifts = rng.integers(-CHANNEL_JITTER, CHANNEL_JITTER + 1, 3)
        return tuple(int(min(255, max(0, c + shift + s))) for c, s in zip(COLOURS[name], shifts))

    while True:
        foreground, background = (names[i] for i in rng.choice(len(names), 2, replace=False))
        rgb, background_rgb = jittered(foreground), jittered(background)
        if contrast(rgb, background_rgb) >= MIN_CONTRAST:
            return {"foreground": foreground, "background": background, "foreground_rgb": rgb, "background_rgb": background_rgb}


@lru_cache(maxsize=256)
def _font(face: Path, font_size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(face), font_size, layout_engine=ImageFont.Layout.BASIC)


def letter_mask(face: Path, letter: str, font_size: int, stroke: int = 0) -> Image.Image:
    """Ink of a letter, mode L, with an empty border of 2 px; 0 x 0 px plus border where the face draws nothing."""
    font = _font(face, font_size)
    left, top, right, bottom = font.getbbox(letter, stroke_width=stroke)
    mask = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(mask).text((2 - left, 2 - top), letter, fill=255, font=font, stroke_width=stroke)
    return mask


def place_letter(mask: Image.Image, how: dict, size: int) -> Image.Image:
    """Ink of the letter turned, slanted, stretched, scaled, shifted and warped into the picture: mode L, size x size px."""
    side = size * SUPERSAMPLE
    angle = math.radians(how["rotation_degrees"])
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # y points down
    matrix = turn @ [[how["stretch"], -how["slant"]], [0, 1]]

    ink = np.asarray(mask) > 64
    rows = np.flatnonzero(ink.any(1))
    # First and last ink of each row: no other points can be the extremes of a linear map of the letter
    ends = np.concatenate([ink[rows].argmax(1), ink.shape[1] - 1 - ink[rows, ::-1].argmax(1)])
    points = matrix @ (np.stack([ends, np.concatenate([rows, rows])]) + 0.5)
    low, high = points.min(1), points.max(1)
    scale = how["fill"] * side / (high - low).max()
    room = np.maximum(0.5 - MARGIN - (high - low) * scale / side / 2, 0)
    shift = np.clip(how["shift"], -room, room) * side

    nodes = np.linspace(0, 1, MESH_CELLS + 1)
    u, v = np.meshgrid(nodes, nodes)
    moved = [axis + a * np.sin(2 * math.pi * (fu * u + fv * v + phase)) for axis, (a, fu, fv, phase) in zip((u, v), how["warp"])]
    target = (np.stack(moved).reshape(2, -1) - 0.5) * side - shift[:, None]
    source = np.linalg.inv(matrix) @ (target / scale + ((low + high) / 2)[:, None])
    x, y = source.reshape(2, MESH_CELLS + 1, MESH_CELLS + 1).tolist()
    cell = side // MESH_CELLS
    mesh = [
        (
            (j * cell, i * cell, (j + 1) * cell, (i + 1) * cell),
            (x[i][j], y[i][j], x[i + 1][j], y[i + 1][j], x[i + 1][j + 1], y[i + 1][j + 1], x[i][j + 1], y[i][j + 1]),
        )
        for i in range(MESH_CELLS)
        for j in range(MESH_CELLS)
    ]
    return mask.transform((side, side), Image.Transform.MESH, mesh, Image.Resampling.BILINEAR).reduce(SUPERSAMPLE)


def draw_glyph(
    rng: np.random.Generator,
    letter: str,
    face: Path,
    size: int,
    variation: float = 1.0,
    colours: Sequence[str] = tuple(COLOURS),
) -> tuple[np.ndarray, dict]:
    """A picture of one letter, uint8 [size, size, 3], and all parameters of its drawing.

    variation: 1 draws over the whole ranges of shape and place, 0 takes their middles; colours vary in any case.
    """

    def between(low: float, high: float, count: int | None = None):
        return variation * rng.uniform(low, high, count) + (1 - variation) * (low + high) / 2

    how = {
        "letter": letter,
        "label": LETTERS.index(letter),
        "face": face.stem,
        **draw_colours(rng, colours),
        "fill": between(*FILL),
        "rotation_degrees": between(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES),  # counter-clockwise
        "slant": between(-MAX_SLANT, MAX_SLANT),
        "stretch": between(*STRETCH),
        "stroke": between(0, MAX_STROKE),
        "shift": between(-MAX_SHIFT, MAX_SHIFT, 2).tolist(),
        # per axis: amplitude, waves across and down the picture, phase
        "warp": [[variation * rng.uniform(0, MAX_WARP), *rng.uniform(-1, 1, 2), rng.uniform()] for _ in range(2)],
    }
    font_size = round(1.2 * SUPERSAMPLE * size)  # near the final size, so that placing neither blurs nor aliases
    mask = place_letter(letter_mask(face, letter, font_size, round(how["stroke"] * font_size)), how, size)
    background = Image.new("RGB", (size, size), how["background_rgb"])
    background.paste(how["foreground_rgb"], (0, 0, size, size), mask)
    return np.asarray(background), how


def draw_caption(rng: np.random.Generator, how: dict) -> str:
    """ "the letter A", or (half of the time) "a red letter A on a blue background"."""
    if rng.random() < 0.5:
        return f"the letter {how['letter']}"
    one, other = (f"an {name}" if name[0] in "aeiou" else f"a {name}" for name in (how["foreground"], how["background"]))
    return f"{one} letter {how['letter']} on {other} background"


def draw_sample(
    index: int,
    split: str,
    seed: int,
    faces: list[Path],
    size: int,
    variation: float = 1.0,
    colours: Sequence[str] = tuple(COLOURS),
) -> dict:
    """One sample for `write_shard`: png, txt and json."""
    rng = sample_rng(seed, split, index)
    face = faces[int(rng.integers(len(faces)))]
    picture, how = draw_glyph(rng, LETTERS[letter_label(seed, split, index)], face, size, variation, colours)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    return {"__key__": f"{index:09d}", "png": buffer.getvalue(), "txt": draw_caption(rng, how), "json": how}


def write_glyph_shard(job: tuple[Path, range], **options) -> dict:
    path, indices = job
    return write_shard(path, (draw_sample(index, **options) for index in indices))


def why_unfit(face: Path) -> str | None:
    """Why a face cannot be used: it is no font, or some capitals are blank or look the same; None where it can be."""
    try:
        masks = [letter_mask(face, letter, 48) for letter in LETTERS]
    except OSError as error:
        return f"cannot be read ({error})"
    blank = [letter for letter, mask in zip(LETTERS, masks) if mask.getbbox() is None]
    if blank:
        return f"draws nothing for {''.join(blank)}"
    return "draws some letters alike" if len({(m.size, m.tobytes()) for m in masks}) < len(LETTERS) else None


def find_faces(fonts: list[Path] | None = None) -> tuple[list[Path], list[dict]]:
    """Font files of FACES and of the user's folders, and `{file, reason}` of the user's files that cannot be used.

    Raises: FileNotFoundError where matplotlib lacks a face or a folder holds no font; ValueError where names clash.
    """
    from matplotlib import get_data_path  # costs time to import, and the workers need it not

    folder = Path(get_data_path()) / "fonts" / "ttf"
    faces = [folder / f"{name}.ttf" for name in FACES]
    for face in faces:
        if why_unfit(face):
            raise FileNotFoundError(f"face '{face}' {why_unfit(face)}: install matplotlib anew (it brings the faces)")
    skipped = []
    for fonts_folder in fonts or []:
        files = sorted(path for path in fonts_folder.rglob("*") if path.suffix.lower() in (".ttf", ".otf"))
        if not files:
            raise FileNotFoundError(f"--fonts '{fonts_folder}' holds no fonts, wanted a folder with .ttf or .otf files")
        for file in files:
            if reason := why_unfit(file):
                skipped.append({"file": file.relative_to(fonts_folder).as_posix(), "reason": reason})
            elif file.stem in {face.stem for face in faces}:
                raise ValueError(f"two faces are named '{file.stem}', the second is '{file}': rename or remove it")
            else:
                faces.append(file)
    return faces, skipped


def _check_colours(names: Sequence[str]) -> None:
    """Raises ValueError for unknown colours, and where no two of them have enough contrast."""
    if unknown := [name for name in names if name not in COLOURS]:
        raise ValueError(f"--colours names unknown colours: {', '.join(unknown)}. Known are {', '.join(COLOURS)}")
    if max((contrast(COLOURS[a], COLOURS[b]) for a, b in combinations(names, 2)), default=0) < 1.5 * MIN_CONTRAST:
        raise ValueError(f"--colours {' '.join(names)}: no two of them have enough contrast, add white or black")


def make_split(
    out: str | Path,
    split: str,
    num: int,
    *,
    size: int = 64,
    seed: int = 0,
    shard_size: int = 2000,
    workers: int = 1,
    variation: float = 1.0,
    colours: Sequence[str] = tuple(COLOURS),
    fonts: list[Path] | None = None,
    train_faces: list[str] | None = None,
    holdout_fonts: list[str] | None = None,
    overwrite: bool = False,
) -> dict:
    """Write the shards of one split to `out/split`; returns the manifest. Resumes, or does nothing where all is made.

    Raises: ValueError where options are wrong or the folder holds a split made with others.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got '{split}'")
    check_options(num, size, seed, shard_size, variation)
    _check_colours(colours)
    faces, skipped = find_faces(fonts)
    held_out = [*HELD_OUT_FACES, *(name for name in holdout_fonts or [] if name not in HELD_OUT_FACES)]
    known = [face.stem for face in faces]
    if unknown := [name for name in held_out if name not in known]:
        raise ValueError(f"--holdout-fonts names unknown faces: {', '.join(unknown)}. Known are {', '.join(known)}")
    if wrong := [name for name in train_faces or [] if name not in known or name in held_out]:
        raise ValueError(f"--train-faces names unknown or held-out faces: {', '.join(wrong)}. Known are {', '.join(known)}")
    used = [face for face in faces if (face.stem in held_out) == (split == "test")]
    if train_faces and split != "test":
        used = [face for face in used if face.stem in train_faces]
    if not used:
        raise ValueError("all faces are held out: leave some for training")

    write = partial(write_glyph_shard, split=split, seed=seed, faces=used, size=size, variation=variation, colours=list(colours))
    generator = {
        "name": "glyphs",
        "version": GENERATOR_VERSION,
        "split": split,
        "num": num,
        "size": size,
        "seed": seed,
        "variation": variation,
        "colours": list(colours),
        "shard_size": shard_size,
        "faces": [face.stem for face in used],
        "held_out_faces": held_out,
    }
    folder = Path(out) / split
    about = {
        "kind": "pictures",
        "image_size": size,
        "generator": generator,
        "skipped": skipped,
        "made_with": {"pillow": pillow_version, "freetype": features.version("freetype2"), "numpy": np.__version__},
    }
    jobs = shard_jobs(folder, split, num, shard_size)
    for item in skipped:
        console.print(f"font {item['file']} is not used: it {item['reason']}", markup=False, highlight=False)
    return make_folder(folder, jobs, write, about, workers=workers, overwrite=overwrite)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    add_options(parser, 40000, 1000, "size, place, slant, stroke and warp")
    parser.add_argument("--colours", nargs="+", default=list(COLOURS), metavar="NAME", help=f"some of {', '.join(COLOURS)}")
    parser.add_argument("--train-faces", nargs="+", metavar="NAME", help="only these faces for train and val (default: all)")
    parser.add_argument("--fonts", type=path_option, nargs="+", metavar="FOLDER", help="folders of further .ttf and .otf faces")
    parser.add_argument("--holdout-fonts", nargs="+", metavar="NAME", help="further faces to keep for the test split")
    parser.add_argument("--overwrite", action="store_true")
    options = vars(parser.parse_args(argv))
    nums = pop_splits(options)
    return exit_status(lambda: [make_split(split=split, num=num, **options) for split, num in nums.items()])


if __name__ == "__main__":
    sys.exit(main())
