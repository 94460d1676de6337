"""Model folders: diffusers pipeline folders, whole or in part (`vae/` alone after stage 1), read and written.

A whole one holds `model_index.json`, `vae/`, `unet/`, `text_encoder/`, `tokenizer/`, `scheduler/`, and stock
`StableDiffusionPipeline.from_pretrained` opens it. Loading is strict and safetensors only.

A *pixel model* is one whose UNet works on pictures themselves: `Pixels` stands where others have their VAE. Stock pipelines
cannot open such a folder.

Latents: `posterior.mean` is what `AutoencoderKL.encode` gives; `z = normalise(vae, mean)` is what UNets see.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from eqldm.atomic import told, whole_folder
from eqldm.model_card import CARD
from eqldm.single_file import read_single_file
from eqldm.text_files import PREFIX, save_text_encoder, save_tokenizer
from eqldm.weights import cut_off, read_json

PRETRAINED = Path(__file__).parent / "pretrained"  # the shipped models
FOREIGN = ("auto_map", "attn_implementation", "_attn_implementation", "quantization_config")  # settings that may name others' code
Network = TypeVar("Network", bound=nn.Module)
PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
BESIDE = (CARD, "model_index.json", "safety_checker", "feature_extractor", "lora", "checkpoint.json")  # what else a model folder may hold


class Pixels(nn.Module):
    """The VAE of a pixel model: f = 1, and the latents of a picture are the picture."""

    config = FrozenDict(latent_channels=3, block_out_channels=(3,), scaling_factor=1.0, shift_factor=None)

    def encode(self, x: Tensor) -> SimpleNamespace:
        """The posterior of pictures x [B, 3, H, W]: their values, with no spread to speak of."""
        return SimpleNamespace(latent_dist=posterior(torch.cat([x, torch.full_like(x, -30.0)], 1)))

    def decode(self, z: Tensor) -> SimpleNamespace:
        """The pictures z themselves."""
        return SimpleNamespace(sample=z)

    def save_pretrained(self, folder: Path, **_) -> None:
        """Write the name, which is all there is."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text(json.dumps({"_class_name": "Pixels"}) + "\n")


@dataclass
class Networks:
    """What a model folder holds beside its VAE: what stage 2 trains, and what a sampler denoises with."""

    unet: UNet2DConditionModel
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    scheduler: SchedulerMixin

    @classmethod
    def open(cls, folder: str | Path) -> Networks:
        """Those of a model folder, in float32 and eval mode. Raises as the loaders, and as `one_model`."""
        with one_model(folder):
            return cls(load_unet(folder), *load_text(folder), load_scheduler(folder))


@contextmanager
def one_model(folder: str | Path) -> Iterator[None]:
    """For a block that opens several parts of a model folder. Raises ValueError where it was replaced meanwhile: they would be of two
    models, which fit each other and give neither's pictures."""
    before = _stamp(folder)
    yield
    if _stamp(folder) != before:
        raise ValueError(f"'{folder}' was replaced while it was opened, by an export perhaps: run the same command again")


def _stamp(folder: str | Path) -> tuple[int, int, int] | None:
    try:
        found = Path(folder).stat()
    except OSError:  # the loaders say what is wrong
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def check_model_folder(folder: str | Path, parts: tuple[str, ...] = PARTS) -> Path:
    """The folder, if it holds these parts. Raises FileNotFoundError that says what is missing."""
    folder = Path(folder)
    if folder.is_file():
        raise FileNotFoundError(f"'{folder}' is a file, which can be no more than a VAE: wanted a model folder with {', '.join(parts)}")
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder '{folder}' does not exist: give a diffusers pipeline folder, such as RUN/model")
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        held = [part for part in PARTS if (folder / part).is_dir()] or ["none of its parts"]
        run = ". It is a run folder: give its model/, or with @STEP one of its checkpoints" if (folder / "config.yaml").is_file() else ""
        raise FileNotFoundError(
            f"'{folder}' is no model folder with {', '.join(parts)}: it lacks {', '.join(missing)} (holds {', '.join(held)}){run}"
        )
    return folder


