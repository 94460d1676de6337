"""The judge: it trains, is exported small, and reads pictures again."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import yaml

from eqldm.config import JudgeConfig, load_config
from eqldm.data.samples import PictureSamples, collate
from eqldm.data.shards import write_manifest, write_shard
from eqldm.evaluation.judge import ANSWERS, Judge, save_judge
from eqldm.evaluation.judge_training import KINDS, READS_AS, UNCERTAIN, JudgeTraining, prepare_judge, train_judge, turned_label
from eqldm.run_model import export_checkpoint
from eqldm.training.run_folder import LAST
from eqldm.views import D4


@pytest.fixture(scope="module")
def shards(make_picture_shards, tmp_path_factory) -> Path:
    return make_picture_shards(tmp_path_factory.mktemp("shards"), count=12, size=16)


@pytest.fixture
def configured(shards, tmp_path):
    """`configured("a", "key=value", ...)`: the options of a tiny judge, for the run folder `tmp_path / "a"`."""
    path = tmp_path / "judge.yaml"
    options = {
        "stage": "judge",
        "architecture_args": {"channels": [4, 4, 8, 8]},
        "data": {"train": str(shards), "val": str(shards), "batch_size": 4, "num_workers": 0, "val_samples": 12},
        "run": {"precision": "32-true", "accelerator": "cpu", "num_steps": 2, "val_every": 2, "log_every": 1},
        "optimizer": {"learning_rate": 1e-2, "warmup_steps": 1, "ema_decay": 0.5},
    }
    path.write_text(yaml.safe_dump(options))

    def build(name: str, *overrides: str) -> JudgeConfig:
        return load_config(path, [f"run.dir={tmp_path / name}", *overrides])

    return build


def weights(config: JudgeConfig) -> dict:
    return torch.load(Path(config.run.dir) / LAST, weights_only=True)["current_model_state"]


def test_two_steps_export_and_reading(configured, shards):
    config = configured("two")
    folder = train_judge(config)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    judge = Judge.open(folder)
    assert judge.image_size == 16 and not judge.network.training
    averaged = torch.load(Path(config.run.dir) / LAST, weights_only=True)["state_dict"]
    for name, value in judge.network.state_dict().items():  # what is exported is the average, in float16
        assert torch.allclose(value.float(), averaged[f"network.{name}"].float(), rtol=1e-3, atol=1e-4), name

    samples = PictureSamples(shards)
    x = collate([samples[i] for i in range(12)])["x"]
    labels = judge(x)
    assert labels.shape == (12,) and labels.dtype == torch.int64 and 0 <= int(labels.min()) and int(labels.max()) < 27
    assert torch.equal(judge(x, batch_size=5), labels)
    probabilities = judge.probabilities(x, batch_size=5)
    assert probabilities.shape == (12, 27) and torch.allclose(probabilities.sum(1), torch.ones(12))
    assert torch.equal(probabilities.argmax(1), labels)
    features = judge.features(x)
    assert features.shape == (12, 8)
    assert torch.allclose(judge.network.get_classifier()(features).softmax(1), probabilities, atol=1e-6)
    assert judge(torch.nn.functional.interpolate(x, scale_factor=4)).shape == (12,)  # pictures of another size
    assert train_judge(config) == folder  # a finished run is left alone
    export_checkpoint(Path(config.run.dir), None, folder.with_name("again"))
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in folder.with_name("again").iterdir())


def test_it_learns(configured, shards):
    judge = Judge.open(
        train_judge(configured("learns", "run.num_steps=90", "noise=0.02", "rotation_degrees=2", "run.val_every=90", "turned_share=0"))
    )
    samples = PictureSamples(shards)
    batch = collate([samples[i] for i in range(12)])
    assert float((judge(batch["x"]) == batch["label"]).float().mean()) > 0.8


def test_turned_letters_are_what_they_read_as(configured):
    module = JudgeTraining(configured("turned", "turned_share=0.5", "noise=0", "rotation_degrees=0"), torch.nn.Identity())
    x = torch.rand(3, 16, 16)
    for letter, readings in {"R": {"R", "-"}, "M": {"M", "W", "-"}, "O": {"O"}, "J": {"J", "-"}}.items():
        seen = [module._augment(x, ANSWERS.index(letter), position)[:2] for position in range(300)]
        assert {ANSWERS[label] for _, label in seen} == readings
        for picture, label in seen:  # by one symmetry, and labelled by it
            (view,) = [view for view in D4 if torch.equal(picture, view(x))]
            expected = letter if view.name == "identity" else ANSWERS[turned_label(ANSWERS.index(letter), view.name)]
            assert ANSWERS[label] == expected
        upright = sum(torch.equal(picture, x) for picture, _ in seen) / len(seen)
        assert 0.4 < upright < 0.7


SHARES = [f"{kind}_share=0.3" for kind in ("turned", "half", "mixed", "ghost", "faded", "blurred", "round_trip")]


def test_each_kind_is_drawn_as_often_as_asked_and_nothing_else_changes(configured, shards):
    """A share of 0 leaves every picture, its label and its noise as they were without the kind."""
    plain, _ = prepare_judge(configured("plain", "turned_share=0.3"))
    samples = PictureSamples(shards)
    for kind in KINDS:
        module, _ = prepare_judge(configured(kind, "turned_share=0.3", f"{kind}_share=0.4"))
        changed = none = upright = stayed = 0
        for position in range(120):
            x, label = samples[position]["x"], samples[position]["label"]
            (a, of_a, noise_a, _), (b, of_b, noise_b, left) = (each._augment(x, label, position) for each in (plain, module))
            assert torch.equal(noise_a, noise_b)
            changed += not torch.equal(a, b)
            upright += of_a == label
            none += of_a != of_b
            stayed += left
            assert not (left and of_a != of_b)
            if kind in ("ghost", "faded", "blurred"):
                assert of_a == of_b
            elif not torch.equal(a, b):
                assert ANSWERS[of_b] == "-" and of_a == label
        assert 0 < changed < 0.6 * 120, (kind, changed)
        assert stayed > 0 if kind == "half" else stayed < 10  # of many letters no half is none: the log counts them
        assert kind in ("half", "mixed") or not stayed
        assert none == (changed if kind in ("half", "mixed") else 0)


def test_what_a_position_shows_depends_on_nothing_else(configured, shards):
    """Neither on the batch, nor on what was drawn before: with all kinds, a resumed run equals an uninterrupted one."""
    modules = [prepare_judge(configured(name, *SHARES))[0] for name in ("one", "other")]
    sample = PictureSamples(shards)[5]
    for position in (40, 7, 40):
        a, b = (module._augment(sample["x"], sample["label"], position) for module in modules)
        assert torch.equal(a[0], b[0]) and a[1] == b[1]
        modules.pop() if position == 7 else None
        modules *= 2 if len(modules) == 1 else 1
    whole = modules[0]._round_trips(torch.stack([sample["x"]] * 9), list(range(9)))
    parts = torch.cat([modules[0]._round_trips(torch.stack([sample["x"]] * 3), list(range(i, i + 3))) for i in (0, 3, 6)])
    assert torch.allclose(whole, parts, atol=1e-5)
    assert 0 < sum(not torch.equal(x, sample["x"]) for x in whole) < 9


def test_all_kinds_train_and_are_measured_one_by_one(configured):
    config, resumed = configured("kinds", *SHARES, "run.num_steps=4"), configured("resumed", *SHARES)
    train_judge(config)
    train_judge(resumed)
    resumed.run.num_steps = 4
    train_judge(resumed)
    a, b = weights(config), weights(resumed)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any("vae" in name for name in a)  # neither trained nor kept
    header = next(Path(config.run.dir).glob("logs/**/*.csv")).read_text().splitlines()[0].split(",")
    assert {
        "val/accuracy",
        *(f"val/accuracy/{kind}" for kind in ("turned", "ghost", "mixed", "round_trip")),
        "train/share_left_plain",
    } <= set(header)


def test_shares_of_what_a_picture_can_be_only_one_of(configured):
    with pytest.raises(ValueError, match="turned_share . half_share . mixed_share: got 1.1 in all, wanted at most 1"):
        configured("much", "turned_share=0.5", "half_share=0.3", "mixed_share=0.3")


def test_lookalikes_agree_with_the_group():
    """A letter turned and turned back is itself; what a symmetry does to a letter, its inverse undoes."""
    for view in D4[1:]:
        for letter, reading in READS_AS[view.name].items():
            assert READS_AS[view.inverse.name][reading] == letter
        assert not set(READS_AS[view.name]) & set(UNCERTAIN.get(view.name, ""))
    for a in D4[1:]:
        for b in D4[1:]:
            product = next(view for view in D4 if view.turns == (a @ b).turns).name
            for letter, middle in READS_AS[b.name].items():
                last = READS_AS[a.name].get(middle)
                if last is not None and product != "identity" and letter not in UNCERTAIN.get(product, ""):
                    assert READS_AS[product].get(letter) == last, (a.name, b.name, letter)


def test_resumed_equals_uninterrupted(configured):
    whole, parts = configured("whole", "run.num_steps=4"), configured("parts")
    train_judge(whole)
    train_judge(parts)
    parts.run.num_steps = 4
    train_judge(parts)
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_resuming_with_other_micro_batches_keeps_its_steps(configured):
    """Stopped at an odd step of one batch, and resumed in halves: each step still takes both halves of its own batch."""
    whole, parts = configured("whole", "run.num_steps=5", "data.micro_batch_size=2"), configured("parts", "run.num_steps=3")
    train_judge(parts)
    parts.run.num_steps, parts.data.micro_batch_size = 5, 2
    seen = []
    import eqldm.evaluation.judge_training as module

    class Watched(module.JudgeTraining):
        def training_step(self, batch, batch_idx):
            seen.append((self.trainer.global_step, batch["position"].tolist()))
            return super().training_step(batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "JudgeTraining", Watched)
        train_judge(parts)
        resumed, seen = seen, []
        train_judge(whole)
    assert resumed == [(3, [12, 13]), (3, [14, 15]), (4, [16, 17]), (4, [18, 19])]
    assert seen[-4:] == resumed


def test_data_without_labels_is_an_error(configured, shards, tmp_path):
    samples = [{"__key__": str(i), "png": PictureSamples(shards).shards.read(i, "png"), "txt": "a"} for i in range(12)]
    (tmp_path / "bare").mkdir()
    entry = write_shard(tmp_path / "bare" / "bare-000000.tar", samples)
    write_manifest(tmp_path / "bare", [entry], kind="pictures", image_size=16)
    for part in ("train", "val"):
        with pytest.raises(ValueError, match="bare' has no labels: the judge learns from glyph shards"):
            train_judge(configured("bare-run", f"data.{part}={tmp_path / 'bare'}"))


def test_missing_judge_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no judge: train one with python train.py configs/glyphs/judge.yaml"):
        Judge.open(tmp_path)


def test_a_judge_without_the_answer_none_is_refused(tmp_path):
    about = {"architecture": "resnet18", "args": {"channels": [4, 4, 8, 8]}, "image_size": 16}
    save_judge(tmp_path / "old", timm.create_model("resnet18", num_classes=26, channels=[4, 4, 8, 8]), about)
    with pytest.raises(ValueError, match="knows 26 answers, wanted 27"):
        Judge.open(tmp_path / "old")
