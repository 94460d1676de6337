"""What plain letters would be credited with: the rate of a model that makes no anagrams."""

from __future__ import annotations

import pytest
import torch

import glyphs
from eqldm.data.samples import PictureSamples
from eqldm.evaluation.anagram import anagram_metrics, every_pair
from eqldm.evaluation.judge import NO_LETTER, Judge
from eqldm.evaluation.lookalikes import populations
from eqldm.evaluation.quality import RealPictures
from eqldm.evaluation.real_letters import RealLetters, credit
from eqldm.evaluation.work import measure_all
from eqldm.views import IDENTITY, parse_view


def values_of(labels: list[int], read: list[list[list[int]]]) -> dict[str, torch.Tensor]:
    return {"label": torch.tensor(labels), "read": torch.tensor(read), "forced": torch.tensor(read)}


def test_credit_is_that_of_the_better_view():
    """Of three real As that the first view shows upright, one reads as B in the second; of those that the second does, none."""
    none = NO_LETTER
    a = [[[0, 1], [none, 0]], [[0, none], [none, 0]], [[0, none], [none, 0]]]
    b = [[[1, none], [0, 1]]]  # the one real B, shown upright by the second view, reads as A in the first
    values = values_of([0, 0, 0, 1], [*a, *b])
    assert credit(values, torch.tensor([[0], [1]]), "read") == {"": 1.0}  # A upright and B turned: draw the B
    assert credit(values, torch.tensor([[1], [0]]), "read") == {"": 0.0}
    both = credit(values, torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]), "read")
    assert both is not None and both[""] == pytest.approx(0.5)  # of the first two all (the first view alone: a third), of the others none
    assert credit(values, torch.tensor([[0], [2]]), "read") is None  # no picture of a C
    c = [[[2, 2], [none, none]]]  # a C that reads as C in both views, shown upright by the first
    each = credit(values_of([0, 0, 0, 1, 2], [*a, *b, *c]), torch.tensor([[0, 2], [1, 2]]), "read")
    assert each == {"": 1.0}  # of each pair the better view: the B of the second, the C of the first
    two = {"label": values["label"], "read/x": values["read"], "read/y": torch.full_like(values["read"], none)}
    assert credit(two, torch.tensor([[0], [1]]), "read") == {"x": 1.0, "y": 0.0}


def test_unlabelled_pictures_do_not_count():
    values = values_of([-1, 0, 1], [[[0, 1], [0, 1]]] * 3)
    assert credit(values, torch.tensor([[0], [1]]), "forced") == {"": 1.0}
    assert credit(values_of([-1, 0], [[[0, 1], [0, 1]]] * 2), torch.tensor([[0], [1]]), "forced") is None


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> PictureSamples:
    folder = tmp_path_factory.mktemp("letters")
    glyphs.make_split(folder, "test", 104, size=64, shard_size=104)
    return PictureSamples(folder / "test")


def test_plain_letters_need_no_anagram_where_lists_say_so(letters):
    """Under half a turn a plain M is credited as M/W, and of pairs that need an anagram plain letters are credited with next to none."""
    views = [IDENTITY, parse_view("rotate_180", 8)]
    question = RealLetters("rotate_180", letters, 104, views, Judge.open(), {})
    values = measure_all(question)
    assert question.name == "data_rotate_180" and values["read"].shape == (104, 2, 2)
    upright = values["read"][:, [0, 1], [0, 1]]  # in the view that shows it upright, the letter is as it was drawn
    assert torch.equal(upright[:, 0], upright[:, 1]) and (upright[:, 0] == values["label"]).double().mean() > 0.9
    wanted = every_pair().T
    masks = populations(wanted, views)
    shares = {name: credit(values, wanted[:, mask], "read") for name, mask in masks.items()}
    assert shares["trivial/"][""] > 0.75 and shares[""][""] < 0.01 and shares["equal/"][""] < 0.05

    read = torch.full((wanted.shape[1], 2), NO_LETTER)
    sampled = {"read": read, "forced": read, "energy": torch.ones(len(read), 2)}
    found = anagram_metrics(views, sampled, RealPictures({}, None, 1.0), wanted, real_letters=values).metrics
    for name, share in shares.items():
        assert found[f"anagram/rotate_180/{name}ambigramability_data"] == pytest.approx(share[""])
        assert f"anagram/rotate_180/{name}forced_ambigramability_data" in found


def test_several_judges_and_views(letters, make_judge, tmp_path):
    views = [IDENTITY, parse_view("flip", 8), parse_view("rotate_90", 8)]
    judges = {"shipped": Judge.open(), "other": Judge.open(make_judge(tmp_path / "judge", 1))}
    values = measure_all(RealLetters("flip,rotate_90", letters, 8, views, judges["shipped"], judges))
    assert values["read/shipped"].shape == values["forced/other"].shape == (8, 3, 3)
    wanted = values["label"][:1].expand(3)[:, None]
    read = {f"{what}/{name}": torch.zeros(1, 3, dtype=torch.long) for what in ("read", "forced") for name in judges}
    real = RealPictures({}, None, 1.0)
    found = anagram_metrics(views, read | {"energy": torch.ones(1, 3)}, real, wanted, real_letters=values).metrics
    names = [name for name in found if name.endswith("/ambigramability_data")]
    judged = [name for name in names if "/judges/" in name]
    assert len(names) == 5 and {name.split("/judges/")[1].split("/")[0] for name in judged} == {"shipped", "other", "least", "most"}
