"""Files and folders that appear whole, and what is said where they cannot be written."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from eqldm.atomic import NotWritten, beside, told, whole, whole_folder, write_whole

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


def test_names_beside_are_each_writers_own_and_never_too_long(tmp_path):
    path = tmp_path / ("long" * 60)
    with beside(path) as first, beside(path) as second, whole(path, durable=True) as third:
        assert len({first, second, third}) == 3
        for partial in (first, second, third):
            partial.write_text("x")
    assert names(tmp_path) == [path.name]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """Only what is ours, and whose process is gone; of other machines that cannot be told."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [f".model-{platform.node()}-{dead.pid}-3.partial", f".b.json-{platform.node()}-{dead.pid}-0.partial"]
    kept = [f".a-{platform.node()}-{os.getppid()}-0.partial", f".a-another-{dead.pid}-0.partial", "mine.partial", f"{dead.pid}.partial"]
    (tmp_path / gone[0]).mkdir()
    for name in (gone[0] + "/weights", gone[1], *kept):
        (tmp_path / name).write_text("half")
    write_whole(tmp_path / "a", lambda path: path.write_text("whole"))
    assert names(tmp_path) == sorted(["a", *kept])


def test_files_are_renamed_here_alone():
    """A new writer that renames by itself has neither names of its own nor a word on full disks."""
    renames = re.compile(r"os\.(replace|rename|renames)\(|\.rename\(|\.partial\b|shutil\.move")
    allowed = {"eqldm/atomic.py", "eqldm/data/cache.py", "eqldm/training/checkpoints.py", "eqldm/training/zero.py"}
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
    finally:
        os.umask(before)
