"""Options: defaults, overrides, errors that name the key, contradictions, and no option that nothing reads."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from omegaconf import OmegaConf

import eqldm.config
from eqldm.config import STAGES, DataConfig, accumulation, load_config, micro_batch_size, to_yaml
from eqldm.ranges import RANGES

ROOT = Path(__file__).parents[1]
REQUIRED = ["run.dir=runs/x", "run.num_steps=10", "data.train=train", "data.val=val"]
STAGE_REQUIRED = {"autoencoder": [], "diffusion": ["vae=model", "train_text_encoder=true"], "judge": []}


@pytest.fixture
def load(tmp_path):
    """`load(stage, *overrides)`: the options of a minimal file of that stage."""

    def load(stage: str, *overrides: str):
        path = tmp_path / "config.yaml"
        path.write_text(f"stage: {stage}\n")
        return load_config(path, [*REQUIRED, *STAGE_REQUIRED[stage], *overrides])

    return load


@pytest.mark.parametrize("stage", STAGES)
def test_defaults_overrides_and_round_trip(load, tmp_path, stage):
    config = load(stage, "optimizer.learning_rate=3e-4", "optimizer.betas=[0.5,0.9]")
    assert type(config) is STAGES[stage] and config.stage == stage
    assert config.data == dataclasses.replace(DataConfig(), train="train", val="val")
    assert config.optimizer.learning_rate == 3e-4 and config.optimizer.betas == [0.5, 0.9]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_the_file_wins_over_defaults_and_overrides_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("stage: judge\nnoise: 0.3\nrun: {seed: 7, log_every: 3}\n")
    config = load_config(path, [*REQUIRED, "run.seed=8"])
    assert (config.noise, config.run.seed, config.run.log_every, config.rotation_degrees) == (0.3, 8, 3, 10.0)


@pytest.mark.parametrize(("override", "message"), [
    ("run.num_stepz=3", r"'num_stepz' not in 'RunConfig'. Did you mean: 'num_steps'\? \(key: run.num_stepz\)"),
    ("colour=red", "key: colour"),
    ("run.seed=abc", r"'abc' .* Integer \(key: run.seed\)"),
    ("run.num_steps=2.5", "key: run.num_steps"),
    ("run.dir=null", "key: run.dir"),
    ("run.precision=16", r"expected one of \['auto', '32-true', 'bf16-mixed'\] \(key: run.precision\)"),
    ("run.strategy=deepspeed_stage_2", r"expected one of \['auto', 'ddp', 'zero1', 'zero2', 'zero3'\] \(key: run.strategy\)"),
    ("stage=diffusion", "key: stage"),
    ("data.train=${nowhere}", "'nowhere' not found .key: data.train"),
    ("run.seed", "override 'run.seed' has no '=', or nothing before it: wanted key=value"),
    ("optimizer.betas=[0.9", "an override, is no YAML"),
])  # fmt: skip
def test_a_bad_override_is_refused_by_its_key(load, override, message):
    with pytest.raises(ValueError, match=message):
        load("autoencoder", override)


@pytest.mark.parametrize(("text", "message"), [
    ("", "stage is None, wanted one of autoencoder, diffusion, judge"),
    ("- stage", "stage is None"),
    ("stage: vae", "stage is 'vae'"),
    ("stage: [judge", "is no YAML"),
    ("stage: diffusion", "required but not set: data.train, data.val, run.dir, run.num_steps, vae. Give them"),
    ("stage: judge\nnoize: 1", "key: noize"),
])  # fmt: skip
def test_a_bad_file_is_refused(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


ANY = [
    (["data.batch_size=30", "data.micro_batch_size=16"], "batch_size=30 does not divide into 1 processes x 16 .* multiple of 16"),
    (["data.batch_size=4", "run.devices=8"], "does not divide into 8 processes x 1"),
    (["data.batch_size=12", "run.devices=2", "run.num_nodes=4"], "does not divide into 8 processes"),
    (["data.batch_size=0"], "data.batch_size: got 0"),
    (["data.micro_batch_size=0"], "data.micro_batch_size: got 0"),
    (["data.shuffle_shards=0"], "data.shuffle_shards: got 0"),
    (["run.devices=0"], "run.devices: got 0"),
    (["run.devices=3", "data.batch_size=3"], "data.val_samples=256 does not divide over 3 processes"),
    *[([f"run.{name}=0"], f"run.{name}: got 0") for name in ("num_steps", "log_every", "val_every", "checkpoint_every", "keep_every")],
    (["run.keep_every=750"], "run.keep_every: got 750, wanted a multiple of run.checkpoint_every=500, or null"),
    (["optimizer.ema_decay=1"], "optimizer.ema_decay: got 1"),
    (["data.num_workers=-1"], "data.num_workers: got -1, wanted 0"),
    *[([f"{name}="], f"{name}: got nothing after '=', wanted a value, or null for none") for name in ("run.keep_every", "run.seed")],
    *[([f"optimizer.learning_rate={rate}"], "optimizer.learning_rate: got .*, wanted above 0") for rate in ("0", "-1e-4", ".nan")],
    (["optimizer.betas=[0.9]"], "optimizer.betas: got .*, wanted two numbers"),
]
START = [
    (["init=pretrained"], "init=pretrained needs the model folder"),
    (["model=folder"], "init=scratch starts from random weights, but model=folder is set"),
]
OWN = {
    "autoencoder": [
        *START,
        (["init=pretrained", "model=m", "architecture.latent_channels=4"], "drop `architecture`"),
        *[([f"loss.{name}_weight=-1"], f"loss.{name}_weight: got -1.0, wanted 0 or more")
          for name in ("l1", "l2", "gradient", "perceptual", "kl", "adversarial")],
        *[([f"equivariance.{name}_weight=-1"], f"equivariance.{name}_weight: got -1.0") for name in ("implicit", "consistency")],
        (["loss.discriminator_learning_rate=0", "loss.adversarial_weight=1"], "discriminator_learning_rate: got 0.0, wanted above 0"),
        (["loss.discriminator_learning_rate=1e-4"], "discriminator_learning_rate=0.0001 is of a discriminator, and .* builds none"),
        (["loss.l1_weight=0", "loss.l2_weight=0", "loss.adversarial_weight=1"], "no reconstruction loss: set loss.l1_weight"),
        (["fold.num_images=-1"], "fold.num_images: got -1"),
        (["fold.num_images=0", "fold.align_to=m"], "fold.align_to needs pictures to align on"),
        *[(["equivariance.permute_prob=0.5", f"equivariance.permute_cells={cells}"], "equivariance.permute_cells: got .* at least 2")
          for cells in ("[]", "[1,2]")],
        (["equivariance.preset=eqvae_paper", "equivariance.prob=0.5"], "fixes the scheme, got also prob"),
        *[([f"equivariance.{name}=1.5"], f"equivariance.{name} is a probability")
          for name in ("prob", "rescale_prob", "permute_prob", "patch_turn_prob", "negate_prob")],
        (["equivariance.patch_turn_prob=0.5", "equivariance.permute_prob=0.5"], "but group=none has none: set group"),
        (["equivariance.patch_turn_prob=0.5"], "turns the patches of a permutation, but there is none: set permute_prob"),
        (["equivariance.rescale_smallest=1"], "equivariance.rescale_smallest: got 1"),
        (["equivariance.num_groups=0"], "equivariance.num_groups: got 0"),
        (["crop_size=0"], "crop_size: got 0"),
        (["run.strategy=zero2"], "run.strategy=zero2 is for the diffusion stage: the autoencoder stage steps two optimizers"),
        (["crop_until=3"], "crop_until=3 ends the crops, but there are none"),
    ],
    "diffusion": [
        *START,
        (["init=pretrained", "model=m", "unet.layers_per_block=1"], "takes unet from model: drop `unet`"),
        (["init=pretrained", "model=m", "scheduler.beta_end=0.01", "text_encoder.hidden_size=8"], "drop `text_encoder`, `scheduler`"),
        (["lora.rank=4"], "adapt=full trains all weights, but `lora` is set"),
        (["train_text_encoder=false"], "set train_text_encoder=true"),
        (["adapt=lora"], "adapt=lora updates a pretrained UNet"),
        (["init=scratch_unet"], "init=scratch_unet needs the model folder"),
        (["init=scratch_unet", "model=m", "text_encoder.hidden_size=8"], "takes the text encoder from model: drop `text_encoder`"),
        (["boundary_steps=10", "init=pretrained", "model=m"], "boundary_steps: got 10, wanted 0 to below run.num_steps=10"),
        (["boundary_steps=5"], "boundary_steps fit a pretrained UNet to new latents"),
        (["caption_dropout=1"], "caption_dropout: got 1"),
        (["min_snr_gamma=0"], "min_snr_gamma: got 0"),
        (["val_letters=1"], "val_letters: got 1"),
        (["run.strategy=zero3", "run.compile=true", "val_letters=9"], "no process can sample alone .* unset val_letters, run.compile, or"),
        (["min_snr_floor=1"], "min_snr_floor: got 1"),
        (["min_snr_floor=.nan"], "min_snr_floor: got nan"),
        (["min_snr_gamma=5", "scheduler.prediction_type=flow_prediction"], "min_snr_gamma has no meaning"),
    ],
    "judge": [
        *[([f"run.{name}=true"], "the judge is small") for name in ("compile", "channels_last")],
        (["turned_share=1.5"], "turned_share: got 1.5"),
        (["run.strategy=zero1"], "run.strategy=zero1 is for the diffusion stage: the judge is small"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("stage", "overrides", "message"), [(s, *case) for s in STAGES for case in ANY + OWN[s]])
def test_options_that_contradict_each_other_are_refused(load, stage, overrides, message):
    with pytest.raises(ValueError, match=message):
        load(stage, *overrides)


@pytest.mark.parametrize(("overrides", "micro", "parts"), [
    ([], 32, 1),
    (["run.devices=2", "run.num_nodes=2"], 8, 1),
    (["run.devices=2", "data.micro_batch_size=4"], 4, 4),
])  # fmt: skip
def test_the_global_batch_is_processes_times_micro_batches(load, overrides, micro, parts):
    config = load("judge", *overrides)
    assert (micro_batch_size(config), accumulation(config)) == (micro, parts)


@pytest.mark.parametrize("text", ["/tmp/a #b", "/tmp/a: b", "007", "1e3", "[a]", "true", "a=b", 'a\'s "b"'])
def test_text_is_taken_verbatim(load, text):
    config = load("autoencoder", f"run.dir={text}", "init=pretrained", "model=m", f"fold.align_to={text}")
    assert config.run.dir == config.fold.align_to == text


def test_null_is_none_and_other_options_are_yaml(load):
    config = load("diffusion", "model=m", "model=null", "min_snr_gamma=5", "min_snr_gamma=null", "sample_prompts=['a: b']")
    assert config.model is None and config.min_snr_gamma is None and config.sample_prompts == ["a: b"]
    assert load("autoencoder", "fold={num_images: 8, align_to: null}", "fold.align_to=x y").fold.align_to == "x y"


# train.py


@pytest.fixture
def train(tmp_path, monkeypatch):
    """`train(*overrides)`: train.py's main on a minimal judge file; a training is an AssertionError."""
    specification = importlib.util.spec_from_file_location("train_script", ROOT / "train.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)

    def trains(config):
        raise AssertionError("a training was started")

    monkeypatch.setattr(script, "_train", trains)
    (tmp_path / "config.yaml").write_text("stage: judge\n")

    def call(*overrides: str) -> None:
        monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "config.yaml"), *REQUIRED, *overrides])
        script.main()

    return call


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "yes", "on", " true"])
def test_a_dry_run_prints_and_starts_nothing(train, capsys, text):
    train(f"dry_run={text}")
    assert yaml.safe_load(capsys.readouterr().out)["run"]["dir"] == "runs/x"


