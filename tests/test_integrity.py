"""Tars that changed after they were written: found by --check, and a few of them whenever a set is opened."""

from __future__ import annotations

import os
import shutil

import pytest

import make_shards as script
from eqldm.data import integrity
from eqldm.data.integrity import check_folder, check_some
from eqldm.data.samples import PictureSamples
from eqldm.data.shards import ShardSet, read_manifest


@pytest.fixture
def folder(make_picture_shards, tmp_path):
    return make_picture_shards(tmp_path / "shards", count=24, shard_size=4)


def flip(path, byte: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 4
    path.write_bytes(content)


def test_a_folder_as_it_was_written(folder, capsys):
    assert check_folder(folder, workers=2) == ([], 11)  # six tars, and starts, keys, png, txt, json
    assert script.main(["--check", str(folder), "--workers", "1"]) == 0
    assert "all 11 files are what the manifest states" in capsys.readouterr().out
    shutil.rmtree(folder / "index")
    assert check_folder(folder) == ([], 6)


def test_each_tar_that_changed_is_named(folder, capsys):
    tar = [folder / f"pictures-{n:06d}.tar" for n in range(6)]
    flip(tar[1], 1000)
    tar[2].unlink()
    os.truncate(tar[4], 100)
    (folder / "more.tar").write_bytes(b"")
    flip(folder / "index" / "keys.npy", -1)
    assert script.main(["--check", str(folder), "--workers", "1"]) == 1
    out, err = capsys.readouterr()
    assert [line.split(",")[0] for line in out.splitlines()] == [
        "pictures-000001.tar: damaged", "pictures-000002.tar: missing", "pictures-000004.tar: has 100 bytes", "index/keys.npy: damaged",
        "more.tar: not in the manifest",
    ]  # fmt: skip
    assert "5 files are not what the manifest states: copy them again" in err


def test_tars_that_were_swapped(make_picture_shards, tmp_path, monkeypatch):
    """Of one size, so that nothing else tells."""
    folder = make_picture_shards(tmp_path / "shards", count=4, size=8, shard_size=1, caption="x")
    entries = read_manifest(folder)["shards"]
    a, b = next((a, b) for a in entries for b in entries if a is not b and a["bytes"] == b["bytes"])
    a, b = a["name"], b["name"]
    os.replace(folder / a, folder / "x")
    os.replace(folder / b, folder / a)
    os.replace(folder / "x", folder / b)
    assert sorted(check_folder(folder)[0]) == sorted([f"{a}: holds what {b} should", f"{b}: holds what {a} should"])
    ShardSet.open(folder)
    with pytest.raises(ValueError, match=r"is damaged or was replaced: .* \(of 4 shards 4 are looked at .*make_shards.py --check"):
        PictureSamples(folder)


def test_a_damaged_index_is_found_when_a_set_is_opened(folder):
    flip(folder / "index" / "places" / "txt.npy", -2)
    with pytest.raises(ValueError, match="the index's '.*txt.npy' is damaged"):
        PictureSamples(folder)


def test_a_few_are_read_when_a_set_is_opened(folder, monkeypatch):
    digest = ShardSet.open(folder).digest
    read = []
    monkeypatch.setattr(integrity, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    assert check_some(folder, digest) == 5 + 4 == len(set(read))
    assert check_some(folder, digest) == 9 == len(read)  # once a process
    assert {path.suffix for path in read[-4:]} == {".tar"}
    check_some.cache_clear()
    monkeypatch.setattr(integrity, "BYTES_DRAWN", int(2.5 * read[-1].stat().st_size))
    assert check_some(folder, digest) == 5 + 2
    check_some.cache_clear()
    monkeypatch.setattr(integrity, "BYTES_DRAWN", 10)
    assert check_some(folder, digest) == 0


file_sha256 = integrity.file_sha256


@pytest.mark.parametrize(
    ("words", "message"), [(["--quick"], "--quick is no option of --check"), (["--size", "64"], "--size is no option of --check")]
)
def test_an_option_that_nothing_would_read(words, message, capsys):
    with pytest.raises(SystemExit):
        script.main(["--check", "x", *words])
    assert message in capsys.readouterr().err


def test_a_folder_without_a_manifest(tmp_path, capsys):
    assert script.main(["--check", str(tmp_path)]) == 2 and "nothing to check it by" in capsys.readouterr().err
