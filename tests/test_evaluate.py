"""python -m eqldm.evaluate, end to end, on tiny models: tables, the page, what is missing, resuming, several processes."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from conftest import TINY_UNET
from eqldm import evaluate as command
from eqldm.anagram.sampling import Sampler
from eqldm.data.samples import PictureSamples
from eqldm.data.shards import file_sha256, read_manifest, write_manifest, write_shard
from eqldm.evaluation.anagram import PROMPT_PAIRS, read_prompts
from eqldm.evaluation.compare import Measured, differences
from eqldm.evaluation.drawn import Drawn
from eqldm.evaluation.fit import Fit
from eqldm.evaluation.judge import Judge
from eqldm.evaluation.reconstruction import Reconstruction
from eqldm.evaluation.sampled import Sampled
from eqldm.model_folder import Networks, Pixels, decode, encode, load_vae, save_model_folder
from eqldm.views import parse_view
from test_clip import make_clip

ROOT = Path(__file__).parents[1]
SIZES = ["--num-images", 6, "--num-letters", 4, "--num-pairs", 4, "--num-inference-steps", 2, "--device", "cpu", "--precision", "32-true"]
FULL = ["--without", "lpips", "--views", "rotate_180", "flip@patch_permute:2"]


@pytest.fixture(scope="module")
def tiny_judge(make_judge, tmp_path_factory) -> Path:
    return make_judge(tmp_path_factory.mktemp("judge") / "model", 0)


@pytest.fixture(scope="module")
def tiny_chooser(make_judge, tmp_path_factory) -> Path:
    return make_judge(tmp_path_factory.mktemp("chooser") / "model", 1)


@pytest.fixture
def run(monkeypatch, tiny_pictures, tmp_path, tiny_judge):
    """`run(*models, more=[...], data=tiny_pictures, judge=tiny_judge, out=tmp_path / "out", status=0)`: the command; returns its --out."""

    def call(*models, more=(), data=tiny_pictures, judge=tiny_judge, out=tmp_path / "out", status=0):
        judging = ["--judge", judge] if judge else []
        words = [*models, "--data", data, "--out", out, *judging, *SIZES, *more]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        if status:
            with pytest.raises(SystemExit) as caught:
                command.main()
            assert caught.value.code == status
        else:
            command.main()
        return out

    return call


@pytest.fixture
def vae_alone(tmp_path, tiny_model_folder) -> Path:
    shutil.copytree(tiny_model_folder / "vae", tmp_path / "vae-eq" / "model" / "vae")
    return tmp_path / "vae-eq" / "model"


def metrics_of(out: Path, name: str) -> dict[str, float]:
    return json.loads((out / name / "metrics.json").read_text())


class Page(HTMLParser):
    """What a page loads from elsewhere, its links within and the places that they lead to, and which tags are left open."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.links, self.ids, self.open = [], set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.loads += [found[name] for name in ("src", "srcset") if name in found and not found[name].startswith("data:")]
        self.loads += [found["href"]] if tag == "link" else []
        if tag == "a" and found["href"].startswith("#"):
            self.links.add(found["href"][1:])
        self.ids.add(found.get("id"))
        if tag not in ("meta", "img", "path", "use", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("meta", "img", "path", "use", "br"):
            assert self.open.pop() == tag


def test_models_in_one_report(run, tiny_model_folder, vae_alone, capsys):
    out = run(f"swap={tiny_model_folder}@vae={vae_alone}", vae_alone, more=["--baseline", tiny_model_folder, *FULL])
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out / 'report.html'}"
    whole, swap, alone = (metrics_of(out, name) for name in ("tiny", "swap", "vae-eq"))
    assert all(isinstance(value, float) for metrics in (whole, swap, alone) for value in metrics.values())
    of_vae = {name: value for name, value in whole.items() if name.startswith(("reconstruction/", "equivariance/"))}
    assert of_vae == alone and {"reconstruction/psnr", "reconstruction/rfid_judge", "equivariance/eqvae_rotation_error"} <= alone.keys()
    assert "equivariance/flip@patch_permute:2/latent_error" in alone and "equivariance/rescale_0.5/psnr" in alone
    for view in ("rotate_180", "flip@patch_permute:2"):
        assert {f"anagram/{view}/{name}" for name in ("ambigramability", "read_right_turned", "kid_judge_upright")} <= whole.keys()
    assert "fit/ratio_to_own" in swap and "fit/ratio_to_own" not in whole and swap["fit/ratio_to_own"] == pytest.approx(1)  # the same VAE
    symmetries = ("rotate_90", "rotate_180", "rotate_270", "mirror", "transpose", "flip", "anti_transpose")
    errors = [alone[f"equivariance/{view}/latent_error"] for view in symmetries]
    assert alone["equivariance/mean/latent_error"] == pytest.approx(sum(errors) / 7)  # D4's, whatever --views

    report = (out / "report.md").read_text()
    assert "| metric | tiny | swap | vae-eq | swap minus tiny | vae-eq minus tiny |" in report
    assert "Not computed for vae-eq: fit, generation, anagram ('" in report and "Left out (--without lpips): LPIPS." in report
    assert "Fit: 6 pictures are too few for a verdict, wanted 16" in report and "## Not computed" not in report
    text = (out / "report.html").read_text()
    page = Page(text)
    assert not page.loads and not page.open and page.links <= page.ids and not re.search(r"url\((?!#)|@import|<script", text)
    for name in ("letters.png", "anagrams_rotate_180.png", "anagrams_flip+patch_permute-2.png", "equivariance_maps.png", "latents.png",
                 "reconstruction_worst.png"):  # fmt: skip
        assert Image.open(out / "tiny" / name).width > 32
    assert text.count("data:image/png;base64,") == 2 + 6 + 6 + 3  # shared; of the two whole ones; of the VAE alone
    sheet = Image.open(out / "models.png")
    assert sheet.width > 3 * 96 and sheet.height > 7 * 96
    about = json.loads((out / "tiny" / "about.json").read_text())
    assert about["samples"]["generation"]["count"] == 4 and len(about["hashes"]["unet"]) == 16 and "torch" in about["versions"]
    assert about["sampling"] == {"num_inference_steps": 2, "guidance_scale": 5.0}
    words = shlex.split(about["command"])
    assert words[:3] == ["python", "-m", "eqldm.evaluate"] and words[3:] == sys.argv[1:]
    resampled = load_file(out / "tiny" / "resampled.safetensors")
    assert resampled.keys() <= whole.keys() and all(len(values) == 1000 for values in resampled.values())
    intervals = json.loads((out / "tiny" / "intervals.json").read_text())
    assert intervals.keys() == resampled.keys() and all(each["low"] <= whole[name] <= each["high"] for name, each in intervals.items())
    rates = [
        intervals[f"{question}/{name}"] for question, name in (("generation", "read_right"), ("anagram/rotate_180", "ambigramability"))
    ]
    assert all(each["num_clusters"] == 4 and each["high"] - each["low"] > 0.5 for each in rates)  # four pictures say little
    assert about["samples"]["generation"]["clusters"] == about["samples"]["anagram/rotate_180"]["clusters"] == 4
    assert f"({rates[0]['low']:.3g} to {rates[0]['high']:.3g})" in report