def test_no_dry_run_trains(train):
    for overrides in ([], ["dry_run=false"], ["dry_run=No"], ["dry_run=off", "dry_run=off"]):
        with pytest.raises(AssertionError, match="a training was started"):
            train(*overrides)


@pytest.mark.parametrize("override", ["dry_run=1", "dry_run=ture", "dry_run=", "dry_run=[", "dry_run", "dry_runs=true"])
def test_what_is_no_boolean_is_an_error_and_no_training(train, override):
    with pytest.raises(SystemExit, match="error: .*dry_run"):
        train(override)


@pytest.mark.parametrize(("overrides", "message"), [
    (["dry_run=true", "dry_run=off"], "dry_run: given twice, true and off: give it once"),
    (["run.seed=1", "run.seed=2", "dry_run=true"], "run.seed: given twice, 1 and 2: give it once"),
    (["architecture=resnet81", "dry_run=true"], "architecture: timm knows no model 'resnet81'; near: "),
    (["architecture_args={foo: 3}", "dry_run=true"], "architecture_args.foo is no argument"),
])  # fmt: skip
def test_wrong_options_end_a_dry_run(train, overrides, message):
    with pytest.raises(SystemExit, match=message):
        train(*overrides)


DRY = {  # what makes a stage of the minimal file, whose inputs do not exist
    "autoencoder": "stage: autoencoder\n",
    "diffusion": "stage: diffusion\nvae: nowhere\ntrain_text_encoder: true\n",
}


