"""Letters that read as letters when they are turned, and which prompts therefore need no anagram.

Under half a turn a plain M is a W: a picture that is wanted as M upright and W turned needs no ambigram, and neither does one that is
wanted as N both ways. What a model draws of such pairs says nothing of anagrams, so results keep them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from eqldm.evaluation.judge import LETTERS
from eqldm.views import D4, View

READS_AS = {  # symmetry: {letter: the letter that it reads as when turned by it}
    "rotate_90": dict(zip("NOXZ", "ZOXN")),
    "rotate_180": dict(zip("HIMNOSWXZ", "HIWNOSMXZ")),
    "rotate_270": dict(zip("NOXZ", "ZOXN")),
    "mirror": dict(zip("AHIMOTUVWXY", "AHIMOTUVWXY")),
    "transpose": dict(zip("OX", "OX")),
    "flip": dict(zip("BCDEHIKMOWX", "BCDEHIKWOMX")),
    "anti_transpose": dict(zip("LOX", "LOX")),
}
UNCERTAIN = {  # symmetry: {letter on which readers disagree when it is turned by it, by face: the letter that it may read as, if any}
    "rotate_90": {"C": "U", "H": "I", "I": "H"},
    "rotate_270": {"H": "I", "I": "H", "U": "C"},
    "mirror": {"J": "L", "L": "J"},
    "transpose": {"C": "", "H": "I", "I": "H", "U": ""},
    "flip": {"G": "G"},
    "anti_transpose": {"C": "U", "H": "I", "I": "H", "U": "C"},
}


def populations(wanted: Tensor, views: Sequence[View] = ()) -> dict[str, Tensor]:
    """[N] bool masks of letter numbers wanted [faces, N], which part the pictures; each is named as its metrics begin:

    `""`         the headline: different letters, which need an anagram
    `equal/`     of two faces or more that want the same letter, but not trivial
    `trivial/`   those of `trivial` under the views (none of them: faces that are parts)
    """
    easy = trivial(wanted, views) if views else torch.zeros(wanted.shape[1], dtype=torch.bool)
    ordered = wanted.sort(0).values
    equal = (ordered[1:] == ordered[:-1]).any(0)
    return {"": ~(equal | easy), "equal/": equal & ~easy, "trivial/": easy}


def population_note(name: str, wanted: Tensor, views: Sequence[View] = ()) -> str | None:
    """What a reader of `name` (`anagram/rotate_180`) must know of letters wanted [faces, N]: how many stand apart; None where none do."""
    counts = {prefix: int(mask.sum()) for prefix, mask in populations(wanted, views).items()}
    why = {"trivial/": "need no anagram, for one plain letter reads right in every view", "equal/": "want one letter more than once"}
    apart = [f"{counts[prefix]} {text} ({name}/{prefix}...)" for prefix, text in why.items() if counts[prefix]]
    if not apart:
        return None
    return f"{name}: of {wanted.shape[1]} pictures {' and '.join(apart)}. What is read of the other {counts['']} has the plain names."


def trivial(wanted: Tensor, views: Sequence[View]) -> Tensor:
    """[N] bool of letter numbers wanted [views, N]: whether one letter, plainly drawn in one of the square's eight orientations, reads as
    the wanted one in every view. What readers disagree on (`UNCERTAIN`) counts as read, so that the headline is the stricter one.

    Views that cut letters up (patches, jigsaws, hinges) leave none, so that under them nothing is trivial.
    """
    elements = [disc_symmetry(view) for view in views]
    found = torch.zeros(wanted.shape[1], dtype=torch.bool)
    for drawn in D4 if None not in elements else ():
        shown = [(D4[element] @ drawn).turns[0] for element in elements if element is not None]
        found |= torch.stack([_readings()[element][:, letters] for element, letters in zip(shown, wanted)]).all(0).any(0)
    return found


@lru_cache(maxsize=32)
def disc_symmetry(view: View) -> int | None:
    """The element of D4 (its number in `D4`) by which a view turns the disc that touches the sides as a whole; None where it cuts it up.

    Letters stand in that disc: the judge reads real ones under `inner_circle` as under half a turn (M as W 98 %, W as M 88 %).
    Negation does not matter, for letters have any colours.
    """
    n = view.cells
    inside = [k for k in range(n**2) if (2 * (k // n) - n + 1) ** 2 + (2 * (k % n) - n + 1) ** 2 <= n**2]
    for element, symmetry in enumerate(D4):
        whole = symmetry.refine(n)
        if all((view.source[k], view.turns[k]) == (whole.source[k], whole.turns[k]) for k in inside):
            return element
    return None


@lru_cache(maxsize=1)
def _readings() -> Tensor:
    """[8, 26, 26] bool: whether a letter, turned by an element of D4, may read as another."""
    may = torch.zeros(len(D4), len(LETTERS), len(LETTERS), dtype=torch.bool)
    may[0] = torch.eye(len(LETTERS), dtype=torch.bool)
    for element, symmetry in enumerate(D4[1:], 1):
        for letter, reading in (READS_AS[symmetry.name] | UNCERTAIN.get(symmetry.name, {})).items():
            if reading:
                may[element, LETTERS.index(letter), LETTERS.index(reading)] = True
    return may
