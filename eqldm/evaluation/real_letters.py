"""What would plain letters be credited with? A real letter under the views of an anagram, as judges read it.

A model that draws one of the prompts plainly, so that one view shows it upright, makes no anagram. What it would be credited with on the
same pairs is the floor of every rate: of letters that read as others when turned, and, under views that cut letters up, of what judges
take pieces for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from eqldm.data.samples import collate
from eqldm.evaluation.judge import LETTERS, Judge
from eqldm.evaluation.judges import by_judge, by_suffix
from eqldm.evaluation.naming import file_name
from eqldm.evaluation.pictures import Pictures
from eqldm.views import View


class RealLetters:
    """The question what judges read of real letters under the views (identity, V, ...) of an anagram called `title`.

    judges: by name, where several read; `judge` is then the first of them.
    """

    def __init__(self, title: str, samples: Pictures, count: int, views: Sequence[View], judge: Judge, judges: Mapping[str, Judge]):
        self.name, self.samples, self.count, self.views = f"data_{file_name(title)}", samples, count, views
        self.judge, self.judges = judge, judges
        hashes = {name: each.hash for name, each in by_suffix(judge, judges).items()}
        self.key = {"data": samples.digest, "views": [view.name for view in views], "judges": hashes}

    def measure(self, numbers: range) -> dict[str, Tensor]:
        """`label` [B] (-1: none), and `read`, `forced` [B, V, V]: what the judge reads, and reads where it must name a letter, in view j of
        the picture that view i shows upright; of several judges `read/NAME`, `forced/NAME`."""
        batch = collate([self.samples[i] for i in numbers])
        shown = [[view(drawn(batch["x"])) for view in self.views] for drawn in [view.inverse for view in self.views]]
        values = {"label": batch["label"]}
        for suffix, judge in by_suffix(self.judge, self.judges).items():
            found = torch.stack([torch.stack([judge.probabilities(x) for x in row], 1) for row in shown], 1)
            values[f"read{suffix}"] = found.argmax(-1)
            values[f"forced{suffix}"] = found[..., : len(LETTERS)].argmax(-1)
        return values


def credit(values: Mapping[str, Tensor], wanted: Tensor, what: str) -> dict[str, float] | None:
    """By judge, the share of pictures that would read as wanted [V, N] in every view if each were a real letter that one view shows
    upright: of each picture the mean over real pictures of that letter, in the view of which the most would (each judge has its own). That
    is a little too much where a letter has few pictures, for the better of two shares is. None where a wanted letter has no picture.

    values: of `RealLetters`.  what: `read` or `forced`.
    """
    tuples, counts = wanted.unique(dim=1, return_counts=True)
    labels = values["label"]
    if not bool(torch.isin(tuples, labels).all()):
        return None
    found, pictures = {}, {letter: (labels == letter).nonzero()[:, 0] for letter in tuples.unique().tolist()}
    for judge, read in by_judge(values, what).items():
        shares = [
            [(read[pictures[letter], i] == tuples[:, k]).all(1).double().mean() for k, letter in enumerate(letters)]
            for i, letters in enumerate(tuples.tolist())
        ]
        best = torch.tensor(shares).amax(0)
        found[judge] = float((best * counts).sum() / counts.sum())
    return found