def load_vae(folder: str | Path) -> AutoencoderKL:
    """The VAE of a model folder, of an AutoencoderKL folder or of a file in LDM's layout, in float32 and eval mode.

    Raises as `load_network` and `read_single_file`; ValueError for a pixel model, which has none.
    """
    vae = load_autoencoder(folder)
    if isinstance(vae, Pixels):
        raise ValueError(f"'{folder}' is a pixel model, wanted one with a VAE (to train its UNet further: vae=pixels)")
    return vae


def load_autoencoder(folder: str | Path) -> AutoencoderKL | Pixels:
    """As `load_vae`, and `Pixels` for a pixel model."""
    folder = Path(folder)
    if folder.is_file():
        return check_finite(read_single_file(folder), folder)
    folder = _vae_folder(folder)
    if _class_name(folder) == "Pixels":
        return Pixels().eval()
    return check_normalisation(load_network(AutoencoderKL, folder, torch_dtype=torch.float32), folder)


def check_normalisation(vae: AutoencoderKL, folder: Path) -> AutoencoderKL:
    """The VAE, if its settings can normalise latents. Raises ValueError."""
    wanted = {"scaling_factor": "a number above 0", "shift_factor": "a finite number, or null"}
    for name, what in wanted.items():
        value = vae.config.get(name)
        if value is None and name == "shift_factor":
            continue
        if type(value) not in (int, float) or not math.isfinite(value) or (name == "scaling_factor" and value <= 0):
            raise ValueError(f"'{folder / 'config.json'}': {name} is {value!r}, wanted {what}")
    if stated := [name for name in ("latents_mean", "latents_std") if vae.config.get(name) is not None]:
        raise ValueError(
            f"'{folder / 'config.json'}' states {stated[0]}, which Stable Diffusion's pipeline does not apply, nor does eqldm: "
            "remove it to go by scaling_factor and shift_factor alone, or take another VAE"
        )
    return vae


def _vae_folder(folder: Path) -> Path:
    """Where the VAE of a model folder lies; an AutoencoderKL folder itself."""
    alone = not (folder / "vae").is_dir() and _class_name(folder) == "AutoencoderKL"
    return folder if alone else check_model_folder(folder, ("vae",)) / "vae"


def vae_arguments(folder: str | Path) -> dict:
    """The arguments that the VAE of `load_vae` was made with; no weights are read but a single file's. Raises as the loaders."""
    folder = Path(folder)
    return _arguments(read_single_file(folder).config if folder.is_file() else AutoencoderKL.load_config(_vae_folder(folder)))


def unet_arguments(folder: str | Path) -> dict:
    """The arguments that a model folder's UNet was made with; no weights are read. Raises as the loaders."""
    return _arguments(UNet2DConditionModel.load_config(check_model_folder(folder, ("unet",)) / "unet"))


def _arguments(config: dict) -> dict:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _class_name(folder: Path) -> str | None:
    path = folder / "config.json"
    return read_json(path).get("_class_name") if path.is_file() else None


def load_unet(folder: str | Path) -> UNet2DConditionModel:
    """The UNet of a model folder, in float32 and eval mode. Raises as `load_network`."""
    return load_network(UNet2DConditionModel, check_model_folder(folder, ("unet",)) / "unet", torch_dtype=torch.float32)


