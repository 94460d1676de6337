"""Checkpoints that cannot be read or written are named, with what to do; the one before a lost one goes on."""

from __future__ import annotations

import errno
import os
import pickle
import random
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import load_config
from eqldm.training.checkpoints import (
    ABOUT,
    LAST,
    check_fits,
    checkpoint_step,
    find_checkpoint,
    kept_checkpoints,
    link_checkpoint,
    newest_checkpoint,
    read_about,
    step_checkpoint,
)

WHOLE = {"global_step": 7, "state_dict": {}, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}


class Code:
    """What runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/eqldm-must-not-be-made",)


def write(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.parent / "whole"
    torch.save(WHOLE | {"state_dict": {"weight": torch.arange(2000.0)}}, whole)
    data, noise = whole.read_bytes(), random.Random(0)
    whole.unlink()
    half = len(data) // 2
    contents = {
        "empty": b"", "cut": data[:half], "a tail of zeros": data[:half] + bytes(half), "zeros": bytes(5000), "text": b"half of one\n",
        "damaged": data[:300] + noise.randbytes(600) + data[900:], "random": noise.randbytes(5000),
        "a pickle": pickle.dumps(WHOLE | {"callbacks": Code()}), "an old pickle": pickle.dumps({"a": Code()}, protocol=2),
    }  # fmt: skip
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "a folder":
        path.mkdir()
    else:
        torch.save(
            {"code": WHOLE | {"callbacks": Code()}, "weights": {"layer.weight": torch.ones(2)}, "a tensor": torch.ones(2)}[kind], path
        )


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("empty", r"cannot be used: it is empty \(0 bytes\)"),
        ("cut", "cannot be used: it is cut or damaged"),
        ("a tail of zeros", "it is cut or damaged"),
        ("damaged", "it is cut or damaged"),
        ("zeros", "it is no file of torch's"),
        ("text", "it is no file of torch's"),
        ("random", "it is no file of torch's"),
        ("code", r"tensors and plain values \(posix.mkdir\); opening it could run code, which is refused"),
        ("a pickle", "opening it could run code, which is refused"),
        ("an old pickle", r"\(posix.mkdir\); opening it could run code, which is refused"),
        ("weights", r"is not one of a run: it holds \['layer.weight'\]"),
        ("a tensor", "is not one of a run: it holds Tensor"),
        ("a folder", "is a folder without a whole about.json"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_named_with_what_to_do(tmp_path, kind, message):
    path = tmp_path / LAST
    write(path, kind)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        checkpoint_step(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert "Move it away to start anew in this folder (run.keep_every" in str(caught.value)
    torch.save(WHOLE, tmp_path / step_checkpoint(7))
    with pytest.raises((ValueError, OSError), match="Move it away, and the same command goes on from the one kept at step 7"):
        checkpoint_step(path)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert checkpoint_step(newest_checkpoint(tmp_path)) == 7
    assert not Path("/tmp/eqldm-must-not-be-made").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    write(tmp_path / LAST, "cut")
    (tmp_path / LAST).chmod(0)
    with pytest.raises(OSError, match="last.ckpt' cannot be read: .*Permission denied"):
        checkpoint_step(tmp_path / LAST)


def test_a_folder_of_shards_that_is_not_whole_is_named(tmp_path):
    folder = tmp_path / LAST
    (folder / "checkpoint").mkdir(parents=True)
    for text in ("{", "[]", '{"global_step": 3}'):
        (folder / ABOUT).write_text(text)
        with pytest.raises(ValueError, match=r"last.ckpt' is .*about.json.*Move it away"):
            read_about(folder)
    (folder / ABOUT).write_text('{"global_step": 3, "processes": 2}')
    assert checkpoint_step(folder) == 3
    (folder / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").touch()
    with pytest.raises(ValueError, match="is not whole: zero_pp_rank_1_mp_rank_00_optim_states.pt lacks its contents"):
        read_about(folder)


def test_steps_are_found_and_listed(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        find_checkpoint(tmp_path)
    (tmp_path / LAST).parent.mkdir()
    for step in (2, 4, 1_000_000_000):
        torch.save(WHOLE | {"global_step": step}, tmp_path / step_checkpoint(step))
    torch.save(WHOLE, tmp_path / LAST)
    (tmp_path / step_checkpoint(6)).with_suffix(".ckpt.partial").touch()  # of a process that was killed
    assert list(kept_checkpoints(tmp_path)) == [2, 4, 1_000_000_000]
    assert find_checkpoint(tmp_path) == find_checkpoint(tmp_path, 7) == (7, tmp_path / LAST)
    assert find_checkpoint(tmp_path, 4) == (4, tmp_path / step_checkpoint(4))
    with pytest.raises(FileNotFoundError, match="no checkpoint of step 3, it has those of 2, 4, 7, 1000000000"):
        find_checkpoint(tmp_path, 3)
    (tmp_path / LAST).write_bytes(b"")
    assert find_checkpoint(tmp_path, 2)[0] == 2  # which does not need the newest


def test_other_networks_weights_are_named(tmp_path):
    module = torch.nn.Linear(2, 3)
    torch.save(WHOLE | {"state_dict": {"weight": torch.ones(3, 4), "bias": torch.ones(3)}}, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"of other networks: 1 weights differ, such as weight \(got \(3, 4\), wanted \(3, 2\)\)"):
        check_fits(tmp_path / "last.ckpt", module)
    torch.save(WHOLE | {"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    check_fits(tmp_path / "last.ckpt", module)


@pytest.fixture(scope="module")
def tiny(make_picture_shards, write_tiny_options, tmp_path_factory) -> Path:
    """A config of five steps of stage 1, with a checkpoint of each; give it a run.dir."""
    folder = tmp_path_factory.mktemp("tiny")
    shards = make_picture_shards(folder / "shards", count=8, size=16)
    return write_tiny_options(folder / "tiny.yaml", shards, num_steps=5, checkpoint_every=1)


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_every_so_many_steps_a_checkpoint_is_kept(tiny, tmp_path, monkeypatch, links):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for steps in (4, 5):  # 4 is kept and the newest: one file of two names
        config = load_config(tiny, [f"run.dir={tmp_path / 'run'}", f"run.num_steps={steps}", "run.keep_every=2"])
        with nullcontext() if links or steps == 5 else pytest.warns(UserWarning, match="no hard links .* kept checkpoints are copied"):
            train_autoencoder(config)
        last = tmp_path / "run" / LAST
        assert contents(last.parent) == ["last.ckpt", "step-000000002.ckpt", "step-000000004.ckpt"]
        kept = kept_checkpoints(tmp_path / "run")
        assert [checkpoint_step(path) for path in kept.values()] == [2, 4] and checkpoint_step(last) == steps
        assert kept[4].samefile(last) is (links and steps == 4)


def test_a_full_disk_while_a_checkpoint_is_kept_leaves_those_before(tiny, tmp_path, monkeypatch):
    config = load_config(tiny, [f"run.dir={tmp_path / 'run'}", "run.keep_every=2"])
    link = os.link

    def full(source, target):
        if source.name == step_checkpoint(4).name:
            raise OSError(errno.ENOSPC, "No space left on device")
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        with pytest.raises(OSError, match="last.ckpt' could not be written .*No space left.*: make room"):
            train_autoencoder(config)
    assert checkpoint_step(tmp_path / "run" / LAST) == 3
    train_autoencoder(config)
    assert contents((tmp_path / "run" / LAST).parent) == ["last.ckpt", "step-000000002.ckpt", "step-000000004.ckpt"]


def test_folders_of_shards_are_linked_file_by_file(tmp_path):
    folder, target = tmp_path / step_checkpoint(2), tmp_path / LAST
    (folder / "checkpoint").mkdir(parents=True)
    (folder / ABOUT).write_text('{"global_step": 2, "processes": 1}')
    (folder / "checkpoint" / "states.pt").write_bytes(b"x")
    target.mkdir()
    (target / "of the one before").touch()
    link_checkpoint(folder, target)
    assert checkpoint_step(target) == 2 and contents(target) == ["about.json", "checkpoint"]
    assert (target / "checkpoint" / "states.pt").samefile(folder / "checkpoint" / "states.pt")
    assert contents(target.parent) == ["last.ckpt", "step-000000002.ckpt"]


def test_a_run_names_its_broken_checkpoint_and_goes_on_from_the_one_kept(tiny, tmp_path, capsys):
    run, where = tmp_path / "run", f"run.dir={tmp_path / 'run'}"
    train_autoencoder(load_config(tiny, [where, "run.num_steps=2", "run.keep_every=2"]))
    (run / LAST).unlink()  # the file has another name too
    write(run / LAST, "cut")
    more = load_config(tiny, [where, "run.num_steps=3"])
    with pytest.raises(ValueError, match="last.ckpt' cannot be used: it is cut or damaged. Move it away, and .* kept at step 2"):
        train_autoencoder(more)
    (run / LAST).unlink()
    train_autoencoder(more)
    assert "it goes on from the checkpoint kept at step 2" in capsys.readouterr().out
    assert checkpoint_step(run / LAST) == 3 and checkpoint_step(run / step_checkpoint(2)) == 2
