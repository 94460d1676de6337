"""Differences between results: paired where they are of the same pictures, and which of them are real."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file

from eqldm.evaluation import compare
from eqldm.evaluation.bootstrap import Findings
from eqldm.evaluation.compare import Measured, comparison_table, difference_cell, differences
from eqldm.evaluation.lookalikes import populations
from eqldm.evaluation.naming import APART, direction, number, question_of
from eqldm.views import D4


def measured(name: str, values: dict[str, torch.Tensor], samples="same", num_seeds: int = 1) -> Measured:
    """Of values [N] of pictures by metric; num_seeds of each cluster, one after the other."""
    findings = Findings(torch.arange(len(next(iter(values.values())))) // num_seeds, 300)
    for metric, each in values.items():
        findings.mean(metric, each)
    return Measured(name, findings.metrics, findings.intervals, findings.resampled, {"samples": {"fit": {"data": samples}}})


def keep(result: Measured, folder) -> None:
    """As `evaluate` does."""
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps(result.metrics))
    (folder / "intervals.json").write_text(json.dumps({name: asdict(each) for name, each in result.intervals.items()}))
    (folder / "about.json").write_text(json.dumps(result.about))
    save_file(result.resampled, folder / "resampled.safetensors")


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


def test_pairs_that_need_no_anagram_weaken_no_star(noise):
    """Ten more metrics, of populations that stand apart, would have hidden the difference that there is."""
    shift = 2.6 * float(noise.std()) / 400**0.5
    apart = [f"anagram/rotate_180/{population}/{k}" for population in APART for k in range(5)]
    a = {"anagram/rotate_180/ambigramability": noise + shift} | {name: noise + 9 for name in apart}
    b = {"anagram/rotate_180/ambigramability": noise.flip(0)} | {name: noise for name in apart}
    models = [measured(name, values) for name, values in (("a", a), ("b", b))]
    for model in models:
        model.about["samples"]["anagram/rotate_180"] = model.about["samples"]["fit"]
    found = differences(*models)
    alone = differences(*(replace(m, intervals={n: i for n, i in m.intervals.items() if n not in apart}) for m in models))
    headline = "anagram/rotate_180/ambigramability"
    assert found[headline] == alone[headline] and found[apart[0]].value == pytest.approx(9, abs=1e-4)
    assert not any(found[name].real for name in apart)
    assert {f"{name}/" for name in APART} == populations(torch.tensor([[0, 7], [0, 7]]), D4[:2]).keys() - {""}


def test_unpaired_resamples_are_of_the_right_spread(noise):
    other = torch.randn(400, generator=torch.Generator().manual_seed(2))
    found = differences(measured("a", {"fit/x": noise}, "there"), measured("b", {"fit/x": other}))["fit/x"]
    expected = 1.96 * float((noise.var() / 400 + other.var() / 400).sqrt())
    assert (found.bounds[1] - found.bounds[0]) / 2 == pytest.approx(expected, rel=0.1)


def drawn(generator: torch.Generator, num_clusters: int, num_seeds: int, together: float, base: torch.Tensor) -> torch.Tensor:
    """[10, N] of ten metrics, whose pictures of one cluster are alike; `together` is the correlation of the metrics' clusters, and base
    [10, G] is what both models have of these clusters."""
    common, own = (torch.randn(size, num_clusters, generator=generator) for size in (1, 10))
    alike = together**0.5 * common + (1 - together) ** 0.5 * own + base
    return (alike[..., None] + torch.randn(10, num_clusters, num_seeds, generator=generator)).flatten(1)


def of_draw(kind: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ten metrics: as drawn; skewed; or hits, which are frequent or rare."""
    if kind == "skewed":
        values = values.exp()
    elif kind != "normal":
        values = (values > 3**0.5 * {"rate .3": 0.524, "rate .02": 2.054}[kind]).double()
    return {f"fit/{k}": each for k, each in enumerate(values)}


def null_stars(kind: str, num_clusters: int, num_seeds: int, together: float, paired: bool, draws: int) -> float:
    """The share of comparisons of two models, alike but for chance, in which any of ten differences gets a star."""
    wrong = 0
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        bases = torch.randn(2, 10, num_clusters, generator=generator)
        a, b = (
            measured("m", of_draw(kind, drawn(generator, num_clusters, num_seeds, together, bases[0 if paired else k])),
                     "same" if paired else f"those of {k}", num_seeds)
            for k in range(2)
        )  # fmt: skip
        wrong += any(each.real for each in differences(a, b).values())
    return wrong / draws


