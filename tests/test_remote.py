"""Shards behind http, s3 and pipes: the samples that a folder gives, each tar fetched once, nothing kept that is damaged, clear errors."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import load_config
from eqldm.data import remote
from eqldm.data.order import StreamSampler
from eqldm.data.remote import is_remote, open_tar, url_of
from eqldm.data.samples import PictureSamples, collate
from eqldm.data.shards import INDEX, MANIFEST, ShardSet, read_manifest
from runs import weights

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset fetches by curl, which is not installed")


class Server:
    """A real http server of a folder on this machine; counts what is asked for; sends half of each file named in `halved`, once."""

    def __init__(self, folder: Path):
        self.asked, self.halved = Counter(), set()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self):
                name = self.path.rsplit("/", 1)[-1]
                server.asked[name] += 1
                if name not in server.halved:
                    return super().do_GET()
                server.halved.discard(name)
                content = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder))
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/shards"

    def tars(self) -> dict[str, int]:
        return {name: count for name, count in self.asked.items() if name.endswith(".tar")}


def settle() -> None:
    """Waits until nothing is fetched ahead any more."""
    for thread in threading.enumerate():
        if thread.name == "fetch-ahead":
            thread.join()


@pytest.fixture
def folder(make_picture_shards, tmp_path):
    """24 pictures in 6 tars."""
    return make_picture_shards(tmp_path / "served" / "shards", count=24, shard_size=4)


@pytest.fixture
def server(folder):
    server = Server(folder.parent)
    yield server
    settle()
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WDS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WDS_CACHE_SIZE", raising=False)
    monkeypatch.setattr(remote, "WAITS_SECONDS", (0, 0))
    return tmp_path / "cache"


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["x"], b["x"]) and all(a[name] == b[name] for name in ("key", "caption", "label", "position"))


def test_an_address_gives_what_the_folder_gives_and_fetches_each_tar_once(server, folder, cache):
    for seed in (None, 3):
        local, there = (PictureSamples(place, seed, window=2) for place in (str(folder), server.address))
        assert len(there) == len(local) and there.image_size == local.image_size
        assert all(same(local[position], there[position]) for position in range(60))  # over two epochs
    names = {entry["name"]: 1 for entry in local.shards.manifest["shards"]}
    assert server.tars() == names
    kept = {entry["sha256"] + ".tar" for entry in local.shards.manifest["shards"]}
    assert {path.name for path in cache.glob("*.tar")} == kept and not list(cache.glob("*.partial"))


def test_nothing_is_fetched_but_what_is_read(server):
    shards = ShardSet.open(server.address)
    assert not server.tars()
    assert shards.read(9, "txt") == b"picture 9"
    assert server.tars() == {"pictures-000002.tar": 1}


def test_reader_processes_share_the_cache(server, folder):
    samples = PictureSamples(server.address, 0, window=3)
    sampler = iter(StreamSampler(4, 4, rank=0, world_size=1))
    batches = [next(sampler) for _ in range(12)]
    loader = torch.utils.data.DataLoader(samples, batch_sampler=batches, num_workers=2, collate_fn=collate)
    expected = PictureSamples(str(folder), 0, window=3)
    for positions, batch in zip(batches, loader):
        assert batch["key"] == [expected[position]["key"] for position in positions]
    assert set(server.tars().values()) == {1} and len(server.tars()) == 6


def test_the_tars_of_the_next_window_come_before_they_are_needed(server):
    samples = PictureSamples(server.address, 0, window=1)
    samples[0]
    settle()
    before = dict(server.tars())
    assert len(before) <= 3  # the first picture's, whose size is looked at; this window's; the next one's
    for position in range(4, 8):
        samples.shards.read(samples.number(position), "png")
    assert samples.shards.shard_of(samples.number(4)) in {int(name[9:15]) for name in before}


def test_a_cache_of_limited_size(server, folder, cache, monkeypatch):
    largest = max(entry["bytes"] for entry in read_manifest(folder)["shards"])
    monkeypatch.setenv("WDS_CACHE_SIZE", str(2 * largest))
    samples, local = PictureSamples(server.address, 0, window=1), PictureSamples(str(folder), 0, window=1)
    for position in range(48):
        assert same(samples[position], local[position])
        assert len(list(cache.glob("*.tar"))) <= 2
    assert sum(server.tars().values()) > 6  # two epochs: most came twice
    monkeypatch.setenv("WDS_CACHE_SIZE", str(2 * largest - 1))
    with pytest.raises(ValueError, match="too small to shuffle 1 tars of .*data.shuffle_shards lower"):
        PictureSamples(server.address, 0, window=1)


def test_the_least_recently_read_tar_goes_first(server, folder, cache, monkeypatch):
    entries = read_manifest(folder)["shards"]
    monkeypatch.setenv("WDS_CACHE_SIZE", str(sum(entry["bytes"] for entry in entries[:3])))
    for number, entry in enumerate(entries[:3]):
        open_tar(server.address, entry).close()
        os.utime(cache / f"{entry['sha256']}.tar", (number, number))
    open_tar(server.address, entries[0]).close()
    with open_tar(server.address, entries[1]) as reading:
        os.utime(cache / f"{entries[1]['sha256']}.tar", (1, 1))
        abandoned = cache / f"{'0' * 64}.partial"  # of a process that was killed
        abandoned.write_bytes(b"half")
        os.utime(abandoned, (0, 0))
        open_tar(server.address, entries[3]).close()
        assert len(reading.read()) == entries[1]["bytes"]  # who reads it reads on
    kept = {path.stem for path in cache.glob("*.*")}
    assert kept == {entries[number]["sha256"] for number in (0, 2, 3)}


def test_what_comes_damaged_is_fetched_again_and_never_kept(server, cache):
    shards = ShardSet.open(server.address)
    server.halved.add("pictures-000000.tar")
    with pytest.warns(UserWarning, match="'pictures-000000.tar' of .* came damaged: .*; again in 0 s"):
        assert shards.read(0, "txt") == b"picture 0"
    entry = {**shards.manifest["shards"][1], "sha256": "0" * 64}  # changed there since the manifest was read
    with pytest.warns(UserWarning), pytest.raises(OSError, match="'pictures-000001.tar' of .* came damaged"):
        open_tar(server.address, entry)
    assert server.asked["pictures-000001.tar"] == 3
    assert [path.name for path in cache.glob("*.*")] == [shards.manifest["shards"][0]["sha256"] + ".tar"]


def test_a_killed_fetch_leaves_nothing_in_the_way(server, cache):
    shards = ShardSet.open(server.address)
    entry = shards.manifest["shards"][0]
    half = cache / f"{entry['sha256']}.partial"
    half.write_bytes(b"half, and longer than the whole" * entry["bytes"])
    assert shards.read(0, "txt") == b"picture 0" and not half.exists()


def test_a_full_disk(server, cache, monkeypatch):
    shards = ShardSet.open(server.address)

    def full(address, name):
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "fetch", full)
    with pytest.raises(OSError, match="no space left for 'pictures-000000.tar' in the cache '.*cache': free some, or set WDS_CACHE_SIZE"):
        shards.read(0, "txt")
    assert not list(cache.glob("*.*"))


def test_what_cannot_be_fetched(server, folder, monkeypatch):
    with pytest.raises(OSError, match=r"cannot fetch 'manifest.json' of '.*nowhere': exit status 22 of curl \(the server refuses it"):
        ShardSet.open(server.address + "/nowhere")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="exit status 7 of curl .no connection."):
            read_manifest(f"http://127.0.0.1:{unused.getsockname()[1]}/shards")
    with pytest.raises(OSError, match="no gopen handler defined"):
        read_manifest("floppy://shards")
    with pytest.raises(OSError, match="exit status 3 of exit 3; # manifest.json"):
        read_manifest("pipe:exit 3; # {name}")
    with pytest.raises(ValueError, match="must say where a file's name goes, as in pipe:ssh host cat /shards/train/{name}"):
        read_manifest("pipe:cat")
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.2)
    with pytest.raises(OSError, match="cannot fetch 'manifest.json' of .*: no byte for 0.2 s"):
        read_manifest("pipe:sleep 60; echo {name}")
    (folder / MANIFEST).write_text("<html>Sign in, please")
    with pytest.raises(ValueError, match="is no JSON, it begins with b'<html>Sign in, please': is the address right"):
        read_manifest(server.address)


def test_a_manifest_cannot_name_a_file_outside_the_cache(server, folder):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0]["sha256"] = "../../escaped"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="'pictures-000000.tar' has no SHA-256, got '../../escaped'"):
        read_manifest(server.address)


def test_the_index_is_needed(server, folder, make_picture_shards, tmp_path):
    other = make_picture_shards(tmp_path / "other", count=4, seed=1)
    shutil.move(folder / INDEX, folder / "aside")
    with pytest.raises(OSError, match="'index/about.json' .*read by their index: .*--index FOLDER"):
        ShardSet.open(server.address)
    shutil.copytree(other / INDEX, folder / INDEX)
    with pytest.raises(ValueError, match="is of other tars than its manifest: write it where the tars lie"):
        ShardSet.open(server.address)
    shutil.rmtree(folder / INDEX)
    shutil.move(folder / "aside", folder / INDEX)
    with open(folder / INDEX / "starts.npy", "ab") as file:
        file.write(b"more")
    with pytest.raises(OSError, match="'index/starts.npy' of .* came damaged"):
        ShardSet.open(server.address)


def test_the_cache_is_asked_for(server, monkeypatch):
    monkeypatch.setenv("WDS_CACHE_SIZE", "lots")
    with pytest.raises(ValueError, match="WDS_CACHE_SIZE='lots' must be a number of bytes, such as 5e11"):
        PictureSamples(server.address, 0)
    monkeypatch.delenv("WDS_CACHE")
    with pytest.raises(ValueError, match="say where by the environment variable WDS_CACHE"):
        ShardSet.open(server.address)


def test_pipes_and_s3(folder, tmp_path, monkeypatch):
    piped = ShardSet.open(f"pipe:cat {folder}/{{name}}")
    assert piped.read(5, "txt") == b"picture 5"
    command = tmp_path / "bin" / "aws"  # as the real one answers to `aws s3 cp s3://bucket/... -`
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\n[ "$1 $2 $4" = "s3 cp -" ] && cat "{folder}/${{3#s3://bucket/some where/}}"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("WDS_CACHE", str(tmp_path / "another"))
    assert ShardSet.open("s3://bucket/some where/").read(5, "txt") == b"picture 5"


def test_addresses():
    assert all(map(is_remote, ("http://h/x", "s3://b/x", "pipe:cat {name}")))
    assert not any(map(is_remote, ("shards/train", "/data/http:/x", "C:train", Path("http://h/x"))))
    assert url_of("https://h/x/", "a b.tar") == "https://h/x/a%20b.tar"
    assert url_of("pipe:cat /x/{name}", "a; rm -r b.tar") == "pipe:cat /x/'a; rm -r b.tar'"


def test_training_from_an_address_is_training_from_the_folder(server, folder, write_tiny_options, tmp_path):
    (tmp_path / "options").mkdir()
    options = write_tiny_options(tmp_path / "options" / "tiny.yaml", folder, num_steps=3)
    runs = {}
    for name, place in {"folder": folder, "address": server.address}.items():
        runs[name] = tmp_path / name
        train_autoencoder(load_config(options, [f"data.train={place}", f"data.val={place}", f"run.dir={runs[name]}"]))
    one, other = (weights(run / "model", "vae") for run in runs.values())
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    # The run goes on from the folder: inputs are known by their contents
    train_autoencoder(load_config(options, [f"data.train={folder}", f"data.val={server.address}", f"run.dir={runs['address']}"]))
