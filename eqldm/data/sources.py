"""Where pictures and their captions come from: a folder, tars of other origin, a data set of Hugging Face's.

A source is cut into parts, one for each shard that is made of it; `samples(part)` reads one, in any process. What is wrong with one picture
is that picture's (`UnfitPicture`: skipped and counted); an error of the disk or the network is an OSError that names the file.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from PIL import Image

from eqldm.data.captions import captions_in, captions_of, decode_text, draw_caption, read_captions
from eqldm.data.contents import label_of, parse_json
from eqldm.data.listing import (
    DANGLING,
    MADE,
    NO_LABEL,
    PACKED,
    TARS,
    Listing,
    describe_left_out,
    holds_none,
    left_out_of_tar,
    list_folder,
    reading,
    shown,
)
from eqldm.data.pictures import PICTURES, UnfitPicture, read_picture
from eqldm.data.tars import read_tar

Contents = dict[str, Callable[[], bytes]]  # of a sample's files, by their endings


class UnfitCaption(UnfitPicture):
    """A caption that is no text, or not as it was meant; its message names the sample."""


class Sample(NamedTuple):
    """What a source gives for one picture."""

    key: str  # in the shard
    name: str
    picture: Callable[[], Image.Image]  # raises UnfitPicture
    captions: Callable[[], list[str]]  # raises UnfitCaption
    unfit: str | None = None  # why there is no picture
    label: Callable[[], int] = lambda: -1  # -1: none


class Source(ABC):
    """Captioned pictures.

    `absent`: `{file, reason}` of those that are named and not there. `left_out`: how many files of each (reason, ending) are no samples.
    `version`: of how they are read; it changes where the same source gives other samples than before.
    """

    version: int
    absent: list[dict] = []

    @property
    def left_out(self) -> Counter:
        return Counter()

    @abstractmethod
    def describe(self) -> dict:
        """What the pictures and captions are known by, for the manifest."""

    @abstractmethod
    def parts(self, shard_size: int) -> Iterable[Any]:
        """What `samples` reads for each shard; to be pickled."""

    @abstractmethod
    def samples(self, part: Any, left_out: Counter) -> Iterator[Sample]:
        """The samples of a part; counts by (reason, ending) what of its files is left out. Raises: OSError where it cannot be read."""


@dataclass
class PictureFolder(Source):
    """Pictures of a folder and its subfolders, with captions from side-car files or metadata."""

    version = 2
    listing: Listing
    captions: dict[str, list[str]]
    absent: list[dict] = field(default_factory=list)

    @classmethod
    def open(cls, folder: str | Path, allow_missing_captions: bool = False) -> PictureFolder:
        """Raises ValueError where pictures lack captions; as `list_folder` and `read_captions`."""
        listing = list_folder(folder)
        if not listing.sizes:
            raise ValueError(holds_none(listing, "pictures"))
        captions, absent = read_captions(listing)
        missing = [name for name in listing.sizes if name not in captions]
        if missing and not allow_missing_captions:
            lost = f" ({len(absent)} captions are of none, such as {absent[0]['file']}: {absent[0]['reason']})" if absent else ""
            raise ValueError(
                f"{len(missing)} of {len(listing.sizes)} pictures in '{shown(listing.folder)}' have no caption: {', '.join(missing[:5])}"
                f"{', ...' if len(missing) > 5 else ''}{lost}. Put a .txt beside each, or a metadata.csv with file_name and text, "
                f"or pass --allow-missing-captions"
            )
        return cls(listing, captions, absent)

    @property
    def names(self) -> list[str]:
        """Of the pictures, relative to the folder, sorted."""
        return list(self.listing.sizes)

    @property
    def left_out(self) -> Counter:
        return self.listing.left_out

    def caption(self, name: str, seed: int = 0) -> str:
        """A picture's caption, of several the one that the seed draws; empty where there is none."""
        return draw_caption(self.captions.get(name, []), seed, name) or ""

    def read(self, name: str) -> bytes:
        """A picture's file. Raises: OSError where it cannot be read, or has changed since the folder was listed."""
        path = self.listing.path(name)
        with reading(path):
            content = path.read_bytes()
        if len(content) != self.listing.sizes[name]:
            raise OSError(
                f"'{shown(path)}' has {len(content)} bytes now, and had {self.listing.sizes[name]} when its folder was listed: "
                "is it still being copied?"
            )
        return content

    def describe(self) -> dict:
        captions = {name: found[0] if len(found) == 1 else found for name, found in self.captions.items()}
        known = [(name, size, captions.get(name, "")) for name, size in self.listing.sizes.items()]
        return {"num_pictures": len(known), "source_sha256": _sha256(known)}

    def parts(self, shard_size: int) -> Iterable[tuple[int, list[str]]]:
        names = self.names
        return [(first, names[first : first + shard_size]) for first in range(0, len(names), shard_size)]

    def samples(self, part: tuple[int, list[str]], left_out: Counter) -> Iterator[Sample]:
        first, names = part
        for number, name in enumerate(names, first):
            yield Sample(f"{number:09d}", name, partial(self._picture, name), partial(list, self.captions.get(name, [])))

    def _picture(self, name: str) -> Image.Image:
        return read_picture(self.read(name))

    def __str__(self) -> str:
        return f"'{shown(self.listing.folder)}'"


