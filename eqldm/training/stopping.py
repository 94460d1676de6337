"""How a run ends that is told to stop: by SIGINT (Ctrl-C), SIGTERM, or SIGUSR1 (a scheduler's warning that time is up).

`train.py` listens from its start: where there is nothing to save, the process ends at once and says where it stood. In between the training
loop listens (`SaveLast`) and saves first. This module imports nothing heavy, so that a run can be stopped while it imports the rest.
"""

from __future__ import annotations

import os
import signal
import time
from functools import partial

STOPPED = 75
"""The exit status of a run that was told to stop and has saved what it had: the same command goes on (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""That of one that Ctrl-C has stopped, which has saved as well: a script that starts stopped runs again leaves that to the person."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PATIENCE_SECONDS = 1.0  # torchrun and timeout hand on a Ctrl-C that the terminal has sent already: only a later one is a second one


def status(told: signal.Signals) -> int:
    """The exit status of a run that a signal has stopped."""
    return INTERRUPTED if told == signal.SIGINT else STOPPED


def listen(where: str) -> None:
    """From now on the signals end this process at once, with these words on where it stands. To be called in the main thread."""
    for number in SIGNALS:
        signal.signal(number, partial(_end, where))


def ignore() -> None:
    """From now on the signals do nothing: all is done, and Python, as it ends, would let them end the process with another status."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def listening() -> bool:
    """Whether `listen` was called."""
    return getattr(signal.getsignal(signal.SIGINT), "func", None) is _end


def let_a_second_end_it() -> None:
    """A further Ctrl-C ends the process there and then."""
    signal.signal(signal.SIGINT, partial(_again, time.monotonic()))


def say(words: str) -> None:
    """Writes a line to stderr from a signal handler, which must not touch buffers that may be in use."""
    os.write(2, f"{words}\n".encode())


def _end(where: str, number: int, frame) -> None:
    let_a_second_end_it()
    say(f"stopped by {signal.Signals(number).name} {where}")
    raise SystemExit(status(signal.Signals(number)))


def _again(first: float, number: int, frame) -> None:
    if time.monotonic() - first > PATIENCE_SECONDS:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
