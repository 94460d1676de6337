"""Pictures are kept as they were drawn, and looked at again without being drawn again."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn

from eqldm.anagram.sampling import Sampler
from eqldm.evaluation.drawn import Drawn, as_png, from_png, read_pictures
from eqldm.evaluation.generation import letter_prompts
from eqldm.evaluation.sampled import Sampled
from eqldm.evaluation.work import Store, measure_all, work
from eqldm.views import IDENTITY, parse_view


class Letters:
    """A judge that reads one letter."""

    def __init__(self, letter: int):
        self.letter, self.hash = letter, f"letter {letter}"

    def probabilities(self, x):
        return nn.functional.one_hot(torch.full((len(x),), self.letter), 27).float()


def test_a_png_loses_nothing():
    pictures = torch.randint(256, (3, 3, 8, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    values = as_png(pictures)
    assert torch.equal(from_png(values), pictures) and values["size"].sum() == len(values["png"])
    two = {name: torch.cat([values[name]] * 2) for name in values}  # as batches are put together
    assert torch.equal(from_png(two), torch.cat([pictures] * 2))


def test_another_judge_needs_no_new_sampling(tiny_model_folder, tmp_path, monkeypatch):
    sampler, wanted = Sampler.open(tiny_model_folder, "cpu"), torch.tensor([[0, 1, 2], [3, 4, 5]])

    def question(judge, **options):
        views = [IDENTITY, parse_view("rotate_180")]
        found = Sampled("anagram", sampler, views, letter_prompts(wanted), judge=judge, wanted=wanted, num_inference_steps=1, **options)
        found.store = Store(tmp_path, 2)
        return found

    first = work(question(Letters(0)), tmp_path, 2)
    alone = question(Letters(0))
    alone.store = None
    bare = measure_all(alone, 2)
    assert first.keys() == bare.keys() and all(torch.equal(first[name], bare[name]) for name in bare)
    (folder,) = tmp_path.glob("anagram_pictures-*")
    assert torch.equal(read_pictures(folder), bare["shown"])

    with monkeypatch.context() as patched:
        patched.setattr(Drawn, "_draw", lambda *a: pytest.fail("drawn again"))
        with pytest.warns(UserWarning, match="was measured with other judge"):
            other = work(question(Letters(3)), tmp_path, 2)
        with pytest.warns(UserWarning, match="was measured with other judge, num_shown"):
            work(question(Letters(0), num_shown=1), tmp_path, 2)
    assert (
        bool((other["read"] == 3).all()) and torch.equal(other["shown"], first["shown"]) and torch.equal(other["energy"], first["energy"])
    )

    assert torch.equal(read_pictures(folder, letter_prompts(wanted)), bare["shown"])
    with pytest.raises(ValueError, match="drawn for other prompts than those wanted"):
        read_pictures(folder, letter_prompts(wanted.flip(0)))
    (last := folder / "00000002.safetensors").rename(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    for damaged in (content[:40], content[:-40], content.replace(b"PNG", b"GIF"), safetensors.torch.save({"png": torch.zeros(1)})):
        last.write_bytes(damaged)
        with pytest.raises(ValueError, match="00000002.safetensors' is damaged, or .*: remove it and 'anagram.safetensors'"):
            read_pictures(folder)
    last.unlink()
    with pytest.raises(ValueError, match="holds 2 of 3 pictures: remove 'anagram.safetensors' beside it, if it is there, and run"):
        read_pictures(folder)
    with pytest.raises(FileNotFoundError, match="nowhere' holds no pictures: give a folder"):
        read_pictures(tmp_path / "nowhere")


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_inference_steps": 2}])
def test_pictures_of_other_seeds_or_options_are_others(tiny_model_folder, change):
    sampler = Sampler.open(tiny_model_folder, "cpu")
    one, other = (
        Sampled("generation", sampler, [IDENTITY], [["the letter a"]], **{"num_inference_steps": 1, **more}) for more in ({}, change)
    )
    assert one.drawn.key != other.drawn.key
    same = Sampled("generation", sampler, [IDENTITY], [["the letter a"]], judge=Letters(0), num_shown=3, num_inference_steps=1)
    assert same.drawn.key == one.drawn.key and same.key != one.key


@pytest.mark.parametrize("kind", ["cut off", "of another program", "without a size", "bytes that are no picture"])
def test_damaged_pictures_are_told(tmp_path, kind):
    values, path = as_png(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)), tmp_path / "anagram_pictures-0" / "00000000.safetensors"
    path.parent.mkdir()
    about = {"key": '{"count": 2}'}
    save_file(values, path, about)
    assert read_pictures(path.parent).shape == (2, 3, 8, 8)
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "of another program":
        save_file(values, path)
    elif kind == "without a size":
        save_file({"png": values["png"]}, path, about)
    else:
        save_file({**values, "png": torch.zeros_like(values["png"])}, path, about)
    with pytest.raises(ValueError, match=r"00000000.safetensors' is damaged, or holds no pictures .*: remove it and 'anagram.safetensors'"):
        read_pictures(path.parent)
