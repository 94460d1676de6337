"""The studio: pictures form, the good ones are kept, and what is taken away is whole. In a real browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from eqldm import studio
from eqldm.anagram.options import Options
from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import tensor_to_picture
from eqldm.views import D4, IDENTITY, parse_view
from eqldm.views.components import parse_components

PROMPTS, VIEWS = ["the letter a", "the letter v"], ["identity", "inner_circle"]
OPTIONS = {"num_inference_steps": 6, "guidance_scale": 3.0}


@pytest.fixture
def model(tiny_model_folder, monkeypatch) -> str:
    """A tiny model, sampled in float32."""
    monkeypatch.setattr(studio, "sampler_of", lambda folder: (Sampler.open(folder, "cpu"), {"vae_hash": "0", "unet_hash": "1"}))
    return str(tiny_model_folder)


def make(model, prompts, asked, seeds, **options):
    return studio.make(model, prompts, asked, seeds, Options(**{**OPTIONS, **options}))


def test_pictures_form_and_end_as_they_would_anyway(model):
    steps = list(make(model, PROMPTS, VIEWS, [4, 5]))
    assert len(steps) == 7 and all(len(step) == 2 for step in steps)  # each step, and the end
    wanted = Sampler.open(model, "cpu")(PROMPTS, [IDENTITY, parse_view("inner_circle:8")], [4, 5], **OPTIONS)
    torch.testing.assert_close(torch.stack([made.x for made in steps[-1]]), wanted)
    distances = [float((step[0].x - wanted[0]).abs().mean()) for step in steps]
    assert distances[-1] == 0 and distances[-2] < distances[0]
    shown = studio.as_shown(steps[-1])
    assert [caption for _, caption in shown][1] == "seed 4, inner_circle:8: the letter v" and shown[0][0].size == (256, 256)


def test_parts_form_too(model):
    """Blended in pixels, and upscaled views: what forms is what `sample.py` would make."""
    *steps, last = make(model, PROMPTS, "hybrid:0.1", [4, 5], blend="pixels")
    sampler, parts = Sampler.open(model, "cpu"), parse_components("hybrid:0.1")
    torch.testing.assert_close(torch.stack([made.x for made in last]), sampler.compose(PROMPTS, parts, [4, 5], blend="pixels", **OPTIONS))
    assert len(steps) == 6
    assert [caption.split(", ")[1] for _, caption in studio.as_shown(last)[:3]] == ["whole", "low: the letter a", "high: the letter v"]
    *steps, last = make(model, PROMPTS, VIEWS, [4], upscale=2)
    assert len(steps) == 9 and steps[0][0].x.shape == (3, 32, 32) and steps[-1][0].x.shape == last[0].x.shape == (3, 64, 64)
    for views in (VIEWS, VIEWS[::-1], ["rotate_90", "rotate_180"]):  # whichever comes first, previews are as the picture lies
        *steps, last = make(model, PROMPTS, views, [4, 5], blend="pixels", num_inference_steps=20)
        shown, end = steps[-1][1].x, last[1].x
        distances = [float((view(shown) - end).square().mean()) for view in D4]
        assert len(steps[-1]) == 2 and min(distances) == distances[0]


def test_it_stops_after_the_step_at_hand(model, monkeypatch):
    stop, calls = threading.Event(), []
    counted = Sampler.latents

    def latents(self, *arguments, **options):
        watch = arguments[4]
        return counted(self, *arguments[:4], lambda z: (calls.append(1), watch(z)), **options)

    monkeypatch.setattr(Sampler, "latents", latents)
    forming = studio.make(model, PROMPTS, VIEWS, [4], Options(num_inference_steps=500), stop)
    next(forming)
    stop.set()
    with pytest.raises(studio.Stopped):
        list(forming)
    assert len(calls) < 400
    with pytest.raises(studio.Stopped):  # stopped while it waited for its turn
        next(studio.make(model, PROMPTS, VIEWS, [4], Options(num_inference_steps=500), stop))
    forming = studio.make(model, PROMPTS, VIEWS, [4], Options(num_inference_steps=500), again := threading.Event())
    next(forming)
    forming.close()  # nobody looks on any more
    assert again.is_set()


@pytest.mark.parametrize(("changes", "message"), [
    ({"asked": ["identity"]}, "one prompt for each view: got 2 prompts and 1 views"),
    ({"asked": "colour"}, "latents know nothing of colours"),
    ({"asked": ["identity", "negate"]}, "was not trained with negation"),
    ({"scheduler": "unipc", "time_travel": 2}, "use ddim or ddpm"),
    ({"model": "nowhere"}, "'nowhere' does not exist"),
    ({"seeds": [-1]}, "--seed -1: wanted 0 to 2"),
    ({"seeds": [2**63]}, "wanted 0 to 2"),
    ({"seeds": []}, "no pictures are asked for"),
    ({"negative_prompt": "-a"}, "prompt '-a' looks like an option of the command"),
])  # fmt: skip
def test_what_does_not_fit_is_told(model, changes, message):
    arguments = {"model": model, "prompts": PROMPTS, "asked": VIEWS, "seeds": [0], **changes}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        next(make(**arguments))


def test_an_error_while_sampling_is_not_lost(model, monkeypatch):
    monkeypatch.setattr(Sampler, "decode", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(make(model, PROMPTS, VIEWS, [0]))


def test_flow_matching_folders_form_too(make_model_folder, tmp_path, monkeypatch):
    """What sample.py samples, the studio does."""
    folder = make_model_folder(tmp_path / "flow", _class_name="FlowMatchEulerDiscreteScheduler", shift=2.0)
    monkeypatch.setattr(studio, "sampler_of", lambda folder: (Sampler.open(folder, "cpu"), {"vae_hash": "0", "unet_hash": "1"}))
    *steps, last = make(str(folder), PROMPTS, VIEWS, [4])
    distances = [float((step[0].x - last[0].x).abs().mean()) for step in steps]
    assert len(steps) == 6 and distances[-1] < distances[0]


def test_a_model_that_changed_is_opened_again(make_model_folder, tmp_path):
    folder = make_model_folder(tmp_path / "model")
    first, found = studio.sampler_of(str(folder)), studio.sampler_of(str(folder))
    assert found[0] is first[0]
    make_model_folder(folder, seed=1)
    assert studio.sampler_of(str(folder))[1] != first[1]
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        studio.sampler_of(str(folder))


def test_every_error_is_told_on_the_page(model, monkeypatch, capsys):
    """With the line that sample.py prints; what was not foreseen, with what it was and where more is."""
    pytest.importorskip("gradio")
    page = studio.build(model)
    functions = {each.fn.__name__: each.fn for each in page.fns.values() if each.fn}
    request = SimpleNamespace(session_hash="x")
    asked = dict(zip(
        ("model", "prompts", "kind", "views", "parts", "seed", "count", "steps", "scale", "negative", "style", "scheduler", "reduction",
         "blend", "travel", "upscale"),
        (model, "\n".join(PROMPTS), studio.VIEWS, "identity\nrotate_180", "hybrid:0.1", 0, 1, 2, 3.0, "", "", studio.OWN, "mean",
         "latents", 1, 1),
    ))  # fmt: skip

    def note(**changes) -> str:
        functions["begin"](request)
        *_, (_, _, text) = functions["sample"](*{**asked, **changes}.values(), request)
        return text

    assert note().startswith("1 pictures. Click")
    for changes, message in (
        ({"model": "nowhere"}, "**error: model folder 'nowhere' does not exist: give a diffusers pipeline folder, such as RUN/model**"),
        ({"seed": None}, "**error: First seed: wanted a number, got none**"),
        ({"prompts": None}, "**error: Prompts: wanted a text, got none**"),
        ({"views": None}, "**error: Views: wanted a text, got none**"),
        ({"parts": None, "kind": studio.PARTS}, "**error: Parts: wanted a text, got none**"),
        ({"kind": None}, "**error: One prompt for each of: wanted a text, got none**"),
        ({"kind": "these"}, "**error: One prompt for each of: got 'these', wanted 'these views' or 'these parts'**"),
        ({"negative": None}, "**error: Negative prompt: wanted a text, got none**"),
        ({"style": 5}, "**error: Style: wanted a text, got 5**"),
        ({"model": " "}, "**error: Model folder: wanted a text, got none**"),
        ({"seed": -1}, "error: --seed -1: wanted 0 to 2^63"),
        ({"prompts": ""}, "error: one prompt for each view: got 0 prompts"),
        ({"views": "identity\npatch_permute:3"}, "patch\\_permute:3' needs sides divisible by 3"),
        ({"kind": studio.PARTS, "parts": "colour"}, "error: components"),
        ({"negative": "x", "scale": 1.0}, "error: negative\\_prompt means nothing without guidance"),
        ({"seed": float("inf")}, "**error: First seed: wanted a whole number, got inf**"),
        ({"model": "/"}, "**error: '/' is no model folder with"),
        ({"model": "x" * 9000}, " ... "),
    ):
        assert message in note(**changes)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(Sampler, "decode", lambda *a, **k: {}["lost"])
    assert "**error: KeyError: 'lost' (not foreseen" in note()
    assert "Traceback" in capsys.readouterr().err
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(studio, "write_picture", lambda *a: (_ for _ in ()).throw(full))
    kept = [SimpleNamespace(x=None, seed=0, settings={}, batch=[0], command="")]
    assert "(No space left on device): make room, or start the studio with TMPDIR=DIR" in functions["take"](kept, False)[1]


@pytest.fixture
def served(model, monkeypatch):
    """A client of a studio of a tiny model."""
    pytest.importorskip("gradio")
    httpx = pytest.importorskip("httpx")  # Gradio's own
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    page = studio.build(model)
    try:
        with httpx.Client(base_url=studio.serve(page), timeout=60, trust_env=False) as client:
            yield client
    finally:
        page.close(verbose=False)


def call(client, name: str, data: list) -> str:
    """What a function of the studio answers last to a program."""
    event = client.post(f"gradio_api/call/{name}", json={"data": data}).raise_for_status().json()["event_id"]
    return client.get(f"gradio_api/call/{name}/{event}").text.rpartition("event: ")[2]


def form_data(model: str, count=1, steps=2, travel=1) -> list:
    """The form of the page, filled in."""
    texts = "\n".join(PROMPTS), studio.VIEWS, "identity\nrotate_180", "hybrid:0.1"
    return [model, *texts, 0, count, steps, 3.0, "", "", "ddim", "mean", "latents", travel, 1]


def test_it_answers_its_own_page_alone(served):
    """Neither a stranger's page under a name that points here (DNS rebinding), nor another page's requests; no files; nothing large."""
    port = served.base_url.port
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert served.get("/", headers={"Host": host}).status_code == 200
    for host in ("evil.example", f"evil.example:{port}", f"localhost.evil.example:{port}", "127.0.0.1.evil.example", "10.0.0.1", "", "a b"):
        answer = served.get("gradio_api/info", headers={"Host": host})
        assert answer.status_code == 400 and answer.headers["content-type"].startswith("text/plain") and f"'{host}'" in answer.text
    preflight = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    assert served.options("gradio_api/call/begin", headers={"Host": "evil.example", **preflight}).status_code == 400
    assert served.options("gradio_api/call/begin", headers=preflight).status_code == 403
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://[", 403), (f"http://localhost:{port}", 200)):
        assert served.post("gradio_api/call/begin", json={"data": []}, headers={"Origin": origin}).status_code == status
        assert served.get("config", headers={"Origin": origin}).status_code == status
    for files in ({"files": b"text"}, {"files": bytes(2**23)}):
        answer = served.post("gradio_api/upload", files=files)
        assert (answer.status_code, answer.text) == (403, "This studio takes no files.\n")
    large = {"data": ["a" * 2**21]}
    assert served.post("gradio_api/call/sample", json=large).status_code == 413
    assert served.post("gradio_api/call/sample", content=iter([json.dumps(large).encode()] * 2)).status_code == 413  # of unknown length
    for path in ("/etc/passwd", __file__, "../../etc/passwd", "http://localhost:1/"):
        assert served.get(f"gradio_api/file={path}").status_code in (403, 404)
    assert "Nothing is kept yet" in call(served, "take", [True])  # it goes on


def test_what_the_page_does_not_offer_is_refused(served, model):
    """Each value that a program may send in place of the page's is told in a note; the studio goes on."""
    asked = form_data(model)
    for place, value, note in (
        (6, 10**9, "Pictures: got 1000000000, wanted 1 to 16"),
        (6, "x", "Pictures: wanted a number, got 'x'"),
        (7, 10**6, "Steps: got 1000000, wanted 1 to 100"),
        (11, "<img src=x onerror=alert(1)>", "Scheduler: got '\\\\<img src=x onerror=alert(1)\\\\>', wanted one of the model's own, ddim"),
        (1, "a" * 10**5, "Prompts: got 100000 characters, wanted at most 10000"),
        (3, "identity\npatch_permute:30000", "is of 30000 x 30000 cells: wanted at most 8 a side"),
        (0, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "Cannot move /etc/passwd"),
    ):
        assert note in call(served, "sample", [*asked[:place], value, *asked[place + 1 :]])
    assert "1 pictures. Click those that are to be kept." in call(served, "sample", asked)


