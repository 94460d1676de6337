"""Pictures of things, with captions, from open sets of drawings: the second small world's data.

    for s in noto noto-v1 fxemoji fluent-emoji fluent-emoji-flat twemoji emojione streamline-emojis; do npm pack @iconify-json/$s; done
    python data/icons.py --packages FOLDER_OF_TGZ --out shards/things --num-train 100000 --size 64 --names configs/things/names.txt

writes OUT/train, OUT/val and OUT/test. A sample is a `png`, its caption (`txt`) and what it shows, from which drawing (`json`).
Sample `index` of a split is drawn by the generator of (seed, split, index): splits share no seed, and neither the number of workers nor the
shard size changes a picture. The test split is drawn from whole sets, so in styles, that the other splits never use. Needs resvg-py.
"""

from __future__ import annotations

import hashlib
import io
import math
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL import __version__ as pillow_version

from eqldm.command import Parser, whole
from eqldm.data.making import console, make_folder
from eqldm.data.pictures import read_drawing
from eqldm.data.shards import write_shard
from eqldm.data.workers import run_jobs
from eqldm.paths import path_option
from glyphs import COLOURS
from icon_sets import CATEGORIES, SYNONYMS, Drawing, IconSet, choose, drawings, read_names, read_sets
from splits import SPLITS, add_options, block_order, check_options, exit_status, pop_splits, sample_rng, shard_jobs

GENERATOR_VERSION = 1  # to be raised by any change that changes a picture
HELD_OUT_SETS = ("streamline-emojis",)  # outlined, as no other one is
STYLES = {"fluent-emoji": "shaded", "fluent-emoji-flat": "flat", "twemoji": "flat", "streamline-emojis": "line"}
FLAT_STYLE = "cartoon"  # of the others

FILL = (0.75, 0.95)  # the longer side of the thing, as a fraction of the picture's side
MAX_ROTATION_DEGREES = 10.0  # a turned thing must stay upright
MARGIN = 0.02  # that the thing keeps from the edge
BRIGHTNESS, SATURATION, MAX_HUE_DEGREES = (0.9, 1.08), (0.85, 1.15), 8.0
BACKGROUND_JITTER = 12  # of 255; small enough for each colour to keep its name
WHITE, GRADIENT, GREY, MIRRORED = 0.45, 0.12, 0.02, 0.5  # shares of the pictures
MIN_DISTANCE = 70.0  # of the background's colour from that of the thing's rim, in RGB
NAMED, STYLED, SYNONYM = 0.4, 0.08, 0.25  # shares of the captions: with the background's colour, with the style, by another name
SUPERSAMPLE = 2  # drawings are rendered and placed at twice the size, then reduced

# Which side is which one knows: letters, figures, and what is worn or held on one side
HANDED = {
    "alarm-clock", "ambulance", "books", "calendar", "computer-mouse", "desktop-computer", "floppy-disk", "fire-engine", "game-die",
    "globe-showing-americas", "globe-showing-europe-africa", "keyboard", "musical-note", "pool-8-ball", "slot-machine",
    "statue-of-liberty", "stopwatch", "taxi", "watch", "compass", "newspaper", "world-map", "musical-score", "ticket",
    "admission-tickets", "stop-sign", "hospital", "zzz", "hundred-points",
}  # fmt: skip
SINGULAR = ("ss", "us", "is", "abacus", "compass")  # endings of words that are no plurals
PLURAL = {"skis", "jeans", "glasses", "sunglasses", "peanuts", "bubbles", "socks"}
JOINS = (" of ", " with ", " on ", " and ", " in ", " showing ", " behind ", " fluttering ", " without ")


def spoken(name: str) -> str:
    """A name with its article, where it is no plural: "a penguin", "an ear of corn", "french fries"."""
    words = name.replace("-", " ")
    head = words
    for join in JOINS:
        head = head.partition(join)[0]
    last = head.split()[-1]
    if last in PLURAL or (last.endswith("s") and not last.endswith(SINGULAR)):
        return words
    return f"an {words}" if words[0] in "aeiou" and not words.startswith(("un", "eu", "uk", "ufo")) else f"a {words}"


