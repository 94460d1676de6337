"""Animations: they begin and end in the views themselves, and files are what players read."""

from __future__ import annotations

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence

from conftest import smooth_picture
from eqldm.anagram.animation import FPS, Frame, animate, cut_out, draw, write_animation
from eqldm.data.samples import tensor_to_picture
from eqldm.views import IDENTITY, parse_view
from eqldm.views.motion import motion


@pytest.mark.parametrize("name", ["rotate_90", "flip", "anti_transpose", "negate", "inner_circle:8", "square_hinge:4", "jigsaw:4:0:16",
                                  "skew:1.5:8", "pixel_permute:16", "flip@jigsaw:2:0:8"])  # fmt: skip
def test_it_begins_as_the_picture_and_ends_as_the_view(name):
    x, view = smooth_picture(), parse_view(name)
    picture, way = tensor_to_picture(x), motion(view)
    cut = cut_out(picture, way)
    for s, wanted in ((0, x), (1, view(x))):
        drawn = np.asarray(draw(cut, way, s, picture.size, 96))[16:80, 16:80].astype(int)
        assert np.abs(drawn - np.asarray(tensor_to_picture(wanted)).astype(int)).max() <= 2, s
    halfway = np.asarray(draw(cut, way, 0.5, picture.size, 96))[16:80, 16:80].astype(int)
    assert np.abs(halfway - np.asarray(picture).astype(int)).mean() > 3


def test_frames_go_through_all_views_and_back():
    x, views = smooth_picture(), [IDENTITY, parse_view("rotate_180"), parse_view("jigsaw:2:0:8")]
    frames = list(animate(x, views, ["a fox", "a mountain", "a lake"]))
    assert len({frame.picture.size for frame in frames}) == 1
    still = [frame for frame in frames if frame.count > 1]
    assert len(still) == 3 and sum(frame.count for frame in frames) == 3 * (36 + 41)
    side, factor = still[0].picture.width, 384 // 64
    for frame, view in zip(still, views):
        middle = frame.picture.crop(((side - 384) // 2, (side - 384) // 2, (side + 384) // 2, (side + 384) // 2))
        small = np.asarray(middle.resize((64, 64), Image.Resampling.BOX)).astype(int)
        assert np.abs(small - np.asarray(tensor_to_picture(view(x))).astype(int)).mean() < 4, (view.name, factor)
    text = [np.asarray(frame.picture)[side:].min() for frame in frames]
    assert text[0] < 60 and max(text) > 200  # the prompt fades, and comes back
    assert len(list(animate(x, views[:1], ["a fox"]))) == 1


def test_a_prompt_that_is_too_long_is_cut():
    (frame,) = animate(smooth_picture(), [IDENTITY], ["an oil painting of " + "a very " * 40 + "old fisherman"])
    bottom = np.asarray(frame.picture)[frame.picture.width :]
    assert bottom.min() < 60 and bottom[:, :4].min() > 240 and bottom[:, -4:].min() > 240


@pytest.fixture
def frames() -> list[Frame]:
    return [Frame(Image.new("RGB", (64, 70), (k * 40, 0, 0)), 3 if k in (0, 3) else 1) for k in range(6)]


def test_mp4(frames, tmp_path):
    write_animation(frames, tmp_path / "a.mp4", "mp4")
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert stream.average_rate == FPS and stream.codec_context.pix_fmt == "yuv420p"
        reds = [int(frame.to_ndarray(format="rgb24")[30, 30, 0]) for frame in file.decode(stream)]
    assert len(reds) == 10 and reds[3] < reds[4] < reds[5] and abs(reds[7] - 120) < 12


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animated_pictures(kind, frames, tmp_path):
    write_animation(frames, tmp_path / f"a.{kind}", kind)
    with Image.open(tmp_path / f"a.{kind}") as file:
        assert file.is_animated and file.info.get("loop") == 0
        found = [(np.asarray(frame.convert("RGB"))[30, 30, 0], frame.info["duration"]) for frame in ImageSequence.Iterator(file)]
    reds, durations = zip(*found)
    assert len(found) == 6 and sum(durations) == pytest.approx(1000 * 10 / FPS, abs=8) and durations[0] == pytest.approx(100, abs=4)
    assert np.abs(np.array(reds).astype(int) - [0, 40, 80, 120, 160, 200]).max() <= 6


def test_another_kind(frames, tmp_path):
    with pytest.raises(ValueError, match="animation 'avi': wanted one of mp4, gif, webp"):
        write_animation(frames, tmp_path / "a.avi", "avi")
    assert not list(tmp_path.iterdir())
