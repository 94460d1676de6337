"""The files of a text encoder and of its tokenizer, as every transformers reads them and not this one alone.

transformers 5.6 dropped the prefix `text_model.` from the names of a CLIPTextModel's weights. It reads both; 5.0 to 5.5 and 4.x read the
prefix alone, and 5.5 goes on with random weights where there is none. 4.x reads a CLIPTokenizer from `vocab.json` and `merges.txt`, which
5.x does not write. So the prefix, as all models on the hub have it, and both.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from transformers import CLIPTextModel, CLIPTokenizer

PREFIX = "text_model."
MOST_MERGES = 48_894  # CLIP's own: transformers 4 passes over what follows them
OLD_VOCABULARY = ("vocab.json", "merges.txt")


def save_text_encoder(text_encoder: CLIPTextModel, folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`, whose names have the prefix. Raises OSError, SafetensorError."""
    folder = Path(folder)
    weights = {PREFIX + name.removeprefix(PREFIX): weight for name, weight in text_encoder.state_dict().items()}
    text_encoder.save_pretrained(folder, state_dict=weights, save_original_format=False)  # else 5.x names them as they were opened
    # diffusers opens weights in float32 whatever they are, transformers in the dtype that config.json states: say float32 too
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": "float32"}, indent=2) + "\n")


def save_tokenizer(tokenizer: CLIPTokenizer, folder: str | Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, and beside them what transformers 4 reads, unless it would read it wrongly.

    Raises OSError, RuntimeError with the system's words.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_padding()  # else the file holds how it was called last
    backend.no_truncation()
    try:
        tokenizer.save_pretrained(folder)
        backend.model.save(str(folder))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise RuntimeError(str(error)) from error  # tokenizers' own of a failed write has no class of its own
    vocabulary, merges = (Path(folder) / name for name in OLD_VOCABULARY)
    if (count := len(merges.read_text().splitlines()) - 1) > MOST_MERGES:
        merges.unlink()
        vocabulary.unlink()
        warnings.warn(
            f"the tokenizer has {count} merges, transformers 4 reads {MOST_MERGES}: it is written for transformers 5 alone", stacklevel=3
        )


def header_without_prefix(path: Path) -> tuple[bytes, int]:
    """What stands before the tensors of a safetensors file, as it is where the names have no prefix, and where in the file these begin."""
    with open(path, "rb") as file:
        start = file.read(8)
        header = file.read(int.from_bytes(start, "little"))
    names = json.loads(header)
    if not any(name.startswith(PREFIX) for name in names):
        return start + header, len(start + header)
    plain = json.dumps({name.removeprefix(PREFIX): about for name, about in names.items()}, separators=(",", ":")).encode()
    plain += b" " * (-len(plain) % 8)  # as the format wants it
    return len(plain).to_bytes(8, "little") + plain, len(start + header)
