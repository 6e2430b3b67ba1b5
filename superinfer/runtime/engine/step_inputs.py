"""A StepPlan's work as index tensors: assembled once per step with numpy, the same for every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from superinfer.kernels.attention import AttentionGroup
from superinfer.runtime.scheduler.plan import SlotWork

# Decodes of similar length share one attention call as long as what it gathers stays in a core's cache: measured on
# CPU, calls over 1 MiB are slower than the same work in several.
GROUP_BYTES = 1 << 20
# Blocks a sequence from which on block lists are copied one by one rather than picked by a mask.
COPIED_LISTS = 64


class BlockTables:
    """The KV blocks of every slot, on the host."""

    def __init__(
        self, slots: int, blocks_per_slot: int, num_blocks: int, rows_per_block: int, keep_changes: bool = False
    ) -> None:
        """rows_per_block: distance of two blocks' first rows, layers · 2 · page. keep_changes: for `take_changes`."""
        self._changes: dict[int, int] | None = {} if keep_changes else None  # place in the flat table -> block
        self._blocks = np.zeros((slots, blocks_per_slot), dtype=np.int32)
        self._used = np.zeros(slots, dtype=np.int64)
        self._num_blocks = num_blocks
        self._rows_per_block = rows_per_block

    def clear(self, slot: int) -> None:
        self._used[slot] = 0

    def append(self, slot: int, blocks: Sequence[int]) -> None:
        """Raises ValueError for block ids the pool does not have, or more blocks than the longest sequence needs."""
        if not blocks:
            return
        used = int(self._used[slot])
        if used + len(blocks) > self._blocks.shape[1]:
            raise ValueError(f"slot {slot} would hold {used + len(blocks)} blocks; {self._blocks.shape[1]} is the most")
        if min(blocks) < 0 or max(blocks) >= self._num_blocks:
            raise ValueError(f"block ids {blocks} are not within 0..{self._num_blocks - 1}")
        self._blocks[slot, used : used + len(blocks)] = blocks
        self._used[slot] += len(blocks)
        if self._changes is not None:
            first = slot * self._blocks.shape[1] + used
            self._changes.update(zip(range(first, first + len(blocks)), blocks, strict=True))

    def extend(self, work: Sequence[SlotWork]) -> None:
        """Append each work's new blocks to its slot, as `grow`."""
        self.grow([(w.slot, w.new_blocks) for w in work])

    def grow(self, grown: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Append blocks to slots. What raises, as `append` does, keeps none of the others back."""
        single = [(slot, blocks[0]) for slot, blocks in grown if len(blocks) == 1]
        if len(single) > 1:
            slots, blocks = np.array(single).T
            used = self._used[slots]
            if used.max() < self._blocks.shape[1] and blocks.min() >= 0 and blocks.max() < self._num_blocks:
                self._blocks[slots, used] = blocks
                self._used[slots] = used + 1
                if self._changes is not None:
                    places = slots * self._blocks.shape[1] + used
                    self._changes.update(zip(places.tolist(), blocks.tolist(), strict=True))
                grown = [(slot, more) for slot, more in grown if len(more) > 1]
        failure: ValueError | None = None
        for slot, more in grown:
            try:
                self.append(slot, more)
            except ValueError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    @property
    def num_changes(self) -> int:
        return len(self._changes or ())

    def take_changes(self) -> tuple[np.ndarray, np.ndarray]:
        """(places in the flat table [slots · blocks_per_slot], the blocks that came there) since the last call, each
        place once."""
        changes = self._changes or {}
        places = np.fromiter(changes, dtype=np.int64, count=len(changes))
        blocks = np.fromiter(changes.values(), dtype=np.int64, count=len(changes))
        changes.clear()
        return places, blocks

    def whole(self) -> np.ndarray:
        """[slots, blocks_per_slot] int32; what lies behind a slot's blocks means nothing."""
        return self._blocks

    def check(self, slots: np.ndarray, ends: np.ndarray, page: int) -> None:
        """Raises ValueError where a slot's blocks do not reach `ends` tokens: writing there would hit foreign KV."""
        short = self._used[slots] * page < ends
        if short.any():
            slot, end = slots[short][0], ends[short][0]
            raise ValueError(f"slot {slot} computes up to position {end} with only {self._used[slot]} blocks of {page}")

    def rows(self, slots: np.ndarray, length: int, page: int) -> np.ndarray:
        """[slots, length] cache rows of positions 0 .. length - 1."""
        first = self._blocks[slots, : (length - 1) // page + 1].astype(np.int64) * self._rows_per_block
        rows = first[:, :, None] + np.arange(page)
        return rows.reshape(len(slots), -1)[:, :length]

    def ragged(self, slots: np.ndarray, counts: np.ndarray, out: np.ndarray) -> None:
        """Write the first counts[i] block ids of each slot, one slot after another, to `out`, [sum of counts] int32."""
        if len(out) > COPIED_LISTS * len(slots):
            np.concatenate(
                [row[:count] for row, count in zip(self._blocks[slots], counts.tolist(), strict=True)], out=out
            )
        elif len(slots):
            entries = self._blocks[slots, : int(counts.max())]
            np.compress((np.arange(entries.shape[1]) < counts[:, None]).ravel(), entries.ravel(), out=out)

    def rows_at(self, slots: np.ndarray, positions: np.ndarray, page: int) -> np.ndarray:
        """[tokens] cache row of each (slot, position)."""
        first = self._blocks[slots, positions // page].astype(np.int64) * self._rows_per_block
        rows: np.ndarray = first + positions % page
        return rows


class Wanted(NamedTuple):
    """The rows of a step whose hidden states are needed. rows: int64, the last of each work that samples, then those
    that scores are read from. sampled, scored: places of these works among all."""

    rows: np.ndarray
    sampled: list[int]
    scored: list[int]


def wanted_rows(work: Sequence[SlotWork], last_rows: np.ndarray) -> Wanted:
    """last_rows: [work], the row of each one's last token. What both samples and scores has its last row twice."""
    sampled = [i for i, one in enumerate(work) if one.sample]
    scored = [i for i, one in enumerate(work) if one.score]
    judged = [last_rows[i] + 1 + np.arange(-len(work[i].score), 0) for i in scored]
    return Wanted(np.concatenate([last_rows[sampled], *judged]).astype(np.int64), sampled, scored)


@dataclass(slots=True)
class StepInputs:
    """One step's inputs. Rows are in the order of `work`, which is not the plan's: single tokens first, by length.

    ids, positions, key_index, value_index: [tokens] int64 on the device. ids of decodes are 0 until filled in.
    continued: rows and their slots whose token is the one sampled last in the slot; None when there are none.
    groups: by layer, attention calls that cover the rows in order.
    last_rows: the row of each work's last token.
    """

    work: list[SlotWork]
    ids: torch.Tensor
    positions: torch.Tensor
    key_index: torch.Tensor
    value_index: torch.Tensor
    continued: tuple[torch.Tensor, torch.Tensor] | None
    groups: list[list[AttentionGroup]]
    last_rows: np.ndarray

    def wanted(self) -> Wanted:
        """Whose hidden states the step is computed for."""
        return wanted_rows(self.work, self.last_rows)


class StepAssembler:
    """Turns work into StepInputs for one cache and device."""

    def __init__(
        self,
        tables: BlockTables,
        page: int,
        token_bytes: int,
        windows: Sequence[int | None],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """token_bytes: key and value of one token in one layer. windows: by layer, as in ModelConfig.
        dtype: of attention masks, the model's."""
        self._tables = tables
        self._page = page
        self._windows = windows
        self._dtype = dtype
        self._device = device
        self._group_tokens = max(1, GROUP_BYTES // token_bytes)

    def assemble(self, work: Sequence[SlotWork]) -> StepInputs:
        """Raises ValueError where a slot's blocks do not cover its work."""
        singles = sorted((w for w in work if w.length == 1), key=lambda w: w.start)
        chunks = [w for w in work if w.length > 1]
        ordered = singles + chunks
        lengths = np.array([w.length for w in ordered], dtype=np.int64)
        slots = np.array([w.slot for w in ordered], dtype=np.int64)
        starts = np.array([w.start for w in ordered], dtype=np.int64)
        ends = starts + lengths
        self._tables.check(slots, ends, self._page)

        last_rows = np.cumsum(lengths) - 1
        token_slots = np.repeat(slots, lengths)
        positions = np.arange(len(token_slots)) - np.repeat(last_rows - (ends - 1), lengths)
        key_index = self._tables.rows_at(token_slots, positions, self._page)
        return StepInputs(
            work=ordered,
            ids=self._to_device(self._ids(ordered)),
            positions=self._to_device(positions),
            key_index=self._to_device(key_index),
            value_index=self._to_device(key_index + self._page),
            continued=self._continued(singles, slots),
            groups=self._groups_by_layer(slots, ends, chunks),
            last_rows=last_rows,
        )

    @staticmethod
    def _ids(ordered: list[SlotWork]) -> np.ndarray:
        ids: list[int] = []
        for work in ordered:
            ids.extend(work.tokens or (0,))
        return np.array(ids, dtype=np.int64)

    def _continued(self, singles: list[SlotWork], slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | None:
        rows = np.array([row for row, work in enumerate(singles) if work.is_decode], dtype=np.int64)
        if not len(rows):
            return None
        return self._to_device(rows), self._to_device(slots[rows])

    def _groups_by_layer(
        self, slots: np.ndarray, ends: np.ndarray, chunks: list[SlotWork]
    ) -> list[list[AttentionGroup]]:
        """Layers of one window share their groups, and so do those whose window nobody has outgrown yet."""
        longest = int(ends.max())
        windows = [window if window is not None and window < longest else None for window in self._windows]
        decodes = len(slots) - len(chunks)
        made = {}
        for window in dict.fromkeys(windows):
            made[window] = self._decode_groups(slots[:decodes], ends[:decodes], window)
            made[window] += [self._chunk_group(w.slot, w.start, w.length, window) for w in chunks]
        return [made[window] for window in windows]

    def _decode_groups(self, slots: np.ndarray, ends: np.ndarray, window: int | None) -> list[AttentionGroup]:
        """One group per run of the (ascending) contexts whose padded size stays within GROUP_BYTES."""
        contexts = ends if window is None else np.minimum(ends, window)
        starts = None if window is None else ends - contexts
        groups, first = [], 0
        for last in range(len(slots)):
            ends_here = last + 1 == len(slots)
            if ends_here or (last + 2 - first) * contexts[last + 1] > self._group_tokens:
                here = slice(first, last + 1)
                groups.append(self._decode_group(slots[here], contexts[here], None if starts is None else starts[here]))
                first = last + 1
        return groups

    def _decode_group(self, slots: np.ndarray, contexts: np.ndarray, starts: np.ndarray | None) -> AttentionGroup:
        """starts: where each context begins; None: all at 0."""
        longest = int(contexts[-1])
        if starts is None:
            rows = self._tables.rows(slots, longest, self._page)
        else:  # a context shorter than the longest starts at 0, so that none is read beyond the longest sequence
            rows = self._tables.rows_at(slots[:, None], starts[:, None] + np.arange(longest), self._page)
        mask = None
        if contexts[0] != longest:
            attended = np.arange(longest) < contexts[:, None]
            rows = np.where(attended, rows, rows[:, :1])
            mask = self._mask(attended[:, None, None, :])
        return AttentionGroup(len(slots), 1, longest, self._kv_index(rows), mask)

    def _chunk_group(self, slot: int, start: int, length: int, window: int | None) -> AttentionGroup:
        end = start + length
        first = 0 if window is None else max(0, start + 1 - window)
        keys, queries = np.arange(first, end), np.arange(start, end)[:, None]
        rows = self._kv_index(self._tables.rows_at(np.array([slot]), keys, self._page))
        if start == 0 and (window is None or end <= window):
            return AttentionGroup(1, length, end, rows, causal=True)
        attended = keys <= queries
        if window is not None:
            attended &= keys > queries - window
        return AttentionGroup(1, length, end - first, rows, self._mask(attended))

    def _kv_index(self, key_rows: np.ndarray) -> torch.Tensor:
        both = np.empty((2, key_rows.size), dtype=np.int64)
        both[0] = key_rows.reshape(-1)
        np.add(both[0], self._page, out=both[1])
        return self._to_device(both.reshape(-1))

    def _mask(self, attended: np.ndarray) -> torch.Tensor:
        mask = np.where(attended, np.float32(0), np.float32(-np.inf))
        return torch.from_numpy(mask).to(self._device, self._dtype)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
