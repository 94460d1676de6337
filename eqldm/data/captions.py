"""Captions: their text as it was meant, or an error that names the place; of several, the one that a seed draws."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import os
import posixpath
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

from eqldm.data.contents import READ, parse_json
from eqldm.data.listing import METADATA, ORPHAN, Listing, ending_of, reading, shown
from eqldm.data.pictures import PICTURES

MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
COLUMNS = ("text", "caption")
QUOTING = "put a caption that holds a comma, a quote or a line break between quotes, and double the quotes in it"


def decode_text(content: bytes, what: str) -> str:
    """The text of a file: in UTF-8, or as the byte order mark at its beginning says.

    Raises: ValueError that names `what`, the line and the byte where it is neither.
    """
    encoding, mark = next(((name, mark) for mark, name in MARKS if content.startswith(mark)), ("utf-8", b""))
    try:
        text = content[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        before, place = error.object[: error.start].decode(encoding, "replace"), len(mark) + error.start
        raise ValueError(
            f"{what} is not {encoding.upper()}: byte {place} (0x{content[place]:02x}), in line {_line(before)}. Save it as UTF-8, "
            f"for example with iconv -f WINDOWS-1252 -t UTF-8, if that is what it was written in"
        ) from error
    if "\0" in text:
        where = text.index("\0")
        raise ValueError(
            f"{what} holds a NUL character in line {_line(text[:where])}: it is damaged, or UTF-16 that does not say so. Save it as UTF-8"
        )
    return text


def _line(before: str) -> int:
    return len(before.replace("\r\n", "\n").replace("\r", "\n").split("\n"))


def captions_of(value: Any, what: str) -> list[str]:
    """The captions that a value stands for, without the space around them: a text, a list of texts, or none (null).

    Blank texts, and nulls in a list, are none. Raises: ValueError that names `what` where it is something else, or cannot be written.
    """
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    values = [item for item in values if item is not None]
    for item in values:
        if not isinstance(item, str):
            kind = {list: "a list in a list", dict: "an object", bool: "true or false"}.get(type(item), "a number")
            inside = " in a list" if isinstance(value, list) and not isinstance(item, list) else ""
            raise ValueError(f"{what}: the caption is {kind}{inside} ({_short(value)}), wanted a text, or a list of texts to draw one of")
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{what}: the caption holds half a character (U+{ord(item[error.start]):04X}) and cannot be written"
            ) from error
    captions = [item.removeprefix("\ufeff").strip() for item in values]
    return [caption for caption in captions if caption]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def captions_in(row: dict, what: str, columns: Iterable[str] = COLUMNS) -> list[str]:
    """Those of the first of the columns that has any. Raises as `captions_of`."""
    return next(filter(None, (captions_of(row.get(column), what) for column in columns)), [])


def draw_caption(captions: list[str], seed: int, name: str) -> str | None:
    """One of them, by the seed and the picture's name: adding pictures changes no other's. None where there is none."""
    if len(captions) < 2:
        return captions[0] if captions else None
    digest = hashlib.sha256(f"{seed}/caption/{name}".encode()).digest()
    return captions[int.from_bytes(digest[:8], "big") % len(captions)]


def is_odd(caption: str) -> bool:
    """Whether it holds a mark of what was lost (U+FFFD), a byte order mark, or a character that is not printed."""
    return any(c in "\ufffd\ufeff" or (unicodedata.category(c) == "Cc" and c not in "\t\n\r") for c in caption)


def read_captions(listing: Listing) -> tuple[dict[str, list[str]], list[dict]]:
    """Captions by picture name, and `{file, reason}` of the pictures that metadata names but the folder lacks. Names may differ in how
    accents are composed (NFC, NFD). Text files of no picture are counted in `listing.left_out`.

    Raises: ValueError where a file is not as it should be, or two give one picture different captions; OSError where one cannot be read.
    """
    captions: dict[str, list[str]] = {}
    sources: dict[str, str] = {}
    absent = []
    for name, found, source in _side_cars(listing):
        captions[name], sources[name] = found, source
    composed = _by_composed(listing.sizes)
    for text in listing.texts:
        if posixpath.basename(text) not in METADATA:
            continue
        rows: dict[str, int] = {}
        for line, row in _metadata(listing, text, composed):
            named = posixpath.normpath(posixpath.join(posixpath.dirname(text), row["file_name"]))
            what = f"'{shown(listing.path(text))}' line {line}"
            name = composed.get(_composed(named), named)
            if named in listing.sizes:
                name = named
            if name in rows:
                raise ValueError(
                    f"{what} names '{row['file_name']}' again, after line {rows[name]}: one row for each picture is wanted. Several "
                    f'captions of one go into a list in metadata.jsonl: {{"file_name": ..., "text": ["one", "another"]}}'
                )
            rows[name] = line
            found = captions_in(row, what)
            if name not in listing.sizes:
                absent.append({"file": named, "reason": f"named in {text}, but {_whereabouts(listing, named)}"})
            elif found and captions.setdefault(name, found) != found:
                raise ValueError(
                    f"picture '{name}' has two captions: in {sources[name]}, and in {what}. Keep one of the two, or write both as a list "
                    "in metadata.jsonl"
                )
            elif found:
                sources[name] = what
    return captions, absent


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _by_composed(names: Collection[str]) -> dict[str, str]:
    """Names by their composed form, without those that two names share."""
    found: dict[str, str] = {}
    shared = {_composed(name) for name in names if found.setdefault(_composed(name), name) != name}
    return {composed: name for composed, name in found.items() if composed not in shared}


def _whereabouts(listing: Listing, name: str) -> str:
    if "\\" in name:
        return "not there: folders are parted by / in file_name"
    if name.startswith(("/", "../")):
        return "outside the folder: file_name is the way to a picture from the folder of its metadata"
    return f"left out: {ending_of(name) or 'no ending'}" if os.path.exists(listing.folder / name) else "not there"


def _side_cars(listing: Listing) -> Iterator[tuple[str, list[str], str]]:
    """Each picture's captions of the .txt beside it, and what to call that."""
    texts = {name[:-4]: name for name in listing.texts if name.lower().endswith(".txt")}  # .TXT too; before .txt, which so prevails
    composed, used = _by_composed(texts), set()
    for name in listing.sizes:
        own = str(PurePosixPath(name).with_suffix(""))
        stem = own if own in texts else composed.get(_composed(own))
        if stem is None:
            continue
        used.add(stem)
        path = listing.path(texts[stem])
        with reading(path):
            content = path.read_bytes()
        what = f"caption '{shown(path)}'"
        found = captions_of(decode_text(content, what), what)
        if found:
            yield name, found, what
    unused = sum(name.lower().endswith(".txt") for name in listing.texts) - len(used)
    if unused:
        listing.left_out[ORPHAN, ".txt"] += unused


