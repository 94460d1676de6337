"""Whether what a checkpoint holds is what was written: its bytes, its shape, its numbers."""

from __future__ import annotations

import errno
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

WANTED = {"global_step": int, "state_dict": dict, "loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list}
LEARNT = ("state_dict", "current_model_state", "averaging_state", "optimizer_states")  # what a step changes: never NaN, never infinite
CHUNK = 2**20  # bytes read at once
UNREADABLE = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError, ValueError, OSError)  # what zipfile raises


def broken_record(path: Path, tensors: bool) -> str | None:
    """What is not as it was written of a file of torch.save; None where all is.

    torch notes a CRC-32 of each record (a tensor, or the pickle of all else) and does not look at it again.
    tensors: read their records as well, which is the whole file, once.
    """
    name = "its table of contents"
    try:
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                name = f"its record '{record.filename.partition('/')[2]}'"
                if tensors or "/data/" not in record.filename:
                    with archive.open(record) as file:
                        while file.read(CHUNK):
                            pass
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):  # that is a seek to before the file
            raise
        return f"{name} is not what was written ({' '.join(str(error).split())})"
    return None


def misshapen(checkpoint: dict) -> str | None:
    """What in a checkpoint of all of `WANTED`'s names has another shape than a run's; None where nothing has."""
    for name, kind in WANTED.items():
        if not isinstance(checkpoint[name], kind) or isinstance(checkpoint[name], bool):
            return f"its {name} is {_article(checkpoint[name])}, wanted {kind.__name__}"
    if checkpoint["global_step"] < 0:
        return f"its global_step is {checkpoint['global_step']}"
    for state in ("state_dict", "current_model_state"):
        weights = checkpoint.get(state, {})
        if not isinstance(weights, dict):
            return f"its {state} is {_article(weights)}, wanted dict"
        for name, value in weights.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                return f"its {state} holds {_article(value)} by the name of {name!r}, wanted tensors alone"
    try:
        for _ in _tensors(checkpoint):
            pass
    except RecursionError:
        return "it contains itself, or is nested without an end"
    return None


def not_finite(tree: Any, name: str = "") -> str | None:
    """The name of the first tensor in dicts and lists of tensors that holds NaN or infinite numbers; None where none does."""
    for found, tensor in _tensors(tree, name):
        # The sum alone, at first: it needs no memory
        if tensor.is_floating_point() and not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            return found
    return None


def _tensors(tree: Any, name: str = "", within: tuple[int, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Raises RecursionError where something contains itself."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, dict | list | tuple):
        if id(tree) in within:
            raise RecursionError(name)
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors(value, f"{name}.{key}" if name else str(key), (*within, id(tree)))


def _article(value: Any) -> str:
    return f"a {type(value).__name__}"
