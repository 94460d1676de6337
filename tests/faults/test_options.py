"""Nonsense in the options of every command, in one process: it ends with one line or as it should, without a traceback or a loss.

All inputs are missing, so that no command comes to its work. Values of options that are paths lie in the test's own folder, where the
process stands, too.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import random
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from eqldm.command import Parser
from eqldm.config import STAGES
from eqldm.paths import path_option, place_option
from test_config import keys

ROOT = Path(__file__).parents[2]
COMMANDS = {  # words with which each stops for want of an input, and for nothing else
    "train.py": ["missing.yaml"],
    "sample.py": ["--model", "missing", "--prompts", "a", "b", "--out", "out"],
    "data/glyphs.py": ["--out", "out", "--fonts", "missing"],
    "data/make_shards.py": ["--pictures", "missing", "--out", "out"],
    "data/encode_latents.py": ["--data", "missing", "--model", "missing", "--out", "out"],
    "eqldm.evaluate": ["missing", "--data", "missing", "--out", "out"],
    "eqldm.evaluation.compare": ["missing", "missing2"],
    "eqldm.export": ["missing", "--out", "out"],
    "eqldm.swap": ["missing", "--vae", "missing", "--out", "out"],
    "eqldm.studio": ["--model", "missing"],
    "eqldm.budget": ["missing.yaml"],
    "eqldm.autoencoder.fold": ["missing", "--data", "missing", "--out", "out"],
}
ABSURD = [
    *("-1", "0", "1", "nan", "inf", "-inf", "1e308", "-1e308", "1e999", "0.5", "99999999999999999999", "-99999999999999999999", "9" * 5000),
    *("", " ", "foo", "[]", "{}", "null", "true", "???", "x" * 5000, "\u0663", "\uff13", "1_0", "caf\udce9", "a\nb"),
    *("=", "-", "--", "@", ":"),
    *("foo=1", "foo@1", "skew:-1e308", "skew:nan", "patch_permute:30000", "patch_permute:99999999999999999999", "jigsaw:30000"),
    *("hybrid:-1", "motion:nan", "cuda:99999999999999999999", "foo:0", "1,2", "foo,foo", "${x}", "%s", "{0}"),
]  # fmt: skip
PLACES = ["missing", "file", "foreign", "link", "dangling", "file/below", "missing/below"]


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder of its own, where the process stands: a file, a folder that holds one, links to it and to nothing."""
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("foreign")
    (tmp_path / "dangling").symlink_to("nothing")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def main_of(command: str):
    """The `main` of an entry point."""
    if not command.endswith(".py"):
        return importlib.import_module(command).main
    specification = importlib.util.spec_from_file_location(f"fuzzed_{Path(command).stem}", ROOT / command)
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    return script.main


@pytest.fixture
def ended(monkeypatch, place):
    """`ended(main, words)`: the one line of the error that it ends with, or "" where there was none."""

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr("tempfile.tempdir", None)  # the studio has one of its own, and its own answers to signals

    def call(main, words: list[str]) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *words])
        code, told = 0, io.StringIO()
        with redirect_stderr(told), redirect_stdout(io.StringIO()):
            try:
                code = main()
            except SystemExit as stop:
                code = stop.code
            finally:
                for number, answer in before.items():
                    signal.signal(number, answer)
        error = told.getvalue()
        if isinstance(code, str):
            error, code = f"{code}\n", 1
        assert code in (None, 0, 1, 2), words
        line = error.splitlines()[-1] if code else ""
        assert line.startswith("error: ") or not code, (words, error)
        assert error.count("error: ") <= 1 and "Traceback" not in error, (words, error)
        assert (place / "foreign" / "thesis.txt").read_text() == (place / "file").read_text() == "mine", words
        assert (os.readlink("link"), os.readlink("dangling")) == ("foreign", "nothing") and os.listdir("foreign") == ["thesis.txt"], words
        return line

    return call


def options_of(main, monkeypatch) -> dict[str, bool]:
    """The options of a command that take a value: whether that is a path."""
    found: list[Parser] = []

    def stop(self, args=None, namespace=None):
        found.append(self)
        raise SystemExit(0)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(Parser, "parse_args", stop)
        patched.setattr(sys, "argv", ["command"])
        main()
    actions = [action for action in found[0]._actions if action.option_strings and action.nargs != 0]
    return {action.option_strings[-1]: action.type in (path_option, place_option) for action in actions}


def without(words: list[str], option: str) -> list[str]:
    """The words, less an option and its values."""
    if option not in words:
        return words
    start = words.index(option)
    end = next((i for i in range(start + 1, len(words)) if words[i].startswith("--")), len(words))
    return words[:start] + words[end:]


@pytest.mark.parametrize("command", COMMANDS)
def test_one_absurd_value(ended, monkeypatch, command):
    main = main_of(command)
    assert ended(main, COMMANDS[command]), "it must stop for want of its inputs"
    options = options_of(main, monkeypatch)
    for option, is_path in options.items():
        for value in PLACES if is_path else ABSURD:
            ended(main, [*without(COMMANDS[command], option), f"{option}={value}"])
    for value in ABSURD[:40]:
        ended(main, [*COMMANDS[command], f"--absurd={value}"])


@pytest.mark.slow
@pytest.mark.fault("several absurd options of a command", tries=3)
def test_several_absurd_values(ended, monkeypatch, seed):
    rng = random.Random(seed)
    for command, words in COMMANDS.items():
        main = main_of(command)
        options = options_of(main, monkeypatch)
        for _ in range(60 if options else 0):
            given, more = words, []
            for option in rng.sample(sorted(options), min(len(options), rng.randint(2, 4))):
                given = without(given, option)
                more += [option, *(rng.choice(PLACES if options[option] else ABSURD) for _ in range(rng.randint(1, 2)))]
            ended(main, [*given, *more])


FILES = {
    "autoencoder": "stage: autoencoder\n",
    "diffusion": "stage: diffusion\nvae: missing\ntrain_text_encoder: true\n",
    "judge": "stage: judge\narchitecture: resnet18\n",
}
NEEDED = {"run.dir": "run", "run.num_steps": "10", "data.train": "missing", "data.val": "missing"}


@pytest.mark.slow
@pytest.mark.fault("several absurd options of a config", tries=3)
@pytest.mark.parametrize("stage", STAGES)
def test_several_absurd_options_of_a_config(ended, place, stage, seed):
    """Of a dry run, which ends with 0, or with a line."""
    rng, main, names = random.Random(seed), main_of("train.py"), keys(STAGES[stage])
    (place / "options.yaml").write_text(FILES[stage])
    for _ in range(60):
        given = {**NEEDED, **{name: rng.choice(ABSURD) for name in rng.sample(names, rng.randint(1, 3))}}
        inner = [f"{name}.{rng.choice(['foo', 'sample_size', 'layers_per_block'])}" for name in given if name in ("architecture", "unet")]
        given |= {name: rng.choice(ABSURD) for name in inner}
        ended(main, ["options.yaml", *(f"{name}={value}" for name, value in given.items()), "dry_run=true"])