def render(drawing: Drawing, side: int) -> np.ndarray:
    """A drawing cut to its ink, its longer side `side` px: uint8 [side, side, 4], premultiplied. Raises ValueError where there is none."""
    try:
        import resvg_py
    except ImportError as error:
        raise ValueError("drawings are rendered with resvg, which is not installed: pip install resvg-py") from error
    content = resvg_py.svg_to_bytes(svg_string=drawing.svg, width=2 * side, height=2 * side, skip_system_fonts=True)
    picture = read_drawing(bytes(content))
    box = picture.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox()
    if box is None:
        raise ValueError("it is blank")
    picture = picture.crop(box).convert("RGBa")
    scale = side / max(picture.size)
    picture = picture.resize([max(1, round(scale * edge)) for edge in picture.size], Image.Resampling.LANCZOS)
    whole = Image.new("RGBa", (side, side))
    whole.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.frombuffer(whole.tobytes(), np.uint8).reshape(side, side, 4)


def render_all(job: tuple[Sequence[Drawing], int]) -> list[np.ndarray | str]:
    """`render` of each drawing, or why it cannot be used."""
    found: list[np.ndarray | str] = []
    for drawing in job[0]:
        try:
            found.append(render(drawing, job[1]))
        except ValueError as error:
            if "pip install" in str(error):
                raise
            found.append(str(error))
    return found


def write_sprites(path: Path, chosen: Sequence[Drawing], side: int, workers: int) -> tuple[list[Drawing], list[dict]]:
    """Renders drawings into an array file [N, side, side, 4]; which ones it holds, and `{file, reason}` of the others."""
    parts = {str(first): (chosen[first : first + 64], side) for first in range(0, len(chosen), 64)}
    rendered = dict(run_jobs(parts, render_all, workers))
    pairs = list(zip(chosen, (each for name in parts for each in rendered[name])))
    skipped = [
        {"file": f"{drawing.set}:{drawing.icon}", "reason": f"cannot be drawn ({each})"} for drawing, each in pairs if isinstance(each, str)
    ]
    np.save(path, np.stack([each for _, each in pairs if not isinstance(each, str)]))
    return [drawing for drawing, each in pairs if not isinstance(each, str)], skipped


def colour_matrix(hue_degrees: float, saturation: float, brightness: float) -> np.ndarray:
    """[3, 3], which turns RGB about the grey axis, and scales the distance from it, and all. Greys keep their hue."""
    axis = np.full((3, 3), 1 / 3)
    angle = math.radians(hue_degrees)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    turn = math.cos(angle) * (np.eye(3) - axis) + math.sin(angle) * cross
    return brightness * (axis + saturation * turn)


def place(sprite: np.ndarray, how: dict, size: int) -> np.ndarray:
    """The drawing turned, mirrored, scaled and shifted into the picture: premultiplied RGBA, float [size, size, 4], 0 to 1."""
    side, source = size * SUPERSAMPLE, sprite.shape[0]
    angle = math.radians(how["rotation_degrees"])
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # y points down
    sprite = np.ascontiguousarray(sprite[:, ::-1]) if how["mirrored"] else sprite
    ink = sprite[..., 3] > 64
    rows = np.flatnonzero(ink.any(1))
    # First and last ink of each row: no other points can be the extremes of a linear map of the thing
    ends = np.concatenate([ink[rows].argmax(1), source - ink[rows, ::-1].argmax(1)])
    points = turn @ np.stack([ends, np.concatenate([rows, rows]) + 0.5]) - (turn @ np.full((2, 1), source / 2))
    low, high = points.min(1), points.max(1)
    scale = how["fill"] * side / (high - low).max()
    room = np.maximum(0.5 - MARGIN - (high - low) * scale / side / 2, 0)
    shift = np.array(how["shift"]) * room * side - scale * (low + high) / 2
    inverse = np.linalg.inv(turn) / scale
    offset = inverse @ (-side / 2 - shift) + source / 2
    data = (*inverse[0], offset[0], *inverse[1], offset[1])
    picture = Image.frombytes("RGBa", (source, source), sprite.tobytes())
    moved = picture.transform((side, side), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR).reduce(SUPERSAMPLE)
    return np.frombuffer(moved.tobytes(), np.uint8).reshape(size, size, 4).astype(np.float32) / 255