def test_every_metric_is_documented(run, tiny_model_folder, vae_alone, tmp_path, tiny_chooser):
    clip = make_clip(tmp_path / "clip")
    every = [*FULL, "--clip", clip, *COMPONENTS[:2], "--num-seeds", 2, "--chooser", tiny_chooser]
    out = run(f"swap={tiny_model_folder}@vae={vae_alone}", more=every)
    names = {re.sub(r"(judge|bin_\d)", lambda m: "NAME" if m[1] == "judge" else "bin_K", name) for name in metrics_of(out, "swap")}
    names = {re.sub(r"^(anagram|equivariance|components)/(?!mean/|eqvae)[^/]+", r"\1/T", name) for name in names}
    names = {re.sub(r"(?<=read_right_)(low|high)", "PART", name).replace("best_of_2", "best_of_N") for name in names}
    documented = set(re.findall(r"`([\w/]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    assert not names - documented


def test_a_stopped_evaluation_goes_on(run, tiny_model_folder, monkeypatch, tmp_path):
    whole = run(tiny_model_folder, more=FULL, out=tmp_path / "whole")
    measure, sampled = Sampled.measure, []

    def stops(self, numbers):
        if self.name != "generation":
            raise KeyboardInterrupt
        return measure(self, numbers)

    monkeypatch.setattr(Sampled, "measure", stops)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_model_folder, more=FULL)
    assert not (tmp_path / "out" / "report.md").exists()
    monkeypatch.setattr(Sampled, "measure", lambda self, numbers: (sampled.append(self.name), measure(self, numbers))[1])
    monkeypatch.setattr(Fit, "measure", lambda self, numbers: pytest.fail("measured again"))
    out = run(tiny_model_folder, more=FULL)
    assert sampled == ["anagram_rotate_180", "anagram_flip+patch_permute-2"]
    assert metrics_of(out, "tiny") == metrics_of(whole, "tiny")
    run(tiny_model_folder, more=FULL)  # and a third time nothing is measured
    assert len(sampled) == 2


def test_another_judge_looks_at_the_pictures_that_there_are(run, tiny_model_folder, tmp_path, tiny_chooser, monkeypatch):
    """Also where sampling was stopped between two batches, and by two processes, each of which looks at what it has drawn."""
    asked = ["--metrics", "generation", "anagram", "--batch-size", 2]
    draw, calls = Drawn._draw, []

    def stops(self, *arguments):
        calls.append(self.name)
        return draw(self, *arguments) if len(calls) < 4 else (_ for _ in ()).throw(KeyboardInterrupt)

    with monkeypatch.context() as patched:
        patched.setattr(Drawn, "_draw", stops)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_model_folder, more=asked)
    assert calls == ["generation_pictures"] * 2 + ["anagram_rotate_180_pictures"] * 2
    out = run(tiny_model_folder, more=asked)
    first = metrics_of(out, "tiny")
    monkeypatch.setattr(Drawn, "_draw", lambda *a: pytest.fail("drawn again"))
    with pytest.warns(UserWarning, match="measured with other features, judge"):
        run(tiny_model_folder, more=asked, judge=tiny_chooser)
    other = metrics_of(out, "tiny")
    assert other.keys() == first.keys() and other["generation/texture"] == first["generation/texture"]
    assert other["generation/kid_judge"] != first["generation/kid_judge"]

    judges = ["--judge", f"a_second={tiny_chooser}"]  # which comes first by name
    with pytest.warns(UserWarning, match="measured with other"):
        run(tiny_model_folder, more=[*asked, *judges])  # beside the first
    both = metrics_of(out, "tiny")
    for name in first:
        assert both[name] == pytest.approx((first[name] + other[name]) / 2 if "read_right" in name or "ambigram" in name else first[name])
    prefix = "anagram/rotate_180/judges"
    assert both[f"{prefix}/a_second/ambigramability"] == other["anagram/rotate_180/ambigramability"] and f"{prefix}/kappa" in both
    parts = [name.split("/judges/")[1] for name in both if "/judges/" in name]
    names = {f"judges/{re.sub('^(?!least|most)[^/]+/', 'JUDGE/', part)}" for part in parts}
    names = {re.sub("(JUDGE|least|most)/.*", r"\1/METRIC", name) for name in names}
    assert names <= set(re.findall(r"`([\w/]+)`", (ROOT / "docs" / "metrics.md").read_text()))
    report = (out / "report.md").read_text()
    assert re.search(r"anagram/rotate_180/read_right_upright ↑ \| .*, judges .* to ", report)
    assert "Sheets of pictures say what the first judge, judge" in report and "by judge" in (out / "report.html").read_text()
    with pytest.raises(SystemExit, match="--chooser is the judge itself"):
        run(tiny_model_folder, more=[*asked, *judges, "--num-seeds", 2, "--chooser", tiny_chooser])
    with pytest.warns(UserWarning, match="measured with other"):
        run(tiny_model_folder, more=asked)
    assert metrics_of(out, "tiny") == first


