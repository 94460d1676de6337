"""Processes that work for this one: they start, answer Ctrl-C and end by one rule."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any


def end_with_parent() -> None:
    """From now on this worker process ends when the process that started it has ended, be it by SIGKILL; at once where it has already.

    Otherwise it would go on, and write into files that the next run of the same command writes too.
    """
    # A thread, not Linux's PR_SET_PDEATHSIG: that is sent when the thread ends that started the worker, and macOS has none
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a worker process"
    threading.Thread(target=_end_after, args=(parent,), name="end-with-parent", daemon=True).start()


def _end_after(parent: multiprocessing.process.BaseProcess) -> None:
    parent.join()  # waits on a pipe that the system closes, so that no other process is taken for the parent
    os._exit(1)


def start_worker(number: int = 0) -> None:
    """What a worker process does first: it leaves Ctrl-C, which reaches the whole process group, to its parent, and ends with that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def run_jobs(jobs: dict, work: Callable, workers: int) -> Generator[tuple[str, Any], None, None]:
    """`(name, what `work(job)` gives)` of each job as it finishes: in this process, or in spawned ones, which take one job after another.

    Raises: BrokenProcessPool where a worker was killed; what `work` raises.
    """
    if min(workers, len(jobs)) <= 1:
        yield from ((name, work(job)) for name, job in jobs.items())
        return
    # spawn, not fork: this process may run threads (the progress bar, torch), which a fork would leave half-locked
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, start_worker)
    try:
        futures = {pool.submit(work, job): name for name, job in jobs.items()}
        for future in as_completed(futures):
            if future.exception():
                break
            yield futures.pop(future), future.result()
    finally:
        pool.shutdown(cancel_futures=True)
    # After a failure: first what the other workers have finished, so that it is recorded and not made again
    ended = [future for future in futures if not future.cancelled()]
    yield from ((futures[future], future.result()) for future in ended if not future.exception())
    for future in ended:
        future.result()