def rim_colour(picture: np.ndarray) -> np.ndarray:
    """[3] mean colour of a placed drawing where it ends, 0 to 255."""
    alpha = picture[..., 3]
    padded = np.pad(alpha, 2)
    inner = np.minimum.reduce([padded[2:-2, :-4], padded[2:-2, 4:], padded[:-4, 2:-2], padded[4:, 2:-2]])
    rim = (alpha > 0.6) & (inner < 0.6)
    rim = rim if rim.any() else alpha > 0.3
    return 255 * (picture[rim, :3] / picture[rim, 3:]).mean(0) if rim.any() else np.full(3, 128.0)


def draw_background(rng: np.random.Generator, rim: np.ndarray) -> dict:
    """Colour names and RGB values of a background that the thing stands out from: one colour, or from one to another one."""
    names = list(COLOURS)
    for _ in range(20):
        name = "white" if rng.random() < WHITE else names[int(rng.integers(len(names)))]
        jitter = 0 if name == "white" and rng.random() < 0.5 else BACKGROUND_JITTER
        rgb = np.clip(np.array(COLOURS[name]) + rng.integers(-jitter, jitter + 1) + rng.integers(-jitter // 2, jitter // 2 + 1, 3), 0, 255)
        if name == "white" and not jitter:
            rgb = np.full(3, 255)
        if np.linalg.norm(rgb - rim) > MIN_DISTANCE:
            break
    end = None
    if rng.random() < GRADIENT:
        end = np.clip(rgb * rng.uniform(0.6, 0.9) + rng.uniform(0, 50), 0, 255).round().astype(int).tolist()
    return {"background": name, "background_rgb": rgb.tolist(), "background_end_rgb": end, "gradient_degrees": float(rng.uniform(0, 360))}


def paint_background(how: dict, size: int) -> np.ndarray:
    """[size, size, 3], 0 to 1."""
    start = np.array(how["background_rgb"], np.float32) / 255
    if how["background_end_rgb"] is None:
        return np.broadcast_to(start, (size, size, 3))
    angle = math.radians(how["gradient_degrees"])
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1) - 0.5
    share = (x * math.cos(angle) + y * math.sin(angle)) / math.sqrt(2) + 0.5
    return start + share[..., None] * (np.array(how["background_end_rgb"], np.float32) / 255 - start)


def draw_thing(
    rng: np.random.Generator, drawing: Drawing, sprite: np.ndarray, size: int, variation: float = 1.0
) -> tuple[np.ndarray, dict]:
    """A picture of a thing, uint8 [size, size, 3], and all parameters of its drawing.

    variation: 1 draws over the whole ranges of shape, place and colour, 0 takes their middles; backgrounds vary in any case.
    """

    def between(low: float, high: float) -> float:
        return float(variation * rng.uniform(low, high) + (1 - variation) * (low + high) / 2)

    how: dict = {
        "name": drawing.name,
        "set": drawing.set,
        "category": drawing.category,
        "icon": drawing.icon,
        "fill": between(*FILL),
        "rotation_degrees": between(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES),  # counter-clockwise
        "shift": [between(-1, 1), between(-1, 1)],  # of the room that is left
        "mirrored": bool(rng.random() < MIRRORED * variation) and drawing.name not in HANDED,
        "hue_degrees": between(-MAX_HUE_DEGREES, MAX_HUE_DEGREES),
        "saturation": between(*SATURATION),
        "brightness": between(*BRIGHTNESS),
    }
    if rng.random() < GREY * variation:
        how["saturation"] = 0.0
    placed = place(sprite, how, size)
    alpha = placed[..., 3:]
    ink = np.clip(placed[..., :3] @ colour_matrix(how["hue_degrees"], how["saturation"], how["brightness"]).T.astype(np.float32), 0, alpha)
    how |= draw_background(rng, rim_colour(np.concatenate([ink, alpha], -1)))
    picture = ink + (1 - alpha) * paint_background(how, size)
    return np.rint(255 * np.clip(picture, 0, 1)).astype(np.uint8), how


def draw_caption(rng: np.random.Generator, how: dict) -> str:
    """ "a penguin", "a penguin on a yellow background", "a flat drawing of a penguin"; now and then by another name of the thing."""
    name = how["name"]
    if name in SYNONYMS and rng.random() < SYNONYM:
        name = SYNONYMS[name]
    thing, kind = spoken(name), rng.random()
    if how["saturation"] == 0:
        thing = f"a grey drawing of {thing}"
    elif kind < STYLED:
        return f"a {STYLES.get(how['set'], FLAT_STYLE)} drawing of {thing}"
    if kind > 1 - NAMED:
        return f"{thing} on {spoken(how['background'])} background"
    return thing


@lru_cache(maxsize=2)
def _sprites(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


_order = lru_cache(maxsize=64)(block_order)


def draw_sample(index: int, split: str, seed: int, chosen: Sequence[Sequence[tuple[int, Drawing]]], names: Sequence[str], sprites: Path,
                size: int, variation: float = 1.0) -> dict:  # fmt: skip
    """One sample for `write_shard`: png, txt and json. Each block of as many samples as there are things shows each thing once.

    chosen: of each thing, its drawings and their places in `sprites`.  names: whose order gives the labels.
    """
    rng = sample_rng(seed, split, index)
    block, place_in_block = divmod(index, len(chosen))
    of_thing = chosen[int(_order(seed, split, block, len(chosen))[place_in_block])]
    row, drawing = of_thing[int(rng.integers(len(of_thing)))]
    picture, how = draw_thing(rng, drawing, _sprites(sprites)[row], size, variation)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
    how = {"label": names.index(drawing.name), **how}
    return {"__key__": f"{index:09d}", "png": buffer.getvalue(), "txt": draw_caption(rng, how), "json": how}


def write_thing_shard(job: tuple[Path, range], **options) -> dict:
    path, indices = job
    return write_shard(path, (draw_sample(index, **options) for index in indices))


def _digest(found: Sequence[Drawing]) -> str:
    return hashlib.sha256("\n".join(f"{each.set} {each.name} {each.category} {each.svg}" for each in found).encode()).hexdigest()[:16]


def make_splits(
    out: Path,
    nums: dict[str, int],
    sets: Sequence[IconSet],
    chosen: Sequence[Drawing],
    *,
    size: int = 64,
    seed: int = 0,
    shard_size: int = 2000,
    workers: int = 1,
    variation: float = 1.0,
    holdout_sets: Sequence[str] = HELD_OUT_SETS,
    overwrite: bool = False,
) -> dict[str, dict]:
    """Write the shards of splits to `out/SPLIT`; returns the manifests. Resumes, or does nothing where all is made.

    nums: pictures of each split.  chosen: the drawings, of which those of `holdout_sets` make the test split, and the others train and val.
    Raises: ValueError where options are wrong, nothing is left for a split, or a folder holds a split made with others.
    """
    for num in nums.values():
        check_options(num, size, seed, shard_size, variation)
    known = [each.name for each in sets]
    if unknown := [name for name in holdout_sets if name not in known]:
        raise ValueError(f"--holdout-sets names {', '.join(unknown)}, which is not among the sets used: {', '.join(known)}")
    manifests = {}
    names = sorted({each.name for each in chosen})  # of all splits: a label means one thing
    with tempfile.TemporaryDirectory(prefix="eqldm-icons-") as scratch:
        for test in sorted({split == "test" for split in nums}):
            wanted = [each for each in chosen if (each.set in holdout_sets) == test]
            sprites = Path(scratch) / f"{test}.npy"
            if not wanted:
                raise ValueError(
                    f"no drawing is left for {'the test split: hold out' if test else 'training: hold out fewer'} --holdout-sets"
                )
            drawn, skipped = write_sprites(sprites, wanted, SUPERSAMPLE * size, workers)
            for item in skipped:
                console.print(f"{item['file']} is not used: it {item['reason']}", markup=False, highlight=False)
            things: dict[str, list[tuple[int, Drawing]]] = {}
            for row, drawing in enumerate(drawn):
                things.setdefault(drawing.name, []).append((row, Drawing(drawing.name, drawing.category, drawing.set, drawing.icon, "")))
            for split in (split for split in SPLITS if split in nums and (split == "test") == test):
                by_name = [things[name] for name in sorted(things)]
                options: dict[str, Any] = dict(split=split, seed=seed, chosen=by_name, names=names, sprites=sprites,
                               size=size, variation=variation)  # fmt: skip
                generator = {
                    "name": "icons",
                    "version": GENERATOR_VERSION,
                    **{"split": split, "num": nums[split], "size": size, "seed": seed, "variation": variation, "shard_size": shard_size},
                    "sets": {each.name: each.version for each in sets if (each.name in holdout_sets) == test},
                    "drawings": _digest(drawn),
                }
                about = {
                    "kind": "pictures",
                    "image_size": size,
                    "generator": generator,
                    "names_of_labels": names,
                    "sources": [each.about() for each in sets if (each.name in holdout_sets) == test],
                    "skipped": skipped,
                    "made_with": {"pillow": pillow_version, "numpy": np.__version__},
                }
                jobs = shard_jobs(out / split, split, nums[split], shard_size)
                write = partial(write_thing_shard, **options)
                manifests[split] = make_folder(out / split, jobs, write, about, workers=workers, overwrite=overwrite)
    return manifests


def make(
    packages: Path, out: Path, nums: dict[str, int], sets: Sequence[str] | None, holdout_sets: Sequence[str] | None, names: Path | None,
    categories: Sequence[str] | None, min_drawings: int, **options: Any,
) -> None:  # fmt: skip
    """What the command does. Raises as `read_sets`, `read_names`, `choose` and `make_splits`."""
    used, left_out = read_sets(packages, sets)
    for name in left_out:
        console.print(f"set {name} is not used: its licence asks to share alike; --sets takes it nevertheless", highlight=False)
    chosen = choose(drawings(used), read_names(names) if names else None, categories, min_drawings)
    if holdout_sets is None:
        holdout_sets = [name for name in HELD_OUT_SETS if name in {each.name for each in used}]
    make_splits(out, nums, used, chosen, holdout_sets=holdout_sets, **options)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--packages", type=path_option, required=True, metavar="FOLDER", help="of .tgz that npm pack gives")
    add_options(parser, 100000, 2000, "size, place, tilt and colours")
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="only these (default: all but share-alike ones)")
    parser.add_argument("--holdout-sets", nargs="+", metavar="NAME", help=f"for the test split (default: {', '.join(HELD_OUT_SETS)})")
    parser.add_argument("--names", type=path_option, metavar="FILE", help="only these things, one a line")
    parser.add_argument("--categories", nargs="+", choices=CATEGORIES, help="only things of these kinds")
    parser.add_argument("--min-drawings", type=whole(1, 1000), default=1, help="only things drawn so often, over all sets")
    parser.add_argument("--overwrite", action="store_true")
    options = vars(parser.parse_args(argv))
    nums = pop_splits(options)
    return exit_status(lambda: make(nums=nums, **options))


if __name__ == "__main__":
    sys.exit(main())
