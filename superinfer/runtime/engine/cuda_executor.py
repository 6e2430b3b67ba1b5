"""Runs step plans on a GPU, overlapped: `submit` only enqueues, sampled tokens feed the next step on the device.

A step of decodes alone replays a CUDA graph of its bucket. A step with prefill chunks, decodes and chunks in one
forward, replays one too where attention of chunks can be captured (`cuda_mixed`), else graphs between the layers'
attention (`cuda_pieces`); it runs eagerly where it has more rows than any graph. The host waits in `collect`, for the
step's own tokens, and nowhere else.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from superinfer.kernels import decode_step
from superinfer.kernels.paged import AttentionCall
from superinfer.kernels.sampling import token_logprobs
from superinfer.runtime.engine.constraints import split_forced
from superinfer.runtime.engine.cuda_attention import Part, SplitAttention, StepAttention
from superinfer.runtime.engine.cuda_batch import ChunkBatch, DecodeBatch, MixedBatch, decode_buckets
from superinfer.runtime.engine.cuda_mixed import DecodeRows, MixedGraph, MixedGraphs, attended_rows, graph_rows
from superinfer.runtime.engine.cuda_pieces import MixedBuffers, Pieces, mixed_rows
from superinfer.runtime.engine.cuda_tails import Tails, tail_rows
from superinfer.runtime.engine.executor import Duplex, ExecutorLimits, TierLimits
from superinfer.runtime.engine.grammar import GrammarCompiler
from superinfer.runtime.engine.marker import Marker
from superinfer.runtime.engine.readback import Pending
from superinfer.runtime.engine.sampling_state import SamplingState
from superinfer.runtime.engine.staging import HostStage
from superinfer.runtime.engine.step_inputs import BlockTables, Wanted, wanted_rows
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.loader import Progress
from superinfer.runtime.scheduler.plan import Decodes, SlotWork, StepPlan, StepResult

# Pairs of marks in use by turns: those of the steps under way, and of two before, which pinned memory may wait for.
MARKS = 4
# Prompts that may end in a step whose end is a graph: as many as attention of chunks takes at once.
MOST_ENDING = 64


@dataclass(slots=True)
class Bucket:
    """Decodes of one padded size. graph: None where steps run eagerly."""

    size: int
    attention: AttentionCall
    graph: torch.cuda.CUDAGraph | None = None


class CudaExecutor:
    """Implements `Executor` with steps that overlap: two may be submitted before the first is collected.

    A step that raised has still freed, initialised and extended the slots its plan names; its tokens are lost, later
    plans run as usual. Its copies have been started all the same.
    """

    def __init__(
        self,
        model: CausalLM,
        limits: ExecutorLimits,
        attention: StepAttention,
        *,
        max_batch_tokens: int,
        model_name: str,
        path: str,
        graphs: bool = True,
        on_progress: Progress | None = None,
    ) -> None:
        """graphs: capture CUDA graphs now."""
        weight, config = model.lm_head.weight, model.config
        self.limits = limits
        self.tier: TierLimits | None = None
        self._duplex: Duplex | None = None
        self.depth = 2
        self.waited_s = 0.0
        self.model_name = model_name
        self.path = path
        self.architecture = config.architecture
        self.eos_token_ids = config.eos_token_ids
        self.dtype = str(weight.dtype).removeprefix("torch.")
        self.device = str(weight.device)

        # One block more than the pool: padding rows write there.
        shape = (limits.num_blocks + 1, config.num_layers, 2, limits.page_size, config.num_kv_heads, config.head_dim)
        self.cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._model = model
        self._device = weight.device
        self._views = list(self.cache.unbind(1))
        blocks_per_slot = -(-limits.max_model_len // limits.page_size)
        self._tables = BlockTables(limits.num_slots, blocks_per_slot, limits.num_blocks, limits.page_size, True)
        self._decodes = DecodeBatch(limits, self._tables, self._device)
        self._attention = attention
        self._chunks, self._fresh = (ChunkBatch(limits, max_batch_tokens, self._tables, self._device) for _ in range(2))
        self.grammars = GrammarCompiler(path, config.vocab_size, config.eos_token_ids)
        self._stage = HostStage(self._device)
        self._to_device = self._stage.to_device
        self._sampling = SamplingState(limits.num_slots, config.vocab_size, self._device, self.grammars, self._stage)
        # One slot more than there are: padding rows take their token there.
        self._last_tokens = torch.zeros(limits.num_slots + 1, dtype=torch.int64, device=self._device)
        # Of greedy steps, where their graphs write them; two steps may be under way.
        on_gpu = self._device.type == "cuda"
        self._tokens = torch.zeros(2, limits.num_slots, dtype=torch.int64, pin_memory=on_gpu)
        # Shared by all buckets: of their own, they would keep 1 GB for a vocabulary of 128,000.
        self._logits = torch.zeros(limits.num_slots, config.vocab_size, dtype=weight.dtype, device=self._device)
        self._sent = Marker(self._device)
        self._marks = deque((Marker(self._device), Marker(self._device)) for _ in range(MARKS))
        self._pending: deque[Pending | Exception] = deque()
        self._buckets = [
            Bucket(size, attention.decodes(self._decodes.paged(size))) for size in decode_buckets(limits.num_slots)
        ]
        self._pieces: list[Pieces] = []
        self._mixed: MixedBuffers
        self._padding_place = limits.num_blocks * limits.page_size
        most_rows = self._buckets[-1].size + max_batch_tokens
        self._mixed_graphs: MixedGraphs | None = None
        sizes = mixed_rows(most_rows) if attention.captured is None else graph_rows(most_rows)
        self.captured_tokens = sizes[-1] if graphs else 0  # of the largest step with chunks that graphs replay
        attended = sizes[-1] if attention.captured is None else attended_rows(most_rows, self._buckets[-1].size)
        self._tails = Tails(model, attended, tail_rows(limits.num_slots, MOST_ENDING))
        if attention.captured is not None:
            batch = MixedBatch(limits, graph_rows(most_rows)[-1], self._tables, self._device)
            beside = [DecodeRows(bucket.size, bucket.attention) for bucket in self._buckets]
            self._mixed_graphs = MixedGraphs(
                model, self._views, batch, self._decodes, beside, attention.captured, most_rows, self._last_tokens,
                self._stage, self._tails,
            )  # fmt: skip
        if graphs:
            pool = torch.cuda.graph_pool_handle()  # shared: one step runs at a time
            if self._mixed_graphs is None:
                self._capture_pieces(most_rows, on_progress)
            else:
                self._mixed_graphs.capture(pool, on_progress)
            with torch.inference_mode():
                self._tails.capture(pool)
            self._capture(pool, on_progress)

    def add_tier(self, duplex: Duplex, tier: TierLimits) -> None:
        """From now on plans may bring copies, between `cache` and what `duplex` has; it is closed with the executor."""
        self._duplex, self.tier = duplex, tier

    # ------------------------------------------------------------------ steps

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        """Enqueue a step. What it raises is raised by the `collect` that belongs to it."""
        try:
            pending = self._start(plan)
            self._tell_ahead(plan, pending)
            self._pending.append(pending)
        except Exception as error:
            self._sent.record()
            self._pending.append(error)
        finally:
            if self._duplex is not None:
                self._duplex.release()

    def collect(self) -> StepResult:
        """Raises what the step raised; RuntimeError when no step is waiting to be collected."""
        if not self._pending:
            raise RuntimeError("collect() without a submitted step")
        pending = self._pending.popleft()
        if isinstance(pending, Exception):
            raise pending
        result = pending.result()
        if self._duplex is not None:  # the step is over, so all that it waited for is
            result.copied, result.failed_copies, result.link = self._duplex.report()
        return result

    @property
    def busy(self) -> bool:
        """See Executor."""
        last = self._pending[-1] if self._pending else None
        return isinstance(last, Pending) and not last.ended.reached

    def close(self) -> None:
        """Results not collected are dropped; the executor cannot be used afterwards."""
        self.grammars.close()
        self._pending.clear()
        if self._duplex is not None:
            self._duplex.close()
            self._duplex = None
        self._buckets.clear()
        self._pieces.clear()
        self._mixed_graphs = None
        self._views.clear()
        self.cache = torch.empty(0)

    def _start(self, plan: StepPlan) -> Pending:
        begun, ended = self._marks[0]
        self._marks.rotate(1)
        before = self._pending[-1] if self._pending else None
        # A mark costs the host as much as a graph: a step right behind another begins where that ends.
        behind = before.ended if isinstance(before, Pending) and not before.ended.reached else None
        pending = Pending(plan.step, behind or begun, ended)
        self._stage.next_step()
        if self._duplex is not None:
            self._duplex.start(plan.copies, plan.waits, hold=True)
        if behind is None:
            begun.record()
        if self._duplex is not None:
            self._duplex.wait(plan.waits)
        for slot in plan.freed:
            self._tables.clear(slot)
            self._sampling.release(slot)
        for init in plan.init:
            self._tables.clear(init.slot)
            self._sampling.start(init)
        grown = [(work.slot, work.new_blocks) for work in plan.others if work.new_blocks]
        if grown or plan.decodes.new_blocks:
            self._tables.grow([*plan.decodes.new_blocks, *grown])
        told = [work for work in plan.others if work.tokens]
        chunks = [work for work in told if not work.is_one_step]
        decodes = _decode_rows(plan)
        # The last step's copies out of pinned buffers come before its kernels: this wait is short, mostly none.
        self._sent.wait()
        if len(told) > len(chunks):
            self._tell([work for work in told if work.is_one_step])
        if chunks:
            self._mixed_step(decodes, chunks, pending)
        elif len(decodes):
            self._decode_step(decodes, pending)
        pending.in_order = len(plan.decodes)
        pending.ended.record()
        return pending

    def _tell_ahead(self, plan: StepPlan, pending: Pending) -> None:
        """What a grammar forces is known when the step is given to the device: the result of the step before can tell
        it, and the next plan compute it."""
        if not pending.forced:
            return
        before = self._pending[-1] if self._pending else None
        told = {work.slot for work in plan.work if work.tokens}
        if isinstance(before, Pending) and before.slots is not None:
            pending.forced, earlier = split_forced(pending.forced, told, before.slots.tolist())
            before.forced |= earlier
        else:
            pending.forced, _ = split_forced(pending.forced, told, ())

    def _tell(self, works: Sequence[SlotWork]) -> None:
        """Put the one token that each computes where decodes look for theirs: a sequence that comes back from the
        second tier, or whose prefix is cached but for its last token, costs a row of a decode step and no chunk."""
        tokens = np.array([work.tokens[0] for work in works], dtype=np.int64)
        if tokens.min() < 0 or tokens.max() >= self.limits.vocab_size:
            raise IndexError(
                f"token ids {tokens.min()}..{tokens.max()} are not within the vocabulary of {self.limits.vocab_size}"
            )
        slots = np.array([work.slot for work in works], dtype=np.int64)
        self._last_tokens.index_copy_(0, self._to_device(slots), self._to_device(tokens))
        for work in works:
            self._sampling.caught_up(work.slot, work.start + 1)

    def _fill_decodes(self, decodes: Decodes) -> tuple[Bucket, np.ndarray]:
        bucket = next(bucket for bucket in self._buckets if bucket.size >= len(decodes))
        slots, positions = decodes.slots, decodes.positions
        bucket.attention.plan(self._decodes.fill(slots, positions, bucket.size, self._stage, bucket.attention))
        return bucket, decodes.slots

    def _decode_step(self, decodes: Decodes, pending: Pending) -> None:
        bucket, slots = self._fill_decodes(decodes)
        if bucket.graph is not None:
            bucket.graph.replay()
        else:
            self._decode_forward(bucket)
        turn, count = self._decodes.over(pending.ended), len(slots)
        if self._sampling.is_plain(slots):  # the graph has picked the tokens and kept them for the next step
            self._sampling.advance(slots)
            pending.keep_written(slots, self._tokens[turn, :count])
        else:
            chosen = self._tokens[turn, :count]  # by the graph, of the logits as they are
            self._sample(self._logits[:count], slots, pending, lambda: chosen.numpy() >= 0)

    def _decode_forward(self, bucket: Bucket) -> None:
        """What a bucket's graph holds: from the slots' last tokens to their next ones."""
        self._decodes.receive(bucket.size)
        rows = self._decodes.rows(bucket.size)
        assert rows.slots is not None
        attention = self._split(rows.places, [Part(bucket.size, bucket.attention)])
        hidden = self._model(self._last_tokens.index_select(0, rows.slots), rows.positions, attention)
        logits = self._logits[: bucket.size]
        torch.matmul(hidden, self._model.lm_head.weight.t(), out=logits)
        decode_step.keep_largest(logits, rows.slots, self._last_tokens, self._tokens, self._decodes.turn)

    def _mixed_step(self, decodes: Decodes, chunks: list[SlotWork], pending: Pending) -> None:
        """Rows: the decodes of a bucket with their padding, the chunks' tokens, padding to a size that is captured. The
        last layer's second half has those alone that are wanted."""
        if self._mixed_graphs is not None:
            graph = self._mixed_graphs.find(len(decodes), chunks)
            if graph is not None:
                return self._replay_mixed(self._mixed_graphs, graph, decodes, chunks, pending)
        parts, inputs, padded = [], [], 0
        slots = np.empty(0, dtype=np.int64)
        if len(decodes):
            bucket, slots = self._fill_decodes(decodes)
            padded = bucket.size
            self._decodes.receive(padded)
            self._decodes.over(pending.ended)
            head = self._decodes.rows(padded)
            assert head.slots is not None
            last = self._last_tokens.index_select(0, head.slots).int()
            inputs.append((last, head.positions, head.places))
            parts.append(Part(padded, bucket.attention))
        fresh_call = self._attention.fresh
        fresh = [] if fresh_call is None else [work for work in chunks if not work.start]
        chunks = [*(work for work in chunks if work.start or fresh_call is None), *fresh]
        if len(fresh) < len(chunks):
            parts.append(self._fill_chunks(self._chunks, chunks[: len(chunks) - len(fresh)], inputs))
        if fresh:
            parts.append(self._fill_chunks(self._fresh, fresh, inputs))
        self._sent.record()
        ids, positions, places = (torch.cat(given) for given in zip(*inputs, strict=True))
        pieces = next((pieces for pieces in self._pieces if pieces.rows >= len(ids)), None)
        wanted = _wanted(len(slots), padded, chunks)
        wanted_ids = self._to_device(wanted.rows)
        if pieces is None:
            hidden = self._model(ids, positions, self._split(places, parts), wanted_ids)
        else:
            self._mixed.fill(ids, positions, places, pieces.rows, self._padding_place)
            pieces.run([(part.rows, part.call) for part in parts])
            hidden = self._tails.run(wanted_ids)
        self._finish_mixed(hidden, wanted, slots, chunks, pending)

    def _fill_chunks(
        self, batch: ChunkBatch, chunks: list[SlotWork], inputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> Part:
        """Send them and plan their attention. inputs: ids, positions and places of the step so far, to be added to."""
        call = self._attention.fresh if batch is self._fresh else self._attention.chunks
        assert call is not None
        rows, paged = batch.fill(chunks)
        assert rows.ids is not None
        call.plan(paged)
        inputs.append((rows.ids, rows.positions, rows.places))
        return Part(len(rows.ids), call, batch is self._fresh)

    def _replay_mixed(
        self,
        graphs: MixedGraphs,
        graph: MixedGraph,
        decodes: Decodes,
        chunks: list[SlotWork],
        pending: Pending,
    ) -> None:
        graphs.prepare(graph, decodes.slots, decodes.positions, chunks)
        self._sent.record()
        graphs.run(graph, pending.ended)
        wanted = _wanted(len(decodes), len(decodes), chunks)
        hidden = self._tails.run(self._to_device(wanted.rows))
        self._finish_mixed(hidden, wanted, decodes.slots, chunks, pending)

    def _finish_mixed(
        self, hidden: torch.Tensor, wanted: Wanted, slots: np.ndarray, chunks: list[SlotWork], pending: Pending
    ) -> None:
        """Sample the decodes and the chunks that end their prompt; score what is to be scored. hidden: of `wanted`,
        which has the decodes first."""
        ending = wanted.sampled
        sampled = len(slots) + len(ending)
        if sampled:
            slots = np.concatenate((slots, np.array([chunks[i].slot for i in ending], dtype=np.int64)))
            for i in ending:
                self._sampling.caught_up(chunks[i].slot, chunks[i].start + chunks[i].length)
            logits = self._model.lm_head(hidden[:sampled])
            if self._sampling.is_plain(slots):
                self._sampling.advance(slots)
                self._choose_largest(logits, slots, pending)
            else:
                self._sample(logits, slots, pending)
        if wanted.scored:
            scored = [chunks[i] for i in wanted.scored]
            tokens = np.concatenate([np.array(work.score, dtype=np.int64) for work in scored])
            tops = [self._sampling.top_logprobs(work.slot) for work in scored]
            pending.keep_scores(scored, tops, self._score(hidden[sampled:], tokens, max(tops)))

    def _choose_largest(self, logits: torch.Tensor, slots: np.ndarray, pending: Pending) -> None:
        """Of a step that no graph ends: what the graph of a decode step does."""
        tokens = torch.empty(len(slots), dtype=torch.int64, pin_memory=logits.is_cuda)
        rows = self._to_device(slots.astype(np.int32))
        decode_step.keep_largest(logits, rows, self._last_tokens, tokens, self._decodes.turn)
        pending.keep_written(slots, tokens)

    def _sample(
        self, logits: torch.Tensor, slots: np.ndarray, pending: Pending, seen: Callable[[], np.ndarray] | None = None
    ) -> None:
        """Tokens stay on the device for the next step, and go to the host for this one's result. seen: says which rows'
        logits are numbers, [rows] bool, once the step is over; None: nobody has looked."""
        sampled = self._sampling.sample(logits, slots)
        if sampled.told is None and seen is None:
            best = torch.empty(len(slots), decode_step.PARTS, pin_memory=logits.is_cuda)
            at_best = torch.empty(best.shape, dtype=torch.int32, pin_memory=logits.is_cuda)
            decode_step.look_through(logits, best, at_best)
            seen = partial(decode_step.are_finite, best.numpy(), at_best.numpy())
        index = sampled.index if sampled.index is not None else self._to_device(slots)
        self._last_tokens.index_copy_(0, index, sampled.tokens)
        asked = [] if sampled.logprob_rows is None else slots[sampled.logprob_rows].tolist()
        pending.keep_sampled(slots, sampled, [self._sampling.top_logprobs(slot) for slot in asked], seen)
        self._sampling.told(slots, partial(self._read, pending))

    def _read(self, pending: Pending) -> list[int]:
        """The tokens of a step under way, for whose grammars the next step's are to be masked."""
        asked = time.perf_counter()
        tokens = pending.read_tokens()
        self.waited_s += time.perf_counter() - asked
        return tokens

    def _score(self, hidden: torch.Tensor, tokens: np.ndarray, top: int) -> tuple[torch.Tensor, ...]:
        """What `token_logprobs` gives, without the rivals where top=0. A piece at a time: float32 logits of a long
        prompt at once would fill gigabytes."""
        parts = []
        for start in range(0, len(tokens), 256):
            piece = slice(start, start + 256)
            logits = self._model.logits(hidden[piece])
            parts.append(token_logprobs(logits, self._to_device(tokens[piece]), top)[: 3 if top else 1])
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))

    def _split(self, places: torch.Tensor, parts: list[Part]) -> SplitAttention:
        return SplitAttention(self._views, places, self._model.config.num_kv_heads, parts)

    # ------------------------------------------------------------------ graphs

    @torch.inference_mode()
    def _capture(self, pool: Any, on_progress: Progress | None) -> None:
        """One graph per bucket, the largest first, so that the others fit into the memory it took."""
        nobody = np.empty(0, dtype=np.int64)
        for done, bucket in enumerate(reversed(self._buckets)):
            if on_progress is not None:
                on_progress("capturing CUDA graphs", done / len(self._buckets))
            bucket.attention.plan(self._decodes.fill(nobody, nobody, bucket.size, self._stage, bucket.attention))
            self._decode_forward(bucket)  # loads kernels and libraries, which a capture must not
            self._decodes.over(self._sent)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._decode_forward(bucket)
            bucket.graph = graph
        torch.cuda.synchronize()

    @torch.inference_mode()
    def _capture_pieces(self, most_rows: int, on_progress: Progress | None) -> None:
        sizes = mixed_rows(most_rows)
        self._mixed = MixedBuffers(sizes[-1], self._model.config, self._tails)
        self._mixed.places.fill_(self._padding_place)
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)
        for done, rows in enumerate(reversed(sizes)):
            if on_progress is not None:
                on_progress("capturing CUDA graphs of mixed steps", done / len(sizes))
            self._pieces.insert(0, Pieces(self._model, self._views, self._mixed, rows, stream, pool))
        torch.cuda.synchronize()


def _wanted(decodes: int, padded: int, chunks: Sequence[SlotWork]) -> Wanted:
    """All decodes, then what is wanted of the chunks. padded: the row that the first chunk begins at."""
    of_chunks = wanted_rows(chunks, padded - 1 + np.cumsum([work.length for work in chunks]))
    return of_chunks._replace(rows=np.concatenate((np.arange(decodes), of_chunks.rows)))


def _decode_rows(plan: StepPlan) -> Decodes:
    """All that is one row of a decode step: the plan's decodes, then what others come to one."""
    single = [work for work in plan.others if work.is_one_step]
    if not single:
        return plan.decodes
    slots = np.array([work.slot for work in single], dtype=np.int64)
    positions = np.array([work.start for work in single], dtype=np.int64)
    return Decodes(np.concatenate((plan.decodes.slots, slots)), np.concatenate((plan.decodes.positions, positions)))
