"""Shards of squares from captioned pictures of any size.

    python data/make_shards.py --pictures FOLDER --out FOLDER --size 512    # a folder of pictures
    python data/make_shards.py --tars FOLDER --out FOLDER --size 512        # tars, as img2dataset and WebDataset write them
    python data/make_shards.py --dataset FOLDER --out FOLDER --size 512     # a data set of Hugging Face's `datasets`, saved to disk
    python data/make_shards.py --index FOLDER                               # no new shards: check tars of squares, write their manifest
    python data/make_shards.py --check FOLDER                               # no new shards: are they still what their manifest states?

Captions come, in a folder, from a `.txt` beside each picture, or from a `metadata.jsonl` or `metadata.csv` (columns `file_name` and
`text` or `caption`, as in Hugging Face's imagefolder); in tars from a sample's `.txt`, or the `caption` of its `.json`. Of a list of
captions one is drawn. What does not fit is skipped, counted by reason, and named in the manifest; what is left out is counted by reason
and ending. A disk or network that fails stops the run, and the same command goes on. The same input gives the same bytes, whatever
`--workers`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eqldm.command import Parser, error_line, real, whole
from eqldm.data.captions import draw_caption, is_odd
from eqldm.data.checking import index_folder
from eqldm.data.integrity import check_folder
from eqldm.data.listing import check_share, count_left_out, describe_left_out, left_out_list
from eqldm.data.making import console, make_folder, num_cores
from eqldm.data.pictures import MAX_PIXELS, UnfitPicture
from eqldm.data.shards import MANIFEST, read_index, write_shard
from eqldm.data.sources import PictureFolder, PictureTars, SavedDataset, Source, UnfitCaption
from eqldm.paths import path_option
from eqldm.ranges import PICTURE_SIDE, SEED, WORKERS, Range

DEFAULT_QUALITY = 95  # of jpg and webp


def _crop_rng(seed: int, name: str) -> np.random.Generator:  # of the name, not the index: adding pictures moves no crop
    return np.random.default_rng(np.frombuffer(hashlib.sha256(f"{seed}/{name}".encode()).digest(), np.uint32))


def make_square(picture: Image.Image, name: str, options: dict) -> tuple[bytes, dict[str, Any]]:
    """The picture resized and cropped to a square, encoded; and what was done. Raises: UnfitPicture where its size is unfit."""
    size, (width, height) = options["size"], picture.size
    if options["max_aspect"] and max(width, height) > options["max_aspect"] * min(width, height):
        raise UnfitPicture(f"too long: {width}x{height}, wanted at most {options['max_aspect']:g} times as long as wide")
    if min(width, height) < size and not options["upscale"]:
        raise UnfitPicture(f"too small: {width}x{height}, wanted at least {size}x{size} (or --upscale)")
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    if wide * high > MAX_PIXELS:
        raise UnfitPicture(f"too large: {width}x{height} would be enlarged to {wide}x{high}, wanted at most {MAX_PIXELS} pixels")
    picture = picture.resize((wide, high), Image.Resampling.LANCZOS)
    left, top = (wide - size) // 2, (high - size) // 2
    if options["crop"] == "random":
        rng = _crop_rng(options["seed"], name)
        left, top = int(rng.integers(wide - size + 1)), int(rng.integers(high - size + 1))
    # A fresh picture from the pixels alone: no EXIF, colour profile or comment travels into the shard
    square = Image.fromarray(np.asarray(picture)[top : top + size, left : left + size])
    buffer = io.BytesIO()
    if options["format"] == "png":
        square.save(buffer, "PNG")
    else:
        square.save(buffer, {"jpg": "JPEG", "webp": "WEBP"}[options["format"]], quality=options["quality"])
    about = {"file": name, "original_width": width, "original_height": height, "crop_left": left, "crop_top": top}
    return buffer.getvalue(), about


def write_picture_shard(job: tuple, source: Source, options: dict, allow_left_out: bool) -> dict:
    """Write one shard of `job = (tar path, what the source reads for it)`; entry with the `skipped` pictures and what was said of captions.

    Raises: ValueError where a caption cannot be read, unless `allow_left_out`; as the source.
    """
    path, part = job
    skipped: list[dict] = []
    notes: list[dict] = []
    odd: list[str] = []
    left_out: Counter = Counter()
    counts = Counter(without_caption=0, drawn_captions=0)

    def samples() -> Iterator[dict]:
        for sample in source.samples(part, left_out):
            try:
                if sample.unfit:
                    raise UnfitPicture(sample.unfit)
                captions = sample.captions()
                if not captions and not options["allow_missing_captions"]:
                    raise UnfitPicture("no caption (or --allow-missing-captions)")
                picture = sample.picture()
                content, about = make_square(picture, sample.name, options)
            except UnfitPicture as error:
                if isinstance(error, UnfitCaption) and not allow_left_out:
                    way_out = "mend it, or pass --allow-left-out to skip such samples. Finished shards are kept"
                    raise ValueError(f"{error}: {way_out}") from error
                skipped.append({"file": sample.name, "reason": str(error)})
                continue
            if (label := sample.label()) != -1:
                about["label"] = label
            caption = draw_caption(captions, options["seed"], sample.name) or ""
            counts.update(without_caption=not captions, drawn_captions=len(captions) > 1)
            notes.extend([{"file": sample.name, "note": picture.info["note"]}] if "note" in picture.info else [])
            odd.extend([sample.name] if is_odd(caption) else [])
            yield {"__key__": sample.key, options["format"]: content, "txt": caption, "json": about}

    entry = write_shard(path, samples())
    return {**entry, **counts, "skipped": skipped, "notes": notes, "odd_captions": odd, "left_out": left_out_list(left_out)}


def _finish(entries: list[dict], source: Source, allow_left_out: bool) -> dict:
    """What the shards' entries say of all, for the manifest. Raises: ValueError where a large share is left out or corrupt."""
    found = {name: [item for entry in entries for item in entry.get(name, [])] for name in ("left_out", "notes", "odd_captions")}
    left_out = source.left_out + count_left_out(found["left_out"])
    count, skipped = sum(entry["count"] for entry in entries), [item for entry in entries for item in entry["skipped"]]
    if count and not allow_left_out:
        corrupt = [item for item in skipped if item["reason"].startswith("corrupt")]
        shown = f"corrupt, the first is {corrupt[0]['file']}: {corrupt[0]['reason']}" if corrupt else ""
        others = sum(not item["reason"].startswith(("corrupt", "no picture")) for item in skipped)
        check_share(left_out + Counter({(shown, "pictures"): len(corrupt)}), count + others, source)
    for entry in entries:
        for name in found:
            entry.pop(name, None)
    return {**found, "left_out": left_out_list(left_out)}


