"""The decoder: what is a picture, what its metadata may cost (nothing), and that no other place opens one."""

from __future__ import annotations

import ast
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from PIL.PngImagePlugin import PngInfo

from eqldm.data import pictures as module
from eqldm.data.pictures import PICTURES, UnfitPicture, _webp_size, read_picture

ROOT = Path(__file__).parents[1]
FORMATS = [name for name in module.FORMATS if name in module._formats()]  # an older Pillow lacks some
WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).resize((32, 24), 2)  # 32 px wide, 24 px high


def saved(format: str, picture: Image.Image = WIDE, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int = 6, *tags: tuple[int, int, int, bytes], count: int | None = None) -> bytes:
    """EXIF of an orientation, and of more `tags` (number, type, count of values, four bytes); count: how many it claims to hold."""
    entries = sorted([(0x0112, 3, 1, struct.pack(">H2x", orientation)), *tags])
    header = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries) if count is None else count)
    return header + b"".join(struct.pack(">HHI4s", *entry) for entry in entries) + bytes(4)


MALFORMED = (0x010F, 5, 2**31, b"\xff\xff\xff\xff")  # the maker: a number of rationals that no file holds


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(*chunks: tuple[bytes, bytes], of: bytes | None = None) -> bytes:
    """A PNG with more chunks (kind, content) after its header."""
    content = of or saved("PNG")
    return content[:33] + b"".join(chunk(*each) for each in chunks) + content[33:]


