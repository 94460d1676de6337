"""Beside the parts of benchmarks/gpu.py, on the CPU: what eqldm.budget predicts for the trainings that part 2 measures.

For each network and size: floating-point operations a picture, and the GB that a GPU needs, as `fixed + batch x each`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from eqldm.budget import UTILISATION, budget
from eqldm.model_folder import PRETRAINED
from gpu_fast import FULL, SMALL, Row, options_of
from gpu_parts import Item, Time, run_part
from train_step import ROWS, row_config


def predict(args: argparse.Namespace, network: str, size: int, limit: Time) -> dict[str, Any]:
    model = PRETRAINED / "glyphs-base" if args.tiny else None
    config = row_config(ROWS[f"{network}, plain"], size, 1, 1, args.scratch, model, options_of(args, network))
    need = budget(config)
    return {
        "network": network,
        "size": size,
        "operations": need.operations,
        "fixed_gb": need.memory("ddp", 1, 0) / 1e9,
        "each_gb": need.activations / 1e9,
        "utilisation": UTILISATION,
    }


def items(args: argparse.Namespace) -> Sequence[Item]:
    rows = [row for row in (SMALL if args.tiny else FULL) if isinstance(row, Row)]
    wanted = dict.fromkeys((row.options.split(",")[0], row.size) for row in rows)
    return [Item(f"{network}, {size} px", 1, partial(predict, args, network, size)) for network, size in wanted]


if __name__ == "__main__":
    run_part(__doc__, "predicted", items)
