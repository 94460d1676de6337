"""Several judges: means, ranges and agreement against closed forms and torchmetrics; what they may be called."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import timm
import torch
from torchmetrics.functional.classification import binary_cohen_kappa

from eqldm.evaluation.anagram import anagram_metrics, letter_rates
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.generation import generation_metrics
from eqldm.evaluation.instruments import Instruments
from eqldm.evaluation.judge import save_judge
from eqldm.evaluation.judges import add_agreement, add_share, by_judge, judges_range, kappa, of_one_judge, open_judges
from eqldm.evaluation.parts import part_metrics
from eqldm.evaluation.quality import RealPictures
from eqldm.views import IDENTITY, parse_view
from eqldm.views.components import parse_components

VIEWS = [IDENTITY, parse_view("rotate_90")]


def drawn(seed: int, share: float = 0.5, count: int = 200) -> torch.Tensor:
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) < share).double()


def test_kappa_is_cohens():
    a = drawn(0)
    for b in (drawn(1), torch.where(drawn(2, 0.8) > 0, a, 1 - a), a, 1 - a):
        assert float(kappa(a, b)) == pytest.approx(float(binary_cohen_kappa(a.long(), b.long())), abs=1e-6)
    assert float(kappa(a, a)) == pytest.approx(1) and math.isnan(float(kappa(torch.zeros(9), torch.zeros(9))))
    assert float(kappa(torch.zeros(200), a)) == 0  # one that never reads anything right
    counts = torch.randint(0, 3, (2, 200), generator=torch.Generator().manual_seed(3))
    repeated = [kappa(a.repeat_interleave(w), drawn(1).repeat_interleave(w)) for w in counts]
    assert torch.allclose(kappa(a, drawn(1), counts), torch.stack(repeated))


def test_a_share_of_several_judges_is_their_mean_with_each_ones_beside_it():
    right = {"a": torch.tensor([1.0, 1, 0, 0]), "b": torch.tensor([1.0, 0, 0, 0])}
    findings = Findings(torch.arange(4))
    add_share(findings, "x/", "read_right", right)
    best = torch.tensor([0.0, 1, 0, 1])
    add_share(findings, "x/", "best_of_2", right, best)
    assert findings.metrics == {
        "x/read_right": 0.375, "x/judges/a/read_right": 0.5, "x/judges/b/read_right": 0.25, "x/judges/least/read_right": 0.25,
        "x/judges/most/read_right": 0.5, "x/best_of_2": 0.25, "x/judges/a/best_of_2": 0.5, "x/judges/b/best_of_2": 0,
        "x/judges/least/best_of_2": 0, "x/judges/most/best_of_2": 0.5,
    }  # fmt: skip
    assert {"x/read_right", "x/judges/a/read_right"} <= findings.intervals.keys()
    assert not any("least" in name or "most" in name for name in findings.intervals)  # of which judge changes with the pictures
    assert judges_range(findings.metrics, "x/read_right") == (0.25, 0.5) and judges_range(findings.metrics, "x/judges/a/read_right") is None
    assert [of_one_judge(name) for name in ("x/read_right", "x/judges/a/read_right", "x/judges/kappa", "x/judges/kappa_most")] == [
        False, True, False, True,
    ]  # fmt: skip
    alone = Findings(torch.arange(4))
    add_share(alone, "x/", "read_right", {"": right["a"]})
    add_agreement(alone, "x/", {"": right["a"]})
    assert alone.metrics == {"x/read_right": 0.5}


def test_rare_shares_of_several_judges_are_covered():
    """Of 64 pictures that each of five judges reads right at .02, half of the time as the others do: Student's t covers 83 %."""
    generator, covered, draws = torch.Generator().manual_seed(0), 0, 400
    for _ in range(draws):
        alike, own = torch.rand(64, generator=generator) < 0.02, torch.rand(5, 64, generator=generator) < 0.02
        right = torch.where(torch.rand(5, 64, generator=generator) < 0.5**0.5, alike, own).double()
        findings = Findings(torch.arange(64), 2)
        add_share(findings, "", "x", dict(zip("abcde", right)))
        interval = findings.intervals["x"]
        assert 0 <= interval.low <= findings.metrics["x"] <= interval.high
        covered += interval.low <= 0.02 <= interval.high
    assert covered / draws >= 0.95


def test_agreement_is_over_pairs_of_judges():
    right = {name: drawn(seed) for seed, name in enumerate("abc")} | {"never": torch.zeros(200)}
    pairs = [float(kappa(right[a], right[b])) for a, b in ("ab", "ac", "bc")] + [0.0] * 3
    findings = Findings(torch.arange(200))
    add_agreement(findings, "x/", right)
    assert findings.metrics["x/judges/kappa"] == pytest.approx(sum(pairs) / 6)
    assert judges_range(findings.metrics, "x/judges/kappa") == pytest.approx((min(pairs), max(pairs)))
    assert float(findings.resampled["x/judges/kappa"].std()) > 0.01
    assert findings.metrics["x/judges/kappa_pairs"] == 6
    add_agreement(findings, "z/", right | {"neither": torch.zeros(200)})  # of those that never read right, no pair
    assert findings.metrics["z/judges/kappa_pairs"] == 9
    add_agreement(findings, "y/", {"a": torch.zeros(200), "b": torch.zeros(200)})
    assert findings.metrics["y/judges/kappa_pairs"] == 0
    assert math.isnan(findings.metrics["y/judges/kappa"]) and "y/judges/kappa" not in findings.resampled


