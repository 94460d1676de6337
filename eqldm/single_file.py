"""Autoencoders in a single file of the original layout: LDM's kl-f8, an SD checkpoint's `first_stage_model`, `vae-ft-mse` files.

Read by diffusers' own conversion, with the architecture taken from the weights' shapes, so that no config is fetched; written by the
inverse. Such an autoencoder has diffusers' usual blocks, GroupNorm of 32 groups, and attention in its middle block alone. What multiplies
its latents (`scale_factor`) seldom stands in the file, but in a YAML: `write_single_file` states it in both.

Source of the layout: Latent Diffusion, arXiv 2112.10752, and its code's `ldm/models/autoencoder.py`.
"""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import LDM_VAE_KEYS, convert_ldm_vae_checkpoint
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eqldm.atomic import told, whole
from eqldm.weights import cut_off, read_pickle

PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
BESIDE = ("loss.", "model_ema.", "scale_factor")  # what a training of LDM's keeps beside them
GROUPS = 32  # of each GroupNorm
WRITTEN = (".safetensors", ".ckpt")  # suffixes
SUFFIXES = (*WRITTEN, ".pt", ".pth")
RENAMED = {  # diffusers' names to LDM's; {} stands for LDM's number of an up block
    r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.": r"encoder.down.\1.block.\2.",
    r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.": r"encoder.down.\1.downsample.",
    r"^decoder\.up_blocks\.\d+\.resnets\.(\d+)\.": r"decoder.up.{}.block.\1.",
    r"^decoder\.up_blocks\.\d+\.upsamplers\.0\.": r"decoder.up.{}.upsample.",
    r"\.mid_block\.resnets\.0\.": ".mid.block_1.",
    r"\.mid_block\.resnets\.1\.": ".mid.block_2.",
    r"\.mid_block\.attentions\.0\.": ".mid.attn_1.",
    r"\.attn_1\.group_norm\.": ".attn_1.norm.",
    r"\.attn_1\.to_([qkv])\.": r".attn_1.\1.",
    r"\.attn_1\.to_out\.0\.": ".attn_1.proj_out.",
    r"\.conv_shortcut\.": ".nin_shortcut.",
    r"\.conv_norm_out\.": ".norm_out.",
}


def read_single_file(path: str | Path) -> AutoencoderKL:
    """The autoencoder of a file, in float32 and eval mode.

    Its `scaling_factor` is what the file states. Where it states none, it is Stable Diffusion's (0.18215, XL's 0.13025) for a file that
    looks like one of these, else 1, and a warning says so: training does not mind, for it folds the scale in.
    Raises ValueError, with what to do, for a file that holds no such autoencoder, or that is a pickle of more than weights;
    OSError where it cannot be read.
    """
    path = Path(path)
    found, stated = _read(path)
    prefix = next((prefix for prefix in LDM_VAE_KEYS if any(key.startswith(prefix) for key in found)), "")
    stripped = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    _check(path, stripped)
    weights = {key: value.float() for key, value in stripped.items() if key.startswith(PARTS)}
    vae = AutoencoderKL(**_architecture(weights))
    try:
        vae.load_state_dict(convert_ldm_vae_checkpoint(weights, vae.config))
    except RuntimeError as error:  # strict: names what is missing or of another shape
        raise ValueError(f"'{path}' holds no autoencoder that diffusers knows: {' '.join(str(error).split())}") from error
    if left := sorted(weights.keys() - ldm_weights(vae).keys()):  # the conversion passes over what it does not know
        raise ValueError(f"'{path}' holds another autoencoder than diffusers converts: {', '.join(left[:5])} would be left out")
    vae.register_to_config(scaling_factor=_assumed_scale(path, vae, found) if stated is None else stated)
    return vae.eval()


