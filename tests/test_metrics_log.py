"""The log of a run: rows that are damaged are left out, counted and kept aside; the others go on."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger

from eqldm.atomic import NotWritten
from eqldm.training.metrics_log import ASIDE, TABLE, last_validation, read_metrics, resumed_table


@pytest.fixture
def table(tmp_path) -> Path:
    """The log of six steps, with validations after 3 and 6, as a run writes it."""
    logger = CSVLogger(tmp_path / "logs", name="", version="")
    for step in range(6):
        logger.log_metrics({"train/loss": 0.512 + step, "epoch": 0}, step)
        if step % 3 == 2:
            logger.log_metrics({"val/loss": 1e-5 * step, "epoch": 0}, step)
    logger.save()
    return tmp_path / TABLE


def steps(path: Path) -> list[int]:
    with open(path, newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_at_every_place_where_it_may_be_cut(table, tmp_path, capsys):
    data, wholes = table.read_bytes(), read_metrics(table).whole
    assert len(wholes) == 8
    for end in range(len(data)):
        for tail in (b"", b"\n", bytes(40)):
            table.write_bytes(data[:end] + tail)
            found = read_metrics(table)
            complete = data[:end].count(b"\n") - (1 if data[:end].count(b"\n") else 0)
            assert found.whole[:complete] == wholes[:complete] and len(found.whole) <= complete + (tail == b"\n")
            assert found.left_out <= 2
        if end % 40 == 0:
            resumed_table(tmp_path, 4)
            assert not table.exists() or set(steps(table)) <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("line", "left_out"),
    [
        ("0,,0.5,", 1),  # no step
        ("0,4,0.", 1),
        ("0,4,0.5,,", 1),
        ('0,4,"0.5,\n', 2),
        ("0,4,\0.5,", 1),
        ("0,4,0.5x,", 1),
        ("0,-4,0.5,", 1),
        ("0,4.0,0.5,", 1),
        (f"0,{'4' * 5000},0.5,", 1),
        ("0,\xff4,0.5,", 1),
        ("0,4,0.5\r,", 1),
        ("", 1),
        ("x" * 300_000, 1),
        ("0,4,inf,nan", 0),
    ],
)
def test_a_damaged_line_is_left_out_and_said(table, tmp_path, capsys, line, left_out):
    lines = table.read_bytes().split(b"\r\n")
    assert lines[0] == b"epoch,step,train/loss,val/loss"
    table.write_bytes(b"\r\n".join([*lines[:3], line.encode("latin-1"), *lines[3:]]))
    damaged = table.read_bytes()
    assert read_metrics(table).left_out == left_out
    logger = resumed_table(tmp_path, 4)
    assert steps(table)[-1] == 3 and set(steps(table)) >= {0, 1, 2, 3}
    assert (f"{left_out} of its lines are left out" in capsys.readouterr().err) is (left_out > 0)
    kept = table.with_name("metrics.csv.damaged-1")
    assert kept.exists() is (left_out > 0) and (not left_out or kept.read_bytes() == damaged)
    logger.log_metrics({"train/loss": 1.0, "new": 2.0}, 4)
    logger.save()
    assert read_metrics(table).left_out == 0 and steps(table)[-1] == 4


@pytest.mark.parametrize(
    "header", [b"", b"epoch,stap,train/loss,val/loss", b"epoch,step,train/\xffoss,val/loss", b"step,step,a,b", b"\0" * 30]
)
def test_without_names_no_row_is_told_from_another(table, tmp_path, capsys, header):
    table.write_bytes(b"\r\n".join([header, *table.read_bytes().split(b"\r\n")[1:]]))
    resumed_table(tmp_path, 4)
    assert not table.exists() and "9 of its lines are left out, and 0 rows from before step 4 go on" in capsys.readouterr().err
    assert table.with_name("metrics.csv.damaged-1").exists() and last_validation(tmp_path, 6) == {}


def test_a_start_that_is_killed_loses_no_row(table, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CSVLogger, "save", kill)  # Lightning has removed the table by then
        with pytest.raises(Killed):
            resumed_table(tmp_path, 4)
    assert not table.exists() and last_validation(tmp_path, 4) == {"val/loss": 2e-5}
    resumed_table(tmp_path, 6)
    assert steps(table) == [0, 1, 2, 2, 3, 4, 5, 5] and not (tmp_path / ASIDE).exists()


def test_a_folder_in_its_place_is_put_aside(tmp_path, capsys):
    (tmp_path / TABLE / "x").mkdir(parents=True)
    logger = resumed_table(tmp_path, 4)
    logger.log_metrics({"a": 1.0}, 4)
    logger.save()
    assert steps(tmp_path / TABLE) == [4] and "cannot be read" in capsys.readouterr().err


def test_the_last_validation_until_a_step(table, tmp_path):
    assert last_validation(tmp_path, 2) == {} and last_validation(tmp_path, 3) == last_validation(tmp_path, 5) == {"val/loss": 2e-5}
    assert last_validation(tmp_path, 6) == {"val/loss": 5e-5}


def test_a_full_disk_while_a_column_is_added_loses_no_row(tmp_path, monkeypatch):
    """Lightning emptied the table first: the rows since the run's beginning went with the first validation."""
    logger = resumed_table(tmp_path, 0)
    for step in range(5):
        logger.log_metrics({"train/loss": 0.5 + step}, step)
    logger.save()
    before = (tmp_path / TABLE).read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", full)
        logger.log_metrics({"val/psnr": 3.0}, 5)
        with pytest.raises(NotWritten, match=r"metrics.csv' could not be written \(No space left on device\).*make room"):
            logger.save()
    assert (tmp_path / TABLE).read_text() == before
    logger = resumed_table(tmp_path, 5)
    logger.log_metrics({"val/psnr": 3.0}, 5)
    logger.save()
    found = read_metrics(tmp_path / TABLE)
    assert [float(row["train/loss"] or -1) for row in found.whole] == [0.5, 1.5, 2.5, 3.5, 4.5, -1] and not found.left_out
