"""The range of every option that is a number. A value outside of it is a slip of the hand: it is refused before it costs anything."""

from __future__ import annotations

import math
from dataclasses import is_dataclass
from typing import Any, NamedTuple

MANY = 10**9  # steps, pictures
WORKERS = 256  # processes, at most


class Range(NamedTuple):
    """From low to high, each included unless the ends say otherwise."""

    low: float
    high: float
    above: bool = False
    """low itself is too low."""
    below: bool = False
    """high itself is too high."""

    def __contains__(self, value: Any) -> bool:
        if type(value) not in (int, float):
            return False
        fits = self.low < value if self.above else self.low <= value  # nan is neither
        return fits and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.above else f"at least {self.low:g}" if self.low else "0 or more"
        high = (
            ""
            if self.high == math.inf
            else f", below {self.high:g}"
            if self.below
            else f", up to {self.high if isinstance(self.high, int) else f'{self.high:.16g}'}"
        )
        return low + high


PROBABILITY, SHARE, WEIGHT = Range(0, 1), Range(0, 1, below=True), Range(0, 1e6)
COUNT, STEP = Range(1, MANY), Range(0, MANY)
RANGES = {  # of a list, that of each of its numbers
    "data.image_size": Range(1, 16384),
    "data.batch_size": Range(1, 2**20),
    "data.micro_batch_size": Range(1, 2**20),
    "data.num_workers": Range(0, WORKERS),
    "data.shuffle_shards": Range(1, 10**6),
    "data.val_samples": COUNT,
    "run.seed": Range(0, 2**32 - 1),
    "run.num_steps": COUNT,
    "run.devices": Range(1, 1024),  # processes
    "run.num_nodes": Range(1, 65536),
    "run.timeout_seconds": Range(10, 10**6),
    "run.log_every": COUNT,
    "run.val_every": COUNT,
    "run.checkpoint_every": COUNT,
    "run.keep_every": COUNT,
    "optimizer.learning_rate": Range(0, 10, above=True),
    "optimizer.betas": SHARE,
    "optimizer.weight_decay": Range(0, 100),
    "optimizer.warmup_steps": STEP,
    "optimizer.clip_norm": Range(0, math.inf, above=True),  # .inf clips nothing
    "optimizer.ema_decay": SHARE,
    "equivariance.prob": PROBABILITY,
    "equivariance.implicit_weight": WEIGHT,
    "equivariance.consistency_weight": WEIGHT,
    "equivariance.rescale_prob": PROBABILITY,
    "equivariance.rescale_smallest": Range(0, 1, above=True, below=True),
    "equivariance.num_groups": Range(1, 4096),
    "equivariance.permute_prob": PROBABILITY,
    "equivariance.permute_cells": Range(2, 2048),
    "equivariance.patch_turn_prob": PROBABILITY,
    "equivariance.negate_prob": PROBABILITY,
    "loss.l1_weight": WEIGHT,
    "loss.l2_weight": WEIGHT,
    "loss.gradient_weight": WEIGHT,
    "loss.perceptual_weight": WEIGHT,
    "loss.kl_weight": WEIGHT,
    "loss.adversarial_weight": WEIGHT,
    "loss.adversarial_start": STEP,
    "loss.discriminator_channels": Range(1, 4096),
    "loss.discriminator_layers": Range(1, 16),
    "loss.discriminator_learning_rate": Range(0, 10, above=True),
    "fold.num_images": STEP,
    "crop_size": Range(1, 16384),
    "crop_until": STEP,
    "lora.rank": Range(1, 4096),
    "lora.alpha": Range(1, 2**20),
    "boundary_steps": STEP,
    "text_encoder_lr_factor": Range(0, 1000),
    "min_snr_gamma": Range(0, 1e6, above=True),
    "min_snr_floor": SHARE,
    "caption_dropout": SHARE,
    "val_letters": Range(0, 10**6),
    "rotation_degrees": Range(0, 180),
    "noise": Range(0, 10),
    "turned_share": Range(0, 1),
    "half_share": Range(0, 1),
    "mixed_share": Range(0, 1),
    "ghost_share": Range(0, 1),
    "faded_share": Range(0, 1),
    "blurred_share": Range(0, 1),
    "round_trip_share": Range(0, 1),
}

PICTURE_SIDE = Range(1, 16384)  # px
SEED = Range(0, 2**62)
SAMPLING = {  # of `anagram.options.Options`
    "num_inference_steps": Range(1, 10**4),
    "guidance_scale": Range(0, 10**4),
    "guidance_rescale": PROBABILITY,
    "weights": Range(0, 1e6),
    "time_travel": Range(1, 1000),
    "travel_band": PROBABILITY,
    "image_size": PICTURE_SIDE,
    "upscale": Range(1, 64),
    "upscale_strength": Range(0, 1, above=True, below=True),
}


def check_ranges(config: Any, prefix: str = "") -> None:
    """Raises ValueError that names the first option of a dataclass, or of those within it, whose value is out of its range or no number."""
    for name, value in vars(config).items():
        key = prefix + name
        if is_dataclass(value):
            check_ranges(value, f"{key}.")
        elif key in RANGES and value is not None:
            values = value if isinstance(value, list) else [value]
            if not all(each in RANGES[key] for each in values):
                about = " is a probability" if RANGES[key] is PROBABILITY else ""
                raise ValueError(f"{key}{about}: got {value}, wanted {RANGES[key]}")
