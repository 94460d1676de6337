"""The order in which training sees samples: a function of (seed, position), so that any run can stop and go on.

Training is one endless stream of positions 0, 1, 2, ...: step s takes positions [s B, (s + 1) B), whatever the number of
processes, workers or micro-batches. Position p shows sample `epoch_order(epoch)[p % N]` of epoch p // N. All randomness
of a sample (noise, timestep, transform) is drawn from a generator seeded by (seed, position): see `position_generator`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler


def epoch_order(starts: np.ndarray, seed: int, epoch: int, window: int) -> np.ndarray:
    """[N] sample numbers of one epoch: the shards in random order, samples mixed within each window of `window` shards.

    starts: [num_shards + 1], the first sample of each shard. Reading stays local: at most `window` shards are open.
    """
    rng = np.random.default_rng([seed, epoch])
    shards = rng.permutation(len(starts) - 1)  # as `epoch_shards`
    parts = []
    for first in range(0, len(shards), window):
        numbers = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]])
        parts.append(rng.permutation(numbers))
    return np.concatenate(parts)


def epoch_shards(num_shards: int, seed: int, epoch: int) -> np.ndarray:
    """[num_shards] the order in which an epoch comes to the shards: window after window."""
    return np.random.default_rng([seed, epoch]).permutation(num_shards)


def position_seed(seed: int, position: int, purpose: str = "") -> int:
    """A 63-bit seed for one position of the stream; `purpose` keeps independent draws apart."""
    digest = hashlib.blake2b(f"{seed}/{position}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def position_generator(seed: int, position: int, purpose: str = "") -> torch.Generator:
    """A CPU generator for one position of the stream."""
    return torch.Generator().manual_seed(position_seed(seed, position, purpose))


class StreamSampler(Sampler[list[int]]):
    """Micro-batches of positions for one process, from optimizer step `start_step` on, without end.

    Step s, micro-batch j, process r of R: positions s B + (j R + r) m + [0, m). The union over processes and
    micro-batches is the step's global batch.
    """

    def __init__(self, batch_size: int, micro_batch_size: int, rank: int, world_size: int, start_step: int = 0):
        if batch_size % (micro_batch_size * world_size):
            raise ValueError(f"batch size {batch_size} does not divide into {world_size} processes x {micro_batch_size}")
        self.batch_size, self.micro, self.rank, self.world = batch_size, micro_batch_size, rank, world_size
        self.start_step = start_step

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            first = step * self.batch_size
            for j in range(self.batch_size // (self.micro * self.world)):
                start = first + (j * self.world + self.rank) * self.micro
                yield list(range(start, start + self.micro))
            step += 1