def _assumed_scale(path: Path, vae: AutoencoderKL, found: dict[str, Tensor]) -> float:
    scale, of = 1.0, "unscaled latents"
    if vae.config.latent_channels == 4 and vae.quant_conv is not None:
        xl = any(key.startswith("conditioner.") for key in found)
        scale, of = (0.13025, "Stable Diffusion XL's") if xl else (0.18215, "that of Stable Diffusion 1.x and 2.x (XL's is 0.13025)")
    warnings.warn(f"'{path}' states no scale_factor: taken to be {scale}, {of}", stacklevel=3)
    return scale


def write_single_file(vae: AutoencoderKL, path: str | Path) -> Path:
    """Writes the autoencoder, and as `PATH.yaml` the part of an LDM config that goes with it. Returns the path.

    path: `.safetensors`, or a `.ckpt` that LDM's own code loads.
    Raises ValueError where LDM's layout cannot say what the autoencoder is, or for another suffix; OSError.
    """
    path, config = Path(path), vae.config
    if path.suffix not in WRITTEN:
        raise ValueError(f"a single file ends in {' or '.join(WRITTEN)}, got '{path}'")
    blocks = {*config.down_block_types, *config.up_block_types}
    faults = {
        f"GroupNorm of {config.norm_num_groups} groups, LDM's have {GROUPS}": config.norm_num_groups != GROUPS,
        "other blocks than DownEncoderBlock2D and UpDecoderBlock2D": blocks != {"DownEncoderBlock2D", "UpDecoderBlock2D"},
        f"widths {list(config.block_out_channels)} that are no multiples of the first": any(
            width % config.block_out_channels[0] for width in config.block_out_channels
        ),
        f"act_fn {config.act_fn}, LDM's is silu": config.act_fn != "silu",
        "latents_mean and latents_std": config.get("latents_mean") or config.get("latents_std"),
        "a shift_factor (python -m eqldm.export folds it in)": config.get("shift_factor"),
        "no quant_conv (python -m eqldm.export adds one)": vae.quant_conv is None or vae.post_quant_conv is None,
    }
    if wrong := [fault for fault, there in faults.items() if there]:
        raise ValueError(f"LDM's layout has no place for this autoencoder: it has {', '.join(wrong)}")
    weights = ldm_weights(vae)
    settings = OmegaConf.to_yaml(OmegaConf.create(ldm_config(vae)))
    beside = path.with_name(path.name + ".yaml")
    with told(f"'{path}'"), whole(beside) as stated, whole(path) as partial:  # renamed together: the scale of one is not the other's
        stated.write_text(settings)
        if path.suffix == ".safetensors":
            save_file(weights, partial, {"format": "pt", "scale_factor": repr(config.scaling_factor)})
        else:
            with open(partial, "wb") as file:
                torch.save({"state_dict": weights, "scale_factor": config.scaling_factor}, file)
    return path


