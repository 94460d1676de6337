"""Model folders: what is missing is named, a failed save leaves the old one, and the hash tells VAEs apart."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from eqldm.anagram.sampling import Sampler
from eqldm.export import export
from eqldm.model_folder import (
    Networks,
    check_model_folder,
    decode,
    denormalise,
    downsampling,
    encode,
    load_autoencoder,
    load_scheduler,
    load_text,
    load_unet,
    load_vae,
    make_scheduler,
    normalise,
    posterior,
    save_model_folder,
    text_hash,
    vae_hash,
)
from eqldm.text_files import save_tokenizer
from eqldm.views import IDENTITY


def test_the_hash_changes_with_any_weight_and_with_the_normalisation(make_tiny_vae):
    vae = make_tiny_vae()
    seen = {vae_hash(vae)}
    assert vae_hash(make_tiny_vae()) in seen and len(vae_hash(vae)) == 16
    for weight in vae.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        seen.add(vae_hash(vae))
    seen |= {vae_hash(make_tiny_vae(scaling_factor=0.5)), vae_hash(make_tiny_vae(shift_factor=0.1))}
    assert len(seen) == 1 + len(list(vae.parameters())) + 2


def test_saving_and_loading_keeps_the_vae_and_its_hash(make_tiny_vae, tmp_path):
    vae = make_tiny_vae(scaling_factor=0.7, shift_factor=0.1)
    folder = save_model_folder(tmp_path / "model", vae=vae)
    assert folder == tmp_path / "model" and [path.name for path in folder.iterdir()] == ["vae"]
    assert (folder / "vae" / "diffusion_pytorch_model.safetensors").is_file()
    for path in (folder, folder / "vae"):  # a model folder, or an AutoencoderKL folder
        loaded = load_vae(path)
        assert vae_hash(loaded) == vae_hash(vae) and not loaded.training and loaded.dtype == torch.float32
        assert loaded.config.scaling_factor == 0.7 and loaded.config.shift_factor == 0.1


def test_a_vae_saved_in_half_precision_loads_in_float32(tiny_vae, tmp_path):
    loaded = load_vae(save_model_folder(tmp_path / "model", vae=tiny_vae.half()))
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


def test_a_saved_folder_is_replaced_and_nothing_else_is_left(make_tiny_vae, tmp_path):
    save_model_folder(tmp_path / "model", vae=make_tiny_vae(0))
    (tmp_path / "model" / "vae" / "stale").mkdir()
    save_model_folder(tmp_path / "model", vae=make_tiny_vae(1))
    assert vae_hash(load_vae(tmp_path / "model")) == vae_hash(make_tiny_vae(1))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("**/*") if path.is_dir()) == ["model", "model/vae"]


def test_a_failed_save_leaves_the_old_folder(make_tiny_vae, tmp_path, monkeypatch):
    save_model_folder(tmp_path / "model", vae=make_tiny_vae(0))
    write = AutoencoderKL.save_pretrained

    def fails(self, path, **options):
        write(self, path, **options)
        raise OSError("disk full")

    monkeypatch.setattr(AutoencoderKL, "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        save_model_folder(tmp_path / "model", vae=make_tiny_vae(1))
    assert vae_hash(load_vae(tmp_path / "model")) == vae_hash(make_tiny_vae(0))


def test_a_folder_that_lost_a_part_on_the_way_does_not_take_the_place_of_a_whole_one(make_model_folder, tmp_path, monkeypatch):
    """Another container of this host name swept it away, and what was written afterwards was a model without vae/."""
    folder = make_model_folder(tmp_path / "model")

    def after_a_sweep(tokenizer, place):
        shutil.rmtree(place.parent)
        save_tokenizer(tokenizer, place)

    monkeypatch.setattr("eqldm.model_folder.save_tokenizer", after_a_sweep)
    with pytest.raises(OSError, match=r"model' could not be written .another process has removed vae, unet, text_encoder on the way"):
        make_model_folder(folder, seed=1)
    Networks.open(folder)


def test_a_full_disk_is_told_by_name(make_tiny_vae, tmp_path):
    """safetensors reports it by an error of its own, which no entry point knows."""
    folder = save_model_folder(tmp_path / "model", vae=make_tiny_vae(seed=0))
    before, limits = vae_hash(load_vae(folder)), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))  # above its config.json, below its weights
    try:
        with pytest.raises(OSError, match=r"model folder '.*model' could not be written \(.*File too large.*when that is mended"):
            save_model_folder(folder, vae=make_tiny_vae(seed=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert vae_hash(load_vae(folder)) == before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_is_missing_is_named(tiny_vae, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist: give a diffusers pipeline folder"):
        load_vae(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="it lacks vae .holds none of its parts"):
        load_vae(tmp_path)
    folder = save_model_folder(tmp_path / "model", vae=tiny_vae)
    with pytest.raises(FileNotFoundError, match=r"it lacks unet \(holds vae\)"):
        load_unet(folder)
    with pytest.raises(FileNotFoundError, match="it lacks unet, text_encoder, tokenizer, scheduler"):
        check_model_folder(folder)


def test_weights_that_do_not_fit_or_are_no_safetensors_are_refused(make_tiny_vae, tmp_path):
    folder = save_model_folder(tmp_path / "model", vae=make_tiny_vae())
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    other = save_model_folder(tmp_path / "other", vae=make_tiny_vae(latent_channels=8))
    weights.write_bytes((other / "vae" / weights.name).read_bytes())
    with pytest.raises((ValueError, RuntimeError), match="size mismatch|shape"):
        load_vae(folder)
    weights.unlink()
    torch.save(make_tiny_vae().state_dict(), weights.with_suffix(".bin"))
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"):
        load_vae(folder)


PARTS = {
    "vae": (load_vae, "diffusion_pytorch_model", "decoder.conv_out.weight"),
    "unet": (load_unet, "diffusion_pytorch_model", "conv_out.bias"),
    "text_encoder": (load_text, "model", "encoder.layers.0.mlp.fc1.bias"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "mismatched"])
def test_weights_load_strictly(make_model_folder, tmp_path, part, fault):
    load, file, name = PARTS[part]
    folder = make_model_folder(tmp_path / "model")
    path = folder / part / f"{file}.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if key.endswith(name))  # some transformers put a prefix before it
    changed = {
        "missing": {key: weight for key, weight in weights.items() if key != name},
        "unexpected": {**weights, "bogus": torch.zeros(2)},
        "mismatched": {**weights, name: torch.zeros(7)},
    }
    save_file(changed[fault], path, metadata={"format": "pt"})
    wanted = {"missing": "missing: .*" + name.split(".", 1)[1], "unexpected": "unexpected: .*bogus", "mismatched": "conv_out|fc1"}
    with pytest.raises(ValueError, match=wanted[fault]):
        load(folder)


def test_the_text_encoders_of_stable_diffusion_load(make_model_folder, tmp_path):
    """They hold `position_ids`, which is no weight, and name their weights `text_model.`..."""
    folder = make_model_folder(tmp_path / "model")
    path = folder / "text_encoder" / "model.safetensors"
    before = text_hash(*load_text(folder))
    weights = {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in load_file(path).items()}
    save_file({**weights, "text_model.embeddings.position_ids": torch.arange(8)[None]}, path, metadata={"format": "pt"})
    assert text_hash(*load_text(folder)) == before
    path.rename(path.with_name("weights.safetensors"))
    torch.save(weights, path.with_name("pytorch_model.bin"))
    with pytest.raises(OSError, match="model.safetensors"):
        load_text(folder)


def test_the_text_hash_changes_with_any_weight_token_and_padding(make_model_folder, tmp_path):
    tokenizer, text_encoder = load_text(make_model_folder(tmp_path / "model"))
    before = text_hash(tokenizer, text_encoder)
    tokenizer(["the letter a"], padding="max_length", truncation=True)  # leaves its traces in the tokenizer
    assert text_hash(tokenizer, text_encoder) == before and len(before) == 16
    seen = {before}
    for weight in text_encoder.parameters():
        with torch.no_grad():
            weight.view(-1)[-1] += 1e-3
        seen.add(text_hash(tokenizer, text_encoder))
    tokenizer.pad_token = "a"
    seen.add(text_hash(tokenizer, text_encoder))
    tokenizer.model_max_length = 7
    seen.add(text_hash(tokenizer, text_encoder))
    tokenizer.add_tokens(["zebra"])
    seen.add(text_hash(tokenizer, text_encoder))
    assert len(seen) == 1 + len(list(text_encoder.parameters())) + 3


def test_a_folder_of_some_parts_cannot_be_saved(tiny_vae, tmp_path):
    with pytest.raises(ValueError, match="vae alone or all of .* got vae, unet"):
        save_model_folder(tmp_path / "model", vae=tiny_vae, unet=None)
    assert not (tmp_path / "model").exists()


def test_schedulers_are_made_by_the_name_in_their_config(tmp_path):
    wanted = DDIMScheduler(beta_start=0.001, prediction_type="v_prediction")
    wanted.save_pretrained(tmp_path / "scheduler")
    loaded = load_scheduler(tmp_path)
    assert type(loaded) is DDIMScheduler and loaded.config.prediction_type == "v_prediction" and loaded.config.beta_start == 0.001
    assert type(make_scheduler(dict(wanted.config), "EulerDiscreteScheduler")) is EulerDiscreteScheduler
    for name in ("NoScheduler", "AutoencoderKL", ""):
        with pytest.raises(ValueError, match="is no diffusers scheduler: wanted a class name such as DDIMScheduler"):
            make_scheduler({"_class_name": name})


@torch.no_grad()
def test_weights_that_are_not_finite_are_told_by_name(tiny_model_folder, tmp_path):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    for part, name, value, load in (
        ("unet", "conv_in.weight", "nan", load_unet), ("vae", "decoder.conv_out.bias", "inf", load_vae),
        ("text_encoder", "final_layer_norm.weight", "-inf", load_text),
    ):  # fmt: skip
        (path,) = (folder / part).glob("*.safetensors")
        weights = load_file(path)
        full = next(key for key in weights if key.endswith(name))
        weights[full].view(-1)[0] = float(value)
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(ValueError, match=f"{path.name}' holds NaN or infinite weights, in 1 of .* tensors: .*{name}. .* another check"):
            load(folder)


@pytest.mark.parametrize(("path", "content", "message"), [
    ("scheduler/scheduler_config.json", "{", "scheduler_config.json' is no JSON file"),
    ("scheduler/scheduler_config.json", "[]", "scheduler_config.json' holds a JSON list, wanted an object"),
    ("scheduler/scheduler_config.json", '{"_class_name": "DDIMScheduler", "beta_schedule": "odd"}', "DDIMScheduler cannot be made"),
    ("vae/config.json", "{", "config.json' is no JSON"),
    ("text_encoder/model.safetensors", "short", "text_encoder"),
    ("tokenizer/tokenizer_config.json", "{}", "tokenizer' states a model_max_length of none, but the text encoder reads 8 tokens"),
])  # fmt: skip
def test_a_damaged_file_is_told_by_name(tiny_model_folder, tmp_path, path, content, message):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (folder / path).write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        Sampler.open(folder, "cpu")


def test_latents_are_normalised_as_stock_pipelines_do(make_tiny_vae):
    vae = make_tiny_vae(scaling_factor=0.5, shift_factor=0.2)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moments = vae.encode(x).latent_dist.parameters
    assert downsampling(vae) == 4 and moments.shape == (2, 8, 8, 8)
    mean = posterior(moments).mean
    assert torch.equal(encode(vae, x), (mean - 0.2) * 0.5)
    torch.testing.assert_close(denormalise(vae, normalise(vae, mean)), mean)
    torch.testing.assert_close(decode(vae, encode(vae, x)), vae.decode(mean).sample, rtol=1e-5, atol=1e-5)


def test_a_folder_as_stable_diffusion_1_5_was_published(tmp_path, make_tiny_vae, make_model_folder):
    """In 2022: the VAE's attention under old names, no scaling_factor, and PNDM. Our samples are the stock pipeline's."""
    vae = make_tiny_vae(mid_block_add_attention=True)
    new, old = (make_model_folder(tmp_path / name, vae=vae) for name in ("new", "old"))
    path = next((old / "vae").glob("*.safetensors"))
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for key, value in load_file(path).items():
        for now, before in names.items():
            key = key.replace(f"attentions.0.{now}.", f"attentions.0.{before}.")
        weights[key] = value
    assert any("proj_attn" in key for key in weights)
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((old / "vae" / "config.json").read_text())
    scale = config.pop("scaling_factor")
    (old / "vae" / "config.json").write_text(json.dumps(config))
    scheduler = {"_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                 "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}  # fmt: skip
    (old / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    a, b = load_vae(new).state_dict(), load_vae(old).state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert load_vae(old).config.scaling_factor == 0.18215 and scale == load_vae(new).config.scaling_factor
    model_index = json.loads((old / "model_index.json").read_text())
    (old / "model_index.json").write_text(json.dumps({**model_index, "scheduler": ["diffusers", "PNDMScheduler"]}))
    stock = StableDiffusionPipeline.from_pretrained(old, safety_checker=None)
    options = {"num_inference_steps": 5, "guidance_scale": 3.0}
    expected = stock("picture 1", generator=torch.Generator().manual_seed(3), height=32, width=32, output_type="latent", **options).images
    assert type(stock.scheduler).__name__ == "PNDMScheduler"
    torch.testing.assert_close(Sampler.open(old, "cpu").latents(["picture 1"], [IDENTITY], [3], **options), expected, atol=1e-4, rtol=1e-4)


def test_statistics_that_nothing_would_apply_are_refused(tiny_model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"latents_mean": [0.1] * 4, "latents_std": [2.0] * 4}))
    with pytest.raises(ValueError, match="config.json' states latents_mean, which .* nor does eqldm: remove it"):
        load_vae(folder)


def test_weights_of_another_shape_name_their_folder(tiny_model_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": config["in_channels"] + 1}))
    with pytest.raises(ValueError, match="the weights in '.*/unet' do not fit its config.json .UNet2DConditionModel.: .*conv_in"):
        load_unet(folder)


@pytest.mark.parametrize(
    ("loader", "open_it"),
    [
        ("eqldm.model_folder.load_unet", Networks.open),
        ("eqldm.anagram.sampling.load_autoencoder", lambda folder: Sampler.open(folder, "cpu")),
        ("eqldm.export.load_autoencoder", lambda folder: export(folder, folder.parent / "out", torch.float16)),
    ],
)
def test_parts_of_two_models_are_not_opened_as_one(make_model_folder, tmp_path, monkeypatch, loader, open_it):
    """An export that replaced the folder while it was read gave the UNet of one model with the VAE of another, and nothing said so."""
    folder = make_model_folder(tmp_path / "model")
    load = load_unet if loader.endswith("unet") else load_autoencoder

    def then_replaced(path):
        network = load(path)
        make_model_folder(folder, seed=1)
        return network

    monkeypatch.setattr(loader, then_replaced)
    with pytest.raises(ValueError, match="model' was replaced while it was opened, by an export perhaps: run the same command again"):
        open_it(folder)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    open_it(folder)
