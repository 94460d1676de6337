"""Shards: readable by stock webdataset, equal bytes for equal samples, and clear errors where they are broken."""

from __future__ import annotations

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset as wds

from eqldm.data import shards as module
from eqldm.data.checking import index_folder
from eqldm.data.shards import INDEX, MANIFEST, ShardSet, digest_of, index_tar, read_manifest, write_manifest, write_shard


@pytest.fixture
def folder(make_picture_shards, tmp_path):
    """Ten pictures in tars of 4, 4 and 2."""
    return make_picture_shards(tmp_path / "shards", count=10, shard_size=4)


def truncate(folder, name: str, size: int, tell_manifest: bool) -> None:
    """Cut a tar down to `size` bytes; the manifest may be made to agree, as after indexing a broken copy."""
    with open(folder / name, "r+b") as file:
        file.truncate(size)
    if tell_manifest:
        manifest = json.loads((folder / MANIFEST).read_text())
        next(entry for entry in manifest["shards"] if entry["name"] == name)["bytes"] = size
        (folder / MANIFEST).write_text(json.dumps(manifest))


def test_stock_webdataset_reads_what_the_index_reads(folder):
    shards = ShardSet.open(folder)
    assert len(shards) == 10 and shards.starts.tolist() == [0, 4, 8, 10]
    assert [shards.shard_of(number) for number in range(10)] == [0] * 4 + [1] * 4 + [2] * 2
    urls = [str(folder / entry["name"]) for entry in shards.manifest["shards"]]
    stock = list(wds.WebDataset(urls, shardshuffle=False))
    assert [sample["__key__"] for sample in stock] == shards.keys.tolist()
    for number, sample in enumerate(stock):
        for extension in ("png", "txt", "json"):
            assert shards.read(number, extension) == sample[extension]


def equal(a: ShardSet, b: ShardSet) -> bool:
    same = a.places.keys() == b.places.keys() and all(np.array_equal(a.places[name], b.places[name]) for name in a.places)
    return same and np.array_equal(a.keys, b.keys) and np.array_equal(a.starts, b.starts) and a.starts.dtype == b.starts.dtype


def test_the_index_is_what_the_headers_say_and_opens_without_them(folder, monkeypatch):
    by_index = ShardSet.open(folder)
    assert all(isinstance(places, np.memmap) for places in by_index.places.values())
    monkeypatch.setattr(module, "MANY", 3)  # by several processes
    shutil.move(folder / INDEX, folder / "aside")
    assert equal(ShardSet.open(folder), by_index)
    shutil.move(folder / "aside", folder / INDEX)
    monkeypatch.setattr(module, "index_tar", lambda path: pytest.fail("a tar was opened"))
    assert equal(ShardSet.open(folder), by_index)


def test_the_index_of_other_tars_is_not_used(folder):
    entries = read_manifest(folder)["shards"]
    (folder / "pictures-000002.tar").unlink()
    (folder / MANIFEST).write_text(json.dumps({"count": 8, "shards": entries[:2]}))
    shards = ShardSet.open(folder)
    assert len(shards) == 8 and not isinstance(shards.keys, np.memmap)
    write_manifest(folder, entries[:2])
    assert equal(ShardSet.open(folder), shards) and isinstance(ShardSet.open(folder).keys, np.memmap)
    assert sorted(path.name for path in folder.iterdir()) == [INDEX, MANIFEST, "pictures-000000.tar", "pictures-000001.tar"]


@pytest.mark.parametrize("name", ["places/txt.npy", "places/json.npy", "places/png.npy", "starts.npy", "keys.npy", "about.json"])
def test_an_index_that_lost_a_file_costs_no_caption_and_no_label(folder, name):
    """A copy that was cut short: before, the captions or labels of all samples were empty, without a word."""
    whole = ShardSet.open(folder)
    (folder / INDEX / name).unlink()
    shards = ShardSet.open(folder)  # by the headers
    assert equal(shards, whole) and not isinstance(shards.keys, np.memmap)
    index_folder(folder)
    assert equal(ShardSet.open(folder), whole) and isinstance(ShardSet.open(folder).keys, np.memmap)


def test_a_damaged_index_is_named(folder):
    about, places = folder / INDEX / "about.json", folder / INDEX / "places"
    (places / ".DS_Store").write_bytes(b"no array")  # not listed: not ours
    assert len(ShardSet.open(folder)) == 10
    txt = np.load(places / "txt.npy")
    np.save(places / "txt.npy", txt[:5])
    with pytest.raises(ValueError, match=r"txt.npy' does not fit the 10 samples that the manifest counts: remove '.*index'"):
        ShardSet.open(folder)
    about.write_text("{")
    with pytest.raises(ValueError, match=r"about.json' is no JSON .*: remove '.*index', and have the index written anew"):
        ShardSet.open(folder)
    for content in ("[]", "{}", json.dumps({"shards": digest_of(read_manifest(folder)["shards"])})):  # the last: an early version
        about.write_text(content)
        assert np.array_equal(ShardSet.open(folder).places["txt"], txt)


def test_equal_samples_give_equal_bytes_and_no_half_shard_is_left(tmp_path):
    samples = [{"__key__": f"{i}", "txt": f"caption {i}", "npy": np.arange(i)} for i in range(3)]
    a, b = write_shard(tmp_path / "a.tar", samples), write_shard(tmp_path / "b.tar", iter(samples))
    assert {**a, "name": ""} == {**b, "name": ""} and a["count"] == 3 and a["bytes"] == (tmp_path / "a.tar").stat().st_size
    assert write_shard(tmp_path / "c.tar", samples[::-1])["sha256"] != a["sha256"]

    def fails():
        yield samples[0]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", fails())
    assert write_shard(tmp_path / "a.tar", samples) == a
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar", "c.tar"]


