"""What the scripts share that draw their pictures: the splits, the randomness of a sample, the options, and a split's shards."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import numpy as np

from eqldm.command import error_line, real, whole
from eqldm.data.making import num_cores
from eqldm.paths import path_option
from eqldm.ranges import PROBABILITY, WORKERS

SPLITS = ("train", "val", "test")


def sample_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The generator of one sample. Distinct (seed, split, index) give independent streams."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


def block_order(seed: int, split: str, block: int, count: int) -> np.ndarray:
    """[count] the order in which a block of `count` samples shows as many things, each once."""
    # The fourth word keeps these streams apart from those of `sample_rng`, which end in an implicit zero
    return np.random.default_rng([seed, SPLITS.index(split), block, 1]).permutation(count)


def check_options(num: int, size: int, seed: int, shard_size: int, variation: float) -> None:
    """Raises ValueError where a split cannot be made so."""
    if size < 8 or size % 8:
        raise ValueError(f"size must be a multiple of 8, got {size}: the autoencoder divides it by 8")
    if num < 1 or shard_size < 1:
        raise ValueError(f"the number of pictures and the shard size must be at least 1, got {num} and {shard_size}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be at least 0 and less than 2**32, got {seed}")
    if not 0 <= variation <= 1:
        raise ValueError(f"variation must be from 0 to 1, got {variation}")


def shard_jobs(folder: Path, split: str, num: int, shard_size: int) -> dict[str, tuple[Path, range]]:
    """The tars of a split, by name: where each goes, and which samples it holds."""
    spans = {f"{split}-{first // shard_size:06d}.tar": range(first, min(first + shard_size, num)) for first in range(0, num, shard_size)}
    return {name: (folder / name, indices) for name, indices in spans.items()}


def add_options(parser: ArgumentParser, num_train: int, num_val: int, variation: str) -> None:
    """Those of every such script. num_train, num_val: defaults.  variation: what of a picture varies."""
    parser.add_argument("--out", type=path_option, required=True, metavar="FOLDER")
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--num-train", type=whole(1), default=num_train)
    parser.add_argument("--num-val", type=whole(1), default=num_val)
    parser.add_argument("--num-test", type=whole(1), default=2000)
    parser.add_argument("--size", type=whole(8, 4096), default=64, help="side, px: a multiple of 8")
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0)
    parser.add_argument("--shard-size", type=whole(1, 10**6), default=2000, help="pictures in a shard")
    parser.add_argument("--workers", type=whole(1, WORKERS), default=num_cores(), help="processes (default: one per core)")
    parser.add_argument("--variation", type=real(PROBABILITY), default=1.0, help=f"of {variation}: 1 all, 0 none")


def pop_splits(options: dict) -> dict[str, int]:
    """The splits that are asked for, and the number of pictures of each, taken out of the parsed options."""
    nums = {split: options.pop(f"num_{split}") for split in SPLITS}
    return {split: nums[split] for split in options.pop("split")}


def exit_status(make: Callable[[], object]) -> int:
    """That of a script that makes shards: 0; 2 where it cannot, which is said; 130 where it was interrupted."""
    try:
        make()
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept, the same command resumes", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(error_line(error), file=sys.stderr)
        return 2
    return 0
