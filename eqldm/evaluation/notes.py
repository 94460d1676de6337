"""What a reader of the report must know besides figures."""

from __future__ import annotations


class Notes(list[str]):
    """Sentences, each once."""

    def add(self, text: str) -> None:
        """Adds a sentence, unless it is there."""
        if text not in self:
            self.append(text)
