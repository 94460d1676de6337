"""The stream of positions: one order whatever the processes, micro-batches and the step at which reading starts."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eqldm.data.order import StreamSampler, epoch_order, position_generator, position_seed

STARTS = np.array([0, 4, 9, 10, 16, 20, 23])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5), st.integers(0, 5), st.integers(1, 9))
def test_an_epoch_shows_each_sample_once(sizes, seed, epoch, window):
    starts = np.cumsum([0, *sizes])
    order = epoch_order(starts, seed, epoch, window)
    assert sorted(order.tolist()) == list(range(starts[-1]))
    assert np.array_equal(order, epoch_order(starts, seed, epoch, window))


def test_the_order_depends_on_seed_and_epoch():
    orders = {tuple(epoch_order(STARTS, seed, epoch, 6).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize("window", [1, 2, 4, 6])
def test_samples_mix_fully_within_a_window_of_shards(window):
    shards = np.searchsorted(STARTS, epoch_order(STARTS, 0, 0, window), side="right") - 1
    changes = int((np.diff(shards) != 0).sum())
    assert changes == 5 if window == 1 else changes > 5
    while len(shards):
        open_now = list(dict.fromkeys(shards.tolist()))[:window]
        count = sum(STARTS[s + 1] - STARTS[s] for s in open_now)
        assert set(shards[:count].tolist()) == set(open_now)
        shards = shards[count:]


def test_generators_depend_on_seed_position_and_purpose_alone():
    def draw(*arguments):
        return tuple(torch.randn(4, generator=position_generator(*arguments)).tolist())

    assert draw(0, 5, "vae") == draw(0, 5, "vae")
    assert len({draw(0, 5), draw(1, 5), draw(0, 6), draw(0, 5, "vae"), draw(0, 5, "noise")}) == 5
    assert len({position_seed(s, p) for s in range(20) for p in range(20)}) == 400  # 1/23 is not 12/3
    assert all(0 <= position_seed(s, 0) < 2**63 for s in range(100))


def batches(batch_size, micro, rank, world, steps, start_step=0) -> list[list[int]]:
    sampler = StreamSampler(batch_size, micro, rank, world, start_step)
    return list(islice(sampler, steps * batch_size // (micro * world)))


@pytest.mark.parametrize(("world", "micro"), [(1, 24), (1, 4), (2, 12), (2, 3), (3, 4), (8, 3), (4, 1)])
def test_processes_and_micro_batches_share_the_global_batch_without_overlap(world, micro):
    steps, parts = 3, 24 // (micro * world)
    of_rank = [batches(24, micro, rank, world, steps) for rank in range(world)]
    for step in range(steps):
        shown = [p for rank in of_rank for batch in rank[step * parts : (step + 1) * parts] for p in batch]
        assert sorted(shown) == list(range(step * 24, (step + 1) * 24))
        for part in range(parts):  # each micro-step is a run of the stream too: accumulating shows it in order
            shown = [p for rank in of_rank for p in rank[step * parts + part]]
            assert shown == list(range(shown[0], shown[0] + micro * world))


WORLDS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


@pytest.mark.parametrize("first", WORLDS)
@pytest.mark.parametrize("second", [1, 8, 64])
def test_no_sample_is_lost_or_shown_twice_from_1_to_64_processes_that_may_change(first, second):
    """Two epochs and a half of 1,000 samples, stopped in the middle and gone on with by another number of processes."""
    shown, stop, steps = [], 5, 13
    for world, start, end in ((first, 0, stop), (second, stop, steps)):
        of_rank = [batches(192, 192 // world if world < 64 else 1, rank, world, end - start, start) for rank in range(world)]
        assert len({sum(map(len, rank)) for rank in of_rank}) == 1  # balanced to the sample
        shown += [position for rank in of_rank for batch in rank for position in batch]
    assert sorted(shown) == list(range(steps * 192))
    orders = [epoch_order(np.arange(0, 1001, 100), 0, epoch, 4) for epoch in range(3)]
    samples = [int(orders[position // 1000][position % 1000]) for position in sorted(shown)]
    assert sorted(samples[:1000]) == sorted(samples[1000:2000]) == list(range(1000))


@pytest.mark.parametrize("start", [1, 7])
def test_starting_at_a_step_equals_skipping_to_it(start):
    assert batches(12, 3, 1, 2, 4, start) == batches(12, 3, 1, 2, start + 4)[start * 2 :]


def test_a_batch_size_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="batch size 10 does not divide into 2 processes x 4"):
        StreamSampler(10, 4, 0, 2)
