"""What this server's model wrote, by its text: said again as a message, it is the very tokens that were sampled.

Most texts have many spellings in tokens, and a model does not always choose the tokenizer's own. Tokenized anew, such
an answer parts from what the engine's cache holds, and what follows is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

from superinfer.runtime.recent import RecentTexts
from superinfer.runtime.tokenization import Tokenizer

MAX_BYTES = 40 << 20  # of the answers that are kept, with their ids
LOOK_BACK = 256  # characters of a prompt's end, in which a template opens an answer


class Said:
    """Answers and their tokens; the least recently used go first. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, most: int = MAX_BYTES) -> None:
        """most: see RecentTexts."""
        self._tokenizer = tokenizer
        self._known: RecentTexts[tuple[str, str]] = RecentTexts(most)

    def note(self, salt: str, prompt_end: str, ids: Sequence[int], text: str) -> None:
        """The model answered `text` to a prompt, in tokens `ids`. salt: requests of another one do not learn of it.
        prompt_end: at least `LOOK_BACK` characters of the prompt, or all."""
        opened = self._tokenizer.after_special(prompt_end)
        if opened is None or self._tokenizer.decode(ids, skip_special=False) != text:
            return  # cut at a stop string, or with special tokens that the text does not show
        if text:
            tokens = [*self._tokenizer.encode(opened, special=False), *ids] if opened else list(ids)
            self._known.put((salt, opened + text), (salt, opened + text), tokens)

    def encode(self, text: str, salt: str) -> list[int]:
        """Token ids of a rendered chat. Raises like `Tokenizer.encode`."""

        def known(piece: str) -> list[int] | None:
            return self._known.get((salt, piece))

        return self._tokenizer.encode(text, special=False, known=known)