@pytest.mark.parametrize(("stage", "override", "message"), [
    ("autoencoder", "architecture.latent_chanels=4", "Did you mean architecture.latent_channels"),
    ("autoencoder", "architecture.norm_num_groups=7", "pictures.*|architecture does not fit"),
    ("diffusion", "unet.layers_per_blok=4", "Did you mean unet.layers_per_block"),
    ("diffusion", "unet.in_channels=4", "unet.in_channels follows from the latents"),
    ("diffusion", "text_encoder.hiden_size=4", "Did you mean text_encoder.hidden_size"),
    ("diffusion", "scheduler.predition_type=v_prediction", "Did you mean scheduler.prediction_type"),
    ("diffusion", "scheduler.beta_schedule=foo", "scheduler does not fit"),
])  # fmt: skip
def test_a_wrong_architecture_ends_a_dry_run_before_its_inputs_exist(train, tmp_path, stage, override, message):
    (tmp_path / "config.yaml").write_text(DRY[stage])
    sizes = ["data.image_size=32"] if "norm_num_groups" in override else []
    with pytest.raises(SystemExit, match=f"error: .*({message})"):
        train(override, *sizes, "dry_run=true")


@pytest.mark.parametrize("stage", DRY)
def test_inputs_that_do_not_exist_yet_are_a_comment_of_a_dry_run(train, tmp_path, capsys, stage):
    (tmp_path / "config.yaml").write_text(DRY[stage])
    train("dry_run=true")
    assert "# what it will need cannot be told yet: 'train' holds no shards yet: set data.image_size" in capsys.readouterr().out


