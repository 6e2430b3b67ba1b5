"""What a slot's request limits its tokens to: the only ones allowed, and bad words, whose last token is barred behind
the others.

All that a step needs lies on the device, the last tokens of each output too, so that no step waits for the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from superinfer.kernels.sampling import bar_words
from superinfer.runtime.protocol import SamplingParams

# In place of a word's earlier tokens. ANY: it has none there. NEVER: there is no such word.
ANY, NEVER = -1, -2
NOTHING = -3  # in place of an output's token: there is none yet


class TokenLimits:
    """Of all slots. Memory is taken when the first slot needs it, and goes when none does."""

    def __init__(
        self, slots: int, vocab_size: int, device: torch.device, to_device: Callable[[np.ndarray], torch.Tensor]
    ) -> None:
        self._shape = slots, vocab_size
        self._device = device
        self._to_device = to_device
        self._listed = np.zeros(slots, dtype=bool)  # slots with allowed_token_ids
        self._worded = np.zeros(slots, dtype=bool)  # slots with bad_words
        self._allowed: torch.Tensor | None = None  # [slots, vocab] bool
        self._words: _Words | None = None

    def start(self, slot: int, params: SamplingParams, output: Sequence[int]) -> bool:
        """A sequence that has generated `output` takes its slot. Whether it limits tokens at all."""
        self._listed[slot] = params.allowed_token_ids is not None
        self._worded[slot] = bool(params.bad_words)
        if params.allowed_token_ids is not None:
            if self._allowed is None:
                self._allowed = torch.ones(self._shape, dtype=torch.bool, device=self._device)
            allowed = np.zeros(self._shape[1], dtype=bool)
            allowed[list(params.allowed_token_ids)] = True
            self._allowed[slot] = self._to_device(allowed)
        if params.bad_words:
            if self._words is None:
                self._words = _Words(self._shape[0], self._device)
            self._words.set(slot, params.bad_words, output, self._to_device)
        return bool(self._listed[slot] or self._worded[slot])

    def release(self, slot: int) -> None:
        """The slot is free, whether it limited tokens or not."""
        self._listed[slot] = self._worded[slot] = False
        if self._allowed is not None and not self._listed.any():
            self._allowed = None
        if self._words is not None and not self._worded.any():
            self._words = None

    def apply(self, logits: torch.Tensor, slots: np.ndarray, rows: np.ndarray) -> torch.Tensor:
        """New logits, [rows, vocab] float32, without what may not come. slots: of all rows. rows: those with limits."""
        logits = logits.clone()
        listed = rows[self._listed[slots[rows]]]
        if len(listed):
            assert self._allowed is not None
            at = self._to_device(listed)
            barred = ~self._allowed[self._to_device(slots[listed])]
            logits[at] = logits[at].masked_fill_(barred, -torch.inf)
        worded = rows[self._worded[slots[rows]]]
        if len(worded):
            assert self._words is not None
            at, who = self._to_device(worded), self._to_device(slots[worded])
            words = self._words
            logits[at] = bar_words(logits[at], words.before[who], words.last[who], words.output[who])
        return logits

    def sampled(self, tokens: torch.Tensor, slots: np.ndarray, rows: np.ndarray) -> None:
        """These rows have been given these tokens. tokens: [rows] int64, of all rows."""
        worded = rows[self._worded[slots[rows]]]
        if len(worded):
            assert self._words is not None
            at, who = self._to_device(worded), self._to_device(slots[worded])
            new = tokens[at].to(torch.int32)[:, None]
            self._words.output[who] = torch.cat((self._words.output[who, 1:], new), dim=1)


class _Words:
    """Bad words of all slots, padded to the longest and the most.

    before: [slots, words, earlier tokens] int32, right-aligned. last: [slots, words] int64. output: [slots, earlier
    tokens] int32, the last ones generated.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.before = torch.full((slots, 1, 1), NEVER, dtype=torch.int32, device=device)
        self.last = torch.zeros((slots, 1), dtype=torch.int64, device=device)
        self.output = torch.full((slots, 1), NOTHING, dtype=torch.int32, device=device)

    def set(
        self,
        slot: int,
        words: Sequence[Sequence[int]],
        output: Sequence[int],
        to_device: Callable[[np.ndarray], torch.Tensor],
    ) -> None:
        self._grow(len(words), max(map(len, words)) - 1)
        count, earlier = self.before.shape[1:]
        before = np.full((count, earlier), NEVER, dtype=np.int32)
        last = np.zeros(count, dtype=np.int64)
        for at, word in enumerate(words):
            before[at] = [ANY] * (earlier - len(word) + 1) + list(word[:-1])
            last[at] = word[-1]
        recent = list(output[-earlier:])
        told = np.array([NOTHING] * (earlier - len(recent)) + recent, dtype=np.int32)
        self.before[slot], self.last[slot], self.output[slot] = to_device(before), to_device(last), to_device(told)

    def _grow(self, words: int, earlier: int) -> None:
        more, longer = max(0, words - self.before.shape[1]), max(0, earlier - self.before.shape[2])
        pad = torch.nn.functional.pad
        # A word that is padded in front was shorter than all there were, or there was none: NEVER stays behind.
        self.before = pad(pad(self.before, (longer, 0), value=ANY), (0, 0, 0, more), value=NEVER)
        self.last = pad(self.last, (0, more))
        self.output = pad(self.output, (longer, 0), value=NOTHING)
