"""Checkpoints of a run: where they lie, how one is read, and what is said of one that cannot be read or written.

A checkpoint is a file of tensors and plain values; under ZeRO a folder of shards with `about.json`.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from contextlib import AbstractContextManager
from pathlib import Path

from torch import nn

from eqldm.atomic import beside, replace_folder, to_disk, told
from eqldm.training.records import LEARNT, WANTED, broken_record, misshapen, not_finite
from eqldm.weights import DAMAGED, read_pickle

LAST = Path("checkpoints") / "last.ckpt"
ABOUT = "about.json"  # of a checkpoint folder: its step and its processes
NO_LINKS = (errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
UNREADABLE = (*DAMAGED, pickle.UnpicklingError)  # what DeepSpeed raises of such shards


def step_checkpoint(step: int) -> Path:
    """Where, in a run folder, the checkpoint of a step is kept."""
    return LAST.with_name(f"step-{step:09d}.ckpt")


def kept_checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints that a run folder keeps besides the newest, by their step, in order."""
    found = {re.fullmatch(r"step-(\d+)\.ckpt", path.name): path for path in (run / LAST).parent.glob("step-*.ckpt")}
    return dict(sorted((int(match[1]), path) for match, path in found.items() if match))


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint from which a run goes on: `LAST`, where that is gone the newest of those kept, else None."""
    if (run / LAST).exists():
        return run / LAST
    return next(reversed(kept_checkpoints(run).values()), None)


def link_checkpoint(source: Path, target: Path) -> None:
    """Puts a checkpoint, a file or ZeRO's folder, in the target's place as well: by hard links, or copied where the file system has none.

    Raises OSError where it could not be written; what stood at the target is then still there.
    """
    with written(target), beside(target) as partial:
        if source.is_dir():
            for file in (file for file in source.rglob("*") if file.is_file()):
                there = partial / file.relative_to(source)
                there.parent.mkdir(parents=True, exist_ok=True)
                _link(file, there)
            replace_folder(target, partial)
        else:
            _link(source, partial)
            os.replace(partial, target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        warnings.warn(
            f"the file system of '{source.parent}' has no hard links ({error.strerror}): kept checkpoints are copied", stacklevel=2
        )
        shutil.copyfile(source, target)
        to_disk(target)


def find_checkpoint(run: Path, step: int | None = None) -> tuple[int, Path]:
    """The step and the path of a checkpoint of a run folder, the newest where no step is given.

    Raises FileNotFoundError that says which steps there are; ValueError, OSError as `checkpoint_step`.
    """
    kept, newest = kept_checkpoints(run), newest_checkpoint(run)
    if newest is None:
        raise FileNotFoundError(f"run folder '{run}' holds no checkpoint ('{LAST}'): it has not come to its first, or is no run folder")
    if step in kept:
        return step, kept[step]
    last = checkpoint_step(newest)
    if step is None or step == last:
        return last, newest
    steps = ", ".join(map(str, sorted({*kept, last})))
    raise FileNotFoundError(f"run folder '{run}' holds no checkpoint of step {step}, it has those of {steps} (run.keep_every keeps more)")


def checkpoint_step(checkpoint: Path) -> int:
    """Optimizer steps taken at a checkpoint, a file or ZeRO's folder. Raises as `read_whole` and `read_about`."""
    return (read_about(checkpoint) if checkpoint.is_dir() else read_whole(checkpoint))["global_step"]


def read_checkpoint(path: Path, mmap: bool = False, check: bool | None = None) -> dict:
    """A checkpoint file, its tensors on the CPU, or left in the file until they are used (mmap).

    check: whether the tensors' bytes are checked too, and not the plain values' alone, which reads the whole file; None: unless mmap.
    Raises ValueError, with what to do, where it is damaged, no checkpoint, or would have to run code; OSError where it cannot be read.
    """
    if path.is_dir():
        raise ValueError(f"checkpoint '{path}' is a folder, wanted a file (ZeRO's are folders: run.strategy). {_way_out(path)}")
    try:
        records = zipfile.is_zipfile(path)
        broken = broken_record(path, tensors=not mmap if check is None else check) if records else None
        checkpoint = {} if broken else read_pickle(path, mmap=mmap and records)
    except (ValueError, OSError) as error:
        if not damaged(error):
            raise OSError(f"checkpoint '{path}' cannot be read: {error}. {_way_out(path)}") from error
        raise ValueError(f"checkpoint '{path}' cannot be used: {_fault(path, error.__cause__ or error)}. {_way_out(path)}") from error
    if broken:
        raise ValueError(f"checkpoint '{path}' cannot be used: it is cut or damaged, {broken}. {_way_out(path)}")
    if not records:
        print(f"note: '{path}' is in torch's old format, which holds no check sums: a damaged byte would go unnoticed", file=sys.stderr)
    return checkpoint


