"""Tars of any origin: read as webdataset reads them, and refused where it refuses them."""

from __future__ import annotations

import io
import tarfile
import warnings

import pytest
import webdataset as wds

from eqldm.data.shards import ShardSet, index_tar, write_manifest, write_shard
from eqldm.data.tars import read_tar


def write_tar(path, *members, format=tarfile.PAX_FORMAT):
    """A tar of names (a folder where it ends in /), or of (name, how to change its header)."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, change in (member if isinstance(member, tuple) else (member, {}) for member in members):
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            content = b"" if name.endswith("/") or "type" in change else name.encode(errors="surrogateescape")
            info.size = len(content)
            for key, value in change.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return path


def by_webdataset(path) -> list[dict]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = list(wds.WebDataset(str(path), shardshuffle=False, empty_check=False))
    return [{name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")} for sample in samples]


def by_us(path) -> list[dict]:
    content = path.read_bytes()
    return [
        {name: value if name == "__key__" else content[value[0] : sum(value)] for name, value in sample.items()}
        for sample in index_tar(path)
    ]


LONG = "a/" * 60 + "0001"  # a name that needs an extended header


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("members", [
    ["0001.jpg", "0001.txt", "0002.jpg"],
    ["train/", "train/0001.jpg", "train/0001.seg.png", "train/0002.JPG"],
    ["./", "./0001.jpg", "./0001.txt"],
    ["._0001.jpg", "0001.jpg", "._0001.txt", "0001.txt"],
    [".DS_Store", "README", "v1.0/README", "v1.0/0001.jpg"],
    ["__meta__", "__about__/x.json", "0001.jpg", "__a__.jpg"],
    ["README.md", "0001.jpg"],
    [f"{LONG}.jpg", f"{LONG}.txt", "\u00e4\u4e2d.jpg", "\u00e4\u4e2d.txt"],
    ["a/..b/0001.jpg", "a../0001.jpg", "etc...d/0001.jpg"],
    ["a b (1).jpg", "a b (1).txt", "-x.jpg", "~$x.jpg"],
    [("0001.jpg", {"pax_headers": {"comment": "hello", "mtime": "1.5"}}), "0001.txt"],
    ["0001.jpg", ("0002.jpg", {"type": tarfile.SYMTYPE, "linkname": "0001.jpg"}), ("0003.jpg", {"type": tarfile.LNKTYPE, "linkname": "x"})],
    ["0001.jpg", ("fifo.jpg", {"type": tarfile.FIFOTYPE})],
    [],
], ids=str)  # fmt: skip
def test_samples_are_those_of_webdataset(tmp_path, members, format):
    path = write_tar(tmp_path / "x.tar", *members, format=format)
    assert by_us(path) == by_webdataset(path)


@pytest.mark.parametrize("members", [
    ["train/._0001.jpg", "train/0001.jpg", "train/._0001.txt", "train/0001.txt"],
    ["__MACOSX/", "__MACOSX/0001.jpg", "train/0001.jpg", "train/0001.txt", "train/.DS_Store"],
    ["./PaxHeaders.1234/0001.jpg", "train/0001.jpg", "train/0001.txt"],
    ["train/0001.jpg", "train/0001.", "train/0001.txt", "train/a. b"],
])  # fmt: skip
def test_what_macos_and_others_leave_in_folders_splits_no_sample(tmp_path, members):
    """webdataset takes these for samples, which then lack a picture."""
    found, ignored = read_tar(write_tar(tmp_path / "x.tar", *members))
    assert [sorted(sample) for sample in found] == [["__key__", "jpg", "txt"]] and found[0]["__key__"] == "train/0001"
    assert sum(map(len, ignored.values())) == sum(not name.endswith("/") for name in members) - 2


def test_what_is_ignored_is_named_by_reason(tmp_path):
    link = ("0002.jpg", {"type": tarfile.SYMTYPE, "linkname": "0001.jpg"})
    _, ignored = read_tar(write_tar(tmp_path / "x.tar", "a/", "._0001.jpg", "README", "__meta__", "0001.jpg", link, ".DS_Store"))
    assert ignored == {"hidden": ["._0001.jpg", ".DS_Store"], "no ending": ["README"], "metadata": ["__meta__"], "links": ["0002.jpg"]}


@pytest.mark.parametrize("members", [["0001.jpg", "0001.jpg"], ["0001.jpg", "0001.txt", "0001.JPG"], ["a/0001.a.b", "a/0001.a.b"]])
def test_two_files_of_one_name_are_refused_as_webdataset_refuses_them(tmp_path, members):
    path = write_tar(tmp_path / "x.tar", *members)
    with pytest.raises(ValueError, match="duplicate file name"):
        by_webdataset(path)
    with pytest.raises(ValueError, match=r"x.tar': sample '(a/)?0001' has two files '.*' \(duplicate file name"):
        index_tar(path)


def test_a_sample_in_two_places_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", "0001.jpg", "0002.jpg", "0001.txt")
    with pytest.raises(ValueError, match=r"x.tar': sample '0001' lies in two places \('0001.txt' comes late\)"):
        index_tar(path)


@pytest.mark.parametrize("name", ["../0001.jpg", "a/../../0001.jpg", "/etc/0001.jpg", "a\\..\\b/0001.jpg", "C:\\0001.jpg", "C:/0001.jpg"])
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    """They would be copied into new shards, and what unpacks these writes there."""
    with pytest.raises(ValueError, match="x.tar': sample '.*' .*leads out of its folder.*--transform"):
        read_tar(write_tar(tmp_path / "x.tar", "ok.jpg", name))
    with pytest.raises(ValueError, match="leads out of its folder"):
        write_shard(tmp_path / "y.tar", [{"__key__": name.removesuffix(".jpg"), "jpg": b""}])
    assert not list(tmp_path.glob("*y.tar*"))


def test_a_nul_in_a_name_is_refused(tmp_path):
    path = write_tar(tmp_path / "x.tar", ("0001.jpg", {"pax_headers": {"path": "00\0x.jpg"}}))
    with pytest.raises(ValueError, match=r"sample '00\\x00x' has a NUL"):
        read_tar(path)
    with pytest.raises(ValueError, match="NUL"):
        write_shard(tmp_path / "y.tar", [{"__key__": "00\0", "jpg": b""}])


def test_names_of_other_encodings_can_be_printed(tmp_path):
    path = write_tar(tmp_path / "x.tar", "caf\udce9.jpg", "caf\udce9.txt", format=tarfile.GNU_FORMAT)
    (sample,) = index_tar(path)
    assert sample["__key__"] == r"caf\xe9" and sample["__key__"].encode()


def test_tars_joined_or_compressed_are_refused(tmp_path):
    one, two = write_tar(tmp_path / "a.tar", "0001.jpg"), write_tar(tmp_path / "b.tar", "0002.jpg")
    (tmp_path / "joined.tar").write_bytes(one.read_bytes() + two.read_bytes())
    with pytest.raises(ValueError, match="joined.tar' goes on after its end mark"):
        index_tar(tmp_path / "joined.tar")
    with tarfile.open(tmp_path / "c.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match="c.tar' cannot be read as a tar"):
        index_tar(tmp_path / "c.tar")


def test_too_many_endings_are_refused(tmp_path):
    """Each would be a file of the index."""
    path = write_tar(tmp_path / "x.tar", *(f"{n}.{n}.jpg" for n in range(101)))
    entry = {"name": "x.tar", "count": 101, "bytes": path.stat().st_size, "sha256": "0" * 64}
    with pytest.raises(ValueError, match="files of 101 endings, such as 0.jpg"):
        write_manifest(tmp_path, [entry])
    long = write_tar(tmp_path / "y.tar", f"0001.{'very ' * 60}long.jpg", "0002.jpg")
    assert read_tar(long)[0] == [{"__key__": "0002", "jpg": index_tar(long)[0]["jpg"]}]
    write_manifest(tmp_path, [{**entry, "name": "y.tar", "count": 1, "bytes": long.stat().st_size}])
    assert len(ShardSet.open(tmp_path)) == 1