def jpeg_with(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with more segments (marker, content) at its start."""
    made = (bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data for marker, data in segments)
    content = saved("JPEG")
    return content[:2] + b"".join(made) + content[2:]


def test_a_file_that_holds_a_program_starts_none(tmp_path, monkeypatch):
    """Pillow's own open() starts Ghostscript for this one, whatever the file is called."""
    ghostscript = tmp_path / "gs"
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(UnfitPicture, match="no picture in a known format"):
        read_picture(content)
    assert not (tmp_path / "started").exists()
    with pytest.raises(OSError), Image.open(io.BytesIO(content)) as opened:
        opened.load()
    assert (tmp_path / "started").exists()  # else this test would show nothing


def test_no_other_place_opens_pictures():
    """Only `read_picture` knows which formats are safe, and that metadata costs nothing. `read_drawing` opens what we have drawn."""
    opens = {"Image.open", "Image.Image.open", "ImageFile.Parser"}
    forbidden = {"imread", "read_image", "decode_image", "decode_jpeg", "decode_png", "pil_loader", "default_loader", "ImageFolder"}
    found = []
    paths = [*ROOT.glob("*.py"), *(path for folder in ("eqldm", "data", "benchmarks") for path in (ROOT / folder).rglob("*.py"))]
    assert len(paths) > 80
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.removeprefix("PIL.") in opens or name.rpartition(".")[2] in forbidden:
                found.append((path.relative_to(ROOT).as_posix(), [keyword.arg for keyword in node.keywords]))
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not {"imageio", "cv2", "skimage"} & {name.split(".")[0] for name in names}, path
                assert getattr(node, "module", None) != "PIL.Image", f"{path}: import Image, so that its open() is seen"
    assert found == 2 * [("eqldm/data/pictures.py", ["formats"])]


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_opens_and_is_found_by_its_ending(format):
    extensions = {ending for ending in PICTURES if Image.registered_extensions()[ending] == format}
    assert extensions
    picture = read_picture(saved(format))
    assert (picture.mode, picture.size, picture.info) == ("RGB", (32, 24), {})
    assert np.abs(np.asarray(picture, float) - np.asarray(WIDE)).mean() < 10
    assert {name for name in PICTURES if Image.registered_extensions()[name] in (*FORMATS, "HEIF")} == set(PICTURES)


@pytest.mark.parametrize("format", sorted({"PNG", "JPEG", "WEBP", "TIFF", "AVIF"}.intersection(FORMATS)))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(format, orientation):
    turned = read_picture(saved(format, exif=exif(orientation), **({"lossless": True} if format == "WEBP" else {})))
    assert turned.size == ((24, 32) if orientation >= 5 else (32, 24)) and turned.info == {}
    if format == "PNG":
        plain = np.asarray(WIDE)
        expected = [plain, plain[:, ::-1], plain[::-1, ::-1], plain[::-1]]
        expected += [x.transpose(1, 0, 2) for x in (plain, plain[::-1], plain[::-1, ::-1], plain[:, ::-1])]
        assert np.array_equal(np.asarray(turned), expected[orientation - 1])


GROWN = (b"zTXt", b"a\0\0" + zlib.compress(bytes(2 << 20)))
BROKEN = {
    **{f"malformed tag, {format}": saved(format, exif=exif(6, MALFORMED)) for format in ("JPEG", "PNG", "WEBP")},
    "rational where an integer belongs": saved("JPEG", exif=exif(6, (0x0100, 5, 1, b"\0\0\0\x08"), (0x8769, 2, 4, b"abc\0"))),
    "exif cut short, jpeg": saved("JPEG", exif=exif()[:17]),
    "exif cut short, png": saved("PNG", exif=exif()[:17]),
    "exif without header, png": saved("PNG", exif=b"Exif\0\0no exif"),
    "exif that is empty": jpeg_with((0xE1, b"Exif\0\0")),
    "exif as text that is none": saved("PNG", pnginfo=(lambda info: info.add_text("Raw profile type exif", "\n\n\nzz") or info)(PngInfo())),
    "profile, png": png_with((b"iCCP", b"x\0\0" + b"no zlib")),
    "profile that grows": png_with((b"iCCP", b"x\0\0" + zlib.compress(bytes(2 << 20)))),
    "profile without end": png_with((b"iCCP", b"x")),
    "profile, jpeg": jpeg_with((0xE2, b"ICC_PROFILE\0\x09\x01junk")),
    "text that grows": png_with(GROWN),
    "texts that are many": png_with(*[(b"tEXt", b"a\0" + bytes([65]) * 1_000_000)] * 68),
    "text with a wrong checksum": png_with((b"tEXt", b"a\0text")).replace(b"a\0text", b"a\0txet"),
    "text after the picture": saved("PNG")[:-12] + chunk(*GROWN) + saved("PNG")[-12:],
    "international text": png_with((b"iTXt", b"a\0\1")),
    "resolution cut short": png_with((b"pHYs", b"\0")),
    "gamma cut short": png_with((b"gAMA", b"\0")),
    "white point cut short": png_with((b"cHRM", b"\0")),
    "xmp that is none": saved("JPEG", xmp=b"\xff\xfe<x"),
    "photoshop block": jpeg_with((0xED, b"Photoshop 3.0\x008BIM\x03\xed\x00\x00\x00\x00\xff\xff")),
    "adobe block cut short": jpeg_with((0xED, b"Photoshop 3.0\x008BIM")),
    "several pictures, malformed": jpeg_with((0xE2, b"MPF\0II*\0\x08\0\0\0\x01\0\x01\xb0\x04\0\xff\xff\xff\xff\0\0\0\0")),
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_metadata_never_costs_the_picture(content):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor does Pillow flood the terminal
        picture = read_picture(content)
    assert sorted(picture.size) == [24, 32] and picture.mode == "RGB" and set(picture.info) <= {"note"}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_turn_is_used_where_it_can_be_read(format):
    """Also behind a tag that is malformed, in a directory that is cut short, and beside other metadata that is broken."""
    for broken in (exif(6, MALFORMED), exif(6, count=9), exif(6, (0x0100, 5, 1, b"\0\0\0\x08"))):
        assert read_picture(saved(format, exif=broken)).size == (24, 32)
    assert read_picture(png_with(GROWN, of=saved("PNG", exif=exif()))).size == (24, 32)


def test_what_was_left_out_is_said():
    for content in (saved("PNG", exif=b"Exif\0\0no exif"), saved("JPEG", exif=exif()[:20]), saved("WEBP", exif=exif()[:20])):
        picture = read_picture(content)
        assert picture.size == (32, 24) and "its EXIF cannot be read" in picture.info["note"]
    assert "its metadata cannot be read" in read_picture(png_with(GROWN)).info["note"]


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_orientation_that_is_none_turns_nothing(orientation):
    for format in ("PNG", "JPEG", "WEBP"):
        picture = read_picture(saved(format, exif=exif(orientation)))
        assert picture.size == (32, 24) and picture.info == {}
    text = Image.Exif()
    text.load(exif(1).replace(b"\x01\x12\0\x03\0\0\0\x01\0\x01\0\0", b"\x01\x12\0\x02\0\0\0\x04abc\0"))
    assert text[0x0112] == "abc" and read_picture(saved("JPEG", exif=text._loaded_exif)).size == (32, 24)


def test_tiff_with_broken_descriptions():
    content = bytearray(saved("TIFF", tiffinfo={270: "a description", 274: 6}))
    start = struct.unpack_from("<I", content, 4)[0]
    for at in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        if struct.unpack_from("<H", content, at)[0] == 270:
            struct.pack_into("<HII", content, at + 2, 5, 2**31, 2**32 - 1)
    assert read_picture(bytes(content)).size == (24, 32)


def test_modes():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    half = Image.new("LA", (8, 8), (0, 0))
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0] * 256)
    for content in (saved("PNG", clear), saved("WEBP", clear, lossless=True), saved("PNG", half), saved("PNG", palette, transparency=0),
                    saved("GIF", palette, transparency=0), saved("PNG", Image.new("L", (8, 8)), transparency=0)):  # fmt: skip
        assert (np.asarray(read_picture(content)) == 255).all()
    for array in (np.full((8, 8), 40000, np.uint16), np.full((8, 8), 0.5, np.float32), np.full((8, 8), 70000, np.int32)):
        with pytest.raises(UnfitPicture, match="more than 8 bits a channel"):
            read_picture(saved("TIFF", Image.fromarray(array)))
    with pytest.raises(UnfitPicture, match="more than 8 bits a channel"):
        read_picture(saved("PNG", Image.fromarray(np.full((8, 8), 40000, np.uint16))))
    rows = b"".join(b"\0" + struct.pack(">3H", 0xFFFF, 0x8000, 0) * 2 for _ in range(2))
    header = struct.pack(">2I5B", 2, 2, 16, 2, 0, 0, 0)
    deep = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert np.asarray(read_picture(deep)).tolist() == [[[255, 128, 0]] * 2] * 2  # colours of 16 bits span their range


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_of_several_pictures_the_first_is_taken(format):
    first, second = Image.new("RGB", (8, 8), (200, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 200))
    content = saved(format, first, save_all=True, append_images=[second])
    assert np.abs(np.asarray(read_picture(content), float) - (200, 0, 0)).max() < 4


