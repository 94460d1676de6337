"""Shards behind http, s3 and pipes: the samples that a folder gives, each tar fetched once, nothing kept that is damaged, clear errors."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import encode_latents
from eqldm import evaluate
from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import load_config
from eqldm.data import remote
from eqldm.data.cache import _locked, cache_bytes, open_tar
from eqldm.data.order import StreamSampler
from eqldm.data.remote import command_of, is_remote
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

        self.http = type("Http", (ThreadingHTTPServer,), {"request_queue_size": 64})(("127.0.0.1", 0), partial(Handler, directory=folder))
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.http.server_port}/shards"

    def tars(self) -> dict[str, int]:
        return {name: count for name, count in self.asked.items() if name.endswith(".tar")}


@pytest.fixture
def folder(make_picture_shards, tmp_path):
    """24 pictures in 6 tars."""
    return make_picture_shards(tmp_path / "served" / "shards", count=24, shard_size=4)


@pytest.fixture
def server(folder):
    server = Server(folder.parent)
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WDS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WDS_CACHE_SIZE", raising=False)
    monkeypatch.setattr(remote, "WAITS_SECONDS", (0, 0))
    return tmp_path / "cache" / "eqldm"


def kept(cache: Path) -> set[str]:
    """What the cache holds but locks and the index."""
    return {path.name for path in cache.iterdir() if path.name != "locks" and not path.name.startswith("index-")}


def tar_name(entry: dict) -> str:
    return f"{entry['sha256']}.tar"


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["x"], b["x"]) and all(a[name] == b[name] for name in ("key", "caption", "label", "position"))


def test_an_address_gives_what_the_folder_gives_and_fetches_each_tar_once(server, folder, cache):
    for seed in (None, 3):
        local, there = (PictureSamples(place, seed, window=2) for place in (str(folder), server.address))
        assert len(there) == len(local) and there.image_size == local.image_size
        assert all(same(local[position], there[position]) for position in range(60))  # over two epochs
    names = {entry["name"]: 1 for entry in local.shards.manifest["shards"]}
    assert server.tars() == names
    assert kept(cache) == {tar_name(entry) for entry in local.shards.manifest["shards"]}


def test_nothing_is_fetched_but_what_is_read(server):
    shards = ShardSet.open(server.address)
    assert not server.tars()
    assert shards.read(9, "txt") == b"picture 9"
    assert server.tars() == {"pictures-000002.tar": 1}


def size_of(cache: Path) -> int:
    with _locked(cache, "room"):
        return sum(path.stat().st_size for path in (*cache.glob("*.tar"), *cache.glob("*.partial")))


@pytest.mark.parametrize(("window", "first", "most"), [(3, 0, 1.0), (3, 17, 1.0), (1, 5, 1000)])
def test_readers_share_the_cache_and_fetch_ahead(server, folder, cache, monkeypatch, make_picture_shards, window, first, most):
    """Two processes of two readers each, over more than two epochs, in the least cache that is taken; also begun within a window, and with
    windows that are shorter than what the readers have in hand. `most`: fetches for a tar and an epoch, where a window is longer."""
    more = make_picture_shards(folder.parent / "more", count=96, shard_size=8)
    entries = read_manifest(more)["shards"]
    monkeypatch.setenv("WDS_CACHE_SIZE", str(3 * window * max(entry["bytes"] for entry in entries)))
    samples, expected = PictureSamples(server.address.replace("shards", "more"), 0, window), PictureSamples(str(more), 0, window)
    loaders = []
    for rank in range(2):
        sampler = iter(StreamSampler(4, 2, rank, world_size=2, start_step=first))
        batches = [next(sampler) for _ in range(56)]
        loader = torch.utils.data.DataLoader(samples, batch_sampler=batches, num_workers=2, collate_fn=collate)
        loaders.append(zip(batches, loader))
    for pairs in zip(*loaders):
        for positions, batch in pairs:
            assert batch["key"] == [expected[position]["key"] for position in positions]
        assert size_of(cache) <= cache_bytes()
    assert len(server.tars()) == 12 and sum(server.tars().values()) <= most * 12 * 56 / 24


def test_readers_fetch_the_next_window_ahead_and_the_process_that_forks_does_not(server):
    samples = PictureSamples(server.address, 0, window=2)
    _, now, following = samples.windows(0)
    samples[0]  # here
    assert not [thread for thread in threading.enumerate() if thread.name == "fetch-ahead"]
    assert len(server.tars()) <= 2  # the first picture's, for its size, and this one's
    loader = iter(torch.utils.data.DataLoader(samples, batch_sampler=[[0]], num_workers=1, collate_fn=collate, persistent_workers=True))
    next(loader)
    wanted = {f"pictures-{shard:06d}.tar" for shard in now + following}
    for _ in range(300):
        if wanted <= server.tars().keys():
            return
        time.sleep(0.1)
    pytest.fail(f"{wanted} were not fetched, only {server.tars()}")


def test_the_tars_of_the_next_window_are_told(folder):
    samples = PictureSamples(str(folder), 0, window=4)
    for epoch in range(3):
        order = [samples.shards.shard_of(samples.number(position)) for position in range(24 * epoch, 24 * epoch + 24)]
        for position in range(24 * epoch, 24 * epoch + 24):
            positions, shards, following = samples.windows(position)
            assert position in positions and {order[p - 24 * epoch] for p in positions} == set(shards)
            assert samples.windows(positions.stop)[1] == following
    in_turn = PictureSamples(str(folder))
    assert in_turn.windows(5) == (range(4, 8), [1], [2]) and in_turn.windows(20)[2] == []
    in_turn.turns = [1, 4]
    assert in_turn.windows(5) == (range(4, 8), [1], [4]) and in_turn.windows(16)[2] == [] and in_turn.windows(0)[2] == []


def read_through(address: str, numbers: list[int]) -> list[bytes]:
    shards = ShardSet.open(address)
    return [shards.read(number, "txt") for number in numbers]


def test_processes_that_take_each_others_room(server, folder, cache, monkeypatch):
    """Four processes that each read other tars, in a cache of two: slow, and right."""
    entries = read_manifest(folder)["shards"]
    monkeypatch.setenv("WDS_CACHE_SIZE", str(2 * max(entry["bytes"] for entry in entries)))
    orders = [[(number * 7 + 5 * start) % 24 for number in range(48)] for start in range(4)]
    with ProcessPoolExecutor(4, multiprocessing.get_context("fork")) as pool:
        for numbers, found in zip(orders, pool.map(read_through, [server.address] * 4, orders)):
            assert found == [f"picture {number}".encode() for number in numbers]
    assert len(kept(cache)) <= 2


def test_a_cache_that_is_too_small(server, folder, monkeypatch):
    largest = sorted((entry["bytes"] for entry in read_manifest(folder)["shards"]), reverse=True)
    monkeypatch.setenv("WDS_CACHE_SIZE", str(sum(largest[:3]) - 1))
    with pytest.raises(ValueError, match="too small for .*: 3 tars are read or fetched at once, .*data.shuffle_shards lower"):
        PictureSamples(server.address, 0, window=1)
    PictureSamples(server.address)  # in order
    monkeypatch.setenv("WDS_CACHE_SIZE", str(largest[-1] - 1))
    with pytest.raises(OSError, match="does not fit into WDS_CACHE_SIZE"):
        ShardSet.open(server.address).read(4, "txt")


def test_the_least_recently_read_tar_goes_first(server, folder, cache, monkeypatch):
    entries = read_manifest(folder)["shards"]
    monkeypatch.setenv("WDS_CACHE_SIZE", str(sum(entry["bytes"] for entry in entries[:3])))
    for number, entry in enumerate(entries[:3]):
        open_tar(server.address, entry).close()
        os.utime(cache / tar_name(entry), (number, number))
    open_tar(server.address, entries[0]).close()
    with open_tar(server.address, entries[1]) as reading:
        os.utime(cache / tar_name(entries[1]), (1, 1))
        abandoned, foreign = cache / f"{'0' * 64}.partial", cache / "mine.tar"  # of a process that was killed; of the user
        for path in (abandoned, foreign):
            path.write_bytes(b"half")
            os.utime(path, (0, 0))
        open_tar(server.address, entries[3]).close()
        assert len(reading.read()) == entries[1]["bytes"]  # who reads it reads on
    assert kept(cache) == {tar_name(entries[number]) for number in (0, 2, 3)} | {"mine.tar"}


def test_what_comes_damaged_is_fetched_again_and_never_kept(server, cache):
    shards = ShardSet.open(server.address)
    server.halved.add("pictures-000000.tar")
    with pytest.warns(UserWarning, match="'pictures-000000.tar' of .* came damaged: .*; again in 0 s"):
        assert shards.read(0, "txt") == b"picture 0"
    for wrong, message in (
        (512, "'pictures-000002.tar' .*: it is longer than its 512 bytes"),
        (10**6, "damaged: .*says 1000000 bytes"),
    ):
        with pytest.warns(UserWarning), pytest.raises(OSError, match=message):
            open_tar(server.address, {**shards.manifest["shards"][2], "bytes": wrong})
    entry = {**shards.manifest["shards"][1], "sha256": "0" * 64}  # changed there since the manifest was read
    with pytest.warns(UserWarning), pytest.raises(OSError, match="'pictures-000001.tar' of .* came damaged"):
        open_tar(server.address, entry)
    assert server.asked["pictures-000001.tar"] == 3
    first = shards.manifest["shards"][0]
    assert kept(cache) == {tar_name(first)}
    with open(cache / tar_name(first), "r+b") as file:  # cut short there
        file.truncate(1024)
    assert shards.read(0, "txt") == b"picture 0" and server.asked["pictures-000000.tar"] == 3


def test_a_killed_fetch_leaves_nothing_in_the_way(server, cache):
    entry = ShardSet.open(server.address).manifest["shards"][0]
    half = cache / f"{entry['sha256']}.partial"
    half.write_bytes(b"half, and longer than the whole" * entry["bytes"])
    (index,) = cache.glob("index-*")
    index.rename(index.with_name(index.name + ".partial"))
    (index.with_name(index.name + ".partial") / "index" / "starts.npy").write_bytes(b"half")
    assert ShardSet.open(server.address).read(0, "txt") == b"picture 0" and not half.exists()
    (index / "index" / "starts.npy").unlink()  # swept off by the machine
    shards = ShardSet.open(server.address)
    with open(cache / "locks" / entry["sha256"], "wb") as file:  # a killed process holds its lock no longer
        holder = multiprocessing.get_context("fork").Process(target=lambda: (fcntl.flock(file, fcntl.LOCK_EX), time.sleep(600)))
        holder.start()
    (cache / tar_name(entry)).unlink()
    held = False
    while not held:
        with _locked(cache, entry["sha256"], wait=False) as free:
            held = not free
    killer = threading.Timer(1, holder.kill)
    killer.start()
    assert shards.read(0, "txt") == b"picture 0" and not killer.is_alive()


def test_a_full_disk(server, cache, monkeypatch):
    shards = ShardSet.open(server.address)

    def full(address, name, most=None):
        yield b"some"
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "fetch", full)
    with pytest.raises(OSError, match="no space left for 'pictures-000000.tar' in the cache '.*eqldm': free some, or set WDS_CACHE_SIZE"):
        shards.read(0, "txt")
    assert not kept(cache)


def test_what_cannot_be_fetched(server, folder, monkeypatch):
    with pytest.raises(OSError, match=r"cannot fetch 'manifest.json' of '.*nowhere': curl ended with status 22 \(refused by the server"):
        ShardSet.open(server.address + "/nowhere")
    with pytest.raises(ValueError, match="got floppy://, wanted http://, s3://, gs://, https://, or pipe:COMMAND {name}"):
        read_manifest("floppy://shards")
    with pytest.raises(OSError, match="exit ended with status 3"):
        read_manifest("pipe:exit 3; # {name}")
    with pytest.raises(OSError, match="no-such-command ended with status 127 .not installed."):
        read_manifest("pipe:no-such-command {name}")
    with pytest.raises(ValueError, match="must say where a file's name goes, as in pipe:ssh -n host cat /shards/train/{name}"):
        read_manifest("pipe:cat")
    with pytest.raises(ValueError, match="must not hold a password") as refused:
        read_manifest("https://me:secret@host/shards")
    assert "secret" not in str(refused.value)
    (folder / MANIFEST).write_text("<html>Sign in, please")
    with pytest.raises(ValueError, match="is no JSON object, it begins with b'<html>Sign in, please': is the address right"):
        read_manifest(server.address)


def test_a_command_that_hangs_is_killed_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.3)
    with pytest.raises(OSError, match="cannot fetch 'manifest.json' of .*: no byte for 0.3 s"):
        read_manifest(f"pipe:sh -c 'echo $$ > {tmp_path}/pid; exec sleep 600' | cat; echo {{name}}")
    status = Path("/proc", (tmp_path / "pid").read_text().strip(), "status")
    for _ in range(100):
        if not status.exists() or "State:\tZ" in status.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the command lives on")
    monkeypatch.setattr(remote, "CLOSE_SECONDS", 0.3)
    monkeypatch.setattr(remote, "STALL_SECONDS", 5)
    with pytest.raises(OSError, match="did not end within 0.3 s of its last byte"):
        read_manifest("pipe:echo {name}; exec >&-; sleep 600")


@pytest.mark.parametrize(("change", "message"), [
    ({"sha256": "../../escaped"}, "a tar's sha256 is '../../escaped'"),
    ({"name": "../escaped.tar"}, "a tar's name is '../escaped.tar'"),
    ({"name": "$(touch escaped).tar"}, "a tar's name is"),
    ({"bytes": 10**19}, "a tar's bytes is 10000000000000000000"),
    ({"bytes": None}, "a tar's bytes is None"),
])  # fmt: skip
def test_a_manifest_from_elsewhere_is_not_trusted(server, folder, change, message):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["shards"][0] |= change
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_manifest(server.address)
    (folder / MANIFEST).write_text('{"error": "sign in"}')
    with pytest.raises(ValueError, match=r"lists no shards, it holds \['error'\]"):
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
    about = json.loads((folder / INDEX / "about.json").read_text())
    with open(folder / INDEX / "starts.npy", "ab") as file:
        file.write(b"more")
    with pytest.raises(OSError, match="'index/starts.npy' of .* came damaged"):
        ShardSet.open(server.address)
    (folder / INDEX / "about.json").write_text(json.dumps({**about, "files": {"index/../../../escaped": "0"}}))
    with pytest.raises(ValueError, match="lists 'index/../../../escaped', which is no file of an index"):
        ShardSet.open(server.address)
    (folder / INDEX / "about.json").write_text(json.dumps({"shards": about["shards"]}))
    with pytest.raises(ValueError, match="was written by an early version"):
        ShardSet.open(server.address)
    assert len(ShardSet.open(folder)) == 24


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
    command.write_text(f'#!/bin/sh\n[ "$1 $2 $5" = "s3 cp -" ] && cat "{folder}/${{4#s3://bucket/some where/}}"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("WDS_CACHE", str(tmp_path / "another"))
    assert ShardSet.open("s3://bucket/some where/").read(5, "txt") == b"picture 5"


def test_addresses():
    assert all(map(is_remote, ("http://h/x", "S3://b/x", "pipe:cat {name}")))
    assert not any(map(is_remote, ("shards/train", "/data/http:/x", "C:train", Path("http://h/x"))))
    assert command_of("https://h/x/", "a.tar").endswith(" https://h/x/a.tar")
    assert command_of("https://h/x/{name}?key=1&b", "a.tar").endswith(" 'https://h/x/a.tar?key=1&b'")
    assert command_of("pipe:cat /x/{name} | zcat", "a.tar") == "cat /x/a.tar | zcat"
    with pytest.raises(ValueError, match="as in https://host/shards/{name}.query"):
        command_of("https://h/x?key=1", "a.tar")


def test_encoding_and_evaluating_take_addresses(server, folder, tiny_model_folder, tmp_path, monkeypatch):
    for name, place in {"there": server.address, "here": str(folder)}.items():
        words = ["encode_latents.py", "--data", place, "--model", tiny_model_folder, "--out", tmp_path / name]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        encode_latents.main()
    there, here = (ShardSet.open(tmp_path / name) for name in ("there", "here"))
    assert there.manifest["shards"] == here.manifest["shards"] and set(server.tars().values()) == {1}
    few = ["--without", "lpips", "inception", "--metrics", "reconstruction", "fit", "--num-images", 8, "--device", "cpu"]
    words = ["evaluate", tiny_model_folder, "--data", server.address, *few, "--out", tmp_path / "evaluation"]
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    evaluate.main()
    assert (tmp_path / "evaluation" / "report.md").is_file()


def test_training_from_an_address_is_training_from_the_folder(server, folder, write_tiny_options, tmp_path):
    """Also where it was begun there and goes on here, in the middle of a window."""
    (tmp_path / "options").mkdir()
    options = write_tiny_options(tmp_path / "options" / "tiny.yaml", folder)

    def train(run: Path, place: str, steps: int) -> dict:
        where = [f"data.train={place}", f"data.val={place}", "data.num_workers=2", "data.shuffle_shards=2"]
        train_autoencoder(load_config(options, [*where, f"run.dir={run}", f"run.num_steps={steps}", "optimizer.schedule=constant"]))
        return weights(run / "model", "vae")

    one = train(tmp_path / "folder", str(folder), 5)
    train(tmp_path / "address", server.address, 3)
    other = train(tmp_path / "address", f"pipe:cat {folder}/{{name}}", 5)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