def test_other_options_are_measured_anew(run, tiny_model_folder):
    more = ["--metrics", "generation"]
    before = metrics_of(run(tiny_model_folder, more=more), "tiny")
    assert set(name.split("/")[0] for name in before) == {"generation"}
    after = metrics_of(run(tiny_model_folder, more=[*more, "--guidance-scale", 1]), "tiny")
    assert after.keys() == before.keys() and after["generation/texture"] != before["generation/texture"]
    assert metrics_of(run(tiny_model_folder, more=more), "tiny") == before


@pytest.mark.slow
def test_two_processes_find_what_one_does(run, tiny_model_folder, tmp_path, monkeypatch, capsys):
    """Bit for bit. The second finds the first's share there; a third call, as of the first, finds all. (They share the disk alone, so one
    after the other is as good as at once; test_work.py has the races.)"""
    more = ["--batch-size", 2, *FULL[:2]]
    one = run(tiny_model_folder, more=more, out=tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, last in (("0", "the report is written by the one that finishes last"), ("1", "report: "), ("0", "report: ")):
        monkeypatch.setenv("RANK", rank)
        two = run(tiny_model_folder, more=more)
        assert last in capsys.readouterr().out.splitlines()[-1]
    assert metrics_of(two, "tiny") == metrics_of(one, "tiny")
    assert (two / "tiny" / "letters.png").read_bytes() == (one / "tiny" / "letters.png").read_bytes()
    assert not [path for path in two.rglob("*") if path.name.endswith(".partial")]


def test_what_has_no_weights_is_listed_and_the_exit_status_says_so(
    run, tiny_model_folder, tmp_path, monkeypatch, make_picture_shards, capsys
):
    """Pictures that are no letters: no judge reads them, and neither Inception nor CLIP is there."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    data = unlabelled(make_picture_shards(tmp_path / "data"))
    (tmp_path / "pairs.yaml").write_text("pairs: [[letter a, letter v], [letter v, picture 3]]\n")
    more = ["--prompt-pairs", tmp_path / "pairs.yaml"]
    out = run(tiny_model_folder, data=data, judge=None, more=more, status=3)
    report, metrics = (out / "report.md").read_text(), metrics_of(out, "tiny")
    missing = report.split("## Not computed")[1]
    for wanted in ("FID, KID, precision and recall: no Inception weights at", "LPIPS: LPIPS needs the VGG16 weights", "give --clip FOLDER"):
        assert wanted in missing and wanted in capsys.readouterr().out + missing
    assert {"generation/texture", "anagram/rotate_180/texture_turned", "fit/val_loss"} <= metrics.keys()
    assert {"generation/texture_over_contrast", "generation/contrast", "anagram/rotate_180/texture_over_contrast_turned"} <= metrics.keys()
    assert not any(word in name for name in metrics for word in ("fid", "kid", "read", "clip", "lpips"))
    assert 'class="missing"' in (out / "report.html").read_text()
    out = run(tiny_model_folder, data=data, judge=None, more=[*more, "--without", "lpips", "inception", "clip"])
    assert "## Not computed" not in (out / "report.md").read_text() and metrics_of(out, "tiny") == metrics


def changed(folder: Path, pattern: bytes, by: Callable[[re.Match], bytes] | bytes) -> Path:
    """The folder, with what fits a pattern replaced in its tars, and a manifest that says so."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for entry in manifest.pop("shards"):
        (folder / entry["name"]).write_bytes(re.sub(pattern, by, (folder / entry["name"]).read_bytes()))
    entries = [{**entry, "sha256": file_sha256(folder / entry["name"])} for entry in read_manifest(folder)["shards"]]
    write_manifest(folder, entries, **{name: value for name, value in manifest.items() if name != "count"})
    return folder


def unlabelled(folder: Path) -> Path:
    """The folder, with labels of -1 in its tars."""
    return changed(folder, rb'"label": [0-2]', b'"label":-1')


def test_captions_and_prompt_pairs_where_there_are_no_letters(run, tiny_model_folder, tmp_path, monkeypatch, make_picture_shards):
    data, clip, prompts = unlabelled(make_picture_shards(tmp_path / "data")), make_clip(tmp_path / "clip"), []
    (tmp_path / "pairs.yaml").write_text("styles: [a, the]\npairs: [[letter a, letter v], [letter v, picture 3]]\n")
    whole = Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, p, v, s, **o: (prompts.append(p), whole(self, p, v, s, **o))[1])
    more = [
        "--without",
        "lpips",
        "inception",
        "--clip",
        clip,
        "--prompt-pairs",
        tmp_path / "pairs.yaml",
        "--metrics",
        "generation",
        "anagram",
    ]
    metrics = metrics_of(run(tiny_model_folder, data=data, judge=None, more=more), "tiny")
    assert prompts[0] == [["picture 0", "picture 1", "picture 2", "picture 3"]]
    assert prompts[1] == [["a letter a", "the letter v"] * 2, ["a letter v", "the picture 3"] * 2]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Anagrams and components: 4 pictures of 2 prompt pairs, which are sampled again with further seeds." in report
    changed(data, rb"picture (0|[3-9]|1\d|2\d)", lambda found: b" " * len(found[0]))  # two captions are left, of the second and the third
    run(tiny_model_folder, data=data, judge=None, more=["--without", "lpips", "inception", "clip", "--metrics", "generation"])
    report = (tmp_path / "out" / "report.md").read_text()
    assert "Generation: captions left out: 22 without a caption." in report
    assert "Generation: 4 pictures of 2 captions, which are sampled again with further seeds." in report
    assert {"generation/clip_score", "anagram/rotate_180/alignment_q95", "anagram/rotate_180/concealment"} <= metrics.keys()
    for text, message in (("pairs: [[a]]", "a list of two subjects each"), ("[1]", "wanted a YAML of `pairs`")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(tmp_path / "bad.yaml")
    shipped = read_prompts(PROMPT_PAIRS)
    three = read_prompts(PROMPT_PAIRS, 3)
    assert [texts[:2] for texts in three] == shipped and three[0][2] == "an oil painting of an old fisherman" and len(set(three[-1])) == 3
    assert len(shipped) >= 20 and len(set(shipped)) == len(shipped) and all(style in shipped[0][0] for style in ["oil painting"])


def test_a_plain_folder_of_pictures(run, vae_alone, tmp_path):
    folder = tmp_path / "photos"
    for number, (width, height) in enumerate([(40, 32), (32, 64), (90, 90), (32, 32), (20, 99)]):
        (folder / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        noise = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        Image.fromarray(noise.numpy()).save(folder / f"class{number % 2}" / f"{number}.png")
    (folder / "class0" / "broken.jpg").write_bytes(b"none")
    more = ["--without", "lpips", "inception"]
    out = run(vae_alone, data=folder, judge=None, more=[*more, "--image-size", 32])
    assert json.loads((out / "vae-eq" / "about.json").read_text())["samples"]["reconstruction"]["count"] == 6
    report = (out / "report.md").read_text()
    assert (
        "2 pictures cannot be read, the next one stands in for each: " in report
        and "class0/broken.jpg" in report
        and "class0/4.png" in report
    )
    more += ["--image-size", 32, "--metrics", "reconstruction", "--clip", "nowhere"]
    for count, message in (
        (5, "The first 5 of 6 pictures, in an order by a hash"),
        (7, "--num-images 7: there are 6 pictures, and all are"),
    ):
        report = (run(vae_alone, data=folder, judge=None, more=[*more, "--num-images", count]) / "report.md").read_text()
        assert message in report and "Not used (--clip nowhere): none of reconstruction needs it." in report
    more = more[:3]
    for words, message in (
        ([], "give --image-size"),
        (["--image-size", 128], "6 pictures in a row cannot be read, or are below 128 x 128"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(vae_alone, data=folder, judge=None, more=[*more, *words])


def test_what_is_no_number_is_noted(run, vae_alone, tmp_path):
    """Latents of one pixel do not vary."""
    more = ["--without", "lpips", "inception", "--metrics", "equivariance", "--image-size", 4]
    (folder := tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8), "red").save(folder / "0.png")
    with pytest.raises(SystemExit, match="flat' holds 1 picture, wanted at least 2"):
        run(vae_alone, data=folder, judge=None, more=more)
    Image.new("RGB", (8, 8), "red").save(folder / "1.png")
    report = (run(vae_alone, data=folder, judge=None, more=more) / "report.md").read_text()
    assert "no finite number, as of pictures that are too few, too small or all alike: equivariance/" in report


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("-5", "picture '000000000': its label is -5, but the judge reads letters, wanted 0 .A. to 25 .Z., or -1 for none"),
        ("26", "picture '000000000': its label is 26"),
        ("-1", ""),
    ],
)
def test_labels_that_are_no_letters_are_told(run, tiny_model_folder, make_picture_shards, tmp_path, label, message):
    data = changed(make_picture_shards(tmp_path / "labelled"), b'"label": 0', f'"label":{label}'.encode())
    more = [*FULL[:2], "--metrics", "generation"]
    if message:
        with pytest.raises(SystemExit, match=message):
            run(tiny_model_folder, data=data, more=more)
        return
    report = (run(tiny_model_folder, data=data, more=more) / "report.md").read_text()
    assert "2 of 6 pictures have no label: what the judge reads of real pictures is left out" in report


@pytest.mark.slow  # writes 528 MB of stand-in weights
def test_lpips_is_that_of_torchmetrics(run, vae_alone, tiny_pictures, vgg16_weights):
    metrics = metrics_of(run(vae_alone), "vae-eq")
    samples, vae = PictureSamples(tiny_pictures), load_vae(vae_alone)
    x = torch.stack([samples[n]["x"] for n in range(6)])
    theirs, view = LearnedPerceptualImagePatchSimilarity(net_type="vgg"), parse_view("rotate_180")
    with torch.no_grad():
        z = encode(vae, x)
        assert metrics["reconstruction/lpips"] == pytest.approx(float(theirs(decode(vae, z).clamp(-1, 1), x)), rel=1e-4)
        theirs.reset()
        turned = float(theirs(decode(vae, view(z)).clamp(-1, 1), view(x)))
    assert metrics["equivariance/rotate_180/lpips"] == pytest.approx(turned, rel=1e-4) and "equivariance/mean/lpips" in metrics


def test_all_pairs_and_their_matrix(run, tiny_model_folder):
    out = run(tiny_model_folder, more=["--without", "lpips", "--metrics", "anagram", "--num-pairs", "all", "--num-inference-steps", 1])
    assert Image.open(out / "tiny" / "letter_matrix_rotate_180.png").width == 800
    assert json.loads((out / "tiny" / "about.json").read_text())["samples"]["anagram/rotate_180"]["count"] == 676
    found = metrics_of(out, "tiny")
    assert {f"anagram/rotate_180/{name}ambigramability" for name in ("", "equal/", "trivial/forced_")} <= found.keys()
    report = (out / "report.md").read_text()
    assert "of 676 pictures 9 need no anagram, for one plain letter reads right in every view (anagram/rotate_180/trivial/...)" in report
    assert "and 19 want one letter more than once (anagram/rotate_180/equal/...). What is read of the other 648 has" in report
    assert "anagram/rotate_180/trivial/ambigramability ↑" in report


def test_anagrams_of_three_views(run, tiny_model_folder):
    views = ["--views", "rotate_90,patch_permute:2:1", "flip", "inner_circle"]
    out = run(tiny_model_folder, more=["--without", "lpips", "--metrics", "equivariance", "anagram", *views])
    names = metrics_of(out, "tiny")
    assert {"anagram/rotate_90,patch_permute:2:1/read_right_turned_2", "anagram/flip/read_right_turned"} <= names.keys()
    assert "equivariance/patch_permute:2:1/psnr" in names
    assert "anagram/inner_circle:8/texture_turned" in names  # as fine as the latents
    sheet = Image.open(out / "tiny" / "anagrams_rotate_90_patch_permute-2-1.png")
    assert sheet.width > Image.open(out / "tiny" / "anagrams_flip.png").width
    page = (out / "report.html").read_text()
    assert (
        "anagram/rotate_90,patch_permute:2:1/ambigramability ↑" in page
        and "<td>anagram/rotate_90,patch_permute:2:1/texture_turned_1 →1" in page
    )


COMPONENTS = ["--components", "hybrid:0.06", "colour"]


def test_components(run, tiny_model_folder, capsys):
    """Each part read, of the model's pictures and of the data's; what latents do not know is left out, and said to be."""
    models = [tiny_model_folder, f"blend={tiny_model_folder}@blend=pixels"]
    out = run(*models, more=["--without", "lpips", "--metrics", "components", *COMPONENTS])
    latents, pixels = (metrics_of(out, name) for name in ("tiny", "blend"))
    names = {f"components/hybrid:0.06/{name}" for name in ("forced_ambigramability", "read_right_low", "forced_read_right_high_data")}
    assert names <= latents.keys() and names <= pixels.keys()
    assert "components/colour/read_right_grey" in pixels and not any("colour" in name for name in latents)
    report = (out / "report.html").read_text()
    assert "Not computed for tiny: components colour (latents know nothing of colours: add @blend=pixels)." in report
    assert "<td>components/hybrid:0.06/forced_read_right_low_data</td>" in report and "each part read as its own?" in report
    assert Image.open(out / "blend" / "components_colour.png").width > 3 * 32 and "tiny: components hybrid-0.06" in report
    assert "components/colour/read_right_grey" in (out / "report.md").read_text()


def test_the_best_of_several_seeds(run, tiny_model_folder, tmp_path, tiny_chooser):
    """Pictures come in rounds: with two seeds the first half are those of one; another judge chooses among each pair's."""
    more = ["--without", "lpips", "--metrics", "anagram", "components", "--components", "hybrid:0.06", "--batch-size", 4]
    seeds = ["--num-seeds", 3, "--chooser", tiny_chooser, "--num-shown", 7]
    once, out = run(tiny_model_folder, more=more, out=tmp_path / "once"), run(tiny_model_folder, more=[*more, *seeds])
    found = metrics_of(out, "tiny")
    for prefix in ("anagram/rotate_180", "components/hybrid:0.06"):
        assert 0 <= found[f"{prefix}/best_of_3"] <= found[f"{prefix}/forced_best_of_3"] <= 1
        assert json.loads((out / "tiny" / "about.json").read_text())["samples"][prefix]["count"] == 3 * 4
    values, first = (load_file(folder / "tiny" / "anagram_rotate_180.safetensors") for folder in (out, once))
    again = run(tiny_model_folder, more=[*more, *seeds[:2]], out=tmp_path / "again")  # the same pictures, not chosen from
    paired = differences(*(Measured.open(folder / "tiny") for folder in (out, again)))["anagram/rotate_180/ambigramability"]
    assert paired.paired and paired.value == 0
    assert (out / "report.html").read_text().count("the same prompts and seeds by each model") == 2  # the picture, and its caption
    assert torch.equal(values["energy"][:4], first["energy"]) and not torch.equal(values["energy"][4:8], first["energy"])
    assert len(values["shown"]) == 7 and len(values["chosen"]) == 12 and "chosen" not in first


def test_quick_is_smaller(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "a", "--data", "b", "--out", "c", "--quick"])
    args = command.parse_args()
    assert (args.num_images, args.num_letters, args.num_pairs, args.num_inference_steps) == (128, 64, "32", 10)