def ldm_weights(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The weights of an autoencoder under LDM's names and in its shapes: attention is of 1 x 1 convolutions there."""
    last = len(vae.config.up_block_types) - 1
    weights = {}
    for name, value in vae.state_dict().items():
        block = re.match(r"decoder\.up_blocks\.(\d+)\.", name)
        for pattern, replacement in RENAMED.items():
            name = re.sub(pattern, replacement, name)
        name = name.format(last - int(block[1])) if block else name  # LDM counts up blocks from the picture's side
        value = value.detach().cpu().contiguous()
        weights[name] = value[..., None, None] if ".attn_1." in name and value.ndim == 2 else value
    return weights


def ldm_config(vae: AutoencoderKL) -> dict:
    """What a config of LDM or Stable Diffusion must say of an autoencoder: its first stage, and the latents' scale."""
    config = vae.config
    channels = config.block_out_channels
    ddconfig = {
        "double_z": True,
        "z_channels": config.latent_channels,
        "resolution": config.sample_size,
        "in_channels": config.in_channels,
        "out_ch": config.out_channels,
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": config.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
        "attn_type": "vanilla" if config.mid_block_add_attention else "none",
    }
    first_stage = {
        "target": "ldm.models.autoencoder.AutoencoderKL",
        "params": {"embed_dim": config.latent_channels, "ddconfig": ddconfig, "lossconfig": {"target": "torch.nn.Identity"}},
    }
    return {"model": {"params": {"scale_factor": config.scaling_factor, "first_stage_config": first_stage}}}


def _read(path: Path) -> tuple[dict[str, Tensor], float | None]:
    """A file's weights by name, and the scale that it states. Of a safetensors file of a whole model, the autoencoder's tensors, and
    of others the names alone."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"'{path}' is no single-file checkpoint: wanted one of {', '.join(SUFFIXES)}, or a model folder")
    found, stated = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    if not found:
        raise ValueError(f"'{path}' holds no weights by name: wanted a state_dict")
    value = found.get("scale_factor", stated)
    try:
        stated = None if value is None else float(value)
    except (TypeError, ValueError, RuntimeError):  # text, a list, a tensor of several
        stated = math.nan
    if stated is not None and not (math.isfinite(stated) and stated > 0):
        raise ValueError(f"'{path}' states a scale_factor that is no number above 0")
    return found, stated


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            whole = any(key.startswith(tuple(LDM_VAE_KEYS)) for key in keys)
            wanted = (*LDM_VAE_KEYS, "scale_factor") if whole else ("",)
            nothing = torch.empty(0)
            found = {key: file.get_tensor(key) if key.startswith(wanted) else nothing for key in keys}
            return found, (file.metadata() or {}).get("scale_factor")
    except SafetensorError as error:
        raise cut_off(path, error) from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], float | None]:
    found, stated = read_pickle(path), None
    outer: list[dict] = []
    while isinstance(found, dict) and "state_dict" in found:
        if any(found is each for each in outer):
            raise ValueError(f"'{path}' holds no weights by name: its state_dict contains itself")
        outer.append(found)
        stated, found = found.get("scale_factor", stated), found["state_dict"]
    weights = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in weights if isinstance(key, str) and isinstance(value, Tensor)}, stated


def _check(path: Path, weights: dict[str, Tensor]) -> None:
    """Raises ValueError for what is no KL autoencoder in LDM's layout."""
    if any(key.startswith("encoder.down_blocks.") for key in weights):
        raise ValueError(f"'{path}' has diffusers' layout: give the model folder, which has the config.json that goes with it")
    if any(key.startswith("quantize.") for key in weights):
        raise ValueError(f"'{path}' holds a VQ autoencoder, wanted one with a KL posterior (kl-f8)")
    wanted = ("encoder.conv_in.weight", "encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight", "decoder.conv_out.weight")
    if missing := [key for key in wanted if key not in weights]:
        raise ValueError(f"'{path}' holds no autoencoder in LDM's layout: it lacks {', '.join(missing)}")
    if strange := sorted(key for key in weights if not key.startswith((*PARTS, *BESIDE))):
        raise ValueError(f"'{path}' holds more than an autoencoder in LDM's layout: {', '.join(strange[:5])}")
    if attention := [key for key in weights if re.match(r"(encoder\.down|decoder\.up)\.\d+\.attn\.", key)]:
        raise ValueError(
            f"'{path}' has attention outside its middle block ({attention[0]}; kl-f16, kl-f32), which diffusers cannot convert"
        )
    if (width := weights["encoder.conv_in.weight"].shape[0]) % GROUPS:
        raise ValueError(f"'{path}' has {width} channels, which LDM's GroupNorm of {GROUPS} groups does not divide")


def _architecture(weights: dict[str, Tensor]) -> dict:
    """AutoencoderKL's arguments, read off the weights."""
    levels, layers = 0, 0
    while f"encoder.down.{levels}.block.0.conv1.weight" in weights:
        levels += 1
    while f"encoder.down.0.block.{layers}.conv1.weight" in weights:
        layers += 1
    return {
        "sample_size": 512,  # Stable Diffusion's; of use to tiled decoding alone
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": weights["decoder.conv_out.weight"].shape[0],
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": tuple(weights[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        "layers_per_block": layers,
        "latent_channels": weights["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": GROUPS,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
    }