@pytest.mark.slow
def test_a_closed_tab_frees_the_studio(served, model):
    """Who is gone, at the front of the queue or in it, holds up nobody; and the queue has an end."""
    data = form_data(model, count=16, steps=100, travel=4)
    functions = {each["api_name"]: each["id"] for each in served.get("config").json()["dependencies"]}

    def join(session: str) -> int:
        body = {"data": data, "fn_index": functions["sample"], "session_hash": session, "trigger_id": None}
        return served.post("gradio_api/queue/join", json=body).status_code

    for session in ("first", "second"):
        assert join(session) == 200
        with served.stream("GET", "gradio_api/queue/data", params={"session_hash": session}) as messages:
            wanted = '"process_generating"' if session == "first" else '"estimation"'
            next(line for line in messages.iter_lines() if wanted in line)
    for _ in range(studio.MOST_WAITING):
        assert join("third") == 200
    full = [join("third") for _ in range(3)]  # what waited of the first ones may have been dropped
    assert 503 in full
    with served.stream("GET", "gradio_api/queue/data", params={"session_hash": "third"}) as messages:
        next(line for line in messages.iter_lines() if '"process_generating"' in line)


def test_what_is_taken_away(model, tmp_path):
    """A folder for each set of prompts and views; each picture with the command that makes it again."""
    *_, first = make(model, PROMPTS, VIEWS, [4, 5])
    *_, second = make(model, ["picture 1"], ["identity"], [9], scheduler="euler")
    archive = studio.export([first[1], *second], tmp_path / "taken", films=True)
    with zipfile.ZipFile(archive) as file:
        names = {name for name in file.namelist() if not name.endswith("/")}
        file.extractall(tmp_path / "out")
    assert names == {f"anagrams-1/{n}" for n in ("5.png", "5.json", "5.mp4", "index.html")} | {
        f"anagrams-2/{n}" for n in ("9.png", "9.json", "9.mp4", "index.html")
    }
    saved = np.asarray(Image.open(tmp_path / "out" / "anagrams-1" / "5.png"))
    assert np.array_equal(saved, np.asarray(tensor_to_picture(first[1].x)))
    other = [*make(model, PROMPTS, VIEWS, [4, 5], guidance_scale=9.0)][-1]
    with zipfile.ZipFile(studio.export([first[1], other[1]], tmp_path / "both", films=False)) as file:
        assert {"anagrams-1/5.png", "anagrams-2/5.png"} <= set(file.namelist())  # the same seed, made otherwise
    alone = [*make(model, PROMPTS, VIEWS, [5])][-1]
    with zipfile.ZipFile(studio.export([first[1], *alone], tmp_path / "batches", films=False)) as file:
        assert {"anagrams-1/5.png", "anagrams-2/5.png"} <= set(file.namelist())  # the same seed of another batch
    assert first[0].recipe.sampler is None  # what is kept does not keep its model
    about = json.loads((tmp_path / "out" / "anagrams-1" / "5.json").read_text())
    assert about["unet_hash"] == "1" and about["views"] == ["identity", "inner_circle:8"] and "torch" in about["versions"]
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
    compose = Sampler.compose

    def slowly(self, prompts, parts, seeds, held, on_step, watch, **options):  # of 100 steps, so that there is time to stop it
        def watched(z):
            time.sleep(options["num_inference_steps"] // 100 / 5)
            watch(z)

        return compose(self, prompts, parts, seeds, held, on_step, watched, **options)

    monkeypatch.setattr(Sampler, "compose", slowly)
    _, address, _ = page_of_studio.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, share=False)
    try:
        page = chromium.new_page(viewport={"width": 390, "height": 800})
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: complaints.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None)
        page.set_default_timeout(120_000)  # machines may be busy
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
        page.get_by_label("these parts").click()
        page.get_by_role("textbox", name=re.compile("^Parts")).fill("hybrid:0.1")
        page.get_by_role("button", name="Sample").click()
        for state in ("hidden", "visible"):
            page.get_by_text("4 pictures. Click those that are to be kept.").wait_for(state=state)
        page.locator("#forming").get_by_text("seed 0, high: the letter v").wait_for()
        page.get_by_role("button", name="More").click()
        page.get_by_label("number input for Steps").fill("100")
        page.get_by_role("button", name="Sample").click()
        page.get_by_text("4 pictures. Click those that are to be kept.").wait_for(state="hidden")
        page.get_by_role("button", name="Stop").click()
        page.get_by_text(re.compile("^Stopped")).wait_for()
        page.close()
    finally:
        page_of_studio.close()
    assert not complaints


def test_notes_show_what_was_typed_as_it_is(served, chromium):
    """No HTML, Markdown, formula or link of an error is rendered."""
    typed = "<img src=x onerror=document.title=1> **a** $$x^2$$ [b](c) ![d](e) http://f.example www.g.example h@i.example &lt;b&gt; `j`"
    page = chromium.new_page()
    page.set_default_timeout(120_000)
    page.goto(str(served.base_url))
    page.get_by_label("Prompts, one a line").fill(f"{typed}\nthe letter v")  # the first is too long for the model
    page.get_by_role("button", name="Sample").click()
    note = page.locator("#note")
    note.get_by_text("error: ").wait_for()
    assert typed in note.inner_text()
    assert note.locator("img, a, code, em, b, .katex").count() == 0 and page.title() == "eqldm studio"
    page.close()