def test_quick_does_not_take_back_what_was_asked(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "a", "--data", "b", "--out", "c", "--quick", "--num-images", "4"])
    assert command.parse_args().num_images == 4


def test_a_verdict_in_the_report(run, tiny_model_folder, capsys):
    out = run(tiny_model_folder, more=["--metrics", "fit", "--num-images", 20])
    assert "**tiny**: The UNet does not fit this VAE: " in (out / "report.md").read_text()
    assert 'class="verdict bad"' in (out / "report.html").read_text() and "tiny: The UNet does not fit" in capsys.readouterr().out


def test_pictures_that_are_not_square(run, vae_alone, tmp_path):
    samples = []
    for number in range(4):
        noise = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        buffer = io.BytesIO()
        Image.fromarray(noise.numpy()).save(buffer, "png")
        samples.append({"__key__": str(number), "png": buffer.getvalue()})
    wide = tmp_path / "wide"
    wide.mkdir()
    write_manifest(wide, [write_shard(wide / "pictures-000000.tar", samples)], kind="pictures", image_size=32)
    metrics = metrics_of(run(vae_alone, data=wide, judge=None, more=["--without", "lpips", "inception"]), "vae-eq")
    assert "equivariance/flip/psnr" in metrics and "equivariance/rotate_90/psnr" not in metrics and "equivariance/mean/psnr" in metrics