def _metadata(listing: Listing, name: str, names: Collection[str]) -> Iterator[tuple[int, dict]]:
    """The rows of a metadata.jsonl or metadata.csv, with the line that each begins in."""
    path = listing.path(name)
    with reading(path):
        content = path.read_bytes()
    what = f"'{shown(path)}'"
    text, rows = decode_text(content, what), 0
    for line, row in (_csv_rows if name.endswith(".csv") else _json_rows)(text, what):
        rows += 1
        if not isinstance(row, dict) or not set(COLUMNS) & row.keys() or "file_name" not in row:
            has = f"the columns {sorted(map(str, row))}" if isinstance(row, dict) else f"no object ({_short(row)})"
            raise ValueError(f"{what} has {has} in line {line}, wanted 'file_name' and 'text' or 'caption'")
        named = row["file_name"]
        if not isinstance(named, str) or not named.strip() or any(c == "\0" or "\ud800" <= c <= "\udfff" for c in named):
            raise ValueError(f"{what} line {line}: file_name is {_short(named)}, wanted the name of a picture")
        for value in row.values():
            _check_swallowed(value, posixpath.dirname(name), names, f"{what} line {line}") if name.endswith(".csv") else None
        yield line, row
    if not rows:
        raise ValueError(f"{what} holds no captions: give it rows with 'file_name' and 'text', or remove it")


def _json_rows(text: str, what: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(io.StringIO(text), 1):  # by line feeds alone: JSON may hold other line ends
        try:
            if line.strip():
                yield number, parse_json(line)
        except ValueError as error:
            raise ValueError(f"{what} line {number} is not JSON ({error}): one JSON object per line is wanted") from error


def _csv_rows(text: str, what: str) -> Iterator[tuple[int, dict]]:
    reader, first = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    _check_delimiter(text.split("\n", 1)[0], what)
    try:
        header = [column.strip() for column in next(reader, [])]
        _check_header(header, what)
        first = reader.line_num + 1
        for row in reader:
            if any(cell.strip() for cell in row):
                if len(row) != len(header):
                    raise ValueError(f"{what} line {first} has {len(row)} columns, its header {len(header)}: {QUOTING}")
                for column, cell in zip(header, row):
                    if column in READ and cell[:1].isspace() and cell.lstrip().startswith('"'):
                        raise ValueError(
                            f"{what} line {first}: a space stands before the quote of {cell.strip()[:40]}, which so belongs to the text: "
                            "put quotes right after the comma"
                        )
                yield first, dict(zip(header, row))
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{what}: the row that begins in line {first} is no CSV ({error}): {QUOTING}") from error


def _check_delimiter(header: str, what: str) -> None:
    """Raises: ValueError where the first line parts its columns by something else than commas."""
    for delimiter, called in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if delimiter in header and "file_name" in [column.strip(' "\r') for column in header.split(delimiter)]:
            raise ValueError(f"{what} parts its columns by {called}: save it with commas (and {QUOTING})")


def _check_header(header: list[str], what: str) -> None:
    """Raises: ValueError where the first row names no columns as wanted."""
    if any(ending_of(column) in PICTURES for column in header):
        raise ValueError(f"{what} has no header: its first line should be file_name,text and is {','.join(header)}")
    if "file_name" not in header or not set(COLUMNS) & set(header):
        raise ValueError(f"{what} has the columns {sorted(header)}, wanted 'file_name' and 'text' or 'caption'")
    for column in ("file_name", *COLUMNS):
        if header.count(column) > 1:
            raise ValueError(f"{what} has the column '{column}' {header.count(column)} times: keep one of them")


def _check_swallowed(value: str, folder: str, names: Collection[str], what: str) -> None:
    """Raises: ValueError where a value of several lines holds what looks like the next rows, for a quote that was not closed."""
    for number, line in enumerate(value.splitlines()[1:], 1):
        for piece in line.split(","):
            if _composed(posixpath.normpath(posixpath.join(folder, piece.strip(' "')))) in names:
                raise ValueError(
                    f"{what}: a quote that begins there takes in the row of '{piece.strip()}', {number} lines on: close it, and {QUOTING}"
                )