def test_metrics_of_two_judges_are_the_means_of_those_of_each():
    """Of letters in views, plain ones and parts; what each judge finds bears its name, and equals what it finds alone."""
    wanted = torch.stack([torch.randint(26, (60,), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)])
    reads = {name: torch.where(drawn(seed, 0.6, 120).view(60, 2) > 0, wanted.T, 26) for seed, name in enumerate("ab")}
    forced = {name: torch.where(read == 26, 3, read) for name, read in reads.items()}
    rest = {"energy": torch.ones(60, 2), "contrast": torch.ones(60, 2), "chosen": torch.rand(60)}
    together = rest | {f"read/{n}": each for n, each in reads.items()} | {f"forced/{n}": each for n, each in forced.items()}
    shares = {"a": 0.9, "b": 0.7}
    lists = {"hybrid:0.06": {"a": [0.9, 0.8], "b": [0.7, 0.6]}}
    real = RealPictures({}, None, 1.0, 0.8, {"hybrid:0.06": [0.8, 0.7]}, 1.0, shares, lists)
    one = RealPictures({}, None, 1.0, contrast=1.0)
    about = {"anagram": (VIEWS, "anagram/rotate_90/"), "generation": (None, "generation/"), "parts": (None, "components/hybrid:0.06/")}

    def found(kind: str, values: dict, real: RealPictures) -> dict[str, float]:
        if kind == "anagram":
            return anagram_metrics(VIEWS, values, real, wanted, num_seeds=2).metrics
        if kind == "generation":
            plain = {name: value[:, :1] if value.dim() > 1 else value for name, value in values.items()}
            return generation_metrics(plain, real, wanted[:1]).metrics
        parts = parse_components("hybrid:0.06")
        return part_metrics("hybrid:0.06", parts, values, real, torch.arange(60), wanted, num_seeds=2).metrics

    for kind, (_, prefix) in about.items():
        both = found(kind, together, real)
        alone = {name: found(kind, rest | {"read": reads[name], "forced": forced[name]}, one) for name in "ab"}
        for name in alone["a"]:
            pair = [alone[judge][name] for judge in "ab"]
            assert both[name] == pytest.approx(sum(pair) / 2), name
            if "read_right" in name or "ambigramability" in name or "best_of" in name:
                head, last = name.rsplit("/", 1)
                assert [both[f"{head}/judges/{judge}/{last}"] for judge in "ab"] == pytest.approx(pair)
                assert judges_range(both, name) == pytest.approx((min(pair), max(pair)))
        assert f"{prefix}judges/kappa" in both
    assert found("generation", together, real)["generation/judges/b/read_right_data"] == 0.7
    assert found("parts", together, real)["components/hybrid:0.06/judges/least/forced_read_right_high_data"] == 0.6
    rates = [letter_rates({"read": each}, wanted) for each in reads.values()]
    assert torch.allclose(letter_rates(together, wanted), torch.stack(rates).mean(0), equal_nan=True)
    assert by_judge({"read": wanted}, "read").keys() == {""}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    made = []
    for seed, name in enumerate(("one/model", "two/model", "plain")):
        torch.manual_seed(seed)
        made.append(folder := tmp_path_factory.getbasetemp() / "judges" / name)
        about = {"architecture": "resnet18", "args": {"channels": [4, 4, 8, 8]}, "image_size": 16}
        save_judge(folder, timm.create_model("resnet18", num_classes=27, channels=[4, 4, 8, 8]), about)
    return made


def test_judges_are_called_as_their_runs_or_as_one_says(folders):
    one, two, plain = map(str, folders)
    assert list(open_judges([one, two, plain])) == ["one", "two", "plain"]
    assert list(open_judges([f"first={two}", one])) == ["first", "one"]
    assert list(open_judges(None)) == ["glyphs-judge"]


@pytest.mark.parametrize(("asked", "used"), [(["reconstruction"], False), (["reconstruction", "anagram"], True)])
def test_judges_that_nothing_reads_with_are_told(folders, asked, used):
    given = {"judge": list(map(str, folders[:2])), "without": ["lpips"], "features": []}
    args = argparse.Namespace(**given, **dict.fromkeys(("prompt_pairs", "chooser", "inception", "clip", "lpips")))
    notes = Instruments(args, asked, False, torch.device("cpu")).notes
    expected = "Not used (--judge): two. Nothing is read, and distances are on the features of one."
    assert (expected in notes) is not used


@pytest.mark.parametrize(("given", "message"), [
    (["{0}", "{0}"], "'one' is the name of two judges"),
    (["a={0}", "b={0}"], "'a' and 'b' are one judge .their weights are the same.: give each once"),
    (["least={0}", "{1}"], "'least' is the name of two judges, or of their summary"),
    (["a/b={0}"], "got 'a/b=.*', wanted FOLDER or NAME=FOLDER"),
    (["a="], "got 'a=', wanted FOLDER or NAME=FOLDER"),
])  # fmt: skip
def test_judges_that_cannot_be_told_apart_are_refused(folders, given, message):
    with pytest.raises(ValueError, match=message):
        open_judges([text.format(*folders) for text in given])