def _say(manifest: dict, out: Path, keys: np.ndarray | None) -> None:
    """Prints what was made of how much, and everything that was decided on the way. keys: of the samples, where they may repeat."""
    skipped = manifest["skipped"]
    reasons = Counter(item["reason"].split(":")[0] for item in skipped)
    found = manifest["count"] + sum("not there" not in item["reason"] for item in skipped)
    said = [f"{manifest['count']} pictures of {found}", f"skipped: {dict(reasons) if reasons else 'none'}"]
    said += [f"left out: {describe_left_out(count_left_out(manifest.get('left_out', [])))}"]
    for name, what in (("without_caption", "have an empty caption"), ("drawn_captions", "have one of several captions, by --seed")):
        count = sum(entry.get(name, 0) for entry in manifest["shards"])
        said += [f"{count} {what}"] if count else []
    if odd := manifest.get("odd_captions"):
        said += [f"{len(odd)} have captions with lost or unprintable characters, the first is {odd[0]}"]
    if notes := manifest.get("notes"):
        said += [f"{len(notes)} were not read as they state, the first is {notes[0]['file']}: {notes[0]['note']}"]
    repeated = 0 if keys is None else len(keys) - len(np.unique(np.fromiter(map(hash, keys), np.int64, len(keys))))
    said += [f"{repeated} have a key that an earlier one has (they stay apart by their place)"] if repeated else []
    console.print(f"{out}: {'; '.join(said)}", markup=False, highlight=False, soft_wrap=True)
    for item in skipped[:10]:
        console.print(f"  skipped {item['file']}: {item['reason']}", markup=False, highlight=False, soft_wrap=True)


