"""Stage 2 from options to exported model folder: what it trains on, what it exports, resuming, several processes."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open

from eqldm.anagram.preview import SampleGrid
from eqldm.anagram.sampling import Sampler
from eqldm.config import load_config
from eqldm.data.samples import LatentSamples, PictureSamples, collate
from eqldm.data.shards import ShardSet, write_manifest, write_shard
from eqldm.diffusion.adaptation import build_networks
from eqldm.diffusion.module import LatentDiffusion, train_diffusion
from eqldm.model_folder import load_unet, load_vae
from eqldm.training.run_folder import LAST
from eqldm.views import IDENTITY
from runs import logged, weights

ROOT = Path(__file__).parents[1]
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULERS = {
    "epsilon": {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", **BETAS},
    "v_prediction": {
        "_class_name": "DDIMScheduler",
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        **BETAS,
    },
    "flow_prediction": {
        "_class_name": "DPMSolverMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": 2.0,
    },
}
SCRATCH = {
    "init": "scratch",
    "train_text_encoder": True,
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1},
    "unet": {
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    },
}


def encode(data: Path, model: Path, out: Path, **options) -> Path:
    """Latent shards, as data/encode_latents.py makes them."""
    specification = importlib.util.spec_from_file_location("encode_latents_script", ROOT / "data" / "encode_latents.py")
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    defaults = {"dtype": "float16", "prompt_embeds": False, "text_model": None, "batch_size": 8, "num_workers": 0, "bf16": False}
    return script.encode(argparse.Namespace(data=data, model=model, out=out, **{**defaults, **options}))


@pytest.fixture(scope="module")
def tiny_latents(tmp_path_factory, tiny_pictures, tiny_model_folder) -> Path:
    return encode(tiny_pictures, tiny_model_folder, tmp_path_factory.mktemp("latents") / "plain")


@pytest.fixture
def configure(tmp_path, tiny_latents, tiny_model_folder):
    """`configure("key=value", ..., section={...})`: two steps of the pretrained tiny model on latents, but for the changes."""

    def call(*overrides, **changes):
        file = {
            "stage": "diffusion",
            "init": "pretrained",
            "vae": str(tiny_model_folder),
            "data": {"train": str(tiny_latents), "val": str(tiny_latents), "batch_size": 4, "num_workers": 0, "val_samples": 8},
            "run": {"dir": str(tmp_path / "run"), "num_steps": 2, "precision": "32-true", "accelerator": "cpu", "log_every": 1},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 0, "ema_decay": 0.5},
            **changes,
        }
        if file["init"] == "pretrained":
            file.setdefault("model", str(tiny_model_folder))
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(file))
        return load_config(path, list(overrides))

    return call


def module_of(config) -> LatentDiffusion:
    vae = load_vae(config.vae)
    return LatentDiffusion(config, vae, build_networks(config, vae, 32, ["picture 1"]))


def difference(start: Path, one: Path, other: Path, part: str = "unet") -> float:
    """How far two runs ended apart, over how far one of them went.

    AdamW's first steps divide each gradient by its own size, so that rounding in gradients near 0 moves single weights
    by as much as the learning rate: the updates are compared as a whole.
    """
    start, a, b = (weights(folder, part) for folder in (start, one, other))
    moved = torch.cat([(a[name] - start[name]).flatten() for name in a]).norm()
    assert float(moved) > 0.01
    return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm() / moved)


class StopAt(pl.Callback):
    """Stands for a killed process."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


# What it trains on


@pytest.mark.parametrize("source", ["latents", "pictures"])
def test_two_steps(configure, tmp_path, tiny_pictures, tiny_model_folder, source):
    where = [f"data.train={tiny_pictures}", f"data.val={tiny_pictures}"] if source == "pictures" else []
    config = configure(*where, "run.val_every=1", 'sample_prompts=["the letter a", "picture 1"]')
    folder = train_diffusion(config, callbacks=[SampleGrid()])
    assert folder == tmp_path / "run" / "model"
    before, after = weights(tiny_model_folder), weights(folder)
    assert before.keys() == after.keys() and sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2
    for part in ("vae", "text_encoder"):  # frozen
        assert all(torch.equal(a, b) for a, b in zip(weights(tiny_model_folder, part).values(), weights(folder, part).values()))
    assert len(logged(tmp_path / "run", "train/loss")) == len(logged(tmp_path / "run", "val/loss")) == 2
    for step in (1, 2):
        sheet = Image.open(tmp_path / "run" / "samples" / f"{step:07d}.png")
        assert sheet.width > 4 * 32 and sheet.height > 2 * 32
    assert list((tmp_path / "run" / "logs").glob("events*"))