def load_text(folder: str | Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """The tokenizer and the text encoder (float32, eval mode) of a model folder. Raises as `load_network`."""
    folder = check_model_folder(folder, ("tokenizer", "text_encoder"))
    check_settings(folder / "tokenizer")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except ValueError as error:
        raise ValueError(f"'{folder / 'tokenizer'}' cannot be read: {error}") from error
    # Not to load them: for transformers to list them, and raise here, as for any other weights
    text_encoder = load_network(CLIPTextModel, folder / "text_encoder", dtype=torch.float32, ignore_mismatched_sizes=True)
    if tokenizer.model_max_length > (most := text_encoder.config.max_position_embeddings):
        stated = tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else "none"  # what transformers takes for none is larger
        raise ValueError(
            f"'{folder / 'tokenizer'}' states a model_max_length of {stated}, but the text encoder reads {most} tokens: set it to {most} "
            "in tokenizer_config.json"
        )
    if len(tokenizer) > (known := text_encoder.config.vocab_size):
        raise ValueError(f"'{folder / 'tokenizer'}' has {len(tokenizer)} tokens, its text encoder knows {known}: they are of two models")
    return tokenizer, text_encoder


def load_network(kind: type[Any], folder: Path, **options) -> Any:
    """A network in eval mode, strictly: diffusers and transformers only log what is missing or left over.

    Raises ValueError that names weights which the files lack, hold beside the network's, or hold in other shapes, that are cut off, or
    NaN or infinite, or settings that name code; OSError where the folder holds no safetensors.
    """
    check_settings(folder)
    try:
        network, info = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options)
    except SafetensorError as error:
        raise cut_off(folder, error) from error
    except ValueError as error:  # diffusers' own, of a weight of another shape, names no folder
        raise ValueError(
            f"the weights in '{folder}' do not fit its config.json ({kind.__name__}): {' '.join(str(error).split())}"
        ) from error
    found = {name: sorted(map(str, info.get(f"{name}_keys") or ())) for name in ("missing", "unexpected", "mismatched")}
    faults = [f"{name}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' * (len(keys) > 5)}" for name, keys in found.items() if keys]
    if faults:
        raise ValueError(f"the weights in '{folder}' do not fit its config.json ({kind.__name__}): {'; '.join(faults)}")
    return check_finite(network.eval(), folder)


def check_finite(network: Network, folder: Path) -> Network:
    """The network, if all of its weights are finite. folder: that it comes from, or a file. Raises ValueError that names those which are
    not, and their file."""
    weights = {name: w for name, w in network.state_dict().items() if w.is_floating_point()}
    broken = [name for name, w in weights.items() if not bool(w.sum().isfinite()) and not bool(w.isfinite().all())]
    if broken:
        files = [path for path in sorted(folder.glob("*.safetensors")) if broken[0] in _names_in(path)] or [folder]
        more = f" and {len(broken) - 3} more" * (len(broken) > 3)
        raise ValueError(
            f"'{files[0]}' holds NaN or infinite weights, in {len(broken)} of {len(weights)} tensors: {', '.join(broken[:3])}{more}. "
            "Its training diverged, or the file is damaged: take another checkpoint"
        )
    return network


def _names_in(path: Path) -> set[str]:
    """Of the tensors in a safetensors file, as networks name them."""
    with safe_open(path, "pt") as file:
        return {name.removeprefix(PREFIX) for name in file.keys()}


