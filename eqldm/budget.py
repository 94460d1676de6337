"""What a run will need: parameters, computation, memory per GPU, hours, disk. Nothing is trained and no weight is read.

    python -m eqldm.budget CONFIG [key=value ...]

The networks are built as fake tensors (shapes without memory) and taken through one training step, of which the floating-point
operations and the tensors kept for the backward pass are counted. `python train.py CONFIG dry_run=true` ends with the same.

Counted as for CUDA under bf16 autocast, without torch.compile (which keeps less). On top come the CUDA context, buffers that live within
one operation, and fragmentation: leave a tenth of the memory free. On an H200 SD 1.5's UNet took 1 GB more than is counted, and the
autoencoder's stage, at 10 pictures of 256 px, 5 GB more (docs/gpu.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from eqldm.autoencoder.discriminator import PatchDiscriminator
from eqldm.command import Parser, error_line
from eqldm.config import AutoencoderConfig, DiffusionConfig, JudgeConfig, load_config, micro_batch_size
from eqldm.construction import check_autoencoder, check_named, check_unet, make
from eqldm.data.samples import LatentSamples, PictureSamples
from eqldm.data.shards import holds_shards, read_manifest
from eqldm.diffusion.adaptation import add_lora
from eqldm.diffusion.conditioning import TEXT_ENCODER, prompt_length
from eqldm.kinds import check_given_once
from eqldm.markdown import markdown
from eqldm.model_folder import check_model_folder, check_settings, downsampling, unet_arguments, vae_arguments
from eqldm.paths import place_option
from eqldm.run_model import with_models
from eqldm.training.speed import GPUS
from eqldm.training.zero import BUCKET, LIVE, ZERO

UTILISATION = {  # of a GPU's TFLOP/s
    "A100": 0.25,  # MosaicML's 137.5 and 36.3 pictures/s per A100 (SD 2's UNet, latents, 256 and 512 px) are .24 and .29
    "H100": 0.15,  # as an H200's: the same cores
    "H200": 0.15,  # measured without torch.compile: .14 to .17 for SD 1.5's UNet, .14 for its autoencoder (docs/gpu.md)
}
COUNTS = (1, 8, 32)  # GPUs
VOCABULARY = {
    "vocab_size": 1000,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
}  # of a text encoder from scratch, as long as no captions are read
STABLE_DIFFUSION: dict[str, dict] = {  # 1.5, to count with where a config's model is not on this disk
    "vae": {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
    },
    "unet": {
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "layers_per_block": 2,
        "attention_head_dim": 8,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
        "max_position_embeddings": 77,
    },
}


@dataclass(frozen=True)
class Budget:
    """What one run needs. Bytes, floating-point operations, parameters; activations and operations per picture."""

    networks: dict[str, tuple[int, int]]  # name: parameters, those of them that train
    averaged: int  # parameters that the EMA of single processes and DDP copies, 0 without one; ZeRO's averages what trains
    operations: float
    activations: float
    casts: float  # the bf16 copies of weights that autocast keeps for the backward pass
    encoding: float  # operations to make a picture's latents and prompt embeddings, once; 0 where there are none to make
    disk: dict[str, float]  # what: bytes
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        return sum(count for count, _ in self.networks.values())

    @property
    def trained(self) -> int:
        return sum(trained for _, trained in self.networks.values())

    def memory(self, strategy: str, processes: int, micro_batch: int) -> float:
        """Bytes on each GPU: weights, gradients, AdamW's moments and the EMA in float32, and the activations of a micro-batch."""
        frozen, stage = self.parameters - self.trained, ZERO.get(strategy, 0)
        share = self.trained / processes
        weights = share + min(LIVE, self.trained) if stage == 3 else self.trained
        gradients = share if stage >= 2 else self.trained
        moments = 2 * (share if stage else self.trained)
        average = (share if self.averaged else 0) if stage else self.averaged
        flat = share if stage in (1, 2) else 0  # a copy of their share, which these step
        buckets = 2 * min(BUCKET, self.trained) if stage else 0
        parts = frozen + weights + gradients + moments + average + flat + buckets
        return 4 * parts + self.casts + micro_batch * self.activations


