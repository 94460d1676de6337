"""What YAML makes of an option, and nobody meant, is refused by the option's name."""

from __future__ import annotations

import re

import pytest

from eqldm.config import load_config
from eqldm.kinds import check_given_once

MINIMAL = "stage: diffusion\ndata: {train: a, val: b}\nrun: {dir: runs/x, num_steps: 10}\nvae: v\ntrain_text_encoder: true\n"


@pytest.fixture
def refused(tmp_path):
    """`refused(text, *overrides)`: the one line of the error that a file of that text, and the overrides, give."""

    def call(text: str | bytes, *overrides: str) -> str:
        path = tmp_path / "options.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises((ValueError, OSError)) as info:
            load_config(path, overrides)
        assert "\n" not in str(info.value) and len(str(info.value)) < 1000
        return str(info.value)

    return call


@pytest.mark.parametrize(("old", "new", "message"), [
    ("dir: runs/x", "dir: yes", "run.dir: got True, which YAML reads as true or false: wanted a text, so put it in quotes"),
    ("dir: runs/x", "dir: 12", "run.dir: got 12, which YAML reads as a number"),
    ("dir: runs/x", "dir: 1.5", "run.dir: got 1.5, which YAML reads as a number"),
    ("train: a", "train: [a]", "data.train: got ['a'], which YAML reads as a list"),
    ("vae: v", "vae: no", "vae: got False"),
    ("vae: v", "vae: v\nsample_prompts: [a, yes]", "sample_prompts: got True"),
    ("vae: v", "vae: v\nlora: {targets: [3]}", "lora.targets: got 3"),
    ("num_steps: 10", "num_steps: 010", "run.num_steps: got 010, which YAML reads to the base of 8"),
    ("num_steps: 10", "num_steps: 1:30", "run.num_steps: got 1:30, which YAML reads to the base of 60"),
    ("num_steps: 10", "num_steps: '\uff11\uff10'", "run.num_steps: got '\uff11\uff10', wanted a number in digits 0 to 9"),
    ("num_steps: 10", "num_steps: " + "9" * 6000, "run.num_steps: got a number of 6000 digits"),
    ("num_steps: 10", "num_steps: 10, compile: 2", "run.compile: got 2, wanted true or false"),
    ("num_steps: 10", "num_steps: 10, num_steps: 11", "found duplicate key num_steps"),
    ("vae: v", "vae: v\nvae: w", "found duplicate key vae"),
    ("dir: runs/x", "dir: '${oc.env:HOME}'", "run.dir: got '${oc.env:HOME}', wanted ${...} with the name of another option alone"),
    ("dir: runs/x", "dir: 'runs/${oc.env:HOME,x}'", "run.dir: got "),
    ("vae: v", "vae: v\nunet: {sample_size: '${oc.decode:${oc.env:HOME}}'}", "unet.sample_size: got "),
    ("vae: v", "vae: v\nsample_prompts: [a, '${oc.env:HOME}']", "sample_prompts: got "),
    ("vae: v", "vae: v\noptimiser: {learning_rate: 1}", "Did you mean: 'optimizer'?"),
])  # fmt: skip
def test_a_file(refused, old, new, message):
    assert message in refused(MINIMAL.replace(old, new))


@pytest.mark.parametrize(("override", "message"), [
    ("run.dir=${oc.env:HOME}", "run.dir: got '${oc.env:HOME}', wanted ${...}"),
    ("run={dir: yes}", "run.dir: got True"),
    ("run[dir]=3", "run.dir: got 3"),
    ("run.num_steps=010", "run.num_steps: got 010, which YAML reads to the base of 8"),
    ("run={num_steps: 1:30}", "run.num_steps: got 1:30"),
    ("run.num_steps=\u0663", "run.num_steps: got '\u0663'"),
    ("run.compile=1", "run.compile: got 1, wanted true or false"),
    ("unet={a: " + "[" * 3000 + "]" * 3000 + "}", "unet: lists within lists"),
    ("=3", "override '=3' has no '=', or nothing before it"),
    ("x" * 9999 + "=3", "Key 'xxx"),
    ("x" * 9999, "has no '='"),
])  # fmt: skip
def test_an_override(refused, override, message):
    assert message in refused(MINIMAL, override)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(("text", "message"), [
    (MINIMAL + LAUGHS, "EXPANDED_NODES"),
    (MINIMAL + "unet: &a {b: *a}\n", "recursive aliases"),
    (MINIMAL + "unet: {a: " + "[" * 9000 + "]" * 9000 + "}\n", "lists within lists"),
    (MINIMAL + "unet: {a: !!python/object/apply:os.getcwd []}\n", "could not determine a constructor"),
    ("3", "holds one value, wanted options by name"),
    ("", "stage is None"),
    ("- a\n", "stage is None"),
    (bytes(range(256)) * 4, "is no UTF-8"),
    (b"\0\0", "is no YAML"),
    (MINIMAL + "#" * 10**6, "bytes: wanted options"),
], ids=["laughs", "itself", "deep", "code", "number", "empty", "list", "binary", "nul", "large"])  # fmt: skip
def test_what_is_no_config(refused, text, message):
    assert message in refused(text)


def test_a_folder_and_what_may_be_meant(refused, tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder: give the YAML file in it"):
        load_config(tmp_path)
    path = tmp_path / "options.yaml"
    path.write_text(MINIMAL.replace("b}", "'${data.train}'}").replace("10}", "0x10, compile: on}") + "sample_prompts: ['yes', a b]\n")
    config = load_config(path, ["run.dir=yes", "vae=007", "data.batch_size=1_0"])
    assert (config.data.val, config.run.num_steps, config.run.compile, config.data.batch_size) == ("a", 16, True, 10)
    assert (config.run.dir, config.vae, config.sample_prompts) == ("yes", "007", ["yes", "a b"])


def test_an_option_given_twice():
    check_given_once(["a=1", "b=1", "a=1", "c"])
    with pytest.raises(ValueError, match=re.escape("a: given twice, 1 and 2: give it once")):
        check_given_once(["a=1", "b=1", "a=2"])
