"""Pictures of things: from packages written here, of a few drawings each."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eqldm.data.shards import ShardSet
from runs import contents

icons, sets = importlib.import_module("icons"), importlib.import_module("icon_sets")
rendered = pytest.mark.skipif(importlib.util.find_spec("resvg_py") is None, reason="needs resvg-py")

DISC, BOX = '<circle cx="16" cy="16" r="12" fill="#d02020"/>', '<rect x="4" y="10" width="24" height="8" fill="#2040c0"/>'
HALF = '<path d="M4 4h12v24H4z" fill="#208040"/>'
DRAWN = {"red-apple": DISC, "cat": BOX, "cat-face": DISC, "penguin": HALF}


def package(folder: Path, prefix: str, drawn: dict[str, str], licence: str = "MIT", categories: dict | None = None, **more) -> None:
    """Writes a package as npm pack gives it. more: of its icons.json."""
    files = {
        "icons.json": {
            "prefix": prefix,
            "width": 32,
            "height": 32,
            "icons": {name: {"body": body} for name, body in drawn.items()},
            **more,
        },
        "info.json": {"name": prefix.title(), "author": {"name": "A. Author", "url": "https://example.org"}, "license": {"spdx": licence}},
        "package.json": {"version": "1.2.3"},
        **({"metadata.json": {"categories": categories}} if categories else {}),
    }
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"iconify-json-{prefix}-1.2.3.tgz", "w:gz") as tar:
        for name, value in files.items():
            content, item = json.dumps(value).encode(), tarfile.TarInfo(f"package/{name}")
            item.size = len(content)
            tar.addfile(item, io.BytesIO(content))


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("icons") / "packages"
    kinds = {"Animals & Nature": ["cat", "cat-face", "penguin", "bear"], "Food & Drink": ["red-apple"], "Symbols": ["plus"]}
    package(folder, "noto", {**DRAWN, "bear": DISC, "plus": BOX}, "Apache-2.0", kinds)
    package(folder, "emojione", {"bear-face": BOX, "red-apple": BOX}, "CC-BY-4.0", aliases={"bear": {"parent": "bear-face"}})
    package(folder, "fxemoji", {"cat": DISC, "catside": BOX, "redapple": DISC, "oddity": BOX}, "Apache-2.0")
    package(folder, "streamline-emojis", {"penguin-1": DISC, "penguin-2": BOX, "cat": HALF}, "CC-BY-4.0")
    package(folder, "share", {"cat": BOX}, "CC-BY-SA-4.0")
    return folder


def made(packages: Path, out: Path, *words: object) -> int:
    return icons.main([*map(str, ["--packages", packages, "--out", out, "--size", 32, "--workers", 1, *words])])


# What the sets draw


def test_sets_that_ask_to_share_alike_come_in_by_name_alone(packages):
    used, left_out = sets.read_sets(packages)
    assert left_out == ["share"] and not any(each.share_alike for each in used)
    assert [each.name for each in sets.read_sets(packages, ["share", "noto"])[0]] == ["noto", "share"]
    about = next(each for each in used if each.name == "noto").about()
    assert about == {"name": "noto", "version": "1.2.3", "licence": "Apache-2.0", "title": "Noto", "author": "A. Author",
                     "url": "https://example.org"}  # fmt: skip


def test_the_sets_names_are_brought_together(packages):
    found = {(each.set, each.icon): each.name for each in sets.drawings(sets.read_sets(packages)[0])}
    assert found["emojione", "bear-face"] == "bear"  # by its own alias
    assert found["fxemoji", "cat"] == "cat-face" and found["fxemoji", "catside"] == "cat" and found["fxemoji", "redapple"] == "red-apple"
    assert found["streamline-emojis", "penguin-2"] == "penguin"
    assert ("fxemoji", "oddity") not in found  # of no known kind


def test_things_are_chosen_by_name_kind_and_number_of_drawings(packages):
    found = sets.drawings(sets.read_sets(packages)[0])
    assert {each.name for each in sets.choose(found)} == {"bear", "cat", "cat-face", "penguin", "red-apple"}  # no symbols
    assert {each.name for each in sets.choose(found, min_drawings=3)} == {"cat", "penguin", "red-apple"}
    assert {each.category for each in sets.choose(found, categories=["food"])} == {"food"}
    assert {each.name for each in sets.choose(found, ["plus"])} == {"plus"}
    with pytest.raises(ValueError, match="names without any drawing: unicorn"):
        sets.choose(found, ["cat", "unicorn"])


@pytest.mark.parametrize("name, text", {
    "penguin": "a penguin", "ear-of-corn": "an ear of corn", "french-fries": "french fries", "unicorn": "a unicorn", "bus": "a bus",
    "octopus": "an octopus", "glasses": "glasses", "cactus": "a cactus", "sheaf-of-rice": "a sheaf of rice",
}.items())  # fmt: skip
def test_names_are_spoken_with_their_article(name, text):
    assert icons.spoken(name) == text


def test_every_name_of_the_config_is_written_once():
    names = sets.read_names(Path(__file__).parents[1] / "configs" / "things" / "names.txt")
    assert len(names) == len(set(names)) > 300 and names == [name.lower() for name in names]


def test_colours_are_turned_about_grey():
    grey = np.full(3, 0.4)
    np.testing.assert_allclose(icons.colour_matrix(30, 1.2, 1.0) @ grey, grey)
    np.testing.assert_allclose(icons.colour_matrix(120, 1, 1) @ [1, 0, 0], [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(icons.colour_matrix(0, 0, 1) @ [0.9, 0.3, 0.3], [0.5, 0.5, 0.5])


# What is written


@rendered
def test_a_drawing_is_cut_to_its_ink():
    sprite = icons.render(
        sets.Drawing("cat", "animals", "noto", "cat", sets.svg_of({"left": 0, "top": 0, "width": 32, "height": 32, "body": BOX})), 48
    )
    ink = sprite[..., 3] > 128
    assert sprite.shape == (48, 48, 4) and ink.any(0).sum() == 48 and ink.any(1).sum() == 16
    with pytest.raises(ValueError, match="blank"):
        icons.render(
            sets.Drawing("cat", "animals", "noto", "cat", sets.svg_of({"left": 0, "top": 0, "width": 8, "height": 8, "body": ""})), 16
        )


@rendered
def test_splits_labels_and_captions(packages, tmp_path):
    assert made(packages, tmp_path, "--num-train", 40, "--num-val", 10, "--num-test", 10, "--shard-size", 20) == 0
    of_split = {}
    for split in icons.SPLITS:
        samples = ShardSet.open(tmp_path / split)
        of_split[split] = [json.loads(samples.read(number, "json")) for number in range(len(samples))]
        names = samples.manifest["names_of_labels"]
        assert all(names[about["label"]] == about["name"] for about in of_split[split])
        captions = [samples.read(number, "txt").decode() for number in range(len(samples))]
        assert all(any(word in caption for word in ("apple", "cat", "penguin", "bear")) for caption in captions)
        used = {each["name"] for each in samples.manifest["sources"]}
        assert used == ({"streamline-emojis"} if split == "test" else {"noto", "emojione", "fxemoji"})
        assert {about["set"] for about in of_split[split]} <= used
    counts = np.bincount([about["label"] for about in of_split["train"]])
    assert counts.max() - counts[counts > 0].min() == 0  # each block of five shows each thing once


@rendered
def test_bytes_depend_on_the_seed_but_not_on_workers(packages, tmp_path):
    words = ("--split", "train", "--num-train", 30, "--names")
    names = tmp_path / "names"
    names.write_text("cat\nred apple  # two words\n")
    for folder, more in {"a": ("--workers", 2), "b": (), "c": ("--seed", 1)}.items():
        assert made(packages, tmp_path / folder, *words, names, "--shard-size", 10, *more) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")


@rendered
def test_things_stand_upright_inside_the_picture_and_out_from_its_background(packages):
    half = next(each for each in sets.drawings(sets.read_sets(packages)[0]) if each.name == "penguin" and each.set == "noto")
    sprite = icons.render(half, 128)
    for index in range(20):
        picture, how = icons.draw_thing(icons.sample_rng(0, "train", index), half, sprite, 64)
        placed = icons.place(sprite, how, 64)[..., 3]
        rows, columns = placed.max(1) > 0.5, placed.max(0) > 0.5
        assert not any(edge.max() > 0.3 for edge in (placed[0], placed[-1], placed[:, 0], placed[:, -1]))
        assert max(rows.sum(), columns.sum()) / 64 == pytest.approx(how["fill"], abs=0.08) and rows.sum() > columns.sum()
        corner, middle = picture[0, 0].astype(float), picture[placed > 0.99].astype(float).mean(0)
        assert np.linalg.norm(corner - middle) > 40


@rendered
def test_a_turn_is_counter_clockwise():
    sprite = np.zeros((64, 64, 4), np.uint8)
    sprite[:, 24:40] = 255
    how = {"fill": 0.8, "rotation_degrees": 10.0, "shift": [0, 0], "mirrored": False}
    alpha = icons.place(sprite, how, 32)[..., 3]
    top, bottom = (np.average(np.arange(32), weights=alpha[rows].sum(0)) for rows in (slice(6, 10), slice(22, 26)))
    assert top < bottom - 2  # the upper end moves to the left
    mirrored = icons.place(sprite, {**how, "mirrored": True}, 32)[..., 3]
    assert np.abs(mirrored - alpha).max() < 0.05  # the drawing is mirrored, and then turned


@rendered
def test_a_second_run_does_nothing_and_others_are_refused(packages, tmp_path, capsys):
    words = ("--split", "val", "--num-val", 10)
    assert made(packages, tmp_path, *words) == 0
    before = contents(tmp_path)
    assert made(packages, tmp_path, *words) == 0 and contents(tmp_path) == before
    assert made(packages, tmp_path, *words, "--variation", 0) == 2
    assert "holds shards made with other options: variation (there 1.0, now 0.0)" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (("--sets", "nonsense"), "--sets names nonsense"), (("--holdout-sets", "nonsense"), "--holdout-sets names nonsense"),
    (("--size", 12), "a multiple of 8"), (("--min-drawings", 50), "no drawing is left"),
    (("--split", "test", "--sets", "noto"), "no drawing is left for the test split"),
])  # fmt: skip
def test_errors(packages, tmp_path, capsys, words, message):
    words = dict(zip(words[::2], words[1::2]))
    assert made(packages, tmp_path / "out", *(word for pair in words.items() for word in pair)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_other_files_are_no_packages(tmp_path, capsys):
    (tmp_path / "a.tgz").write_bytes(b"nonsense")
    assert made(tmp_path, tmp_path / "out") == 2
    assert "is no package of icons" in capsys.readouterr().err
    (tmp_path / "a.tgz").unlink()
    assert made(tmp_path, tmp_path / "out") == 2
    assert "holds no .tgz" in capsys.readouterr().err


def test_without_resvg_it_says_what_to_install(packages, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(importlib.sys.modules, "resvg_py", None)
    assert made(packages, tmp_path / "out") == 2
    assert "pip install resvg-py" in capsys.readouterr().err


@rendered
def test_a_picture_that_is_read_back_is_the_one_that_was_drawn(packages, tmp_path):
    made(packages, tmp_path, "--split", "train", "--num-train", 5)
    samples = ShardSet.open(tmp_path / "train")
    picture = Image.open(io.BytesIO(samples.read(0, "png")))
    assert picture.size == (32, 32) and picture.mode == "RGB"
