"""Shards from a folder of captioned pictures.

    python data/make_shards.py --pictures FOLDER --out FOLDER --size 512
    python data/make_shards.py --index FOLDER              # a manifest for tars of other origin

Captions come from a `.txt` beside each picture, or from a `metadata.jsonl` or `metadata.csv` (columns `file_name` and
`text` or `caption`, as in Hugging Face's imagefolder). The same input gives the same bytes, whatever `--workers`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from eqldm.data.making import console, make_folder, num_cores
from eqldm.data.shards import MANIFEST, index_tar, write_manifest, write_shard

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
DEFAULT_QUALITY = 95  # of jpg and webp
# What Pillow raises on broken files: its decoders let the errors of the modules they use through.
CORRUPT = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error, Image.DecompressionBombError)


def find_pictures(folder: Path) -> list[str]:
    """Names of all pictures under a folder, relative to it, sorted; hidden files are left out.

    Raises: FileNotFoundError where it is no folder; ValueError where it holds no picture.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' is not a folder: name the folder that holds the pictures")
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in PICTURES and path.is_file())
    names = sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))
    if not names:
        raise ValueError(f"'{folder}' holds no pictures, wanted files that end in {', '.join(PICTURES)}")
    return names


def _metadata(path: Path) -> list[dict]:
    """The rows of a metadata.jsonl or metadata.csv."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        rows = []
        for number, line in enumerate(file, 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"'{path}' line {number} is not JSON ({error}): one JSON object per line is wanted") from error
        return rows


def read_captions(folder: Path, names: list[str]) -> tuple[dict[str, str], list[dict]]:
    """Captions by picture name, and `{file, reason}` of the pictures that metadata names but the folder lacks.

    Raises: ValueError where metadata lacks a column, or two sources give one picture different captions.
    """
    captions: dict[str, str] = {}
    absent, present = [], set(names)

    def add(name: str, caption: str | None, source: Path) -> None:
        caption = (caption or "").strip()
        if caption and captions.setdefault(name, caption) != caption:
            raise ValueError(f"picture '{name}' has two captions, the second from '{source}': keep one of the two")

    for name in names:
        side_car = (folder / name).with_suffix(".txt")
        if side_car.is_file():
            try:
                add(name, side_car.read_text(encoding="utf-8-sig"), side_car)
            except UnicodeDecodeError as error:
                raise ValueError(f"caption '{side_car}' is not UTF-8 ({error}): save it as UTF-8") from error
    for path in sorted([*folder.rglob("metadata.jsonl"), *folder.rglob("metadata.csv")]):
        for row in _metadata(path):
            column = next((column for column in ("text", "caption") if column in row), None)
            if column is None or not row.get("file_name"):
                raise ValueError(f"'{path}' has the columns {sorted(map(str, row))}, wanted 'file_name' and 'text' or 'caption'")
            name = (path.parent.relative_to(folder) / row["file_name"]).as_posix()
            if name in present:
                add(name, row[column], path)
            else:
                absent.append({"file": name, "reason": f"named in {path.relative_to(folder).as_posix()}, but not there"})
    return captions, absent


def _crop_rng(seed: int, name: str) -> np.random.Generator:  # of the name, not the index: adding pictures moves no crop
    return np.random.default_rng(np.frombuffer(hashlib.sha256(f"{seed}/{name}".encode()).digest(), np.uint32))


class UnfitPicture(ValueError):
    """A picture that is skipped, counted and named in the manifest."""


def read_picture(path: Path) -> Image.Image:
    """A picture in RGB, turned upright (EXIF), transparency over white. Raises: UnfitPicture where it cannot be read."""
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except CORRUPT as error:
        # Without the path: the manifest names files relative to the folder
        raise UnfitPicture(f"corrupt: {str(error).replace(repr(str(path)), 'it') or type(error).__name__}") from error
    if picture.mode.startswith(("I", "F")):  # Pillow would clip these to white
        raise UnfitPicture(f"more than 8 bits a channel: mode {picture.mode}")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def make_square(picture: Image.Image, name: str, options: dict) -> tuple[bytes, dict]:
    """The picture resized and cropped to a square, encoded; and what was done. Raises: UnfitPicture where too small."""
    size, (width, height) = options["size"], picture.size
    if min(width, height) < size and not options["upscale"]:
        raise UnfitPicture(f"too small: {width}x{height}, wanted at least {size}x{size} (or --upscale)")
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
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


def write_picture_shard(job: tuple, source: Path, options: dict) -> dict:
    """Write one shard of `job = (tar path, first number, [(name, caption), ...])`; entry with the `skipped` pictures."""
    path, first, pictures = job
    skipped = []

    def samples() -> Iterator[dict]:
        for number, (name, caption) in enumerate(pictures, first):
            try:
                content, about = make_square(read_picture(source / name), name, options)
            except UnfitPicture as error:
                skipped.append({"file": name, "reason": str(error)})
                continue
            yield {"__key__": f"{number:09d}", options["format"]: content, "txt": caption, "json": about}

    return {**write_shard(path, samples()), "skipped": skipped}


def make_shards(
    pictures: str | Path,
    out: str | Path,
    size: int,
    *,
    crop: str = "center",
    format: str = "jpg",
    quality: int | None = None,
    shard_size: int = 1000,
    seed: int = 0,
    upscale: bool = False,
    allow_missing_captions: bool = False,
    workers: int = 1,
    overwrite: bool = False,
) -> dict:
    """Make shards of `size` px squares from a folder of captioned pictures; returns the manifest.

    Raises: ValueError before anything is written where options are wrong, captions are missing or no picture is found;
    after reading, where no picture could be used.
    """
    pictures, out = Path(pictures), Path(out)
    if size < 1 or shard_size < 1:
        raise ValueError(f"size and shard-size must be at least 1, got {size} and {shard_size}")
    if format == "png" and quality is not None:
        raise ValueError("png has no quality: leave --quality out, or use --format jpg or webp")
    if quality is not None and not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, got {quality}")
    names = find_pictures(pictures)
    captions, absent = read_captions(pictures, names)
    missing = [name for name in names if name not in captions]
    if missing and not allow_missing_captions:
        raise ValueError(
            f"{len(missing)} of {len(names)} pictures in '{pictures}' have no caption: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}. Put a .txt beside each, or a metadata.csv with file_name and text, "
            f"or pass --allow-missing-captions"
        )
    source = hashlib.sha256(
        json.dumps([(name, (pictures / name).stat().st_size, captions.get(name, "")) for name in names]).encode()
    ).hexdigest()
    options = {
        "size": size,
        "crop": crop,
        "format": format,
        "upscale": upscale,
        "seed": seed,
        "quality": None if format == "png" else quality or DEFAULT_QUALITY,
    }
    generator = {
        "name": "make_shards",
        "version": 1,
        **options,
        "shard_size": shard_size,
        "num_pictures": len(names),
        "source_sha256": source,
    }
    jobs = {}
    for first in range(0, len(names), shard_size):
        name = f"pictures-{first // shard_size:06d}.tar"
        jobs[name] = out / name, first, [(n, captions.get(n, "")) for n in names[first : first + shard_size]]
    about = {"kind": "pictures", "image_size": size, "generator": generator, "num_without_caption": len(missing), "skipped": absent}
    write = partial(write_picture_shard, source=pictures, options=options)
    manifest = make_folder(out, jobs, write, about, workers=workers, overwrite=overwrite)
    reasons = Counter(item["reason"].split(":")[0] for item in manifest["skipped"])
    console.print(f"{out}: {manifest['count']} pictures; skipped: {dict(reasons) if reasons else 'none'}", highlight=False)
    for item in manifest["skipped"][:10]:
        console.print(f"  skipped {item['file']}: {item['reason']}", markup=False, highlight=False)
    if manifest["count"] == 0:
        raise ValueError(f"none of the {len(names)} pictures in '{pictures}' could be used: see 'skipped' in {out / MANIFEST}")
    return manifest


def index_folder(folder: str | Path, overwrite: bool = False) -> dict:
    """Write the manifest of a folder of tars that has none; `kind` and `image_size` are told from the samples.

    `image_size` is the side of each shard's first picture where these are equal squares, else None.
    Raises: FileNotFoundError where there is no tar; ValueError where a manifest exists, a tar is broken or kinds mix.
    """
    folder = Path(folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise FileNotFoundError(f"'{folder}' holds no tars, wanted files that end in .tar")
    if (folder / MANIFEST).exists() and not overwrite:
        raise ValueError(f"'{folder}' has a {MANIFEST} already: use --overwrite to write it anew")
    entries, kinds, sizes = [], {}, set()
    for tar in tars:
        samples = index_tar(tar)
        digest = hashlib.sha256()
        with open(tar, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
            entries.append({"name": tar.name, "count": len(samples), "bytes": file.tell(), "sha256": digest.hexdigest()})
            for sample in samples[:1]:
                picture = next((ext for ext in sample if f".{ext}" in PICTURES), None)
                if picture:
                    file.seek(sample[picture][0])
                    with Image.open(io.BytesIO(file.read(sample[picture][1]))) as opened:
                        sizes.add(opened.size)
                elif not {"npy", "npz", "safetensors", "pt", "pth"} & sample.keys():
                    raise ValueError(f"shard '{tar}' holds neither pictures nor latents: its files end in {sorted(sample)[1:]}")
                kinds.setdefault("pictures" if picture else "latents", tar.name)
    if len(kinds) != 1:
        raise ValueError(f"'{folder}' must hold one kind of samples, got {kinds or 'none'}: one folder for each kind is wanted")
    square = len(sizes) == 1 and len(set(next(iter(sizes)))) == 1
    about = {"kind": next(iter(kinds)), "generator": {"name": "index"}}
    if "pictures" in kinds:
        about["image_size"] = next(iter(sizes))[0] if square else None
    manifest = write_manifest(folder, entries, **about)
    console.print(f"{folder}: {manifest['count']} samples in {len(entries)} shards, kind {about['kind']}", highlight=False)
    return manifest


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="only write manifest.json for the tars there")
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="pictures, searched through all its subfolders")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--size", type=int, default=512, help="side of the squares, px")
    parser.add_argument("--crop", choices=("center", "random"), default="center")
    parser.add_argument("--format", choices=("png", "jpg", "webp"), default="jpg")
    parser.add_argument("--quality", type=int, help=f"of jpg and webp, 1 to 100 (default {DEFAULT_QUALITY})")
    parser.add_argument("--shard-size", type=int, default=1000, help="pictures in a shard")
    parser.add_argument("--seed", type=int, default=0, help="of random crops")
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes (default: one per core)")
    parser.add_argument("--upscale", action="store_true", help="enlarge pictures that are too small, instead of skipping them")
    parser.add_argument("--allow-missing-captions", action="store_true", help="an empty caption where there is none")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.index is None and not (arguments.pictures and arguments.out):
        parser.error("--pictures and --out are needed (or --index)")
    return arguments


def main(argv: list[str] | None = None) -> int:
    options = vars(parse_arguments(argv))
    index = options.pop("index")
    try:
        index_folder(index, options["overwrite"]) if index else make_shards(**options)
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept, the same command resumes", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
