"""One writer at a time."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from eqldm.lock import LOCK, Held, held, hold
from eqldm.processes import launch

ROOT = Path(__file__).parents[1]
HOLDER = """
import sys
from pathlib import Path
from eqldm.lock import held
with held(Path(sys.argv[1]), "it is", group=sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(path: Path, group: str = ""):
    """Another process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path, group], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.stdin.close()


def test_the_second_one_learns_who_holds_it(tmp_path):
    with holder(tmp_path / LOCK) as other:
        with pytest.raises(Held) as raised, held(tmp_path / LOCK, "'out' is being made", "use another folder"):
            pass
        words = (
            rf"'out' is being made by process {other.pid} on \S+ since [\d-]+ [\d:]+: wait for its end or stop it, or use another folder"
        )
        assert re.fullmatch(words, str(raised.value))
    with held(tmp_path / LOCK, "it is"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_holder_holds_nothing(tmp_path):
    with holder(tmp_path / LOCK) as other:
        other.kill()
        other.wait()
        hold(tmp_path, "it is", "")
        assert f"process {os.getpid()} on" in (tmp_path / LOCK).read_text()


def test_a_stopped_holder_holds_it_still(tmp_path):
    with holder(tmp_path / LOCK) as other:
        other.send_signal(signal.SIGSTOP)
        with pytest.raises(Held), held(tmp_path / LOCK, "it is"):
            pass
        other.send_signal(signal.SIGCONT)


def test_a_process_may_hold_it_within_itself(tmp_path):
    with held(tmp_path / LOCK, "it is"), held(tmp_path / LOCK, "it is"):
        pass
    assert not list(tmp_path.iterdir())


def test_one_that_waits_comes_after_its_holder(tmp_path):
    with holder(tmp_path / LOCK) as other:
        waiting = (
            "import sys; from pathlib import Path; from eqldm.lock import held\nwith held(Path(sys.argv[1]), '', wait=True): print('in')"
        )
        with subprocess.Popen([sys.executable, "-c", waiting, tmp_path / LOCK], cwd=ROOT, stdout=subprocess.PIPE, text=True) as second:
            time.sleep(0.5)
            assert second.poll() is None
            other.stdin.close()
            assert second.stdout.read() == "in\n"
    assert not list(tmp_path.iterdir())


def test_those_of_a_launch_share_it_and_no_others(tmp_path):
    with holder(tmp_path / LOCK, "launch 1"), holder(tmp_path / LOCK, "launch 1") as second, held(tmp_path / LOCK, "", group="launch 1"):
        for group in ("launch 2", ""):
            with subprocess.Popen(
                [sys.executable, "-c", HOLDER, tmp_path / LOCK, group], cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as other:
                assert "it is by process" in other.communicate("")[1]
        second.kill()
    with held(tmp_path / LOCK, "it is", group="launch 2"):
        pass


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ""),
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"}, ""),  # a batch script
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "srun 7.0"),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, "torchrun  n1 29500 4"),
    ],
)
def test_a_launch_is_known_by_what_its_processes_have_in_common(monkeypatch, environment, expected):
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
    for name in (*names, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch() == expected


def test_a_full_disk_is_said_and_the_lock_let_go(small_disk):
    """It was "cannot be locked", others of the launch were refused, and its release raised what ended the command without a word."""
    disk = small_disk(16)
    with pytest.raises(OSError), open(disk / "fill", "wb") as file:
        file.write(bytes(1 << 20))
    with pytest.raises(OSError, match=r"No space left on device: .*\.lock"), held(disk / LOCK, "it is", group="launch 1"):
        pass
    assert not (disk / LOCK).exists()
    (disk / "fill").unlink()
    with holder(disk / LOCK, "launch 1"), held(disk / LOCK, "it is", group="launch 1"):
        pass


def test_a_folder_that_cannot_be_written_to(tmp_path):
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs leave to mount, as root has")
    lock = str(tmp_path / "disk" / ".a.lock")
    code = f"from pathlib import Path; from eqldm.lock import held\nwith held(Path({lock!r}), 'a', 'give another --out'): pass"
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o ro tmpfs {shlex.quote(str(tmp_path / 'disk'))}"
    script = f"{mount} && exec {shlex.quote(sys.executable)} -c {shlex.quote(code)}"
    found = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True)
    assert found.stderr.splitlines()[-1].endswith("disk' cannot be written to (Read-only file system): give another --out")
