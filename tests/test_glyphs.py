"""The glyph pictures: deterministic, legible, and split without leaks."""

from __future__ import annotations

import errno
import importlib
import io
import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eqldm.data.making import UNFINISHED, make_folder
from eqldm.data.shards import MANIFEST, ShardSet, read_manifest, write_shard
from runs import contents

glyphs = importlib.import_module("glyphs")


@pytest.fixture(scope="module")
def faces() -> dict[str, Path]:
    return {face.stem: face for face in glyphs.find_faces()[0]}


def make(out: Path, split: str = "train", num: int = 60, **options) -> dict:
    return glyphs.make_split(out, split, num, **{"size": 32, "shard_size": 20, **options})


@pytest.mark.parametrize("split", glyphs.SPLITS)
def test_splits_and_their_faces(tmp_path, split):
    manifest = make(tmp_path, split)
    samples = ShardSet.open(tmp_path / split)
    abouts = [json.loads(samples.read(number, "json")) for number in range(len(samples))]
    held_out = set(glyphs.HELD_OUT_FACES)
    used = {about["face"] for about in abouts}
    assert used <= held_out if split == "test" else not used & held_out
    assert set(manifest["generator"]["held_out_faces"]) == held_out
    assert manifest["kind"] == "pictures" and manifest["image_size"] == 32 and manifest["count"] == 60
    counts = np.bincount([about["label"] for about in abouts], minlength=26)
    assert counts.min() == 2 and counts.max() == 3  # balanced as far as 60 letters can be


def test_splits_share_no_seed():
    streams = [
        glyphs.sample_rng(seed, split, index).integers(0, 2**63, 2).tobytes()
        for seed, split, index in itertools.product(range(3), glyphs.SPLITS, range(200))
    ]
    streams += [
        np.random.default_rng([seed, split, block, 1]).integers(0, 2**63, 2).tobytes()
        for seed, split, block in itertools.product(range(3), range(3), range(200))
    ]
    assert len(set(streams)) == len(streams)


def test_bytes_depend_on_the_seed_but_not_on_workers(tmp_path):
    make(tmp_path / "one", workers=1)
    make(tmp_path / "two", workers=2)
    assert contents(tmp_path / "one" / "train") == contents(tmp_path / "two" / "train")
    make(tmp_path / "other", seed=1)
    first, other = read_manifest(tmp_path / "one" / "train"), read_manifest(tmp_path / "other" / "train")
    assert {e["sha256"] for e in first["shards"]}.isdisjoint(e["sha256"] for e in other["shards"])


def test_stock_webdataset_reads_them(tmp_path):
    make(tmp_path, num=45)
    urls = sorted(str(path) for path in (tmp_path / "train").glob("*.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("png", "txt", "json"))
    assert len(urls) == 3 and len(samples) == 45
    for picture, caption, about in samples:
        assert picture.size == (32, 32) and picture.mode == "RGB"
        letter, foreground, background = about["letter"], about["foreground"], about["background"]
        article = {name: "an" if name == "orange" else "a" for name in glyphs.COLOURS}
        assert glyphs.LETTERS[about["label"]] == letter
        first, second = f"{article[foreground]} {foreground}", f"{article[background]} {background}"
        assert caption in (f"the letter {letter}", f"{first} letter {letter} on {second} background")
    named = sum("background" in caption for _, caption, _ in samples)
    assert 10 < named < 35


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 10**6))
def test_colours_have_contrast(seed, index):
    colours = glyphs.draw_colours(glyphs.sample_rng(seed, "train", index))
    assert colours["foreground"] != colours["background"]
    assert glyphs.contrast(colours["foreground_rgb"], colours["background_rgb"]) >= glyphs.MIN_CONTRAST


def test_contrast_against_closed_form():
    assert glyphs.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert glyphs.contrast((255, 255, 255), (119, 119, 119)) == pytest.approx(4.48, abs=0.01)  # WCAG's known grey
    assert glyphs.contrast((9, 80, 200), (9, 80, 200)) == 1


