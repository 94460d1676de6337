"""The work behind an answer, kept in files: the values of each picture, batch by batch.

A stopped evaluation goes on where it was. Several processes share the work without talking to each other: each takes every n-th batch,
and the one that finds all of them there goes on to the answer. Batches are the same however many they are, and so are the values.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, overload

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from eqldm.atomic import DISK_FULL, write_whole
from eqldm.model_folder import Networks, Pixels, config_hash, text_hash, vae_hash, weights_hash


def identity(vae: AutoencoderKL | Pixels, networks: Networks | None = None) -> dict[str, str]:
    """For keys: what a model computes with, weights and settings."""
    known = {"vae": f"{vae_hash(vae)}-{config_hash(vae.config)}"}
    if networks is not None:
        known["unet"] = f"{weights_hash(networks.unet)}-{config_hash(networks.unet.config)}"
        known["text"] = text_hash(networks.tokenizer, networks.text_encoder)
        known["scheduler"] = f"{type(networks.scheduler).__name__}-{config_hash(networks.scheduler.config)}"
    return known


@lru_cache(maxsize=2)
def _code(of_evaluation: Sequence[str] | None = None) -> str:
    """16 hex digits that change with any line of this package: what another version of it measured is not taken for this one's.

    of_evaluation: the files that count of what is above sampling (the evaluation, and its command); None: all.
    """
    root = Path(__file__).parents[1]
    sources = sorted(root.rglob("*.py"))
    if of_evaluation is not None:
        above = [*root.glob("evaluation/**/*.py"), root / "evaluate.py"]
        sources = [path for path in sources if path not in above or path.relative_to(root).as_posix() in of_evaluation]
    return hashlib.sha256(b"".join(str(path.relative_to(root)).encode() + path.read_bytes() for path in sources)).hexdigest()[:16]


class Question(Protocol):
    """What is asked of `count` pictures. name: of its file.  key: all that its values depend on, as JSON holds it."""

    name: str
    key: dict
    count: int

    def measure(self, numbers: range) -> dict[str, Tensor]:
        """The values of these pictures, as tensors on the CPU with one row for each picture; some have fewer rows, where only some pictures
        have that value. Those named `sum/...` are of the batch as a whole, and are added up over batches."""


class KeptQuestion(Question, Protocol):
    """A question whose batches a `Store` keeps for other questions. code: the files of the evaluation that its values depend on."""

    @property
    def code(self) -> tuple[str, ...]: ...


def measure_all(question: Question, batch_size: int = 64) -> dict[str, Tensor]:
    """The values of all of a question's pictures, in order; nothing is kept."""
    firsts = range(0, question.count, batch_size)
    return _together(question.measure(range(first, min(first + batch_size, question.count))) for first in firsts)


@overload
def _together(batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]: ...


@overload
def _together(batches: Iterable[dict[str, Tensor] | None]) -> dict[str, Tensor] | None: ...


