"""Networks and schedulers made from options: what a library would pass over, or stumble on, is refused by the option's name."""

from __future__ import annotations

import inspect
import math
from difflib import get_close_matches
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPTextConfig, PreTrainedConfig

from eqldm.config import AutoencoderConfig, DiffusionConfig, StageConfig
from eqldm.model_folder import make_scheduler

Made = TypeVar("Made")
MISFITS = (  # what the libraries raise of values that do not fit
    TypeError, ValueError, RuntimeError, AttributeError, LookupError, ArithmeticError, AssertionError, StrictDataclassError,
)  # fmt: skip
SIZES = {"sample_size", "in_channels", "out_channels", "cross_attention_dim"}
TOKENS = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}


def check_named(config: StageConfig) -> None:
    """Raises ValueError for arguments of networks and schedulers that there are not, or that the data give; no input is read."""
    if isinstance(config, AutoencoderConfig):
        check_arguments(AutoencoderKL, "architecture", config.architecture)
    if isinstance(config, DiffusionConfig):
        for option, sizes, source in (("unet", SIZES, "latents and the text encoder"), ("text_encoder", TOKENS, "captions")):
            if given := sorted(getattr(config, option).keys() & sizes):
                raise ValueError(f"{option}.{given[0]} follows from the {source}: drop it")
        check_arguments(UNet2DConditionModel, "unet", config.unet)
        check_arguments(CLIPTextConfig, "text_encoder", config.text_encoder)
        make_noise(config.scheduler)


def make(kind: type[Made], option: str, given: dict[str, Any], **fixed: Any) -> Made:
    """`kind` with the arguments of an option of that name, and those that are `fixed`.

    Raises ValueError, naming the option, for an argument that `kind` does not have, and for values that do not fit.
    """
    check_arguments(kind, option, given)
    try:
        return kind(**{**given, **fixed})
    except MISFITS as error:
        raise misfit(option, given, error) from error


def make_noise(given: dict[str, Any]) -> SchedulerMixin:
    """The scheduler of the option of that name, of the class named there, DDIM's unless it is. Raises as `make`."""
    given = {"_class_name": "DDIMScheduler", **given}
    name, arguments = given["_class_name"], {key: value for key, value in given.items() if key != "_class_name"}
    if not (isinstance(name, str) and name.endswith("Scheduler") and hasattr(diffusers, name)):
        near = get_close_matches(str(name), [known for known in dir(diffusers) if known.endswith("Scheduler")], 1)
        hint = f". Did you mean {near[0]}?" if near else ": wanted a class name such as DDIMScheduler"
        raise ValueError(f"scheduler._class_name: diffusers has no scheduler {name!r}{hint}")
    check_arguments(getattr(diffusers, name), "scheduler", arguments)
    try:
        make_scheduler(given).set_timesteps(10)  # some values are looked at no sooner
        return make_scheduler(given)
    except MISFITS as error:
        raise misfit("scheduler", arguments, error) from error


def check_arguments(kind: type, option: str, given: dict[str, Any]) -> None:
    """Raises ValueError for the first argument that `kind` does not have, with one that it may stand for; or whose value is of another
    kind than its default. diffusers and transformers pass over the first with a line in the log."""
    own = dict(inspect.signature(kind.__init__).parameters)  # type: ignore[misc]
    if issubclass(kind, PreTrainedConfig):  # what all models of transformers have says nothing of sizes
        own = {name: parameter for name, parameter in own.items() if name not in inspect.signature(PreTrainedConfig.__init__).parameters}
    known = {name: parameter.default for name, parameter in own.items() if name not in ("self", "kwargs")}
    for name, value in given.items():
        if name not in known:
            near = get_close_matches(str(name), known, 1)
            hint = f"Did you mean {option}.{near[0]}?" if near else f"It has {', '.join(known)}"
            raise ValueError(f"{option}.{name}: {kind.__name__} has no such argument. {hint}")
        if wanted := _too_large(name, value) or _mismatch(value, known[name]):
            raise ValueError(f"{option}.{name}: got {value!r}, wanted {wanted}")


def _too_large(name: str, value: Any) -> str:
    """What is wanted in place of a number that would take all memory, or no end of time; "" for others."""
    most = 256 if "layers" in name else 10**6
    values = value if isinstance(value, list | tuple) else [value]
    return f"at most {most}" if any(isinstance(each, int | float) and each > most and each != math.inf for each in values) else ""


def _mismatch(value: Any, default: Any) -> str:
    """What is wanted in place of a value, by its default: "" where it is of the same kind. Some take a list in place of one value."""
    if isinstance(value, list | tuple):
        parts = default if isinstance(default, list | tuple) and default else [default]
        return next(filter(None, (_mismatch(each, parts[0]) for each in value)), "")
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if value is None or default is None or default is inspect.Parameter.empty:
        return ""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        return "" if isinstance(value, int | float) and not isinstance(value, bool) else "a number"
    if isinstance(default, str):
        return "" if isinstance(value, str) else "a word"
    return "a list" if isinstance(default, list | tuple) else ""


def misfit(option: str, given: dict[str, Any], error: Exception) -> ValueError:
    """What to raise where a library does not take an option's values: those of them that it mentions, else all."""
    fault = " ".join(str(error).split()) or type(error).__name__
    words = {name: value if isinstance(value, list | tuple) else [value] for name, value in given.items()}
    named = {name: given[name] for name in given if name in fault or any(isinstance(word, str) and word in fault for word in words[name])}
    values = " ".join(f"{option}.{name}={value}" for name, value in (named or given).items())
    return ValueError(f"{option} does not fit: {fault[:300]} (got {values[:500]})")


def check_autoencoder(arguments: dict[str, Any], image_size: int, option: str = "architecture") -> None:
    """Raises ValueError where an autoencoder of these arguments takes no pictures of image_size px; nothing is computed."""
    with torch.device("meta"), torch.no_grad():
        vae = make(AutoencoderKL, option, arguments)
        try:
            shape = vae.decode(vae.encode(torch.empty(1, 3, image_size, image_size)).latent_dist.mean).sample.shape
        except MISFITS as error:
            raise misfit(option, arguments, error) from error
    if shape != (1, 3, image_size, image_size):
        raise ValueError(f"{option}: pictures of {image_size} px come back as {list(shape[1:])}, wanted {[3, image_size, image_size]}")


def check_unet(arguments: dict[str, Any], side: int, length: int, option: str = "unet", text_size: int | None = None) -> None:
    """Raises ValueError where a UNet of these arguments takes no latents of `side` cells with prompts of `length` tokens and nothing else.

    text_size: numbers per token; None: as its cross_attention_dim says."""
    with torch.device("meta"), torch.no_grad():
        unet = make(UNet2DConditionModel, option, arguments)
        latents = torch.empty(1, arguments["in_channels"], side, side)
        try:
            shape = unet(latents, torch.zeros(1), torch.empty(1, length, text_size or arguments["cross_attention_dim"])).sample.shape
        except MISFITS as error:
            raise misfit(option, arguments, error) from error
    if shape != latents.shape:
        raise ValueError(f"{option}: latents of {list(latents.shape[1:])} come back as {list(shape[1:])}")