def option_classes() -> list[type]:
    return [kind for kind in vars(eqldm.config).values() if dataclasses.is_dataclass(kind)]


def numbers(kind: type, prefix: str = "") -> list[str]:
    """The dotted names of a stage's options that are numbers, or lists of them."""
    found = []
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found += numbers(hint, f"{prefix}{name}.")
        elif {int, float} & {hint, *get_args(hint)}:
            found.append(prefix + name)
    return found


def test_every_number_has_a_finite_range():
    options = {name for kind in STAGES.values() for name in numbers(kind)}
    assert options == RANGES.keys()
    assert all(math.isfinite(RANGES[name].low) for name in options)
    assert [name for name in options if not math.isfinite(RANGES[name].high)] == ["optimizer.clip_norm"]  # .inf clips nothing


ABSURD = [
    *(".nan", ".inf", "-.inf", "-1", "0", "1", "2", "1e30", "99999999999999999999", "-99999999999999999999", "1.5", "0x1F"),
    *("foo", "", "[]", "{}", "[1,2]", "[foo]", "{a: 1}", "true", "null", "???", "[[1]]", "[null]", "{1: 2}", "'", "${run.dir}", "${x"),
    "2026-01-01",
]


def keys(kind: type, prefix: str = "") -> list[str]:
    """The dotted names of all options, and of the sections that they are in."""
    hints = get_type_hints(kind)
    inner = [key for name, hint in hints.items() if dataclasses.is_dataclass(hint) for key in keys(hint, f"{prefix}{name}.")]
    return [prefix + name for name in hints] + inner