def budget(config: AutoencoderConfig | DiffusionConfig) -> Budget:
    """What the run needs. Raises FileNotFoundError where the pictures' size is not known yet; ValueError for options that do not
    fit, and as the loaders."""
    check_named(config)
    size = _image_size(config)
    notes: list[str] = []
    with _fakes(config, size, notes) as (networks, step, kept):
        one, two = _measure(step, networks, 1), _measure(step, networks, 2)
        makes_latents = isinstance(config, DiffusionConfig) and "vae" in networks
        encoding = _encoding(networks["vae"], networks["text_encoder"], size) if makes_latents else 0.0
    average = bool(config.optimizer.ema_decay)
    counts = {name: (_count(network), _count(network, trained=True)) for name, network in networks.items()}
    disk = {"a checkpoint": 4.0 * (kept * (1 + average) + 2 * sum(trained for _, trained in counts.values()))}
    if config.run.keep_every:
        kept = config.run.num_steps // config.run.keep_every
        disk[f"{kept} kept, the newest and the one being written"] = (kept + 2) * disk["a checkpoint"]
    if makes_latents:
        disk |= _latent_disk(networks["vae"], networks["text_encoder"].config, size)
    return Budget(
        networks=counts,
        averaged=kept if average else 0,
        operations=two[0] - one[0],
        activations=two[1] - one[1],
        casts=max(0.0, 2 * one[1] - two[1]),
        encoding=encoding,
        disk=disk,
        notes=tuple(notes),
    )


def operations(config: AutoencoderConfig | DiffusionConfig) -> float:
    """Floating-point operations of a training step, per picture; what gradient checkpointing recomputes is not counted again."""
    if isinstance(config, DiffusionConfig):
        config = replace(config, gradient_checkpointing=False)
    with _fakes(config, _image_size(config), []) as (networks, step, _):
        return _measure(step, networks, 1)[0]


