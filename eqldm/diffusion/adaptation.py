"""What stage 2 starts from and what of it is trained: scratch or pretrained, all weights or low-rank updates (peft)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from eqldm.atomic import write_whole
from eqldm.config import DiffusionConfig
from eqldm.construction import check_named, check_unet, make, make_noise
from eqldm.diffusion.conditioning import make_text_encoder, make_tokenizer, prompt_length
from eqldm.model_folder import Networks, Pixels, downsampling, load_scheduler, load_text, unet_arguments


def build_networks(config: DiffusionConfig, vae: AutoencoderKL | Pixels, image_size: int, captions: Iterable[str]) -> Networks:
    """The networks that training starts from, on the CPU.

    captions: of the training set, read only for init: scratch, to make the tokenizer.
    Raises ValueError where a pretrained UNet does not take the VAE's latent channels; as `check_named`, and where the options do not fit.
    """
    check_named(config)
    channels = vae.config.latent_channels
    if config.init == "pretrained":
        assert config.model is not None  # its options require it
        networks = Networks.open(config.model)
        if networks.unet.config.in_channels != channels:
            raise ValueError(
                f"the UNet of '{config.model}' takes {networks.unet.config.in_channels} latent channels, the VAE of "
                f"'{config.vae}' gives {channels}: use a VAE with as many channels, or init=scratch"
            )
        _check_family(config.model, networks, image_size // downsampling(vae))
    else:
        torch.manual_seed(config.run.seed)
        if config.init == "scratch_unet":
            assert config.model is not None
            tokenizer, text_encoder = load_text(config.model)
            architecture = config.unet or unet_arguments(config.model)
            noise = make_noise(config.scheduler) if config.scheduler else load_scheduler(config.model)
        else:
            text = {**config.text_encoder}
            tokenizer = make_tokenizer(captions, prompt_length(text.pop("max_position_embeddings", None)))
            text_encoder = make_text_encoder(tokenizer, **text)
            architecture, noise = config.unet, make_noise(config.scheduler)
        sizes = {
            "sample_size": image_size // downsampling(vae),
            "in_channels": channels,
            "out_channels": channels,
            "cross_attention_dim": text_encoder.config.hidden_size,
        }
        check_unet({**architecture, **sizes}, sizes["sample_size"], text_encoder.config.max_position_embeddings)
        unet = make(UNet2DConditionModel, "unet", architecture, **sizes)
        start_unconditional(unet)
        networks = Networks(unet, tokenizer, text_encoder, noise)
    if not torch.cuda.is_available():
        # The backward pass of scaled_dot_product_attention takes over half of a small UNet's step on a CPU.
        networks.unet.set_attn_processor(AttnProcessor())
    if config.adapt == "lora":
        torch.manual_seed(config.run.seed)
        add_lora(networks.unet, config)
    if config.gradient_checkpointing:
        networks.unet.enable_gradient_checkpointing()
    networks.text_encoder.requires_grad_(config.train_text_encoder)
    return networks


def _check_family(model: str, networks: Networks, side: int) -> None:
    """Raises ValueError where a model's UNet wants more than noisy latents, a timestep and a prompt of its text encoder, as SDXL's does."""
    text = networks.text_encoder.config
    reads = networks.unet.config.cross_attention_dim
    if isinstance(reads, int) and reads != text.hidden_size:
        raise ValueError(
            f"the UNet of '{model}' reads prompts of {reads} numbers a token, and its text encoder gives {text.hidden_size}: it needs "
            "another, or is of a family that has two (wanted Stable Diffusion 1.x or 2.x)"
        )
    try:
        check_unet(unet_arguments(model), side, text.max_position_embeddings, text_size=text.hidden_size)
    except ValueError as error:
        fault = str(error).partition(" (got ")[0]
        raise ValueError(f"the UNet of '{model}' is of another family than Stable Diffusion 1.x and 2.x: {fault}") from error


def start_unconditional(unet: UNet2DConditionModel) -> None:
    """Zeroes what lets text into a random UNet, in place: the outputs of its cross-attention, the scale of its text embedding.

    A random UNet's text is noise to it, and the first thing that it learns is to suppress it, from which it hardly recovers;
    from zero, only what is useful grows (as in adaLN-Zero, arXiv 2212.09748, section 3.2).
    """
    for name, module in unet.named_modules():
        if name.endswith("attn2.to_out.0"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif name == "add_embedding.norm2":
            torch.nn.init.zeros_(module.weight)


def add_lora(unet: UNet2DConditionModel, config: DiffusionConfig) -> None:
    """Freezes the UNet and adds trainable low-rank updates. Raises ValueError where no module bears a target's name.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """
    names = [name for name, _ in unet.named_modules()]
    absent = [t for t in config.lora.targets if not any(name == t or name.endswith("." + t) for name in names)]
    if absent:
        raise ValueError(f"lora.targets {absent} match no module of the UNet: give suffixes of its module names, such as to_q")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules=list(config.lora.targets)))


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    """Writes the low-rank updates as `pytorch_lora_weights.safetensors`, which stock `pipeline.load_lora_weights(folder)` reads.

    Their scale, alpha / rank, is in the weights: old versions of diffusers and other programs take an alpha that they do not find for the
    rank, and pass over the settings that new ones note in the file, or stop at one that their peft does not know.
    """
    config = unet.peft_config["default"]
    scale = config.lora_alpha / config.r
    layers = {
        name: weight * scale if name.endswith("lora_B.weight") else weight.contiguous()
        for name, weight in get_peft_model_state_dict(unet).items()
    }
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, save_function=_write_whole)


def _write_whole(weights: dict[str, Tensor], path: str) -> None:
    write_whole(Path(path), lambda partial: save_file(weights, partial, {"format": "pt"}))


def merge_lora(unet: UNet2DConditionModel) -> None:
    """Adds the low-rank updates to the weights and removes them: a plain UNet again."""
    unet.fuse_lora()
    unet.unload_lora()
