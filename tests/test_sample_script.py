"""sample.py as a user runs it: files, the command that makes a picture again, and errors."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from eqldm import sample as job
from eqldm.data.samples import picture_to_tensor
from eqldm.evaluation.judge import Judge
from eqldm.model_folder import load_unet, weights_hash
from eqldm.sample import command
from eqldm.views import D4
from test_clip import make_clip

ROOT = Path(__file__).parents[1]
PROMPTS = ["the letter a", "the letter v"]
specification = importlib.util.spec_from_file_location("sample_script", ROOT / "sample.py")
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


@pytest.fixture
def run(monkeypatch):
    """`run(*arguments)`: sample.py's main."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
        script.main()

    return call


@pytest.fixture
def failed(run, capsys):
    """`failed(*arguments)`: the one line that it exits with."""

    def call(*arguments) -> str:
        with pytest.raises(SystemExit) as info:
            run(*arguments)
        error = capsys.readouterr().err.removesuffix("\n") if info.value.code == 2 else info.value.code
        assert isinstance(error, str) and error.startswith("error: ") and "\n" not in error
        return error

    return call


def options(model: Path, out: Path) -> list:
    return ["--model", model, "--out", out, "--num-inference-steps", 2]


def test_files_and_the_command_that_makes_them_again(run, tiny_model_folder, tmp_path, capsys):
    prompts = ['the letter a\'s "$HOME"', "`v` \u00e9"]  # what a shell would change
    out = tmp_path / "out"
    more = ["--num-samples", 3, "--batch-size", 2, "--seed", 5, "--guidance-scale", 2.5, "--views", "identity", "flip@patch_permute:2:7",
            "--scheduler", "euler_ancestral", "--negative-prompt", "picture 1", "picture 2", "--image-size", 48, "--style", "a",
            "--reduction", "weighted", "--weights", 1, 2, "--guidance-rescale", 0.5, "--symmetrise", "--precision", "32-true"]  # fmt: skip
    long = ["--model", tiny_model_folder, "--num-inference-steps", 2, "--out", out]
    run(*long, "--prompts", "picture 0 '", "$a `v`", *more)
    assert capsys.readouterr().out.splitlines()[-1] == f"open in a browser: {out / 'index.html'}"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [f"{s}.{e}" for s in (5, 6, 7) for e in ("png", "json")] + ["sheet.png", "index.html"]
    )
    assert Image.open(out / "6.png").size == (48, 48)
    about = json.loads((out / "6.json").read_text())
    assert about["seed"] == 6 and about["views"] == ["identity", "flip@patch_permute:2:7"]
    assert about["unet_hash"] == weights_hash(load_unet(tiny_model_folder)) != about["vae_hash"]
    assert about["prompts"] == ["picture 0 '", "$a `v`"] and about["guidance_scale"] == 2.5

    words = shlex.split(about["command"])
    assert words[:2] == ["python", "sample.py"] and words[-2:] == ["--out", "DIR"]
    again = tmp_path / "again"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here
    result = subprocess.run([sys.executable, *words[1:-1], again], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in again.glob("?.png")) == ["5.png", "6.png"]  # the batch that 6 was sampled in
    for name in ("5.png", "6.png", "6.json"):
        assert (again / name).read_bytes() == (out / name).read_bytes(), name
    assert shlex.split(command({**about, "prompts": prompts}, [6]))[5:7] == prompts


def test_no_options_sample_the_shipped_model(run, make_model_folder, tmp_path, monkeypatch):
    make_model_folder(tmp_path / "glyphs-eq")
    monkeypatch.setattr(job, "PRETRAINED", tmp_path)
    monkeypatch.chdir(tmp_path)
    run("--num-inference-steps", 1, "--num-samples", 1)
    (file,) = (tmp_path / "runs" / "samples").glob("*/0.json")  # a folder for each call: none mixes its pictures with another's
    about = json.loads(file.read_text())
    assert about["model"] == str(tmp_path / "glyphs-eq") and about["prompts"] == ["the letter A", "the letter V"]
    assert "--model" not in about["command"]


