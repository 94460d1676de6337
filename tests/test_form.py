"""What may be asked for in the studio's form: each field is checked, whatever is sent in place of the page's."""

from __future__ import annotations

import pytest

from eqldm.form import OWN, VIEWS, read_form

FORM = {
    "model": "folder", "prompts": "the letter a\n\n the letter v ", "kind": VIEWS, "views": "identity\nrotate_180", "parts": "colour",
    "seed": 3, "count": 2.0, "steps": 30.0, "scale": 2.5, "negative": "", "style": "", "scheduler": OWN,
    "reduction": "mean", "blend": "latents", "travel": 1, "upscale": 1,
}  # fmt: skip


def test_a_form_is_read():
    asked = read_form(**FORM)
    assert asked.prompts == ["the letter a", "the letter v"] and asked.faces == ["identity", "rotate_180"] and asked.seeds == [3, 4]
    assert asked.options.num_inference_steps == 30 and asked.options.guidance_scale == 2.5 and asked.options.scheduler is None
    assert read_form(**{**FORM, "kind": "these parts", "scheduler": "euler"}).faces == "colour"


@pytest.mark.parametrize(("field", "value", "message"), [
    ("count", 0, "Pictures: got 0, wanted 1 to 16"), ("count", 10**9, "Pictures: got 1000000000, wanted 1 to 16"),
    ("count", 10**400, "Pictures: got 10+[.]{3}, wanted 1 to 16"), ("count", True, "Pictures: wanted a number, got True"),
    ("count", "4", "Pictures: wanted a number, got '4'"), ("count", [4], "Pictures: wanted a number, got a list"),
    ("count", {"a": 1}, "Pictures: wanted a number, got a dict"), ("steps", 2.5, "Steps: wanted a whole number, got 2.5"),
    ("steps", float("nan"), "Steps: wanted a whole number, got nan"), ("steps", 101, "Steps: got 101, wanted 1 to 100"),
    ("scale", float("nan"), "Guidance: got nan, wanted 1 to 15"), ("scale", 1e9, "Guidance: got 1000000000.0, wanted 1 to 15"),
    ("travel", 5, "Time travel: got 5, wanted 1 to 4"), ("upscale", 64, "Upscale: got 64, wanted 1 to 4"),
    ("seed", float("inf"), "First seed: wanted a whole number, got inf"), ("prompts", "a" * 10001, "Prompts: got 10001 characters"),
    ("prompts", "a\n" * 17, "Prompts: got 17 lines, wanted at most 16"), ("views", "identity\n" * 17, "Views: got 17 lines"),
    ("prompts", "an \ud800", "Prompts: character 4 is half of one"), ("prompts", ["a"], "Prompts: wanted a text, got a list"),
    ("model", " ", "Model folder: wanted a text, got none"), ("model", 5, "Model folder: wanted a text, got 5"),
    ("scheduler", "x" * 10**6, "Scheduler: got 'x{59}[.]{3}, wanted one of the model's own, ddim"),
    ("reduction", "weighted", "Reduction: got"),
    ("blend", None, "Blend in: got a NoneType, wanted one of latents, pixels"), ("scheduler", ["ddim"], "Scheduler: got a list"),
    ("kind", "x", "One prompt for each of: got 'x', wanted 'these views' or 'these parts'"),
])  # fmt: skip
def test_what_cannot_be_is_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        read_form(**{**FORM, field: value})
