"""Reader processes of samples: torch's, with errors as they were raised, and a line where one was killed."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, Dataset, get_worker_info

from eqldm.data.samples import collate
from eqldm.data.workers import start_worker

LOST = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:is killed by signal: (?P<signal>[\w ]+)|exited unexpectedly)")
NOTICE_SECONDS = 5.0  # for the system to tell of a process's end after its pipes have closed


class _Failure(NamedTuple):
    """An error that travels from a reader to the process that it reads for."""

    error: ValueError | OSError


class _Batches(Dataset):
    """Samples, by the positions of a batch; or what was wrong with one of them."""

    def __init__(self, samples: Any):
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitems__(self, positions: list[int]) -> dict | _Failure:
        try:
            return collate([self.samples[position] for position in positions])
        except (ValueError, OSError) as error:
            if get_worker_info() is None:
                return _Failure(error)
            return _Failure(OSError(str(error)) if isinstance(error, OSError) else ValueError(str(error)))  # which can be pickled


def _as_it_is(batch: Any) -> Any:
    return batch


class Reader(DataLoader):
    """A DataLoader, to be made by `reader`, that raises a reader's ValueError or OSError as one, where torch puts its traceback into the
    message; and OSError where a reader was killed."""

    option = "data.num_workers"  # what says how many there are
    deaf: tuple[signal.Signals, ...] = ()  # signals that readers begin deaf to: they could die of one before their `start`

    def __iter__(self) -> Iterator[dict]:  # type: ignore[override]
        if not self.num_workers or threading.current_thread() is not threading.main_thread():
            return _checked(super().__iter__(), self.option)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self.deaf)  # which they inherit
        try:
            return _checked(super().__iter__(), self.option)  # torch's begins to read before the first batch is wanted
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _checked(batches: Iterator[dict | _Failure], option: str) -> Iterator[dict]:
    with naming_lost_readers(option):
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (EOFError, ConnectionError):  # of a reader that has just gone: its samples' own errors come as _Failure
                time.sleep(NOTICE_SECONDS)  # in which torch says so
                raise RuntimeError("DataLoader worker (pid 0) exited unexpectedly") from None
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch


def reader(
    samples: Any, batches: Iterable[list[int]], num_workers: int, *,
    start: Callable[[int], None] = start_worker, deaf: tuple[signal.Signals, ...] = (), option: str = Reader.option, **options: Any,
) -> Reader:  # fmt: skip
    """Reads batches of samples, given by their positions, in `num_workers` processes, or here where that is 0.

    start: what each process does first.  deaf: signals that it begins deaf to.  option: what the user sets to have fewer of them.
    """
    made = Reader(
        _Batches(samples), batch_sampler=batches, num_workers=num_workers, collate_fn=_as_it_is,
        worker_init_fn=start if num_workers else None, **options,
    )  # fmt: skip
    made.option, made.deaf = option, deaf
    return made


@contextmanager
def naming_lost_readers(option: str) -> Iterator[None]:
    """Raises OSError where torch says, at whatever the process is doing then, that a reader process was killed."""
    try:
        yield
    except RuntimeError as error:
        lost = LOST.search(str(error))
        if lost is None:
            raise
        how = f"was killed ({lost['signal']})" if lost["signal"] else "ended"
        why = "/dev/shm is full: make it larger" if lost["signal"] == "Bus error" else "mostly for want of memory: make room"
        raise OSError(f"a process that reads the data {how}, {why}, or set {option} lower. The same command goes on") from error
