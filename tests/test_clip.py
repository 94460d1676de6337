"""CLIP, from a tiny random folder of the real classes: similarities as transformers has them, scores as the formulas do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from eqldm.data.samples import from_bytes
from eqldm.diffusion.conditioning import make_tokenizer
from eqldm.evaluation.clip import Clip, alignment, concealment

CAPTIONS = ["the letter a", "a red letter b on blue", "a horse", "a snowy village"]


def make_clip(folder: Path) -> Path:
    """A CLIP of random weights for 32 px, that knows the words of `CAPTIONS`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer(CAPTIONS)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "model")


def test_similarities_are_those_of_the_model(folder):
    clip = Clip(folder)
    pictures = torch.randint(0, 256, (4, 3, 48, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ours = clip.pictures(from_bytes(pictures)) @ clip.texts(CAPTIONS).T
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(text=CAPTIONS, images=list(pictures), return_tensors="pt", padding=True)).logits_per_image
    torch.testing.assert_close(ours, logits / model.logit_scale.exp(), atol=1e-5, rtol=1e-4)
    assert clip.pictures(from_bytes(pictures)).norm(dim=1).tolist() == pytest.approx([1] * 4) and len(clip.hash) == 16
    assert clip.temperature == pytest.approx(1 / 14.2857, rel=1e-3)


def test_words_that_clip_does_not_read_are_told_once(folder, capsys):
    clip = Clip(folder)
    capsys.readouterr()
    long = "a red letter b on blue horse village"
    for _ in range(2):
        assert clip.texts([long, "a horse", long])[0].tolist() == pytest.approx(
            clip.texts(["a red letter b on blue"])[0].tolist(), abs=1e-5
        )
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith(f"note: CLIP reads {clip.limit} of 10 tokens of 'a red letter b on blue horse village")
    assert told[0].endswith("its score knows nothing of 'horse village'")


def test_alignment_and_concealment_closed_form():
    similarities = torch.tensor([[[0.3, 0.1], [0.2, 0.4]], [[0.1, 0.3], [0.3, 0.2]]])
    assert alignment(similarities).tolist() == pytest.approx([0.3, 0.1])
    a, b = (torch.tensor([[3.0, 1], [2, 4]]), torch.tensor([[1.0, 3], [3, 2]]))
    for logits, found in zip((a, b), concealment(similarities, 0.1)):
        e = logits.exp()
        by_row = (e[0, 0] / e[0].sum() + e[1, 1] / e[1].sum()) / 2
        by_column = (e[0, 0] / e[:, 0].sum() + e[1, 1] / e[:, 1].sum()) / 2
        assert float(found) == pytest.approx(float(by_row + by_column) / 2, rel=1e-5)
    assert float(concealment(torch.zeros(3, 3), 0.1)) == pytest.approx(1 / 3)  # nobody can tell


def test_folders_that_are_no_clip(tmp_path, folder, tiny_model_folder):
    with pytest.raises(FileNotFoundError, match="no CLIP in '.*nowhere': fetch one"):
        Clip(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="do not fit its config.json .CLIPModel.: missing"):
        Clip(tiny_model_folder / "text_encoder")