def check_settings(folder: Path) -> None:
    """Raises ValueError where the settings of a network or tokenizer name code, or another model, that libraries would fetch."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"'{folder / 'adapter_config.json'}' adds an adapter to the weights there: merge it, and remove the file")
    for path in (folder / "config.json", folder / "tokenizer_config.json"):
        settings = read_json(path) if path.is_file() else {}
        named = [name for name in FOREIGN if settings.get(name) not in (None, "sdpa", "eager")]
        if named:
            raise ValueError(
                f"'{path}' has {named[0]}={settings[named[0]]!r}, which can bring in code: remove it to open the weights alone"
            )
    for path in folder.glob("*.safetensors.index.json"):
        files = read_json(path).get("weight_map")
        if not isinstance(files, dict) or not all(str(name).endswith(".safetensors") for name in files.values()):
            raise ValueError(f"'{path}' names files that are no safetensors: save the weights as safetensors")


def load_scheduler(folder: str | Path) -> SchedulerMixin:
    """The noise scheduler of a model folder, of the class that its config names."""
    path = check_model_folder(folder, ("scheduler",)) / "scheduler" / "scheduler_config.json"
    return make_scheduler(read_json(path))


def make_scheduler(config: dict, class_name: str | None = None) -> SchedulerMixin:
    """A diffusers scheduler from its config, of the class named there or by `class_name`. Raises ValueError.

    As in stock Stable Diffusion pipelines, it does not clip samples (latents leave [-1, 1]) and has `steps_offset` 1.
    """
    name = class_name or config.get("_class_name", "")
    kind: type[Any] | None = getattr(diffusers, name, None) if isinstance(name, str) else None
    if lacking := [package for package in getattr(kind, "_backends", ()) if find_spec(package) is None]:  # diffusers' stand-in for it
        raise ValueError(f"{name} needs {' and '.join(lacking)}, which is not installed: pip install {' '.join(lacking)}")
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise ValueError(f"'{name}' is no diffusers scheduler: wanted a class name such as DDIMScheduler")
    try:
        scheduler = kind.from_config({key: value for key, value in config.items() if key != "_class_name"})
    except (TypeError, ValueError, IndexError, NotImplementedError, ImportError) as error:  # what it does not know, or lacks
        raise ValueError(f"{name} cannot be made of its scheduler_config.json: {error}") from error
    betas, count = getattr(scheduler, "betas", None), scheduler.config.get("num_train_timesteps")
    if betas is not None and (not count or len(betas) < count or not bool(((betas >= 0) & (betas <= 1)).all())):
        raise ValueError(
            f"{name}: its scheduler_config.json gives {len(betas)} betas for {count} timesteps: wanted one for each, from 0 to 1, and some"
        )
    stock = {"clip_sample": False, "steps_offset": 1}
    scheduler.register_to_config(**{key: value for key, value in stock.items() if key in scheduler.config})
    return scheduler


def save_model_folder(folder: str | Path, card: str | None = None, **parts) -> Path:
    """Write a model folder from `vae` alone, or from all of `vae, unet, text_encoder, tokenizer, scheduler`; and its card.

    A reader never opens half a model; a model that stood there is replaced. Raises NotWritten; Held where another process writes it;
    ValueError where something else stands there, which would be deleted.
    """
    folder = Path(folder)
    _check_is_model(folder)
    with told(f"model folder '{folder}'"), whole_folder(folder) as partial:
        _save_parts(partial, parts)
        if card is not None:
            (partial / CARD).write_text(card)
        # a container of this machine's name whose processes have numbers of their own takes this one for dead, and its files for litter
        if lost := [name for name in parts if not (partial / name).is_dir()]:
            raise OSError(f"another process has removed {', '.join(lost)} on the way, a container with this one's host name perhaps")
    return folder


def _save_parts(folder: Path, parts: dict[str, Any]) -> None:
    if set(parts) not in (set(PARTS), {"vae"}):
        raise ValueError(f"a model folder is vae alone or all of {', '.join(PARTS)}: got {', '.join(parts)}")
    pipeline = None  # stock ones have none of pixels
    if len(parts) > 1 and not isinstance(parts["vae"], Pixels):
        pipeline = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    for name, part in parts.items():
        if name == "text_encoder":
            save_text_encoder(part, folder / name)
        elif name == "tokenizer":
            save_tokenizer(part, folder / name)
        else:
            part.save_pretrained(folder / name, safe_serialization=True)
    if pipeline is not None:
        pipeline.save_config(folder)  # model_index.json


def check_replaceable(folder: Path, *inputs: Path, whole: bool = False) -> None:
    """Raises ValueError unless a model may be written to `folder`: it is free, empty or a model and nothing else, and none of the inputs,
    nor what a run has exported, nor where this process works; and what is written is whole, or what stands there is a VAE alone."""
    for source in inputs:
        if folder.resolve() == source.resolve():
            raise ValueError(f"--out '{folder}' is the model to read: give another folder")
    if folder.resolve().name == "model" and (folder.resolve().parent / "inputs.json").is_file():
        raise ValueError(f"--out '{folder}' is where the run '{folder.parent}' keeps its own model: give another folder")
    if not whole and (folder / "unet").is_dir():
        raise ValueError(f"--out '{folder}' holds a whole model, which a VAE alone would replace: give another folder, or remove it first")
    _check_is_model(folder)
    if folder.is_dir() and not folder.is_absolute() and Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"--out '{folder}' is the folder that you are in, and is replaced as a whole: give another, or leave it first")


def _check_is_model(folder: Path) -> None:
    """Raises ValueError where a file stands there, or a folder that is neither empty nor a model, or holds more than one does."""
    if folder.is_dir() and (not any(folder.iterdir()) or (folder / "vae" / "config.json").is_file()):
        if others := sorted({path.name for path in folder.iterdir()} - {*PARTS, *BESIDE}):
            raise ValueError(
                f"--out '{folder}' is a model folder that also holds {', '.join(others[:5])}{' and more' * (len(others) > 5)}, which would "
                "be deleted: give another, or move that away first"
            )
        return
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"--out '{folder}' exists and is no model folder: it would be deleted. Give another, or empty it first")


def downsampling(vae: AutoencoderKL) -> int:
    """f: picture pixels per latent cell and side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def posterior(moments: Tensor) -> DiagonalGaussianDistribution:
    """The posterior of stored moments [B, 2 C, h, w]."""
    return DiagonalGaussianDistribution(moments)