def test_pictures_and_latents_give_the_same_losses(configure, tiny_pictures, tiny_latents):
    """But for the rounding of the stored moments."""
    module = module_of(configure())
    latents, pictures = LatentSamples(tiny_latents, seed=3), PictureSamples(tiny_pictures, seed=3)
    positions = [5, 30, 31, 100]
    batches = [collate([samples[p] for p in positions]) for samples in (latents, pictures)]
    assert batches[0]["caption"] == batches[1]["caption"]
    with torch.no_grad():
        z = [module.latents(batch, seed=7) for batch in batches]
        losses = [module.denoising_loss(batch, 7, module.unweighted, 0.5) for batch in batches]
    torch.testing.assert_close(*z, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(*losses, atol=2e-3, rtol=2e-3)


def test_draws_depend_on_the_position_alone(configure, tiny_latents):
    module, samples = module_of(configure()), LatentSamples(tiny_latents, seed=3)
    with torch.no_grad():
        together = module.denoising_loss(collate([samples[p] for p in (4, 9, 2)]), 7, module.unweighted, 0.5)
        alone = torch.cat([module.denoising_loss(collate([samples[p]]), 7, module.unweighted, 0.5) for p in (4, 9, 2)])
        other = module.denoising_loss(collate([samples[p] for p in (4, 9, 2)]), 8, module.unweighted, 0.5)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together, other)


def test_latents_of_another_vae_are_refused(configure, tmp_path, make_model_folder):
    other = make_model_folder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="made with another VAE.*encode the pictures anew"):
        train_diffusion(configure(f"vae={other}"))
    assert not (tmp_path / "run").exists()


def test_missing_captions_are_refused(configure, tmp_path, tiny_pictures):
    shards, folder = ShardSet.open(tiny_pictures), tmp_path / "pictures"
    folder.mkdir()
    samples = [{"__key__": str(n), "png": shards.read(n, "png")} for n in range(8)]
    write_manifest(folder, [write_shard(folder / "a.tar", samples)], kind="pictures")
    with pytest.raises(ValueError, match="8 of 8 samples have no caption"):
        train_diffusion(configure(f"data.train={folder}"))


def test_pictures_of_another_size_are_refused(configure, tiny_pictures):
    with pytest.raises(ValueError, match=r"data.image_size=64, but the pictures of '.*' are 32 x 32 px: make the shards with --size 64"):
        train_diffusion(configure("data.image_size=64"))
    with pytest.raises(ValueError, match="data.image_size=64, but the pictures"):
        train_diffusion(configure("data.image_size=64", f"data.train={tiny_pictures}", f"data.val={tiny_pictures}"))


def test_long_sample_prompts_are_refused(configure, tmp_path):
    with pytest.raises(ValueError, match="sample_prompts longer than the model's 8 tokens"):
        train_diffusion(configure(sample_prompts=["the letter a " * 4]))


def test_stored_prompt_embeddings_are_used(configure, tmp_path, tiny_pictures, tiny_model_folder, tiny_latents):
    stored = encode(tiny_pictures, tiny_model_folder, tmp_path / "embeds", prompt_embeds=True)
    module = module_of(configure())
    computed, read = (collate([LatentSamples(f)[p] for p in range(6)]) for f in (tiny_latents, stored))
    with torch.no_grad():
        for dropout in (0.0, 0.5):
            losses = [module.denoising_loss(batch, 1, module.unweighted, dropout) for batch in (computed, read)]
            torch.testing.assert_close(*losses, atol=2e-3, rtol=2e-3)
        changed = {**read, "prompt_embeds": read["prompt_embeds"] + 1}
        dropped = ["" if n % 2 else caption for n, caption in enumerate(read["caption"])]
        embeds = module.prompt_embeds(changed, dropped)
        torch.testing.assert_close(embeds[0::2], changed["prompt_embeds"][0::2])
        torch.testing.assert_close(embeds[1::2], module.prompt_embeds({}, [""]).expand(3, -1, -1))
    train_diffusion(configure(f"data.train={stored}", f"data.val={stored}"))


