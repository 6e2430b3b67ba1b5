"""What this server's model wrote, by its text: said again as a message, it is the very tokens that were sampled.

Most texts have many spellings in tokens, and a model does not always choose the tokenizer's own. Tokenized anew, such
an answer parts from what the engine's cache holds, and what follows is computed again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from superinfer.runtime.tokenization import Tokenizer

MAX_CHARACTERS = 8 << 20  # of the answers that are kept: with their ids about 40 MiB
LOOK_BACK = 256  # characters of a prompt's end, in which a template opens an answer


class Said:
    """Answers and their tokens; the least recently used go first. Safe to use from several threads."""

    def __init__(self, tokenizer: Tokenizer, most: int = MAX_CHARACTERS) -> None:
        self._tokenizer, self._most = tokenizer, most
        self._known: dict[tuple[str, str], list[int]] = {}
        self._held = 0
        self._lock = threading.Lock()

    def note(self, salt: str, prompt_end: str, ids: Sequence[int], text: str) -> None:
        """The model answered `text` to a prompt, in tokens `ids`. salt: requests of another one do not learn of it.
        prompt_end: at least `LOOK_BACK` characters of the prompt, or all."""
        opened = self._tokenizer.after_special(prompt_end)
        if opened is None or self._tokenizer.decode(ids, skip_special=False) != text:
            return  # cut at a stop string, or with special tokens that the text does not show
        key, size = (salt, opened + text), len(opened) + len(text)
        if not text or size > self._most // 8:
            return
        tokens = [*self._tokenizer.encode(opened, special=False), *ids] if opened else list(ids)
        with self._lock:
            if self._known.pop(key, None) is None:
                self._held += size
            self._known[key] = tokens
            while self._held > self._most:
                oldest = next(iter(self._known))
                del self._known[oldest]
                self._held -= len(oldest[1])

    def encode(self, text: str, salt: str) -> list[int]:
        """Token ids of a rendered chat. Raises like `Tokenizer.encode`."""

        def known(piece: str) -> list[int] | None:
            with self._lock:
                ids = self._known.pop((salt, piece), None)
                if ids is not None:
                    self._known[salt, piece] = ids
                return ids

        return self._tokenizer.encode(text, special=False, known=known)