def test_a_decompression_bomb_is_refused_by_a_limit_that_is_stated(monkeypatch):
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">2I", 60000, 60000) + b"\x08\x02\0\0\0") + saved("PNG")[33:]
    for limit in (Image.MAX_IMAGE_PIXELS, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(UnfitPicture, match="too large: wanted at most 178956970 pixels"):
            read_picture(bomb)
    with pytest.raises(UnfitPicture, match="too large"):
        read_picture(saved("GIF")[:6] + struct.pack("<2H", 60000, 60000) + saved("GIF")[10:])


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 50}, {"exif": b"Exif\0\0"}, {"save_all": True}], ids=str)
def test_a_webp_tells_its_size_before_canvases_are_made(options):
    """Pillow made them first: an animation of 16,383 px, of some hundred bytes, took 2.5 GB."""
    pictures, buffer = [Image.new("RGB", (70, 33), (n, 0, 0)) for n in range(3)], io.BytesIO()
    pictures[0].save(buffer, "WEBP", **({"append_images": pictures[1:]} if "save_all" in options else {}), **options)
    content = bytearray(buffer.getvalue())
    assert _webp_size(bytes(content)) == (70, 33)
    assert read_picture(bytes(content)).size == (70, 33)
    if content[12:16] == b"VP8X":
        content[24:30] = b"\xfe\x3f\0" * 2
        with pytest.raises(UnfitPicture, match="too large: wanted at most .* pixels .16383 x 16383 pixels"):
            read_picture(bytes(content))


@pytest.mark.parametrize("format", FORMATS)
def test_half_a_file_is_corrupt_with_the_same_words_each_time(format):
    for content in (saved(format)[:40], saved(format)[:-200], b"", b"no picture"):
        reasons = set()
        for _ in range(2):
            with pytest.raises(UnfitPicture, match="corrupt: ") as info:
                read_picture(content)
            reasons.add(str(info.value))
        assert len(reasons) == 1 and "0x" not in reasons.pop()


def test_our_own_shards_are_read_as_before():
    for format in ("PNG", "JPEG", "WEBP"):
        content = saved(format)
        with Image.open(io.BytesIO(content)) as opened:
            assert torch.equal(torch.from_numpy(np.array(opened.convert("RGB"))), torch.from_numpy(np.array(read_picture(content))))
    assert module.TURNS.keys() == set(range(2, 9))