def test_keys_are_split_as_webdataset_splits_them(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("v1.0"))
        for name in ("v1.0/0001.seg.png", "v1.0/0001.TXT", "v1.0/0002.seg.png"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    found = [sample for sample in index_tar(tmp_path / "x.tar") if "seg.png" in sample]
    assert [sample["__key__"] for sample in found] == ["v1.0/0001", "v1.0/0002"]
    assert sorted(found[0]) == ["__key__", "seg.png", "txt"] and found[0]["txt"][1] == 3


def test_samples_may_lack_a_file(tmp_path):
    entry = write_shard(tmp_path / "x.tar", [{"__key__": "a", "txt": "one"}, {"__key__": "b", "cls": "2"}])
    write_manifest(tmp_path, [entry])
    shards = ShardSet.open(tmp_path)
    assert shards.has("txt").tolist() == [True, False] and shards.has("png").tolist() == [False, False]


def test_a_missing_manifest_or_folder_names_what_makes_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no manifest.json. Make shards with data/glyphs.py"):
        read_manifest(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere' is not a folder"):
        read_manifest(tmp_path / "nowhere")


def test_an_empty_set_is_refused(tmp_path):
    write_manifest(tmp_path, [])
    with pytest.raises(ValueError, match="is empty: its manifest counts 0 samples"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(("change", "message"), [
    ([], "holds .*, wanted an object"),
    ({"shards": {}}, "it lists no shards"),
    ({"shards": [3]}, "a shard is 3"),
    ({"count": "6"}, 'its count is "6", its shards have 10 samples'),
    ({"count": 7}, "its count is 7, its shards"),
    ({"generator": [1]}, "its generator is .1."),
    ({"skipped": 3}, "what it skipped is 3"),
    *[({"shards": [{"name": "a.tar", "count": 6, "bytes": 1024, "sha256": "0" * 64} | entry]}, f"{next(iter(entry))} of a shard is")
      for entry in ({"name": "../a.tar"}, {"name": 3}, {"name": "a\0.tar"}, {"count": -1}, {"count": True}, {"bytes": 1.5},
                    {"sha256": "x"})],
], ids=str)  # fmt: skip
def test_a_manifest_of_another_shape_is_named(folder, change, message):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(change if isinstance(change, list) else manifest | change))
    with pytest.raises(ValueError, match=f"manifest.json' .*{message}") as info:
        read_manifest(folder)
    assert "\n" not in str(info.value) and "make the shards anew" in str(info.value)


def test_a_missing_tar_is_named(folder):
    (folder / "pictures-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match="pictures-000001.tar' is named in .* but missing"):
        ShardSet.open(folder)


def test_a_tar_of_another_size_is_named(folder):
    truncate(folder, "pictures-000001.tar", 5000, tell_manifest=False)
    with pytest.raises(ValueError, match="pictures-000001.tar' is truncated or was replaced: got 5000 bytes"):
        ShardSet.open(folder)


@pytest.mark.parametrize("size", [0, 100, 600, 5000, "last file", "boundary"])
def test_a_truncated_tar_is_named_though_the_manifest_agrees(folder, size):
    path = folder / "pictures-000001.tar"
    last = max(place for sample in index_tar(path) for name, place in sample.items() if name != "__key__")
    cut = {"last file": last[0] + last[1] - 1, "boundary": last[0] - 512}.get(size, size)
    truncate(folder, path.name, cut, tell_manifest=True)
    with pytest.raises(ValueError, match="pictures-000001.tar"):
        ShardSet.open(folder)


def test_a_tar_with_a_damaged_header_is_named(folder):
    path = folder / "pictures-000001.tar"
    shutil.rmtree(folder / INDEX)
    with open(path, "r+b") as file:
        file.seek(index_tar(path)[-1]["json"][0] - 512)  # the last file's header: the count of samples stays right
        file.write(b"x" * 512)
    with pytest.raises(ValueError, match="pictures-000001.tar' is truncated or damaged"):
        ShardSet.open(folder)


def test_a_file_that_is_no_tar_is_named(folder):
    shutil.rmtree(folder / INDEX)
    size = (folder / "pictures-000002.tar").stat().st_size
    (folder / "pictures-000002.tar").write_bytes(b"x" * size)
    with pytest.raises(ValueError, match="pictures-000002.tar' cannot be read as a tar"):
        ShardSet.open(folder)


def test_a_count_that_differs_from_the_manifest_is_refused(folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][2]["count"] = 3
    manifest["count"] += 1
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="pictures-000002.tar' holds 2 samples, the manifest says 3"):
        ShardSet.open(folder)


@pytest.mark.parametrize("place", [(0, 1 << 40), (-512, 10), (1 << 40, 10)])
def test_a_place_outside_its_tar_is_the_indexs_fault(folder, place):
    """And is not read: the size may be any number."""
    path = folder / "index" / "places" / "png.npy"
    places = np.load(path)
    places[1] = place
    np.save(path, places)
    with pytest.raises(ValueError, match="the index of .* is damaged: .png of sample '.*' would lie at bytes .* Remove"):
        ShardSet.open(folder).read(1, "png")


def test_a_tar_truncated_after_it_was_opened_is_named(folder):
    shards = ShardSet.open(folder)
    truncate(folder, "pictures-000000.tar", 600, tell_manifest=False)
    with pytest.raises(ValueError, match="pictures-000000.tar' ended while reading sample '000000003'"):
        shards.read(3, "png")
