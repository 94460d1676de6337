"""Text conditioning: a small CLIP tokenizer and text encoder for the small world, and prompts to embeddings for any."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from eqldm.construction import MISFITS, make, misfit

START, END = "<|startoftext|>", "<|endoftext|>"


def make_tokenizer(captions: Iterable[str], max_length: int | None = None) -> CLIPTokenizer:
    """A CLIPTokenizer in which each (ASCII) word of the captions is one token; other words fall back to letters, or bytes.

    max_length: tokens per prompt, start and end included; None: what the longest caption needs. CLIP's tokenizer lowers
    the case: "A" and "a" are one token.
    """
    known, longest = set(), 0
    for caption in captions:
        words = re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", caption.lower())
        longest = max(longest, sum(1 if word.isascii() else len(word.encode()) for word in words))
        known.update(word for word in words if word.isascii())
    characters = sorted(ByteLevel.alphabet())
    merges: dict[tuple[str, str], int] = {}
    for word in sorted(known):
        # Against the merges there are: "at" merges a + t, so that "cat" falls into c + at, and needs that merge.
        while len(pieces := _split(word, merges)) > 1:
            merges[pieces[0], pieces[1]] = len(merges)
    tokens = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        (path / "vocab.json").write_text(json.dumps(vocabulary))
        (path / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
        return CLIPTokenizer.from_pretrained(
            path,
            local_files_only=True,
            model_max_length=max_length or longest + 2,
            bos_token=START,
            eos_token=END,
            unk_token=END,
            pad_token=END,
        )


def _split(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """The pieces that byte-pair encoding leaves of a word: the pair of the lowest rank is merged first."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while True:
        pairs = list(zip(pieces, pieces[1:]))
        first = min(pairs, key=lambda pair: merges.get(pair, len(merges)), default=None)
        if first not in merges:
            return pieces
        i = pairs.index(first)
        pieces[i : i + 2] = ["".join(first)]


TEXT_ENCODER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}  # unless sizes are given


def make_text_encoder(tokenizer: CLIPTokenizer, **sizes) -> CLIPTextModel:
    """A random CLIPTextModel for a tokenizer; `sizes` are arguments of CLIPTextConfig (hidden_size, ...)."""
    tokens = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if given := sorted(sizes.keys() & tokens.keys()):
        raise ValueError(f"text_encoder.{given[0]} follows from the captions: drop it")
    config = make(CLIPTextConfig, "text_encoder", {**TEXT_ENCODER, **sizes}, **tokens)
    try:
        text_encoder = CLIPTextModel(config)
    except MISFITS as error:
        raise misfit("text_encoder", {**TEXT_ENCODER, **sizes}, error) from error
    # CLIP's scale of .02 suits its size and training; at this one, words would hardly show in the first outputs
    torch.nn.init.normal_(text_encoder.get_input_embeddings().weight)
    return text_encoder


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> Tensor:
    """[B, L] token numbers, padded and cut to the tokenizer's length."""
    return tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt").input_ids


def encode_prompts(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: list[str]) -> Tensor:
    """[B, L, D] last hidden states, the conditioning of Stable Diffusion 1.x. Gradients flow where they are enabled."""
    tokens = tokenize(tokenizer, prompts).to(text_encoder.device)
    return text_encoder(tokens).last_hidden_state


def too_long(tokenizer: CLIPTokenizer, prompts: list[str]) -> list[str]:
    """The prompts that lose words because they are longer than the model's token limit."""
    limit = tokenizer.model_max_length
    return [prompt for prompt in prompts if len(tokenizer(prompt, verbose=False).input_ids) > limit]