def read_whole(path: Path, check: bool = False) -> dict:
    """As `read_checkpoint` with mmap, of a run of ours. Raises ValueError for other files of tensors too."""
    checkpoint = read_checkpoint(path, mmap=True, check=check)
    if not isinstance(checkpoint, dict) or not WANTED.keys() <= checkpoint.keys():
        names = [str(name) for name in checkpoint][:5] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(f"checkpoint '{path}' is not one of a run: it holds {names}. {_way_out(path)}")
    if fault := misshapen(checkpoint):
        raise ValueError(f"checkpoint '{path}' is not one of a run: {fault}. {_way_out(path)}")
    return checkpoint


def check_numbers(path: Path, learnt: dict) -> None:
    """Raises ValueError that names the first of a checkpoint's tensors with NaN or infinite numbers. learnt: those to look at, by name."""
    if broken := not_finite(learnt):
        raise ValueError(f"checkpoint '{path}' cannot be used: {broken} holds numbers that are NaN or infinite. {_way_out(path)}")


def learnt(checkpoint: dict) -> dict:
    """Of a checkpoint what the steps have changed: weights, their average, the optimizers' state."""
    return {name: checkpoint[name] for name in LEARNT if name in checkpoint}


def read_about(path: Path) -> dict:
    """The step and the processes of ZeRO's checkpoint folder. Raises ValueError, with what to do, where it is none or not whole."""
    try:
        about = json.loads((path / ABOUT).read_text())
        whole = {"global_step", "processes"} <= about.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"checkpoint '{path}' is a folder without a whole {ABOUT}, none of ZeRO's ({error}). {_way_out(path)}") from error
    empty = [file.name for file in path.rglob("*.pt") if not file.stat().st_size]
    if not whole or empty:
        raise ValueError(f"checkpoint '{path}' is not whole: {empty[0] if empty else ABOUT} lacks its contents. {_way_out(path)}")
    return about


def damaged(error: Exception) -> bool:
    """Whether what torch.load raised is of the file's contents, and not of opening it."""
    return not isinstance(error, OSError) or error.errno == errno.EINVAL  # that is a seek to where a cut file would have had its table


def check_shards(path: Path, files: list[Path]) -> None:
    """Raises ValueError, naming the file, where a byte of these shards of a checkpoint folder is not as it was written."""
    for file in files:
        if broken := broken_record(file, tensors=True):
            raise ValueError(f"checkpoint '{path}' cannot be used: {file.relative_to(path)} is cut or damaged, {broken}. {_way_out(path)}")


def unreadable_shards(path: Path, error: Exception) -> ValueError:
    """What to raise where DeepSpeed cannot read the shards of a checkpoint folder."""
    return ValueError(f"checkpoint '{path}' cannot be used: {_line(error)}. {_way_out(path)}")


def check_fits(checkpoint: Path, module: nn.Module) -> None:
    """Raises ValueError where a checkpoint file holds other weights, or others' shapes, than the module."""
    found, wanted = read_whole(checkpoint)["state_dict"], module.state_dict()
    shapes = [{name: tuple(value.shape) for name, value in state.items()} for state in (found, wanted)]
    other = sorted(name for name in shapes[0].keys() | shapes[1].keys() if shapes[0].get(name) != shapes[1].get(name))
    if other:
        got, want = (each.get(other[0], "none") for each in shapes)
        raise ValueError(
            f"checkpoint '{checkpoint}' is of other networks: {len(other)} weights differ, such as {other[0]} (got {got}, wanted {want}). "
            f"{_way_out(checkpoint)}"
        )


def written(path: Path) -> AbstractContextManager[None]:
    """While a checkpoint is being written: says so where it could not be."""
    return told(f"checkpoint '{path}'", ". The one before it is kept")


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _fault(path: Path, error: BaseException) -> str:
    with open(path, "rb") as file:
        head = file.read(4)
    if not head:
        return "it is empty (0 bytes)"
    if isinstance(error, pickle.UnpicklingError) and (head[:1] == b"\x80" or "GLOBAL" in str(error)):
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"more than tensors and plain values{f' ({found[1]})' if found else ''}"
        return f"it holds {what}; opening it could run code, which is refused (weights_only)"
    return "it is cut or damaged" if head.startswith(b"PK") else "it is no file of torch's"


def _way_out(path: Path) -> str:
    run = path.parent.parent
    kept = {step: other for step, other in kept_checkpoints(run).items() if other != path}
    same = [other.name for other in kept.values() if _same_file(path, other)]  # the newest is often one of the kept, under two names
    others = [step for step, other in kept.items() if other.name not in same]
    goes_on = path == run / LAST or not (run / LAST).exists() and not any(other > path for other in kept.values())
    if not goes_on:
        return "Give another" + (f" (there are those of steps {', '.join(map(str, others))})" if others else "")
    away = " and ".join(["it", *same]) + (" (the same file)" if same else "")
    if others:
        return f"Move {away} away, and the same command goes on from the one kept at step {others[-1]}"
    return f"Move {away} away to start anew in this folder (run.keep_every keeps earlier ones for such a case)"


def _same_file(path: Path, other: Path) -> bool:
    files = [each / ABOUT if each.is_dir() else each for each in (path, other)]
    return all(file.is_file() for file in files) and files[0].samefile(files[1])
