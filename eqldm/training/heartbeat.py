"""Which of several processes stands still, and where: each writes every few seconds at which step it is, and reads what the others wrote.

Processes that train together wait for each other in every step. Where one stands still (stopped, or its file system hangs) all do, until
`run.timeout_seconds` are over, and the error of those that waited names neither the one nor its step.
"""

from __future__ import annotations

import json
import os
import platform
import re
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning.callbacks import Callback

from eqldm.atomic import NotWritten

FOLDER = "heartbeats"
EVERY_SECONDS = 2.0
STILL_SECONDS = 60.0  # without a beat, after which a process is said to stand still
BROKEN = re.compile(
    r"time[d ]*out|connection (closed|reset|refused)|broken pipe|heartbeat|remote process exited|socket error", re.IGNORECASE
)


class Beat(NamedTuple):
    """What a process last wrote, and when this one saw that it was new; None for what it found when it began to look."""

    text: str
    seen: float | None


class Heartbeat(Callback):
    """Writes RUN/heartbeats/rank-N.json from a thread, with the step and the work at hand; says once who stands still when the others'
    beats stay away, or when half of the time that this process may wait for them is over.

    folder: of the run.  timeout: seconds that a process waits for the others.
    """

    def __init__(self, folder: Path, timeout: float):
        self.folder, self.timeout = folder / FOLDER, timeout
        self.every, self.still = min(EVERY_SECONDS, timeout / 10), min(STILL_SECONDS, timeout / 2)
        self.rank, self.ranks, self.step, self.work = 0, 1, 0, "starting"
        self.moved, self.said = time.monotonic(), False
        self.beats: dict[int, Beat] = {}
        self.ended = threading.Event()

    def on_fit_start(self, trainer, pl_module) -> None:
        self.rank, self.ranks = trainer.global_rank, trainer.world_size
        self.folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._beat, daemon=True).start()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._moves(trainer.global_step, "training")

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        self._moves(trainer.global_step, "validating")

    def on_validation_end(self, trainer, pl_module) -> None:
        self._moves(trainer.global_step, "after a validation")

    def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:
        self._moves(trainer.global_step, "saving a checkpoint")

    def on_fit_end(self, trainer, pl_module) -> None:
        self._moves(trainer.global_step, "done with its steps")

    def teardown(self, trainer, pl_module, stage) -> None:
        self.ended.set()
        with suppress(OSError):  # another process may have a file there yet
            (self.folder / f"rank-{self.rank}.json").unlink(missing_ok=True)
            self.folder.rmdir()

    def _moves(self, step: int, work: str) -> None:
        self.step, self.work, self.moved, self.said = step, work, time.monotonic(), False

    def _beat(self) -> None:
        number, complained = 0, False
        while not self.ended.wait(self.every):
            number += 1
            beat = {"rank": self.rank, "step": self.step, "work": self.work, "host": platform.node(), "pid": os.getpid(), "beat": number}
            try:
                (self.folder / f"rank-{self.rank}.json").write_text(json.dumps(beat) + "\n")
                self.look()
            except OSError as error:
                if not complained:
                    print(f"note: process {self.rank} cannot write or read '{self.folder}' ({error})", file=sys.stderr, flush=True)
                complained = True
            waiting = time.monotonic() - self.moved
            still = self._standing()
            if not self.said and waiting > self.still and (still or waiting > self.timeout / 2) and not self.ended.is_set():
                self.said = True
                print(
                    f"note: process {self.rank} has waited {waiting:.0f} s at step {self.step}. {self.report()}",
                    file=sys.stderr,
                    flush=True,
                )

    def look(self) -> None:
        """Reads what the others have written."""
        for rank in range(self.ranks):
            if rank != self.rank:
                path = self.folder / f"rank-{rank}.json"
                text = path.read_text(errors="replace") if path.is_file() else ""
                known = self.beats.get(rank)
                if known is None or (text != known.text and _told(text)):
                    self.beats[rank] = Beat(text, None if known is None else time.monotonic())

    def _standing(self) -> list[int]:
        now = time.monotonic()
        return [rank for rank, beat in sorted(self.beats.items()) if beat.seen is None or now - beat.seen > self.still]

    def report(self) -> str:
        """A sentence on the processes that stand still, or where none does on those that are behind."""
        if not self.beats:
            return "Not all processes have come to their training"
        if still := self._standing():
            return "; ".join(self._of(rank) for rank in still[:5]) + f"; and {len(still) - 5} more" * (len(still) > 5)
        steps = {rank: _told(self.beats[rank].text).get("step", -1) for rank in self.beats}
        behind = [rank for rank, step in sorted(steps.items()) if step == min(steps.values())][:5]
        return "All others are alive; furthest behind: " + "; ".join(self._of(rank) for rank in behind)

    def _of(self, rank: int) -> str:
        told, seen = _told(self.beats[rank].text), self.beats[rank].seen
        if not told:
            return f"process {rank} has not come to its training"
        ago = "before this process looked" if seen is None else f"{time.monotonic() - seen:.0f} s ago"
        where = f"pid {told.get('pid')} on {told.get('host')}"
        return f"process {rank} ({where}) was last seen {ago}, at step {told.get('step')}, {told.get('work')}"


def _told(text: str) -> dict[str, Any]:
    """What a beat says; nothing where there is none yet, or half of one."""
    try:
        told = json.loads(text)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def lost_others(error: RuntimeError | NotWritten, heartbeat: Heartbeat) -> TimeoutError | None:
    """What to raise where a process has waited in vain for others, or has lost them; None where the error is another."""
    words = error.reason if isinstance(error, NotWritten) else str(error)  # ZeRO's processes wait for each other as they save
    if not BROKEN.search(words):
        return None
    with suppress(OSError):
        heartbeat.look()
    about = " ".join(words.split())[:160]
    return TimeoutError(
        f"process {heartbeat.rank} waited in vain for the others at step {heartbeat.step} ({about}). {heartbeat.report()}. Find out why (a "
        "stopped process, a file system that hangs, a node that is gone), and start the same command again: it goes on from the last "
        "checkpoint. run.timeout_seconds says how long to wait"
    )