def ink_of(picture: np.ndarray, about: dict) -> np.ndarray:
    """How far each pixel lies on the way from the background's colour to the letter's: [H, W], 0 to 1."""
    low, high = (np.array(about[key], float) for key in ("background_rgb", "foreground_rgb"))
    return (picture - low) @ (high - low) / ((high - low) @ (high - low))


def test_letters_fill_the_picture_and_stay_inside(faces):
    for index in range(200):
        rng = glyphs.sample_rng(3, "train", index)
        picture, about = glyphs.draw_glyph(rng, glyphs.LETTERS[index % 26], faces[glyphs.FACES[index % len(faces)]], 64)
        ink = ink_of(picture, about) > 0.5
        edge = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
        longer = max(np.ptp(np.flatnonzero(ink.any(0))), np.ptp(np.flatnonzero(ink.any(1)))) + 1
        assert not edge.any() and 0.45 * 64 <= longer <= 0.95 * 64, (index, about)
        assert abs(about["rotation_degrees"]) <= glyphs.MAX_ROTATION_DEGREES <= 10


def test_variation_scales_all_but_the_colours(faces):
    drawn = [glyphs.draw_glyph(np.random.default_rng(seed), "R", faces["DejaVuSans"], 64, 0.0)[1] for seed in (1, 2)]
    shapes = [{name: about[name] for name in ("fill", "rotation_degrees", "slant", "stretch", "stroke", "shift")} for about in drawn]
    assert shapes[0] == shapes[1] and shapes[0]["rotation_degrees"] == 0
    assert drawn[0]["foreground_rgb"] != drawn[1]["foreground_rgb"]
    fills = [glyphs.draw_glyph(np.random.default_rng(seed), "R", faces["DejaVuSans"], 64, 0.5)[1]["fill"] for seed in range(50)]
    low, high = glyphs.FILL
    assert max(fills) - min(fills) < 0.5 * (high - low)


def test_train_faces_are_the_only_ones_but_for_the_test_split(tmp_path):
    chosen = {"train_faces": ["DejaVuSans", "DejaVuSerif"], "variation": 0.3}
    faces = {split: glyphs.make_split(tmp_path, split, 4, **chosen)["generator"]["faces"] for split in glyphs.SPLITS}
    assert faces["train"] == faces["val"] == ["DejaVuSans", "DejaVuSerif"]
    assert faces["test"] == list(glyphs.HELD_OUT_FACES)
    for wrong in ("Nosuch", glyphs.HELD_OUT_FACES[0]):
        with pytest.raises(ValueError, match="--train-faces names unknown or held-out faces"):
            glyphs.make_split(tmp_path / "other", "train", 4, train_faces=[wrong])


def test_further_faces_can_be_held_out_and_are_then_tested(tmp_path):
    """As the judges' data are made (configs/glyphs/judges.sh): each judge has faces that it alone never sees."""
    kept = ["DejaVuSans", "cmr10"]
    faces = {split: glyphs.make_split(tmp_path, split, 4, holdout_fonts=kept)["generator"]["faces"] for split in glyphs.SPLITS}
    assert set(faces["test"]) == {*glyphs.HELD_OUT_FACES, *kept}
    assert faces["train"] == faces["val"] == [face for face in glyphs.FACES if face not in faces["test"]]


def test_the_script_of_the_judges_names_faces_and_configs_that_there_are():
    folder = Path(__file__).parents[1] / "configs" / "glyphs"
    calls = re.findall(r"judge ([abcd]) (\d+) (\w+) (.*) ;;", (folder / "judges.sh").read_text())
    unseen = [faces.split() for *_, faces in calls]
    assert len({seed for _, seed, *_ in calls}) == len(calls) == 4 and all(
        (folder / f"{config}.yaml").is_file() for _, _, config, _ in calls
    )
    assert all(set(faces) < set(glyphs.FACES) for faces in unseen) and len(set(sum(unseen, []))) == len(sum(unseen, []))


