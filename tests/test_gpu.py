"""benchmarks/gpu.py: each part ends in its time, what it has found stays, and all of it is rehearsed on the CPU."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gpu
import gpu_fast
import gpu_learn
import gpu_predicted
import gpu_report
import gpu_right
import gpu_sampling
from eqldm.anagram.sampling import Sampler
from eqldm.views import parse_view
from gpu_parts import BEGUN, BROKEN, DONE, FAILED, RESULTS, SKIPPED, Item, Time, do, note, results
from steps import ROOT

PARTS = {"right": gpu_right, "fast": gpu_fast, "sampling": gpu_sampling, "learn": gpu_learn, "predicted": gpu_predicted}


class Clock:
    """Seconds that pass when somebody waits for them."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def wait(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


def states(out: Path, part: str = "fast") -> dict[str, str]:
    """The last state of each item."""
    return {row["name"]: row["state"] for row in results(out) if row["part"] == part}


def arguments(tmp_path: Path, **changes) -> argparse.Namespace:
    given = {
        "out": tmp_path,
        "scratch": tmp_path,
        "device": "cuda",
        "tiny": False,
        "config": Path("config.yaml"),
        "shards": tmp_path,
        "then": None,
        "num_pictures": 80000,
        "set": [],
    }
    return argparse.Namespace(**{**given, **changes})


# In its time


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("slower", [0.5, 1.0, 1.6])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_begins_nothing_that_it_has_no_time_for(part, slower, tiny, tmp_path, clock):
    """With its real items, which take as long as they say, or not: then what is begun may run over, and `watch` ends it."""
    items = PARTS[part].items(arguments(tmp_path, tiny=tiny, device="cpu" if tiny else "cuda"))
    for limit in (1.0, 30.0, 100.0):
        clock.seconds, out = 0.0, tmp_path / str(limit)
        out.mkdir()
        do(part, [replace(each, find=lambda _, s=each.seconds: clock.wait(slower * s) or {}) for each in items], Time.of(limit, clock), out)
        assert clock.seconds <= limit + max(0.0, slower - 1) * max(each.seconds for each in items)
        assert set(states(out, part)) == {each.name for each in items} and set(states(out, part).values()) <= {DONE, SKIPPED}
        assert all("were left" in row["why"] for row in results(out) if row["state"] == SKIPPED)


def test_the_parts_share_the_time(clock):
    """What a part leaves over is the others'; none takes what is theirs; together they end in time."""
    limit, parts = Time.of(540, clock), list(gpu.PARTS)
    assert gpu.limit_of("right", parts, limit).left() == pytest.approx(150)
    clock.wait(30)  # of its 150 seconds
    assert gpu.limit_of("fast", parts, limit).left() == pytest.approx(510 * 210 / 390)
    clock.seconds = 0
    for part in parts:
        clock.wait(gpu.limit_of(part, parts, limit).left())
    assert clock.seconds == pytest.approx(540)
    assert gpu.limit_of("fast", ["fast", "sampling"], Time.of(290, clock)).left() == pytest.approx(210)


def test_a_part_that_cannot_be_run_takes_no_time(tmp_path):
    given = {"only": list(gpu.PARTS), "config": None, "shards": None}
    assert gpu.parts_of(arguments(tmp_path, **given)) == ["right", "fast", "sampling"]
    assert gpu.parts_of(arguments(tmp_path, **given, tiny=True)) == list(gpu.PARTS)
    assert gpu.parts_of(arguments(tmp_path, only=["learn"])) == ["learn"]
    with pytest.raises(ValueError, match="--config and --shards: give both"):
        gpu.parts_of(arguments(tmp_path, only=["learn"], shards=None))


