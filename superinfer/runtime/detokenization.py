"""Text of a growing token sequence, given out as soon as it is certain (a character may span tokens)."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class Detokenizer(Protocol):
    """Of one sequence."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The new text after `token_ids`; "" while a character is incomplete."""
        ...

    def flush(self) -> str:
        """What is left at the end, such as the bytes of a character that was cut off."""
        ...


class LibraryDetokenizer:
    """By the library's own stream, which asks of a decoder that more tokens never change the characters before them."""

    def __init__(self, backend: Tokenizer, skip_special: bool) -> None:
        self._backend = backend
        self._skip_special = skip_special
        self._stream = DecodeStream(skip_special_tokens=skip_special)
        self._ids: list[int] = []
        self._given = 0

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = []
        for token_id in token_ids:
            self._ids.append(token_id)
            piece = self._stream.step(self._backend, token_id)
            if piece:
                pieces.append(piece)
        text = "".join(pieces)
        self._given += len(text)
        return text

    def flush(self) -> str:
        whole = self._backend.decode(self._ids, skip_special_tokens=self._skip_special)
        rest, self._given = whole[self._given :], len(whole)
        return rest


class BytePiece(NamedTuple):
    """What a token stands for: `first` where no text is before it, `later` elsewhere."""

    first: bytes
    later: bytes
    special: bool


class BytePieces:
    """The tokens of a tokenizer that spells what it has no token for in bytes, `<0xE2>`: Llama 2's and Mistral's.

    Its decoder leaves out the space that its encoder puts before a text. It makes every byte of a run of byte tokens a
    replacement character where the run is not UTF-8 as a whole, those of good characters too, which nobody can know
    while a run goes on. So the bytes are put together here, and only those that are part of no character are replaced.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._known: dict[int, BytePiece] = {}
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}

    def piece(self, token_id: int) -> BytePiece:
        """Nothing for an id that the tokenizer has no token for."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._piece(token_id)
        return known

    def _piece(self, token_id: int) -> BytePiece:
        first = self._backend.decode([token_id], skip_special_tokens=False)
        byte = _byte_of(self._backend.id_to_token(token_id))
        if byte is not None:
            return BytePiece(byte if first else b"", byte, token_id in self._special)
        twice = self._backend.decode([token_id, token_id], skip_special_tokens=False)
        return BytePiece(first.encode(), twice[len(first) :].encode(), token_id in self._special)


class ByteDetokenizer:
    """Of a tokenizer that has `BytePieces`. begun: text is before it."""

    def __init__(self, pieces: BytePieces, skip_special: bool, begun: bool) -> None:
        self._pieces = pieces
        self._skip_special = skip_special
        self._begun = begun
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Sequence[int]) -> str:
        text = b""
        for token_id in token_ids:
            piece = self._pieces.piece(token_id)
            if piece.special and self._skip_special:
                continue
            text += piece.later if self._begun else piece.first
            self._begun = self._begun or bool(piece.later)
        return self._characters.decode(text)

    def flush(self) -> str:
        return self._characters.decode(b"", final=True)


def byte_pieces_of(backend: Tokenizer) -> BytePieces | None:
    """None for a tokenizer that does not fall back to bytes."""
    if backend.decoder is None:
        return None
    told = json.loads(backend.decoder.__getstate__())
    return BytePieces(backend) if _has(told, "ByteFallback") else None


def _has(decoder: dict[str, Any], kind: str) -> bool:
    return decoder["type"] == kind or any(_has(part, kind) for part in decoder.get("decoders", ()))


def _byte_of(token: str | None) -> bytes | None:
    if token is not None and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            return None
    return None