def test_chosen_colours_are_the_only_ones(tmp_path):
    make(tmp_path, num=40, colours=["blue", "yellow", "white"])
    samples = ShardSet.open(tmp_path / "train")
    abouts = [json.loads(samples.read(number, "json")) for number in range(len(samples))]
    assert {about[place] for about in abouts for place in ("foreground", "background")} == {"blue", "yellow", "white"}
    for wrong, message in ((["blue", "mauve"], "unknown colours: mauve"), (["yellow", "white"], "enough contrast"), (["red"], "contrast")):
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "other", colours=wrong)


def test_positive_rotation_is_counter_clockwise(faces):
    mask = glyphs.letter_mask(faces["DejaVuSans"], "I", 150)
    how = {"fill": 0.8, "slant": 0, "stretch": 1, "shift": [0, 0], "warp": [[0, 0, 0, 0]] * 2}
    leaning = np.asarray(glyphs.place_letter(mask, {**how, "rotation_degrees": 10}, 64), float)
    centre = (leaning @ np.arange(64))[[12, 52]] / leaning.sum(1)[[12, 52]]
    assert math.degrees(math.atan((centre[1] - centre[0]) / 40)) == pytest.approx(10, abs=0.7)


def test_letters_are_legible(faces):
    """A nearest neighbour on 12 x 12 crops of the ink tells train letters, and letters of faces it never saw."""

    def crops(split: str, num: int) -> tuple[np.ndarray, np.ndarray]:
        used = [face for name, face in faces.items() if (name in glyphs.HELD_OUT_FACES) == (split == "test")]
        found, labels = [], []
        for index in range(num):
            sample = glyphs.draw_sample(index, split, 0, used, 64)
            ink = Image.fromarray(
                (ink_of(np.asarray(Image.open(io.BytesIO(sample["png"]))), sample["json"]) * 255).clip(0, 255).astype(np.uint8)
            )
            found.append(np.asarray(ink.crop(ink.point(lambda v: 255 * (v > 128)).getbbox()).resize((12, 12)), float).ravel())
            labels.append(sample["json"]["label"])
        return np.stack(found), np.array(labels)

    known, labels = crops("train", 1560)
    for split, wanted in (("val", 0.9), ("test", 0.85)):
        seen, truth = crops(split, 208)
        nearest = ((seen[:, None] - known[None]) ** 2).sum(-1).argmin(1)
        assert (labels[nearest] == truth).mean() >= wanted, split


def test_faces_draw_all_capitals_and_others_are_told(faces, tmp_path):
    assert list(faces) == list(glyphs.FACES) and set(glyphs.HELD_OUT_FACES) < set(faces)
    folder = faces["cmr10"].parent
    assert "alike" in glyphs.why_unfit(folder / "LastResortHE-Regular.ttf")
    assert "nothing" in glyphs.why_unfit(folder / "STIXSizOneSymReg.ttf")
    (tmp_path / "Broken.ttf").write_bytes(b"no font")
    assert "cannot be read" in glyphs.why_unfit(tmp_path / "Broken.ttf")


def test_user_fonts(tmp_path, faces):
    fonts = tmp_path / "fonts"
    fonts.mkdir()
    for name, source in (("Mine", "cmb10"), ("Kept", "DejaVuSans")):
        (fonts / f"{name}.ttf").write_bytes(faces[source].read_bytes())
    (fonts / "Broken.ttf").write_bytes(b"no font")
    train = make(tmp_path, num=5, fonts=[fonts], holdout_fonts=["Kept"])
    test = make(tmp_path, "test", num=5, fonts=[fonts], holdout_fonts=["Kept"])
    assert "Mine" in train["generator"]["faces"] and "Kept" not in train["generator"]["faces"]
    assert test["generator"]["faces"] == [*glyphs.HELD_OUT_FACES, "Kept"]
    assert [item["file"] for item in train["skipped"]] == ["Broken.ttf"]
    with pytest.raises(ValueError, match="unknown faces: Nowhere"):
        make(tmp_path, num=5, fonts=[fonts], holdout_fonts=["Nowhere"])
    (fonts / "cmr10.ttf").write_bytes(faces["cmr10"].read_bytes())
    with pytest.raises(ValueError, match="two faces are named 'cmr10'"):
        make(tmp_path, num=5, fonts=[fonts])


