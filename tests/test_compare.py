"""Differences between results: paired where they are of the same pictures, and which of them are real."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from eqldm.evaluation import compare
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.compare import Measured, comparison_table, difference_cell, differences
from eqldm.evaluation.naming import direction, number, question_of


def measured(name: str, values: dict[str, torch.Tensor], samples="same") -> Measured:
    """Of values [N] of pictures by metric."""
    findings = Findings(torch.arange(len(next(iter(values.values())))))
    for metric, each in values.items():
        findings.mean(metric, each)
    return Measured(name, findings.metrics, findings.resampled, {"samples": {"fit": {"data": samples}}})


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.randn(400, generator=torch.Generator().manual_seed(1))


def test_pairs_tell_what_others_cannot(noise):
    """The same pictures, one a little better on each: real if paired, lost in the spread of pictures if not."""
    b, a = {"fit/val_loss": noise}, {"fit/val_loss": noise + 0.05 + 0.01 * noise.flip(0)}
    paired, other = (differences(measured("a", a, samples), measured("b", b))["fit/val_loss"] for samples in ("same", "other"))
    assert paired.value == other.value == pytest.approx(0.05, abs=0.002)
    assert paired.paired and paired.real and paired.bounds[0] > 0.045 and paired.bounds[1] < 0.055
    assert not other.paired and not other.real and other.bounds[0] < 0 < other.bounds[1]
    assert difference_cell(paired).endswith(" *") and difference_cell(other).endswith(" (other pictures)")


def test_unpaired_resamples_are_of_the_right_spread(noise):
    other = torch.randn(400, generator=torch.Generator().manual_seed(2))
    found = differences(measured("a", {"fit/x": noise}, "there"), measured("b", {"fit/x": other}))["fit/x"]
    expected = 1.96 * float((noise.var() / 400 + other.var() / 400).sqrt())
    assert (found.bounds[1] - found.bounds[0]) / 2 == pytest.approx(expected, rel=0.1)


def test_of_many_null_differences_none_is_called_real():
    """Holm: at most one comparison in twenty may call any of its differences real where none is."""
    wrong = 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        a, b = ({f"fit/{k}": torch.randn(60, generator=generator) for k in range(20)} for _ in range(2))
        wrong += any(each.real for each in differences(measured("a", a), measured("b", b)).values())
    assert wrong <= 6  # 2 expected


def test_equal_results_differ_by_nothing(noise):
    found = differences(measured("a", {"fit/x": noise}), measured("b", {"fit/x": noise}))["fit/x"]
    assert found.value == 0 and found.bounds == (0, 0) and not found.real and found.p == 1


def test_what_has_no_spread_is_not_called_real():
    a, b = measured("a", {"fit/x": torch.ones(2)}), measured("b", {"fit/x": torch.zeros(2)})
    assert not differences(a, b)["fit/x"].real


def test_nor_is_what_few_pictures_say(noise):
    a, b = measured("a", {"fit/x": noise + 5}), measured("b", {"fit/x": noise})
    assert differences(a, b)["fit/x"].real
    for model in (a, b):
        model.about["samples"]["fit"]["count"] = 29
    assert not differences(a, b)["fit/x"].real


def test_the_command(tmp_path, noise, monkeypatch, capsys):
    for name, shift in (("a", 0.0), ("b", 1.0)):
        result = measured(name, {"fit/val_loss": noise + shift})
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({**result.metrics, "reconstruction/rfid_judge": 2.0}))
        (folder / "about.json").write_text(json.dumps(result.about))
        save_file(result.resampled, folder / "resampled.safetensors")
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "table.md")])
    compare.main()
    text = (tmp_path / "table.md").read_text()
    assert "| metric | a | b | b minus a |" in text and "+1 (+1 to +1) *" in text and "| reconstruction/rfid_judge ↓ | 2 | 2 | - |" in text
    assert "Holm" in text and text in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "a"), str(tmp_path / "b" / ".." / "a")])
    compare.main()
    assert f"| metric | {tmp_path / 'a'} | {tmp_path / 'b' / '..' / 'a'} |" in capsys.readouterr().out
    for words, message in (
        ([str(tmp_path / "a")], "two results or more, got 1"),
        ([str(tmp_path), "x"], "holds no results .it lacks metrics.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["compare", *words])
        with pytest.raises(SystemExit, match=message):
            compare.main()


@pytest.mark.parametrize(("file", "content", "message"), [
    ("metrics.json", '{"fit/x": NaN}', "fit/x is nan, though its resamples are finite"),
    ("metrics.json", '{"fit/x": "1"}', "fit/x is '1', wanted a number"),
    ("metrics.json", "{}", "resampled.safetensors knows fit/x, metrics.json does not, so they are of two runs"),
    ("about.json", "{}", "does not say what was sampled"),
    ("about.json", '{"samples": {"fit": 3}}', "does not say what was sampled"),
    ("resampled.safetensors", torch.tensor([0.0, float("nan")]), "fit/x is no list of finite numbers"),
    ("resampled.safetensors", torch.zeros(2, 2), "fit/x is no list of finite numbers"),
])  # fmt: skip
def test_damaged_results_are_told(tmp_path, noise, file, content, message):
    result = measured("a", {"fit/x": noise})
    (tmp_path / "metrics.json").write_text(json.dumps(result.metrics))
    (tmp_path / "about.json").write_text(json.dumps(result.about))
    save_file(result.resampled, tmp_path / "resampled.safetensors")
    assert Measured.open(tmp_path).metrics == result.metrics
    if isinstance(content, str):
        (tmp_path / file).write_text(content)
    else:
        save_file({"fit/x": content}, tmp_path / file)
    with pytest.raises(ValueError, match=message):
        Measured.open(tmp_path)


def test_table_of_what_one_has_and_the_other_has_not(noise):
    a, b = measured("a", {"fit/x": noise, "fit/own_loss": noise}), measured("b", {"fit/x": noise})
    assert "| fit/own_loss ↓ | " in comparison_table([a, b]) and comparison_table([a, b]).splitlines()[-1].endswith("| - | - |")


def test_names():
    ways = {
        "reconstruction/psnr": "↑", "reconstruction/rfid_judge": "↓", "generation/texture": "→1", "anagram/flip/kid_judge_turned": "↓",
        "anagram/flip/texture_upright": "→1", "generation/round_trip_psnr": "↑", "fit/loss_ratio": "↓", "fit/latent_mean": "",
        "equivariance/rotate_90/latent_error": "↓", "anagram/flip/alignment_q90": "↑", "anagram/flip/read_right_upright": "↑",
        "fit/val_loss/bin_3": "↓", "equivariance/eqvae_scale_error": "↓", "generation/recall_inception": "↑",
            "generation/read_right_data": "", "anagram/flip/texture_over_contrast_turned_1": "→1", "generation/contrast": "→1",
            "anagram/flip/trivial/ambigramability": "↑", "anagram/flip/equal/forced_best_of_4": "↑",
    }  # fmt: skip
    assert {name: direction(name) for name in ways} == ways
    assert (
        question_of("anagram/patch_permute:4/kid_judge_turned") == "anagram/patch_permute:4" and question_of("fit/val_loss/bin_0") == "fit"
    )
    assert number(0.0) == "0" and number(None) == "-" and number(28.512) == "28.51" and number(0.123456) == "0.123"
