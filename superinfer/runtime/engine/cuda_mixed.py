"""Steps with prefill chunks as one CUDA graph each, for attention of chunks that can be captured.

A graph depends on the number of rows alone, which steps are padded to: how many there are of decodes and of chunks is
told by plans and index buffers. Attention of decodes that does not skip those without a block answers as many rows as
the largest batch has, whoever they belong to, and attention of chunks answers the chunks' rows again; steps without
decodes then have a graph of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from superinfer.kernels import fused
from superinfer.kernels.paged import AttentionCall
from superinfer.runtime.engine.cuda_batch import DecodeBatch, MixedBatch
from superinfer.runtime.engine.cuda_tails import Tails
from superinfer.runtime.engine.marker import Marker
from superinfer.runtime.engine.staging import HostStage
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.loader import Progress
from superinfer.runtime.scheduler.plan import SlotWork

# Numbers of rows that steps are padded to. Products take as long as they have rows (one H200: 1,328 in a graph of 1,408
# took 38.8 ms, unpadded 35.9), so padding must be little. Steps of more rows run unpadded: they keep the GPU busy for
# longer than they take to launch.
GRAPH_ROWS = (16, *range(32, 1025, 32), *range(1088, 2049, 64))


class CapturedChunks(NamedTuple):
    """Attention of chunks that can be captured. make: for graphs of so many rows, with block indices in the buffer
    given. most: chunks that it takes in one step."""

    make: Callable[[int, torch.Tensor], AttentionCall]
    most: int


def graph_rows(most: int) -> list[int]:
    """The numbers of rows to capture where no step has more than `most`."""
    return [rows for rows in GRAPH_ROWS if rows < most] + [rows for rows in GRAPH_ROWS if rows >= most][:1]


def attended_rows(most: int, slots: int) -> int:
    """Rows that attention may answer in a graph: attention of decodes answers all slots'. most: as in `graph_rows`."""
    return max(graph_rows(most)[-1], slots)


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """Attention of decodes that a graph holds: of the first `size` rows."""

    size: int
    attention: AttentionCall


@dataclass(slots=True)
class MixedGraph:
    """One number of rows. decodes: None where there may be none in the step."""

    rows: int
    chunks: AttentionCall
    decodes: DecodeRows | None
    graph: torch.cuda.CUDAGraph | None = None


class MixedGraphs:
    """Implements steps with chunks for the executor; `find` says which step it takes."""

    def __init__(
        self, model: CausalLM, views: list[torch.Tensor], batch: MixedBatch, decode_batch: DecodeBatch,
        buckets: Sequence[DecodeRows], chunks: CapturedChunks, most_rows: int, last_tokens: torch.Tensor,
        stage: HostStage, tails: Tails,
    ) -> None:  # fmt: skip
        """views: the cache by layer. buckets: attention of decodes, smallest first; the last has all slots. most_rows:
        of any step. last_tokens: [slots + 1] int64, the token sampled last in each slot. stage: of the executor. tails:
        with room for `attended_rows`."""
        self._stage = stage
        self._model, self._views = model, views
        self._batch, self._decode_batch = batch, decode_batch
        self._most_chunks = chunks.most
        self._last_tokens = last_tokens
        sizes = graph_rows(most_rows)
        weight, config = model.lm_head.weight, model.config
        heads = attended_rows(most_rows, buckets[-1].size), config.num_heads, config.head_dim
        self._q = torch.zeros(heads, dtype=weight.dtype, device=weight.device)
        self._attended, self._residual = tails.attended.view(heads), tails.residual
        self._graphs = []
        for rows in sizes:
            attention = chunks.make(rows, batch.rows(rows)[3])
            beside = next((bucket for bucket in buckets if bucket.size >= rows), buckets[-1])
            if not beside.attention.skips_empty:
                self._graphs.append(MixedGraph(rows, attention, None))
            self._graphs.append(MixedGraph(rows, attention, beside))

    def capture(self, pool: Any, on_progress: Progress | None) -> None:
        """All graphs, the largest first, so that the others fit into the memory it took."""
        nobody, never = np.empty(0, dtype=np.int64), Marker(self._last_tokens.device)
        for done, mixed in enumerate(reversed(self._graphs)):
            if on_progress is not None:
                on_progress("capturing CUDA graphs of mixed steps", done / len(self._graphs))
            mixed.chunks.plan(self._batch.nothing(mixed.rows))
            if mixed.decodes is not None:
                self._plan_decodes(mixed.decodes, nobody, nobody)
            self.run(mixed, never)  # loads kernels and libraries, which a capture must not
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._forward(mixed)
            mixed.graph = graph

    def find(self, decodes: int, chunks: Sequence[SlotWork]) -> MixedGraph | None:
        """The smallest graph for a step; None where there is none."""
        if len(chunks) > self._most_chunks:
            return None
        rows = decodes + sum(work.length for work in chunks)
        fitting = (mixed for mixed in self._graphs if mixed.rows >= rows)
        return next((mixed for mixed in fitting if not decodes or mixed.decodes is not None), None)

    def prepare(self, mixed: MixedGraph, slots: np.ndarray, positions: np.ndarray, chunks: Sequence[SlotWork]) -> None:
        """Send a step's inputs and plans. slots, positions: [decodes] int64."""
        mixed.chunks.plan(self._batch.fill(slots, positions, chunks, mixed.rows))
        if mixed.decodes is not None:
            self._plan_decodes(mixed.decodes, slots, positions)

    def _plan_decodes(self, decodes: DecodeRows, slots: np.ndarray, positions: np.ndarray) -> None:
        attention = decodes.attention
        batch = self._decode_batch.fill(slots, positions, decodes.size, self._stage, attention, attention.skips_empty)
        attention.plan(batch)

    def run(self, mixed: MixedGraph, ended: Marker) -> None:
        """What was prepared, up to the last layer's attention; `tails` has the rows then: decodes, chunks, padding.
        ended: will be set behind the step."""
        if mixed.graph is None:
            self._forward(mixed)
        else:
            mixed.graph.replay()
        if mixed.decodes is not None:
            self._decode_batch.over(ended)

    def _forward(self, mixed: MixedGraph) -> None:
        if mixed.decodes is not None:
            self._decode_batch.receive(mixed.decodes.size, mixed.decodes.attention.skips_empty)
        sources, positions, places, _ = self._batch.rows(mixed.rows)
        last = self._last_tokens.index_select(0, (-1 - sources).clamp_(min=0))
        ids = torch.where(sources < 0, last, sources.long())
        _, residual = self._model.begin(ids, positions, _Both(self, mixed, places))
        self._residual[: mixed.rows].copy_(residual)


class _Both:
    """Implements `AttentionBackend` for one graph."""

    def __init__(self, graphs: MixedGraphs, mixed: MixedGraph, places: torch.Tensor) -> None:
        self._graphs, self._mixed, self._places = graphs, mixed, places

    def rotate_and_attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See AttentionBackend."""
        graphs, mixed = self._graphs, self._mixed
        q, out, view = graphs._q, graphs._attended, graphs._views[layer]
        fused.rope_and_store(qkv, cos, sin, self._places, view, view.shape[3], out=q[: mixed.rows])
        if mixed.decodes is not None:
            size = mixed.decodes.size
            mixed.decodes.attention.run(q[:size], view, layer, out[:size])
        mixed.chunks.run(q[: mixed.rows], view, layer, out[: mixed.rows])
        return out[: mixed.rows].flatten(1)