def test_the_batch_size_reaches_every_question(run, tiny_model_folder, monkeypatch):
    sampled, call = [], Sampler.__call__
    monkeypatch.setattr(Sampler, "__call__", lambda self, p, v, seeds, **o: (sampled.append(len(seeds)), call(self, p, v, seeds, **o))[1])
    run(tiny_model_folder, more=[*FULL[:2], "--batch-size", 3])
    assert sampled == [3, 1, 3, 1]  # 4 letters, 4 pairs


def test_unreadable_pictures_are_named(run, vae_alone, make_picture_shards, tmp_path):
    data = make_picture_shards(tmp_path / "my pictures", corrupt={2, 4})
    report = (run(vae_alone, data=data, more=FULL[:2]) / "report.md").read_text()
    assert "2 pictures cannot be read, the next one stands in for each: 000000002, 000000004." in report


def test_a_pixel_model_has_no_vae_to_ask_of(run, tmp_path, tiny_model_folder):
    parts = vars(Networks.open(tiny_model_folder))
    parts["unet"] = UNet2DConditionModel(**TINY_UNET, sample_size=32, in_channels=3, out_channels=3, cross_attention_dim=16).eval()
    out = run(save_model_folder(tmp_path / "pixels", vae=Pixels(), **parts), more=FULL[:2])
    assert {name.split("/")[0] for name in metrics_of(out, "pixels")} == {"fit", "generation", "anagram"}
    assert "is a pixel model, it has no VAE" in (out / "report.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--views", "rotat_180"], "unknown view 'rotat_180': did you mean rotate_180"),
        (["--views", "patch_permute:3"], "needs sides divisible by 3 (3, 6, 9...), got 8 x 8"),
        (["--judge", "nowhere"], "'nowhere' holds no judge"),
        (["--clip", "nowhere"], "no CLIP in 'nowhere'"),
        (["--inception", "nowhere"], "no Inception weights at 'nowhere'"),
        (["--features", "resnet18"], "--features: got 'resnet18', wanted NAME=WEIGHTS"),
        (["--num-images", "0"], "--num-images: got 0, wanted at least 2"),
        (["--image-size", "0"], "--image-size: got 0, wanted at least 1"),
        (["--num-pairs", "all", "--views", "flip,mirror"], "--num-pairs all: for two prompts a picture, got 3"),
        (["--num-pairs", "some"], "--num-pairs: got 'some', wanted a whole number, at least 2"),
        (["--device", "foo"], "--device foo: "),
        (["--components", "hybrid:0.06"], "--metrics components and --components NAME (hybrid:0.06, colour, motion:0.3) need each other"),
        (["components", "--components", "hybrid:2"], "components 'hybrid': got (2.0,)"),
        (["--num-seeds", "0"], "--num-seeds: got 0, wanted at least 1"),
        (["--num-shown", "0"], "--num-shown: got 0, wanted at least 1"),
        (["--seed", str(2**64)], "--seed: got 18446744073709551616, wanted 0 or more, up to 4611686018427387904"),
        (["--guidance-scale", "nan"], "--guidance-scale: got nan, wanted 0 or more, up to 10000"),
        (["components", "--components", "colour"], "components colour: latents know nothing of colours; add a model that blends in pixels"),
        (["components", "--components", "hybrid:0.1:0.05", "--num-pairs", "all"], "--num-pairs all: for two prompts a picture, got 3"),
        (["--chooser", "nowhere"], "--chooser: nothing to choose from with --num-seeds 1, wanted 2 or more"),
        (["--num-seeds", "2", "--chooser", "nowhere"], "'nowhere' holds no judge"),
        (["--num-seeds", "2", "--chooser", "THE JUDGE"], "--chooser is the judge itself, which must not choose what it reads"),
        (["--without", "judge", "lpips", "inception", "clip", "--judge", "x"], "--judge and --without judge: give one of them"),
        (["--without", "clip", "--without", "lpips", "--clip", "x"], "--clip and --without clip: give one of them"),
        (["--without", "inception", "--inception", "x"], "--inception and --without inception: give one of them"),
        (["--views", "rotate_180", "--views", "flip,flip"], "--views flip,flip: one view is there twice"),
        (["--views", "identity"], "--views identity: one view is there twice (the upright one"),
        (["--prompt-pairs", "nowhere"], "--prompt-pairs means nothing where a judge reads letters"),
        (["--batch-size", "0"], "--batch-size: got 0, wanted at least 1"),
        (["--without", "judge", "lpips", "inception", "clip"], "give other prompts with --prompt-pairs, other options, or leave it out"),
        (["--prompt-pairs", "nowhere", "--without", "judge", "lpips", "inception", "clip"], "no prompt pairs at 'nowhere'"),
    ],
)
def test_errors_are_one_line(run, tiny_model_folder, tiny_judge, more, message, monkeypatch, capsys):
    monkeypatch.setattr(Reconstruction, "measure", lambda *a: pytest.fail("the error should have come first"))
    monkeypatch.setattr(Sampled, "measure", lambda *a: pytest.fail("the error should have come first"))
    with pytest.raises(SystemExit) as info:
        judge = {"judge": None} if "judge" in more else {}
        words = [tiny_judge if word == "THE JUDGE" else word for word in more]
        run(tiny_model_folder, more=["--metrics", "reconstruction", "anagram", *words], **judge)
    error = capsys.readouterr().err if info.value.code == 2 else str(info.value.code)
    assert error.startswith("error: ") and message in error and "\n" not in error.rstrip("\n")


