"""The log of a run, `logs/metrics.csv`: read back whatever became of it, for a run goes on without a row, but not without its end."""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import NamedTuple

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.utilities import rank_zero_only

from eqldm.atomic import write_whole

TABLE = Path("logs") / "metrics.csv"
ASIDE = TABLE.with_name("metrics.csv.before")  # while a resumed run begins the table anew
MOST = 100_000  # characters of a line


class Rows(NamedTuple):
    whole: list[dict[str, str]]
    """By column; a value is "" or a number."""
    left_out: int
    """Lines that are cut or damaged."""


class _Table(ExperimentWriter):
    """Lightning's writes the table anew, in its place, where a column is added. Here beside it, so that no row can be lost to that."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))

        def write(partial: Path) -> None:
            with open(partial, "w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames)
                writer.writeheader()
                writer.writerows(rows)

        write_whole(path, write)


def read_metrics(path: Path) -> Rows:
    """The rows of a table, without those that are cut or damaged: of more or fewer columns than named, without a step, with anything that
    is no number. Without names, as of a file whose first line is damaged, no row is left. Raises OSError."""
    lines = path.read_bytes().decode(errors="replace").split("\n")
    cut = lines.pop()  # what stands after the last line's end
    names = _cells(lines[0]) if lines else []
    known = "step" in names and len(set(names)) == len(names) and all(map(_is_name, names))
    cells = [_cells(line) for line in lines[1:]]
    whole = [dict(zip(names, values)) for values in cells if known and len(values) == len(names) and _is_row(names, values)]
    return Rows(whole, max(0, len(lines) - 1) - len(whole) + bool(cut) + (bool(lines) and not known))


def _cells(line: str) -> list[str]:
    # A line by itself: a stray quotation mark would swallow those after it
    return next(csv.reader([line.removesuffix("\r")]), []) if len(line) < MOST and "\r" not in line[:-1] else []


def _is_name(text: str) -> bool:
    return bool(text) and text.isprintable() and "\ufffd" not in text


def _is_row(names: list[str], values: list[str]) -> bool:
    step = values[names.index("step")]
    return step.isascii() and step.isdecimal() and len(step) < 16 and all(value == "" or _is_number(value) for value in values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and text.isprintable() and "_" not in text and text.strip() == text


def resumed_table(folder: Path, start: int) -> CSVLogger:
    """The CSV log of the run in a folder, which goes on with the rows of the steps before `start`. What was damaged is said, and kept.

    Whatever happens meanwhile, the rows stand in one of the two files.
    """
    before, table = folder / ASIDE, folder / TABLE
    rows = Rows([], 0)
    if rank_zero_only.rank == 0:
        if table.exists() and not before.exists():
            os.replace(table, before)
        elif table.is_dir():
            os.replace(table, _free(table))
        rows = _read(before)
    logger = CSVLogger(folder / "logs", name="", version="")
    if rank_zero_only.rank == 0:
        logger._experiment = _Table(log_dir=logger.log_dir)
    if going_on := [row for row in rows.whole if int(row["step"]) < start]:
        logger.experiment.metrics = list(going_on)
        logger.save()
    if rows.left_out:
        kept = _free(table)
        os.replace(before, kept)
        print(
            f"note: '{table}' was damaged: {rows.left_out} of its lines are left out, and {len(going_on)} rows from before step {start} go "
            f"on. It is kept as '{kept.name}'",
            file=sys.stderr,
            flush=True,
        )
    elif rank_zero_only.rank == 0:
        before.unlink(missing_ok=True)
    return logger


def _read(path: Path) -> Rows:
    try:
        return read_metrics(path)
    except FileNotFoundError:
        return Rows([], 0)
    except OSError as error:  # a folder, or nothing that may be read
        print(f"note: '{path}' cannot be read ({error.strerror})", file=sys.stderr)
        return Rows([], 1)


def _free(table: Path) -> Path:
    """A name beside the table's for a damaged one, that nothing has yet."""
    number = 1
    while (path := table.with_name(f"metrics.csv.damaged-{number}")).exists():
        number += 1
    return path


def last_validation(folder: Path, step: int) -> dict[str, float]:
    """The metrics that a run's log holds of the last validation at a step or before."""
    path = next((folder / name for name in (ASIDE, TABLE) if (folder / name).is_file()), None)
    if path is None:
        return {}
    rows = [(int(row["step"]), {name: float(value) for name, value in row.items() if name.startswith("val/") and value})
            for row in _read(path).whole]  # fmt: skip
    steps = [at for at, metrics in rows if metrics and at < step]  # the row of a step counts those before it
    return {name: value for at, metrics in rows if steps and at == steps[-1] for name, value in metrics.items()}