@dataclass
class PictureTars(Source):
    """Tars of samples, as img2dataset writes them: a picture, its captions as `.txt` or as `caption` of a `.json`.

    img2dataset leaves a `.json` alone of what it could not fetch: such samples are skipped as `no picture`.
    """

    version = 3
    listing: Listing

    @classmethod
    def open(cls, folder: str | Path) -> PictureTars:
        """Raises FileNotFoundError where there is no tar; OSError where a folder cannot be listed; ValueError where tars are packed."""
        listing = list_folder(folder, TARS)
        if not listing.sizes:
            raise FileNotFoundError(holds_none(listing, "tars"))
        lost = Counter({about: n for about, n in listing.left_out.items() if about[0] == PACKED or about == (DANGLING, ".tar")})
        if lost:
            raise ValueError(
                f"'{shown(folder)}' holds more than its {len(listing.sizes)} tars: {describe_left_out(lost)} would be left out. "
                "Unpack them, put back what the links lead to, or move them elsewhere"
            )
        return cls(listing)

    def leave_out(self, out: Path) -> None:
        """Leaves out the shards that an earlier run has made of this source, where their folder lies among its tars."""
        out = out.resolve()
        if out == self.listing.folder.resolve():  # refused where the folder is made
            return
        for name in [name for name in self.listing.sizes if self.listing.path(name).resolve().parent == out]:
            del self.listing.sizes[name]
            self.listing.left_out[MADE, ".tar"] += 1

    @property
    def left_out(self) -> Counter:
        return self.listing.left_out

    def describe(self) -> dict:
        known = list(self.listing.sizes.items())
        return {"num_tars": len(known), "source_sha256": _sha256(known)}

    def parts(self, shard_size: int) -> Iterable[str]:
        return list(self.listing.sizes)

    def samples(self, part: str, left_out: Counter) -> Iterator[Sample]:
        path = self.listing.path(part)
        with reading(path):
            (found, ignored), file = read_tar(path), open(path, "rb")
        left_out.update(left_out_of_tar(found, ignored))
        with file:
            if os.fstat(file.fileno()).st_size != self.listing.sizes[part]:
                raise OSError(f"'{shown(path)}' has another size than when its folder was listed: is it still being copied?")
            for sample in found:
                key = sample.pop("__key__")
                name = f"{part}/{key}"
                picture = next((ending for ending in sample if f".{ending}" in PICTURES), None)
                contents: Contents = {ending: partial(_content, file, place, f"{path}/{key}.{ending}") for ending, place in sample.items()}
                captions = partial(_captions_of, contents, shown(path.parent / name))
                unfit = None if picture else f"no picture: its files end in {', '.join(sorted(sample))}"
                label = partial(_label_in, contents, left_out)
                yield Sample(key, name, partial(_picture_of, contents.get(picture or "", bytes)), captions, unfit, label)

    def __str__(self) -> str:
        return f"the tars of '{shown(self.listing.folder)}'"


def _content(file: BinaryIO, place: tuple[int, int], what: str) -> bytes:
    """What lies at a (offset, size) of a tar. Raises: OSError where it cannot be read, or has become shorter."""
    with reading(file.name):
        file.seek(place[0])
        content = file.read(place[1])
    if len(content) != place[1]:
        raise OSError(f"'{shown(file.name)}' ended while '{what}' was read: it has changed since its headers were read")
    return content


def _picture_of(content: Callable[[], bytes]) -> Image.Image:
    return read_picture(content())


def _label_in(contents: Contents, left_out: Counter) -> int:
    """The label in the .json of a tar's sample, -1 where it states none; counts those that are no integers."""
    try:
        return label_of(contents["json"]()) if "json" in contents else -1
    except ValueError:
        left_out[NO_LABEL, ".json"] += 1
        return -1


