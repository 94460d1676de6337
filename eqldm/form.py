"""What may be asked for in the studio's form, and what it then means.

The sliders and menus of a page are suggestions: a program that talks to its server sends what it likes. Each value is checked here, before
anything is made of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from eqldm.anagram.options import BLENDS, REDUCTIONS, Options
from eqldm.anagram.solvers import SCHEDULERS
from eqldm.ranges import Range

OWN = "the model's own"
VIEWS, PARTS = "these views", "these parts"
KINDS = (VIEWS, PARTS)

NUMBERS = {  # for larger ones there is sample.py
    "First seed": Range(-math.inf, math.inf),  # `check_seeds` says which
    "Pictures": Range(1, 16),
    "Steps": Range(1, 100),
    "Guidance": Range(1, 15),
    "Time travel": Range(1, 4),
    "Upscale": Range(1, 4),
}
CHOICES = {
    "Scheduler": (OWN, *SCHEDULERS),
    "Reduction": tuple(name for name in REDUCTIONS if name != "weighted"),
    "Blend in": BLENDS,
}
MOST_CHARACTERS = 10_000  # of a text
MOST_LINES = 16  # of prompts, and of views: each makes the batch larger


class Asked(NamedTuple):
    """What is asked for: `faces` are views by name, or components as one text."""

    model: str
    prompts: list[str]
    faces: list[str] | str
    seeds: list[int]
    options: Options


def read_form(
    model: Any, prompts: Any, kind: Any, views: Any, parts: Any, seed: Any, count: Any, steps: Any, scale: Any, negative: Any, style: Any,
    scheduler: Any, reduction: Any, blend: Any, travel: Any, upscale: Any,
) -> Asked:  # fmt: skip
    """What a form asks for that was filled in like this. Raises ValueError, naming the field, where one holds what cannot be."""
    given = {"First seed": seed, "Pictures": count, "Steps": steps, "Guidance": scale, "Time travel": travel, "Upscale": upscale}
    numbers = {name: _number(name, value) for name, value in given.items()}
    texts = {"Prompts": prompts, "Negative prompt": negative, "Style": style, "One prompt for each of": kind}
    texts |= {"Views": views} if kind == VIEWS else {"Parts": parts}
    for name, text in {**texts, "Model folder": model}.items():
        _check_text(name, text)
    if not model.strip():  # it would be the folder that the studio was started in
        raise ValueError("Model folder: wanted a text, got none")
    if kind not in KINDS:
        raise ValueError(f"One prompt for each of: got '{kind[:60]}', wanted '{VIEWS}' or '{PARTS}'")
    for name, value in {"Scheduler": scheduler, "Reduction": reduction, "Blend in": blend}.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name}: got {_shown(value)}, wanted one of {', '.join(CHOICES[name])}")
    options = Options(
        num_inference_steps=int(numbers["Steps"]), guidance_scale=float(numbers["Guidance"]), negative_prompt=negative, style=style,
        reduction=reduction, scheduler=None if scheduler == OWN else scheduler, blend=blend, time_travel=int(numbers["Time travel"]),
        upscale=int(numbers["Upscale"]),
    )  # fmt: skip
    first = int(numbers["First seed"])
    seeds = list(range(first, first + int(numbers["Pictures"])))
    return Asked(model, _lines("Prompts", prompts), _lines("Views", views) if kind == VIEWS else parts, seeds, options)


def _number(name: str, value: Any) -> int | float:
    """The value of a field, if it is a number in its range, and whole but for the guidance. Raises ValueError."""
    wanted = NUMBERS[name]
    if value is None or type(value) not in (int, float):
        raise ValueError(f"{name}: wanted a number, got {'none' if value is None else _shown(value)}")
    if name != "Guidance" and isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{name}: wanted a whole number, got {value}")
    if value not in wanted:
        raise ValueError(f"{name}: got {_shown(value)}, wanted {wanted.low} to {wanted.high} (sample.py takes more)")
    return value


def _check_text(name: str, text: Any) -> None:
    """Raises ValueError."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: wanted a text, got {'none' if text is None else _shown(text)}")
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{name}: got {len(text)} characters, wanted at most {MOST_CHARACTERS}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: character {error.start + 1} is half of one, which no font can show: leave it out") from None


def _lines(name: str, text: str) -> list[str]:
    """The lines of a text that hold something. Raises ValueError where there are too many."""
    lines: Sequence[str] = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) > MOST_LINES:
        raise ValueError(f"{name}: got {len(lines)} lines, wanted at most {MOST_LINES} (sample.py takes more)")
    return list(lines)


def _shown(value: Any, most: int = 60) -> str:
    """A value that somebody sent, as an error shows it."""
    if not isinstance(value, str | int | float):
        return f"a {type(value).__name__}"
    text = repr(value[: most + 1]) if isinstance(value, str) else str(value)
    return text if len(text) <= most else text[:most] + "..."
