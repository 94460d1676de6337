"""What lies in a folder of pictures: the pictures, the files of captions, and what is left out of it and why."""

from __future__ import annotations

import errno
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from eqldm.data.pictures import PICTURES

TARS = (".tar",)
METADATA = ("metadata.csv", "metadata.jsonl")
# Endings of files that surely hold no picture: any other ending may be one's, and counts as a loss where it is left out
NO_PICTURES = frozenset(
    ".txt .json .jsonl .csv .tsv .md .rst .html .htm .css .js .xml .yaml .yml .toml .ini .cfg .log .db .url .lnk .lock .sha256 .md5 "
    ".py .sh .ipynb .npy .npz .pt .pth .pkl .bin .safetensors .parquet .arrow .feather .zip .tar .gz .tgz .xz .zst .7z .rar "
    ".cls .caption .captions .tags .idx .index .id .vtt .srt .mp3 .wav .flac .ogg .mp4 .mkv .webm .mov .avi".split()
)
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
ARCHIVES = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
# Why files are left out. The ending goes before: "12 .heic (not read here: ...)"
NOT_READ = "not read here: convert them to PNG or JPEG first"
NEEDS_HEIF = "not read here: pip install pillow-heif"
HIDDEN = "hidden"
HIDDEN_LOCKED = "hidden, and cannot be listed"
APPLE = "macOS's notes about other files"
DANGLING = "links to nothing"
IRREGULAR = "no regular files"
REPEATED = "linked folders that are searched already"
ORPHAN = "no picture of that name"
OTHER = "no pictures"
PACKED = "packed"
MADE = "made before, in --out"
NO_LABEL = "their labels, which are no integers"
DOTTED = "more than one dot in the name: in a tar, what follows the first one is the ending"
BESIDE = "beside the picture of their sample"
NO_LOSS = (HIDDEN_LOCKED, APPLE, REPEATED, ORPHAN, OTHER, BESIDE, "metadata")
LARGE_SHARE = 1 / 3  # of the pictures, which is not left out without being asked


@dataclass
class Listing:
    """The files of a folder and its subfolders whose ending is wanted, by their names relative to it.

    Bytes of a name that are not UTF-8 are shown as `\\xe9`; `raw` has such names as they are on the disk.
    """

    folder: Path
    wanted: tuple[str, ...] = PICTURES
    sizes: dict[str, int] = field(default_factory=dict)  # of the files wanted, bytes; sorted by name
    texts: list[str] = field(default_factory=list)  # .txt, metadata.csv, metadata.jsonl: files of captions
    left_out: Counter = field(default_factory=Counter)  # of (reason, ending)
    raw: dict[str, bytes] = field(default_factory=dict)

    @property
    def num_files(self) -> int:
        """All that were found, those of captions and those left out too."""
        left_out = sum(count for (reason, ending), count in self.left_out.items() if ending != "folder" and reason != ORPHAN)
        return len(self.sizes) + len(self.texts) + left_out

    def path(self, name: str) -> Path:
        """Where a file of that name lies."""
        return self.folder / os.fsdecode(self.raw.get(name, name.encode()))


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Raises: OSError that names the file where the system fails to read it, with what it said; that is never a picture's fault."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        code = errno.errorcode.get(error.errno, f"error {error.errno}")
        raise OSError(f"'{shown(path)}' cannot be read: {os.strerror(error.errno)} ({code})") from error


def shown(name: object) -> str:
    """A name that can be printed and written anywhere: bytes that are not UTF-8, and line feeds and their like, as `\\xe9`."""
    raw = os.fsencode(name) if isinstance(name, os.PathLike) else name if isinstance(name, bytes) else None
    raw = str(name).encode("utf-8", "surrogateescape") if raw is None else raw
    return CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", raw.decode("utf-8", "backslashreplace"))


def ending_of(name: str) -> str:
    """The ending in small letters, with its dot; "" where there is none."""
    return PurePosixPath(name).suffix.lower()


def list_folder(folder: str | Path, wanted: tuple[str, ...] = PICTURES) -> Listing:
    """Lists a folder and its subfolders, linked ones too, each once. Hidden files and folders are left out, and counted.

    Raises: FileNotFoundError where it is no folder; OSError where one of its folders cannot be listed.
    """
    folder = Path(folder)
    with reading(folder):
        is_folder = folder.is_dir()
    if not is_folder:
        raise FileNotFoundError(f"'{shown(folder)}' is not a folder: name the folder that holds the pictures")
    listing = Listing(folder, wanted)
    _walk(os.fsencode(folder), listing)
    listing.sizes = dict(sorted(listing.sizes.items()))
    listing.texts.sort()
    return listing


def holds_none(listing: Listing, what: str) -> str:
    """The message where none of the wanted files is there, with what is."""
    rest = f". It holds {describe_left_out(listing.left_out)}" if listing.left_out else ""
    return f"'{shown(listing.folder)}' holds no {what}, wanted files that end in {', '.join(listing.wanted)}{rest}"


