"""Who stands still is read off what each process writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eqldm.atomic import NotWritten
from eqldm.config import load_config
from eqldm.training.heartbeat import FOLDER, Heartbeat, lost_others
from eqldm.training.trainer import make_trainer
from eqldm.unused import without_effect


def beat(folder: Path, rank: int, step: int, number: int) -> None:
    told = {"rank": rank, "step": step, "work": "training", "host": "n1", "pid": 100 + rank, "beat": number}
    (folder / FOLDER / f"rank-{rank}.json").write_text(json.dumps(told))


@pytest.fixture
def heart(tmp_path, monkeypatch) -> Heartbeat:
    """That of process 0 of four, at step 9, whose clock stands until a test moves it."""
    heart = Heartbeat(tmp_path, timeout=600)
    heart.rank, heart.ranks, heart.step = 0, 4, 9
    (tmp_path / FOLDER).mkdir()
    heart.clock = [1000.0]
    monkeypatch.setattr("eqldm.training.heartbeat.time.monotonic", lambda: heart.clock[0])
    return heart


def test_the_one_that_stands_still_is_named(heart, tmp_path):
    assert heart.report() == "Not all processes have come to their training"
    for number in range(30):
        for rank in (1, 2):
            if rank == 2 or number < 10:
                beat(tmp_path, rank, 8 + number % 2, number)
        heart.look()
        heart.clock[0] += 5
    words = "process 1 (pid 101 on n1) was last seen 105 s ago, at step 9, training; process 3 has not come to its training"
    assert heart.report() == words
    assert words in str(lost_others(RuntimeError("Timed out waiting 45000ms for recv operation"), heart))
    for text, lost in (("[Rank 0] Connection closed by peer\nat gloo", True), ("PytorchStreamWriter failed writing file", False)):
        saving = NotWritten("checkpoint 'runs/timeout/last.ckpt'", RuntimeError(text))  # under ZeRO they wait for each other
        assert (lost_others(saving, heart) is not None) is lost
    assert lost_others(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), heart) is None


def test_where_all_are_alive_those_behind_are_named(heart, tmp_path):
    for number in range(30):
        for rank, step in ((1, 9), (2, 7), (3, 9)):
            beat(tmp_path, rank, step, number)
        heart.look()
        heart.clock[0] += 5
    assert heart.report() == "All others are alive; furthest behind: process 2 (pid 102 on n1) was last seen 5 s ago, at step 7, training"


def test_halves_of_beats_and_those_of_an_earlier_start_count_for_nothing(heart, tmp_path):
    beat(tmp_path, 1, 4, 1)
    for text in ("", '{"rank"', "[]"):
        (tmp_path / FOLDER / "rank-2.json").write_text(text)
        heart.look()
        heart.clock[0] += 50
    assert "process 1 (pid 101 on n1) was last seen before this process looked, at step 4" in heart.report()
    assert "process 2 has not come to its training" in heart.report()


def test_the_timeout_is_the_strategys(make_picture_shards, write_tiny_options, tmp_path):
    path = write_tiny_options(tmp_path / "tiny.yaml", make_picture_shards(tmp_path / "shards", count=4, size=16), num_steps=2)
    assert "run.timeout_seconds=99 has no effect: a process alone waits for no other" in " ".join(
        without_effect(load_config(path, ["run.timeout_seconds=99"]))
    )
    config = load_config(path, ["run.timeout_seconds=99", "run.devices=2"])
    trainer = make_trainer(config, automatic_accumulation=True)
    assert trainer.strategy._timeout.total_seconds() == 99 and any(isinstance(each, Heartbeat) for each in trainer.callbacks)
    with pytest.raises(ValueError, match="run.timeout_seconds: got 1, wanted at least 10"):
        load_config(path, ["run.timeout_seconds=1"])
