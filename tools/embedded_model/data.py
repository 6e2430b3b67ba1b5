"""Training batches: dialogues, tokenised and packed into rows, made by worker processes from the batch's number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from tools.embedded_model.dialogue import END_OF_TEXT, render
from tools.embedded_model.tasks import stream

IGNORE, PROMPT, ANSWER = 0, 1, 2  # roles of a target token
OPEN_ROWS = 12  # rows that packing keeps open: about 2 % of the tokens end up as padding


@dataclass(frozen=True)
class Batch:
    """int16 tensors of shape [rows, length]: tokens; number of the dialogue in the row; role of the token."""

    tokens: torch.Tensor
    segments: torch.Tensor
    roles: torch.Tensor

    def pin_memory(self) -> Batch:
        return Batch(self.tokens.pin_memory(), self.segments.pin_memory(), self.roles.pin_memory())


class Batches(torch.utils.data.Dataset[Batch]):
    """Batch `i` depends on (seed, i) alone, so the data do not depend on how many workers make them."""

    def __init__(self, tokenizer_file: str, seed: int, count: int, rows: int, length: int, focus: float = 0.0) -> None:
        self.focus = focus
        self.tokenizer_file, self.seed, self.count, self.rows, self.length = (
            tokenizer_file,
            seed,
            count,
            rows,
            length,
        )
        self.tokenizer: Tokenizer | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Batch:
        if self.tokenizer is None:  # one for each worker process
            self.tokenizer = Tokenizer.from_file(self.tokenizer_file)
        arrays = np.zeros((3, self.rows, self.length), np.int16)
        source = stream(f"{self.seed}/{i}", focus=self.focus)
        used, segments, row = [0] * self.rows, [0] * self.rows, 0
        closed: set[int] = set()
        misses = 0
        while misses < 40 and row < self.rows:
            for tokens, roles in _encode(self.tokenizer, [next(source) for _ in range(32)]):
                fits = [r for r in range(row, min(row + OPEN_ROWS, self.rows)) if used[r] + len(tokens) <= self.length]
                if not fits:
                    misses += len(tokens) <= self.length
                    continue
                r, n = fits[0], len(tokens)
                span = slice(used[r], used[r] + n)
                segments[r] += 1
                arrays[0, r, span], arrays[1, r, span], arrays[2, r, span] = tokens, segments[r], roles
                used[r] += n
                if used[r] > self.length - 24:
                    closed.add(r)
                while row in closed:
                    row += 1
            if row + OPEN_ROWS < self.rows and misses > 8:  # the open rows are nearly full: give one up
                closed.add(row)
                misses = 0
                while row in closed:
                    row += 1
        return Batch(*(torch.from_numpy(a) for a in arrays))


def _encode(tokenizer: Tokenizer, dialogues: list) -> list[tuple[list[int], list[int]]]:  # type: ignore[type-arg]
    """Tokens and roles of each dialogue; raw completions end with the end of text, which is graded too."""
    pieces = [[*render(d), (END_OF_TEXT, True)] if d.pieces else render(d) for d in dialogues]
    encoded = iter(tokenizer.encode_batch_fast([text for p in pieces for text, _ in p], add_special_tokens=False))
    out = []
    for parts in pieces:
        tokens: list[int] = []
        roles: list[int] = []
        for _, graded in parts:
            ids = next(encoded).ids
            tokens += ids
            roles += [ANSWER if graded else PROMPT] * len(ids)
        out.append((tokens, roles))
    return out
