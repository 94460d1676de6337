"""Decodes pictures: the one place of the project where a picture file's bytes become pixels.

All that reads pictures reads them by the same rules: `data/make_shards.py`, training, encoding, evaluation, reference pictures. Pictures
are often a stranger's files. Pillow also opens formats that are programs rather than pictures: it starts Ghostscript for what begins
like EPS, whatever the file is called. So only the formats below are tried (a test looks for any other way to open a picture).
"""

from __future__ import annotations

import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec

from PIL import ExifTags, Image, UnidentifiedImageError, features

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")  # raster formats that Pillow decodes by itself
CODECS = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}
MAX_PIXELS = 178_956_970  # of a picture: where Pillow, too, takes it for a decompression bomb (at 3 bytes, 512 MiB)
# What Pillow raises of broken bytes: its decoders let the errors of the modules they use through. Some broken TIFFs state strips of
# many gigabytes: a MemoryError within `MAX_PIXELS` is the picture's, and is named with it
CORRUPT = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, EOFError, RuntimeError,
    MemoryError, struct.error, zlib.error,
)  # fmt: skip
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # what shows a picture upright, by the orientation that its EXIF states
ORIENTATION = int(ExifTags.Base.Orientation)
TIFF_TEXTS = {269, 270, 271, 272, ORIENTATION, 282, 283, 285, 286, 287, 296, 297, 305, 306, 315, 316, 333, 337}  # and numbers of that kind
PILLOW = re.compile(r"PIL\.")


class UnfitPicture(ValueError):
    """A picture that is skipped, counted and named in the manifest."""


def read_drawing(content: bytes) -> Image.Image:
    """A PNG that a renderer of ours has just made, in RGBA: its transparency is kept. Strangers' files are for `read_picture`."""
    return Image.open(io.BytesIO(content), formats=["PNG"]).convert("RGBA")


def read_picture(content: bytes) -> Image.Image:
    """A picture file's content in RGB: upright (EXIF), transparency over white, of several pictures in a file the first.

    It takes bytes, so that an error of the disk is never mistaken for a broken picture. Colour profiles are not applied; colours of 16
    bits are reduced to 8. Metadata that cannot be read never costs the picture, which is then taken as it lies: `info["note"]` says so.
    Otherwise `info` is empty.

    Raises: UnfitPicture where it is no whole picture of `FORMATS`, has more than `MAX_PIXELS`, or is gray of more than 8 bits (a
    measurement, such as depth, whose range no mode of Pillow states).
    """
    _mute()
    try:
        picture, note = _decode(content), None
    except CORRUPT as error:
        picture, note = _decode_without_metadata(content, error)
    if picture.mode.startswith(("I", "F")):  # Pillow would clip these to white
        raise UnfitPicture(f"more than 8 bits a channel: mode {picture.mode}")
    try:
        turn = _turn(picture)
    except CORRUPT as error:
        turn, note = None, f"its EXIF cannot be read ({_about(error)}): taken as it lies"
    try:
        picture = _flat(picture if turn is None else picture.transpose(turn))
    except CORRUPT as error:
        raise UnfitPicture(f"corrupt: {_about(error)}") from error
    picture.info = {"note": note} if note else {}
    return picture


@cache
def _formats() -> list[str]:
    Image.init()
    if find_spec("pillow_heif"):  # an optional package
        from pillow_heif import register_heif_opener

        register_heif_opener()
    missing = [name for name, codec in CODECS.items() if not features.check(codec)]  # Pillow may have been built without them
    return [name for name in (*FORMATS, "HEIF") if name in Image.OPEN and name not in missing]


def _endings() -> tuple[str, ...]:
    """Those of the files that can be read here, in small letters."""
    return tuple(sorted(ending for ending, name in Image.registered_extensions().items() if name in _formats()))


def _mute() -> None:
    """Pillow warns of each odd byte of each picture's metadata, with another text each time, and would bury what matters."""
    if ("ignore", None, Warning, PILLOW, 0) not in warnings.filters:  # not catch_warnings: it is not for threads
        warnings.filterwarnings("ignore", module=PILLOW.pattern)


def _decode(content: bytes) -> Image.Image:
    """The first picture of a file, as it lies. Raises: UnfitPicture where it is too large; one of `CORRUPT`."""
    try:
        _check_size(_webp_size(content))
        picture = Image.open(io.BytesIO(content), formats=_formats())
        _check_size(picture.size)  # where Pillow's own limit was lifted
        picture.load()
    except Image.DecompressionBombError as error:
        raise UnfitPicture(f"too large: wanted at most {MAX_PIXELS} pixels ({_about(error)})") from error
    return picture


def _check_size(size: tuple[int, int]) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise Image.DecompressionBombError(f"{size[0]} x {size[1]} pixels")


