"""What the sampler knows of every slot, and one batched sampling step over any of them.

Parameters lie in slot-indexed tensors, written once when a sequence takes its slot and gathered by slot each step; no
step loops over requests. The host keeps only what decides which operations a step needs at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from superinfer.kernels import sampling
from superinfer.runtime.engine.constraints import Constraints
from superinfer.runtime.engine.grammar import GrammarCompiler
from superinfer.runtime.engine.staging import HostStage
from superinfer.runtime.engine.token_limits import TokenLimits
from superinfer.runtime.protocol import SamplingParams
from superinfer.runtime.scheduler.plan import SlotInit

# Temperatures below this are greedy: dividing by them would overflow float32 for any two different logits.
MIN_TEMPERATURE = 1e-5

# What a slot's request needs beyond an argmax. A step does only what some row of it needs.
DRAWN, FILTERED, PENALIZED, BARRED, LOGPROBS, BIASED, CONSTRAINED, LIMITED = 1, 2, 4, 8, 16, 32, 64, 128

TEMPERATURE, TOP_P, MIN_P, REPETITION, FREQUENCY, PRESENCE = range(6)


@dataclass(frozen=True, slots=True)
class Sampled:
    """tokens: [rows] int64, all of them ids. told: the same in host memory, once the step is over, but NO_TOKEN in rows
    whose logits are no numbers; None where this is still to be found out. index: the rows' slots, beside the tokens,
    where they had to be sent there. logprobs: (chosen, top ids, top logprobs) of the
    rows that asked, which logprob_rows lists; None where none did. forced: by slot, what a grammar forces, if this step
    found it: the sampled token first."""

    tokens: torch.Tensor
    told: torch.Tensor | None = None
    index: torch.Tensor | None = None
    logprob_rows: np.ndarray | None = None
    logprobs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    forced: dict[int, tuple[int, ...]] = field(default_factory=dict)


class SamplingState:
    """Parameters, seeds, output counts, biases, limits and stop ids of all slots."""

    def __init__(
        self, slots: int, vocab_size: int, device: torch.device, grammars: GrammarCompiler | None = None,
        stage: HostStage | None = None,
    ) -> None:  # fmt: skip
        """grammars: of the model; without them no request may have one. stage: of the executor; None for a CPU's."""
        self._vocab = vocab_size
        self._device = device
        self._to_device = (stage or HostStage(device)).to_device
        self._floats = torch.ones(slots, 6, dtype=torch.float64, device=device)
        self._top_k = torch.zeros(slots, dtype=torch.int64, device=device)
        self._stop_ids = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._never = torch.full((), -torch.inf, device=device)  # as a number it would be copied and waited for
        self._bias_ids = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self._biases = torch.zeros(slots, 1, dtype=torch.float32, device=device)
        self._constraints = Constraints(slots, device, grammars, self._to_device) if grammars is not None else None
        self._limits = TokenLimits(slots, vocab_size, device, self._to_device)
        self._prompt_seen: torch.Tensor | None = None
        self._output_counts: torch.Tensor | None = None

        self._generated = np.zeros(slots, dtype=np.int64)
        self._prompt = np.zeros(slots, dtype=np.int64)
        self._seeds = np.zeros(slots, dtype=np.uint64)
        self._min_tokens = np.zeros(slots, dtype=np.int64)
        self._top_logprobs = np.zeros(slots, dtype=np.int64)
        self._temperatures = np.ones(slots, dtype=np.float32)
        self._needs = np.zeros(slots, dtype=np.int64)

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
        self._floats[slot] = self._to_device(np.array(floats))
        self._top_k[slot].fill_(min(params.top_k, self._vocab))  # assigned, it would be copied, and waited for
        self._temperatures[slot] = temperature
        self._seeds[slot] = init.seed % (1 << 64)
        self._generated[slot] = len(init.output)
        self._prompt[slot] = len(init.prompt)
        self._top_logprobs[slot] = params.logprobs or 0
        self._set_stop_ids(slot, init.stop_ids, params.min_tokens)
        self._needs[slot] = (
            DRAWN * (not greedy)
            | FILTERED * (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)
            | PENALIZED * _has_penalties(params)
            | BARRED * bool(self._min_tokens[slot])
            | LOGPROBS * (params.logprobs is not None)
            | BIASED * bool(params.logit_bias)
            | CONSTRAINED * (params.grammar is not None)
            | LIMITED * self._limits.start(slot, params, init.output)
        )
        if params.logit_bias:
            self._set_biases(slot, params.logit_bias)
        if params.grammar is not None:
            assert self._constraints is not None, "a grammar came to an executor without grammars"
            # Whoever asks how likely each token was has it sampled, and so has who weighs some of them otherwise.
            self._constraints.start(init, jumps=not self._needs[slot] & (LOGPROBS | PENALIZED | BIASED))
        if self._needs[slot] & PENALIZED:
            self._count_tokens(init)

    def release(self, slot: int) -> None:
        """The slot is free. Memory for penalties goes when no live slot uses it."""
        self._needs[slot] = 0
        self._limits.release(slot)
        if self._constraints is not None:
            self._constraints.release(slot)
        if self._output_counts is not None and not (self._needs & PENALIZED).any():
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
        self._stop_ids[slot] = self._to_device(np.array(ids))

    def _set_biases(self, slot: int, pairs: tuple[tuple[int, float], ...]) -> None:
        missing = len(pairs) - self._bias_ids.shape[1]
        if missing > 0:  # a bias of 0 changes nothing
            self._bias_ids = torch.nn.functional.pad(self._bias_ids, (0, missing))
            self._biases = torch.nn.functional.pad(self._biases, (0, missing))
        ids, biases = (
            np.zeros(self._bias_ids.shape[1], dtype=np.int64),
            np.zeros(self._biases.shape[1], dtype=np.float32),
        )
        ids[: len(pairs)], biases[: len(pairs)] = zip(*pairs, strict=True)
        self._bias_ids[slot], self._biases[slot] = self._to_device(ids), self._to_device(biases)

    def _count_tokens(self, init: SlotInit) -> None:
        shape = (len(self._generated), self._vocab)
        if self._prompt_seen is None or self._output_counts is None:
            self._prompt_seen = torch.zeros(shape, dtype=torch.bool, device=self._device)
            self._output_counts = torch.zeros(shape, dtype=torch.int32, device=self._device)
        prompt, output = (np.bincount(tokens, minlength=self._vocab) for tokens in (init.prompt, init.output or [0]))
        if not init.output:
            output[0] = 0
        self._prompt_seen[init.slot] = self._to_device(prompt > 0)
        self._output_counts[init.slot] = self._to_device(output)

    def is_plain(self, slots: np.ndarray) -> bool:
        """Whether the next token of every slot is the largest logit, with nothing to heed and nothing to report."""
        needs = int(np.bitwise_or.reduce(self._needs[slots], initial=0))
        return needs in (0, FILTERED)  # filters never remove the largest

    def advance(self, slots: np.ndarray) -> None:
        """Count a token for each slot whose token was picked elsewhere: right only where `is_plain`."""
        self._generated[slots] += 1

    def caught_up(self, slot: int, length: int) -> None:
        """The slot computes tokens that were given to it, up to its `length`, and samples the one behind them. There
        may be tokens among them that it has not sampled: forced ones."""
        self._generated[slot] = length - self._prompt[slot]
        if self._constraints is not None:
            self._constraints.caught_up(slot)

    def sample(self, logits: torch.Tensor, slots: np.ndarray) -> Sampled:
        """One token for each row.

        logits: [rows, vocab], any float type, left as they are. slots: [rows] int64 on the host, each at most once.
        Whether they are numbers is known of the logits as they are, whatever is masked of them.
        """
        row_needs = self._needs[slots]
        needs = int(np.bitwise_or.reduce(row_needs))
        if logits.is_cuda and (row_needs == DRAWN).all():  # spares the copy to float32
            told = torch.empty(len(slots), dtype=torch.int64, pin_memory=True)
            tokens = self._draw_unfiltered(logits, slots, told)
            self._generated[slots] += 1
            return Sampled(tokens, told)
        index = self._to_device(slots)
        given = logits
        largest = None if logits.is_cuda else logits.amax(dim=-1)  # NaN where any is
        adjusted = logits = logits.float()
        if needs & BIASED:
            adjusted = self._bias(adjusted, index, _rows(row_needs, BIASED))
        if needs & PENALIZED:
            adjusted = self._penalize(adjusted, index, _rows(row_needs, PENALIZED))
        if needs & BARRED:
            adjusted = self._bar_stop_ids(adjusted, index, slots)
        if needs & LIMITED:
            adjusted = self._limits.apply(adjusted, slots, _rows(row_needs, LIMITED))
        forced: dict[int, tuple[int, ...]] = {}
        if needs & CONSTRAINED:
            if adjusted is given or (needs & LOGPROBS and adjusted is logits):  # masked in place, and wanted as it is
                adjusted = adjusted.clone()
            assert self._constraints is not None
            self._constraints.mask(adjusted, slots, _rows(row_needs, CONSTRAINED))
            forced = self._constraints.forced
        if not needs & DRAWN:
            tokens = adjusted.argmax(dim=-1)
        elif (row_needs & DRAWN).all():
            tokens = self._draw(adjusted, slots, index)
        else:
            tokens = adjusted.argmax(dim=-1)
            drawn = _rows(row_needs, DRAWN)
            rows = self._to_device(drawn)
            tokens[rows] = self._draw(adjusted[rows], slots[drawn], index[rows])
        self._generated[slots] += 1
        if needs & LIMITED:
            self._limits.sampled(tokens, slots, _rows(row_needs, LIMITED))
        if needs & PENALIZED and self._output_counts is not None:
            rows = self._to_device(_rows(row_needs, PENALIZED))
            self._output_counts[index[rows], tokens[rows]] += 1
        known = None if largest is None else torch.where(largest.isfinite(), tokens, sampling.NO_TOKEN)
        if not needs & LOGPROBS:
            return Sampled(tokens, known, index, forced=forced)
        wanted = _rows(row_needs, LOGPROBS)
        rows, most = self._to_device(wanted), int(self._top_logprobs[slots].max())
        return Sampled(tokens, known, index, wanted, sampling.token_logprobs(logits[rows], tokens[rows], most), forced)

    def told(self, slots: np.ndarray, read: Callable[[], list[int]]) -> None:
        """The tokens that `sample` picked for these slots can be had from `read`, once they are known: NO_TOKEN where
        the logits were no numbers."""
        rows = _rows(self._needs[slots], CONSTRAINED)
        if len(rows):
            assert self._constraints is not None
            self._constraints.sampled(slots, rows, read)

    def _bias(self, logits: torch.Tensor, index: torch.Tensor, biased: np.ndarray) -> torch.Tensor:
        rows = self._to_device(biased)
        who = index[rows]
        logits = logits.clone()
        logits[rows] = logits[rows].scatter_add_(1, self._bias_ids[who], self._biases[who])
        return logits

    def _penalize(self, logits: torch.Tensor, index: torch.Tensor, penalized: np.ndarray) -> torch.Tensor:
        assert self._prompt_seen is not None and self._output_counts is not None
        rows = self._to_device(penalized)
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

    def _bar_stop_ids(self, logits: torch.Tensor, index: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        rows = self._to_device(np.flatnonzero(self._generated[slots] < self._min_tokens[slots]))
        logits = logits.clone()
        logits[rows[:, None], self._stop_ids[index[rows]]] = self._never
        return logits

    def _draw(self, logits: torch.Tensor, slots: np.ndarray, index: torch.Tensor) -> torch.Tensor:
        filtered = (self._needs[slots] & FILTERED) > 0
        if not logits.is_cuda or filtered.all():
            return self._draw_filtered(logits, slots, index)
        if not filtered.any():
            return self._draw_unfiltered(logits, slots)
        # Rounding differs: which way a row goes is its own matter, not that of whom it shares a batch with.
        tokens = torch.empty(len(slots), dtype=torch.int64, device=logits.device)
        rows, others = self._to_device(np.flatnonzero(filtered)), self._to_device(np.flatnonzero(~filtered))
        tokens[rows] = self._draw_filtered(logits[rows], slots[filtered], index[rows])
        tokens[others] = self._draw_unfiltered(logits[others], slots[~filtered])
        return tokens

    def _draw_filtered(self, logits: torch.Tensor, slots: np.ndarray, index: torch.Tensor) -> torch.Tensor:
        floats = self._floats[index]
        scaled = sampling.temper(logits, floats[:, TEMPERATURE].float())
        weights = scaled.exp().double()
        if (self._needs[slots] & FILTERED).any():
            top_k, top_p, min_p = self._top_k[index], floats[:, TOP_P], floats[:, MIN_P]
            threshold = sampling.filter_threshold(scaled, weights, top_k, top_p, min_p)
            weights.masked_fill_(scaled < threshold[:, None], 0.0)
        return sampling.draw(weights, self._to_device(self._uniforms(slots)))

    def _draw_unfiltered(
        self, logits: torch.Tensor, slots: np.ndarray, told: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`_draw` on a GPU, of rows without filters. told: as `drawing.draw` fills it."""
        from superinfer.kernels import drawing  # needs triton, which comes with CUDA builds of torch

        temperatures = self._to_device(self._temperatures[slots])
        return drawing.draw(logits, temperatures, self._to_device(self._uniforms(slots)), told)

    def _uniforms(self, slots: np.ndarray) -> np.ndarray:
        return sampling.uniform(self._seeds[slots], self._generated[slots].astype(np.uint64))

    def top_logprobs(self, slot: int) -> int:
        """How many of the most likely tokens the slot's request wants to see."""
        return int(self._top_logprobs[slot])


def _rows(row_needs: np.ndarray, need: int) -> np.ndarray:
    return np.flatnonzero(row_needs & need)


def _has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0