@pytest.mark.parametrize(("num_clusters", "num_seeds"), [(8, 8), (25, 1)])
def test_of_null_differences_hardly_any_is_called_real(num_clusters, num_seeds):
    """Counting pictures, with the normal distribution, any star had a chance of 55 to 65 % at 4 clusters x 8 seeds, and 11 % at 25 x 1."""
    assert null_stars("normal", num_clusters, num_seeds, 0.6, True, 60) <= 0.1  # 3 expected


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "skewed", "rate .3", "rate .02"])
@pytest.mark.parametrize(("num_clusters", "num_seeds"), [(4, 8), (6, 8), (25, 1), (100, 2), (351, 4)])
def test_stars_are_at_5_percent(kind, num_clusters, num_seeds):
    """Ten correlated, or independent, metrics of paired models. At 4 clusters there are none at all; it is close to 5 % for normal values,
    and less for skewed ones and for rates, the less the rarer: none at 2 % and 100 pictures."""
    chances = [null_stars(kind, num_clusters, num_seeds, together, True, 200) for together in (0.0, 0.6)]
    assert max(chances) <= 0.09 and sum(chances) / 2 <= 0.075  # 3 standard errors


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["normal", "rate .3"])
def test_nor_of_other_pictures(kind):
    assert null_stars(kind, 25, 1, 0.0, False, 200) <= 0.09


def test_the_t_distribution_holds_for_four_clusters(monkeypatch):
    """Four clusters have no stars because of `FEWEST`; without it they would be at 5 % of normal values, no more."""
    monkeypatch.setattr(compare, "FEWEST", 2)
    assert null_stars("normal", 4, 8, 0.0, True, 60) <= 0.1


@pytest.mark.parametrize(("num_clusters", "num_seeds"), [(6, 8), (25, 1), (100, 2), (351, 4)])
def test_real_differences_are_called_so(num_clusters, num_seeds):
    """One of ten metrics differs by some standard errors of the difference: more of them where there are few clusters, for t's tail."""
    found, errors = 0, {6: 14, 25: 5, 100: 4.5, 351: 4.5}[num_clusters]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(10, num_clusters, generator=generator)
        a, b = (drawn(generator, num_clusters, num_seeds, 0.0, base) for _ in range(2))
        a[3] += errors * (2 * (1 + 1 / num_seeds) / num_clusters) ** 0.5
        found += differences(*(measured("m", of_draw("normal", each), "same", num_seeds) for each in (a, b)))["fit/3"].real
    assert found >= 16


def test_rates_with_hardly_any_hits(noise):
    """The bootstrap's spread of no hits is 0, and would call 4 hits of 64 more than none (a sign test has p = .125)."""
    none, few = torch.zeros(64), torch.zeros(64)
    few[:4] = 1
    found = differences(measured("a", {"fit/x": few}), measured("b", {"fit/x": none}))["fit/x"]
    assert found.value == 0.0625 and not found.real and found.bounds[0] < 0 < found.bounds[1]
    found = differences(measured("a", {"fit/x": none}), measured("b", {"fit/x": none}))["fit/x"]
    assert found.value == 0 and found.p == 1 and found.bounds[0] == pytest.approx(-found.bounds[1]) and 0.03 < found.bounds[1] < 0.1
    many = torch.zeros(676)
    many[:27] = 1  # 4 % of 676 against none of 32: too few to tell
    found = differences(measured("a", {"fit/x": torch.zeros(32)}, "other"), measured("b", {"fit/x": many}))["fit/x"]
    assert not found.paired and not found.real and found.bounds[1] > 0
    some = torch.zeros(676)
    some[20:31] = 1
    found = differences(measured("a", {"fit/x": many}), measured("b", {"fit/x": some}))["fit/x"]
    assert found.real and found.p == pytest.approx(0.00154, rel=0.3)  # as by McNemar's exact test of 20 against 4


def test_a_star_and_its_interval_agree():
    """Of a single metric: 0 lies outside the interval where there is a star, and nowhere else."""
    stars = set()
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.rand(2, 60, generator=generator)
        for values in ((a + 0.1, b), ((a < 0.35).double(), (b < 0.15).double())):
            found = differences(*(measured("m", {"fit/x": each}, num_seeds=2) for each in values))["fit/x"]
            assert found.real == (found.bounds[0] > 0 or found.bounds[1] < 0)
            stars.add(found.real)
    assert stars == {True, False}


def test_what_differs_the_same_everywhere_is_real(noise):
    """All of six clusters or more differ by just as much, so that there is no spread; rounding is none."""
    a, b = (measured(name, {"fit/x": torch.full((40,), value)}) for name, value in (("a", 0.3), ("b", 0.4)))
    found = differences(a, b)["fit/x"]
    assert found.real and found.p == 2.0**-39 and found.bounds == pytest.approx((-0.1, -0.1))
    again = measured("a", {"fit/x": torch.full((40,), 0.3) * (1 + 1e-8)})
    assert not differences(a, again)["fit/x"].real


