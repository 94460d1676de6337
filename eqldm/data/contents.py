"""What the files of a sample must hold: the same rules at indexing (`checking.py`) and in training (`samples.py`)."""

from __future__ import annotations

import io
import json
import tokenize
from collections.abc import Mapping
from typing import Any

import numpy as np

from eqldm.data.pictures import PICTURES

MAX_SKIPS = 100  # consecutive unreadable pictures after which the data set, not a picture, is at fault
READ = ("file_name", "text", "caption", "label")  # all that is read of JSON
_FIRST = ("png", "jpg", "jpeg", "webp")  # where samples hold pictures in several formats
PICTURE_EXTENSIONS = (*_FIRST, *(ending[1:] for ending in PICTURES if ending[1:] not in _FIRST))
# What numpy raises of bytes that are no array file: some headers are read as an old version's, by Python's tokenizer
NO_ARRAY = (ValueError, OSError, EOFError, TypeError, SyntaxError, OverflowError, MemoryError, tokenize.TokenError)


def parse_json(content: str | bytes) -> Any:
    """What JSON holds. Raises ValueError where it is none, or states one of `READ` twice and differently: the last would prevail."""

    def object_of(pairs: list[tuple[str, Any]]) -> dict:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in READ and name in found and found[name] != value:
                raise ValueError(f"it states '{name}' twice: {_short(found[name])}, and {_short(value)}")
            found[name] = value
        return found

    try:
        return json.loads(content, object_pairs_hook=object_of)
    except RecursionError as error:
        raise ValueError(str(error)) from error


class UnfitSample(ValueError):
    """A sample that no training can use; the message names it, in one line."""


def picture_extension(counts: Mapping[str, int]) -> str | None:
    """The ending of a set's pictures, by how many samples hold a file of each ending: the one that most hold; None where none does."""
    held = [extension for extension in PICTURE_EXTENSIONS if counts.get(extension)]
    return max(held, key=counts.__getitem__, default=None)  # of equals the first


def label_of(content: bytes) -> int:
    """The label in a sample's `.json`, -1 where it states none. Raises ValueError where it is something else than an integer of 64 bits,
    or there is no JSON object."""
    try:
        found = parse_json(content)
    except ValueError as error:
        raise ValueError(f"its .json is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f'its .json is {_short(found)}, wanted an object, such as {{"label": 3}}')
    label = found.get("label", -1)
    if type(label) is not int or not -(2**63) <= label < 2**63:  # not isinstance: true is no label
        raise ValueError(f"the label in its .json is {_short(label)}, wanted an integer, or no label")
    return label


def array_of(content: bytes, name: str) -> np.ndarray:
    """A latent's array, of floats, or of int16 that are the bits of bfloat16. Raises ValueError where it is none, or not finite."""
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except NO_ARRAY as error:
        raise ValueError(f"its array ({name}) cannot be read ({error})") from error
    if not isinstance(array, np.ndarray) or not (array.dtype.kind == "f" or array.dtype == np.int16):
        what = f"of {array.dtype}" if isinstance(array, np.ndarray) else "an archive of several"
        raise ValueError(f"its array ({name}) is {what}, wanted float16, float32, or int16 (the bits of bfloat16)")
    finite = np.isfinite(array) if array.dtype.kind == "f" else (array.view(np.uint16) & 0x7F80) != 0x7F80
    if not finite.all():
        raise ValueError(f"its array ({name}) holds {int((~finite).sum())} NaN or infinities")
    return array


def caption_of(content: bytes) -> str:
    """The caption in a sample's `.txt`. Raises ValueError where it is not UTF-8, or holds NUL characters."""
    try:
        caption = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption (.txt) is not UTF-8 ({error})") from error
    if "\0" in caption:  # every second one of a Latin text, which no tokenizer minds
        raise ValueError(f"its caption (.txt) holds NUL characters ({_short(caption)}): it is damaged, or UTF-16 that does not say so")
    return caption


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
