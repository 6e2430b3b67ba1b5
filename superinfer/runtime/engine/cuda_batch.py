"""A step's work as the index tensors of paged attention, in buffers that never move where steps are captured.

Decodes are padded to a bucket, so that one CUDA graph serves every batch size up to it. Padding rows belong to a slot
and a block of their own, behind the real ones: they read and write nothing that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from superinfer.kernels import decode_step
from superinfer.kernels.decode_step import HEAD
from superinfer.kernels.paged import AttentionCall, PagedBatch
from superinfer.runtime.engine.executor import ExecutorLimits
from superinfer.runtime.engine.marker import Marker
from superinfer.runtime.engine.staging import HostStage
from superinfer.runtime.engine.step_inputs import BlockTables
from superinfer.runtime.scheduler.plan import SlotWork


def decode_buckets(max_batch: int) -> list[int]:
    """Batch sizes that decodes are padded to: at most 7 rows of padding up to 256, at most 31 above."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, max_batch + 32, 32)]
    return [size for size in sizes if size < max_batch] + [max_batch]


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens of a step. slots: [rows] int32, whose last token is the input (decodes); positions, places: [rows] int32,
    place = block · page + offset; ids: [rows] int32 (chunks). All on the device; None where it does not apply."""

    positions: torch.Tensor
    places: torch.Tensor
    slots: torch.Tensor | None = None
    ids: torch.Tensor | None = None


class PinnedUpload:
    """One int32 buffer in pinned host memory and its twin on the device, filled and sent as a whole."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.host = torch.zeros(size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.array = self.host.numpy()
        self.device = torch.zeros(size, dtype=torch.int32, device=device)

    def send(self, count: int) -> None:
        """Copy the first `count` numbers, in the order of the stream, without waiting."""
        if self.device.is_cuda:
            from superinfer.kernels import host_memory  # needs triton, which comes with CUDA builds of torch

            host_memory.copy(self.device[:count], self.host[:count])
        else:
            self.device[:count].copy_(self.host[:count])


