"""Decodes pictures: the one place where a picture's bytes become pixels."""

from __future__ import annotations

import io
import struct
import zlib

from PIL import Image, ImageOps, UnidentifiedImageError

PICTURES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# What Pillow raises on broken files: its decoders let the errors of the modules they use through.
CORRUPT = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error, Image.DecompressionBombError)


class UnfitPicture(ValueError):
    """A picture that is skipped, counted and named in the manifest."""


def read_picture(content: bytes) -> Image.Image:
    """A picture file's content in RGB, turned upright (EXIF), transparency over white. Raises: UnfitPicture where it is no whole picture.

    It takes bytes, so that an error of the disk is never mistaken for a broken picture.
    """
    try:
        with Image.open(io.BytesIO(content)) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except CORRUPT as error:
        raise UnfitPicture(f"corrupt: {_about(error)}") from error
    if picture.mode.startswith(("I", "F")):  # Pillow would clip these to white
        raise UnfitPicture(f"more than 8 bits a channel: mode {picture.mode}")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _about(error: Exception) -> str:
    """What a decoder said, without the address of the bytes in memory: equal pictures give equal reasons."""
    return "no picture that is known" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
