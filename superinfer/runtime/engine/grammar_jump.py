"""The tokens of a text that a grammar forces, as the model's tokenizer would write it. See docs/constrained.md."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xgrammar

TAIL = 8  # tokens before, in whose company a forced text is tokenized
LEAST = 3  # tokens: a shorter text is sampled as quickly
LEAST_BYTES = 4


class Retokenizer:
    """Tokenizes forced texts of one vocabulary."""

    def __init__(self, path: str, info: xgrammar.TokenizerInfo) -> None:
        """path: folder of the checkpoint. Slow: reads the tokenizer."""
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(os.path.join(path, "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        special = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes = [b"" if i in special else text for i, text in enumerate(info.decoded_vocab)]

    def forced(self, matcher: xgrammar.GrammarMatcher, tail: Sequence[int]) -> list[int]:
        """Tokens that must follow `tail`, the last ones generated, and that no text behind them would change. The
        matcher has accepted them. Empty where there are fewer than LEAST."""
        try:
            text = matcher.find_jump_forward_string()
        except UnicodeDecodeError:  # it ends within a character
            return []
        if len(text) < LEAST_BYTES:
            return []
        tokens = self.tokens(text, tail)
        if len(tokens) < LEAST:
            return []
        for done, token in enumerate(tokens):
            if not matcher.accept_token(token):
                matcher.rollback(done)
                return []
        return tokens

    def tokens(self, text: str, tail: Sequence[int]) -> list[int]:
        """The tokens of `text` behind `tail`, but for those of its last word: what follows may join it.

        Empty where the tokenizer has no token that begins where the text does, as with a word begun before it.
        """
        before = b"".join(self._bytes[token] for token in tail)
        start = 0
        while start < len(before) and before[start] & 0xC0 == 0x80:  # the rest of a character begun before
            start += 1
        try:
            shown = before[start:].decode()
        except UnicodeDecodeError:
            return []
        encoding = self._tokenizer.encode(shown + text, add_special_tokens=False)
        ids, words = encoding.ids, encoding.word_ids
        if max(ids, default=0) >= len(self._bytes):  # the model has fewer tokens than its tokenizer
            return []
        border, at, first = len(before) - start, 0, 0
        while at < border and first < len(ids):
            at += len(self._bytes[ids[first]])
            first += 1
        if at != border:
            return []
        last = first
        while last < len(ids) and words[last] is not None and words[last] != words[-1]:
            last += 1
        found = ids[first:last]
        return found if text.encode().startswith(b"".join(self._bytes[token] for token in found)) else []