def report(config: AutoencoderConfig | DiffusionConfig, need: Budget) -> list[str]:
    """The lines of a run's budget, in Markdown."""

    def table(heading: list[str], rows: list[list[str]]) -> list[str]:
        return markdown(heading, rows).splitlines()

    micro, pictures = micro_batch_size(config), config.run.num_steps * config.data.batch_size
    strategies = ("ddp",) if isinstance(config, AutoencoderConfig) else ("ddp", *ZERO)
    lines = [line for note in need.notes for line in (note, "")]
    lines += table(
        ["network", "parameters, M", "of them trained, M"],
        [[name, f"{count / 1e6:.1f}", f"{trained / 1e6:.1f}"] for name, (count, trained) in need.networks.items()],
    )
    lines += ["", f"{pictures / 1e6:.2f} M pictures ({config.run.num_steps} steps of {config.data.batch_size}); a picture takes "
              f"{need.operations / 1e12:.3g} TFLOP and, for the backward pass, {need.activations / 1e9:.3g} GB"]  # fmt: skip
    micros = [max(1, min(micro, config.data.batch_size // count)) for count in COUNTS]
    lines += ["", f"GB on each GPU, of {' or '.join(map(str, dict.fromkeys(micros)))} pictures at a time:", ""]
    rows = [[name, *(f"{need.memory(name, count, m) / 1e9:.1f}" for count, m in zip(COUNTS, micros))] for name in strategies]
    lines += table(["strategy", *(f"{count} GPU{'s' * (count > 1)} x {m}" for count, m in zip(COUNTS, micros))], rows)
    shares = ", ".join(f"{share:.0%} of an {name}'s" for name, share in UTILISATION.items())
    lines += ["", f"Hours, and pictures/s to be read, at so much of the bf16 peak: {shares}", ""]
    rows = []
    for name, (_, peak) in GPUS.items():
        rates = [count * UTILISATION[name] * peak * 1e12 / need.operations for count in COUNTS]
        rows.append([name, *(f"{pictures / rate / 3600:.1f} h, {rate:.0f}/s" for rate in rates)])
    lines += table(["GPU", *map(str, COUNTS)], rows)
    if need.encoding:
        hours = 1e6 * need.encoding / (UTILISATION["A100"] * GPUS["A100"][1] * 1e12) / 3600
        lines += [
            "",
            f"Latents and prompt embeddings, once: {need.encoding / 1e12:.3g} TFLOP a picture, {hours:.1f} hours of an A100 for 1 M",
        ]
    lines += ["", "Disk: " + "; ".join(f"{name} {_size(count)}" for name, count in need.disk.items())]
    return lines


def _size(count: float) -> str:
    unit, divisor = next(pair for pair in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("KB", 1e3)) if count >= pair[1] or pair[0] == "KB")
    return f"{count / divisor:.3g} {unit}"


def _count(network: nn.Module, trained: bool = False) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad or not trained)


def _image_size(config: AutoencoderConfig | DiffusionConfig) -> int:
    """The pictures' side, px: of the shards, or where they are not made yet as the options say."""
    if holds_shards(config.data.train):
        of_latents = read_manifest(config.data.train).get("kind") == "latents"
        if of_latents and isinstance(config, DiffusionConfig) and config.vae != "pixels":
            cells = LatentSamples(config.data.train)[0]["moments"].shape[-1]
            return cells * downsampling(_vae(_network_config(config.vae, "vae", [])))
        return PictureSamples(config.data.train).image_size[0]  # which refuses latents
    if config.data.image_size:
        return config.data.image_size
    raise FileNotFoundError(f"'{config.data.train}' holds no shards yet: set data.image_size to the pictures' side, px")


def _network_config(model: str | None, part: str, notes: list[str]) -> dict:
    """The arguments of a part of a model folder (or VAE of a file); Stable Diffusion 1.5's, with a note, where it is not on this disk."""
    assert model is not None  # see `validate`: a config without one starts from scratch
    folder = Path(model)
    if not folder.exists():
        note = f"'{model}' is not on this disk: counted as Stable Diffusion 1.5's"
        notes += [] if note in notes else [note]
        return STABLE_DIFFUSION[part]
    if part == "text_encoder":
        path = check_model_folder(folder, (part,)) / part
        check_settings(path)
        return CLIPTextConfig.from_pretrained(path, local_files_only=True).to_dict()
    return vae_arguments(folder) if part == "vae" else unet_arguments(folder)


def _vae(arguments: dict) -> AutoencoderKL:
    with torch.device("meta"):
        return make(AutoencoderKL, "architecture", arguments)


def counted(
    config: AutoencoderConfig | DiffusionConfig, size: int, notes: list[str]
) -> tuple[dict[str, nn.Module], Callable[[int], list[Tensor]], int]:
    """What is counted: a run's networks on the meta device; its training step on pictures of a count, which gives the losses; and the
    parameters that the EMA copies."""
    with torch.device("meta"):
        return _autoencoder(config, size, notes) if isinstance(config, AutoencoderConfig) else _diffusion(config, size, notes)


@contextmanager
def _fakes(
    config: AutoencoderConfig | DiffusionConfig, size: int, notes: list[str]
) -> Iterator[tuple[dict[str, nn.Module], Callable, int]]:
    """What `counted` gives, as fake tensors, within whose mode the block runs."""
    networks, step, kept = counted(config, size, notes)
    with FakeTensorMode():
        for network in networks.values():
            _fake(network)
        yield networks, step, kept


def _autoencoder(config: AutoencoderConfig, size: int, notes: list[str]) -> tuple[dict[str, nn.Module], Callable, int]:
    """The networks of stage 1, a training step on pictures of a count, and the parameters that the EMA copies."""
    arguments = config.architecture if config.init == "scratch" else _network_config(config.model, "vae", notes)
    if config.init == "scratch":
        check_autoencoder(arguments, size)
    vae = _vae(arguments).train()
    networks: dict[str, nn.Module] = {"vae": vae}
    loss, vgg = config.loss, None
    if loss.adversarial_weight > 0:
        networks["discriminator"] = PatchDiscriminator(loss.discriminator_channels, loss.discriminator_layers)
    if loss.perceptual_weight > 0:
        from torchvision.models import vgg16

        vgg = networks["lpips"] = vgg16().features.eval().requires_grad_(False)
    side = size if config.crop_until is not None else config.crop_size or size
    notes.append("rescaled and cropped pictures are counted as whole ones" if side == size else f"crops of {side} px")

    def step(count: int) -> list[Tensor]:
        x = torch.randn(count, 3, side, side)
        if config.equivariance.preset == "eqvae_paper" and "discriminator" in networks:  # whose pictures are decoded once more
            with torch.no_grad():
                again = vae.decode(vae.encode(x).latent_dist.sample()).sample
                _ = vgg(again) if vgg is not None else None
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample.float()
        total = (y - x).abs().mean() + posterior.kl().mean()
        if config.equivariance.consistency_weight > 0:
            total = total + (vae.encode(x).latent_dist.mean - posterior.mean).square().mean()
        if vgg is not None:
            with torch.no_grad():
                target = vgg(x)
            total = total + (vgg(y) - target).square().mean()
        if "discriminator" not in networks:
            return [total]
        critic = networks["discriminator"]
        return [total + critic(y).mean(), critic(y.detach()).mean() - critic(x).mean()]

    return networks, step, sum(_count(networks[name]) for name in networks if name != "lpips")


def _diffusion(config: DiffusionConfig, size: int, notes: list[str]) -> tuple[dict[str, nn.Module], Callable, int]:
    """As `_autoencoder`, of stage 2. The step begins at the latents: their shards, and those of prompts, are made once, before."""
    vae = None if config.vae == "pixels" else _vae(_network_config(config.vae, "vae", notes)).requires_grad_(False)
    channels, side = (3, size) if vae is None else (vae.config.latent_channels, size // downsampling(vae))
    if config.init == "scratch":
        text = {**TEXT_ENCODER, **config.text_encoder, **VOCABULARY}
        length = prompt_length(config.text_encoder.get("max_position_embeddings"))
        text["max_position_embeddings"] = length or VOCABULARY["max_position_embeddings"]
        notes.append(
            "the vocabulary is made of the captions: counted as {vocab_size} words, captions of {max_position_embeddings}".format_map(text)
        )
    else:
        text = _network_config(config.model, "text_encoder", notes)
    text = CLIPTextModel(CLIPTextConfig(**text)).requires_grad_(config.train_text_encoder)
    width, length = text.config.hidden_size, text.config.max_position_embeddings
    unet = config.unet if config.init == "scratch" or config.unet else _network_config(config.model, "unet", notes)
    sizes = {"sample_size": side, "in_channels": channels, "out_channels": channels, "cross_attention_dim": width}
    if config.init != "pretrained":
        check_unet({**unet, **sizes}, side, length)
    unet = make(UNet2DConditionModel, "unet", {**unet, **sizes}).train()
    if config.adapt == "lora":
        add_lora(unet, config)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    networks: dict[str, nn.Module] = {"unet": unet, "text_encoder": text}
    if vae is not None:
        networks["vae"] = vae

    def step(count: int) -> list[Tensor]:
        if config.train_text_encoder:
            embeds = text(torch.zeros(count, length, dtype=torch.long)).last_hidden_state
        else:
            embeds = torch.randn(count, length, width)
        noisy = torch.randn(count, channels, side, side)
        return [unet(noisy, torch.zeros(count, dtype=torch.long), embeds).sample.float().square().mean()]

    return networks, step, _count(unet) + (_count(text) if config.train_text_encoder else 0)


def _encoding(vae: AutoencoderKL, text: CLIPTextModel, size: int) -> float:
    """Operations that data/encode_latents.py --prompt-embeds spends on a picture."""
    with torch.no_grad(), counting() as counter:
        vae.encode(torch.randn(1, 3, size, size))
        text(torch.zeros(1, text.config.max_position_embeddings, dtype=torch.long))
    return counter.get_total_flops()


def _latent_disk(vae: AutoencoderKL, text: CLIPTextConfig, size: int) -> dict[str, float]:
    """Bytes of the latent shards that data/encode_latents.py makes, in float16."""
    moments = 2 * 2 * vae.config.latent_channels * (size // downsampling(vae)) ** 2
    embeds = 2 * text.max_position_embeddings * text.hidden_size
    return {"latents of 1 M pictures": 1e6 * moments, "with prompt embeddings": 1e6 * (moments + embeds)}


def attention_operations(q: torch.Size, k: torch.Size, v: torch.Size, *_, **__) -> int:
    """Floating-point operations of softmax(q kᵀ) v, for the shapes [B, heads, tokens, width] of its arguments: two products of matrices."""
    (batch, heads, queries, width), keys = q, k[2]
    return 2 * batch * heads * queries * keys * (width + v[3])


def attention_backward_operations(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_, **__) -> int:
    """Of its backward pass, which forms the scores again: five products where the forward pass has two."""
    (batch, heads, queries, width), keys = q, k[2]
    return 2 * batch * heads * queries * keys * (3 * width + 2 * v[3])


class _KnownAttention(TorchDispatchMode):
    """Raises NotImplementedError for an attention operation whose formula `counter` lacks: it would count as nothing."""

    def __init__(self, counter: FlopCounterMode):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "attention" in str(func) and func._overloadpacket not in self.counter.flop_registry:
            raise NotImplementedError(f"the operations of {func} are not known to this torch ({torch.__version__}), nor to eqldm.budget")
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    """Counts floating-point operations. torch before 2.15 lacks the attention of CPUs, which is what networks of fake tensors run.

    Raises NotImplementedError where an attention operation runs that has no formula.
    """
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    counter = FlopCounterMode(display=False, custom_mapping={cpu: attention_operations, cpu_backward: attention_backward_operations})
    with _KnownAttention(counter), counter:
        yield counter


def _measure(step: Callable[[int], list[Tensor]], networks: dict[str, nn.Module], count: int) -> tuple[float, float]:
    """Operations of a step on `count` pictures, and bytes that are kept between its forward and its backward pass."""
    weights = {p.untyped_storage()._cdata for network in networks.values() for p in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept.setdefault(storage, tensor)
        return tensor

    with counting() as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16):
            losses = step(count)
        for loss in losses:
            loss.backward()  # recomputes, where gradients are checkpointed
    for network in networks.values():
        network.zero_grad(set_to_none=True)
    return counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def _fake(network: nn.Module) -> None:
    """Moves a network from the meta device, which knows no autocast, to fake tensors of the CPU, which autocasts as CUDA does but for
    the normalisations: CUDA's computes them in float32."""
    for module in network.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", type=place_option, help="YAML file that states its stage")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    args = parser.parse_args()
    try:
        check_given_once(args.overrides)
        config = load_config(args.config, args.overrides)
        if isinstance(config, JudgeConfig):
            raise ValueError(
                f"config '{args.config}': stage is 'judge', a small network that is not counted: wanted autoencoder or diffusion"
            )
        config = with_models(config)
        print("\n".join(report(config, budget(config))))
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    main()
