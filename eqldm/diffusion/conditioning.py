"""Text conditioning: a small CLIP tokenizer and text encoder for the small world; prompts to embeddings for any; what is cut of them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from eqldm.construction import MISFITS, make, misfit
from eqldm.data.remote import is_remote
from eqldm.data.shards import ShardSet

START, END = "<|startoftext|>", "<|endoftext|>"
LONGEST = 77  # tokens of a prompt, as CLIP's, unless a number is given
LOOKED_AT = 10_000  # captions of a set that are looked at for what is cut


def make_tokenizer(captions: Iterable[str], max_length: int | None = None) -> CLIPTokenizer:
    """A CLIPTokenizer in which each (ASCII) word of the captions is one token; other words fall back to letters, or bytes.

    max_length: tokens per prompt, start and end included; None: what the longest caption needs, at most `LONGEST`: memory and time of
    every prompt grow with it. CLIP's tokenizer lowers the case: "A" and "a" are one token.
    """
    known: set[str] = set()
    longest = 0
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
            model_max_length=max_length or min(longest + 2, LONGEST),
            bos_token=START,
            eos_token=END,
            unk_token=END,
            pad_token=END,
        )


def prompt_length(given: Any) -> int | None:
    """The option text_encoder.max_position_embeddings, None where it is not set. Raises ValueError for what is no number of tokens."""
    if given is not None and (type(given) is not int or not 3 <= given <= 4096):
        raise ValueError(
            f"text_encoder.max_position_embeddings: got {given!r}, wanted tokens of a prompt, 3 to 4096, with its start and end"
        )
    return given


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


def looked_at(shards: ShardSet) -> list[str]:
    """Captions of a set, up to `LOOKED_AT`: of all its samples evenly; of a remote set those of its first tar, for tars come whole."""
    total = int(shards.starts[1]) if is_remote(shards.folder) else len(shards)
    numbers = range(0, total, max(1, -(-total // LOOKED_AT)))
    return [shards.read(number, "txt").decode() for number in numbers if shards.holds(number, "txt")]


def cut_captions(tokenizer: CLIPTokenizer, captions: list[str], total: int, of: str) -> str:
    """A sentence on the captions that are longer than the tokenizer's limit, how much of one is lost, and whether all were looked at;
    "" where none of them is.

    captions: those looked at of a set of `total`, whose name is `of`.
    """
    limit = tokenizer.model_max_length
    tokens = tokenizer(captions, verbose=False).input_ids if captions else []
    longer = [number for number, found in enumerate(tokens) if len(found) > limit]
    if not longer:
        return ""
    first, longest = longer[0], max(len(tokens[number]) for number in longer)
    lost = tokenizer.decode(tokens[first][limit - 1 : -1]).strip()
    share = "all of them were looked at" if len(captions) >= total else f"{len(captions)} of {total} were looked at"
    return (
        f"{len(longer) / len(captions):.2%} of the captions of '{of}' are longer than the text encoder's {limit} tokens and are cut there; "
        f"the longest has {longest} ({share}). The first, {_short(captions[first])!r}, loses {_short(lost)!r}"
    )


def unseen_words(tokenizer: CLIPTokenizer, captions: list[str], texts: list[str], of: str) -> str:
    """A sentence on the words of texts that are not made of what captions are made of, which training will never have shown to a text
    encoder from scratch; "" where there is none.

    captions: those looked at of the training set.  of: the texts' name.
    """
    seen = {token for tokens in tokenizer(captions, verbose=False).input_ids for token in tokens} if captions else set()
    words = {text: [word for word in text.split() if not seen.issuperset(tokenizer(word, verbose=False).input_ids)] for text in set(texts)}
    with_some = [text for text in texts if words[text]]
    if not with_some:
        return ""
    listed = sorted({word for text in with_some for word in words[text]})
    more = f" and {len(listed) - 5} more" * (len(listed) > 5)
    return (
        f"{len(with_some)} of {len(texts)} texts of {of} have words that none of the {len(captions)} training captions looked at "
        f"is made of, and that are not learnt: {', '.join(map(repr, listed[:5]))}{more}"
    )


def _short(text: str, length: int = 160) -> str:
    return text if len(text) <= length else text[: length - 4] + " ..."