def _captions_of(contents: Contents, what: str) -> list[str]:
    """The captions of a tar's sample: its .txt; where that is blank or not there, of its .json."""
    found: list[str] = []
    for ending in ("txt", "json"):
        if ending in contents and not found:
            content, file = contents[ending](), f"'{what}.{ending}'"
            try:
                text = decode_text(content, file)
                found = captions_of(text, file) if ending == "txt" else _captions_of_json(text, file)
            except ValueError as error:
                raise UnfitCaption(f"caption: {error}") from error
    return found


def _captions_of_json(text: str, what: str) -> list[str]:
    try:
        found = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{what} is not JSON ({error})") from error
    # Not text first: beside the caption, that may be what stands in the picture
    return captions_in(found, what, ("caption", "text")) if isinstance(found, dict) else []


@dataclass
class SavedDataset(Source):
    """A data set of Hugging Face's `datasets`, as `save_to_disk` wrote it, with an image and a text column."""

    version = 2
    folder: Path
    image_column: str
    text_column: str
    count: int
    fingerprint: str

    @classmethod
    def open(cls, folder: str | Path, image_column: str = "image", text_column: str = "text") -> SavedDataset:
        """Raises FileNotFoundError where it is none; ValueError where it is of several splits, or lacks a column, or a column is of
        another kind; ModuleNotFoundError where `datasets` is not installed."""
        rows = _load_dataset(folder)
        if isinstance(rows, dict):
            raise ValueError(f"'{folder}' holds the splits {', '.join(rows)}: give one, such as '{Path(folder) / next(iter(rows))}'")
        for option, column in (("image", image_column), ("text", text_column)):
            if column not in rows.column_names:
                raise ValueError(f"'{folder}' has no column '{column}', only {', '.join(rows.column_names)}: give --{option}-column")
        _check_columns(rows, image_column, text_column, folder)
        return cls(Path(folder), image_column, text_column, len(rows), rows._fingerprint)

    def describe(self) -> dict:
        columns = {"image_column": self.image_column, "text_column": self.text_column}
        return {"num_rows": self.count, "source_sha256": _sha256([self.fingerprint, self.count]), **columns}

    def parts(self, shard_size: int) -> Iterable[tuple[int, int]]:
        return [(first, min(first + shard_size, self.count)) for first in range(0, self.count, shard_size)]

    def samples(self, part: tuple[int, int], left_out: Counter) -> Iterator[Sample]:
        import datasets

        rows = _load_dataset(self.folder).cast_column(self.image_column, datasets.Image(decode=False))
        for number in range(*part):
            with reading(self.folder):
                row = rows[number]
            what = f"'{shown(self.folder)}' row {number}, column '{self.text_column}'"
            picture, captions = partial(_image_of, row[self.image_column]), partial(_captions_or_unfit, row[self.text_column], what)
            image = row[self.image_column]
            unfit = None if image and (image["bytes"] or image["path"]) else "no picture"
            yield Sample(f"{number:09d}", f"row {number}", picture, captions, unfit)

    def __str__(self) -> str:
        return f"the data set '{shown(self.folder)}'"


def _check_columns(rows: Any, image_column: str, text_column: str, folder: str | Path) -> None:
    """Raises: ValueError where the columns hold neither pictures nor texts."""
    import datasets
    import pyarrow.types as types

    image, text = rows.features[image_column], rows.data.schema.field(text_column).type
    if not isinstance(image, datasets.Image) and getattr(image, "dtype", None) not in ("string", "large_string", "binary", "large_binary"):
        raise ValueError(f"'{folder}': column '{image_column}' holds {str(image)[:100]}, wanted pictures: give --image-column")
    inner = text.value_type if types.is_list(text) or types.is_large_list(text) or types.is_fixed_size_list(text) else text
    if not (types.is_string(inner) or types.is_large_string(inner) or types.is_null(inner)):
        holds = str(rows.features[text_column])[:100]
        raise ValueError(f"'{folder}': column '{text_column}' holds {holds}, wanted texts, or lists of texts: give --text-column")


def _captions_or_unfit(value: Any, what: str) -> list[str]:
    try:
        return captions_of(value, what)
    except ValueError as error:
        raise UnfitCaption(f"caption: {error}") from error


def _image_of(image: dict) -> Image.Image:
    if image["bytes"]:
        return read_picture(image["bytes"])
    with reading(image["path"]):
        content = Path(image["path"]).read_bytes()
    return read_picture(content)


def _load_dataset(folder: str | Path):
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--dataset needs Hugging Face's datasets, which is not installed: pip install 'eqldm[datasets]'"
        ) from error
    with reading(folder):
        return datasets.load_from_disk(str(folder))


def _sha256(known: list) -> str:
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()