def test_second_run_does_nothing_and_other_options_are_refused(tmp_path):
    make(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    make(tmp_path, workers=2)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "train").iterdir()}
    with pytest.raises(ValueError, match=r"other options: num \(there 60, now 30\).*--overwrite"):
        make(tmp_path, num=30)
    assert make(tmp_path, num=30, overwrite=True)["count"] == 30
    names = sorted(path.name for path in (tmp_path / "train").iterdir())
    assert names == ["index", MANIFEST, "train-000000.tar", "train-000001.tar"]


def test_foreign_tars_are_left_alone(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.tar").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"did not make: mine.tar"):
        make(tmp_path, overwrite=True)


def _write_until_full(job: tuple[Path, int]) -> dict:
    path, number = job
    if (path.parent / "full").exists() and number >= 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    return write_shard(path, [{"__key__": str(number), "txt": f"{number}"}])


@pytest.mark.parametrize("workers", [1, 2])
def test_full_disk_keeps_finished_shards_and_the_next_run_resumes(tmp_path, workers):
    jobs = {f"{number}.tar": (tmp_path / f"{number}.tar", number) for number in range(4)}
    about = {"kind": "pictures", "generator": {"name": "numbers"}}
    (tmp_path / "full").touch()
    with pytest.raises(OSError, match=f"no space left in '{tmp_path}', after 2 of 4 shards"):
        make_folder(tmp_path, jobs, _write_until_full, about, workers=workers)
    assert sorted(contents(tmp_path)) == ["0.tar", "1.tar", "full", UNFINISHED]
    (tmp_path / "full").unlink()
    kept = (tmp_path / "1.tar").stat().st_mtime_ns
    with pytest.raises(ValueError, match="other options"):
        make_folder(tmp_path, jobs, _write_until_full, {"generator": {"name": "letters"}})
    manifest = make_folder(tmp_path, jobs, _write_until_full, about)
    assert kept == (tmp_path / "1.tar").stat().st_mtime_ns
    assert [entry["name"] for entry in manifest["shards"]] == list(jobs) and len(ShardSet.open(tmp_path)) == 4
    assert not (tmp_path / UNFINISHED).exists()


def test_interrupted_split_equals_an_uninterrupted_one(tmp_path):
    make(tmp_path / "whole")
    make(tmp_path / "cut")
    folder = tmp_path / "cut" / "train"
    manifest = json.loads((folder / MANIFEST).read_text())
    names = [entry["name"] for entry in manifest["shards"]]
    # the state after a kill: one shard recorded, one whole but not recorded, one never begun
    (folder / UNFINISHED).write_text(json.dumps({"generator": manifest["generator"], "names": names, "shards": manifest["shards"][:1]}))
    (folder / MANIFEST).unlink()
    (folder / names[2]).unlink()
    make(tmp_path / "cut")
    assert contents(folder) == contents(tmp_path / "whole" / "train")


def test_errors(tmp_path, capsys):
    for options, message in [
        ({"size": 60}, "multiple of 8, got 60"),
        ({"num": 0}, "at least 1, got 0"),
        ({"seed": -1}, "seed must be"),
        ({"split": "dev"}, "got 'dev'"),
        ({"workers": 0}, "workers must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="holds no fonts"):
        make(tmp_path, fonts=[tmp_path])
    assert glyphs.main(["--out", str(tmp_path), "--size", "60"]) == 2
    assert capsys.readouterr().err == "error: size must be a multiple of 8, got 60: the autoencoder divides it by 8\n"


def test_command_line(tmp_path):
    arguments = ["--out", str(tmp_path), "--num-train", "30", "--num-val", "3", "--size", "16", "--workers", "1"]
    assert glyphs.main([*arguments, "--split", "train", "val"]) == 0
    assert {path.name: read_manifest(path)["count"] for path in tmp_path.iterdir()} == {"train": 30, "val": 3}