def test_other_numbers_of_pictures_are_not_paired(noise):
    """The degrees of freedom are those of the fewer clusters, however many the other has."""
    few, many = measured("a", {"fit/x": noise[:8]}, "8"), measured("b", {"fit/x": noise}, "400")
    found = differences(few, many)["fit/x"]
    spread = float((noise[:8].var() / 8 + noise.var() / 400).sqrt())
    assert not found.paired and (found.bounds[1] - found.bounds[0]) / 2 == pytest.approx(2.36462 * spread, rel=1e-4)


def test_equal_results_differ_by_nothing(noise):
    found = differences(measured("a", {"fit/x": noise}), measured("b", {"fit/x": noise}))["fit/x"]
    assert found.value == 0 and found.bounds == (0, 0) and not found.real and found.p == 1


def test_what_has_no_spread_is_not_called_real():
    a, b = measured("a", {"fit/x": torch.ones(2)}), measured("b", {"fit/x": torch.zeros(2)})
    assert not differences(a, b)["fit/x"].real


@pytest.mark.parametrize(("num_clusters", "real"), [(5, False), (6, True)])
def test_nor_is_what_few_clusters_say(noise, num_clusters, real):
    """However many pictures they have."""
    b = noise[: 64 * num_clusters]
    found = differences(measured("a", {"fit/x": b + 5 + b.flip(0)}, num_seeds=64), measured("b", {"fit/x": b}, num_seeds=64))["fit/x"]
    assert found.real == real and found.value > 4 and found.bounds[0] > 0


def test_the_command(tmp_path, noise, monkeypatch, capsys):
    for name, shift in (("a", 0.0), ("b", 1.0)):
        result = measured(name, {"fit/val_loss": noise + shift})
        result.metrics["reconstruction/rfid_judge"] = 2.0
        keep(result, tmp_path / name)
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
    ("about.json", '{"samples": {"generation": {}}}', "does not say what was sampled for fit/x"),
    ("intervals.json", "{}", "intervals.json and resampled.safetensors differ in fit/x, so they are of two runs"),
    ("intervals.json", '{"fit/x": [0, 1]}', r"fit/x is \[0, 1\], wanted low <= 0.* <= high and num_clusters > 1"),
    ("intervals.json", '{"fit/x": {"low": 5, "high": 9, "num_clusters": 9}}', "fit/x is .*, wanted low <= 0.* <= high"),
    ("intervals.json", '{"fit/x": {"low": -9, "high": NaN, "num_clusters": 9}}', "fit/x is .*, wanted low <= 0.* <= high"),
    ("intervals.json", '{"fit/x": {"low": -9, "high": 9, "num_clusters": 1}}', "fit/x is .*, wanted low <= 0.* num_clusters > 1"),
    ("resampled.safetensors", torch.tensor([0.0, float("nan")]), "fit/x is no list of finite numbers"),
    ("resampled.safetensors", torch.zeros(2, 2), "fit/x is no list of finite numbers"),
])  # fmt: skip
def test_damaged_results_are_told(tmp_path, noise, file, content, message):
    result = measured("a", {"fit/x": noise})
    keep(result, tmp_path)
    assert Measured.open(tmp_path).metrics == result.metrics and Measured.open(tmp_path).intervals == result.intervals
    if isinstance(content, str):
        (tmp_path / file).write_text(content)
    else:
        save_file({"fit/x": content}, tmp_path / file)
    with pytest.raises(ValueError, match=message):
        Measured.open(tmp_path)


def test_results_that_do_not_say_their_clusters_are_refused(tmp_path, noise):
    """Those of before clusters were counted."""
    keep(measured("a", {"fit/x": noise}), tmp_path)
    (tmp_path / "intervals.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks intervals.json.* how many clusters .* run python -m eqldm.evaluate again"):
        Measured.open(tmp_path)


def test_table_of_what_one_has_and_the_other_has_not(noise):
    a, b = measured("a", {"fit/x": noise, "fit/own_loss": noise}), measured("b", {"fit/x": noise})
    assert "| fit/own_loss ↓ | " in comparison_table([a, b]) and comparison_table([a, b]).splitlines()[-1].endswith("| - | - |")


def test_names():
    ways = {
        "reconstruction/psnr": "↑", "reconstruction/rfid_judge": "↓", "generation/texture": "→1", "anagram/flip/kid_judge_turned": "↓",
        "anagram/flip/texture_upright": "→1", "generation/round_trip_psnr": "↑", "fit/loss_ratio": "↓", "fit/latent_mean": "",
        "fit/ratio_to_own": "↓",
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
