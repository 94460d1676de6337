"""The studio: pictures form, the good ones are kept, and what is taken away is whole. In a real browser where there is one."""

from __future__ import annotations

import json
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from eqldm import studio
from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import tensor_to_picture
from eqldm.views import IDENTITY, parse_view

PROMPTS, VIEWS = ["the letter a", "the letter v"], ["identity", "inner_circle"]
OPTIONS = {
    "num_inference_steps": 6, "guidance_scale": 3.0, "negative_prompt": "", "style": "", "scheduler": None, "reduction": "mean",
    "time_travel": 1,
}  # fmt: skip


@pytest.fixture
def model(tiny_model_folder, monkeypatch) -> str:
    """A tiny model, sampled in float32."""
    monkeypatch.setattr(studio, "sampler_of", lambda folder: Sampler.open(folder, "cpu"))
    return str(tiny_model_folder)


def test_pictures_form_and_end_as_they_would_anyway(model):
    steps = list(studio.make(model, PROMPTS, VIEWS, [4, 5], **OPTIONS))
    assert len(steps) == 7 and all(len(step) == 2 for step in steps)  # each step, and the end
    wanted = Sampler.open(model, "cpu")(PROMPTS, [IDENTITY, parse_view("inner_circle:8")], [4, 5], **OPTIONS)
    torch.testing.assert_close(torch.stack([made.x for made in steps[-1]]), wanted)
    distances = [float((step[0].x - wanted[0]).abs().mean()) for step in steps]
    assert distances[-1] == 0 and distances[-2] < distances[0]
    shown = studio.as_shown(steps[-1])
    assert [caption for _, caption in shown][1] == "seed 4, inner_circle:8: the letter v" and shown[0][0].size == (256, 256)


@pytest.mark.parametrize(("changes", "message"), [
    ({"names": ["identity"]}, "one prompt for each view: got 2 prompts and 1 views"),
    ({"names": ["identity", "negate"]}, "was not trained with negation"),
    ({"scheduler": "unipc", "time_travel": 2}, "use ddim or ddpm"),
    ({"model": "nowhere"}, "'nowhere' does not exist"),
])  # fmt: skip
def test_what_does_not_fit_is_told(model, changes, message):
    arguments = {"model": model, "prompts": PROMPTS, "names": VIEWS, "seeds": [0], **OPTIONS, **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        next(studio.make(**arguments))


def test_an_error_while_sampling_is_not_lost(model, monkeypatch):
    monkeypatch.setattr(Sampler, "decode", lambda *a: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(studio.make(model, PROMPTS, VIEWS, [0], **OPTIONS))


def test_what_is_taken_away(model, tmp_path):
    """A folder for each set of prompts and views; each picture with the command that makes it again."""
    *_, first = studio.make(model, PROMPTS, VIEWS, [4, 5], **OPTIONS)
    *_, second = studio.make(model, ["picture 1"], ["identity"], [9], **{**OPTIONS, "scheduler": "euler"})
    archive = studio.export([first[1], *second], tmp_path / "taken", films=True)
    with zipfile.ZipFile(archive) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
        file.extractall(tmp_path / "out")
    assert names == {f"anagrams-1/{n}" for n in ("5.png", "5.json", "5.mp4", "index.html")} | {
        f"anagrams-2/{n}" for n in ("9.png", "9.json", "9.mp4", "index.html")
    }
    saved = np.asarray(Image.open(tmp_path / "out" / "anagrams-1" / "5.png"))
    assert np.array_equal(saved, np.asarray(tensor_to_picture(first[1].x)))
    other = [*studio.make(model, PROMPTS, VIEWS, [4, 5], **{**OPTIONS, "guidance_scale": 9.0})][-1]
    with zipfile.ZipFile(studio.export([first[1], other[1]], tmp_path / "both", films=False)) as file:
        assert {"anagrams-1/5.png", "anagrams-2/5.png"} <= set(file.namelist())  # the same seed, made otherwise
    about = json.loads((tmp_path / "out" / "anagrams-1" / "5.json").read_text())
    assert "--seed 4 --num-samples 2 --batch-size 2" in about["command"] and "inner_circle:8" in about["command"]
    assert "--scheduler euler" in second[0].command and f"--model {model}" in second[0].command


def test_without_gradio_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(studio, "gr", None)
    monkeypatch.setattr(sys, "argv", ["studio"])
    with pytest.raises(SystemExit, match=r"error: the studio needs Gradio: pip install -e .\[studio\]"):
        studio.main()


def test_in_a_browser(model, monkeypatch, chromium):
    pytest.importorskip("gradio")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    page_of_studio, complaints = studio.build(model), []
    _, address, _ = page_of_studio.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
    try:
        page = chromium.new_page(viewport={"width": 390, "height": 800})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
        page.goto(address)
        page.get_by_label("Prompts, one a line").fill("the letter a\nthe letter v\na third")
        page.get_by_role("button", name="Sample").click()
        page.get_by_text("one prompt for each view: got 3 prompts and 2 views").wait_for()
        page.get_by_label("Prompts, one a line").fill("the letter a\nthe letter v")
        page.get_by_role("button", name="Sample").click()
        page.get_by_text("4 pictures. Click those that are to be kept.").wait_for()
        for number, kept in ((2, 1), (7, 2), (3, 1)):  # pictures 1 and 3; 1 again, which is then not kept
            page.locator("#forming button img").nth(number).click()
            page.get_by_text(f"{kept} kept").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        page.get_by_role("button", name="Take them away").click()
        with page.expect_download() as waiting:
            page.locator("a[download]").last.click(timeout=60_000)
        with zipfile.ZipFile(waiting.value.path()) as file:
            assert "anagrams-1/3.mp4" in file.namelist() and "anagrams-1/1.png" not in file.namelist()
        page.close()
    finally:
        page_of_studio.close()
    assert not complaints
