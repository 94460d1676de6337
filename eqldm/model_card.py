"""Model cards: the README.md of a model folder, with the front matter that Hugging Face's hub reads.

A card states the licence of the model that was started from, for it binds what is made of it, and what was done, so that it can be done
again. Tools that make a model of another one carry its card on.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from eqldm.markdown import markdown

CARD = "README.md"
TAGS = ["equivariant-latents", "visual-anagrams"]


def licence(model: str | Path) -> str | None:
    """What the card of a model folder, or of the one that a part such as `vae/` lies in, states as its `license`; None for none."""
    folder = Path(model)
    if (folder.parent / "model_index.json").is_file():
        folder = folder.parent
    try:
        return ModelCard.load(folder / CARD, ignore_metadata_errors=True).data.license if (folder / CARD).is_file() else None
    except (ValueError, yaml.YAMLError):  # front matter that is none
        return None


def model_card(title: str, about: str, facts: dict[str, str], metrics: dict[str, float], options: str, base: str | None = None) -> str:
    """The text of a card.

    facts: what the model was made of, and by which command.  metrics: by their documented names.  options: YAML, in full.
    base: model folder that it was started from.
    """
    found = licence(base) if base else None
    if base:
        facts = {"base": f"{base} (licence: {found or 'it states none; look it up, for it binds this model too'})", **facts}
    data = ModelCardData(license=found, base_model=base, library_name="diffusers", tags=TAGS)
    parts = ["---", data.to_yaml().strip(), "---", "", f"# {title}", "", about, "", markdown(["", ""], list(facts.items()))]
    if metrics:
        measured = [[f"`{name}`", f"{value:.4g}"] for name, value in sorted(metrics.items())]
        parts += ["At the last validation of the training:", "", markdown(["metric", ""], measured)]
    return "\n".join([*parts, "All options:", "", "```yaml", options.strip(), "```", ""])


def carried_card(source: str | Path, then: str) -> str | None:
    """The card of the model that another is made of, with what was done to it; None where that has no card."""
    path = Path(source) / CARD
    return f"{path.read_text().rstrip()}\n\nThen: {then}\n" if path.is_file() else None