# What it exports


STOCK = """
import sys, torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
for folder in sys.argv[1:]:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.stack([torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (3, 4)])
    options = dict(num_inference_steps=5, guidance_scale=3.0, latents=noise)
    latents = pipeline(["picture 1"] * 2, output_type="latent", **options).images
    pictures = pipeline(["picture 1"] * 2, output_type="pt", **options).images
    found = {"latents": latents, "pictures": pictures}
    own = pipeline.scheduler.config
    for name, solver in {"euler": EulerDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler}.items():
        if name == "dpm++" or own.prediction_type != "flow_prediction":
            pipeline.scheduler = solver.from_config(own)
            found[name] = pipeline(["picture 1"] * 2, output_type="latent", **options).images
    torch.save(found, folder + "/stock.pt")
assert "eqldm" not in sys.modules
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_latents, tiny_model_folder) -> dict[str, Path]:
    """A model trained from scratch for each prediction type, sampled by stock diffusers in a process without `eqldm`."""
    root, folders = tmp_path_factory.mktemp("exported"), {}
    for name, scheduler in SCHEDULERS.items():
        path = root / f"{name}.yaml"
        file = {
            **SCRATCH,
            "stage": "diffusion",
            "vae": str(tiny_model_folder),
            "scheduler": scheduler,
            "data": {"train": str(tiny_latents), "val": str(tiny_latents), "batch_size": 4, "num_workers": 0, "val_samples": 8},
            "run": {"dir": str(root / name), "num_steps": 2, "precision": "32-true", "accelerator": "cpu", "val_every": 1},
            "sample_prompts": ["picture 1"],
            "min_snr_gamma": None if name == "flow_prediction" else 5.0,
        }
        path.write_text(yaml.safe_dump(file))
        folders[name] = train_diffusion(load_config(path), callbacks=[SampleGrid()])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", STOCK, *map(str, folders.values())]
    result = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folders


def test_captions_that_are_cut_are_said_before_training(
    tmp_path, make_picture_shards, tiny_pictures, tiny_model_folder, write_tiny_unet_options, capsys
):
    long = make_picture_shards(tmp_path / "long", caption="picture {} the letter a the letter v the letter a")
    config = load_config(write_tiny_unet_options(tmp_path / "options.yaml", tiny_pictures, tiny_model_folder, num_steps=1, val_every=1))
    config.data.val = str(long)
    train_diffusion(config)
    said = capsys.readouterr().out
    assert f"100.00% of the captions of '{long}' are longer than the text encoder's 8 tokens" in said and str(tiny_pictures) not in said


@pytest.mark.parametrize("prediction", SCHEDULERS)
def test_stock_diffusers_opens_and_samples(exported, prediction):
    """And gives what our sampler gives under the one view `identity`."""
    folder = exported[prediction]
    stock = torch.load(folder / "stock.pt", weights_only=True)
    sampler = Sampler.open(folder, "cpu")
    assert sampler.networks.scheduler.config.prediction_type == prediction
    z = sampler.latents(["picture 1"], [IDENTITY], [3, 4], num_inference_steps=5, guidance_scale=3.0)
    torch.testing.assert_close(z, stock["latents"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sampler.decode(z).add(1).div(2), stock["pictures"], atol=1e-4, rtol=1e-4)
    for scheduler in stock.keys() - {"latents", "pictures"}:
        z = sampler.latents(["picture 1"], [IDENTITY], [3, 4], num_inference_steps=5, guidance_scale=3.0, scheduler=scheduler)
        torch.testing.assert_close(z, stock[scheduler], atol=1e-4, rtol=1e-4)


def test_lora_exports_a_plain_unet(configure, tiny_model_folder):
    folder = train_diffusion(configure(adapt="lora", lora={"rank": 2, "alpha": 2}))
    before, after = weights(tiny_model_folder), weights(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed and all(name.endswith(".weight") and "norm" not in name for name in changed)
    assert UNet2DConditionModel.from_pretrained(folder, subfolder="unet").config.in_channels == 4


def test_lora_is_exported_by_itself_too(configure, tmp_path, tiny_model_folder):
    """Loaded by stock diffusers onto the UNet that it updates, it gives the merged one; its scale is in its weights, and it states none:
    diffusers 0.31 passes over one in the file's header, and one that is of a newer peft stops 0.36."""
    merged = load_unet(train_diffusion(configure("optimizer.learning_rate=0.02", adapt="lora", lora={"rank": 2, "alpha": 6})))
    with safe_open(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and not [name for name in file.keys() if "lora_A" not in name and "lora_B" not in name]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_folder, safety_checker=None)
    z, t, embeds = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 8, 16)
    with torch.no_grad():
        plain = pipeline.unet(z, t, embeds).sample
        pipeline.load_lora_weights(tmp_path / "run" / "lora")
        torch.testing.assert_close(pipeline.unet(z, t, embeds).sample, merged(z, t, embeds).sample, atol=1e-5, rtol=1e-4)
        assert (merged(z, t, embeds).sample - plain).abs().max() > 1e-3


