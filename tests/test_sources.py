"""What pictures and captions come from: nothing is left out, cut or misread in silence, and a lost disk is no picture's fault."""

from __future__ import annotations

import errno
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqldm.data import listing as listing_module
from eqldm.data.captions import captions_of, decode_text, draw_caption, is_odd
from eqldm.data.listing import count_left_out, list_folder, num_lost
from eqldm.data.making import UNFINISHED
from eqldm.data.pictures import PICTURES
from eqldm.data.samples import PictureSamples
from eqldm.data.shards import MANIFEST, ShardSet, read_manifest, write_shard
from eqldm.data.sources import PictureFolder, PictureTars, SavedDataset
from eqldm.evaluation.pictures import FolderSamples

make_shards_script = importlib.import_module("make_shards")
make_shards, main = make_shards_script.make_shards, make_shards_script.main
ROOT = Path(__file__).parents[1]


def png(seed: int = 0, side: int = 16, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)).save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six pictures of 16 px, a side-car beside each."""
    root = tmp_path / "pictures"
    root.mkdir()
    for number in range(6):
        (root / f"{number}.png").write_bytes(png(number))
        (root / f"{number}.txt").write_text(f"picture {number}")
    return root


def run(*arguments: object) -> int:
    return main([*map(str, arguments), "--size", "16", "--workers", "1", "--format", "png"])


def captions(out: Path) -> dict[str, str]:
    shards = ShardSet.open(out)
    return {json.loads(shards.read(n, "json"))["file"]: shards.read(n, "txt").decode() for n in range(len(shards))}


def failing(path: Path, monkeypatch, code: int, after: int = 0) -> None:
    """Reading a file fails as on a network file system that went away."""
    real, reads = Path.read_bytes, Counter()

    def read_bytes(self):
        reads[self] += 1
        if self == path and reads[self] > after:
            raise OSError(code, os.strerror(code), str(self))
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)


# A source that goes away


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ENOENT])
def test_a_picture_that_the_disk_refuses_stops_the_shard_and_the_next_run_takes_it_up(folder, tmp_path, monkeypatch, capsys, code):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run("--pictures", folder, "--out", whole, "--shard-size", 2) == 0
    with monkeypatch.context() as patch:
        failing(folder / "3.png", patch, code)
        assert run("--pictures", folder, "--out", out, "--shard-size", 2) == 2
    error = capsys.readouterr().err
    assert f"error: '{folder}/3.png' cannot be read: {os.strerror(code)} ({errno.errorcode[code]})" in error
    assert "after 1 of 3 shards. Finished shards are kept, run the same command again" in error
    assert not (out / MANIFEST).exists() and sorted(path.name for path in out.glob("*.tar*")) == ["pictures-000000.tar"]
    kept = (out / "pictures-000000.tar").stat().st_mtime_ns
    assert run("--pictures", folder, "--out", out, "--shard-size", 2) == 0
    assert (out / "pictures-000000.tar").stat().st_mtime_ns == kept
    assert read_manifest(out) == read_manifest(whole)


def test_a_picture_that_shrinks_after_the_listing_is_no_corrupt_picture(folder):
    source = PictureFolder.open(folder)
    (folder / "2.png").write_bytes(b"half")
    with pytest.raises(OSError, match=r"2.png' has 4 bytes now, and had \d+ when its folder was listed"):
        source.read("2.png")


@pytest.mark.parametrize("name", ["1.txt", "metadata.csv"])
def test_captions_that_the_disk_refuses(folder, tmp_path, monkeypatch, capsys, name):
    (folder / "metadata.csv").write_text("file_name,text\n1.png,picture 1\n")
    failing(folder / name, monkeypatch, errno.EIO)
    assert run("--pictures", folder, "--out", tmp_path / "out") == 2
    assert f"{name}' cannot be read: Input/output error (EIO)" in capsys.readouterr().err


def test_a_folder_that_cannot_be_listed_does_not_vanish(folder, monkeypatch):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".git").mkdir()
    real = os.scandir

    def scandir(path):
        if os.fsdecode(path).endswith(("/er", "/.git")):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(listing_module.os, "scandir", scandir)
    with pytest.raises(OSError, match=r"deep/er' cannot be read: Permission denied \(EACCES\)"):
        list_folder(folder)
    (folder / "deep" / "er").rmdir()
    assert list_folder(folder).left_out == {("hidden, and cannot be listed", "folder"): 1}


def test_tars_that_the_disk_refuses(tmp_path, monkeypatch, capsys):
    (tmp_path / "tars").mkdir()
    for number in range(2):
        write_shard(tmp_path / "tars" / f"{number}.tar", [{"__key__": f"{number}", "png": png(), "txt": "x"}])
    real = make_shards_script.PictureTars.samples

    def samples(self, part, left_out):  # the file system goes away behind the index
        for sample in real(self, part, left_out):
            if part == "1.tar":
                lost = os.open("/proc/self/mem", os.O_RDONLY)  # whose first bytes are EIO
                os.dup2(lost, sample.captions.args[0]["txt"].args[0].fileno())
                os.close(lost)
            yield sample

    monkeypatch.setattr(PictureTars, "samples", samples)
    assert run("--tars", tmp_path / "tars", "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "1.tar' cannot be read: Input/output error (EIO): stopped after 1 of 2 shards" in error
    monkeypatch.undo()
    assert run("--tars", tmp_path / "tars", "--out", tmp_path / "out") == 0
    assert read_manifest(tmp_path / "out")["count"] == 2


def test_folders_whose_disk_failed_under_an_early_version_are_not_taken_for_whole(folder, tmp_path):
    """Early versions counted errors of the disk as corrupt pictures; `[Errno` in a reason tells."""
    out = tmp_path / "out"
    manifest = make_shards(folder, out, 16, shard_size=2)
    lost = {"file": "3.png", "reason": "corrupt: [Errno 116] Stale file handle: it"}
    (out / MANIFEST).write_text(json.dumps({**manifest, "skipped": [lost]}))
    with pytest.raises(ValueError, match="early version while .* 1 pictures are missing, such as 3.png .*--overwrite"):
        make_shards(folder, out, 16, shard_size=2)
    # the same, interrupted: that shard alone is made anew
    entries = [{**entry, "skipped": [lost] if number == 1 else []} for number, entry in enumerate(manifest["shards"])]
    names = [entry["name"] for entry in entries]
    (out / UNFINISHED).write_text(json.dumps({"generator": manifest["generator"], "names": names, "shards": entries}))
    (out / MANIFEST).unlink()
    (out / names[1]).write_bytes((out / names[1]).read_bytes()[:-512] + bytes(512))
    before = [(out / name).stat().st_ino for name in names]
    assert make_shards(folder, out, 16, shard_size=2) == manifest
    assert [(out / name).stat().st_ino != inode for name, inode in zip(names, before)] == [False, True, False]


# What is left out


def test_what_is_left_out_is_counted_by_reason_and_ending(folder, tmp_path, capsys):
    for name in ("a.psd", ".b.png", ".hidden/c.png", ".hidden/deep/d.JPG", "._0.png", "e.json", "README.txt", "note.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    os.symlink(tmp_path / "gone.png", folder / "gone.png")
    os.mkfifo(folder / "pipe.png")
    expected = {
        ("not read here: convert them to PNG or JPEG first", ".psd"): 1,
        ("hidden", ".png"): 2,
        ("hidden", ".jpg"): 1,
        ("macOS's notes about other files", ".png"): 1,
        ("links to nothing", ".png"): 1,
        ("no regular files", ".png"): 1,
        ("no pictures", ".json"): 1,
        ("no pictures", ".md"): 1,
        ("no picture of that name", ".txt"): 1,
    }
    source = PictureFolder.open(folder)
    assert source.left_out == expected and num_lost(source.left_out) == 6
    with pytest.raises(ValueError, match=r"^6 of 12 pictures of '.*' would be left out: 2 .png, 1 .jpg \(hidden\), .*--allow-left-out"):
        make_shards(folder, tmp_path / "out", 16)
    assert not (tmp_path / "out").exists()
    manifest = make_shards(folder, tmp_path / "out", 16, allow_left_out=True)
    assert manifest["count"] == 6 and count_left_out(manifest["left_out"]) == expected
    assert (
        "skipped: none; left out: 2 .png, 1 .jpg (hidden), 1 .png (links to nothing), 1 .png (no regular files), 1 .psd (not"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("ending", [".avif", ".jfif", ".jpe", ".JPG", ".jp2", ".ppm"])
def test_whatever_pillow_reads_safely_is_read(tmp_path, ending):
    format = {".avif": "AVIF", ".jp2": "JPEG2000", ".ppm": "PPM"}.get(ending, "JPEG")
    (tmp_path / f"a{ending}").write_bytes(png(format=format))
    (tmp_path / "a.txt").write_text("a")
    manifest = make_shards(tmp_path, tmp_path / "out", 16)
    assert manifest["count"] == 1 and manifest["left_out"] == []


@pytest.mark.skipif(".heic" in PICTURES, reason="pillow-heif is installed")
def test_what_would_read_the_rest_is_said(folder):
    (folder / "a.HEIC").write_bytes(b"x")
    assert list_folder(folder).left_out == {("not read here: pip install pillow-heif", ".heic"): 1}


def test_a_folder_without_pictures_says_what_it_holds(tmp_path):
    (tmp_path / "a.psd").write_bytes(b"x")
    with pytest.raises(ValueError, match="holds no pictures, .*It holds 1 .psd"):
        make_shards(tmp_path, tmp_path / "out", 16)


def test_linked_folders_are_searched_once_and_loops_end(folder, tmp_path):
    other = tmp_path / "other"
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "x.png").write_bytes(png())
    (other / "deep" / "x.txt").write_text("x")
    (folder / "real").mkdir()
    (folder / "real" / "y.png").write_bytes(png())
    (folder / "real" / "y.txt").write_text("y")
    (folder / ".store").mkdir()
    (folder / ".store" / "z.png").write_bytes(png())
    (folder / ".store" / "z.txt").write_text("z")
    links = {"a": "real", "b": other, "c": other, "d": other / "deep", "up": tmp_path, "loop": folder, "stored": ".store", "me": "me"}
    for name, target in links.items():
        os.symlink(target, folder / name)
    os.symlink(folder, other / "back")
    found = list_folder(folder)
    assert set(found.sizes) - {f"{n}.png" for n in range(6)} == {"real/y.png", "b/deep/x.png", "stored/z.png"}
    assert found.left_out == {("linked folders that are searched already", "folder"): 5, ("links to nothing", ""): 1}
    assert make_shards(folder, tmp_path / "out", 16)["count"] == 9


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_what_tars_leave_out_and_the_finished_shards_are_kept(tmp_path, capsys):
    tars, out = tmp_path / "tars", tmp_path / "out"
    apple = {"._0.png": b"x", "._1.png": b"x", "__MACOSX/0.png": b"x", "README": b"x"}
    write_tar(
        tars / "a.tar", {**apple, "0.png": png(), "0.txt": b"zero", "0.cls": b"3", "0.seg.png": png(1), "1.psd": b"x", "1.txt": b"one"}
    )
    write_tar(tars / "b.tar", {"0.avif": png(format="AVIF"), "0.txt": b"again", "2.v1.png": png(), "3.json": b"{}", "4.psd": b"x"})
    assert run("--tars", tars, "--out", out) == 2
    error = capsys.readouterr().err
    assert "4 of 6 pictures of the tars of" in error and "2 .psd (not read here" in error and "--allow-left-out" in error
    assert not (out / MANIFEST).exists()
    kept = (out / "pictures-000000.tar").stat().st_ino
    assert run("--tars", tars, "--out", out, "--allow-left-out") == 0
    said = capsys.readouterr().err
    assert "2 pictures of 6; skipped: {'no picture': 4}" in said and "1 have a key that an earlier one has" in said
    assert (out / "pictures-000000.tar").stat().st_ino == kept
    assert count_left_out(read_manifest(out)["left_out"]) == {
        ("macOS's notes about other files", ".png"): 2,
        ("metadata", ".png"): 1,
        ("no ending", ""): 1,
        ("beside the picture of their sample", ".cls"): 1,
        ("beside the picture of their sample", ".png"): 1,
        ("not read here: convert them to PNG or JPEG first", ".psd"): 2,
        ("more than one dot in the name: in a tar, what follows the first one is the ending", ".png"): 1,
    }


def test_many_corrupt_pictures_are_no_success(folder, tmp_path, capsys):
    for number in (0, 1):
        (folder / f"{number}.png").write_bytes(b"no picture")
    assert make_shards(folder, tmp_path / "third", 16)["count"] == 4
    (folder / "2.png").write_bytes(b"no picture")
    assert run("--pictures", folder, "--out", tmp_path / "half") == 2
    error = capsys.readouterr().err
    assert "3 of 6 pictures" in error and "3 pictures (corrupt, the first is 0.png: corrupt: no picture" in error
    assert run("--pictures", folder, "--out", tmp_path / "half", "--allow-left-out") == 0
    assert read_manifest(tmp_path / "half")["count"] == 3


def test_tars_that_are_packed_or_gone_and_samples_that_are_torn(tmp_path):
    write_tar(tmp_path / "a.tar", {"0.png": png(), "1.png": png(), "0.txt": b"zero", "1.txt": b"one"})
    with pytest.raises(ValueError, match="a.tar': sample '0' lies in two places.*: its files must follow each other"):
        make_shards(PictureTars.open(tmp_path), tmp_path / "out", 16, allow_missing_captions=True)
    (tmp_path / "b.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"holds more than its 1 tars: 1 .gz \(packed\) would be left out"):
        PictureTars.open(tmp_path)
    (tmp_path / "b.tar.gz").unlink()
    os.symlink(tmp_path / "gone.tar", tmp_path / "c.tar")
    with pytest.raises(ValueError, match=r"1 .tar \(links to nothing\)"):
        PictureTars.open(tmp_path)


# Captions

BOTH = "file_name,text\n0.png,zero\n1.png,one\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file_name,text\n0.png,a cat, on a mat\n", "line 2 has 3 columns, its header 2: put a caption that holds a comma"),
        ("file_name,text\n0.png,zero\n1.png\n", "line 3 has 1 columns, its header 2"),
        ('file_name,text\n0.png,zero\n1.png,"one\n', "the row that begins in line 3 is no CSV"),
        ('file_name,text\n0.png,"a "big" cat"\n', "the row that begins in line 2 is no CSV"),
        ('file_name,text\n0.png,"a \\"big\\" cat"\n', "the row that begins in line 2 is no CSV"),
        ('file_name,text\n0.png,"zero\n1.png,one"\n', "line 2: a quote that begins there takes in the row of '1.png', 1 lines on"),
        ("file_name;text\n0.png;zero\n", "parts its columns by semicolons"),
        ('"file_name"\t"text"\n0.png\tzero\n', "parts its columns by tabs"),
        ("0.png,zero\n1.png,one\n", "has no header: its first line should be file_name,text and is 0.png,zero"),
        ("file_name,text,text\n0.png,zero,one\n", "has the column 'text' 2 times"),
        (BOTH + "0.png,zero\n", "line 4 names '0.png' again, after line 2: .* a list in metadata.jsonl"),
        (BOTH + ",nothing\n", 'line 4: file_name is "", wanted the name of a picture'),
        ("file_name,text\n0.png,ze\0ro\n", "holds a NUL character in line 2"),
        ("", r"has the columns \[\]"),
        ("file_name,text\n", "holds no captions"),
        ('file_name, text\n0.png, "a ""big"" cat"\n', 'line 2: a space stands before the quote of "a "'),
    ],
)
def test_a_csv_that_is_not_as_it_should_be(folder, tmp_path, content, message):
    for path in folder.glob("*.txt"):
        path.unlink()
    (folder / "metadata.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"^'{folder}/metadata.csv'.*{message}"):
        make_shards(folder, tmp_path / "out", 16)


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ("gone.png", "not there"),
        ("x" * 300 + ".png", "not there"),
        ("a.psd", "left out: .psd"),
        ("/bin/sh", "outside the folder: file_name is the way to a picture from the folder of its metadata"),
        ("../..", "outside the folder: file_name is the way to a picture from the folder of its metadata"),
        ("sub\\a.png", "not there: folders are parted by / in file_name"),
    ],
)
def test_captions_of_no_picture_are_listed(folder, tmp_path, named, why):
    (folder / "a.psd").write_bytes(b"x")
    (folder / "metadata.csv").write_text(f"file_name,text\n{named},a caption\n")
    assert make_shards(folder, tmp_path / "out", 16)["skipped"] == [{"file": named, "reason": f"named in metadata.csv, but {why}"}]


def test_a_csv_with_commas_quotes_and_line_breaks_in_quotes(folder, tmp_path):
    for number in range(3):
        (folder / f"{number}.txt").unlink()
    content = '\ufefffile_name, text,note\r\n0.png,"a cat, on a ""mat""\r\nof ours",\r\n1.png,5" wide,\r\n,,\r\n\r\n./2.png,  two ,x\r\n'
    (folder / "metadata.csv").write_bytes(content.encode())
    make_shards(folder, tmp_path / "out", 16)
    assert list(captions(tmp_path / "out").values())[:3] == ['a cat, on a "mat"\r\nof ours', '5" wide', "two"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file_name": "0.png", "text": 7}', r"line 2: the caption is a number \(7\), wanted a text, or a list of texts"),
        ('{"file_name": "0.png", "text": ["a", 7]}', "line 2: the caption is a number in a list"),
        ('{"file_name": "0.png", "text": [["a"]]}', "line 2: the caption is a list in a list"),
        ('{"file_name": "0.png", "text": {"en": "a"}}', "line 2: the caption is an object"),
        ('{"file_name": "0.png", "text": true}', "line 2: the caption is true or false"),
        ('{"file_name": "0.png", "text": "\\ud83d"}', r"line 2: the caption holds half a character \(U\+D83D\)"),
        ('{"file_name": 0, "text": "a"}', "line 2: file_name is 0, wanted the name of a picture"),
        ('{"file_name": null, "text": "a"}', "line 2: file_name is null"),
        pytest.param('{"file_name": "0.png", "text": ' + "[" * 100000 + "]" * 100000 + "}", "line 2 is not JSON", id="deep"),
        pytest.param('{"file_name": "0.png", "text": ' + "1" * 5000 + "}", "line 2 is not JSON", id="long"),
        ('{"file_name": "0.png", "text": "a", "text": "b"}', r"""line 2 is not JSON \(it states 'text' twice: "a", and "b"\)"""),
        ('["0.png", "a"]', r'has no object \(\["0.png", "a"\]\) in line 2'),
        ('{"file_name": "0.png"}', r"has the columns \['file_name'\] in line 2"),
    ],
)
def test_a_jsonl_that_is_not_as_it_should_be(folder, tmp_path, row, message):
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "picture 1"}\n' + row + "\n")
    with pytest.raises(ValueError, match=rf"^'{folder}/metadata.jsonl' {message}"):
        make_shards(folder, tmp_path / "out", 16)


def test_of_a_tars_sample_the_first_caption_that_is_none_but_blank(tmp_path):
    """Of its .txt, then of caption in its .json, as img2dataset writes it, then of text there, which may be what is read in a picture."""
    (tmp_path / "tars").mkdir()
    found = {
        "0": {"txt": b" \n", "json": b'{"caption": "a"}'}, "1": {"json": b'{"text": "STOP", "caption": "b"}'},
        "2": {"json": b'{"text": "c", "caption": ""}'}, "3": {"txt": b"d", "json": b'{"caption": "e", "caption": "f"}'},
    }  # fmt: skip
    write_tar(tmp_path / "tars" / "0.tar", {f"{k}.{name}": x for k, files in found.items() for name, x in {"png": png(), **files}.items()})
    assert run("--tars", tmp_path / "tars", "--out", tmp_path / "out") == 0
    assert list(captions(tmp_path / "out").values()) == ["a", "b", "c", "d"]
    write_tar(tmp_path / "tars" / "0.tar", {"0.png": png(), "0.json": b'{"caption": "e", "caption": "f"}'})
    with pytest.raises(ValueError, match=r"0.json' is not JSON \(it states 'caption' twice"):
        make_shards(PictureTars.open(tmp_path / "tars"), tmp_path / "again", 16)


def test_labels_of_tars_are_kept_and_counted_where_they_are_none(tmp_path, capsys):
    """--index sends those with a faulty sample here; before, all labels were lost on the way, without a word."""
    (tmp_path / "tars").mkdir()
    labels = ["3", "0", "true", '"7"', "-1", "2.0"]
    files = {f"{k}.{name}": x for k in range(7) for name, x in (("png", png(k)), ("txt", b"x"))}
    files |= {f"{k}.json": f'{{"label": {label}}}'.encode() for k, label in enumerate(labels)}
    files |= {"7.json": b"[]", "7.png": png(), "7.txt": b"x"}
    write_tar(tmp_path / "tars" / "0.tar", dict(sorted(files.items())))
    assert run("--tars", tmp_path / "tars", "--out", tmp_path / "out") == 0
    assert "left out: 4 .json (their labels, which are no integers)" in capsys.readouterr().err
    samples = PictureSamples(tmp_path / "out")
    assert [samples[k]["label"] for k in range(len(samples))] == [3, 0, -1, -1, -1, -1, -1, -1]


def test_of_several_captions_one_is_drawn_by_seed_and_name(folder, tmp_path, capsys):
    several = {f"{number}.png": [f"{number} {word}" for word in "abcd"] for number in range(5)}
    rows = [{"file_name": name, "caption": [None, *texts, "", " "]} for name, texts in several.items()]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for number in range(5):
        (folder / f"{number}.txt").unlink()
    drawn = {}
    for seed, size in ((0, 3), (0, 4), (1, 3)):
        manifest = make_shards(folder, tmp_path / f"{seed}-{size}", 16, seed=seed, shard_size=size)
        assert [entry["drawn_captions"] for entry in manifest["shards"]] == [size, 5 - size]
        drawn[seed, size] = captions(tmp_path / f"{seed}-{size}")
    assert "5 have one of several captions, by --seed" in capsys.readouterr().err
    assert drawn[0, 3] == drawn[0, 4] != drawn[1, 3] and drawn[0, 3]["5.png"] == "picture 5"
    assert all(drawn[0, 3][name] in texts for name, texts in several.items())
    assert len({drawn[0, 3][name][-1] for name in several}) > 1
    assert drawn[0, 3] == {name: PictureFolder.open(folder).caption(name, 0) for name in drawn[0, 3]}


def test_captions_of_values():
    assert captions_of(None, "it") == captions_of(" ", "it") == captions_of([], "it") == captions_of(["", None], "it") == []
    assert captions_of("\ufeff a ", "it") == ["a"] and captions_of(["a", " ", "b"], "it") == ["a", "b"]
    assert draw_caption([], 0, "x") is None and draw_caption(["a"], 5, "x") == "a"
    assert [is_odd(text) for text in ("a\tb\n\u00e9\U0001f600", "a\ufffd", "a\x92", "a\x00", "a\ufeffb")] == [False, True, True, True, True]


def test_tars_captions_that_cannot_be_read_stop_or_are_skipped_by_name(tmp_path, capsys):
    tars = tmp_path / "tars"
    write_shard(tars.mkdir() or tars / "a.tar", [{"__key__": "0", "png": png(), "txt": "\ufeffzero".encode()}])
    broken = {
        "1.png": png(), "1.txt": "caf\u00e9".encode("latin-1"), "2.png": png(), "2.json": b'{"caption": oops}', "3.png": png(),
        "3.json": b'{"caption": 7}', "4.png": png(), "4.json": b'{"caption": null, "text": ["a", "b"]}', "5.png": png(),
        "5.txt": "f\u00fcnf".encode("utf-16"), "6.png": png(), "6.json": b'["a label"]',
    }  # fmt: skip
    write_tar(tars / "b.tar", broken)
    assert run("--tars", tars, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"error: caption: '{tars}/b.tar/1.txt' is not UTF-8: byte 3 (0xe9), in line 1. Save it as UTF-8" in error
    assert error.rstrip().endswith("or pass --allow-left-out to skip such samples. Finished shards are kept")
    assert run("--tars", tars, "--out", tmp_path / "out", "--allow-left-out") == 0
    reasons = {item["file"]: item["reason"] for item in read_manifest(tmp_path / "out")["skipped"]}
    assert list(reasons) == ["b.tar/1", "b.tar/2", "b.tar/3", "b.tar/6"] and "b.tar/2.json' is not JSON" in reasons["b.tar/2"]
    assert "the caption is a number (7)" in reasons["b.tar/3"] and reasons["b.tar/6"].startswith("no caption")
    found = captions(tmp_path / "out")
    assert found.pop("b.tar/4") in "ab" and found == {"a.tar/0": "zero", "b.tar/5": "f\u00fcnf"}


def test_data_sets_with_lists_numbers_and_no_pictures(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    pictures, texts = [{"bytes": png(n), "path": None} for n in range(4)], [["a", "b"], ["", None], [], ["c"]]
    columns = {"image": datasets.Image(), "text": datasets.List(datasets.Value("string")), "number": datasets.Value("int64"),
               "nested": datasets.List(datasets.List(datasets.Value("string")))}  # fmt: skip
    values = {"image": pictures, "text": texts, "number": [1, 2, 3, 4], "nested": [[["a"]]] * 4}
    datasets.Dataset.from_dict(values, features=datasets.Features(columns)).save_to_disk(tmp_path / "rows")
    common = ("--dataset", tmp_path / "rows", "--out", tmp_path / "out")
    assert run(*common) == 0
    found = captions(tmp_path / "out")
    assert found.pop("row 0") in "ab" and found == {"row 3": "c"}
    assert "skipped: {'no caption (or --allow-missing-captions)': 2}" in capsys.readouterr().err
    for option, column, message in [
        ("--text-column", "number", "column 'number' holds Value('int64'), wanted texts, or lists of texts"),
        ("--text-column", "nested", "column 'nested' holds List(List(Value('string'))), wanted texts"),
        ("--image-column", "number", "column 'number' holds Value('int64'), wanted pictures"),
    ]:
        assert run(*common, option, column) == 2
        assert message in capsys.readouterr().err


def test_a_data_sets_picture_that_is_gone(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    datasets.Dataset.from_dict({"image": list(map(str, paths)), "text": ["x", "y"]}).save_to_disk(tmp_path / "rows")
    for number, path in enumerate(paths):
        assert run("--dataset", tmp_path / "rows", "--out", tmp_path / "out", "--shard-size", 1) == 2
        assert f"{number}.png' cannot be read: No such file or directory (ENOENT): stopped after {number}" in capsys.readouterr().err
        path.write_bytes(png())
    assert run("--dataset", tmp_path / "rows", "--out", tmp_path / "out", "--shard-size", 1) == 0
    assert captions(tmp_path / "out") == {"row 0": "x", "row 1": "y"}


def test_empty_captions_are_counted(folder, tmp_path, capsys):
    (folder / "0.txt").rename(folder / "0.md")
    (folder / "1.txt").write_text(" \n")
    (folder / "3.txt").rename(folder / "3.TXT")
    (folder / "2.txt").write_text("caf\ufffd")
    assert run("--pictures", folder, "--out", tmp_path / "out", "--allow-missing-captions") == 0
    said = capsys.readouterr().err
    assert "2 have an empty caption; 1 have captions with lost or unprintable characters, the first is 2.png" in said
    assert read_manifest(tmp_path / "out")["odd_captions"] == ["2.png"]


# Encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["0.txt", "metadata.csv", "metadata.jsonl"])
def test_what_states_its_encoding_is_read_by_it(folder, tmp_path, encoding, name):
    if name != "0.txt":
        (folder / "0.txt").unlink()
    text = {"0.txt": "\u00e9\u20ac\n", "metadata.csv": 'file_name,text\n0.png,"\u00e9\u20ac"\n'}
    content = text.get(name, '{"file_name": "0.png", "text": "\u00e9\u20ac"}').encode(encoding)
    (folder / name).write_bytes(b"\xfe\xff" * (encoding == "utf-16-be") + content)
    make_shards(folder, tmp_path / "out", 16)
    assert captions(tmp_path / "out")["0.png"] == "\u00e9\u20ac"


@pytest.mark.parametrize("name", ["0.txt", "metadata.csv", "metadata.jsonl"])
def test_what_does_not_is_refused_with_its_place(folder, tmp_path, name):
    (folder / name).write_bytes("first\r\nsecond caf\u00e9".encode("cp1252"))
    with pytest.raises(ValueError, match=rf"{folder}/{name}' is not UTF-8: byte 17 \(0xe9\), in line 2. Save it as UTF-8, .*iconv"):
        make_shards(folder, tmp_path / "out", 16)
    (folder / name).write_bytes("first\nsecond".encode("utf-16-le"))
    with pytest.raises(ValueError, match=rf"{folder}/{name}' holds a NUL character in line 1: it is damaged, or UTF-16"):
        make_shards(folder, tmp_path / "out", 16)


def test_half_a_file_in_utf_16():
    with pytest.raises(ValueError, match=r"it is not UTF-16-LE: byte 8 \(0x62\), in line 2"):
        decode_text("a\n\u00e9b".encode("utf-16")[:-1], "it")


@pytest.mark.parametrize(("disk", "named"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_may_compose_their_accents_in_another_way(tmp_path, disk, named):
    from unicodedata import normalize

    root = tmp_path / "pictures"
    (root / "sub").mkdir(parents=True)
    for name in ("\u00e9t\u00e9.png", "h\u00f4tel.png"):
        (root / "sub" / normalize(disk, name)).write_bytes(png())
    (root / "sub" / normalize(named, "h\u00f4tel.txt")).write_text("side-car")
    (root / "metadata.csv").write_text(f"file_name,text\n{normalize(named, 'sub/été.png')},metadata\n", encoding="utf-8")
    manifest = make_shards(root, tmp_path / "out", 16)
    assert list(captions(tmp_path / "out").values()) == (["side-car", "metadata"] if disk == "NFC" else ["metadata", "side-car"])
    assert manifest["skipped"] == [] and manifest["left_out"] == []
    (root / "sub" / normalize(named, "\u00e9t\u00e9.png")).write_bytes(png())  # now either may be meant: the exact name counts
    with pytest.raises(ValueError, match="1 of 3 pictures .* have no caption"):
        make_shards(root, tmp_path / "out2", 16)


def test_names_that_are_no_utf_8_work_in_any_locale(tmp_path):
    root, out = tmp_path / "pictures", tmp_path / "out"
    root.mkdir()
    raw = os.fsencode(root)
    for name in (b"caf\xe9", "\u00e9".encode(), b"\xff", b"line\nfeed"):
        Path(os.fsdecode(os.path.join(raw, name + b".png"))).write_bytes(b"broken" if name == b"\xff" else png())
        Path(os.fsdecode(os.path.join(raw, name + b".txt"))).write_text("caption")
    make_shards(root, out, 8, crop="random")
    about = {item["file"] for item in read_manifest(out)["skipped"]} | captions(out).keys()
    assert about == {"caf\\xe9.png", "\u00e9.png", "\\xff.png", "line\\x0afeed.png"}
    assert json.loads(json.dumps(sorted(about)).encode()) == sorted(about)
    command = [sys.executable, ROOT / "data" / "make_shards.py", "--pictures", root, "--out", tmp_path / "again", "--size", "8"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([*command, "--crop", "random"], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert b"skipped \\xff.png: corrupt" in done.stderr
    assert read_manifest(tmp_path / "again") == read_manifest(out)


def test_shards_of_a_folder_that_were_made_before_are_still_accepted(folder):
    """The manifest knows a folder by names, sizes and captions, as it always did; tars do not tell how their captions were read."""
    known = [[f"{n}.png", (folder / f"{n}.png").stat().st_size, f"picture {n}"] for n in range(6)]
    source = PictureFolder.open(folder)
    assert source.describe() == {"num_pictures": 6, "source_sha256": hashlib.sha256(json.dumps(known).encode()).hexdigest()}
    assert (source.version, SavedDataset.version, PictureTars.version) == (2, 2, 3)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("file_name,text\n0.png,zero\n", "5 of 6 pictures have no caption$"),
        ("file_name,text\nsub\\0.png,zero\n", r"6 of 6 pictures have no caption; captions of no picture: 1, such as sub.0.png \(named in"),
        (None, None),
    ],
)
def test_an_evaluation_says_which_captions_a_folder_lacks(folder, recwarn, metadata, message):
    """Captions are the prompts of what is sampled: before, those whose names do not fit were empty, without a word."""
    for path in folder.glob("*.txt"):
        path.unlink()
    if metadata:
        (folder / "metadata.csv").write_text(metadata)
    assert len(FolderSamples(folder, 16, 4)) == 4
    said = [str(warning.message) for warning in recwarn]
    assert (re.search(message, said[0]) and len(said) == 1) if message else not said


# What lies where the shards are to go


def test_shards_among_the_tars_that_they_are_made_of_are_not_read_again(tmp_path, capsys):
    """Before, the next run was refused for other options, and with --overwrite the set was twice as large."""
    source = tmp_path / "tars"
    source.mkdir()
    write_shard(source / "0.tar", [{"__key__": "0", "png": png(0), "txt": "zero"}])
    (tmp_path / "link").symlink_to(source)
    for out in (source / "deep" / "out", tmp_path / "link" / "deep" / "out"):
        for more in ([], [], ["--overwrite"]):
            assert run("--tars", source, "--out", out, *more) == 0
            assert captions(out) == {"0.tar/0": "zero"}
    assert "left out: 1 .tar (made before, in --out)" in capsys.readouterr().err
    assert run("--tars", source, "--out", source) == 2 and "tars that this script did not make: 0.tar" in capsys.readouterr().err
    assert run("--tars", source / "deep", "--out", tmp_path / "other") == 0  # of any other folder they are tars like others


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"name": "an app"}',
            'is no manifest of shards: it lists no shards, it holds {"name": "an app"}. If it is of something else, move it',
        ),
        ("[1]", "holds [1], wanted an object."),
        ('{"shards": 3}', "is no manifest of shards"),
        ('{"shards": [{"name": "a.tar"}]}', "is no manifest of shards"),
        ('{"shards": [], "count": "1"}', "is no manifest of shards"),
        ('{"shards": [], "generator": 1}', "is no manifest of shards"),
        ('{"shar', "is no JSON"),
    ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_manifest_of_something_else_is_named_and_kept(folder, tmp_path, capsys, content, message, overwrite):
    out = tmp_path / "out"
    out.mkdir()
    (out / MANIFEST).write_text(content)
    assert run("--pictures", folder, "--out", out, *["--overwrite"] * overwrite) == 2
    assert f"error: '{out / MANIFEST}' {message}" in capsys.readouterr().err
    assert main(["--index", str(out)]) == 2 and f"'{out / MANIFEST}' {message}" in capsys.readouterr().err
    assert (out / MANIFEST).read_text() == content
    (out / MANIFEST).rename(out / UNFINISHED)
    assert run("--pictures", folder, "--out", out) == 2
    assert f"error: '{out / UNFINISHED}' {message}" in capsys.readouterr().err


def test_files_of_others_stay(folder, tmp_path):
    (tmp_path / "download.partial").write_bytes(b"half")
    assert run("--pictures", folder, "--out", tmp_path) == 0
    assert (tmp_path / "download.partial").read_bytes() == b"half"


@pytest.mark.parametrize(("size", "long"), [((1, 20000), "512x10240000"), ((900, 1), "460800x512")])
def test_a_thread_of_a_picture_is_not_enlarged_until_the_memory_is_full(folder, tmp_path, size, long):
    Image.new("RGB", size).save(folder / "0.png")
    for number in range(1, 5):
        (folder / f"{number}.png").unlink()
        (folder / f"{number}.txt").unlink()
    manifest = make_shards(folder, tmp_path / "out", 512, upscale=True)
    assert manifest["count"] == 1
    assert [item["reason"].split(",")[0] for item in manifest["skipped"]] == [f"too large: {size[0]}x{size[1]} would be enlarged to {long}"]
