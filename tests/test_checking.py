"""Indexing tars of any origin: what would stop a training is an error that names samples, what is skipped is counted."""

from __future__ import annotations

import importlib
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from conftest import picture_bytes
from eqldm.data import checking
from eqldm.data.checking import index_folder
from eqldm.data.samples import PictureSamples, pack_array
from eqldm.data.shards import MANIFEST, write_shard

main = importlib.import_module("make_shards").main


def sample(number: int, size: int = 8, **files) -> dict:
    return {"__key__": f"{number:04d}", "png": picture_bytes(number, size), "txt": f"picture {number}", "json": {"label": number}, **files}


def write(folder, *tars: list[dict]):
    folder.mkdir(exist_ok=True)
    for number, samples in enumerate(tars):
        write_shard(folder / f"{number}.tar", samples)
    return folder


def without(sample: dict, *names: str) -> dict:
    return {name: value for name, value in sample.items() if name not in names}


def saved(array: np.ndarray, format: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format, **options)
    return buffer.getvalue()


STOPS = {
    "another size": ({"png": picture_bytes(1, 12)}, "1.tar/0003: it is 12 x 12 px, most are 8 x 8 px"),
    "no square": ({"png": saved(np.zeros((8, 12, 3), np.uint8))}, "1.tar/0003: it is 12 x 8 px, most are 8 x 8 px"),
    "label null": ({"json": {"label": None}}, "1.tar/0003: the label in its .json is null, wanted an integer"),
    "label text": ({"json": {"label": "cat"}}, '1.tar/0003: the label in its .json is "cat"'),
    "label bool": ({"json": {"label": True}}, "1.tar/0003: the label in its .json is true"),
    "json list": ({"json": [1, 2]}, r"1.tar/0003: its .json is \[1, 2\], wanted an object"),
    "json broken": ({"json": b"{"}, "1.tar/0003: its .json is no JSON"),
    "label twice": ({"json": b'{"label": 1, "label": 2}'}, "1.tar/0003: its .json is no JSON .it states 'label' twice: 1, and 2"),
    "caption UTF-16": ({"txt": "cat".encode("utf-16-le")}, r"1.tar/0003: its caption \(.txt\) holds NUL characters"),
    "caption": ({"txt": b"caf\xe9"}, r"1.tar/0003: its caption \(.txt\) is not UTF-8"),
}


@pytest.mark.parametrize(("files", "message"), STOPS.values(), ids=STOPS)
def test_what_would_stop_a_training_is_an_error_that_names_it(tmp_path, files, message):
    folder = write(tmp_path, [sample(0), sample(1)], [sample(2), sample(3, **files), sample(4)])
    with pytest.raises(ValueError, match=rf"1 of 5 samples would stop a training: {message}.*make_shards.py --tars"):
        index_folder(folder)
    assert not (folder / MANIFEST).exists()
    assert index_folder(folder, quick=True)["count"] == 5


@pytest.mark.parametrize("quick", [False, True])
def test_samples_without_the_picture_that_others_have_are_named_at_once(tmp_path, quick):
    jpg = {**without(sample(3), "png"), "jpg": saved(np.zeros((8, 8, 3), np.uint8), "jpeg")}
    folder = write(tmp_path, [sample(0), without(sample(1), "png")], [sample(2), jpg, {"__key__": "README", "md": b"hello"}])
    with pytest.raises(ValueError, match=r"3 of 5 samples .*0.tar/0001: it has no .png picture, only: json, txt; 1.tar/0003.*README"):
        index_folder(folder, quick=quick)


def test_ten_are_named_and_the_others_counted(tmp_path):
    with pytest.raises(ValueError, match="14 of 16 samples would stop") as info:
        index_folder(write(tmp_path, [sample(n, json={"label": None if n > 1 else 0}) for n in range(16)]))
    assert "0.tar/0011" in str(info.value) and "0.tar/0012" not in str(info.value) and "and 4 more" in str(info.value)


def test_what_training_skips_is_counted_and_listed(tmp_path, capsys):
    deep, turned = saved(np.full((8, 8), 40000, np.uint16)), saved(np.zeros((8, 8, 3), np.uint8), exif=b"Exif\0\0no exif")
    bad = [sample(1, png=b"no picture"), sample(2, png=deep), sample(3, txt=""), without(sample(4), "txt"), sample(5, png=turned)]
    manifest = index_folder(write(tmp_path, [sample(0)], bad))
    assert [item["file"] for item in manifest["unreadable"]] == ["1.tar/0001", "1.tar/0002"]
    said = capsys.readouterr().err
    for words in ("6 samples in 2 shards, kind pictures, .png of 8 x 8 px; captions (.txt): 5 of 6", "empty captions: 1",
                  "unreadable: 2 pictures, which training skips {'corrupt': 1, 'more than 8 bits a channel': 1}",
                  "1.tar/0002: more than 8 bits a channel", "metadata that cannot be read: of 1 pictures"):  # fmt: skip
        assert words in said
    samples = PictureSamples(tmp_path)
    assert [samples[n]["skipped"] for n in range(6)] == [[], ["0001", "0002"], ["0002"], [], [], []]


def test_so_many_unreadable_pictures_that_training_would_stop(tmp_path, monkeypatch):
    bad = [sample(n, png=b"") for n in range(1, 4)]
    with pytest.raises(ValueError, match=r"3 pictures cannot be read, all that were looked at; the first is 0.tar/0001: corrupt"):
        index_folder(write(tmp_path / "all", bad))
    monkeypatch.setattr(checking, "MAX_SKIPS", 3)
    with pytest.raises(ValueError, match=r"3 pictures cannot be read, 3 in turn; the first is 0.tar/0001: corrupt"):
        index_folder(write(tmp_path / "turn", [sample(0), *bad[:2]], [bad[2], sample(4)]))
    assert len(index_folder(write(tmp_path / "few", [sample(0), *bad[:2]], [sample(4), bad[2]]))["unreadable"]) == 3