def normalise(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """z from the encoder's latents, as stock diffusers pipelines do: (latents - shift_factor) * scaling_factor."""
    return (latents - (vae.config.get("shift_factor") or 0.0)) * vae.config.scaling_factor


def denormalise(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    return z / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)


def encode(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """z [B, C, H / f, W / f], the normalised posterior mean of pictures x [B, 3, H, W] in [-1, 1]."""
    return normalise(vae, vae.encode(x).latent_dist.mean)


def check_latents(vae: nn.Module, values: Tensor, keys: Sequence[str], of: str, what: str = "the VAE") -> None:
    """Raises ValueError, naming the first picture of `of` whose values [B, ...] are not finite, and why: a network of broken weights gives
    NaN for all, a sound one where its arithmetic overflows.

    vae: the network that gave them.  keys: [B] of the pictures.  what: how a message calls it.
    """
    finite = values.flatten(1).isfinite().all(1)
    if bool(finite.all()):
        return
    broken = next((name for name, weight in vae.state_dict().items() if not bool(weight.isfinite().all())), None)
    why = (
        f"its weights are broken ('{broken}' is not finite): export or fetch the model again"
        if broken
        else f"its weights are finite, so its arithmetic overflowed (in {str(values.dtype).removeprefix('torch.')}): look at the picture, "
        "and at what the network was trained on"
    )
    raise ValueError(f"{what} gives NaN or infinity for picture '{keys[int((~finite).nonzero()[0])]}' of {of}, and {why}")


def decode(vae: AutoencoderKL, z: Tensor) -> Tensor:
    """Pictures [B, 3, H, W], about [-1, 1] (not clamped), of normalised latents z."""
    return vae.decode(denormalise(vae, z)).sample


def vae_hash(vae: AutoencoderKL) -> str:
    """16 hex digits that change with any weight or with the normalisation: which latents a latent shard holds."""
    return weights_hash(vae, f"{vae.config.scaling_factor}/{vae.config.get('shift_factor') or 0.0}")


def config_hash(config: dict) -> str:
    """16 hex digits that change with any setting of a network or scheduler: what its weights alone do not say."""
    settings = {name: value for name, value in dict(config).items() if not name.startswith("_")}  # those are in no fixed order
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]


def text_hash(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> str:
    """16 hex digits that change with any weight or token, or with the padding: which prompt embeddings a latent shard holds."""
    config = text_encoder.config
    sizes = [tokenizer.model_max_length, tokenizer.pad_token_id, config.num_attention_heads, config.hidden_act]
    return weights_hash(text_encoder, json.dumps([sorted(tokenizer.get_vocab().items()), *sizes]))


def weights_hash(network: nn.Module, about: str = "") -> str:
    """16 hex digits that change with the name or the float32 value of any weight, and with `about`."""
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.detach().cpu().float().contiguous().numpy().tobytes())
    digest.update(about.encode())
    return digest.hexdigest()[:16]
