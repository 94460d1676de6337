"""A run folder whose files are damaged, or of another run, says which and what to do; one that is copied or moved goes on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from eqldm.autoencoder.module import train_autoencoder
from eqldm.config import load_config
from eqldm.run_model import export_checkpoint, opened
from eqldm.training.checkpoints import LAST, checkpoint_step, read_checkpoint
from eqldm.training.identity import ID, INPUTS_FILE


@pytest.fixture(scope="module")
def made(make_picture_shards, write_tiny_options, tmp_path_factory) -> Path:
    """A folder with tiny.yaml and two runs of it, of two steps, that differ in their weights alone: `a` and `b`."""
    folder = tmp_path_factory.mktemp("made")
    shards = make_picture_shards(folder / "shards", count=8, size=16)
    options = write_tiny_options(folder / "tiny.yaml", shards, num_steps=2, val_every=2)
    for name in "ab":
        train_autoencoder(load_config(options, [f"run.dir={folder / name}"]))
    return folder


@pytest.fixture
def run(made, tmp_path) -> Path:
    """A copy of the run `a`."""
    shutil.copytree(made / "a", tmp_path / "run")
    return tmp_path / "run"


def go_on(made: Path, run: Path, *overrides: str) -> Path:
    return train_autoencoder(load_config(made / "tiny.yaml", [f"run.dir={run}", "run.num_steps=3", *overrides]))


def test_a_checkpoint_of_another_run_is_refused_and_a_copied_run_goes_on(made, run, tmp_path):
    ids = [json.loads((made / name / INPUTS_FILE).read_text())[ID] for name in "ab"]
    assert ids[0] != ids[1] and read_checkpoint(run / LAST)[ID]["id"] == ids[0]
    own = (run / LAST).read_bytes()
    shutil.copyfile(made / "b" / LAST, run / LAST)
    words = rf"last.ckpt' is of another run \(id {ids[1]}\) than its folder \(id {ids[0]} in inputs.json\): put back its own; or"
    with pytest.raises(ValueError, match=words):
        go_on(made, run)
    with pytest.raises(ValueError, match=words):
        export_checkpoint(run, None, tmp_path / "model")
    (run / LAST).write_bytes(own)
    go_on(made, run.rename(tmp_path / "moved"))
    assert checkpoint_step(tmp_path / "moved" / LAST) == 3 and read_checkpoint(tmp_path / "moved" / LAST)[ID]["id"] == ids[0]


def test_a_run_of_before_there_were_ids_goes_on(made, run, tmp_path):
    inputs, checkpoint = json.loads((run / INPUTS_FILE).read_text()), read_checkpoint(run / LAST)
    del checkpoint[ID]
    torch.save(checkpoint, run / LAST)
    with pytest.raises(ValueError, match=r"is of another run \(id None\)"):  # in a folder that has one from its beginning
        go_on(made, run)
    del inputs[ID]
    (run / INPUTS_FILE).write_text(json.dumps(inputs))
    go_on(made, run)
    assert read_checkpoint(run / LAST)[ID]["id"] is None
    go_on(made, run, "run.num_steps=4")
    shutil.copyfile(made / "b" / LAST, run / LAST)
    with pytest.raises(ValueError, match=r"is of another run \(id [0-9a-f]+\) than its folder \(id None"):
        go_on(made, run, "run.num_steps=4")


def test_a_config_cut_at_any_line_is_refused_or_means_the_same(made, run, tmp_path):
    """What is cut may be what does not matter to the model, such as run.log_every."""
    text = (run / "config.yaml").read_text()
    lines = text.splitlines(keepends=True)
    refused = 0
    for end in range(0, len(lines), 3):
        for cut in ("".join(lines[:end]), "".join(lines[:end]) + lines[end][: len(lines[end]) // 2]):
            (run / "config.yaml").write_text(cut)
            for use in (lambda: go_on(made, run, "run.num_steps=2"), lambda: export_checkpoint(run, 2, tmp_path / "never")):
                with pytest.raises((ValueError, OSError), match="config.yaml") as caught:
                    use()
                assert "\n" not in str(caught.value)
                refused += 1
            if "data:" in cut:
                break
        if refused > 12:
            break
    (run / "config.yaml").write_text(text.replace("learning_rate: 0.001", "learning_rate: 0.003"))
    with pytest.raises(
        ValueError, match=r"config.yaml' has changed, or was cut, .*: optimizer.learning_rate was 0.001, is 0.003. Put it back"
    ):
        export_checkpoint(run, 2, tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"stage: [", b"- 1", b"\0" * 50, None], ids=repr)
@pytest.mark.parametrize("name", ["config.yaml", INPUTS_FILE])
def test_a_damaged_record_is_named(made, run, tmp_path, name, content):
    (run / name).unlink()
    (run / name).write_bytes(content) if content is not None else (run / name).mkdir()
    for use in (lambda: go_on(made, run), lambda: export_checkpoint(run, 2, tmp_path / "never")):
        with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")) as caught:
            use()
        assert "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("content", [b"", b"[]", b"\0", b'{"num_steps": []}'], ids=repr)
def test_what_only_notes_an_end_or_a_fact_does_not_end_a_run(made, run, capsys, content):
    folder = opened(f"{run}@2")
    for path in (run / "done.json", run / "git.txt", folder / "checkpoint.json"):
        path.write_bytes(content)
    train_autoencoder(load_config(made / "tiny.yaml", [f"run.dir={run}"]))
    assert json.loads((run / "done.json").read_text())["num_steps"] == 2
    assert ("done.json' is damaged" in capsys.readouterr().err) is (b"num" not in content)
    for path in (run / "versions.json", run / "command.txt"):
        path.write_bytes(b"\xff")
    export_checkpoint(run, 2, run / "again")
    assert opened(f"{run}@2") == folder and "unknown" in (run / "again" / "README.md").read_text()


@pytest.mark.parametrize("name", ["logs", "checkpoints"])
def test_a_file_where_a_folder_is_wanted_is_named(made, tmp_path, name):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / name).touch()
    with pytest.raises(NotADirectoryError, match=f"{name}' is a file, where run.dir=.* has a folder: move it away"):
        go_on(made, tmp_path / "new")