def make_shards(
    source: str | Path | Source,
    out: str | Path,
    size: int,
    *,
    crop: str = "center",
    format: str = "jpg",
    quality: int | None = None,
    max_aspect: float | None = None,
    shard_size: int = 1000,
    seed: int = 0,
    upscale: bool = False,
    allow_missing_captions: bool = False,
    allow_left_out: bool = False,
    workers: int = 1,
    overwrite: bool = False,
) -> dict:
    """Make shards of `size` px squares from a source of captioned pictures, or a folder of them; returns the manifest.

    max_aspect: pictures whose longer side is more times the shorter one are skipped.
    shard_size: pictures in a shard; tars keep theirs.
    seed: of random crops, and of the caption that is drawn where a picture has several.
    allow_left_out: go on where a large share of the pictures is left out or corrupt, and skip samples whose caption cannot be read.
    Raises: ValueError before anything is written where options are wrong, a folder lacks captions, no picture is found or a large share
    of them is left out; after reading, where a tar's caption cannot be read, a large share is corrupt, or no picture could be used.
    OSError where the source cannot be read: what is finished is kept.
    """
    out = Path(out)
    if size < 1 or shard_size < 1:
        raise ValueError(f"size and shard-size must be at least 1, got {size} and {shard_size}")
    if format == "png" and quality is not None:
        raise ValueError("png has no quality: leave --quality out, or use --format jpg or webp")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, got {quality}")
    if max_aspect is not None and not 1 <= max_aspect < math.inf:
        raise ValueError(f"max-aspect is the longer side over the shorter one, at least 1 and finite, got {max_aspect}")
    if not isinstance(source, Source):
        source = PictureFolder.open(source, allow_missing_captions)
    if isinstance(source, PictureTars):
        source.leave_out(out)
    if isinstance(source, PictureFolder):
        said = f"{len(source.names)} pictures in {source.listing.num_files} files; left out: {describe_left_out(source.left_out)}"
        console.print(f"{source}: {said}", markup=False, highlight=False, soft_wrap=True)
        if not allow_left_out:
            check_share(source.left_out, len(source.names), source)
    options = {
        "size": size,
        "crop": crop,
        "format": format,
        "upscale": upscale,
        "seed": seed,
        "quality": None if format == "png" else quality or DEFAULT_QUALITY,
        "max_aspect": max_aspect,
        "allow_missing_captions": allow_missing_captions,
    }
    generator = {"name": "make_shards", "version": source.version, **options, "shard_size": shard_size, **source.describe()}
    names = ((f"pictures-{number:06d}.tar", part) for number, part in enumerate(source.parts(shard_size)))
    jobs = {name: (out / name, part) for name, part in names}
    about = {"kind": "pictures", "image_size": size, "generator": generator, "skipped": source.absent}
    write = partial(write_picture_shard, source=source, options=options, allow_left_out=allow_left_out)
    finish = partial(_finish, source=source, allow_left_out=allow_left_out)
    manifest = make_folder(out, jobs, write, about, workers=workers, overwrite=overwrite, finish=finish)
    index = read_index(out, manifest["shards"]) if isinstance(source, PictureTars) else None
    _say(manifest, out, None if index is None else index["keys"])
    if manifest["count"] == 0:
        raise ValueError(f"none of the pictures of {source} could be used: see 'skipped' in {out / MANIFEST}")
    return manifest


def say_check(folder: str | Path, workers: int) -> int:
    """Prints which tars of a folder, and files of its index, are not what the manifest states; the exit status, 0 where all are."""
    wrong, count = check_folder(folder, workers)
    for line in wrong:
        print(line)
    if not wrong:
        print(f"{folder}: all {count} files are what the manifest states")
        return 0
    again = "copy them again, or remove them and make the shards anew; an index is written anew by --index, when its folder is removed"
    print(f"error: {folder}: {len(wrong)} files are not what the manifest states: {again}", file=sys.stderr)
    return 1


