"""Options: one dataclass per stage, read from one YAML file and `key=value` overrides.

A YAML file states its `stage` and only what differs from the defaults here. Each field's docstring gives its meaning
and unit. `load_config` checks types and choices (omegaconf), then the cross-checks of `validate()`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eqldm.kinds import check_kinds, check_numbers, check_references, is_text, option_type
from eqldm.paths import expanded
from eqldm.ranges import check_ranges

PATHS = ("data.train", "data.val", "run.dir", "model", "vae", "fold.align_to")  # options that are paths, or addresses, or `vae: pixels`


@dataclass
class DataConfig:
    train: str = MISSING
    """Shard folder to train on, or the address of one (https://, s3://, pipe:COMMAND {name}; see eqldm/data/remote.py)."""
    val: str = MISSING
    """Shard folder to validate on, or the address of one."""
    image_size: Optional[int] = None
    """Side of the pictures, px, which the shards are checked against; None: whatever they hold."""
    batch_size: int = 32
    """Samples per optimizer step, over all processes and accumulated micro-batches."""
    micro_batch_size: Optional[int] = None
    """Samples per process and forward pass; None: batch_size / processes, no accumulation."""
    num_workers: int = 2
    """Reader processes per training process; 0 reads in the training process."""
    shuffle_shards: int = 16
    """Shards shuffled together: samples mix fully within a window of this many shards, whose order is drawn first."""
    val_samples: int = 256
    """Samples of the validation set that are used (its first ones), over all processes."""


@dataclass
class RunConfig:
    dir: str = MISSING
    """Run folder: config, logs, checkpoints and the exported model. The same command resumes what it holds."""
    seed: int = 0
    """Seed of weights, data order, noise and transforms."""
    num_steps: int = MISSING
    """Optimizer steps in all."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """Arithmetic of the forward pass; weights, optimizer and EMA stay in float32. auto: bf16-mixed where the device
    computes bfloat16 natively, else 32-true."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device kind."""
    devices: int = 1
    """Processes (one device each) per node."""
    num_nodes: int = 1
    """Nodes."""
    strategy: Literal["auto", "ddp", "zero1", "zero2", "zero3"] = "auto"
    """How processes share the work; auto: ddp where there is more than one. zero1 to zero3: DeepSpeed's ZeRO, which shards the
    optimizer's state, also the gradients, also the weights; for the UNet. Its checkpoints resume with as many processes as wrote them."""
    timeout_seconds: int = 1800
    """Seconds that processes wait for one of them that stands still, until the run ends with an error that names it; longer than the
    validation and the export, which some is done by one process alone."""
    log_every: int = 20
    """Optimizer steps between log lines."""
    val_every: int = 500
    """Optimizer steps between validations."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints, of which the newest is kept."""
    keep_every: Optional[int] = None
    """Optimizer steps between checkpoints that are kept besides the newest, a multiple of checkpoint_every; None: none is. Each takes the
    disk that `dry_run=true` states."""
    channels_last: bool = False
    """Keep weights and pictures in channels-last layout: for `compile`; without it slower (docs/gpu.md)."""
    compile: bool = False
    """torch.compile the networks."""


@dataclass
class OptimizerConfig:
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's moment decays."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to 1 % of the peak at num_steps."""
    clip_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is validated and exported; 0 turns it off. It rises to this from .18:
    min(ema_decay, (1 + n) / (10 + n)) after n steps, so that a short run's average holds nothing of its start."""


@dataclass
class EquivarianceConfig:
    preset: Literal["custom", "eqvae_paper"] = "custom"
    """eqvae_paper: the scheme of transforms of EQ-VAE's released code (one transform per batch: a rotation by 90, 180 or 270
    degrees and a bilinear down-scaling, on half of the steps, implicit loss only; of the other steps a quarter see
    down-scaled pictures; losses summed over pixels); the options below must then be left alone. Loss weights and optimizer
    are this file's, not EQ-VAE's."""
    group: Literal["none", "rotations", "d4"] = "none"
    """Symmetries drawn per sample at native scale."""
    prob: float = 1.0
    """Probability that a step is regularised at all; other steps are plain reconstruction."""
    implicit_weight: float = 1.0
    """Weight of the implicit term: on a regularised step, reconstruction losses are taken of D(T E(x)) against T x.
    0: they are taken of D(E(x)) against x."""
    consistency_weight: float = 0.0
    """Weight of the latent-consistency term mean (E(T x) - T E(x))^2 / var(z)."""
    rescale_prob: float = 0.0
    """Probability that a group of samples is also rescaled."""
    rescale_smallest: float = 0.25
    """Smallest scale factor drawn."""
    anisotropic: bool = False
    """Draw height and width factors apart."""
    num_groups: int = 2
    """Groups a micro-batch falls into; the samples of a group share their output shape, so their rescaling."""
    permute_prob: float = 0.0
    """Probability of a patch permutation on top of the symmetry."""
    permute_cells: list[int] = field(default_factory=lambda: [2, 4])
    """Cells per side of the patch permutations drawn."""
    patch_turn_prob: float = 0.0
    """Probability that a permutation's patches are also turned, each by a symmetry of the group drawn for itself; only patches of two
    latent cells a side or more, for a single cell shows no turn."""
    negate_prob: float = 0.0
    """Probability of negation, x -> -x and z -> -z, which makes the view `negate` valid for sampling."""


@dataclass
class VAELossConfig:
    l1_weight: float = 1.0
    """Weight of the mean absolute error."""
    l2_weight: float = 1.0
    """Weight of the mean squared error."""
    gradient_weight: float = 0.0
    """Weight of the mean absolute error of horizontal and vertical differences."""
    perceptual_weight: float = 0.0
    """Weight of LPIPS (VGG16 weights must be in torch's hub folder)."""
    kl_weight: float = 1e-6
    """Weight of the posterior's KL divergence to N(0, 1), in nats, a mean over pictures and latent values. LDM's 1e-6 is
    another unit: it sums the reconstruction over pixel values and the KL over latent values, per picture. Ours is LDM's x
    latent values / pixel values: at f = 8 with 4 channels, 1e-6 x (4 / 64) / 3 = 2.1e-8."""
    adversarial_weight: float = 0.0
    """Weight of the PatchGAN term, before its adaptive factor; 0 builds no discriminator."""
    adversarial_start: int = 0
    """Optimizer step from which the PatchGAN term counts; the discriminator trains from there too."""
    discriminator_channels: int = 64
    """Channels of the discriminator's first layer."""
    discriminator_layers: int = 3
    """Strided layers of the discriminator."""
    discriminator_learning_rate: Optional[float] = None
    """Peak learning rate of the discriminator's AdamW, whose other options and schedule are the autoencoder's; None: as its rate too."""


@dataclass
class FoldConfig:
    num_images: int = 2048
    """Training pictures whose latents give the channel statistics folded in at export; 0 exports unfolded."""
    align_to: Optional[str] = None
    """Model folder to whose (normalised) latents the channels are turned, by a folded map; see `eqldm.autoencoder.fold.alignment`."""


@dataclass
class AutoencoderConfig:
    stage: Literal["autoencoder"] = "autoencoder"
    """Which stage this file configures."""
    init: Literal["scratch", "pretrained"] = "scratch"
    """Start from `architecture` with random weights, or from `model`."""
    model: Optional[str] = None
    """Model folder, AutoencoderKL folder, or single file of LDM's layout (.safetensors, .ckpt) to start from; RUN@STEP: a checkpoint of
    another run, the average of its weights."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Arguments of diffusers' AutoencoderKL, for init: scratch."""
    crop_size: Optional[int] = None
    """Side, px, of the random square that each training picture is cut to: a multiple of f. None: whole pictures. Early in
    a training steps count for more than pixels, and small crops give more of them in the same time."""
    crop_until: Optional[int] = None
    """Optimizer step from which on pictures are whole; None: crops to the end."""
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    fold: FoldConfig = field(default_factory=FoldConfig)

    def validate(self) -> None:
        """Raises ValueError where options contradict each other."""
        _check_start(self, "architecture")
        _check_run(self)
        _refuse_zero(self, "the autoencoder stage steps two optimizers (autoencoder and discriminator), DeepSpeed takes one")
        _check_weights(self)
        if self.crop_until is not None and self.crop_size is None:
            raise ValueError(f"crop_until={self.crop_until} ends the crops, but there are none: set crop_size, or drop it")
        if self.fold.align_to and not self.fold.num_images:
            raise ValueError("fold.align_to needs pictures to align on, got fold.num_images=0: raise it, or drop fold.align_to")
        eq = self.equivariance
        defaults = EquivarianceConfig(preset="eqvae_paper")
        if eq.preset == "eqvae_paper" and eq != defaults:
            changed = [name for name in vars(defaults) if getattr(eq, name) != getattr(defaults, name)]
            raise ValueError(f"equivariance.preset=eqvae_paper fixes the scheme, got also {', '.join(changed)}: use preset=custom")
        if eq.permute_prob and not (eq.permute_cells and min(eq.permute_cells) >= 2):
            raise ValueError(f"equivariance.permute_cells: got {eq.permute_cells}, wanted cells per side of at least 2, or permute_prob=0")
        if eq.patch_turn_prob and not eq.permute_prob:
            raise ValueError("equivariance.patch_turn_prob turns the patches of a permutation, but there is none: set permute_prob")
        if eq.patch_turn_prob and eq.group == "none":
            raise ValueError("equivariance.patch_turn_prob turns patches by the group's symmetries, but group=none has none: set group")


@dataclass
class LoRAConfig:
    rank: int = 16
    """Rank of the low-rank updates."""
    alpha: int = 16
    """Their scale is alpha / rank."""
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out"])
    """Module names (suffixes) that get an update."""


@dataclass
class DiffusionConfig:
    stage: Literal["diffusion"] = "diffusion"
    """Which stage this file configures."""
    init: Literal["scratch", "scratch_unet", "pretrained"] = "scratch"
    """Start from `unet` and `text_encoder` below with random weights, or from `model`. scratch_unet: from the model's text encoder and
    tokenizer, and a random UNet."""
    model: Optional[str] = None
    """Model folder, or RUN@STEP, whose UNet, text encoder, tokenizer and scheduler to start from."""
    vae: str = MISSING
    """Model folder (single file, or RUN@STEP) of the VAE whose latents are learnt; latent shards of another VAE are refused. `pixels`: the
    UNet learns pictures themselves (from picture shards)."""
    adapt: Literal["full", "lora"] = "full"
    """Train all of the UNet, or low-rank updates: merged in RUN/model, and by themselves in RUN/lora, for diffusers' load_lora_weights."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    boundary_steps: int = 0
    """Optimizer steps at first in which the UNet's conv_in and conv_out train alone, and all else waits: they are what meets the new
    latents. Then the learning rate warms up again, for all. Needs init: pretrained, adapt: full."""
    unet: dict[str, Any] = field(default_factory=dict)
    """Arguments of diffusers' UNet2DConditionModel, for init: scratch; in, out and text sizes are filled in. With init: scratch_unet they
    replace the architecture of the model's."""
    text_encoder: dict[str, Any] = field(default_factory=dict)
    """Arguments of transformers' CLIPTextConfig, for init: scratch; the vocabulary is made from the captions. A prompt has
    max_position_embeddings tokens; unset, as many as the longest caption needs, at most CLIP's 77. Longer captions are cut, which is said
    before training."""
    scheduler: dict[str, Any] = field(default_factory=dict)
    """Arguments of the diffusers scheduler named by `_class_name` (DDIMScheduler unless given), for init: scratch. Its betas
    and `prediction_type` are the objective: epsilon, v_prediction, or flow_prediction (with use_flow_sigmas: true). With init:
    scratch_unet it replaces the model's."""
    train_text_encoder: bool = False
    """Train the text encoder too. Required with init: scratch, whose text encoder is random."""
    text_encoder_lr_factor: float = 0.1
    """The text encoder's learning rate over the UNet's, where it is trained."""
    min_snr_gamma: Optional[float] = None
    """Min-SNR's gamma (5 in the paper): timesteps are drawn in proportion to its weights. None: uniformly. Not with
    flow_prediction."""
    min_snr_floor: float = 0.1
    """The smallest of min-SNR's weights, which are at most 1. The paper has none (0): with v-prediction and zero terminal SNR the
    timestep where sampling starts would then never be trained, which is refused."""
    caption_dropout: float = 0.1
    """Share of captions replaced by the empty one, for classifier-free guidance."""
    sample_prompts: list[str] = field(default_factory=list)
    """Prompts of the sample grid logged at each validation."""
    val_letters: int = 0
    """Letters sampled at each validation and read by the shipped judge (val/generation/...), for the glyph world; 0: none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, slower."""
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def validate(self) -> None:
        """Raises ValueError where options contradict each other."""
        _check_start(self, "unet", "text_encoder", "scheduler")
        if self.init == "scratch_unet" and self.text_encoder:
            raise ValueError("init=scratch_unet takes the text encoder from model: drop `text_encoder`, or use init=scratch")
        _check_run(self)
        if self.run.strategy == "zero3":
            on = [name for name in ("sample_prompts", "val_letters") if getattr(self, name)] + ["run.compile"] * self.run.compile
            if on:
                raise ValueError(
                    f"run.strategy=zero3 shards the weights, so that no process can sample alone or compile whole networks: unset "
                    f"{', '.join(on)}, or use zero2"
                )
        if self.adapt == "lora" and not self.lora.targets:
            raise ValueError("lora.targets is empty: give suffixes of the UNet's module names, such as to_q")
        if self.adapt == "full" and self.lora != LoRAConfig():
            raise ValueError("adapt=full trains all weights, but `lora` is set: use adapt=lora, or drop it")
        if self.init == "scratch" and not self.train_text_encoder:
            raise ValueError("init=scratch starts from a random text encoder: set train_text_encoder=true")
        if self.init != "pretrained" and self.adapt == "lora":
            raise ValueError("adapt=lora updates a pretrained UNet: set init=pretrained model=FOLDER, or adapt=full")
        if not 0 <= self.boundary_steps < self.run.num_steps:
            raise ValueError(f"boundary_steps: got {self.boundary_steps}, wanted 0 to below run.num_steps={self.run.num_steps}")
        if self.boundary_steps and (self.init, self.adapt) != ("pretrained", "full"):
            raise ValueError("boundary_steps fit a pretrained UNet to new latents: set init=pretrained adapt=full, or boundary_steps=0")
        if self.val_letters == 1:
            raise ValueError(f"val_letters: got {self.val_letters}, wanted 0 (none) or at least 2 (KID compares distributions)")
        if self.min_snr_gamma is not None and self.scheduler.get("prediction_type") == "flow_prediction":
            raise ValueError("min_snr_gamma has no meaning with flow_prediction: leave it unset")


@dataclass
class JudgeConfig:
    stage: Literal["judge"] = "judge"
    """Which stage this file configures."""
    architecture: str = "resnet18"
    """timm model name."""
    architecture_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model."""
    rotation_degrees: float = 10.0
    """Largest random rotation of the training pictures, either way."""
    noise: float = 0.1
    """Standard deviation of the noise added to training pictures, in [-1, 1] units."""
    turned_share: float = 0.3
    """Share of the training pictures that are turned by a symmetry of the square: most are then no letter."""
    half_share: float = 0.0
    """Share that are half a letter, or halves of two letters joined: no letter. Where a letter has no half that readers agree on, it stays
    whole; the log has how many did (`train/share_left_plain`)."""
    mixed_share: float = 0.0
    """Share that are the average of two letters, the second one often turned: no letter, as what fails as an anagram."""
    ghost_share: float = 0.0
    """Share of the pictures (but for halves and mixtures) with a second letter faintly behind, which changes nothing of what it is."""
    faded_share: float = 0.0
    """Share of all pictures in low contrast."""
    blurred_share: float = 0.0
    """Share of all pictures out of focus."""
    round_trip_share: float = 0.0
    """Share of all pictures that go through the autoencoder of a shipped model first, glyphs-base or glyphs-eq."""
    data: DataConfig = field(default_factory=DataConfig)
    run: RunConfig = field(default_factory=RunConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def validate(self) -> None:
        """Raises ValueError where options contradict each other."""
        _check_run(self)
        _refuse_zero(self, "the judge is small")
        if (total := self.turned_share + self.half_share + self.mixed_share) > 1:
            raise ValueError(f"turned_share + half_share + mixed_share: got {total:g} in all, wanted at most 1: a picture is one of them")
        if self.run.compile or self.run.channels_last:
            raise ValueError("the judge is small: run.compile and run.channels_last are for the other stages")


STAGES = {"autoencoder": AutoencoderConfig, "diffusion": DiffusionConfig, "judge": JudgeConfig}
StageConfig = AutoencoderConfig | DiffusionConfig | JudgeConfig


def _check_start(config: AutoencoderConfig | DiffusionConfig, *architecture: str) -> None:
    if config.init != "scratch" and not config.model:
        raise ValueError(f"init={config.init} needs the model folder to start from: set model=FOLDER")
    if config.init == "scratch" and config.model:
        raise ValueError(f"init=scratch starts from random weights, but model={config.model} is set: use init=pretrained, or drop it")
    given = [name for name in architecture if getattr(config, name)]
    if config.init == "pretrained" and given:
        raise ValueError(f"init=pretrained takes {', '.join(given)} from model: drop `{'`, `'.join(given)}`, or use init=scratch")


def _refuse_zero(config: AutoencoderConfig | JudgeConfig, reason: str) -> None:
    if config.run.strategy.startswith("zero"):
        raise ValueError(f"run.strategy={config.run.strategy} is for the diffusion stage: {reason}. Use run.strategy=ddp")


def _check_weights(config: AutoencoderConfig) -> None:
    loss = config.loss
    rate = loss.discriminator_learning_rate
    if rate is not None and not loss.adversarial_weight:
        raise ValueError(
            f"loss.discriminator_learning_rate={rate} is of a discriminator, and loss.adversarial_weight=0 builds none: set it, or drop it"
        )
    if not any((loss.l1_weight, loss.l2_weight, loss.gradient_weight, loss.perceptual_weight)):
        raise ValueError("no reconstruction loss: set loss.l1_weight, l2_weight, gradient_weight or perceptual_weight above 0")


def _check_run(config: StageConfig) -> None:
    check_ranges(config)
    data, run = config.data, config.run
    if run.keep_every is not None and run.keep_every % run.checkpoint_every:
        raise ValueError(
            f"run.keep_every: got {run.keep_every}, wanted a multiple of run.checkpoint_every={run.checkpoint_every}, or null to keep the "
            "newest checkpoint alone"
        )
    processes = run.devices * run.num_nodes
    micro = micro_batch_size(config)
    if data.batch_size % (micro * processes):
        raise ValueError(
            f"data.batch_size={data.batch_size} does not divide into {processes} processes x {micro} "
            f"(run.devices x run.num_nodes, data.micro_batch_size): choose a multiple of {micro * processes}, or a smaller "
            "data.micro_batch_size"
        )
    if data.val_samples % processes:
        raise ValueError(f"data.val_samples={data.val_samples} does not divide over {processes} processes")
    if len(config.optimizer.betas) != 2:
        raise ValueError(f"optimizer.betas: got {list(config.optimizer.betas)}, wanted two numbers")


def micro_batch_size(config: StageConfig) -> int:
    """Samples per process and forward pass."""
    processes = config.run.devices * config.run.num_nodes
    return config.data.micro_batch_size or max(1, config.data.batch_size // processes)


def accumulation(config: StageConfig) -> int:
    """Micro-batches per optimizer step and process."""
    return config.data.batch_size // (micro_batch_size(config) * config.run.devices * config.run.num_nodes)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> StageConfig:
    """The options of a YAML file with `key=value` overrides, as the dataclass of its `stage`.

    Raises: FileNotFoundError; ValueError for an unknown key, a wrong type or choice, a missing value, or options that
    contradict each other. The message names the key.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"config '{path}' is a folder: give the YAML file in it")
    if not path.is_file():
        raise FileNotFoundError(f"config '{path}' does not exist: configs of the small world lie under configs/glyphs/")
    for item in overrides:
        if not all(item.partition("=")[:2]):
            raise ValueError(f"override '{item[:200]}' has no '=', or nothing before it: wanted key=value, such as run.num_steps=100")
    try:
        file = _read(path)
        found = file.get("stage") if isinstance(file, DictConfig) else None
        if not isinstance(file, DictConfig) or not isinstance(found, str) or found not in STAGES:
            raise ValueError(f"config '{path}': stage is {found!r}, wanted one of {', '.join(STAGES)}")
        schema = OmegaConf.structured(STAGES[file.stage])
        check_kinds(STAGES[file.stage], OmegaConf.to_container(file))
        merged = OmegaConf.merge(schema, file, _parse_overrides(STAGES[file.stage], overrides))
        assert isinstance(merged, DictConfig)
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ValueError(f"config '{path}': required but not set: {', '.join(missing)}. Give them as key=value")
        check_references(OmegaConf.to_container(merged))
        _expand_paths(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(f"config '{path}': {str(error).splitlines()[0][:500]} (key: {(error.full_key or '?')[:200]})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config '{path}' is no UTF-8 ({error}): save it as UTF-8, or is it another kind of file?") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config '{path}', or an override, is no YAML: {' '.join(str(error).split())}") from error
    assert isinstance(config, StageConfig)
    config.validate()
    return config


def _read(path: Path) -> Any:
    """A YAML file. Raises ValueError, UnicodeDecodeError, YAMLError."""
    if (size := path.stat().st_size) > 10**6:
        raise ValueError(f"config '{path}' has {size} bytes: wanted options, which take a few thousand")
    text = path.read_text(encoding="utf-8")
    check_numbers(text)
    try:
        return OmegaConf.load(io.StringIO(text))
    except OSError as error:  # a number, or a date
        raise ValueError(f"config '{path}' holds one value, wanted options by name, and a stage among them") from error


def _expand_paths(options: DictConfig) -> None:
    """Replaces `~` in the options that are paths. Raises ValueError, naming the option, for what is no path."""
    for key in PATHS:
        if (value := OmegaConf.select(options, key)) is not None:
            try:
                OmegaConf.update(options, key, expanded(value))
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from error


def _parse_overrides(stage: type, overrides: Sequence[str]) -> DictConfig:
    """Values are YAML, but text (with `${...}`) where the option is text: a path may hold ` #` or `: `. null is None for any."""
    parsed = OmegaConf.create()
    for item in overrides:
        key, _, value = item.partition("=")
        if value != "null" and is_text(option_type(stage, key)):
            OmegaConf.update(parsed, key, value)
            continue
        if not value.strip():  # YAML's null: what a script's unset variable gives
            raise ValueError(f"{key}: got nothing after '=', wanted a value, or null for none")
        try:
            check_numbers(value, key)
            given = OmegaConf.from_dotlist([item])
        except yaml.YAMLError as error:
            raise yaml.YAMLError(f"{item[:200]}: {error}") from error
        check_kinds(stage, OmegaConf.to_container(given))
        parsed.merge_with(given)
    return parsed


def to_yaml(config: StageConfig) -> str:
    """Every option, resolved, as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))