def test_the_boundary_trains_first_and_alone(configure, tmp_path, tiny_model_folder):
    options = ["boundary_steps=2", "optimizer.ema_decay=0", "train_text_encoder=true", "optimizer.weight_decay=0.1"]
    changed = {}
    for steps in (2, 3):
        options = [*options, "run.num_steps=3", "run.checkpoint_every=1"]
        stop = [StopAt(2)] if steps == 2 else []
        if stop:
            with pytest.raises(RuntimeError, match="killed"):
                train_diffusion(configure(*options), callbacks=stop)
            state = torch.load(tmp_path / "run" / LAST, weights_only=True)["state_dict"]
        else:  # it resumes where it was
            folder = train_diffusion(configure(*options))
            state = {f"{part}.{name}": value for part in ("unet", "text_encoder") for name, value in weights(folder, part).items()}
        before = {f"{part}.{name}": value for part in ("unet", "text_encoder") for name, value in weights(tiny_model_folder, part).items()}
        changed[steps] = {name for name in before if name in state and not torch.equal(before[name], state[name])}
    boundary = {f"unet.{layer}.{name}" for layer in ("conv_in", "conv_out") for name in ("weight", "bias")}
    assert changed[2] == boundary
    assert len(changed[3]) > len(boundary) + 20 and any(name.startswith("text_encoder.") for name in changed[3])


def test_ema_is_what_is_exported(configure, tmp_path):
    """The average starts as the first step's weights; after the second it is 2/11 of them and 9/11 of the second's: the decay rises."""

    def run(name, steps, decay):
        options = (f"run.num_steps={steps}", f"run.dir={tmp_path / name}", f"optimizer.ema_decay={decay}")
        return weights(train_diffusion(configure(*options)))

    averaged, first, second = run("ema", 2, 0.75), run("one", 1, 0), run("two", 2, 0)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for name in first:
        torch.testing.assert_close(averaged[name], (2 * first[name] + 9 * second[name]) / 11, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("option", ["gradient_checkpointing", "run.channels_last"])
def test_options_of_speed_and_memory_change_nothing(configure, tmp_path, tiny_model_folder, option):
    folders = [train_diffusion(configure(f"{option}={on}", f"run.dir={tmp_path / on}")) for on in ("true", "false")]
    assert difference(tiny_model_folder, *folders) < 5e-3


def test_validation_loss_is_fixed(configure, tmp_path):
    """Of the same weights it is the same at each call, whatever the seed of the run."""
    still = ["optimizer.learning_rate=1e-30", "run.num_steps=3", "run.val_every=1"]
    train_diffusion(configure(*still, f"run.dir={tmp_path / 'a'}"))
    train_diffusion(configure(*still, f"run.dir={tmp_path / 'b'}", "run.seed=5", "data.micro_batch_size=1"))
    a, b = (logged(tmp_path / name, "val/loss") for name in "ab")
    assert len(a) == 3 and len(set(a)) == 1
    assert b == pytest.approx(a, rel=1e-5)


# Resuming, several processes


def test_resumed_equals_uninterrupted(configure, tmp_path):
    """Bit for bit: accumulation, EMA, a trained text encoder and caption dropout included."""
    options = ["data.micro_batch_size=2", "caption_dropout=0.5", "run.num_steps=4", "run.checkpoint_every=2", "run.val_every=1",
               "optimizer.schedule=cosine"]  # fmt: skip
    whole = train_diffusion(configure(*options, f"run.dir={tmp_path / 'whole'}", **SCRATCH))
    again = configure(*options, f"run.dir={tmp_path / 'again'}", **SCRATCH)
    with pytest.raises(RuntimeError, match="killed"):
        train_diffusion(again, callbacks=[StopAt(3)])
    assert not (tmp_path / "again" / "model").exists()
    resumed = train_diffusion(again)
    for part in ("unet", "text_encoder"):
        a, b = weights(whole, part), weights(resumed, part)
        assert all(torch.equal(a[name], b[name]) for name in a), part
    checkpoints = [torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("whole", "again")]
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(a, b) for a, b in zip(*(checkpoint[key].values() for checkpoint in checkpoints))), key
    assert logged(tmp_path / "whole", "val/loss")[-2:] == logged(tmp_path / "again", "val/loss")[-2:]


