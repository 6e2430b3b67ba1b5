"""What the sampler knows of every slot, and one batched sampling step over any of them.

Parameters lie in slot-indexed tensors, written once when a sequence takes its slot and gathered by slot each step; no
step loops over requests. The host keeps only what decides which operations a step needs at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from superinfer.kernels import sampling
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import SlotInit

# Temperatures below this are greedy: dividing by them would overflow float32 for any two different logits.
MIN_TEMPERATURE = 1e-5

TEMPERATURE, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE = range(6)


@dataclass(frozen=True, slots=True)
class Sampled:
    """tokens: [rows] int64. logprobs: rows that asked, each with (chosen, top ids, top logprobs); None: none asked."""

    tokens: torch.Tensor
    logprob_rows: np.ndarray
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None


class SamplingState:
    """Parameters, seeds, output counts and stop ids of all slots."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device) -> None:
        self._vocab = vocab_size
        self._device = device
        self._floats = torch.ones(slots, 6, dtype=torch.float64, device=device)
        self._ints = torch.zeros(slots, 2, dtype=torch.int64, device=device)  # top_k, seed
        self._stop_ids = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._prompt_seen: torch.Tensor | None = None
        self._output_counts: torch.Tensor | None = None

        self._generated = np.zeros(slots, dtype=np.int64)
        self._min_tokens = np.zeros(slots, dtype=np.int64)
        self._greedy = np.zeros(slots, dtype=bool)
        self._filtered = np.zeros(slots, dtype=bool)
        self._penalized = np.zeros(slots, dtype=bool)
        self._top_logprobs = np.full(slots, -1, dtype=np.int64)  # -1: no logprobs wanted

    def start(self, init: SlotInit) -> None:
        """A sequence takes its slot."""
        slot, params = init.slot, init.sampling
        greedy = params.temperature < MIN_TEMPERATURE or params.top_k == 1
        temperature = 1.0 if greedy else params.temperature
        floats = (
            temperature,
            params.top_p,
            params.min_p,
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
        )
        self._floats[slot] = self._upload(np.array(floats, dtype=np.float64))
        self._ints[slot] = self._upload(np.array((min(params.top_k, self._vocab), _as_int64(init.seed))))
        self._generated[slot] = len(init.output)
        self._greedy[slot] = greedy
        self._filtered[slot] = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        self._top_logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._set_stop_ids(slot, init.stop_ids, params.min_tokens)
        self._penalized[slot] = _has_penalties(params)
        if self._penalized[slot]:
            self._count_tokens(init)

    def release(self, slot: int) -> None:
        """The slot is free. Memory for penalties goes when no live slot uses it."""
        self._penalized[slot] = False
        if not self._penalized.any():
            self._prompt_seen = self._output_counts = None

    def _set_stop_ids(self, slot: int, stop_ids: tuple[int, ...], min_tokens: int) -> None:
        ids = [i for i in stop_ids if 0 <= i < self._vocab]
        self._min_tokens[slot] = min_tokens if ids else 0
        if not self._min_tokens[slot]:
            return
        missing = len(ids) - self._stop_ids.shape[1]
        if missing > 0:  # repeating a row's last id bars nothing further
            self._stop_ids = torch.cat((self._stop_ids, self._stop_ids[:, -1:].expand(-1, missing)), dim=1)
        ids += [ids[-1]] * -min(missing, 0)
        self._stop_ids[slot] = self._upload(np.array(ids, dtype=np.int64))

    def _count_tokens(self, init: SlotInit) -> None:
        shape = (len(self._generated), self._vocab)
        if self._prompt_seen is None or self._output_counts is None:
            self._prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        prompt, output = (np.bincount(tokens, minlength=self._vocab) for tokens in (init.prompt, init.output or [0]))
        if not init.output:
            output[0] = 0
        self._prompt_seen[init.slot] = self._upload(prompt > 0)
        self._output_counts[init.slot] = self._upload(output)

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        """On a GPU through pinned memory: a copy from elsewhere would wait for all steps under way."""
        tensor = torch.from_numpy(array)
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def is_plain(self, slots: np.ndarray) -> bool:
        """Whether the next token of every slot is just the largest logit, with nothing to report of it."""
        return bool(
            self._greedy[slots].all()
            and not self._penalized[slots].any()
            and (self._generated[slots] >= self._min_tokens[slots]).all()
            and (self._top_logprobs[slots] < 0).all()
        )

    def advance(self, slots: np.ndarray) -> None:
        """Count one token for each slot that was sampled elsewhere: only right where `is_plain`."""
        self._generated[slots] += 1

    def sample(self, logits: torch.Tensor, slots: np.ndarray) -> Sampled:
        """One token for each row.

        logits: [rows, vocab] float32, left as they are. slots: [rows] int64 on the host, each at most once.
        """
        index = self._upload(slots)
        adjusted = self._bar_stop_ids(self._penalize(logits, slots, index), slots, index)
        drawn = np.flatnonzero(~self._greedy[slots])
        if len(drawn) == len(slots):
            tokens = self._draw(adjusted, slots, index)
        else:
            tokens = adjusted.argmax(dim=-1)
            if len(drawn):
                rows = self._upload(drawn)
                tokens[rows] = self._draw(adjusted[rows], slots[drawn], index[rows])
        self._record(slots, index, tokens)
        return self._with_logprobs(logits, slots, tokens)

    def _penalize(self, logits: torch.Tensor, slots: np.ndarray, index: torch.Tensor) -> torch.Tensor:
        penalized = np.flatnonzero(self._penalized[slots])
        if not len(penalized) or self._prompt_seen is None or self._output_counts is None:
            return logits
        rows = self._upload(penalized)
        who = index[rows]
        floats = self._floats[who].float()
        logits = logits.clone()
        logits[rows] = sampling.penalize(
            logits[rows],
            self._prompt_seen[who],
            self._output_counts[who],
            floats[:, REPETITION],
            floats[:, FREQUENCY],
            floats[:, PRESENCE],
        )
        return logits

    def _bar_stop_ids(self, logits: torch.Tensor, slots: np.ndarray, index: torch.Tensor) -> torch.Tensor:
        early = np.flatnonzero(self._generated[slots] < self._min_tokens[slots])
        if not len(early):
            return logits
        rows = self._upload(early)
        logits = logits.clone()
        logits[rows[:, None], self._stop_ids[index[rows]]] = -torch.inf
        return logits

    def _draw(self, logits: torch.Tensor, slots: np.ndarray, index: torch.Tensor) -> torch.Tensor:
        floats, ints = self._floats[index], self._ints[index]
        scaled = sampling.temper(logits, floats[:, TEMPERATURE].float())
        weights = scaled.exp().double()
        if self._filtered[slots].any():
            top_k, top_p, min_p = ints[:, 0], floats[:, TOP_P], floats[:, MIN_P]
            threshold = sampling.filter_threshold(scaled, weights, top_k, top_p, min_p)
            weights.masked_fill_(scaled < threshold[:, None], 0.0)
        counters = self._upload(self._generated[slots])
        return sampling.draw(weights, sampling.uniform(ints[:, 1], counters))

    def _record(self, slots: np.ndarray, index: torch.Tensor, tokens: torch.Tensor) -> None:
        self._generated[slots] += 1
        penalized = np.flatnonzero(self._penalized[slots])
        if len(penalized) and self._output_counts is not None:
            rows = self._upload(penalized)
            self._output_counts[index[rows], tokens[rows]] += 1

    def _with_logprobs(self, logits: torch.Tensor, slots: np.ndarray, tokens: torch.Tensor) -> Sampled:
        wanted = np.flatnonzero(self._top_logprobs[slots] >= 0)
        if not len(wanted):
            return Sampled(tokens, wanted, None)
        rows = self._upload(wanted)
        most = int(self._top_logprobs[slots].max())
        return Sampled(tokens, wanted, sampling.token_logprobs(logits[rows], tokens[rows], most))

    def top_logprobs(self, slot: int) -> int:
        """How many of the most likely tokens the slot's request wants to see."""
        return int(self._top_logprobs[slot])


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def _as_int64(seed: int) -> int:
    """The int64 with the seed's 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)