def test_tars_as_macos_writes_them(tmp_path, capsys):
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for name, content in (("./._0.png", b"x"), ("./0.png", picture_bytes(0, 8)), ("./._0.txt", b"x"), ("./0.txt", b"zero"),
                              ("./.DS_Store", b"x"), ("./README", b"x")):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    for name in ("._a.tar", "b.tar.gz"):
        (folder / name).write_bytes(b"x")
    tarfile.open(folder / "empty.tar", "w").close()
    manifest = index_folder(folder)
    assert [entry["name"] for entry in manifest["shards"]] == ["a.tar"] and manifest["count"] == 1
    assert PictureSamples(folder)[0]["caption"] == "zero"
    said = capsys.readouterr().err
    for words in ("left out 1 tars (hidden files): ._a.tar", "left out 1 tars (compressed: unpack them to have them read): b.tar.gz",
                  "ignored 3 (hidden): a.tar/./._0.png", "ignored 1 (no ending): a.tar/./README",
                  "ignored 1 (tars without samples): empty.tar"):  # fmt: skip
        assert words in said


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path):
    folder = write(tmp_path / "tars", [sample(n) for n in range(3)], [sample(n) for n in range(3, 5)])
    shutil.copytree(folder, tmp_path / "copy")
    for root, workers in ((folder, "2"), (tmp_path / "copy", "1")):
        assert main(["--index", str(root), "--workers", workers]) == 0
    one, two = (sorted((path.relative_to(root), path.read_bytes()) for path in root.rglob("*") if path.is_file())
                for root in (folder, tmp_path / "copy"))  # fmt: skip
    assert one == two
    write_shard(folder / "1.tar", [sample(3, txt=b"\xff")])
    assert main(["--index", str(folder), "--workers", "2", "--overwrite"]) == 2


def test_quick_says_what_it_left_out(tmp_path, capsys):
    folder = write(tmp_path, [sample(n) for n in range(3)], [sample(n) for n in range(3, 5)])
    assert main(["--index", str(folder), "--workers", "1"]) == 0
    assert "not checked" not in capsys.readouterr().err
    assert main(["--index", str(folder), "--quick", "--workers", "1", "--overwrite"]) == 0
    assert "not checked: the pictures, labels and captions of the other 3 samples (--quick)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--pictures", str(folder), "--out", str(tmp_path / "out"), "--quick"])


def test_pictures_beside_those_that_are_read_are_said(tmp_path, capsys):
    index_folder(write(tmp_path, [sample(n, jpg=saved(np.zeros((8, 8, 3), np.uint8), "jpeg")) for n in range(2)]))
    assert "not read: the pictures .jpg that lie beside .png" in capsys.readouterr().err


def test_latents(tmp_path, capsys):
    array = pack_array(torch.zeros((2, 4, 4)))
    made = [{"__key__": str(n), "moments.npy": array, "txt": "a"} for n in range(3)]
    assert index_folder(write(tmp_path / "good", made))["kind"] == "latents"
    assert "nothing tells which VAE made these latents" in capsys.readouterr().err
    made[2] |= {"moments.npy": pack_array(torch.zeros((2, 4, 5)))}
    with pytest.raises(ValueError, match="0.tar/2: it is 2 x 4 x 5, most are 2 x 4 x 4"):
        index_folder(write(tmp_path / "shapes", made))
    made[2] |= {"moments.npy": array[:50]}
    with pytest.raises(ValueError, match="0.tar/2: its array .moments.npy. cannot be read"):
        index_folder(write(tmp_path / "broken", made))


def test_a_folder_that_is_refused_stays_as_it_is(tmp_path):
    folder = write(tmp_path, [sample(0)])
    manifest = index_folder(folder)
    assert manifest["image_size"] == 8 and json.loads((folder / MANIFEST).read_text()) == manifest
    write_shard(folder / "0.tar", [sample(0), sample(1, json={"label": None})])
    with pytest.raises(ValueError, match="0.tar/0001"):
        index_folder(folder, overwrite=True)
    assert json.loads((folder / MANIFEST).read_text()) == manifest


def test_no_tars_here_says_where_they_are(tmp_path):
    write(tmp_path / "sub", [sample(0)])
    with pytest.raises(FileNotFoundError, match="holds no tars, .*; its subfolders do: give one of these"):
        index_folder(tmp_path)


def test_a_folder_may_be_called_like_markup_of_a_terminal(tmp_path, monkeypatch):
    (tmp_path / "[").mkdir()
    folder = write(tmp_path / "[" / "red]", [sample(0)])
    monkeypatch.setattr(checking, "console", Console(file=io.StringIO(), force_terminal=True))
    assert index_folder(folder)["count"] == 1


def test_what_a_training_does_not_read_is_said(tmp_path, capsys):
    samples = [{**without(sample(number), "txt"), "json": {"caption": "a cat"}, "cls": b"3", "seg.png": b"x"} for number in range(2)]
    index_folder(write(tmp_path, samples))
    said = capsys.readouterr().err
    assert "not read: 2 .cls, 2 .seg.png" in said and "a caption in a .json is not read: data/make_shards.py --tars" in said
    index_folder(write(tmp_path / "whole", [sample(0)]))
    assert "not read" not in capsys.readouterr().err
