"""Where pictures and their captions come from: a folder, tars of other origin, a data set of Hugging Face's.

A source is cut into parts, one for each shard that is made of it; `samples(part)` reads one, in any process.
"""

from __future__ import annotations

import csv
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from eqldm.data.pictures import PICTURES, UnfitPicture, read_picture
from eqldm.data.shards import index_tar

Sample = tuple[str, str, Callable[[], Image.Image], str | None]  # key in the shard, name, what opens the picture, caption


class Source(ABC):
    """Captioned pictures. `absent`: `{file, reason}` of those that are named and not there."""

    absent: list[dict] = []

    @abstractmethod
    def describe(self) -> dict:
        """What the pictures and captions are known by, for the manifest."""

    @abstractmethod
    def parts(self, shard_size: int) -> Iterable[Any]:
        """What `samples` reads for each shard; to be pickled."""

    @abstractmethod
    def samples(self, part: Any) -> Iterator[Sample]:
        """The samples of a part. What opens a picture raises `UnfitPicture` where it cannot be read."""


@dataclass
class PictureFolder(Source):
    """Pictures of a folder and its subfolders, with captions from side-car files or metadata."""

    folder: Path
    names: list[str]
    captions: dict[str, str]
    absent: list[dict] = field(default_factory=list)

    @classmethod
    def open(cls, folder: str | Path, allow_missing_captions: bool = False) -> PictureFolder:
        """Raises ValueError where pictures lack captions; as `find_pictures` and `read_captions`."""
        folder = Path(folder)
        names = find_pictures(folder)
        captions, absent = read_captions(folder, names)
        missing = [name for name in names if name not in captions]
        if missing and not allow_missing_captions:
            raise ValueError(
                f"{len(missing)} of {len(names)} pictures in '{folder}' have no caption: {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}. Put a .txt beside each, or a metadata.csv with file_name and text, "
                f"or pass --allow-missing-captions"
            )
        return cls(folder, names, captions, absent)

    def describe(self) -> dict:
        known = [(name, (self.folder / name).stat().st_size, self.captions.get(name, "")) for name in self.names]
        return {"num_pictures": len(known), "source_sha256": _sha256(known)}

    def parts(self, shard_size: int) -> Iterable[tuple[int, list[str]]]:
        return [(first, self.names[first : first + shard_size]) for first in range(0, len(self.names), shard_size)]

    def samples(self, part: tuple[int, list[str]]) -> Iterator[Sample]:
        first, names = part
        for number, name in enumerate(names, first):
            yield f"{number:09d}", name, lambda name=name: read_picture((self.folder / name).read_bytes()), self.captions.get(name)

    def __str__(self) -> str:
        return f"'{self.folder}'"


@dataclass
class PictureTars(Source):
    """Tars of samples, as img2dataset writes them: a picture, its caption as `.txt` or as `caption` of a `.json`.

    img2dataset leaves a `.json` alone of what it could not fetch: such samples are skipped as `no picture`.
    """

    folder: Path
    names: list[str]

    @classmethod
    def open(cls, folder: str | Path) -> PictureTars:
        """Raises FileNotFoundError where there is no tar."""
        names = sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*.tar"))
        if not names:
            raise FileNotFoundError(f"'{folder}' holds no tars, wanted files that end in .tar")
        return cls(Path(folder), names)

    def describe(self) -> dict:
        known = [(name, (self.folder / name).stat().st_size) for name in self.names]
        return {"num_tars": len(known), "source_sha256": _sha256(known)}

    def parts(self, shard_size: int) -> Iterable[str]:
        return self.names

    def samples(self, part: str) -> Iterator[Sample]:
        with open(self.folder / part, "rb") as file:

            def content(place: tuple[int, int]) -> bytes:
                file.seek(place[0])
                return file.read(place[1])

            for sample in index_tar(self.folder / part):
                key, name = sample["__key__"], f"{part}/{sample['__key__']}"
                picture = next((extension for extension in sample if f".{extension}" in PICTURES), None)
                caption = None
                if "txt" in sample:
                    caption = _text(content(sample["txt"]).decode(errors="replace"))
                elif "json" in sample:
                    caption = _caption_of(content(sample["json"]))
                yield key, name, lambda picture=picture, sample=sample: _picture_of(sample, picture, content), caption

    def __str__(self) -> str:
        return f"the tars of '{self.folder}'"


def _picture_of(sample: dict, extension: str | None, content: Callable[[tuple[int, int]], bytes]) -> Image.Image:
    if extension is None:
        raise UnfitPicture(f"no picture: its files end in {', '.join(sorted(sample.keys() - {'__key__'}))}")
    return read_picture(content(sample[extension]))


def _caption_of(content: bytes) -> str | None:
    try:
        found = json.loads(content)
    except ValueError:
        return None
    return _text(found.get("caption") or found.get("text")) if isinstance(found, dict) else None


def _text(value: Any) -> str | None:
    """A caption without the space around it; None for what is no text, or empty."""
    return value.strip() or None if isinstance(value, str) else None


@dataclass
class SavedDataset(Source):
    """A data set of Hugging Face's `datasets`, as `save_to_disk` wrote it, with an image and a text column."""

    folder: Path
    image_column: str
    text_column: str
    count: int
    fingerprint: str

    @classmethod
    def open(cls, folder: str | Path, image_column: str = "image", text_column: str = "text") -> SavedDataset:
        """Raises FileNotFoundError where it is none; ValueError where it is of several splits, or lacks a column;
        ModuleNotFoundError where `datasets` is not installed."""
        rows = _load_dataset(folder)
        if isinstance(rows, dict):
            raise ValueError(f"'{folder}' holds the splits {', '.join(rows)}: give one, such as '{Path(folder) / next(iter(rows))}'")
        for option, column in (("image", image_column), ("text", text_column)):
            if column not in rows.column_names:
                raise ValueError(f"'{folder}' has no column '{column}', only {', '.join(rows.column_names)}: give --{option}-column")
        return cls(Path(folder), image_column, text_column, len(rows), rows._fingerprint)

    def describe(self) -> dict:
        columns = {"image_column": self.image_column, "text_column": self.text_column}
        return {"num_rows": self.count, "source_sha256": _sha256([self.fingerprint, self.count]), **columns}

    def parts(self, shard_size: int) -> Iterable[tuple[int, int]]:
        return [(first, min(first + shard_size, self.count)) for first in range(0, self.count, shard_size)]

    def samples(self, part: tuple[int, int]) -> Iterator[Sample]:
        import datasets

        rows = _load_dataset(self.folder).cast_column(self.image_column, datasets.Image(decode=False))
        for number in range(*part):
            row = rows[number]
            image = row[self.image_column]
            yield f"{number:09d}", f"row {number}", lambda image=image: _image_of(image), _text(row[self.text_column])

    def __str__(self) -> str:
        return f"the data set '{self.folder}'"


def _image_of(image: dict | None) -> Image.Image:
    if not image or not (image["bytes"] or image["path"]):
        raise UnfitPicture("no picture")
    return read_picture(image["bytes"] or Path(image["path"]).read_bytes())


def _load_dataset(folder: str | Path):
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--dataset needs Hugging Face's datasets, which is not installed: pip install 'eqldm[datasets]'"
        ) from error
    return datasets.load_from_disk(str(folder))


def _sha256(known: list) -> str:
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


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