@pytest.mark.parametrize("arguments", [["--model", "somewhere"], ["--views", "identity", "flip", "mirror"]])
def test_other_models_and_other_views_need_prompts(run, arguments, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert "--prompts: give one for each view" in capsys.readouterr().err


def test_errors_are_one_line(failed, tiny_model_folder, tmp_path):
    out = tmp_path / "out"
    good = options(tiny_model_folder, out)
    cases = [
        ([*options(tmp_path / "none", out), "--prompts", *PROMPTS], "none' does not exist: give a diffusers pipeline folder"),
        ([*good, "--prompts", "a", "v", "a"], "one prompt for each view: got 3 prompts and 2 views"),
        ([*good, "--prompts", *PROMPTS, "--views", "identity", "flipp"], "unknown view 'flipp': did you mean flip"),
    ]
    for arguments, message in cases:
        assert message in failed(*arguments)
    assert not out.exists()


@pytest.mark.slow
def test_errors_exit_with_a_code(tmp_path):
    words = [sys.executable, "sample.py", *map(str, options(tmp_path, tmp_path / "out")), "--prompts", *PROMPTS]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith(f"error: '{tmp_path}' is no model folder with vae, unet, text_encoder")


def test_a_folder_that_cannot_be_made(failed, tiny_model_folder, tmp_path):
    (tmp_path / "file").write_text("")
    error = failed(*options(tiny_model_folder, tmp_path / "file"), "--prompts", *PROMPTS)
    assert "file' cannot be made" in error and "give another --out" in error


def test_a_full_disk(failed, run, tiny_model_folder, small_disk):
    words = ["--prompts", *PROMPTS, "--num-samples", 2, "--animate", "gif"]
    out = small_disk(8) / "out"
    error = failed(*options(tiny_model_folder, out), *words)
    assert f"'{out}/" in error and "could not be written (No space left on device): make room, and the same command goes on" in error
    assert not list(out.glob(".*")), "half a file was left"
    small_disk(20_000)
    run(*options(tiny_model_folder, out), *words)
    assert (out / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scheduler", "dppm"], "unknown scheduler 'dppm'"),
        (["--reduction", "median"], "reduction: got median, wanted one of mean"),
        (["--image-size", "30"], "image size 30: wanted a multiple of f = 4"),
        (["--views", "identity", "patch_permute:3"], "needs sides divisible by 3 (3, 6, 9...), got 8 x 8 (32 px at f = 4)"),
        (["--views", "identity", "rescale"], "'rescale' is no view for sampling"),
        (["--negative-prompt", "a " * 20], "is longer than the model's 8 tokens"),
        (["--num-samples", "0"], "--num-samples: got 0, wanted at least 1, up to 100000"),
        (["--num-samples", "1000000000"], "--num-samples: got 1000000000, wanted at least 1, up to 100000"),
        (["--image-size", "100000"], "--image-size: got 100000, wanted at least 1, up to 16384"),
        (["--time-travel", "1000000000"], "--time-travel: got 1000000000, wanted at least 1, up to 1000"),
        (["--upscale", "1000000"], "--upscale: got 1000000, wanted at least 1, up to 64"),
        (["--guidance-scale", "1e308"], "--guidance-scale: got 1e308, wanted 0 or more, up to 10000"),
        (["--num-inference-steps", "1000000000"], "--num-inference-steps: got 1000000000, wanted at least 1, up to 10000"),
        (["--num-inference-steps", "2000"], "num_inference_steps: got 2000, but DDIMScheduler knows no more than 1000"),
        (["--num-inference-steps", "0"], "--num-inference-steps: got 0, wanted at least 1"),
    ],
)
def test_more_errors(failed, tiny_model_folder, tmp_path, arguments, message):
    assert message in failed(*options(tiny_model_folder, tmp_path), "--prompts", *PROMPTS, *arguments)


