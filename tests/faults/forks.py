"""Processes to be killed: forked from the test's, so that each starts at once with all that is imported."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

WRITES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate", "shutil.copyfile", "shutil.move"}


def script(name: str) -> ModuleType:
    """A script of the repository's root, imported."""
    specification = importlib.util.spec_from_file_location(f"{name}_script", Path(__file__).parents[2] / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def fork(work: Callable[[], object]) -> int:
    """The number of a process that does the work and ends with 0, or with 1 and what was raised on stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    status = 1
    try:
        work()
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(bool(stopped.code))
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def entry(main: Callable[[], object], *words: object) -> Callable[[], None]:
    """The work of a command: its `main`, called with these words, ends as its process would."""

    def work() -> None:
        sys.argv = ["main", *map(str, words)]
        sys.exit(main())

    return work


def status(process: int) -> int:
    """How a process ended: its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_at(place: int, folder: Path, work: Callable[[], object]) -> bool:
    """Does the work in a process that is killed just before it touches files under a folder for the `place`-th time; whether it was."""
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in WRITES or not any(str(folder) in str(argument) for argument in arguments):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if count == place:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def watched() -> None:
        sys.addaudithook(watch)
        work()

    ended = status(fork(watched))
    assert ended in (0, -signal.SIGKILL)
    return ended != 0
