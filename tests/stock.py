"""What stock diffusers makes of a model folder; as a script, under whatever versions lie in front, for tests/test_other_versions.py.

python tests/stock.py OUT FOLDER [FOLDER ...] [--lora FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

# Not among them: characters that transformers 4 treats in its own way, for all models of CLIP's: Chinese ones, invisible ones
PROMPTS = [
    "the letter A", "a red letter B on a blue background", "", "A  RED Letter\tZ, zebra's 12!?", "naïve café ½ 😀", "wow! <cat-toy> a",
    "a b c d e f g h i j k l m n o p q r s", "we'll <|endoftext|> see",
]  # fmt: skip


@torch.no_grad()
def outputs(folder: str | Path, lora: str | Path | None = None) -> dict[str, Tensor]:
    """Token ids, prompt embeddings, one call each of UNet and decoder, the pictures of two steps, and the UNet's call with updates."""
    pipeline = StableDiffusionPipeline.from_pretrained(str(folder), safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    tokenizer = pipeline.tokenizer
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(PROMPTS, **options).input_ids
    embeds = pipeline.text_encoder(ids)[0]
    config = pipeline.unet.config
    z = torch.randn(2, config.in_channels, config.sample_size, config.sample_size, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 900])
    sampling = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
    found = {"ids": ids, "embeds": embeds, "unet": pipeline.unet(z, t, embeds[:2]).sample, "vae": pipeline.vae.decode(z).sample,
             "pictures": pipeline(PROMPTS[0], **sampling).images}  # fmt: skip
    if lora is not None:
        pipeline.load_lora_weights(str(lora))
        found["updated"] = pipeline.unet(z, t, embeds[:2]).sample
    return {name: value.contiguous() for name, value in found.items()}


if __name__ == "__main__":
    out, *given = sys.argv[1:]
    found = {f"{i}/{name}": value for i, paths in enumerate(given) for name, value in outputs(*paths.split("+")).items()}
    save_file(found, out)