def test_the_best_are_kept(run, make_model_folder, tmp_path, monkeypatch):
    letters = [f"the letter {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    model, out = make_model_folder(tmp_path / "model", captions=letters), tmp_path / "out"
    run(*options(model, out), "--prompts", *PROMPTS, "--num-samples", 5, "--batch-size", 2, "--keep", 2, "--seed", 3)
    scores = {int(seed): score for seed, score in json.loads((out / "scores.json").read_text()).items()}
    assert list(scores) == [3, 4, 5, 6, 7] and all(0 <= score <= 1 for score in scores.values())
    best = sorted(scores, key=scores.get, reverse=True)[:2]
    assert {path.stem for path in out.glob("?.png")} == {path.stem for path in out.glob("?.json")} == set(map(str, best))
    about = json.loads((out / f"{best[0]}.json").read_text())
    assert about["score"] == scores[best[0]] and f"seed {best[0]}, score" in (out / "index.html").read_text()
    judge, x = Judge.open(), picture_to_tensor(Image.open(out / f"{best[0]}.png"))[None]
    probabilities = [float(judge.probabilities(view(x))[0, label]) for view, label in ((D4[0], 0), (D4[2], 21))]
    assert min(probabilities) == pytest.approx(scores[best[0]], abs=0.02)  # 8 bits


def test_the_best_so_far_are_kept_when_it_is_stopped(run, make_model_folder, tmp_path, monkeypatch):
    letters = [f"the letter {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    model, out, calls, whole = make_model_folder(tmp_path / "model", captions=letters), tmp_path / "out", [], job.Anagram.sample

    def stops(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    monkeypatch.setattr(job.Anagram, "sample", stops)
    with pytest.raises(KeyboardInterrupt):
        run(*options(model, out), "--prompts", *PROMPTS, "--num-samples", 9, "--batch-size", 3, "--keep", 2)
    scores = json.loads((out / "scores.json").read_text())
    best = sorted(scores, key=scores.get, reverse=True)[:2]
    assert len(scores) == 6 and {path.stem for path in out.glob("?.png")} == {path.stem for path in out.glob("?.json")} == set(best)


def test_pictures_made_otherwise_do_not_mix(run, failed, tiny_model_folder, tmp_path):
    some = [*options(tiny_model_folder, tmp_path), "--prompts", *PROMPTS, "--num-samples", 1]
    run(*some)
    run(*some, "--seed", 1)  # more seeds of the same
    error = failed(*some, "--guidance-scale", 2)
    assert "holds pictures made with another guidance_scale: give another --out" in error
    assert len(list(tmp_path.glob("?.png"))) == 2
    (tmp_path / "2.json").write_text("[]")
    assert "2.json' was not written by this command, which would replace it" in failed(*some, "--seed", 2)


@pytest.mark.parametrize("name", ["index.html", "sheet.png", "1.png", "scores.json"])
def test_files_of_others_are_not_replaced(run, failed, tiny_model_folder, tmp_path, name):
    some = [*options(tiny_model_folder, tmp_path), "--prompts", *PROMPTS, "--num-samples", 2]
    (tmp_path / name).write_text('{"mine": 1}')
    (tmp_path / "notes.png").touch()
    assert f"{name}' was not written by this command, which would replace it: give another --out" in failed(*some)
    assert (tmp_path / name).read_text() == '{"mine": 1}' and not (tmp_path / "0.png").exists()
    (tmp_path / name).unlink()
    run(*some)
    run(*some)


def test_negation_by_way_of_pixels_is_not_refused(run, tiny_model_folder, tmp_path):
    more = ["--views", "identity", "negate", "--blend", "pixels", "--num-samples", 1]
    run(*options(tiny_model_folder, tmp_path), "--prompts", *PROMPTS, *more)


def test_the_best_by_clip(run, tiny_model_folder, tmp_path):
    out = tmp_path / "out"
    clip = make_clip(tmp_path / "clip")
    run(*options(tiny_model_folder, out), "--prompts", "picture 1", "picture 2", "--num-samples", 3, "--keep", 1, "--clip", clip)
    scores = json.loads((out / "scores.json").read_text())
    assert len(scores) == 3 and all(-1 <= score <= 1 for score in scores.values()) and len(list(out.glob("?.png"))) == 1


@pytest.mark.parametrize(("more", "message"), [
    (["--keep", 9], "--keep 9: only 2 are sampled (--num-samples)"),
    (["--keep", 1, "--prompts", "picture 1", "the letter a"], "--keep: the shipped judge reads letters alone; for other prompts"),
    (["--keep", 1, "--clip", "nowhere"], "no CLIP in 'nowhere'"),
    (["--reduction", "weighted"], "reduction=weighted needs weights"),
    (["--weights", 1, 2], "weights mean nothing with reduction=mean"),
    (["--negative-prompt", "a", "b", "c"], "negative_prompt: got 3 for 2 views"),
    (["--offload"], "but the device is cpu"),
    (["--time-travel", 2, "--scheduler", "unipc"], "use ddim or ddpm"),
    (["--views", "identity", "inner_circle:2"], "wanted at least 4 cells a side"),
    (["--views", "identity", "flip@negate"], "this autoencoder was not trained with negation (D(-z) is "),
    (["--keep", 1, "--prompts", "a letter a v", "the letter v"], "the shipped judge reads letters alone"),
    (["--device", "nonsense"], "device 'nonsense': "),
    (["--seed", 2**70], "--seed: got 1180591620717411303424, wanted 0 or more"),
    (["--components", "hybrids:1"], "unknown components 'hybrids:1'"),
    (["--components", "hybrid:0.08:0.03"], "one prompt for each component that is not held (low, middle, high): got 2"),
    (["--components", "colour"], "latents know nothing of colours"),
    (["--components", "hybrid:0.1", "--reference", "x.png"], "--reference FILE and --hold PART need each other"),
    (["--components", "hybrid:0.1", "--reference", "x.png", "--hold", "lov"], "--hold lov: wanted one of low, high"),
        (["--decoding", "all"], "decoding: got all, wanted one of upright, views"),
        (["--decoding", "upright", "--blend", "pixels"], "blend=pixels decodes each view: decoding=upright means nothing with it"),
        (["--decoding", "views", "--components", "hybrid:0.1"], "decoding=views is for views: it means nothing with components"),
    (["--components", "hybrid:0.1", "--reference", "nowhere.png", "--hold", "low"], "--reference 'nowhere.png' is no file: give a picture"),
    (["--hold", "low"], "--reference and --hold mean something with --components alone"),
    (["--views", "identity", "jigsaw"], "12 or more to interlock"),
])  # fmt: skip
def test_options_that_do_not_fit_are_told_before_anything_is_sampled(failed, tiny_model_folder, tmp_path, more, message):
    prompts = [] if "--prompts" in more else ["--prompts", *PROMPTS]
    error = failed(*options(tiny_model_folder, tmp_path / "out"), *prompts, "--num-samples", 2, "--device", "cpu", *more)
    assert message in error and not (tmp_path / "out").exists()


def test_what_means_nothing_with_parts(failed, tiny_model_folder, tmp_path):
    words = [*options(tiny_model_folder, tmp_path / "out"), "--prompts", *PROMPTS, "--components", "hybrid:0.1"]
    assert "--force is for the view negate" in failed(*words, "--force")


def test_negation_can_be_forced(run, tiny_model_folder, tmp_path):
    run(*options(tiny_model_folder, tmp_path), "--prompts", *PROMPTS, "--num-samples", 1, "--views", "identity", "negate", "--force")
    assert "--force" in json.loads((tmp_path / "0.json").read_text())["command"]


def test_parts_in_place_of_views(run, tiny_model_folder, tmp_path):
    reference = tmp_path / "a picture.png"
    Image.effect_noise((90, 40), 80).convert("RGB").save(reference)
    for name, more in (("two", ["--prompts", *PROMPTS]), ("held", ["--prompts", PROMPTS[0], "--reference", reference, "--hold", "high"])):
        out = tmp_path / name
        run(*options(tiny_model_folder, out), *more, "--components", "hybrid:0.1", "--num-samples", 2, "--animate", "gif")
        assert {path.name for path in out.iterdir()} == {f"{k}.{e}" for k in (0, 1) for e in ("png", "json", "gif")} | {
            "sheet.png",
            "index.html",
        }
        words = shlex.split(json.loads((out / "1.json").read_text())["command"])
        assert "--views" not in words and words[words.index("--components") + 1] == "hybrid:0.1"
        assert ("the reference" in (out / "index.html").read_text()) == (name == "held") == ("--hold" in words)


def test_a_reference_is_known_by_what_it_holds(run, failed, tiny_model_folder, tmp_path):
    reference = tmp_path / "picture.png"
    words = [*options(tiny_model_folder, tmp_path / "out"), "--prompts", PROMPTS[0], "--components", "hybrid:0.1", "--hold", "high",
             "--num-samples", 1, "--reference", reference]  # fmt: skip
    assert f"--reference '{reference}' is no file" in failed(*words)
    reference.write_text("no picture")
    assert f"--reference '{reference}' is no picture that can be read" in failed(*words)
    for colour, seed in (("red", 0), ("blue", 1)):
        Image.new("RGB", (64, 64), colour).save(reference)
        if colour == "red":
            run(*words)
        else:
            assert "made with another reference_hash" in failed(*words, "--seed", seed)


def test_a_choice_takes_no_other_pictures_away(run, failed, tiny_model_folder, tmp_path):
    words = [*options(tiny_model_folder, tmp_path), "--prompts", *PROMPTS, "--num-samples", 3]
    run(*words)
    assert "holds pictures that --keep did not choose, and would remove: give another --out" in failed(*words, "--keep", 1)
    assert {path.name for path in tmp_path.glob("?.png")} == {"0.png", "1.png", "2.png"}
    for content, message in (("{", "other.json' is damaged"), ("5", ""), ('["prompts"]', "")):
        (tmp_path / "other.json").write_text(content)
        if message:
            assert message in failed(*words)
        else:
            run(*words)


def test_animations(run, tiny_model_folder, tmp_path):
    run(*options(tiny_model_folder, tmp_path), "--prompts", *PROMPTS, "--num-samples", 1, "--animate", "mp4", "webp")
    assert (tmp_path / "0.mp4").stat().st_size > 1000
    assert Image.open(tmp_path / "0.webp").is_animated


def test_what_the_command_leaves_out_is_what_the_script_has_by_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    args = script.parse_args()
    options = vars(job.options_of(args))
    known = {name: default for name, default in job.DEFAULTS.items() if name != "precision"}  # always written
    assert {name: options.get(name, getattr(args, name)) for name in known} == known and options.keys() <= known.keys()


@pytest.mark.parametrize("option", ["--components", "--device", "--scheduler", "--hold"])
def test_an_empty_option_is_no_option_left_out(run, tmp_path, option, capsys):
    with pytest.raises(SystemExit) as info:  # views in place of parts, another device: without a word
        run("--num-samples", 1, "--num-inference-steps", 1, "--out", tmp_path, option, "")
    assert info.value.code == 2 and f"{option}: got an empty text" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--prompts", "caf\udce9", "b"], ["--style", "\ud800"], ["--negative-prompt", "\udcff"]])
def test_a_prompt_that_is_no_text_is_refused(failed, tiny_model_folder, tmp_path, more):
    prompts = [] if "--prompts" in more else ["--prompts", *PROMPTS]
    found = failed(*options(tiny_model_folder, tmp_path), *prompts, *more)
    assert "are not UTF-8" in found and found.isascii()


@pytest.mark.parametrize("device", ["meta", "privateuseone", "nothing"])
def test_a_device_that_computes_nothing_is_refused(failed, tiny_model_folder, tmp_path, device):
    assert f"device '{device}'" in failed(*options(tiny_model_folder, tmp_path), "--prompts", *PROMPTS, "--device", device)


def test_a_view_given_twice_is_said(run, tiny_model_folder, tmp_path, capsys):
    run(*options(tiny_model_folder, tmp_path / "out"), "--prompts", *PROMPTS, "--views", "flip", "flip", "--num-samples", 1)
    assert "note: flip is there twice: the picture is to read as all of its prompts in one view" in capsys.readouterr().err