ALL = {stage: keys(kind) for stage, kind in STAGES.items()}
CASES = [(stage, key, value) for stage in ALL for key in ALL[stage] for value in ABSURD]


@pytest.mark.parametrize("cases", [CASES[::31], pytest.param(CASES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_absurd_values_are_taken_or_refused_by_name(load, cases):
    for stage, key, value in cases:
        try:
            load(stage, f"{key}={value}")
        except ValueError as error:
            text = str(error)
            assert key.split(".")[0] in text or key.split(".")[-1] in text, f"{key}={value}: {text}"
            assert "\n" not in text, f"{key}={value}: {text}"
        else:
            assert value != ".nan" or key not in RANGES, f"{key}={value}"


def test_every_option_has_a_docstring():
    tree = ast.parse(Path(eqldm.config.__file__).read_text())
    for kind in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for field, after in zip(kind.body, [*kind.body[1:], None]):
            if isinstance(field, ast.AnnAssign) and not ast.unparse(field.annotation).endswith("Config"):  # not a section
                text = after.value if isinstance(after, ast.Expr) else None
                assert isinstance(text, ast.Constant), f"{kind.name}.{field.target.id} has no docstring"


def names_read() -> set[str]:
    """Attributes read, though not called, by the package and train.py, and the strings of functions that use getattr."""
    names = set()
    for path in [*(ROOT / "eqldm").rglob("*.py"), ROOT / "train.py"]:
        body = ast.parse(path.read_text()).body
        if path.name == "config.py":  # checking an option is not using it
            body = [node for node in body if getattr(node, "name", "") in ("micro_batch_size", "accumulation")]
        for node in (inner for outer in body for inner in ast.walk(outer)):
            if isinstance(node, ast.Attribute):
                names.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                node.func.attr = ""  # walked after its call: module.train() reads no option
            if isinstance(node, ast.FunctionDef) and any(getattr(c, "id", "") == "getattr" for c in ast.walk(node)):
                names |= {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
    return names


def test_every_option_is_read_by_some_code():
    read = names_read()
    options = [(kind.__name__, field.name) for kind in option_classes() for field in dataclasses.fields(kind)]
    unread = [f"{kind}.{name}" for kind, name in options if name not in read]
    assert not unread, f"options that no code reads: {', '.join(unread)}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_says_what_it_is_for(path):
    text = path.read_text()
    stage = yaml.safe_load(text)["stage"]
    given = OmegaConf.create(text)
    missing = [item for item in [*REQUIRED, "vae=model"] if OmegaConf.select(given, item.split("=")[0]) is None]
    load_config(path, [item for item in missing if item != "vae=model" or stage == "diffusion"])
    header = "".join(line for line in text.splitlines(True) if line.startswith("#"))
    assert "claim" in header and f"python train.py {path.relative_to(ROOT)}" in header


@pytest.mark.parametrize("stage", ["[judge]", "{judge: 1}", "3", "null"])
def test_a_stage_that_is_no_word_is_named(tmp_path, stage):
    path = tmp_path / "options.yaml"
    path.write_text(f"stage: {stage}\n")
    with pytest.raises(ValueError, match="options.yaml': stage is .*, wanted one of autoencoder, diffusion, judge"):
        load_config(path)


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16"])
def test_a_file_in_another_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "options.yaml"
    path.write_text("stage: judge  # für München\n", encoding=encoding)
    with pytest.raises(ValueError, match="options.yaml' is no UTF-8"):
        load_config(path)