def test_a_part_that_does_not_end_is_ended_with_all_that_it_started(clock, tmp_path, monkeypatch):
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.2)
    assert gpu.watch(process, Time.of(60, clock), sleep=clock.wait) is None
    assert 60 <= clock.seconds < 60 + 2 * gpu.TICK_SECONDS and process.returncode == -signal.SIGKILL
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    for _ in range(100):  # it is ended, and gone once its parent's parent has looked
        if not (stat := _read(child)) or stat.split()[2] in (b"Z", b"X"):
            break
        time.sleep(0.05)
    else:
        pytest.fail("its child goes on")
    done = subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"], start_new_session=True)
    assert gpu.watch(done, Time.of(600)) == 7


def test_a_part_is_told_the_end_that_it_is_ended_at(tmp_path):
    """However long its imports take: seen, it counted from after them, and was ended before it thought that it had to be done."""
    limit, args = Time.of(40), arguments(tmp_path, device="cpu", config=None, shards=None)
    with open(tmp_path / "log.txt", "w") as log:
        process = gpu.start("learn", args, limit, log)
    try:
        words = list(process.args)
        assert float(words[words.index("--end") + 1]) == pytest.approx(limit.end - gpu.EARLIER_SECONDS, abs=0.1)
        assert words[words.index("--device") + 1] == "cpu" and "--tiny" not in words and "--config" not in words
    finally:
        gpu.end(process)


def test_the_tests_end_when_time_is_up(clock, tmp_path):
    recorder = gpu_right.Recorder(tmp_path, Time.of(10 + gpu_right.ENDING_SECONDS, clock))
    report = pytest.TestReport("tests/test_devices.py::test_it[cuda]", ("", 0, ""), {}, "passed", None, "call", duration=2.0)
    report.user_properties = [("levels of 255", 0.5)]
    recorder.pytest_runtest_logreport(report)
    clock.wait(10.5)
    with pytest.raises(pytest.exit.Exception, match="time is up"):
        recorder.pytest_runtest_logreport(report)
    (row, _) = results(tmp_path)
    assert row == {"part": "right", "name": "test_devices.py::test_it[cuda]", "state": DONE, "seconds": 2.0, "levels of 255": 0.5}


# What was found stays


def failing(message: str, kind: type[Exception] = RuntimeError):
    def find(limit: Time) -> dict:
        raise kind(message)

    return find


def test_an_item_that_fails_is_noted_and_the_next_one_is_done(tmp_path):
    found = [Item("a", 1, failing("CUDA out of memory. Tried to allocate 80 GiB")), Item("b", 1, lambda limit: {"value": 3})]
    do("fast", [*found, Item("c", 1, failing("of two\nlines", ValueError))], Time.of(60), tmp_path)
    rows = {row["name"]: row for row in results(tmp_path)}
    assert rows["a"]["why"] == "out of memory" and rows["c"]["why"] == "ValueError: of two"
    assert rows["b"]["value"] == 3 and [rows[name]["state"] for name in "abc"] == [SKIPPED, DONE, FAILED]


def test_a_part_goes_on_after_the_item_that_broke_its_device(tmp_path):
    items = [Item("a", 1, failing("CUDA error: an illegal memory access")), Item("b", 1, lambda limit: {})]
    with pytest.raises(SystemExit) as ended:
        do("fast", items, Time.of(60), tmp_path)
    assert ended.value.code == BROKEN and states(tmp_path) == {"a": FAILED}
    do("fast", items, Time.of(60), tmp_path)
    assert states(tmp_path) == {"a": FAILED, "b": DONE}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    note(tmp_path, "fast", "a", DONE)
    with open(tmp_path / RESULTS, "a") as file:
        file.write('{"part": "fast", "na')
    assert states(tmp_path) == {"a": DONE} and results(tmp_path / "none") == []


