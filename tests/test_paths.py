"""Paths in options: `~` is expanded and nothing is refused, in every command and every config."""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path
from typing import Optional, get_type_hints

import pytest
from omegaconf import OmegaConf

import eqldm.config
from eqldm.config import PATHS, STAGES, load_config
from eqldm.evaluation.entries import parse_entry
from eqldm.paths import check_folder, expanded, path_option, place_option

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = [ROOT / "train.py", ROOT / "sample.py", *sorted((ROOT / "data").glob("*.py")), *sorted((ROOT / "eqldm").rglob("*.py"))]
OTHERS = {"models", "--baseline", "--features", "--inputs", "--single-file", "--components", "overrides"}  # more than a path, or none


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_path(home):
    assert expanded("~/runs") == str(home / "runs") and expanded("~") == str(home)
    for text in ("runs/x", "/a b/c", "a~b", "./~", "s3://bucket/~/x", "https://host/x", "pipe:cat ~/{name}", "pixels", "[a]", "x #y"):
        assert expanded(text) == text
    assert path_option("~/a") == home / "a" and place_option("~/a") == str(home / "a")


@pytest.mark.parametrize("text", ["", " ", "a ", " a", "a\n", "a\nb", "a\tb", "\x00", "~nobody-of-that-name/x", "a/" + "x" * 256])
def test_what_is_no_path(text):
    with pytest.raises(ValueError, match="got "):
        expanded(text)
    with pytest.raises(argparse.ArgumentTypeError, match="got "):
        place_option(text)


def options_of(path: Path) -> list[tuple[str, dict[str, str], str]]:
    """The options that a file's parsers take: name, keywords, and all of their text."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    added = [call for call in calls if re.fullmatch(r"(\w+\.add_argument|add)", ast.unparse(call.func)) and call.args]
    return [(ast.literal_eval(call.args[0]), {k.arg: ast.unparse(k.value) for k in call.keywords}, ast.unparse(call)) for call in added]


def test_every_command_takes_its_paths_by_one_type():
    """An option that speaks of a folder, a file, shards or an address is one, unless it is a number, a switch or a choice."""
    found = [(path.name, *option) for path in ENTRY_POINTS for option in options_of(path)]
    places = set()
    for file, name, keywords, text in found:
        kind = keywords.get("type")
        assert kind not in ("Path", "pathlib.Path", "str"), f"{file} {name}: type=path_option"
        named = name.strip("-") in {"out", "data", "model", "config", "vae", "judge"} or re.search(r"FOLDER|FILE|DIR|PATH", text)
        if named and name not in OTHERS and kind not in ("int", "float") and not {"action", "choices"} & keywords.keys():
            assert kind in ("path_option", "place_option"), f"{file} {name}: type=path_option, or place_option where an address will do"
            places.add((file, name))
    assert len(places) > 25, "the options are looked for in the wrong way"


def texts(kind: type, prefix: str = "") -> set[str]:
    found = set()
    for name, hint in get_type_hints(kind).items():
        found |= texts(hint, f"{prefix}{name}.") if hasattr(hint, "__dataclass_fields__") else set()
        found |= {prefix + name} if hint in (str, Optional[str]) else set()
    return found


def test_every_text_of_a_config_is_a_path_or_known_to_be_none():
    assert set.union(*map(texts, STAGES.values())) == {*PATHS, "architecture"}


@pytest.fixture
def load(tmp_path):
    def load(*overrides: str):
        path = tmp_path / "config.yaml"
        path.write_text(
            "stage: diffusion\nrun: {num_steps: 1, dir: runs/x}\ndata: {train: a, val: b}\nvae: pixels\ntrain_text_encoder: true\n"
        )
        return load_config(path, list(overrides))

    return load


def test_paths_of_a_config(load, home):
    config = load("run.dir=~/runs/x", "data.train=~/shards", "data.val=s3://bucket/~", "init=pretrained", "model=~/m")
    assert config.run.dir == str(home / "runs/x") and config.data.train == str(home / "shards") and config.model == str(home / "m")
    assert (config.data.val, config.vae, load().model) == ("s3://bucket/~", "pixels", None)
    assert load("data.val=${data.train}", "data.train=~/s").data.val == str(home / "s")
    for key in ("run.dir", "data.train", "data.val", "vae", "model"):
        for value in ("", "a ", "~nobody-of-that-name"):
            with pytest.raises(ValueError, match=f"^{re.escape(key)}: got "):
                load(f"{key}={value}", *(["init=pretrained"] if key == "model" else []))
    assert OmegaConf.select(OmegaConf.structured(eqldm.config.DiffusionConfig), "model") is None


def test_a_model_of_the_evaluation(home):
    entry = parse_entry("mine=~/m@vae=~/v")
    assert (entry.folder, entry.vae) == (home / "m", home / "v")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    check_folder("--out", tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="run.dir: '.*file' is no folder"):
            check_folder("run.dir", folder)
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    with pytest.raises(NotADirectoryError, match="dangling' is no folder"):
        check_folder("--out", tmp_path / "dangling")


def test_a_folder_that_lets_nobody_write(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    with pytest.raises(PermissionError, match="--out: '.*' does not let you write"):
        check_folder("--out", tmp_path / "new")