def _walk(root: bytes, listing: Listing) -> None:
    """The folders first, then what they link to, so that a folder keeps its own name where links lead to it as well; then hidden ones."""
    here = os.path.realpath(root)
    folders, seen = [(b"", here)], {here}
    links: list[tuple[bytes, bytes]] = []
    hidden: list[tuple[bytes, bytes]] = []
    while folders or links or hidden:
        if not folders:
            queue = links or hidden
            queue.sort(reverse=True)
            name, real = queue.pop()
            if real in seen:
                if queue is links:
                    listing.left_out[REPEATED, "folder"] += 1
                continue
            seen.add(real)
            folders.append((name, real))
        name, real = folders.pop()
        for entry in _scan(os.path.join(root, name) if name else root, name, listing.left_out):
            inner = os.path.join(name, entry.name)
            with reading(entry.path):
                kind, size = _kind(entry)
            if kind != "folder" or (entry.is_symlink() and _hidden(inner)):
                _sort_in(inner, kind, size, listing)
            elif entry.is_symlink():
                links.append((inner, os.path.realpath(entry.path)))
            elif _hidden(inner):
                hidden.append((inner, os.path.join(real, entry.name)))
            elif (own := os.path.join(real, entry.name)) not in seen:  # else a link has led there before
                seen.add(own)
                folders.append((inner, own))


def _scan(path: bytes, name: bytes, left_out: Counter) -> list[os.DirEntry]:
    try:
        with reading(path), os.scandir(path) as entries:
            return list(entries)
    except OSError:
        if not _hidden(name):
            raise
        left_out[HIDDEN_LOCKED, "folder"] += 1
        return []


def _hidden(name: bytes) -> bool:
    return any(part.startswith(b".") for part in name.split(b"/"))


def _kind(entry: os.DirEntry) -> tuple[str, int]:
    """`folder`, `file` or a reason to leave it out, and the size in bytes."""
    try:
        about = entry.stat()
    except OSError as error:
        if entry.is_symlink() and error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
            return DANGLING, 0
        raise
    if stat.S_ISDIR(about.st_mode):
        return "folder", 0
    return ("file" if stat.S_ISREG(about.st_mode) else IRREGULAR), about.st_size


def _sort_in(raw: bytes, kind: str, size: int, listing: Listing) -> None:
    name = shown(raw)
    base, ending = name.rpartition("/")[2], ending_of(name)
    if _hidden(raw):
        reason = APPLE if base.startswith("._") else HIDDEN
    elif kind != "file":
        reason = HIDDEN if kind == "folder" else kind
    elif ending in listing.wanted or (listing.wanted != TARS and (ending == ".txt" or base in METADATA)):
        if name.encode() != raw:
            if name in listing.sizes or name in listing.texts:
                raise ValueError(f"'{shown(listing.folder)}' holds two files that are both shown as '{name}': rename one of them")
            listing.raw[name] = raw
        if ending in listing.wanted:
            listing.sizes[name] = size
        else:
            listing.texts.append(name)
        return
    elif listing.wanted == TARS:
        reason = PACKED if ending in ARCHIVES else OTHER
    else:
        reason = _why_not_read(ending)
    listing.left_out[reason, "folder" if kind == "folder" else ending] += 1


def _why_not_read(ending: str) -> str:
    return NEEDS_HEIF if ending in (".heic", ".heif", ".hif") else OTHER if ending in NO_PICTURES else NOT_READ


def left_out_of_tar(samples: list[dict], ignored: dict[str, list[str]]) -> Counter:
    """The (reason, ending) of a tar's files that are neither pictures nor captions, by what `read_tar` gives."""
    left_out: Counter = Counter()
    for reason, names in ignored.items():
        for name in names:
            left_out[APPLE if posixpath.basename(name).startswith("._") else reason, ending_of(name)] += 1
    for sample in samples:
        picture = next((ending for ending in sample if f".{ending}" in PICTURES), None)
        for ending in sample.keys() - {"__key__", picture, "txt", "json"}:
            last = ending_of(f"x.{ending}")
            if picture is not None:
                reason = BESIDE
            elif last in PICTURES:
                reason = DOTTED
            else:
                reason = _why_not_read(last)
            left_out[reason, last] += 1
    return left_out


def num_lost(left_out: Counter) -> int:
    """How many of the files that are left out may be pictures."""
    return sum(
        count
        for (reason, ending), count in left_out.items()
        if reason not in NO_LOSS and (ending in PICTURES if reason == HIDDEN else ending not in NO_PICTURES)
    )


def check_share(left_out: Counter, num_pictures: int, of: object) -> None:
    """Raises: ValueError where more than `LARGE_SHARE` of the pictures are left out; num_pictures: those that are not."""
    lost = num_lost(left_out)
    if lost > LARGE_SHARE * (lost + num_pictures):
        raise ValueError(
            f"{lost} of {lost + num_pictures} pictures of {of} would be left out: {describe_left_out(left_out)}. "
            "Pass --allow-left-out to go on without them"
        )


def describe_left_out(left_out: Counter) -> str:
    """Such as `12 .heic, 3 without ending (not read here: ...), 3 .png (hidden)`; `nothing`."""
    by_reason: dict[str, list[str]] = {}
    for (reason, ending), count in sorted(left_out.items(), key=lambda item: (item[0][0] in NO_LOSS, -item[1], item[0])):
        by_reason.setdefault(reason, []).append(f"{count} {ending or 'without an ending'}")
    return ", ".join(f"{', '.join(files)} ({reason})" for reason, files in by_reason.items()) or "nothing"


def left_out_list(left_out: Counter) -> list[dict]:
    """`[{reason, ending, count}, ...]`, as a manifest has it."""
    return [{"reason": reason, "ending": ending, "count": count} for (reason, ending), count in sorted(left_out.items())]


def count_left_out(listed: Iterable[dict]) -> Counter:
    """The inverse of `left_out_list`, for lists of several shards."""
    total: Counter = Counter()
    for item in listed:
        total[item["reason"], item["ending"]] += item["count"]
    return total