def test_a_part_that_dies_is_started_again_for_the_rest(tmp_path, monkeypatch):
    """As often as it finds something new."""
    code = (
        "import sys; sys.path[:0] = {path}\nfrom pathlib import Path\nfrom gpu_parts import *\nout = Path({out!r})\n"
        "names = [row['name'] for row in results(out)]\n"
        "name = next((n for n in 'abc' if n not in names), None)\n"
        "note(out, 'fast', name, 'begun') if name else None\nraise SystemExit(9)\n"
    ).format(path=[str(ROOT), str(ROOT / "benchmarks")], out=str(tmp_path))
    starts = []

    def start(part, args, limit, log):
        starts.append(part)
        return subprocess.Popen([sys.executable, "-c", code], start_new_session=True)

    monkeypatch.setattr(gpu, "start", start)
    gpu.run_part("fast", arguments(tmp_path), Time.of(600), None, lambda: None)
    assert len(starts) == 4 and states(tmp_path) == {"a": BEGUN, "b": BEGUN, "c": BEGUN, gpu.WHOLE: FAILED}
    assert "- a: did not end" in gpu_report.report(results(tmp_path)) and "it ended with status 9" in gpu_report.report(results(tmp_path))


def test_pieces_join_to_what_was_learnt(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(os.urandom(50_000))
    (tmp_path / "learnt.tar.07").write_bytes(b"of a run before")
    pieces = gpu_learn.write_pieces({"model": tmp_path / "model"}, tmp_path, size=20_000)
    assert [path.name for path in pieces] == ["learnt.tar.00", "learnt.tar.01", "learnt.tar.02", "learnt.tar.03"][: len(pieces)]
    assert len(pieces) > 2 and max(path.stat().st_size for path in pieces) <= 20_000 and not (tmp_path / "learnt.tar.07").exists()
    (tmp_path / "whole.tar").write_bytes(b"".join(path.read_bytes() for path in pieces))
    with tarfile.open(tmp_path / "whole.tar") as tar:
        tar.extractall(tmp_path / "again", filter="data")
    assert (tmp_path / "again" / "model" / "weights").read_bytes() == (tmp_path / "model" / "weights").read_bytes()


# What is measured


def test_every_file_with_tests_for_a_gpu_is_run():
    marked = {path.name for path in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in path.read_text() and path.name != "test_gpu.py"}
    assert marked == set(gpu_right.FILES)


def test_one_call_for_each_view_draws_the_same(tiny_model_folder):
    sampler = Sampler.open(tiny_model_folder, "cpu")
    prompts, views = ["the letter a", "the letter v"], [parse_view("identity"), parse_view("rotate_180")]
    each, calls = gpu_sampling.with_each_view(sampler, 2), []
    sampler.networks.unet.register_forward_hook(lambda *_: calls.append(1))
    wanted = sampler.latents(prompts, views, range(3), num_inference_steps=2)
    assert len(calls) == 2
    torch.testing.assert_close(each.latents(prompts, views, range(3), num_inference_steps=2), wanted, atol=1e-5, rtol=1e-5)
    assert len(calls) == 2 + 4


def test_the_networks_alone_are_trained_at_real_weights():
    network = gpu_fast.on_device(
        torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, device="meta"), torch.nn.BatchNorm2d(4, device="meta")), "cpu", True
    )
    assert all(bool(p.isfinite().all()) and 0 < float(p.detach().abs().max()) < 0.2 for p in network.parameters())
    assert int(network[1].num_batches_tracked) == 0 and network[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_report_holds_targets_and_predictions(tmp_path):
    def training(network: str, options: str, rate: float, batch: int = 64, **more) -> None:
        about = {"network": network, "size": 256, "batch": batch, "options": options, "train/samples_per_second": rate, "peak": 989e12}
        note(tmp_path, "fast", f"{network}, 256 px, batch {batch}, {options}", DONE, **{**about, **more})

    note(tmp_path, "about", "machine", DONE, device="A GPU", minutes=9, date="today", commit="abc", versions={"torch": "2.11"})
    note(tmp_path, "predicted", "unet", DONE, network="unet", size=256, operations=0.5416e12, fixed_gb=19.7, each_gb=0.317,
         utilisation={"B GPU": 0.3, "GPU": 0.15})  # fmt: skip
    training("unet", "plain", 100.0, peak=67e12)
    training("unet", "bf16, channels_last", 640.0)
    training("unet", "bf16", 800.0, **{"train/max_memory_gb": 41.0})
    training("vae", "plain", 20.0, 10)
    training("vae", "bf16, channels_last", 30.0, 10)
    alone = {"network": "unet", "size": 256, "batch": 64, "networks_seconds": 0.06}
    note(tmp_path, "fast", "alone", DONE, **alone, adamw_fused_seconds=0.01, adamw_foreach_seconds=0.02, adamw_loop_seconds=0.09)
    note(tmp_path, "sampling", "a", DONE, way="in latents", batch=4, seconds_a_picture=0.5, rounds=3)
    note(tmp_path, "sampling", "b", DONE, way="blended in pixels", batch=4, seconds_a_picture=1.5, rounds=3)
    note(tmp_path, "sampling", "c", SKIPPED, why="takes about 40 s, 3 s were left")
    text = gpu_report.report(results(tmp_path))
    assert "| unet, 256 px, batch 64, bf16 | 800.0 | 8.00 | 1.00 | 43.8% | 41.0 | 274/s, 40 GB |" in text
    assert "| unet, 256 px, batch 64, bf16, channels_last | 640.0 | 6.40 | 0.80 |" in text
    assert "The UNet's best MFU is 43.8%; wanted on an H100: 40%, reached" in text
    assert "trains 1.50 times as many pictures/s as plainly; wanted: 2, not reached" in text
    assert "| unet, 256 px, batch 64 | 60 | 25% of 80 | 10.0 | 20.0 | 90.0 |" in text
    assert "| b | 1.500 | 3.00 | - |" in text and "- c: not run, takes about 40 s, 3 s were left" in text
    assert text.startswith("# A GPU\n") and "rehearsal" not in text


# As a user runs it


def command(out: Path, *words) -> list[str]:
    return list(map(str, [sys.executable, ROOT / "benchmarks" / "gpu.py", "--out", out, *words]))


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


@pytest.mark.slow
def test_without_a_gpu_it_says_how_to_rehearse(tmp_path):
    done = subprocess.run(command(tmp_path / "out"), env={**environment(), "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith(
        "error: torch sees no GPU on this machine. A rehearsal without one: --device cpu --tiny"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_rehearsal_of_all_parts(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(command(out, "--device", "cpu", "--tiny", "--minutes", 6), env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + (out / "log.txt").read_text()[-3000:]
    rows = results(out)
    for part in (*gpu.PARTS, "predicted"):
        assert any(row["part"] == part and row["state"] == DONE for row in rows), part
    assert {row["state"] for row in rows} == {BEGUN, DONE}
    assert sorted(path.name for path in out.iterdir()) == ["learnt.tar.00", "log.txt", "report.md", RESULTS]
    with tarfile.open(out / "learnt.tar.00") as tar:
        tar.extractall(tmp_path / "learnt", filter="data")
    weights = load_file(next((tmp_path / "learnt" / "model" / "vae").glob("*.safetensors")))
    assert {value.dtype for value in weights.values()} == {torch.float16}
    text = (out / "report.md").read_text()
    assert "**A rehearsal**" in text and all(f"## {part.title()}" in text for part in gpu.PARTS) and "failed" not in text
    again = subprocess.run(command(out, "--device", "cpu", "--tiny"), env=environment(), capture_output=True, text=True)
    assert again.returncode == 1 and "holds the results of another run: give another folder" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_keeps_what_it_has(tmp_path, number):
    out = tmp_path / "out"
    words = command(out, "--device", "cpu", "--tiny", "--only", "sampling", "learn", "--scratch", tmp_path / "scratch")
    process = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(row["part"] == "learn" for row in results(out)):
        time.sleep(0.2)
    process.send_signal(number)
    assert process.wait(30) == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert list(states(out, "sampling").values()) == [DONE] * 3 and list(states(out, "learn").values()) == [BEGUN]
    assert "did not end" in (out / "report.md").read_text()
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path / "scratch").encode() in _read(path)]
    assert not left, left


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""
