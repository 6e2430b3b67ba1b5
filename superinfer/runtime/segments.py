"""Token ids of texts that repeat their beginnings: the turns of a chat, the branches of a program.

A tokenizer looks for its special tokens first and splits the text at them; what stands between two of them is tokenized
for itself. So a prompt is cut behind each special token, which is where a chat template ends its messages, and a piece
that was seen before is not tokenized again. Where a tokenizer's pieces may depend on each other none is cut.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from superinfer.runtime.recent import RecentTexts

MAX_BYTES = 40 << 20  # of the pieces that are kept, with their ids

# They look at a piece alone, wherever it stands.
_SAFE_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD"}
_SAFE_SPLITTERS = {"Split", "Digits", "Punctuation", "ByteLevel"}

Encode = Callable[[str], list[int]]
Known = Callable[[str], "list[int] | None"]


class Segments:
    """Pieces of texts and their token ids; the least recently used go first. Safe to use from several threads."""

    def __init__(self, tokens: Mapping[str, bool], most: int = MAX_BYTES) -> None:
        """tokens: the special ones, and whether a piece may end behind each. most: see RecentTexts."""
        self._tokens = tokens
        self._lengths = sorted({len(token) for token in tokens}, reverse=True)  # the longest that stands there is it
        firsts = "".join(sorted({token[0] for token in tokens}))
        self._first = re.compile(f"[{re.escape(firsts)}]")
        self._known: RecentTexts[str] = RecentTexts(most)

    def encode(self, text: str, encode: Encode, known: Known | None = None) -> list[int]:
        """The ids of `text`, by `encode` where a piece is new. known: is asked first, for what stands before a special
        token at which a piece ends. Raises what `encode` raises."""
        ids: list[int] = []
        at = seen = 0  # where the piece begins; up to where all tokens are found
        for found in self._first.finditer(text):
            begin = found.start()
            if begin < seen or (token := self._token_at(text, begin)) is None:
                continue
            seen = begin + len(token)
            if self._tokens[token]:
                if known is not None and begin > at and (found_ids := known(text[at:begin])) is not None:
                    ids += found_ids
                    at = begin
                ids += self._piece(text[at:seen], encode)
                at = seen
        if at < len(text):
            ids += self._piece(text[at:], encode)
        return ids

    def rest(self, text: str) -> str | None:
        """What stands behind the last special token at which a piece ends; None where there is none."""
        at, seen = None, 0
        for found in self._first.finditer(text):
            begin = found.start()
            if begin >= seen and (token := self._token_at(text, begin)) is not None:
                seen = begin + len(token)
                at = seen if self._tokens[token] else at
        return text[at:] if at is not None else None

    def _token_at(self, text: str, begin: int) -> str | None:
        for length in self._lengths:
            if (token := text[begin : begin + length]) in self._tokens:
                return token
        return None

    def _piece(self, piece: str, encode: Encode) -> list[int]:
        ids = self._known.get(piece)
        if ids is None:
            ids = encode(piece)
            self._known.put(piece, (piece,), ids)
        return ids


def segments_of(backend: Any) -> Segments | None:
    """For a tokenizer of the `tokenizers` library; None for one whose pieces may depend on what stands around them."""
    told = json.loads(backend.to_str())
    if not _all_of(told.get("normalizer"), "normalizers", _SAFE_NORMALIZERS):
        return None
    if not _all_of(told.get("pre_tokenizer"), "pretokenizers", _SAFE_SPLITTERS):
        return None
    # Those marked `normalized` are looked for later, within the pieces that these leave.
    tokens = [token for token in told.get("added_tokens") or () if not token["normalized"]]
    if not tokens or any(token["single_word"] for token in tokens):
        return None
    # One that takes the white space behind it reaches beyond its text: no cut there.
    return Segments({token["content"]: not token["rstrip"] for token in tokens if token["content"]})


def _all_of(part: dict[str, Any] | None, parts: str, safe: set[str]) -> bool:
    if part is None:
        return True
    if part["type"] == "Sequence":
        return all(_all_of(one, parts, safe) for one in part[parts])
    return part["type"] in safe and not part.get("add_prefix_space", False)