def _webp_size(content: bytes) -> tuple[int, int]:
    """Of a WebP, by its header; (0, 0) of anything else. Pillow makes its canvases, of 8 bytes a pixel, before it tells the size."""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < 30:
        return 0, 0
    if content[12:16] == b"VP8X":
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if content[12:16] == b"VP8L":
        bits = int.from_bytes(content[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(content[26:28], "little") & 0x3FFF, int.from_bytes(content[28:30], "little") & 0x3FFF


def _decode_without_metadata(content: bytes, error: Exception) -> tuple[Image.Image, str]:
    """What `_decode` gives of a file whose metadata may be all that is broken, and a note of it. Raises UnfitPicture."""
    if isinstance(error, UnfitPicture):
        raise error
    for bare in _without_metadata(content):
        try:
            return _decode(bare), f"its metadata cannot be read ({_about(error)}): left out"
        except CORRUPT:
            continue
    raise UnfitPicture(f"corrupt: {_about(error)}") from error


def _without_metadata(content: bytes) -> Iterator[bytes]:
    """A file without what is not needed to show it: first with its EXIF, which holds the turn, then without."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        for keep in ((b"tRNS", b"eXIf"), (b"tRNS",)):
            yield content[:8] + b"".join(chunk for kind, chunk in _png_chunks(content) if kind[:1].isupper() or kind in keep)
    elif content.startswith(b"\xff\xd8"):
        for kept in (b"Exif\0\0", None):
            yield b"".join(part for kind, part in _jpeg_segments(content) if not _describes(kind) or kept and part[4:].startswith(kept))
    elif content[:4] in (b"II*\0", b"MM\0*"):
        for turn in ((ORIENTATION,), ()):
            yield _bare_tiff(content, turn)
    elif content[4:8] == b"ftyp":  # AVIF, HEIF: items of an unknown kind are left alone
        yield content.replace(b"Exif", b"skip")


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(kind, the whole chunk) of a PNG. The kinds that are needed begin with a capital."""
    start = 8
    while start + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, start)
        yield kind, content[start : start + 12 + size]
        start += 12 + size


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, the whole segment) of a JPEG up to its scan, which comes last with all that follows."""
    yield 0xD8, content[:2]
    start = 2
    while start + 4 <= len(content) and content[start] == 0xFF and content[start + 1] != 0xDA:
        if content[start + 1] == 0xFF:  # fill bytes
            start += 1
            continue
        size = 2 + int.from_bytes(content[start + 2 : start + 4], "big")
        yield content[start + 1], content[start : start + size]
        start += size
    yield 0xDA, content[start:]


def _describes(marker: int) -> bool:
    """Whether a JPEG's segment is metadata: a comment, or an APP but for JFIF and Adobe, which say what the colours are."""
    return marker == 0xFE or 0xE0 < marker <= 0xEF and marker != 0xEE


def _bare_tiff(content: bytes, keep: tuple[int, ...]) -> bytes:
    """A TIFF whose first directory lists what its pixels are, alone; nothing moves, so that all offsets stay right."""
    try:
        order, start, entries, _ = _directory(content)
    except struct.error:
        return content
    kept = [entry for entry in entries if _is_of_pixels(_tag(order, entry), keep)]
    directory = struct.pack(order + "H", len(kept)) + b"".join(kept) + bytes(4)  # no second directory
    return content[:start] + directory + content[start + len(directory) :]


def _directory(tiff: bytes) -> tuple[str, int, list[bytes], bool]:
    """Byte order, offset and entries of a TIFF's first directory (EXIF is one too), and whether it is whole. Raises struct.error."""
    order = "<" if tiff.startswith(b"II") else ">"
    start = struct.unpack_from(order + "I", tiff, 4)[0]
    count = struct.unpack_from(order + "H", tiff, start)[0]
    entries = [tiff[at : at + 12] for at in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12)]
    return order, start, entries, len(entries) == count


def _tag(order: str, entry: bytes) -> int:
    return struct.unpack_from(order + "H", entry)[0]


def _is_of_pixels(tag: int, keep: tuple[int, ...]) -> bool:
    """Whether a tag of a TIFF is needed to decode it: baseline, without its texts and resolution; extensions; JPEG; YCbCr."""
    return tag in keep or tag in range(254, 348) and tag not in TIFF_TEXTS or tag in range(512, 533)


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright; None where nothing is stated, or something else than an orientation. Raises one of `CORRUPT`."""
    # Not ImageOps.exif_transpose: it also writes the EXIF anew, which fails on tags that nobody needs
    orientation = picture.getexif().get(ORIENTATION)
    if orientation is None and picture.info.get("exif"):  # Pillow gives up at the first tag that is malformed
        order, _, entries, whole = _directory(picture.info["exif"].removeprefix(b"Exif\0\0"))
        stated = [struct.unpack_from(order + "H", entry, 8)[0] for entry in entries if _tag(order, entry) == ORIENTATION]
        if not stated and not whole:
            raise ValueError("it is cut short")
        orientation = next(iter(stated), None)
    return TURNS.get(orientation) if isinstance(orientation, int) else None


def _flat(picture: Image.Image) -> Image.Image:
    """In RGB, transparency over white."""
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _about(error: Exception) -> str:
    """What a decoder said, without the address of the bytes in memory: equal pictures give equal reasons."""
    if isinstance(error, UnidentifiedImageError):
        return f"no picture in a known format ({', '.join(_formats())})"
    return str(error) or type(error).__name__


PICTURES = _endings()
