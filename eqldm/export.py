"""Write a model for others: python -m eqldm.export MODEL --out DIR [--dtype float16]

The weights are stored in float16 (half the size; every loader here computes in float32). Latent shards belong to the weights that
made them: export a VAE before its latents are encoded, or encode anew.

    python -m eqldm.export MODEL --out FILE.safetensors --single-file [--scale-factor 0.18215]

writes the VAE alone in the original layout of LDM (kl-f8) and, beside it, what an LDM config must say of it. Programs that know
no other scale than Stable Diffusion's take a VAE with that --scale-factor; the latents that a UNet sees are the same.

    python -m eqldm.export RUN[@STEP] --out DIR [--weights ema|raw]

writes the model of a run of train.py at one of its checkpoints (the newest without STEP; run.keep_every keeps earlier ones), as the run's
own end does and in its dtype: at the last step of a finished run it is RUN/model again. Of low-rank updates DIR/lora holds them alone.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from eqldm.atomic import beside, lock_of, whole_folder
from eqldm.autoencoder.fold import fold_map
from eqldm.command import Parser, error_line, real
from eqldm.lock import held
from eqldm.model_card import carried_card
from eqldm.model_folder import Networks, check_replaceable, load_autoencoder, load_vae, one_model, save_model_folder
from eqldm.paths import path_option
from eqldm.ranges import Range
from eqldm.run_model import export_checkpoint, parse_run, run_options
from eqldm.single_file import WRITTEN, write_single_file

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def export(model: Path, out: Path, dtype: torch.dtype) -> Path:
    """Write the folder, whole or VAE alone as it is, with weights of `dtype`. A model that stands at `out` is replaced.

    Raises: ValueError where weights overflow, or where `out` is `model`, holds something else or is named as a file; as the loaders.
    """
    _check_folder(out)
    check_replaceable(out, model, whole=(model / "unet").is_dir())
    with one_model(model):
        parts = {"vae": load_autoencoder(model)}
        if (model / "unet").is_dir():
            parts |= vars(Networks.open(model))
    for name in ("vae", "unet", "text_encoder"):
        if name in parts:
            _in_dtype(parts[name], dtype, f"{name}/ of '{model}'")
    card = carried_card(model, f"stored in {str(dtype).removeprefix('torch.')} (`python -m eqldm.export`).")
    with whole_folder(out) as partial:
        save_model_folder(partial, card, **parts)
        if (model / "lora").is_dir():
            shutil.copytree(model / "lora", partial / "lora")
    return out


def export_single_file(model: Path, out: Path, dtype: torch.dtype, scale_factor: float | None = None) -> Path:
    """Write the model's VAE to the file `out`; a file that stands there is replaced.

    scale_factor: what the latents are to be multiplied by, with the weights changed so that the products stay; None keeps the VAE's.
    A shift is folded in. Raises: ValueError where weights overflow, or as `write_single_file`; as the loaders.
    """
    if model.is_file():  # its scale may be a guess
        raise ValueError(f"'{model}' is a single file already: wanted a model folder, such as RUN/model")
    if scale_factor is not None and not (math.isfinite(scale_factor) and scale_factor > 0):
        raise ValueError(f"--scale-factor: got {scale_factor}, wanted a number above 0")
    vae = load_vae(model)
    scale = scale_factor or vae.config.scaling_factor
    if scale != vae.config.scaling_factor or vae.config.get("shift_factor") or vae.quant_conv is None or vae.post_quant_conv is None:
        channels = vae.config.latent_channels
        fold_map(vae, torch.eye(channels) / scale, torch.zeros(channels))
        vae.register_to_config(scaling_factor=scale)
    return write_single_file(_in_dtype(vae, dtype, f"'{model}'"), out)


def _check_folder(out: Path) -> None:
    if out.suffix in WRITTEN:
        raise ValueError(f"--out '{out}' would be a folder: give --single-file for a file, or a folder's name")


def _in_dtype(network: nn.Module, dtype: torch.dtype, name: str) -> nn.Module:
    network = network.to(dtype)
    if not all(bool(torch.isfinite(weight).all()) for weight in network.state_dict().values()):
        raise ValueError(f"weights of {name} are too large for {dtype}: use bfloat16 or float32")
    return network


def export_run(args: argparse.Namespace, run: Path, step: int | None) -> Path:
    """Write the model of a run's checkpoint as the arguments say. Raises as `export_checkpoint` and the others here."""
    if not args.single_file:
        _check_folder(args.out)
        config = run_options(run, args.inputs)
        sources = (getattr(config, name, None) for name in ("model", "vae"))
        check_replaceable(args.out, *(Path(source) for source in sources if source), whole=config.stage == "diffusion")
    out = args.out.resolve()  # `.` has no name
    with beside(out) as made:
        model = made / out.name
        step = export_checkpoint(run, step, model, args.weights, args.inputs)
        print(f"step {step} of '{run}'", file=sys.stderr)
        if not (model / "vae").is_dir() and (args.single_file or args.dtype not in (None, "float16")):
            raise ValueError(f"'{run}' trained a judge, which is one folder of float16: leave out --single-file and --dtype")
        if args.single_file:
            return export_single_file(model, args.out, DTYPES[args.dtype or "float16"], args.scale_factor)
        if args.dtype in (None, "float32") or not (model / "vae").is_dir():
            with whole_folder(args.out) as partial:
                model.rename(partial)
            return args.out
        return export(model, args.out, DTYPES[args.dtype])


def _exported(args: argparse.Namespace) -> Path:
    if run := parse_run(args.model):
        return export_run(args, *run)
    if args.weights or args.inputs:
        raise ValueError(f"--weights and --inputs are for a run's checkpoint (RUN@STEP), and '{args.model}' is none")
    dtype = DTYPES[args.dtype or "float16"]
    return export_single_file(args.model, args.out, dtype, args.scale_factor) if args.single_file else export(args.model, args.out, dtype)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", type=path_option, help="model folder, whole or with vae/ alone; RUN or RUN@STEP: a run's checkpoint")
    parser.add_argument("--out", type=path_option, required=True, help="model folder to write; a file for --single-file")
    parser.add_argument("--single-file", action="store_true", help="write the VAE alone, in LDM's layout")
    parser.add_argument(
        "--scale-factor", type=real(Range(0, 1e6, above=True)), help="for --single-file: scale of the latents (default: the VAE's own)"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the stored weights (default: float16; of a run's checkpoint as the run's own end)"
    )
    parser.add_argument("--weights", choices=("ema", "raw"), help="of a run: their average (default, where it keeps one), or as trained")
    parser.add_argument(
        "--inputs",
        nargs="+",
        default=[],
        metavar="OPTION=PATH",
        help="inputs of a run that have moved: data.train=, data.val=, model=, vae=",
    )
    args = parser.parse_args()
    try:
        if args.scale_factor is not None and not args.single_file:
            raise ValueError("--scale-factor is for --single-file: a model folder states its own")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with held(lock_of(args.out), f"'{args.out}' is being written", "give another --out"):
            print(_exported(args))
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    main()
