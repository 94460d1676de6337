"""The one-line swap: python -m eqldm.swap MODEL --vae FOLDER --out DIR

Writes MODEL with the VAE of another folder in the place of its own, and its UNet as it was. This is what one would like to do with a
better autoencoder, and what does not work: the UNet knows other latents. Evaluate it to see by how much; train.py adapts the UNet.
"""

from __future__ import annotations

import sys
from pathlib import Path

from eqldm.command import Parser, error_line
from eqldm.model_card import carried_card
from eqldm.model_folder import Networks, check_replaceable, downsampling, load_vae, save_model_folder
from eqldm.paths import path_option
from eqldm.run_model import opened


def swap(model: Path, vae: Path, out: Path) -> Path:
    """Write `model` with the VAE of `vae` to `out`, where a model that stands there is replaced.

    Raises: ValueError where the UNet takes other latents, where the new VAE has another f or a shift (fold it in first), or
    where `out` is one of the two or holds something else; as the loaders.
    """
    check_replaceable(out, model, vae, whole=True)
    old, new, networks = load_vae(model), load_vae(vae), Networks.open(model)
    if networks.unet.config.in_channels != new.config.latent_channels:
        raise ValueError(
            f"the UNet of '{model}' takes {networks.unet.config.in_channels} latent channels, the VAE of '{vae}' gives "
            f"{new.config.latent_channels}: nothing but another UNet helps"
        )
    if downsampling(new) != downsampling(old):
        raise ValueError(f"the VAE of '{vae}' has f = {downsampling(new)}, that of '{model}' f = {downsampling(old)}: wanted the same")
    if new.config.get("shift_factor"):
        raise ValueError(
            f"the VAE of '{vae}' has a shift_factor, which Stable Diffusion's pipeline does not undo: fold it in with "
            "python -m eqldm.autoencoder.fold"
        )
    card = carried_card(model, f"the VAE of `{vae}` was put in the place of its own (`python -m eqldm.swap`), and nothing trained.")
    return save_model_folder(out, card, vae=new, **vars(networks))


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("model", type=path_option, help="model folder to take all but the VAE from")
    parser.add_argument("--vae", type=path_option, required=True, help="model folder, or AutoencoderKL folder, to take the VAE from")
    parser.add_argument("--out", type=path_option, required=True, help="model folder to write")
    args = parser.parse_args()
    try:
        print(swap(opened(args.model), opened(args.vae), args.out))
    except (ValueError, OSError) as error:
        sys.exit(error_line(error))


if __name__ == "__main__":
    main()
