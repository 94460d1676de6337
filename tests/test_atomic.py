"""Files and folders that appear whole, and what is said where they cannot be written."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from eqldm.atomic import NotWritten, _machine, beside, lock_of, told, whole, whole_folder, write_whole
from eqldm.lock import held

ROOT = Path(__file__).parents[1]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def chained(number: int) -> RuntimeError:
    """torch's own, around that of the file."""
    error = RuntimeError("unexpected pos 704 vs 598")
    error.__context__ = OSError(number, os.strerror(number))
    return error


@pytest.mark.parametrize(
    ("error", "words", "full"),
    [
        (OSError(28, "No space left on device"), "No space left on device", True),
        (OSError(122, "Disk quota exceeded"), "Disk quota exceeded", True),
        (OSError(13, "Permission denied", "a"), "Permission denied", False),
        (chained(28), "No space left on device", True),
        (chained(5), "Input/output error", False),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left on device", True),
        (SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"), "Permission denied", False),
        (RuntimeError("cannot pickle a lock\nC++ stack"), "cannot pickle a lock", False),
        (RuntimeError(""), "RuntimeError", False),
    ],
)
def test_only_a_full_disk_asks_for_room(error, words, full):
    with pytest.raises(NotWritten) as raised, told("checkpoint 'a'", ". The one before it is kept"):
        raise error
    way_out = "make room, and the same" if full else "when that is mended, the same"
    assert str(raised.value) == f"checkpoint 'a' could not be written ({words}). The one before it is kept: {way_out} command goes on"
    assert raised.value.full is full and (raised.value.errno in (28, 122)) is full


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_write_is_no_failed_one(tmp_path, end):
    """torch ends its file all the same, finds it too short, and raises that."""

    class Interrupted(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            raise end

    with pytest.raises(type(end)) as raised, told("checkpoint 'a'"):
        torch.save({"x": torch.zeros(1000)}, Interrupted())
    assert raised.value is end
    with pytest.raises(NotWritten, match="No space left"):
        try:
            raise end
        except type(end):
            with told("checkpoint 'a'"):  # that is saved because of it
                raise OSError(28, "No space left on device") from None


def test_a_failed_write_leaves_what_stood_there(tmp_path):
    write_whole(tmp_path / "a", lambda path: path.write_text("before"))
    with whole_folder(tmp_path / "b") as partial:
        partial.mkdir()
        (partial / "c").write_text("before")

    def half(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(NotWritten, match="a' could not be written"):
        write_whole(tmp_path / "a", half)
    with pytest.raises(ValueError), whole_folder(tmp_path / "b") as partial:
        partial.mkdir()
        (partial / "c").write_text("half")
        raise ValueError
    assert (tmp_path / "a").read_text() == (tmp_path / "b" / "c").read_text() == "before" and names(tmp_path) == ["a", "b"]


def put(folder: Path, text: str = "after") -> None:
    with whole_folder(folder) as partial:
        partial.mkdir()
        (partial / "c").write_text(text)


def test_a_folder_of_a_user_beside_is_no_folder_put_aside(tmp_path):
    put(tmp_path / "model", "before")
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "mine").write_text("of weeks")
    put(tmp_path / "model")
    assert (tmp_path / ".model.old" / "mine").read_text() == "of weeks" and names(tmp_path) == [".model.old", "model"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_what_stood_there_comes_back_where_the_second_rename_fails(tmp_path, monkeypatch, error):
    put(tmp_path / "model", "before")
    rename, renames = os.replace, []

    def fails(source, target):
        renames.append(target)
        if len(renames) == 2:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(type(error)):
        put(tmp_path / "model")
    assert (tmp_path / "model" / "c").read_text() == "before" and names(tmp_path) == ["model"] and len(renames) == 3


def test_a_path_may_be_relative(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    put(Path("c"))
    put(Path("../d"))
    with beside(Path(".")) as partial:
        assert partial.parent == tmp_path / "a"
    assert names(tmp_path / "a") == ["b", "d"]


@pytest.mark.parametrize("name", ["long" * 60, "図" * 80])  # of at most 255 bytes
def test_names_beside_are_each_writers_own_and_never_too_long(tmp_path, name):
    path = tmp_path / name
    with beside(path) as first, beside(path) as second, whole(path, durable=True) as third:
        assert len({first, second, third}) == 3
        for partial in (first, second, third):
            partial.write_text("x")
    assert names(tmp_path) == [path.name]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """Only what is ours, and whose process is gone; of other machines that cannot be told, nor of containers of this one's name."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [f".model-{_machine()}-{dead.pid}-3.partial", f".b.json-{_machine()}-{dead.pid}-0.partial"]
    kept = [f".a-{_machine()}-{os.getppid()}-0.partial", f".a-another-{dead.pid}-0.partial", "mine.partial", f"{dead.pid}.partial"]
    kept += [f".a-{_machine()}0-{dead.pid}-0.partial"]
    (tmp_path / gone[0]).mkdir()
    for name in (gone[0] + "/weights", gone[1], *kept):
        (tmp_path / name).write_text("half")
    write_whole(tmp_path / "a", lambda path: path.write_text("whole"))
    assert names(tmp_path) == sorted(["a", *kept])


def test_files_are_renamed_here_alone():
    """A new writer that renames by itself has neither names of its own nor a word on full disks."""
    renames = re.compile(r"os\.(replace|rename|renames)\(|\.rename\(|\.partial\b|shutil\.move")
    allowed = {"eqldm/atomic.py", "eqldm/data/cache.py"}
    allowed |= {f"eqldm/training/{name}.py" for name in ("checkpoints", "zero", "metrics_log")}  # the last sets a file aside
    allowed |= {"eqldm/export.py", "eqldm/run_model.py"}  # within a name beside
    sources = [*(ROOT / "eqldm").rglob("*.py"), *(ROOT / "data").glob("*.py")]
    found = {path.relative_to(ROOT).as_posix() for path in sources if renames.search(path.read_text())}
    assert found <= allowed


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_who_may_read_a_file_is_what_the_umask_says(tmp_path, mask):
    """safetensors 0.8 makes files that only their owner may read: colleagues could not open a model in a folder that they share."""
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "a", lambda partial: save_file({"x": torch.zeros(2)}, partial))
        with whole_folder(tmp_path / "model") as partial:
            (partial / "unet").mkdir(parents=True)
            save_file({"x": torch.zeros(2)}, partial / "unet" / "b")
        assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "model" / "unet" / "b")} == {0o666 & ~mask}
        assert os.umask(mask) == mask
        (tmp_path / "open").touch(0o777)
        write_whole(tmp_path / "a", lambda partial: (tmp_path / "open").rename(partial))  # as of a file system that has no modes
        assert (tmp_path / "a").stat().st_mode & 0o777 == 0o777 & ~mask
    finally:
        os.umask(before)


def test_a_link_to_a_folder_stays_one(tmp_path):
    """It was replaced by a folder, and the next write found "Not a directory" for good."""
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "model")
    for text in ("1", "2", "3"):
        with held(lock_of(tmp_path / "link"), "it is being written"), whole_folder(tmp_path / "link") as partial:
            partial.mkdir()
            (partial / "a").write_text(text)
            assert lock_of(tmp_path / "link") == lock_of(tmp_path / "disk" / "model")
        assert (tmp_path / "disk" / "model" / "a").read_text() == text and (tmp_path / "link").is_symlink()
    assert names(tmp_path) == ["disk", "link"] and names(tmp_path / "disk") == ["model"]


@pytest.mark.parametrize("left", ["folder", "link"])
def test_what_was_set_aside_and_cannot_be_removed_stops_no_write(tmp_path, monkeypatch, left):
    """NFS keeps what others have open: the second write after it found "Directory not empty"."""
    old = tmp_path / ".model.eqldm.old"
    if left == "folder":
        old.mkdir()
        (old / ".nfs0001").write_text("open elsewhere")
    else:
        old.symlink_to("nowhere")
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **options: None)
    for text in ("1", "2", "3"):
        with whole_folder(tmp_path / "model") as partial:
            partial.mkdir()
            (partial / "a").write_text(text)
        assert (tmp_path / "model" / "a").read_text() == text and not os.path.lexists(old)


def test_a_file_system_without_modes_takes_files(tmp_path, monkeypatch):
    """As FAT: each checkpoint would be refused there for a chmod."""

    def refuse(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refuse)
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "a", lambda partial: save_file({"x": torch.zeros(2)}, partial))
    finally:
        os.umask(before)
    assert names(tmp_path) == ["a"]


def test_what_may_not_be_removed_stops_no_write(tmp_path, monkeypatch):
    """What another user's killed process has left in a folder that all share."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".b-{_machine()}-{dead.pid}-0.partial").write_text("half")

    unlink = os.unlink

    def refuse(path, **options):
        if ".b-" in str(path):
            raise PermissionError(1, "Operation not permitted")
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", refuse)
    write_whole(tmp_path / "a", lambda path: path.write_text("whole"))
    assert (tmp_path / "a").read_text() == "whole"


def test_what_cannot_take_a_folders_place_leaves_it_there(tmp_path):
    """Without a process that is killed, and so without a next one that would put it back."""
    (tmp_path / "model").mkdir()
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == ["model"]