@pytest.mark.slow
def test_two_processes_equal_one(configure, tmp_path, tiny_model_folder):
    """On the same global batch, to float tolerance."""
    options = ["optimizer.ema_decay=0", "run.num_steps=3", "run.val_every=3", "caption_dropout=0.5", "sample_prompts=[picture 1]"]
    options += ["train_text_encoder=true"]
    one = train_diffusion(configure(*options, f"run.dir={tmp_path / 'one'}"))
    more = [f"run.dir={tmp_path / 'two'}", "run.devices=2", "run.strategy=ddp", "run.accelerator=cpu", "run.precision=32-true"]
    result = subprocess.run(
        [sys.executable, "train.py", str(tmp_path / "config.yaml"), *options, *more],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    for part in ("unet", "text_encoder"):
        assert difference(tiny_model_folder, one, tmp_path / "two" / "model", part) < 5e-3, part
    assert (tmp_path / "two" / "samples" / "0000003.png").is_file()
    assert logged(tmp_path / "two", "val/loss") == pytest.approx(logged(tmp_path / "one", "val/loss"), rel=1e-4)


def test_nan_stops_with_the_step_and_the_batch(configure, tmp_path, make_model_folder, tiny_pictures):
    model = make_model_folder(tmp_path / "broken")
    unet = load_unet(model)
    with torch.no_grad():
        unet.conv_out.bias.fill_(1e30)  # finite, as opening wants it; its square is not
    unet.save_pretrained(model / "unet")
    with pytest.raises(FloatingPointError, match="loss is not finite at step 0: loss = inf. Batch: 0000000"):
        train_diffusion(configure(model=str(model)))


def test_the_text_encoder_has_its_own_learning_rate(configure):
    config = configure(
        "train_text_encoder=true", "text_encoder_lr_factor=0.25", "optimizer.learning_rate=0.004", "optimizer.warmup_steps=0"
    )
    ((optimizer,), _) = module_of(config).configure_optimizers()
    assert [group["lr"] for group in optimizer.param_groups] == [0.004, 0.001]


def test_a_pixel_model_trains_on_pictures_resumes_and_samples(configure, tiny_pictures, tmp_path):
    """`vae=pixels`: the UNet learns the pictures themselves."""
    pixels = {"vae": "pixels", "data": {"train": str(tiny_pictures), "val": str(tiny_pictures), "batch_size": 4, "num_workers": 0,
              "val_samples": 4}, "min_snr_gamma": 5.0, **SCRATCH, "scheduler": SCHEDULERS["v_prediction"]}  # fmt: skip
    whole = train_diffusion(configure("run.num_steps=2", f"run.dir={tmp_path / 'whole'}", **pixels))
    train_diffusion(configure("run.num_steps=1", f"run.dir={tmp_path / 'parts'}", **pixels))
    parts = train_diffusion(configure("run.num_steps=2", f"run.dir={tmp_path / 'parts'}", **pixels))
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)
    sampler = Sampler.open(whole, "cpu")
    assert sampler.latent_side == 32 and sampler.networks.unet.config.in_channels == 3
    assert sampler(["picture 1"], [IDENTITY], [0], num_inference_steps=2).shape == (1, 3, 32, 32)
