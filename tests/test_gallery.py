"""The gallery: one page, complete in itself; and in a real browser it turns, by pointer, finger and keys."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import smooth_picture
from eqldm.anagram.gallery import Shown, write_gallery, write_gallery_of_parts
from eqldm.data.samples import tensor_to_picture
from eqldm.views import IDENTITY, View, parse_view
from eqldm.views.components import parse_components

PROMPTS = ["a fox", 'a <mountain> & "dusk"', "a lake"]
COMMAND = "python sample.py --prompts 'a fox' --seed {}"


def make_gallery(path: Path, views: list[View], count: int = 5) -> Path:
    write_gallery(path, [Shown(smooth_picture(k), f"seed {k}", COMMAND.format(k)) for k in range(count)], views, PROMPTS[: len(views)])
    return path


def test_a_page_is_complete_in_itself(tmp_path):
    """Pictures are in it, also for those who allow no script; nothing is fetched; what a prompt holds is text."""
    page = make_gallery(tmp_path / "index.html", [IDENTITY, parse_view("jigsaw:2:0:8")]).read_text()
    assert "{{" not in page and not re.findall(r"""(?:src|href)=["'](?!data:)""", page) and "http" not in page
    assert "<mountain>" not in page and page.count("<figure>") == 5
    source = re.findall(r'<img alt="seed 2: a fox" src="data:image/png;base64,([^"]+)"', page)[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(source))))
    assert np.array_equal(shown, np.asarray(tensor_to_picture(smooth_picture(2))))


@pytest.fixture
def opened(chromium, tmp_path):
    """`opened(views, **context)`: the page of a gallery; at the end nothing was fetched and nothing complained."""
    complaints, contexts = [], []

    def call(views, count=5, **context):
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
        page.goto(make_gallery(tmp_path / "index.html", views, count).as_uri())
        page.wait_for_function("document.querySelectorAll('figure.ready').length === document.querySelectorAll('figure').length")
        return page

    yield call
    for context in contexts:
        context.close()
    assert not complaints


def canvas_of(page, number: int) -> np.ndarray:
    """What a picture's canvas shows, [side, side, 4] uint8."""
    url = page.evaluate(f"document.querySelectorAll('figure canvas')[{number}].toDataURL()")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGBA"))


def at_rest(page, number: int, view: int) -> None:
    page.wait_for_function(f"document.querySelectorAll('figure canvas')[{number}].dataset.view === '{view}' && !cards[{number}].moving")


def shows(page, number: int, x: torch.Tensor) -> bool:
    """Whether a canvas shows a picture, in its middle, enlarged."""
    seen = canvas_of(page, number)
    alpha = np.argwhere(seen[..., 3] > 128)
    (top, left), (bottom, right) = alpha.min(0), alpha.max(0) + 1
    inside = Image.fromarray(seen[top:bottom, left:right, :3]).resize(x.shape[-2:][::-1], Image.Resampling.BOX)
    return float(np.abs(np.asarray(inside).astype(int) - np.asarray(tensor_to_picture(x)).astype(int)).mean()) < 6


@pytest.mark.parametrize("name", ["rotate_90", "anti_transpose", "negate", "jigsaw:2:0:8", "square_hinge:4"])
def test_a_picture_turns_under_the_pointer_and_back(opened, name):
    view = parse_view(name)
    page = opened([IDENTITY, view])
    figure, button = page.locator("figure").nth(1), page.locator(".picture").nth(1)
    assert shows(page, 1, smooth_picture(1))
    button.hover()
    page.wait_for_function("cards[1].moving && cards[1].moving.s > 0.4")
    assert not shows(page, 1, smooth_picture(1)) and not shows(page, 1, view(smooth_picture(1)))  # on the way
    at_rest(page, 1, 1)
    assert shows(page, 1, view(smooth_picture(1))) and shows(page, 0, smooth_picture(0))
    page.wait_for_timeout(300)
    assert figure.locator(".prompt").inner_text() == PROMPTS[1] and PROMPTS[1] in button.get_attribute("aria-label")
    page.mouse.move(1, 1)
    at_rest(page, 1, 0)
    assert shows(page, 1, smooth_picture(1))


def test_a_picture_fades_to_its_parts(chromium, tmp_path):
    parts = parse_components("hybrid:0.1")
    write_gallery_of_parts(tmp_path / "parts.html", [Shown(smooth_picture(k), f"seed {k}", "x") for k in range(2)], parts, PROMPTS[:2])
    page = chromium.new_page()
    page.goto((tmp_path / "parts.html").as_uri())
    page.wait_for_selector("figure.ready")
    for k, wanted in enumerate((*(part(smooth_picture(0)).clamp(-1, 1) for part in parts), smooth_picture(0))):
        page.locator(".picture").first.press("Space")
        at_rest(page, 0, (k + 1) % 3)
        assert shows(page, 0, wanted)
    page.close()


def test_keys(opened):
    """Tab reaches a picture, arrows go between them, space turns."""
    views = [IDENTITY, parse_view("flip"), parse_view("rotate_90")]
    page = opened(views, reduced_motion="reduce", count=9)
    page.keyboard.press("Tab")
    columns = page.evaluate("cards.filter(card => card.figure.offsetTop === cards[0].figure.offsetTop).length")
    for key, at in (("ArrowRight", 1), ("ArrowDown", 1 + columns), ("ArrowUp", 1), ("ArrowLeft", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert page.evaluate("cards.findIndex(card => card.button === document.activeElement)") == at
    for k in (1, 2, 0):
        page.keyboard.press("Space")
        at_rest(page, 0, k)
        assert shows(page, 0, views[k](smooth_picture(0)))
        assert page.locator("figure").first.locator(".dots i").nth(k).get_attribute("class") == "on"


def test_no_motion_for_those_who_want_none(opened):
    page = opened([IDENTITY, parse_view("rotate_180")], reduced_motion="reduce")
    page.evaluate("""() => {
        const plain = Card.prototype.show;
        window.drawn = 0;
        Card.prototype.show = function (...all) { window.drawn++; return plain.apply(this, all); };
    }""")
    page.locator(".picture").first.press("Space")
    at_rest(page, 0, 1)
    assert page.evaluate("window.drawn") <= 4  # the end of each leg, and the rest: no frames between


def test_a_finger_on_a_phone(opened):
    page = opened([IDENTITY, parse_view("rotate_180")], viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.locator(".picture").nth(2).tap()
    at_rest(page, 2, 1)
    assert shows(page, 2, smooth_picture(2).flip((1, 2)))
    page.locator(".picture").nth(2).tap()
    at_rest(page, 2, 0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_of_day_and_night(opened, scheme):
    page = opened([IDENTITY, parse_view("flip")], color_scheme=scheme)
    ink, paper = (
        sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}")))) for name in ("color", "backgroundColor")
    )
    assert (ink < paper) == (scheme == "light") and abs(ink - paper) > 400


def test_settings_are_copied_and_pictures_downloaded(opened):
    page = opened([IDENTITY, parse_view("flip")], permissions=["clipboard-read", "clipboard-write"])
    page.locator(".copy").nth(3).click()
    page.wait_for_function("document.getElementById('said').textContent.startsWith('Copied: python sample.py')")
    assert page.evaluate("navigator.clipboard.readText()") == COMMAND.format(3)
    with page.expect_download() as waiting:
        page.locator("a[download]").nth(3).click()
    assert waiting.value.suggested_filename == "seed-3.png"
    assert np.array_equal(np.asarray(Image.open(waiting.value.path())), np.asarray(tensor_to_picture(smooth_picture(3))))