def _together(batches: Iterable[dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """All batches' values; None where one is not there."""
    rows: dict[str, list[Tensor]] = {}
    for batch in batches:
        if batch is None:
            return None
        for name, value in batch.items():
            rows.setdefault(name, []).append(value)
            if name.startswith("sum/"):
                rows[name] = [sum(rows[name][:-1]) + value]
    return {name: torch.cat(values) if not name.startswith("sum/") else values[0] for name, values in rows.items()}


def work(
    question: Question, folder: Path, batch_size: int, place: tuple[int, int] = (0, 1), on_batch: Callable[[], None] = lambda: None,
    others: Sequence[Path] = (),
) -> dict[str, Tensor] | None:  # fmt: skip
    """The values of all of a question's pictures, in order, or None while other processes are still at work.

    Takes what `folder` holds of the same question, or one of `others` (another model may have the same VAE), and measures the rest of this
    process's share; place: (rank, world size). Warns of damaged files, and of values of something else, which it measures anew.
    Raises OSError, saying that finished batches are kept, where the disk is full; and as `measure`.
    """
    key = json.dumps({**question.key, "count": question.count, "batch_size": batch_size, "code": _code()}, sort_keys=True)
    whole = folder / f"{question.name}.safetensors"
    firsts = range(0, question.count, batch_size)
    rank, world = place
    for path in (whole, *(other / whole.name for other in others)):
        if (values := _read(path, key)) is not None:
            if path != whole:
                _write(whole, values, key)
            return values
    if other := _other(whole, key):
        warnings.warn(f"'{whole}' was measured with other {other}: measured anew, and replaced", stacklevel=2)
    parts = folder / f".{question.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    for first in firsts[rank::world]:
        path = parts / f"{first:08d}.safetensors"
        if _read(path, key) is None:
            if (values := _read(whole, key)) is not None:  # another process has just put all together, and the parts away
                return values
            _write(path, question.measure(range(first, min(first + batch_size, question.count))), key)
        on_batch()
    values = _together(_read(parts / f"{first:08d}.safetensors", key) for first in firsts)
    if values is None:  # others are still at work, or one of them has just put all together
        return _read(whole, key)
    _write(whole, values, key)
    for stale in folder.iterdir():  # parts of this, and of what was asked before
        if re.fullmatch(rf"\.{re.escape(question.name)}-[0-9a-f]{{12}}", stale.name):
            shutil.rmtree(stale, ignore_errors=True)
    return values


@dataclass
class Store:
    """A folder that keeps the batches of questions, each in a file; another process, or another question, finds them there.

    others: further folders where they may be found.
    """

    folder: Path
    batch_size: int
    others: Sequence[Path] = ()

    def batch(self, question: KeptQuestion, numbers: range) -> dict[str, Tensor]:
        """The values of these pictures, which are one batch: those that are kept, or else measured and kept. Warns and raises as `work`."""
        key = self._key(question)
        name = f"{self._place(question, key)}/{numbers.start:08d}.safetensors"
        for folder in (self.folder, *self.others):
            if (values := _read(folder / name, key)) is not None:
                break
        else:
            values, folder = question.measure(numbers), Path()
        if folder != self.folder:
            _write(self.folder / name, values, key)
        return values

    def forget_others(self, question: KeptQuestion) -> None:
        """Removes what is kept of the same name under another key: as `work` replaces what was measured of something else."""
        own = self._place(question, self._key(question))
        for stale in self.folder.glob(f"{question.name}-*"):
            if stale.name != own and re.fullmatch(rf"{re.escape(question.name)}-[0-9a-f]{{12}}", stale.name):
                shutil.rmtree(stale, ignore_errors=True)

    def _key(self, question: KeptQuestion) -> str:
        known = {"count": question.count, "batch_size": self.batch_size, "code": _code(question.code)}
        return json.dumps({**question.key, **known}, sort_keys=True)

    def _place(self, question: KeptQuestion, key: str) -> str:
        return f"{question.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def read_kept(path: Path) -> tuple[str, dict[str, Tensor]]:
    """(key, values) of a file that an evaluation keeps. Raises SafetensorError where it is damaged, in its values too: safetensors check
    their header alone, and a flipped bit is another figure; FileNotFoundError."""
    with safe_open(path, "pt") as file:
        about = file.metadata() or {}
        values = {name: file.get_tensor(name) for name in file.keys()}  # it is no dict, nor an iterable
    key = about.get("key", "")
    if about.get("checksum", checksum := _checksum(key, values)) != checksum:  # files of before have none
        raise SafetensorError("its values are others than those that were written")
    return key, values


def _checksum(key: str, values: dict[str, Tensor]) -> str:
    """8 hex digits, the CRC-32 of a key and of values, with their names, types and shapes."""
    total = zlib.crc32(key.encode())
    for name in sorted(values):
        value = values[name].contiguous()
        total = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), total)
        total = zlib.crc32(value.flatten().view(torch.uint8).numpy().data, total)
    return f"{total:08x}"


def _read(path: Path, key: str) -> dict[str, Tensor] | None:
    """The values of a file, or None where it is not there, is of another key, or is damaged, which it warns of."""
    try:
        with safe_open(path, "pt") as file:  # a large file of another key need not be read
            if (file.metadata() or {}).get("key") != key:
                return None
        return read_kept(path)[1]
    except FileNotFoundError:
        return None
    except SafetensorError as error:
        warnings.warn(f"'{path}' is damaged ({' '.join(str(error).split())[:160]}): it is not used", stacklevel=2)
        return None


def _other(path: Path, key: str) -> str:
    """In what the key of a whole file is another than `key`, by name; empty where there is no such file, or none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            held = json.loads((file.metadata() or {}).get("key", "{}"))
    except (FileNotFoundError, SafetensorError, json.JSONDecodeError):  # `_read` has warned of a damaged one
        return ""
    wanted = json.loads(key)
    return ", ".join(name for name in sorted({*held, *wanted}) if held.get(name) != wanted.get(name))


def _write(path: Path, values: dict[str, Tensor], key: str) -> None:
    values = {name: value.cpu().contiguous() for name, value in values.items()}
    content = save(values, {"key": key, "checksum": _checksum(key, values)})
    try:
        write_whole(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OSError(
            f"no space left in '{path.parent}'. Finished batches are kept: free some space and run the same command again"
        ) from error
