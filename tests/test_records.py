"""A file of torch.save is checked byte by byte, and what it holds for its shape and its numbers."""

from __future__ import annotations

import torch

from eqldm.training.records import broken_record, misshapen, not_finite

WHOLE = {"global_step": 7, "state_dict": {}, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
CYCLE = "it contains itself, or is nested without an end"


def test_every_byte_of_a_small_file_counts_or_is_padding(tmp_path):
    """A bit of each byte is flipped in turn: what is not noticed must load to the same."""
    path, state = tmp_path / "a.ckpt", WHOLE | {"state_dict": {"weight": torch.arange(40.0)}, "words": ["a", 2.5]}
    torch.save(state, path)
    data, unnoticed = path.read_bytes(), 0
    assert broken_record(path, tensors=True) is None
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << place % 8]) + data[place + 1 :])
        if broken_record(path, tensors=True):
            continue
        unnoticed += 1
        try:
            found = torch.load(path, weights_only=True)
        except RuntimeError:  # torch's own table of contents, which it reads more strictly
            continue
        weight = found.pop("state_dict")["weight"]
        assert torch.equal(weight, state["state_dict"]["weight"])
        assert found == {name: value for name, value in state.items() if name != "state_dict"}
    assert 0 < unnoticed < len(data) / 2  # padding before each tensor, times


def test_the_plain_values_alone_are_checked_on_demand(tmp_path):
    torch.save(WHOLE | {"state_dict": {"weight": torch.full((3000,), 2.0)}}, tmp_path / "a.ckpt")
    data = bytearray((tmp_path / "a.ckpt").read_bytes())
    at = data.index(torch.full((3000,), 2.0).numpy().tobytes()) + 5000
    data[at] ^= 4
    (tmp_path / "a.ckpt").write_bytes(data)
    assert broken_record(tmp_path / "a.ckpt", tensors=False) is None
    assert "its record 'data/0' is not what was written (Bad CRC-32" in broken_record(tmp_path / "a.ckpt", tensors=True)


def test_other_shapes_are_named():
    assert misshapen(WHOLE) is None
    for change, words in (
        ({"global_step": "7"}, "its global_step is a str, wanted int"),
        ({"global_step": -1}, "its global_step is -1"),
        ({"loops": []}, "its loops is a list, wanted dict"),
        ({"state_dict": {"a": 1}}, "its state_dict holds a int by the name of 'a', wanted tensors alone"),
        ({"current_model_state": [1]}, "its current_model_state is a list, wanted dict"),
    ):
        assert misshapen(WHOLE | change) == words
    loop: dict = {}
    loop["within"] = [loop]
    assert misshapen(WHOLE | {"callbacks": loop}) == CYCLE
    loop = {}
    loop["state_dict"] = loop
    assert "its state_dict holds a dict" in misshapen(WHOLE | {"state_dict": loop})
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert misshapen(WHOLE | {"callbacks": {"deep": deep}}) == CYCLE


def test_numbers_that_are_not_finite_are_found_by_name():
    tree = {"state_dict": {"a": torch.ones(2)}, "optimizer_states": [{"state": {0: {"exp_avg": torch.tensor([1.0, float("inf")])}}}]}
    assert not_finite(tree) == "optimizer_states.0.state.0.exp_avg"
    assert not_finite({"a": torch.full((4,), 60000.0, dtype=torch.float16)}) is None  # whose sum is none
    assert not_finite({"a": torch.ones(2), "b": torch.tensor([1, 2]), "c": 3.0}) is None
