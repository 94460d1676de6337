"""Write a model folder for others: python -m eqldm.export MODEL --out DIR [--dtype float16]

The weights are stored in float16 (half the size; every loader here computes in float32). Latent shards belong to the weights that
made them: export a VAE before its latents are encoded, or encode anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from eqldm.model_folder import Networks, check_replaceable, load_autoencoder, save_model_folder

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def export(model: Path, out: Path, dtype: torch.dtype) -> Path:
    """Write the folder, whole or VAE alone as it is, with weights of `dtype`. A model that stands at `out` is replaced.

    Raises: ValueError where weights overflow, or where `out` is `model` or holds something else; as the loaders.
    """
    check_replaceable(out, model)
    parts = {"vae": load_autoencoder(model)}
    if (model / "unet").is_dir():
        parts |= vars(Networks.open(model))
    for name in ("vae", "unet", "text_encoder"):
        if name in parts:
            network = parts[name].to(dtype)
            if not all(bool(torch.isfinite(weight).all()) for weight in network.state_dict().values()):
                raise ValueError(f"weights of {name}/ of '{model}' are too large for {dtype}: use bfloat16 or float32")
    return save_model_folder(out, **parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder, whole or with vae/ alone")
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="of the stored weights")
    args = parser.parse_args()
    try:
        print(export(args.model, args.out, DTYPES[args.dtype]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