MADE = {
    "out", "size", "crop", "format", "quality", "max_aspect", "seed", "workers", "upscale", "allow_missing_captions", "allow_left_out",
    "overwrite",
}  # fmt: skip
READ = {  # what each way of making a set reads of the options
    "index": {"index", "quick", "workers", "overwrite"},
    "check": {"check", "workers"},
    "pictures": {"pictures", "shard_size", *MADE},
    "tars": {"tars", *MADE},
    "dataset": {"dataset", "image_column", "text_column", "shard_size", *MADE},
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--index", type=path_option, metavar="FOLDER", help="check the tars there, and write their manifest.json")
    parser.add_argument("--check", type=path_option, metavar="FOLDER", help="read all tars there, and name those that have changed")
    parser.add_argument("--quick", action="store_true", help="of --index: look into the first sample of each tar alone")
    parser.add_argument("--pictures", type=path_option, metavar="FOLDER", help="pictures, searched through all its subfolders")
    parser.add_argument("--tars", type=path_option, metavar="FOLDER", help="tars of pictures of any size, each of which gives a shard")
    parser.add_argument("--dataset", type=path_option, metavar="FOLDER", help="what save_to_disk of Hugging Face's datasets wrote")
    parser.add_argument("--image-column", default="image", help="of --dataset")
    parser.add_argument("--text-column", default="text", help="of --dataset")
    parser.add_argument("--out", type=path_option, metavar="FOLDER")
    parser.add_argument("--size", type=whole(PICTURE_SIDE), default=512, help="side of the squares, px")
    parser.add_argument("--crop", choices=("center", "random"), default="center")
    parser.add_argument("--format", choices=("png", "jpg", "webp"), default="jpg")
    parser.add_argument("--quality", type=whole(1, 100), help=f"of jpg and webp, 1 to 100 (default {DEFAULT_QUALITY})")
    parser.add_argument("--max-aspect", type=real(Range(1, 1e6)), help="skip pictures whose longer side is more times the shorter one")
    parser.add_argument("--shard-size", type=whole(1, 10**6), default=1000, help="pictures in a shard (--tars: as they are)")
    parser.add_argument("--seed", type=whole(SEED), default=0, help="of random crops, and of the caption drawn of several")
    parser.add_argument("--workers", type=whole(1, WORKERS), default=num_cores(), help="processes (default: one per core)")
    parser.add_argument("--upscale", action="store_true", help="enlarge pictures that are too small, instead of skipping them")
    parser.add_argument("--allow-missing-captions", action="store_true", help="an empty caption where there is none")
    parser.add_argument(
        "--allow-left-out", action="store_true", help="go on where many pictures cannot be read; skip captions that cannot be read"
    )
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args(argv)
    sources = [name for name in ("pictures", "tars", "dataset") if getattr(arguments, name)]
    alone = [name for name in ("index", "check") if getattr(arguments, name)]
    if not alone and (len(sources) != 1 or not arguments.out):
        parser.error("one of --pictures, --tars and --dataset, and --out, are needed (or --index, or --check)")
    of = (alone or sources)[0]
    if unread := [name for name in vars(arguments) if name not in READ[of] and getattr(arguments, name) != parser.get_default(name)]:
        parser.error(f"--{unread[0].replace('_', '-')} is no option of --{of}: leave it out")
    return arguments


def main(argv: list[str] | None = None) -> int:
    options = vars(parse_arguments(argv))
    index, pictures, tars, dataset, quick = (options.pop(name) for name in ("index", "pictures", "tars", "dataset", "quick"))
    check = options.pop("check")
    columns = options.pop("image_column"), options.pop("text_column")
    try:
        if index:
            index_folder(index, options["overwrite"], quick=quick, workers=options["workers"])
        elif check:
            return say_check(check, options["workers"])
        elif pictures:
            make_shards(pictures, **options)
        else:
            make_shards(PictureTars.open(tars) if tars else SavedDataset.open(dataset, *columns), **options)
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept, the same command resumes", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(error_line(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