def test_options_that_do_not_fit_are_told_first(run, tiny_model_folder, tmp_path, tiny_chooser, vae_alone, monkeypatch):
    monkeypatch.setattr(Reconstruction, "measure", lambda *a: pytest.fail("the error should have come first"))
    three = ["--views", "rotate_90,rotate_180", "--num-inference-steps", 2]
    with pytest.raises(SystemExit, match="rotate_90,rotate_180 by '.*reduction=alternate': reduction=alternate: 2 steps show only"):
        run(f"{tiny_model_folder}@reduction=alternate", more=["--metrics", "reconstruction", "anagram", *three])
    with pytest.raises(SystemExit, match="guidance_rescale means nothing without guidance"):
        run(f"{tiny_model_folder}@guidance_rescale=0.5", more=["--guidance-scale", 1])
    with pytest.raises(SystemExit, match="--num-seeds and --chooser are for anagrams and components, of which none are asked"):
        run(tiny_model_folder, more=["--metrics", "generation", "--num-seeds", 2, "--chooser", tiny_chooser])
    with pytest.raises(SystemExit, match="unknown components 'nonsense'"):
        run(vae_alone, more=["--components", "nonsense"])
    with pytest.raises(SystemExit, match="holds another kind of model, no judge"):
        run(tiny_model_folder, judge=tiny_model_folder / "text_encoder")


