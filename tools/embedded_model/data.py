"""Training batches: dialogues, tokenised and packed into rows, made by worker processes from the batch's number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer

from tools.embedded_model import carry
from tools.embedded_model.dialogue import END_OF_TEXT, Dialogue, render
from tools.embedded_model.tasks import stream

IGNORE, PROMPT, ANSWER = 0, 1, 2  # roles of a target token
Encoded = tuple[list[int], list[int], tuple[list[int], list[int]]]
OPEN_ROWS = 12  # rows that packing keeps open: about 2 % of the tokens end up as padding


@dataclass(frozen=True)
class Batch:
    """int16 tensors of shape [rows, length]: tokens; number of the dialogue in the row; role of the token.

    `carried` [2, rows, length]: the first two tokens of the subject that a value's token should carry (`carry.py`).
    """

    tokens: torch.Tensor
    segments: torch.Tensor
    roles: torch.Tensor
    carried: torch.Tensor

    def pin_memory(self) -> Batch:
        parts = (self.tokens, self.segments, self.roles, self.carried)
        return Batch(*(t.pin_memory() for t in parts))


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
        arrays = np.zeros((5, self.rows, self.length), np.int16)
        source = stream(f"{self.seed}/{i}", focus=self.focus)
        used, segments, row = [0] * self.rows, [0] * self.rows, 0
        closed: set[int] = set()
        misses = 0
        while misses < 40 and row < self.rows:
            for ids, marks, carried in _encode(self.tokenizer, [next(source) for _ in range(32)]):
                fits = [r for r in range(row, min(row + OPEN_ROWS, self.rows)) if used[r] + len(ids) <= self.length]
                if not fits:
                    misses += len(ids) <= self.length
                    continue
                r, n = fits[0], len(ids)
                span = slice(used[r], used[r] + n)
                segments[r] += 1
                arrays[0, r, span], arrays[1, r, span], arrays[2, r, span] = ids, segments[r], marks
                arrays[3:, r, span] = carried
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
        tokens, segments, roles = torch.from_numpy(arrays[:3]).unbind()
        return Batch(tokens, segments, roles, torch.from_numpy(arrays[3:]))


def _encode(tokenizer: Tokenizer, dialogues: list[Dialogue]) -> list[Encoded]:
    """Tokens, roles, carried subjects of each dialogue; raw completions end with the end of text, graded too."""
    pieces = [[*render(d), (END_OF_TEXT, True)] if d.pieces else render(d) for d in dialogues]
    encoded = iter(tokenizer.encode_batch_fast([text for p in pieces for text, _ in p], add_special_tokens=False))
    out = []
    for dialogue, parts in zip(dialogues, pieces, strict=True):
        tokens: list[int] = []
        roles: list[int] = []
        firsts: list[int] = []
        seconds: list[int] = []
        for text, graded in parts:
            ids = next(encoded).ids
            tokens += ids
            roles += [ANSWER if graded else PROMPT] * len(ids)
            lesson = carry.targets(tokenizer, text, len(ids), () if graded else dialogue.stated)
            firsts += lesson[0]
            seconds += lesson[1]
        out.append((tokens, roles, (firsts, seconds)))
    return out
