"""CLIP, which says how well a picture and a text go together: any CLIP folder of transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

from eqldm.data.samples import to_bytes
from eqldm.model_folder import config_hash, load_network, weights_hash

HOW = "fetch one (hf download openai/clip-vit-base-patch32 --local-dir FOLDER)"


class Clip:
    """`clip.pictures(x)` and `clip.texts(texts)` give unit vectors [N, D] (CPU), whose products are the similarities.

    Source: arXiv 2103.00020, section 2.3.
    """

    network: Any  # of transformers, whose methods `nn.Module` does not have

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        """Raises FileNotFoundError, with the way to get one, where the folder holds no CLIP; ValueError where weights are missing."""
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"no CLIP in '{folder}': {HOW}")
        self.network = load_network(CLIPModel, Path(folder), dtype=torch.float32, ignore_mismatched_sizes=True).to(device)
        self.processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.hash = weights_hash(self.network, config_hash(self.processor.to_dict()))
        self.limit = min(self.tokenizer.model_max_length, self.network.config.text_config.max_position_embeddings)
        self._told: set[str] = set()  # texts of which it was said that they are cut

    @property
    def temperature(self) -> float:
        """tau: similarities over it are the logits that it was trained with."""
        return float(1 / self.network.logit_scale.exp())

    @torch.no_grad()
    def pictures(self, x: Tensor) -> Tensor:
        """[B, D] of pictures x [B, 3, H, W] in [-1, 1]."""
        pixels = self.processor(list(to_bytes(x).cpu()), return_tensors="pt")["pixel_values"].to(self.network.device)
        return _unit(self.network.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """[N, D]; what is longer than CLIP reads is cut, as in its own evaluation, and told once."""
        self._tell_cut(texts)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
        tokens = tokens.to(self.network.device)
        return _unit(self.network.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]))

    def _tell_cut(self, texts: Sequence[str]) -> None:
        """Says on stderr, once of each text, which words of it CLIP does not read."""
        for text in dict.fromkeys(texts):
            tokens = self.tokenizer(text, verbose=False).input_ids
            if len(tokens) > self.limit and text not in self._told:
                self._told.add(text)
                left = self.tokenizer.decode(tokens[self.limit - 1 : -1]).strip()
                how_much = f"{self.limit} of {len(tokens)} tokens of '{text[:60]}{'…' * (len(text) > 60)}'"
                print(f"note: CLIP reads {how_much}: its score knows nothing of '{left}'", file=sys.stderr)


def _unit(features) -> Tensor:
    features = getattr(features, "pooler_output", features)  # transformers 5 wraps it
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()


def concealment(similarities: Tensor, temperature: float) -> Tensor:
    """[...] of similarities [..., V, V] of view i's picture with view j's prompt: how sure one is which prompt is which view's, by
    (1 / V) tr softmax(S / tau), a mean over both directions. Source: Visual Anagrams, arXiv 2311.17919, section 4.1."""
    logits = similarities / temperature
    traces = [logits.softmax(dim).diagonal(dim1=-2, dim2=-1).mean(-1) for dim in (-1, -2)]
    return (traces[0] + traces[1]) / 2


def alignment(similarities: Tensor) -> Tensor:
    """[...] of similarities [..., V, V]: the least similarity of a view with its own prompt. Source: arXiv 2311.17919, section 4.1."""
    return similarities.diagonal(dim1=-2, dim2=-1).amin(-1)