def test_a_model_that_samples_no_numbers_is_named(run, tiny_model_folder, make_model_folder, tmp_path):
    """Where figures would be means of NaN: the others are measured, and kept."""
    folder = make_model_folder(tmp_path / "model")
    (path,) = (folder / "unet").glob("*.safetensors")
    weights = load_file(path)
    save_file(weights | {"conv_out.bias": torch.full_like(weights["conv_out.bias"], 1e38)}, path, {"format": "pt"})
    with pytest.raises(SystemExit, match="error: generation of 'large': sampling: after step [12] .* are NaN or infinite"):
        run(tiny_model_folder, f"large={folder}", more=["--metrics", "generation"])
    with pytest.raises(SystemExit, match="guidance_scale: got -1.0, wanted 0 or more, up to 10000"):
        run(f"{tiny_model_folder}@guidance_scale=-1", more=["--metrics", "generation"])


@pytest.mark.parametrize("name", ["report.md", "report.html", "models.png"])
def test_a_report_of_somebody_else_is_not_replaced(run, vae_alone, tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("my thesis")
    with pytest.raises(SystemExit, match=f"out' holds {name}, which was not written by this command, and would be replaced: give another"):
        run(vae_alone)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_nothing_to_ask(run, vae_alone):
    with pytest.raises(SystemExit, match="no model holds a UNet, so there is nothing to ask"):
        run(vae_alone, more=["--metrics", "fit"])


def test_folders_that_are_no_models(run, tmp_path):
    with pytest.raises(SystemExit, match="error: model folder .*nowhere' does not exist"):
        run(tmp_path / "nowhere")


def test_judge_reads_other_sizes(tiny_judge):
    judge = Judge.open(tiny_judge)
    assert judge(torch.zeros(3, 3, 64, 64)).shape == (3,)


def test_a_model_that_fails_does_not_stop_the_others(run, tiny_model_folder, make_model_folder, tmp_path, monkeypatch, capsys):
    """What failed is named on the screen and in the report, by status 1; all else is written, and the same command tries it again."""
    broken = make_model_folder(tmp_path / "model")
    (path,) = (broken / "unet").glob("*.safetensors")
    sound = load_file(path)
    save_file(sound | {"conv_out.bias": torch.full_like(sound["conv_out.bias"], 1e38)}, path, {"format": "pt"})
    models = [f"large={broken}", f"other={tiny_model_folder}"]
    asked = ["--metrics", "reconstruction", "generation", "--without", "lpips"]
    why = r"generation of 'large': sampling: after step [12] .* are NaN or infinite"
    with pytest.raises(SystemExit, match=f"^error: {why}"):
        run(*models, more=asked)
    out = tmp_path / "out"
    assert re.search(f"failed: {why}", capsys.readouterr().err)
    assert "generation/read_right" in metrics_of(out, "other") and "reconstruction/psnr" in metrics_of(out, "large")
    assert not [name for name in metrics_of(out, "large") if name.startswith("generation")]
    for name in ("report.md", "report.html"):
        text = (out / name).read_text()
        assert "Failed" in text and "sampling: after step" in text and "other" in text
    kept = metrics_of(out, "other")
    save_file(sound, path, {"format": "pt"})
    run(*models, more=asked)
    assert metrics_of(out, "other") == kept and "generation/read_right" in metrics_of(out, "large")
    assert "Failed" not in (out / "report.md").read_text()


def test_one_process_that_fails_keeps_no_report_back(run, tiny_model_folder, make_model_folder, monkeypatch, tmp_path, capsys):
    """The other goes on, and says what the first has said. (A launcher ends all where one exits with an error: the last one does.)"""
    models = [f"small={make_model_folder(tmp_path / 'model', seed=3)}", f"other={tiny_model_folder}"]
    more = ["--metrics", "reconstruction", "generation", "--without", "lpips", "--batch-size", 2]
    draw, calls = Drawn._draw, []

    def short_of_memory(self, *arguments, **options):
        calls.append(self)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return draw(self, *arguments, **options)

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with monkeypatch.context() as patched:
        patched.setattr(Drawn, "_draw", short_of_memory)
        patched.setattr(command.Evaluation, "_answer", once := Once(command.Evaluation._answer))
        out = run(*models, more=more)
    assert "is written by the one that finishes last" in capsys.readouterr().out and not (out / "report.md").exists()
    assert once.models == ["small", "other"]
    monkeypatch.setenv("RANK", "1")
    why = "generation of 'small': OutOfMemoryError: CUDA out of memory"
    with pytest.raises(SystemExit, match=f"^error: {why}$"):
        run(*models, more=more)
    assert why in (out / "report.md").read_text()
    assert "generation/read_right" in metrics_of(out, "other") and "reconstruction/psnr" in metrics_of(out, "small")
    run(*models, more=more)  # as if both did so at once
    monkeypatch.setenv("RANK", "0")
    run(*models, more=more)
    assert "generation/read_right" in metrics_of(out, "small") and "Failed" not in (out / "report.md").read_text()
    assert not list(out.glob(".failed-*"))


class Once:
    """A method that refuses to be called of a model again: the processes of the test above follow each other."""

    def __init__(self, method):
        self.method, self.models = method, []

    def __get__(self, evaluation, kind):
        def call(entry):
            if entry.name in self.models:
                return None, False
            self.models.append(entry.name)
            return self.method(evaluation, entry)

        return call


@pytest.mark.parametrize("failing", ["anagram_metrics", "generation_metrics"])
def test_a_question_that_fails_leaves_nothing_in_the_report(run, tiny_model_folder, monkeypatch, failing):
    """Its sheets neither: they were made before."""

    def fails(*arguments):
        raise RuntimeError("no figures")

    monkeypatch.setattr(f"eqldm.evaluation.answers.{failing}", fails)
    out = run(tiny_model_folder, more=["--metrics", "generation", "anagram"], status="error: " + {
        "anagram_metrics": "anagram/rotate_180 of 'tiny': RuntimeError: no figures",
        "generation_metrics": "generation of 'tiny': RuntimeError: no figures",
    }[failing])  # fmt: skip
    page = (out / "report.html").read_text()
    assert ("tiny: letters" in page) == (failing == "anagram_metrics") and ("tiny: anagrams" in page) == (failing != "anagram_metrics")


def test_a_baseline_that_fails_is_not_replaced_in_silence(run, tiny_model_folder, make_model_folder, tmp_path, monkeypatch):
    answer = command.Evaluation._answer

    def fails(self, entry):
        if entry.name == "base":
            raise RuntimeError("broken")
        return answer(self, entry)

    monkeypatch.setattr(command.Evaluation, "_answer", fails)
    models = [f"a={tiny_model_folder}", f"b={make_model_folder(tmp_path / 'model', seed=3)}"]
    (tmp_path / "out" / "base").mkdir(parents=True)
    for name in ("metrics.json", "about.json"):
        (tmp_path / "out" / "base" / name).write_text("{}")
    words = "'base', which all others are held against, is not in the report, and differences are from 'a' instead"
    with pytest.raises(SystemExit, match=words):
        run(*models, more=["--baseline", f"base={tiny_model_folder}", "--metrics", "reconstruction", "--without", "lpips"])
    report = (tmp_path / "out" / "report.md").read_text()
    assert words in report and "out/base' still holds what an earlier command found of 'base'" in report


@pytest.mark.parametrize("broken", ["features", "probabilities", "draw"])
def test_values_that_are_no_numbers_name_model_and_picture(run, tiny_model_folder, tiny_judge, monkeypatch, broken):
    """They would be a letter, a black picture, or the end of the process."""

    def spoilt(function):
        def call(self, *arguments, **options):
            values = function(self, *arguments, **options)
            values[-1] = torch.nan
            return values

        return call

    monkeypatch.setattr(*{
        "features": (Judge, "features", spoilt(Judge.features)),
        "probabilities": (Judge, "probabilities", spoilt(Judge.probabilities)),
        "draw": (Drawn, "_draw", spoilt(Drawn._draw)),
    }[broken])  # fmt: skip
    what = {
        "features": "features 'judge' hold NaN or infinity for 1 of 6 pictures, first for picture 000000005",
        "probabilities": "generation of 'tiny': the judge's answers hold NaN or infinity for 1 of 4 pictures, first for picture 3 .seed 3.",
        "draw": "generation of 'tiny': pixels hold NaN or infinity for 1 of 4 pictures, first for picture 3 .seed 3.",
    }[broken]
    with pytest.raises(SystemExit, match=what):
        run(tiny_model_folder, more=["--metrics", "generation"])