def _aligned(count: int) -> int:
    """Up to a multiple of 16 bytes: Triton compiles another variant of a kernel for pointers that are not."""
    return -(-count // 4) * 4


class DecodeBatch:
    """The decodes of one step: `fill` writes them to pinned memory, `receive`, which may be captured, has the device
    fetch them and work out the rest (`kernels.decode_step`). Each `fill` is followed by one `receive`, then `over`.

    In the device's buffer lie positions, slots, places, last page lengths and indptr, then the block indices.
    """

    def __init__(self, limits: ExecutorLimits, tables: BlockTables, device: torch.device) -> None:
        """tables: with `page` rows a block, and changes kept."""
        self._page = limits.page_size
        self._tables = tables
        self._device = device
        self._padding_slot = limits.num_slots
        most = _aligned(limits.num_slots)
        self._most = most
        self._room = 2 * most  # changes that are sent with a step
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(2, HEAD + 2 * most + 2 * self._room, dtype=torch.int32, pin_memory=on_gpu)
        self._arrays = self._host.numpy()
        self._turns = 0  # as the device counts them
        self._turn = torch.zeros(1, dtype=torch.int32, device=device)
        self._over: list[Marker | None] = [None, None]  # of the step that last had a half of `_host`
        self._waiting = False  # what was filled has not been received
        width = -(-limits.max_model_len // self._page)
        # One slot more than there are, and one block: padding's.
        self._table = torch.zeros(limits.num_slots + 1, width, dtype=torch.int32, device=device)
        self._table[self._padding_slot] = limits.num_blocks
        self._buffer = torch.zeros(5 * most + 8 + most * width, dtype=torch.int32, device=device)
        # Of what the host knows too: last page lengths, then indptr. Sequences may share blocks, so that more can be
        # listed than the pool has; the list itself is the device's alone.
        self._known = torch.zeros(2 * most + 8, dtype=torch.int32, pin_memory=on_gpu)
        self._known_array = self._known.numpy()
        self._unknown = torch.zeros(most * width, dtype=torch.int32)
        self._ones = torch.arange(most + 1, dtype=torch.int32)
        self._queries = self._ones.to(device)
        self._fixed: dict[int, PagedBatch] = {}

    def _view(self, section: int, count: int) -> torch.Tensor:
        return self._buffer[section * self._most : section * self._most + count]

    def rows(self, bucket: int) -> Rows:
        """The device buffers of a bucket; always the same ones."""
        return Rows(self._view(0, bucket), self._view(2, bucket), slots=self._view(1, bucket))

    def paged(self, bucket: int) -> PagedBatch:
        """The attention's view of the buffers. Block indices, as many as there is room for, are not known in host
        memory, where zeros stand for them."""
        fixed = self._fixed.get(bucket)
        if fixed is None:
            most = self._most
            fixed = self._fixed[bucket] = PagedBatch(
                qo_indptr=self._queries[: bucket + 1],
                kv_indptr=self._view(4, bucket + 1),
                kv_indices=self._buffer[5 * most + 8 :],
                last_page_len=self._view(3, bucket),
                host_qo_indptr=self._ones[: bucket + 1],
                host_kv_indptr=self._known[most : most + bucket + 1],
                host_kv_indices=self._unknown,
                host_last_page_len=self._known[:bucket],
                longest_query=1,
            )
        return fixed

    def fill(
        self,
        slots: np.ndarray,
        positions: np.ndarray,
        bucket: int,
        stage: HostStage,
        attention: AttentionCall,
        empty_padding: bool = False,
    ) -> PagedBatch:
        """Describe one step. slots, positions: [decodes] int64, of the token that is computed. stage: for more changes
        of the tables than usual. attention: that will run; without `reads_lengths` the host's own arrays stay as they
        are. empty_padding: rows of padding have no block, rather than one of their own (`AttentionCall.skips_empty`).

        Raises ValueError where a slot's blocks do not reach its position.
        """
        count, most = len(slots), self._most
        self._tables.check(slots, positions + 1, self._page)
        half = self._turns % 2
        over = self._over[half]
        if over is not None:
            over.wait()  # two steps ago: done, where no more steps are under way
        array = self._arrays[half]
        if self._waiting:  # the step of the last `fill` failed, and took changes with it
            self._table[: self._padding_slot] = stage.to_device(self._tables.whole())
        self._waiting = True
        array[0] = self._send_changes(array, stage)
        inputs = array[HEAD : HEAD + 2 * most].reshape(2, most)
        inputs[0, :count], inputs[1, :count] = positions, slots
        inputs[0, count:bucket], inputs[1, count:bucket] = 0, self._padding_slot
        if attention.reads_lengths:
            self._know(positions, bucket, empty_padding)
        return self.paged(bucket)

    def _know(self, positions: np.ndarray, bucket: int, empty_padding: bool) -> None:
        """Work out on the host, too, what the device will: last page lengths and indptr."""
        count, most = len(positions), self._most
        whole, offset = np.divmod(positions, self._page)
        known = self._known_array
        np.add(offset, 1, out=known[:count], casting="same_kind")
        known[count:bucket] = 1
        indptr = known[most : most + bucket + 1]
        np.add(whole, 1, out=indptr[1 : count + 1], casting="same_kind")
        indptr[count + 1 :] = 0 if empty_padding else 1
        np.cumsum(indptr[1:], out=indptr[1:])

    def _send_changes(self, array: np.ndarray, stage: HostStage) -> int:
        """Of the block tables; returns how many go with the step."""
        if not self._tables.num_changes:
            return 0
        places, blocks = self._tables.take_changes()
        count, first = len(places), HEAD + 2 * self._most
        if count > self._room:
            self._table.view(-1)[stage.to_device(places)] = stage.to_device(blocks.astype(np.int32))
            return 0
        array[first : first + count] = places
        array[first + self._room : first + self._room + count] = blocks
        return count

    def receive(self, bucket: int, empty_padding: bool = False) -> None:
        """On the device: what `fill` described, in the buffers."""
        most, rows = self._most, self.rows(bucket)
        assert rows.slots is not None
        decode_step.receive(self._host, self._buffer[: 2 * most], self._table, self._turn, self._room)
        paged = self.paged(bucket)
        decode_step.describe(
            rows.positions, rows.slots, rows.places, paged.last_page_len, paged.kv_indptr, paged.kv_indices,
            self._table, self._turn, self._page, empty_padding,
        )  # fmt: skip

    def over(self, marker: Marker) -> int:
        """The step's `receive` has been given to the stream; `marker` will be set behind all of the step. Returns whose
        turn it was, 0 or 1."""
        half = self._turns % 2
        self._over[half] = marker
        self._turns += 1
        self._waiting = False
        return half

    @property
    def turn(self) -> torch.Tensor:
        """[1] int32 on the device: how many steps it has received."""
        return self._turn


@dataclass(frozen=True, slots=True)
class ChunkArrays:
    """The prefill chunks of one step. ids, positions, places: [rows] as in Rows; the others as in PagedBatch."""

    ids: np.ndarray
    positions: np.ndarray
    places: np.ndarray
    qo_indptr: np.ndarray
    kv_indptr: np.ndarray
    last_page_len: np.ndarray
    kv_indices: np.ndarray
    longest_query: int


def describe_chunks(work: Sequence[SlotWork], tables: BlockTables, page: int, vocab: int) -> ChunkArrays:
    """Raises IndexError for token ids that the vocabulary does not have and ValueError where a slot's blocks do not
    cover its chunk."""
    slots = np.array([w.slot for w in work], dtype=np.int64)
    starts = np.array([w.start for w in work], dtype=np.int64)
    lengths = np.array([w.length for w in work], dtype=np.int64)
    ends = starts + lengths
    tables.check(slots, ends, page)
    ids = np.fromiter(chain.from_iterable(w.tokens for w in work), dtype=np.int64, count=int(lengths.sum()))
    if ids.min() < 0 or ids.max() >= vocab:
        raise IndexError(f"token ids {ids.min()}..{ids.max()} are not within the vocabulary of {vocab}")
    after = np.cumsum(lengths)
    positions = np.arange(len(ids)) + np.repeat(ends - after, lengths)
    pages = -(-ends // page)
    blocks = np.empty(int(pages.sum()), dtype=np.int32)
    tables.ragged(slots, pages, blocks)
    return ChunkArrays(
        ids,
        positions,
        tables.rows_at(np.repeat(slots, lengths), positions, page),
        np.concatenate(([0], after)),
        np.concatenate(([0], np.cumsum(pages))),
        (ends - 1) % page + 1,
        blocks,
        int(lengths.max()),
    )


class ChunkBatch:
    """The prefill chunks of one step, in buffers that are reused by the next."""

    def __init__(self, limits: ExecutorLimits, max_tokens: int, tables: BlockTables, device: torch.device) -> None:
        self._page = limits.page_size
        self._tables = tables
        self._vocab = limits.vocab_size
        blocks = limits.num_slots * -(-limits.max_model_len // self._page)
        self._upload = PinnedUpload(3 * max_tokens + 3 * (limits.num_slots + 1) + blocks + 7 * 4, device)

    def fill(self, work: Sequence[SlotWork]) -> tuple[Rows, PagedBatch]:
        """Describe and send one step's chunks. Raises as `describe_chunks`."""
        chunks = describe_chunks(work, self._tables, self._page, self._vocab)
        sections = (
            chunks.ids,
            chunks.positions,
            chunks.places,
            chunks.qo_indptr,
            chunks.kv_indptr,
            chunks.last_page_len,
            chunks.kv_indices,
        )
        device, host = self._send(sections)
        rows = Rows(device[1], device[2], ids=device[0])
        batch = PagedBatch(
            device[3], device[4], device[6], device[5], host[3], host[4], host[6], host[5], chunks.longest_query
        )
        return rows, batch

    def _send(self, sections: Sequence[np.ndarray]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        device, host, start = [], [], 0
        for section in sections:
            end = start + len(section)
            self._upload.array[start:end] = section
            device.append(self._upload.device[start:end])
            host.append(self._upload.host[start:end])
            start = _aligned(end)
        self._upload.send(start)
        return device, host


class MixedBatch:
    """The decodes and prefill chunks of one step, decodes first, with padding up to a number of rows that graphs were
    captured for: for each such number, buffers that never move.

    In the buffer lie, for `rows` of them, sources, positions and places, then the chunks' block indices. A source is a
    token id, or −1 − slot for the token sampled last in a slot.
    """

    def __init__(self, limits: ExecutorLimits, max_rows: int, tables: BlockTables, device: torch.device) -> None:
        self._page = limits.page_size
        self._tables = tables
        self._vocab = limits.vocab_size
        self._padding_place = limits.num_blocks * limits.page_size
        blocks = limits.num_slots * -(-limits.max_model_len // self._page)
        self._upload = PinnedUpload(3 * max_rows + blocks, device)

    def rows(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The device buffers: sources, positions, places, each [rows] int32, and the chunks' block indices."""
        device = self._upload.device
        sources, positions, places = device[: 3 * rows].view(3, rows).unbind()
        return sources, positions, places, device[3 * rows :]

    def nothing(self, rows: int) -> PagedBatch:
        """Padding alone, sent: as a capture needs it."""
        return self.fill(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), (), rows)

    def fill(self, slots: np.ndarray, positions: np.ndarray, chunks: Sequence[SlotWork], rows: int) -> PagedBatch:
        """Describe and send one step; returns the chunks, whose rows follow those of the decodes.

        slots, positions: [decodes] int64. Raises as `describe_chunks`, and ValueError where a slot's blocks do not
        reach its position.
        """
        array, decodes = self._upload.array, len(slots)
        sections = array[: 3 * rows].reshape(3, rows)
        host = self._upload.host
        end, indices = decodes, 3 * rows
        longest = 0
        qo_indptr, kv_indptr, last = (np.array(a) for a in ([decodes, decodes], [0, 1], [1]))
        if decodes:
            self._tables.check(slots, positions + 1, self._page)
            np.subtract(-1, slots, out=sections[0, :decodes], casting="same_kind")
            sections[1, :decodes] = positions
            sections[2, :decodes] = self._tables.rows_at(slots, positions, self._page)
        if chunks:
            found = describe_chunks(chunks, self._tables, self._page, self._vocab)
            end = decodes + len(found.ids)
            sections[0, decodes:end], sections[1, decodes:end] = found.ids, found.positions
            sections[2, decodes:end] = found.places
            indices += len(found.kv_indices)
            array[3 * rows : indices] = found.kv_indices
            qo_indptr, kv_indptr, last = found.qo_indptr + decodes, found.kv_indptr, found.last_page_len
            longest = found.longest_query
        sections[:2, end:] = 0
        sections[2, end:] = self._padding_place
        self._upload.send(indices)
        _, _, _, device_indices = self.rows(rows)
        qo, kv, pages = (torch.from_numpy(a.astype(np.int32)) for a in (qo_indptr, kv_indptr, last))
        # Only the host's half is read: the device learns of the chunks from their plan.
        return PagedBatch(qo, kv, device_indices, pages, qo, kv, host[3 * rows : indices], pages, longest)
