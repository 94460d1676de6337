"""Work kept in files: stopped and gone on with, shared between processes, never lost and never mixed."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from eqldm.evaluation import work as module
from eqldm.evaluation.drawn import Drawn
from eqldm.evaluation.work import Store, measure_all, read_kept, work


class Squares:
    """Asks for the squares of 0 to count - 1; notes what was measured."""

    name = "squares"

    def __init__(self, count=10, key=None):
        self.count, self.key, self.measured = count, key or {"of": "numbers"}, []

    def measure(self, numbers):
        self.measured.append(numbers)
        return {
            "square": torch.tensor([n**2 for n in numbers]),
            "sum/all": torch.tensor(float(sum(numbers))),
            "odd": torch.tensor([n for n in numbers if n % 2], dtype=torch.int64),
        }


def test_batches_in_order_and_kept(tmp_path):
    question, seen = Squares(), []
    values = work(question, tmp_path, 4, on_batch=lambda: seen.append(1))
    assert values["square"].tolist() == [n**2 for n in range(10)] and values["odd"].tolist() == [1, 3, 5, 7, 9]
    assert values["sum/all"].shape == () and float(values["sum/all"]) == 45
    assert question.measured == [range(4), range(4, 8), range(8, 10)] and len(seen) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["squares.safetensors"]
    again = Squares()
    assert torch.equal(work(again, tmp_path, 4)["square"], values["square"]) and not again.measured
    assert torch.equal(measure_all(Squares(), 3)["odd"], values["odd"])


def test_a_stopped_one_goes_on(tmp_path):
    question = Squares()
    question.measure = lambda numbers, whole=question.measure: (
        whole(numbers) if numbers.start < 8 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        work(question, tmp_path, 4)
    (folder,) = tmp_path.iterdir()
    (folder / "00000004.safetensors").write_bytes(b"half a file")
    again = Squares()
    with pytest.warns(UserWarning, match="00000004.safetensors' is damaged .*: it is not used"):
        values = work(again, tmp_path, 4)
    assert again.measured == [range(4, 8), range(8, 10)] and values["square"].tolist() == [n**2 for n in range(10)]
    (tmp_path / "squares.safetensors").write_bytes(b"half a file")
    with pytest.warns(UserWarning, match="squares.safetensors' is damaged .*: it is not used"):
        work(again := Squares(), tmp_path, 4)
    assert len(again.measured) == 3


def test_a_flipped_bit_is_another_figure(tmp_path):
    """The header of a file is checked by its format, its values are not: each byte of them, flipped in turn, would be a figure."""
    values = work(Squares(), tmp_path, 4)
    path = tmp_path / "squares.safetensors"
    content = path.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")  # after the header
    for place in range(first, len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(SafetensorError, match="its values are others than those that were written"):
            read_kept(path)
    with pytest.warns(UserWarning, match="squares.safetensors' is damaged .its values are others.*: it is not used"):
        again = work(question := Squares(), tmp_path, 4)
    assert len(question.measured) == 3 and all(torch.equal(again[name], value) for name, value in values.items())
    assert all(torch.equal(read_kept(path)[1][name], value) for name, value in values.items())


@pytest.mark.parametrize("change", [{"key": {"of": "letters"}}, {"count": 9}])
def test_another_question_is_measured_anew(tmp_path, change):
    work(Squares(), tmp_path, 4)
    other = Squares(**change)
    with pytest.warns(
        UserWarning, match=f"squares.safetensors' was measured with other {'of' if 'key' in change else 'count'}: measured anew"
    ):
        assert len(work(other, tmp_path, 4)["square"]) == other.count and len(other.measured) == 3
    first = Squares()
    with pytest.warns(UserWarning, match="measured anew, and replaced"):
        work(first, tmp_path, 4)  # its file was replaced
    assert len(first.measured) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_processes_share_it_and_the_last_has_it_all(tmp_path):
    first, second = Squares(), Squares()
    assert work(first, tmp_path, 2, (0, 2)) is None
    values = work(second, tmp_path, 2, (1, 2))
    assert first.measured == [range(2), range(4, 6), range(8, 10)] and second.measured == [range(2, 4), range(6, 8)]
    assert values["square"].tolist() == [n**2 for n in range(10)]
    assert torch.equal(work(first, tmp_path, 2, (0, 2))["square"], values["square"]) and len(first.measured) == 3
    alone = work(Squares(), tmp_path / "alone", 2)
    assert torch.equal(alone["square"], values["square"]) and torch.equal(alone["odd"], values["odd"])


def test_the_same_question_of_another_model_is_answered_already(tmp_path):
    work(Squares(), tmp_path / "a", 4)
    again = Squares()
    assert (
        work(again, tmp_path / "b", 4, others=[tmp_path / "c", tmp_path / "a"])["square"].tolist() == [n**2 for n in range(10)]
        and not again.measured
    )
    assert (tmp_path / "b" / "squares.safetensors").is_file()


def test_a_process_that_is_overtaken_measures_nothing_again(tmp_path, monkeypatch):
    """The other puts all together, and the parts away, between two looks of this one at its own parts."""
    first, second = Squares(), Squares()
    assert work(first, tmp_path, 2, (0, 2)) is None
    read, looked = module._read, []

    def overtaken(path, key):
        looked.append(path.name)
        if looked.count("00000000.safetensors") == 1 and path.name == "00000004.safetensors" and not second.measured:
            work(second, tmp_path, 2, (1, 2))
        return read(path, key)

    monkeypatch.setattr(module, "_read", overtaken)
    values = work(first, tmp_path, 2, (0, 2))
    assert values["square"].tolist() == [n**2 for n in range(10)] and len(first.measured) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["squares.safetensors"]


class Kept(Squares):
    """Squares that others look at."""

    code = ("evaluation/work.py",)


def test_a_store_measures_each_batch_once(tmp_path):
    question, store = Kept(), Store(tmp_path / "a", 4)
    for _ in range(2):
        assert store.batch(question, range(4, 8))["square"].tolist() == [16, 25, 36, 49]
    elsewhere = Store(tmp_path / "b", 4, [tmp_path / "c", tmp_path / "a"])
    assert elsewhere.batch(again := Kept(), range(4, 8))["square"].tolist() == [16, 25, 36, 49]
    assert question.measured == [range(4, 8)] and not again.measured
    (file,) = (tmp_path / "b").rglob("*.safetensors")  # which is its own now
    (copied,) = (tmp_path / "a").rglob("*.safetensors")
    (key, values), (of, others) = read_kept(file), read_kept(copied)  # safetensors write a header's entries in any order
    assert key == of and values.keys() == others.keys() and all(torch.equal(values[name], others[name]) for name in values)
    copied.write_bytes(b"half a file")
    with pytest.warns(UserWarning, match="00000004.safetensors' is damaged .*: it is not used"):
        assert store.batch(again, range(4, 8))["square"].tolist() == [16, 25, 36, 49]
    assert again.measured == [range(4, 8)]


def test_a_store_keeps_questions_apart_and_drops_what_was_asked_before(tmp_path):
    (tmp_path / "squares-of-mine").mkdir()
    stores = {4: Store(tmp_path, 4), 5: Store(tmp_path, 5)}
    first, other = Kept(), Kept(key={"of": "letters"})
    for store, question in ((stores[4], first), (stores[4], other), (stores[5], first)):
        store.batch(question, range(store.batch_size))
    assert first.measured == [range(4), range(5)] and other.measured == [range(4)] and len(list(tmp_path.iterdir())) == 4
    stores[4].forget_others(other)
    assert len(list(tmp_path.iterdir())) == 2 and (tmp_path / "squares-of-mine").is_dir()
    assert stores[4].batch(other, range(4)) and other.measured == [range(4)]


def test_what_is_kept_outlives_a_change_of_what_looks_at_it():
    """The code that a judge or a metric is made of does not count, that of sampling does."""
    root = Path(module.__file__).parents[1]
    assert module._code(()) != module._code(("evaluation/work.py",)) != module._code()
    assert all((root / name).is_file() for name in Drawn.code)


def test_what_is_not_its_own_is_left_alone(tmp_path):
    (tmp_path / "squares-augmentation").mkdir()
    (tmp_path / ".squares-of-mine").mkdir()
    (tmp_path / ".squares-0123456789ab").mkdir()  # what was asked before
    work(Squares(), tmp_path, 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".squares-of-mine", "squares-augmentation", "squares.safetensors"]


def test_a_full_disk_says_so_and_loses_nothing(tmp_path, monkeypatch):
    whole, written = Path.write_bytes, []

    def write_bytes(path, data):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        return whole(path, data)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(OSError, match="no space left in .*Finished batches are kept: free some space and run the same command again"):
        work(Squares(), tmp_path, 4)
    with pytest.raises(OSError, match="no space left in .*Finished batches are kept: free some space and run the same command again"):
        Store(tmp_path, 4).batch(Kept(), range(4))
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.undo()
    again = Squares()
    work(again, tmp_path, 4)
    assert again.measured == [range(8, 10)]
