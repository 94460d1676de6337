"""Text conditioning: the small tokenizer, and prompt embeddings against stock diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from eqldm.data.shards import ShardSet
from eqldm.diffusion.conditioning import (
    LONGEST,
    cut_captions,
    encode_prompts,
    looked_at,
    make_text_encoder,
    make_tokenizer,
    prompt_length,
    tokenize,
    too_long,
    unseen_words,
)
from eqldm.model_folder import load_text

CAPTIONS = ["the letter A", "a red letter B on a blue background", "the cat, at 10 o'clock!"]


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)


def test_each_caption_word_is_one_token():
    tokenizer = make_tokenizer(CAPTIONS)
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = "a red letter b on a blue background".split()
    assert pieces(tokenizer, CAPTIONS[1]) == [start, *(f"{word}</w>" for word in words), end]
    assert pieces(tokenizer, "A Red LETTER") == pieces(tokenizer, "a red letter")
    assert pieces(tokenizer, "cat, at 10") == [start, "cat</w>", ",</w>", "at</w>", "1</w>", "0</w>", end]


@given(st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=8))
def test_each_word_is_one_token_whatever_the_others(words):
    """Words that hold other words ("at" in "cat") are the hard case: merges of one break up the other."""
    tokenizer = make_tokenizer([" ".join(words)])
    assert pieces(tokenizer, " ".join(words))[1:-1] == [f"{word}</w>" for word in words]
    assert tokenizer.model_max_length == len(words) + 2


def test_unknown_words_fall_back_to_letters():
    tokenizer = make_tokenizer(CAPTIONS)
    assert pieces(tokenizer, "zqj")[1:-1] == ["z", "q", "j</w>"]
    assert pieces(tokenizer, "redj")[1:-1] == ["red", "j</w>"] or pieces(tokenizer, "redj")[1:-1] == ["re", "d", "j</w>"]
    assert tokenizer.decode(tokenizer("z\u00e9ro \u65e5").input_ids, skip_special_tokens=True).strip() == "z\u00e9ro \u65e5"


def test_captions_that_are_not_ascii():
    captions = ["caf\u00e9", "\u65e5\u672c", "red"]
    tokenizer = make_tokenizer(captions)
    assert too_long(tokenizer, captions) == []
    assert len({tuple(tokenizer(caption).input_ids) for caption in captions}) == 3


def test_round_trip(tmp_path):
    tokenizer = make_tokenizer(CAPTIONS)
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == tokenizer.model_max_length and len(loaded) == len(tokenizer)
    for text in (*CAPTIONS, "", "an unseen word"):
        assert tokenize(loaded, [text]).equal(tokenize(tokenizer, [text]))


def test_length():
    tokenizer = make_tokenizer(CAPTIONS)
    longest = max(len(tokenizer(caption).input_ids) for caption in CAPTIONS)
    assert tokenizer.model_max_length == longest == 12
    tokens = tokenize(tokenizer, ["", "the letter a", "a " * 50])
    assert tokens.shape == (3, 12) and bool((tokens[:, -1] == tokenizer.eos_token_id).all())
    assert tokens[0].tolist() == [tokenizer.bos_token_id] + [tokenizer.eos_token_id] * 11
    assert too_long(tokenizer, [*CAPTIONS, "a " * 10, "a " * 11]) == ["a " * 11]
    assert make_tokenizer(CAPTIONS, max_length=77).model_max_length == 77


def test_one_long_caption_does_not_lengthen_all_prompts():
    captions = [*CAPTIONS, "a red letter " * 500]
    assert make_tokenizer(captions).model_max_length == LONGEST == 77
    assert make_tokenizer(captions, 200).model_max_length == 200
    for wrong in (2, 0, -1, 1e9, 5000, "77", True, [77]):
        with pytest.raises(ValueError, match="text_encoder.max_position_embeddings: got .*, wanted tokens of a prompt, 3 to 4096"):
            prompt_length(wrong)
    assert (prompt_length(None), prompt_length(77)) == (None, 77)


def test_what_is_cut_of_captions_is_said():
    tokenizer = make_tokenizer(CAPTIONS, 6)
    said = cut_captions(tokenizer, ["the letter a", "a red letter b on a blue background", "the cat"], 9, "shards")
    assert said == (
        "33.33% of the captions of 'shards' are longer than the text encoder's 6 tokens and are cut there; the longest has 10 (3 of 9 were "
        "looked at). The first, 'a red letter b on a blue background', loses 'on a blue background'"
    )
    assert "all of them were looked at" in cut_captions(tokenizer, ["the " * 5], 1, "shards")
    assert cut_captions(tokenizer, ["the " * 4, ""], 2, "shards") == cut_captions(tokenizer, [], 0, "shards") == ""
    long = cut_captions(tokenizer, ["the " * 1000], 1, "shards")
    assert len(long) < 600 and long.startswith("100.00%") and "1002" in long


def test_words_that_training_does_not_show_are_named():
    tokenizer = make_tokenizer(CAPTIONS)
    said = unseen_words(tokenizer, CAPTIONS, ["the letter A", "a zebra", "A \u65e5 zebra"], "sample_prompts")
    assert said.startswith("2 of 3 texts of sample_prompts have words that none of the 3 training captions looked at is made of")
    assert said.endswith("'zebra', '\u65e5'")
    assert unseen_words(tokenizer, CAPTIONS, ["the red cat", ""], "x") == unseen_words(tokenizer, CAPTIONS, [], "x") == ""


def test_captions_are_looked_at_evenly(tmp_path, make_picture_shards, monkeypatch):
    shards = ShardSet.open(make_picture_shards(tmp_path / "shards", count=20))
    assert looked_at(shards) == [f"picture {number}" for number in range(20)]
    monkeypatch.setattr("eqldm.diffusion.conditioning.LOOKED_AT", 5)
    assert looked_at(shards) == [f"picture {number}" for number in range(0, 20, 4)]


def test_text_encoder_takes_sizes():
    tokenizer = make_tokenizer(CAPTIONS)
    encoder = make_text_encoder(tokenizer, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    assert encoder.config.vocab_size == len(tokenizer) and encoder.config.eos_token_id == tokenizer.eos_token_id
    embeds = encode_prompts(tokenizer, encoder, ["a", "the letter a"])
    assert embeds.shape == (2, tokenizer.model_max_length, 8) and embeds.requires_grad


def test_embeddings_equal_stock_pipelines(tiny_model_folder):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model_folder)
    tokenizer, encoder = load_text(tiny_model_folder)
    prompts = ["the letter a", "picture 3"]
    wanted, empty = pipeline.encode_prompt(prompts, "cpu", 1, do_classifier_free_guidance=True)
    with torch.no_grad():
        assert torch.equal(encode_prompts(tokenizer, encoder, prompts), wanted)
        torch.testing.assert_close(encode_prompts(tokenizer, encoder, [""]), empty[:1])


@pytest.mark.parametrize("prompt", ["the letter a " * 5])
def test_long_prompts_are_found(tiny_model_folder, prompt):
    tokenizer, _ = load_text(tiny_model_folder)
    assert too_long(tokenizer, ["the letter a", prompt]) == [prompt]
